//! The way between two pods of this node: from one application's socket to the other's.
//!
//! Both identities are proven as in a tunnel: each workload's SVID is verified against the trust bundle
//! of the moment by the tunnel's own verifier, and the destination's identity is the one that the
//! directory says. The agent holds both keys, so it has nothing to ask over a connection to itself.
//! What may be asked is what a peer may ask (see `inbound`).
//!
//! Nothing encrypts the bytes on this way, as they are nowhere to be read: either hop is a connection
//! from a pod's own address to itself, inside that pod's network namespace, over no interface but its
//! loopback; between them the bytes are in pipes and buffers of the agent. Whoever reads them there
//! (root of the node, CAP_NET_RAW in one of the two pods) reads them beside any tunnel as well.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::deliver::Delivered;
use crate::identity::svid::Leaf;
use crate::pod::Pod;
use crate::policy::{Admitted, Attempt, Denial};
use crate::pool::{Failure, dial};
use crate::relay::splice::splice;
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::Finished;
use crate::tls::roots::Usage;
use crate::trust::Snapshot;
use crate::verdict::{Direction, Encryption, Reason};

/// A captured connection to another pod of this node.
#[derive(Clone, Debug)]
pub struct Passage {
    /// Whose application opened it.
    from: Arc<Pod>,
    /// Whose application is asked: the pod that has the destination's address.
    to: Arc<Pod>,
    /// The opener's address.
    source: SocketAddr,
    /// Where the asked application listens.
    destination: SocketAddr,
}

/// A passage whose two ends are proven, admitted and connected.
#[derive(Debug)]
pub struct Open {
    passage: Passage,
    delivered: Delivered,
    permit: Admitted,
    /// The certificates that it rests on.
    leaves: [Leaf; 2],
    began: Instant,
}

/// Why a passage is closed, for the asked workload's log line.
struct Closed {
    encryption: Encryption,
    failure: Failure,
    policy: Option<Arc<str>>,
}

impl Passage {
    /// From an application in one pod to one in another.
    pub fn new(from: Arc<Pod>, to: Arc<Pod>, source: SocketAddr, destination: SocketAddr) -> Self {
        Self { from, to, source, destination }
    }

    /// Proves both identities (and waits a moment for SVIDs that are just being issued), asks the
    /// policies, connects to the asked application.
    ///
    /// # Errors
    /// When one of the two workloads would not be believed by the other, or may not be spoken to, or the
    /// application cannot be reached. Nothing was sent then.
    pub async fn open(self, shard: &Shard, app: &TcpStream) -> Result<Open, Failure> {
        let began = Instant::now();
        match self.unless_given_up(app, self.connect(shard)).await {
            Ok((leaves, permit, delivered)) => {
                shard.observe.opened(Direction::Inbound);
                Ok(Open { passage: self, delivered, permit, leaves, began })
            }
            Err(Closed { encryption, failure, policy }) => {
                let ended = Ended {
                    encryption,
                    reason: failure.reason,
                    detail: &failure.detail,
                    policy: policy.as_deref(),
                    moved: [0, 0],
                    open_for: None,
                };
                self.record(shard, &ended);
                Err(failure)
            }
        }
    }

    async fn connect(&self, shard: &Shard) -> Result<([Leaf; 2], Admitted, Delivered), Closed> {
        let unproven = |failure| Closed { encryption: Encryption::None, failure, policy: None };
        let proven = |failure| Closed { encryption: Encryption::Local, failure, policy: None };
        let leaves = self.prove(shard).await.map_err(unproven)?;
        if self.to.own_ports.contains(&self.destination.port()) {
            let detail = format!("{} is the agent's own port there", self.destination).into();
            return Err(proven(Failure { reason: Reason::AgentPort, detail }));
        }
        let client = self.client().ok_or_else(|| {
            let detail = format!("{} has no address to show to {}", self.from.workload.id, self.destination);
            proven(Failure { reason: Reason::Internal, detail: detail.into() })
        })?;
        let attempt = Attempt {
            peer: self.from.workload.id.clone(),
            source: client.ip(),
            workload: Arc::clone(&self.to.workload),
            port: self.destination.port(),
        };
        let permit = shard.policies.judge(attempt).map_err(|denial| {
            let failure = Failure { reason: Reason::DeniedByPolicy, detail: denial.to_string().into() };
            Closed { encryption: Encryption::Local, failure, policy: denial.policy }
        })?;
        let delivered = self.to.deliver.connect(self.destination, client).await;
        let delivered = delivered.map_err(|error| {
            let detail = format!("the application: {error}").into();
            proven(Failure { reason: dial::connect_reason(&error), detail })
        })?;
        Ok((leaves, permit, delivered))
    }

