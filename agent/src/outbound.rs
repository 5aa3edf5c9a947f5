//! The sending agent's way: accepted from the application, resolved, balanced, and on through the pool.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::balance::Pick;
use crate::directory::{Destination, ResolveError, Workload};
use crate::hbone::Stream;
use crate::hbone::client::Ask;
use crate::local::{Open, Passage};
use crate::pod::Pod;
use crate::policy::Attempt;
use crate::pool::{Failure, Key, Route};
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::Finished;
use crate::verdict::{Direction, Encryption, Reason};

/// Accepts a pod's captured connections until the pod is gone or the agent drains.
pub async fn serve(shard: Shard, pod: Arc<Pod>, listener: TcpListener) {
    let Ok(local) = listener.local_addr() else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.gone.cancelled() => return,
            () = shard.draining() => return,
        };
        match accepted {
            Ok((app, source)) => {
                let source = SocketAddr::new(source.ip().to_canonical(), source.port());
                let connection = Connection::new(shard.clone(), Arc::clone(&pod), app, source, local.port());
                if let Some(connection) = connection.take_up() {
                    shard.clone().spawn(connection.serve());
                }
            }
            Err(error) if shard.may_accept_again(local, &error).await => {}
            Err(_) => return,
        }
    }
}

/// One captured connection.
struct Connection {
    shard: Shard,
    pod: Arc<Pod>,
    app: TcpStream,
    way: Way,
    /// A try that another thread began: it is not handed on again.
    begun: Option<Box<Pick>>,
}

/// How far a connection came, for its log line.
#[derive(Debug)]
struct Way {
    source: SocketAddr,
    began: Instant,
    destination: Option<SocketAddr>,
    workload: Option<Arc<Workload>>,
    encryption: Encryption,
    /// The agent's port that it was led to.
    listener_port: u16,
    policy: Option<Arc<str>>,
}

/// A way that is open to the application that was asked.
enum Opened {
    Tunnel(Stream),
    Local(Box<Open>),
    /// None here: this thread of the agent is to open it.
    Elsewhere(usize),
}

/// How a connection went.
enum End {
    Relayed(Relayed),
    /// On to another thread, with the try that has begun.
    Elsewhere(usize, Box<Pick>),
}

/// A connection on its way from the thread that accepted it to the one that has the tunnel; nothing that the
/// application sends has been read.
#[derive(Debug)]
pub struct Moved {
    pod: Arc<Pod>,
    app: std::net::TcpStream,
    way: Way,
    pick: Box<Pick>,
    /// The drain waits for it meanwhile.
    _task: TaskTrackerToken,
}

impl Moved {
    /// Goes on with it on this thread.
    pub fn serve(self, shard: Shard) {
        let Self { pod, app, way, pick, _task } = self;
        match TcpStream::from_std(app) {
            Ok(app) => {
                let connection = Connection { shard: shard.clone(), pod, app, way, begun: Some(pick) };
                shard.spawn(connection.serve());
            }
            Err(error) => way.finish(&shard, &pod, Err(unmoved(&error))),
        }
    }
}

/// The system did not let a connection change threads.
fn unmoved(error: &std::io::Error) -> Failure {
    let detail = format!("it could not be handed to another thread: {error}");
    Failure { reason: Reason::Internal, detail: detail.into() }
}

impl Connection {
    fn new(shard: Shard, pod: Arc<Pod>, app: TcpStream, source: SocketAddr, listener_port: u16) -> Self {
        let way = Way {
            source,
            began: Instant::now(),
            destination: None,
            workload: None,
            encryption: Encryption::None,
            listener_port,
            policy: None,
        };
        Self { shard, pod, app, way, begun: None }
    }

    /// Takes up where it wanted to go. One of our own, that tries the capture, is answered and no more.
    fn take_up(mut self) -> Option<Self> {
        let (source, port) = (self.way.source, self.way.listener_port);
        self.way.destination = self.shard.capture.original_dst(source, port);
        if self.way.destination.is_some_and(|to| self.shard.capture.is_probe(to)) {
            // An answer that cannot be given says enough.
            let _ = self.app.try_write(&[1]);
            return None;
        }
        self.shard.observe.opened(Direction::Outbound);
        Some(self)
    }

