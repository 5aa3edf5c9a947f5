//! Holds connections to peers by who speaks to whom: a stream costs no handshake.
//!
//! Two streams share a connection exactly when sharing shows either side the same two SPIFFE IDs,
//! verified against the same trust: the key carries every input of the verification decision, and
//! the slot drops what was verified against an older state. A dropped connection ends by itself
//! when its last stream does, so a rotation closes nothing that is in use; at the latest it ends some time after its
//! certificates have expired ([`crate::hbone::Term`]). In node scope the two SPIFFE
//! IDs are the nodes', and each stream's workloads are proven on the connection ([`crate::proof`]).
//!
//! One pool belongs to one thread; its lock is never contended and never held across an await. A stream between
//! nodes goes to the thread that has a connection while few come ([`Pool::home`]).

mod acquaint;
pub mod dial;
mod homes;
mod node;
mod slot;

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, broadcast, oneshot};

use crate::hbone::Stream;
use crate::hbone::client::Ask;
use crate::identity::SpiffeId;
use crate::verdict::Reason;
use dial::Dialer;
pub use homes::Seat;
use slot::{Next, Otherwise, Slot, Turn};

/// What may share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Whose SVID is presented.
    pub source: SpiffeId,
    /// Who must answer.
    pub destination: SpiffeId,
    /// Where: the tunnel address.
    pub address: SocketAddr,
}

impl Key {
    /// Whether it is of two nodes' agents, whose workloads prove themselves (node scope).
    fn between_nodes(&self) -> bool {
        self.destination.node_name().is_some()
    }
}

/// The ways to a destination.
#[derive(Clone, Debug)]
pub struct Route {
    /// Who speaks to whom, and where the destination's own tunnel is (workload scope).
    pub workload: Key,
    /// The two nodes, where the peer's is known to have an agent of ours (node scope).
    pub node: Option<Key>,
}

/// What threads tell each other of connections between nodes.
#[derive(Clone, Debug)]
pub enum Word {
    /// A stream has used one for the first time.
    Needed(Key),
    /// A node's agent has made one to us, so it runs.
    Arrived(SpiffeId),
}

/// Why there is no stream: the label, and what an operator needs to know.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// For metrics and logs.
    pub reason: Reason,
    /// In words; names the peer.
    pub detail: Arc<str>,
}

/// How often one caller waits for a dial. Others may take every place of a new connection first, but
/// a peer that allows no stream at all must not be dialled for ever.
const MAX_TURNS: usize = 64;

/// After finding no node scope at a node's address, workloads are dialled themselves for this long.
const FORGO: Duration = Duration::from_secs(30);

/// Connections that are made ahead at once, by one thread: streams that wait for theirs go first.
const AHEAD: usize = 4;

type Slots = HashMap<Key, Slot>;

/// One thread's connections.
#[derive(Clone, Debug)]
pub struct Pool {
    slots: Arc<Mutex<Slots>>,
    /// Nodes without node scope, and when to look again.
    forgone: Arc<Mutex<HashMap<SocketAddr, Instant>>>,
    /// Where the agent is told of connections between nodes.
    words: broadcast::Sender<Word>,
    /// This thread among the agent's.
    seat: Seat,
    /// Permits for connections that nobody waits for.
    ahead: Arc<Semaphore>,
    dialer: Dialer,
    max_streams: usize,
}

impl Pool {
    /// An empty pool that dials with `dialer`, and tells `words` of connections between nodes.
    pub fn new(dialer: Dialer, max_streams: u32, words: broadcast::Sender<Word>, seat: Seat) -> Self {
        Self {
            slots: Arc::default(),
            forgone: Arc::default(),
            words,
            seat,
            ahead: Arc::new(Semaphore::new(AHEAD)),
            dialer,
            max_streams: max_streams as usize,
        }
    }

