//! Tells agents the directory: each new state, to whoever asks with a node's SVID that is not revoked.
//!
//! Nothing waits in a queue. When an agent's connection has room it is told what leads from the state that it
//! was told last to the newest, however many there were in between (see [`History`]).

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::counters::Counters;
use super::service::{node, too_many_streams};
use crate::directory::Live;
use crate::directory::stream::history::History;
use crate::directory::stream::proto::directory_server::Directory;
use crate::directory::stream::proto::{Chunk, WatchRequest};
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::NodeName;
use crate::identity::svid::Leaf;

/// Streams of one node: of an agent and of its successor, and one of each that nobody has missed yet.
const MAX_STREAMS_OF_A_NODE: usize = 4;
/// How often it is looked at how the authority's own source stands.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What there is to tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct News {
    version: u64,
    /// What is wrong with the authority's own source.
    fault: String,
}

/// The directory, to be told.
#[derive(Debug)]
pub(super) struct Telling {
    history: Mutex<History>,
    news: watch::Sender<News>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    counters: Arc<Counters>,
    streams: Mutex<HashMap<NodeName, usize>>,
}

impl Telling {
    /// Has nothing to tell until [`Telling::follow`] runs.
    pub(super) fn new(bundle: watch::Receiver<Arc<TrustBundle>>, counters: Arc<Counters>) -> Arc<Self> {
        // Versions of two runs must not be taken for one another, so a run is never 0, which is nobody's.
        let run = fastrand::u64(1..);
        Arc::new(Self {
            history: Mutex::new(History::new(run)),
            news: watch::Sender::new(News::default()),
            bundle,
            counters,
            streams: Mutex::default(),
        })
    }

    /// Runs for ever: takes note of each state, and of what is wrong with its source.
    pub(super) async fn follow(self: Arc<Self>, live: Arc<Live>) {
        let mut changes = live.subscribe();
        let mut look = tokio::time::interval(LOOK_EVERY);
        // The first state may have been there before.
        let mut is_new = live.is_read();
        loop {
            if std::mem::take(&mut is_new) {
                let version = {
                    let mut history = lock(&self.history);
                    history.push(live.load());
                    history.version()
                };
                self.news.send_modify(|news| news.version = version);
            }
            tokio::select! {
                // Its sender lives as long as `live`.
                Ok(()) = changes.changed() => is_new = true,
                _ = look.tick() => {
                    let fault = live.standing().faults().unwrap_or_default();
                    self.news.send_if_modified(|news| {
                        let is_other = news.fault != fault;
                        news.fault = fault;
                        is_other
                    });
                }
            }
        }
    }

    /// What leads an agent from the state that it has to the newest, which it has then.
    async fn since(self: &Arc<Self>, has: WatchRequest) -> (Vec<Chunk>, WatchRequest) {
        // Whoever keeps it locked is making something.
        if let Ok(mut history) = self.history.try_lock()
            && history.is_made(&has)
        {
            return (history.since(&has), history.newest());
        }
        let telling = Arc::clone(self);
        // What nobody has asked for yet takes a while to make: 100,000 rows, say.
        let made = tokio::task::spawn_blocking(move || {
            let mut history = lock(&telling.history);
            (history.since(&has), history.newest())
        });
        // It ends only with the authority.
        made.await.unwrap_or_default()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while something was made left it unmade.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of a node's streams, counted for as long as it is there.
#[derive(Debug)]
struct Present {
    telling: Arc<Telling>,
    node: NodeName,
}

impl Present {
    fn enter(telling: &Arc<Telling>, node: &NodeName) -> Option<Self> {
        let mut streams = lock(&telling.streams);
        let count = streams.entry(node.clone()).or_default();
        if *count == MAX_STREAMS_OF_A_NODE {
            return None;
        }
        *count += 1;
        telling.counters.directory_streams(1);
        Some(Self { telling: Arc::clone(telling), node: node.clone() })
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        let mut streams = lock(&self.telling.streams);
        if let Some(count) = streams.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                streams.remove(&self.node);
            }
        }
        self.telling.counters.directory_streams(-1);
    }
}

/// What one agent is being told.
struct Told {
    present: Present,
    leaf: Arc<Leaf>,
    /// What it has once it was told all of `chunks`.
    has: WatchRequest,
    chunks: VecDeque<Chunk>,
    fault: String,
    news: watch::Receiver<News>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    is_over: bool,
}

impl Told {
    /// What is told next; waits until there is something.
    async fn next(mut self) -> Option<(Result<Chunk, Status>, Self)> {
        loop {
            if self.is_over {
                return None;
            }
            let revoked = self.bundle.borrow_and_update().revocations().judge(&self.leaf);
            if let Some(revoked) = revoked {
                self.present.telling.counters.refused("revoked");
                self.is_over = true;
                return Some((Err(Status::permission_denied(revoked.to_string())), self));
            }
            if let Some(chunk) = self.chunks.pop_front() {
                return Some((Ok(Chunk { fault: self.fault.clone(), ..chunk }), self));
            }
            let News { version, fault } = self.news.borrow_and_update().clone();
            if fault != self.fault {
                self.fault.clone_from(&fault);
                return Some((Ok(Chunk { fault, ..Chunk::default() }), self));
            }
            if version > 0 {
                let telling = Arc::clone(&self.present.telling);
                let (chunks, has) = telling.since(self.has).await;
                if chunks.first().is_some_and(|chunk| chunk.anew) {
                    telling.counters.directory_told_anew();
                }
                (self.chunks, self.has) = (chunks.into(), has);
                if !self.chunks.is_empty() {
                    continue;
                }
            }
            tokio::select! {
                news = self.news.changed() => self.is_over = news.is_err(),
                bundle = self.bundle.changed() => self.is_over = bundle.is_err(),
            }
        }
    }
}

/// The gRPC service.
#[derive(Debug)]
pub(super) struct Server(pub(super) Arc<Telling>);

#[tonic::async_trait]
impl Directory for Server {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let Self(telling) = self;
        let (leaf, name) = node(&request, &telling.counters)?;
        let present = Present::enter(telling, &name).ok_or_else(|| too_many_streams(&telling.counters))?;
        let told = Told {
            present,
            leaf,
            has: request.into_inner(),
            chunks: VecDeque::new(),
            fault: String::new(),
            news: telling.news.subscribe(),
            bundle: telling.bundle.clone(),
            is_over: false,
        };
        Ok(Response::new(Box::pin(stream::unfold(told, Told::next))))
    }
}