    async fn prove(&self, shard: &Shard) -> Result<[Leaf; 2], Failure> {
        let trust = self.trust(shard).await;
        let now = SystemTime::now();
        let failure = |(reason, detail): (Reason, String)| Failure { reason, detail: detail.into() };
        self.from.prove(Usage::Client, &trust, now).map_err(failure)?;
        self.to.prove(Usage::Server, &trust, now).map_err(failure)?;
        let leaf = |pod: &Pod| trust.svids.get(&pod.workload.id).map(|svid| svid.leaf().clone());
        match (leaf(&self.from), leaf(&self.to)) {
            (Some(from), Some(to)) => Ok([from, to]),
            // Both were proven from this very snapshot.
            _ => Err(failure((Reason::NoSvid, "an SVID was withdrawn this instant".into()))),
        }
    }

    /// The state of trust once it has both SVIDs, or as it is when that takes too long.
    async fn trust(&self, shard: &Shard) -> Arc<Snapshot> {
        let both = [&self.from.workload.id, &self.to.workload.id];
        let held = timeout(shard.tunnel.handshake_timeout, shard.trust.holding(&both)).await;
        held.unwrap_or_else(|_| shard.trust.snapshot())
    }

    /// The address the application shall see: the opener's, if that is the pod's own. Any other (a
    /// container may give itself one) might be another workload's.
    fn client(&self) -> Option<SocketAddr> {
        let own = self.from.workload.address(self.destination.ip(), self.source.port());
        if self.from.has(self.source.ip()) { Some(self.source) } else { own }
    }

    async fn unless_given_up<T>(
        &self,
        app: &TcpStream,
        work: impl Future<Output = Result<T, Closed>>,
    ) -> Result<T, Closed> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            error = relay::failed(app) => {
                let failure = Failure { reason: Reason::AppReset, detail: error.to_string().into() };
                Err(Closed { encryption: Encryption::Local, failure, policy: None })
            }
        }
    }

    /// Logs and counts it as the asked workload's connection; the opener's is `outbound`'s to tell.
    fn record(&self, shard: &Shard, ended: &Ended<'_>) {
        // Who is not proven is nobody.
        let source_id = (ended.encryption == Encryption::Local).then_some(&self.from.workload.id);
        let record = Finished {
            direction: Direction::Inbound,
            encryption: ended.encryption,
            reason: seen_from_the_asked(ended.reason),
            detail: ended.detail,
            policy: ended.policy,
            source_id,
            source: self.client(),
            destination_id: Some(&self.to.workload.id),
            destination: Some(self.destination),
            sent_bytes: ended.moved[0],
            received_bytes: ended.moved[1],
            duration: ended.open_for.unwrap_or_default(),
        };
        shard.observe.finished(&record, ended.open_for.is_some());
    }
}

impl Open {
    /// Relays until the end.
    pub async fn carry(mut self: Box<Self>, shard: &Shard, app: &TcpStream) -> Relayed {
        let mut denial = None;
        let relayed = {
            let stop = pin!(stop(shard, &self.passage, &self.leaves, &mut self.permit, &mut denial));
            splice(app, &self.delivered.app, stop).await
        };
        if relayed.to_app > 0 {
            self.delivered.answered();
        }
        let detail = denial.as_ref().map(Denial::to_string).unwrap_or_default();
        self.passage.record(
            shard,
            &Ended {
                encryption: Encryption::Local,
                reason: relayed.reason,
                detail: &detail,
                policy: denial.as_ref().and_then(|denial| denial.policy.as_deref()),
                moved: [relayed.from_app, relayed.to_app],
                open_for: Some(self.began.elapsed()),
            },
        );
        relayed
    }
}

/// Resolves when the connection has to end: a pod is gone, a certificate revoked, a policy changed, or the
/// drain's deadline has come.
async fn stop(
    shard: &Shard,
    passage: &Passage,
    leaves: &[Leaf; 2],
    permit: &mut Admitted,
    denial: &mut Option<Denial>,
) -> Reason {
    let leaves = [&leaves[0], &leaves[1]];
    tokio::select! {
        reason = shard.stop(&passage.from.gone) => reason,
        () = passage.to.gone.cancelled() => Reason::Draining,
        _ = shard.trust.until_revoked(&leaves) => Reason::Revoked,
        denied = permit.revoked() => {
            *denial = Some(denied);
            Reason::DeniedByPolicy
        }
    }
}

/// How a passage ended.
struct Ended<'a> {
    encryption: Encryption,
    reason: Reason,
    detail: &'a str,
    policy: Option<&'a str>,
    moved: [u64; 2],
    /// How long it was open, if it was.
    open_for: Option<Duration>,
}

/// What one workload's side did is the other's peer's doing.
fn seen_from_the_asked(reason: Reason) -> Reason {
    match reason {
        Reason::AppReset => Reason::PeerReset,
        Reason::PeerReset => Reason::AppReset,
        other => other,
    }
}