    /// A stream to a destination: between the nodes if that is possible, else between the workloads.
    ///
    /// # Errors
    /// When no connection can be had, or the destination does not prove itself. Nothing of the
    /// application was sent then.
    pub async fn open(&self, route: &Route, ask: Ask, now: Instant) -> Result<Stream, Failure> {
        if let Some(node) = route.node.as_ref().filter(|node| !self.is_forgone(node.address, now)) {
            match self.stream(node, &route.workload, ask).await {
                Err(failure) if failure.reason == Reason::NoNodeScope => self.forgo(node, now, &failure),
                outcome => return outcome,
            }
        }
        self.stream(&route.workload, &route.workload, ask).await
    }

    /// The thread on which a stream to a node shall be opened, if that is not this one: another has a connection
    /// or is making one, this one has none, and has sent no stream there just now. Who comes more often has one
    /// made here.
    pub fn home(&self, node: &Key, now: Instant) -> Option<usize> {
        let mut slots = self.lock();
        // For each connection, so no key is made for those that find theirs.
        if slots.get(node).is_some_and(Slot::has_own) {
            return None;
        }
        let slot = slots.entry(node.clone()).or_default();
        let home = self.seat.elsewhere(&node.destination)?;
        (!self.is_forgone(node.address, now) && slot.sends_away(now)).then_some(home)
    }

    fn is_forgone(&self, node: SocketAddr, now: Instant) -> bool {
        let mut forgone = lock(&self.forgone);
        let is = forgone.get(&node).is_some_and(|until| now < *until);
        if !is && !forgone.is_empty() {
            forgone.remove(&node);
        }
        is
    }

    fn forgo(&self, node: &Key, now: Instant, why: &Failure) {
        tracing::info!(node = %node.destination, address = %node.address, %why, "no node scope there; dialling its workloads for a while");
        lock(&self.forgone).insert(node.address, now + FORGO);
        self.seat.leave(&node.destination);
    }

    /// A stream for `parties` on a connection of `key`'s: one that is there, or a new one.
    async fn stream(&self, key: &Key, parties: &Key, ask: Ask) -> Result<Stream, Failure> {
        let mut crowd = false;
        for _ in 0..MAX_TURNS {
            let (dialled, otherwise) = match self.next(key, crowd).await {
                Next::Wait(dialled, otherwise) => (dialled, otherwise),
                Next::Place(place, None) => match place.open(ask, None) {
                    Ok(stream) => return Ok(stream),
                    // It closed this instant; dialling is the answer then.
                    Err(_) => continue,
                },
                Next::Place(place, Some(proofs)) => {
                    match node::stream(&self.dialer, place, &proofs, parties, ask).await? {
                        Some(stream) => return Ok(stream),
                        None => continue,
                    }
                }
            };
            match dialled.await {
                Ok(Ok(())) => {}
                Ok(Err(_)) if otherwise == Otherwise::Crowd => crowd = true,
                Ok(Err(failure)) => return Err(failure),
                // The dialling task died without a word.
                Err(_) => {
                    return Err(Failure { reason: Reason::Internal, detail: "dialling was cut off".into() });
                }
            }
        }
        let detail = format!("{} at {} has no room for another stream", key.destination, key.address);
        Err(Failure { reason: Reason::Overload, detail: detail.into() })
    }

    /// Takes a place for a stream, or one among those who wait for a dial (and starts one if none runs).
    async fn next(&self, key: &Key, crowd: bool) -> Next {
        let epoch = self.dialer.epoch(&key.source);
        let Turn { next, dial, first_use } = poll_fn(|cx| {
            let mut slots = self.lock();
            let slot = slots.entry(key.clone()).or_default();
            let now = Instant::now();
            slot.discard(epoch, now, cx);
            Poll::Ready(slot.next(epoch, self.max_streams, now, crowd))
        })
        .await;
        if dial {
            // In a task of its own, so that it goes on when the first to wait gives up.
            tokio::spawn(self.clone().dial(key.clone()));
        }
        if first_use && key.between_nodes() {
            // Nobody listens in a pool that is alone.
            let _ = self.words.send(Word::Needed(key.clone()));
        }
        next
    }

