//! The sending agent's way: accepted from the application, resolved, balanced, and on through the pool.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpStream};

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
                let connection = Connection::new(shard.clone(), Arc::clone(&pod), app, source);
                shard.clone().spawn(connection.serve(local.port()));
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
    source: SocketAddr,
    began: Instant,
    way: Way,
}

/// How far a connection came, for its log line.
struct Way {
    destination: Option<SocketAddr>,
    workload: Option<Arc<Workload>>,
    encryption: Encryption,
    policy: Option<Arc<str>>,
}

/// A way that is open to the application that was asked.
enum Opened {
    Tunnel(Stream),
    Local(Box<Open>),
}

impl Connection {
    fn new(shard: Shard, pod: Arc<Pod>, app: TcpStream, source: SocketAddr) -> Self {
        let way = Way { destination: None, workload: None, encryption: Encryption::None, policy: None };
        Self { shard, pod, app, source, began: Instant::now(), way }
    }

    /// From the original destination to the log line.
    #[expect(clippy::manual_async_fn, reason = "an `async fn` would hold `self` twice")]
    fn serve(mut self, listener_port: u16) -> impl Future<Output = ()> {
        async move {
            self.way.destination = self.shard.capture.original_dst(self.source, listener_port);
            if self.way.destination.is_some_and(|to| self.shard.capture.is_probe(to)) {
                // An answer that cannot be given says enough.
                let _ = self.app.try_write(&[1]);
                return;
            }
            self.shard.observe.opened(Direction::Outbound);
            let outcome = self.carry().await;
            self.finish(outcome);
        }
    }

    async fn carry(&mut self) -> Result<Relayed, Failure> {
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
        };
        pick.ended(relayed.reason, Instant::now());
        Ok(relayed)
    }

    /// A way to the original destination: for a service, from the first endpoint tried that gives one.
    async fn reach(&mut self) -> Result<(Pick, Opened), Failure> {
        let shard = self.shard.clone();
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
        let (client, patience) = (self.source.ip(), shard.tunnel.connect_timeout);
        let mut tries = shard.balance.tries(&directory, client, to, Instant::now(), patience);
        let mut failed = None;
        while let Some(mut pick) = tries.next(Instant::now()) {
            match self.open(&mut pick).await {
                Ok(opened) => return Ok((pick, opened)),
                Err(failure) => {
                    tries.failed(pick, failure.reason, Instant::now());
                    failed = Some(failure);
                }
            }
        }
        Err(failed.unwrap_or_else(|| nowhere(ResolveError::NoEndpoint)))
    }

    /// One try. When it fails, nothing that the application sends has been read.
    async fn open(&mut self, pick: &mut Pick) -> Result<Opened, Failure> {
        let Self { shard, pod, app, source, way, .. } = self;
        let destination = &pick.destination;
        way.destination = Some(destination.address);
        let route = route(shard, pod, destination);
        way.workload = Some(Arc::clone(&destination.workload));
        let attempt = Attempt {
            peer: pod.workload.id.clone(),
            source: source.ip(),
            workload: Arc::clone(&destination.workload),
            port: destination.address.port(),
        };
        shard.policies.deny_early(&attempt).map_err(|denial| {
            let detail = denial.to_string().into();
            way.policy = Some(denial.policy);
            Failure { reason: Reason::DeniedByPolicy, detail }
        })?;
        if let Some(neighbour) = shard.pods.serving(destination) {
            let passage = Passage::new(Arc::clone(pod), neighbour, *source, destination.address);
            return Ok(Opened::Local(Box::new(passage.open(shard, app).await?)));
        }
        let ask = Ask { authority: destination.address, source: *source };
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

    /// Ends it, and then says how it was.
    fn finish(self, outcome: Result<Relayed, Failure>) {
        let Self { shard, pod, app, source, began, way } = self;
        let (relayed, detail) = match outcome {
            Ok(relayed) => (relayed, "".into()),
            Err(failure) => {
                relay::reset(&app);
                (Relayed { from_app: 0, to_app: 0, reason: failure.reason }, failure.detail)
            }
        };
        // The application learns of the end before the log does.
        drop(app);
        let record = Finished {
            direction: Direction::Outbound,
            encryption: way.encryption,
            reason: relayed.reason,
            detail: &detail,
            policy: way.policy.as_deref(),
            source_id: Some(&pod.workload.id),
            source: Some(source),
            destination_id: way.workload.as_ref().map(|workload| &workload.id),
            destination: way.destination,
            sent_bytes: relayed.from_app,
            received_bytes: relayed.to_app,
            duration: began.elapsed(),
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

    fn size<A, B, Task>(_: impl Fn(A, B) -> Task) -> usize {
        size_of::<Task>()
    }

    #[test]
    fn an_idle_connections_task_is_small() {
        let bytes = size(Connection::serve);
        assert!(bytes <= 832, "{bytes} bytes for each open connection; what opens it belongs on the heap");
    }
}