    /// From the original destination to the log line.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` would hold `self` twice")]
    fn serve(mut self) -> impl Future<Output = ()> {
        async move {
            match self.carry().await {
                Ok(End::Relayed(relayed)) => self.finish(Ok(relayed)),
                Ok(End::Elsewhere(thread, pick)) => self.move_to(thread, pick),
                Err(failure) => self.finish(Err(failure)),
            }
        }
    }

    async fn carry(&mut self) -> Result<End, Failure> {
        // On the heap, and gone once there is a way: for the rest of its life a connection is only a relay.
        let (pick, opened) = Box::pin(self.reach()).await?;
        let Self { shard, pod, app, way, .. } = self;
        let relayed = match opened {
            Opened::Tunnel(stream) => {
                way.encryption = Encryption::Mtls;
                relay::relay(app, stream, pin!(shard.stop(&pod.gone))).await
            }
            Opened::Local(open) => {
                way.encryption = Encryption::Local;
                // It has two applications to watch: not to be paid for by those that are relayed.
                Box::pin(open.carry(shard, app)).await
            }
            Opened::Elsewhere(thread) => return Ok(End::Elsewhere(thread, Box::new(pick))),
        };
        pick.ended(relayed.reason, Instant::now());
        Ok(End::Relayed(relayed))
    }

    /// A way to the original destination: for a service, from the first endpoint tried that gives one.
    async fn reach(&mut self) -> Result<(Pick, Opened), Failure> {
        let shard = self.shard.clone();
        let begun = self.begun.take().map(|pick| *pick);
        let may_move = begun.is_none();
        let original = self.way.destination.ok_or_else(|| Failure {
            reason: Reason::NoOriginalDestination,
            detail: "connected to the agent's own listener; it takes captured connections only".into(),
        })?;
        let nowhere = |error: ResolveError| Failure {
            reason: match error {
                ResolveError::UnknownAddress => Reason::UnknownDestination,
                _ => Reason::NoEndpoint,
            },
            detail: format!("{original}: {error}").into(),
        };
        let directory = shard.directory.load();
        let to = directory.resolve(original).map_err(nowhere)?;
        let (client, patience) = (self.way.source.ip(), shard.tunnel.connect_timeout);
        let mut tries = shard.balance.tries(&directory, client, to, Instant::now(), patience);
        if let Some(begun) = &begun {
            tries = tries.after(begun);
        }
        let mut failed = None;
        let mut next = begun.or_else(|| tries.next(Instant::now()));
        while let Some(mut pick) = next {
            match self.open(&mut pick, may_move).await {
                Ok(opened) => return Ok((pick, opened)),
                Err(failure) => {
                    tries.failed(pick, failure.reason, Instant::now());
                    failed = Some(failure);
                }
            }
            next = tries.next(Instant::now());
        }
        Err(failed.unwrap_or_else(|| nowhere(ResolveError::NoEndpoint)))
    }

    /// One try. When it fails, nothing that the application sends has been read.
    async fn open(&mut self, pick: &mut Pick, may_move: bool) -> Result<Opened, Failure> {
        let Self { shard, pod, app, way, .. } = self;
        let destination = &pick.destination;
        way.destination = Some(destination.address);
        let route = route(shard, pod, destination);
        way.workload = Some(Arc::clone(&destination.workload));
        let attempt = Attempt {
            peer: pod.workload.id.clone(),
            source: way.source.ip(),
            workload: Arc::clone(&destination.workload),
            port: destination.address.port(),
        };
        shard.policies.deny_early(&attempt).map_err(|denial| {
            let detail = denial.to_string().into();
            way.policy = denial.policy;
            Failure { reason: Reason::DeniedByPolicy, detail }
        })?;
        if let Some(neighbour) = shard.pods.serving(destination) {
            let passage = Passage::new(Arc::clone(pod), neighbour, way.source, destination.address);
            return Ok(Opened::Local(Box::new(passage.open(shard, app).await?)));
        }
        let node = route.node.as_ref().filter(|_| may_move);
        if let Some(home) = node.and_then(|node| shard.pool.home(node, Instant::now())) {
            return Ok(Opened::Elsewhere(home));
        }
        let ask = Ask { authority: destination.address, source: way.source };
        let opening = async {
            let mut stream = shard.pool.open(&route, ask, Instant::now()).await?;
            if pick.is_wary {
                stream.recv.accepted().await.map_err(|reason| Failure {
                    reason,
                    detail: format!("{} at {} refused the stream", route.workload.destination, ask.authority)
                        .into(),
                })?;
            }
            Ok(stream)
        };
        // No other endpoint is faster while it is our own SVID that is waited for.
        let patience = pick.patience.filter(|_| has_svids(shard, pod, &route));
        let stream = tokio::select! {
            opened = opening => opened?,
            error = relay::failed(app) => return Err(Failure { reason: Reason::AppReset, detail: error.to_string().into() }),
            () = enough(patience) => return Err(Failure {
                reason: Reason::ConnectTimeout,
                detail: format!("{} at {} gave no stream in time", route.workload.destination, ask.authority).into(),
            }),
        };
        if pick.is_wary {
            pick.accepted(Instant::now());
        }
        Ok(Opened::Tunnel(stream))
    }