    /// Makes a connection in a task of its own, before a stream needs it. If that fails, nobody has lost
    /// anything: the stream that needs it will say why.
    pub fn warm(&self, key: &Key) {
        self.warm_after(key, Duration::ZERO);
    }

    fn warm_after(&self, key: &Key, wait: Duration) {
        let (pool, key) = (self.clone(), key.clone());
        tokio::spawn(async move {
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            // Who spoke to whom on the old connection will do so on the new one.
            let [ours, theirs] = pool.met(&key);
            match pool.ahead(&key).await {
                Ok(true) => pool.acquaint(&key, ours, theirs).await,
                Ok(false) => {}
                Err(failure) => {
                    tracing::debug!(node = %key.destination, %failure, "no connection made ahead");
                }
            }
        });
    }

    /// Makes a connection before a stream needs it, unless there is one or it is on its way; says whether it
    /// did. Few are made at once.
    ///
    /// # Errors
    /// When no connection can be had.
    pub async fn ahead(&self, key: &Key) -> Result<bool, Failure> {
        let cut_off = || Failure { reason: Reason::Internal, detail: "dialling was cut off".into() };
        let _permit = self.ahead.acquire().await.map_err(|_| cut_off())?;
        let epoch = self.dialer.epoch(&key.source);
        let dial = self.lock().entry(key.clone()).or_default().begin_ahead(epoch, Instant::now());
        if !dial {
            return Ok(false);
        }
        // It goes on when the caller gives up: a stream may wait for it by now.
        let outcome = tokio::spawn(self.clone().dial(key.clone())).await.unwrap_or_else(|_| Err(cut_off()));
        self.dialer.made_ahead(outcome.is_ok());
        outcome.map(|()| true)
    }

    /// Whether there is a connection, or was until its other end closed it.
    pub fn holds(&self, key: &Key) -> bool {
        self.lock().get(key).is_some_and(Slot::is_connected)
    }

    /// Makes connections between nodes anew where the SVID or the roots that they rest on have changed, so
    /// that no stream has to wait for it; each at a time of its own `within` this, as every node's roots
    /// change at once.
    pub fn refresh(&self, within: Duration) {
        let mut keys = Vec::new();
        for (key, slot) in self.lock().iter_mut().filter(|(key, _)| key.between_nodes()) {
            if self.dialer.epoch(&key.source).is_some_and(|epoch| slot.begin_refresh(epoch)) {
                keys.push(key.clone());
            }
        }
        keys.iter().for_each(|key| self.warm_after(key, within.mul_f64(fastrand::f64())));
    }

    /// Dials, and tells those who wait for it how it went.
    async fn dial(self, key: Key) -> Result<(), Failure> {
        if key.between_nodes() {
            // From now on other threads may send streams here.
            self.seat.elsewhere(&key.destination);
        }
        let dialled = self.dialer.dial(&key).await;
        let (waiting, outcome) = {
            let mut slots = self.lock();
            slots.entry(key).or_default().dialled(dialled)
        };
        for waiter in waiting {
            // Whoever gave up has no more interest.
            let _ = waiter.send(outcome.clone());
        }
        outcome
    }

    /// Drops connections that have had no stream for `idle`. Call it now and then.
    pub fn sweep(&self, now: Instant, idle: Duration) {
        self.lock().retain(|key, slot| {
            slot.expire(now, idle);
            if slot.is_empty() && key.between_nodes() {
                self.seat.leave(&key.destination);
            }
            !slot.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }
}

/// Every change under a lock leaves its table consistent, also one cut short by a panic.
fn lock<T>(table: &Mutex<T>) -> MutexGuard<'_, T> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

type Waiter = oneshot::Sender<Result<(), Failure>>;