    /// Hands it to another thread of the agent.
    fn move_to(self, thread: usize, pick: Box<Pick>) {
        let Self { shard, pod, app, way, .. } = self;
        match app.into_std() {
            Ok(app) => {
                let _task = shard.tasks.token();
                shard.send(thread, Moved { pod, app, way, pick, _task });
            }
            Err(error) => way.finish(&shard, &pod, Err(unmoved(&error))),
        }
    }

    /// Ends it, and then says how it was.
    fn finish(self, outcome: Result<Relayed, Failure>) {
        let Self { shard, pod, app, way, .. } = self;
        if outcome.is_err() {
            relay::reset(&app);
        }
        // The application learns of the end before the log does.
        drop(app);
        way.finish(&shard, &pod, outcome);
    }
}

impl Way {
    fn finish(self, shard: &Shard, pod: &Pod, outcome: Result<Relayed, Failure>) {
        let (relayed, detail) = match outcome {
            Ok(relayed) => (relayed, "".into()),
            Err(failure) => (Relayed { from_app: 0, to_app: 0, reason: failure.reason }, failure.detail),
        };
        let record = Finished {
            direction: Direction::Outbound,
            encryption: self.encryption,
            reason: relayed.reason,
            detail: &detail,
            policy: self.policy.as_deref(),
            source_id: Some(&pod.workload.id),
            source: Some(self.source),
            destination_id: self.workload.as_ref().map(|workload| &workload.id),
            destination: self.destination,
            sent_bytes: relayed.from_app,
            received_bytes: relayed.to_app,
            duration: self.began.elapsed(),
        };
        shard.observe.finished(&record, true);
    }
}

/// Resolves when patience is over, which without a measure is never.
async fn enough(patience: Option<Duration>) {
    match patience {
        Some(patience) => tokio::time::sleep(patience).await,
        None => std::future::pending().await,
    }
}

/// The ways to a destination: by its node, if the directory lists an agent of ours there.
fn route(shard: &Shard, pod: &Pod, destination: &Destination) -> Route {
    let port = shard.tunnel.port;
    let workload = Key {
        source: pod.workload.id.clone(),
        destination: destination.workload.id.clone(),
        address: SocketAddr::new(destination.address.ip(), port),
    };
    let directory = shard.directory.load();
    let node = directory.node(&destination.workload.node).filter(|_| shard.node_scope);
    let node = node.map(|node| shard.between(node));
    Route { workload, node }
}

/// Whether every SVID that a stream is opened with is there.
fn has_svids(shard: &Shard, pod: &Pod, route: &Route) -> bool {
    let trust = shard.trust.snapshot();
    let node = route.node.as_ref().map(|node| &node.source);
    [Some(&pod.workload.id), node].into_iter().flatten().all(|id| trust.svids.contains_key(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, Task>(_: impl Fn(A) -> Task) -> usize {
        size_of::<Task>()
    }

    #[test]
    fn an_idle_connections_task_is_small() {
        let bytes = size(Connection::serve);
        assert!(bytes <= 840, "{bytes} bytes for each open connection; what opens it belongs on the heap");
    }
}
