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
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::deliver::Delivered;
use crate::pod::{Pod, Side};
use crate::pool::{Failure, dial};
use crate::relay::splice::splice;
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::Finished;
use crate::trust::Snapshot;
use crate::verdict::{Direction, Encryption, Reason};

/// A captured connection to another pod of this node.
#[derive(Clone, Copy, Debug)]
pub struct Passage<'a> {
    /// Whose application opened it.
    pub from: &'a Pod,
    /// Whose application is asked: the pod that has the destination's address.
    pub to: &'a Pod,
    /// The agent's end of the captured connection.
    pub app: &'a TcpStream,
    /// The opener's address.
    pub source: SocketAddr,
    /// Where the asked application listens.
    pub destination: SocketAddr,
}

impl Passage<'_> {
    /// Proves both identities; waits a moment for SVIDs that are just being issued.
    ///
    /// # Errors
    /// When one of the two workloads would not be believed by the other, with what that would say.
    pub async fn prove(&self, shard: &Shard) -> Result<(), Failure> {
        let proven = async {
            let trust = self.trust(shard).await;
            let now = SystemTime::now();
            let failure = |(reason, detail): (Reason, String)| Failure { reason, detail: detail.into() };
            self.from.prove(Side::Client, &trust, now).map_err(failure)?;
            self.to.prove(Side::Server, &trust, now).map_err(failure)
        };
        let proven = self.unless_given_up(proven).await;
        if let Err(failure) = &proven {
            self.record(shard, Encryption::None, failure.reason, &failure.detail, [0, 0], None);
        }
        proven
    }

    /// Connects to the asked application and relays until the end. Call it when both are proven.
    ///
    /// # Errors
    /// When the application cannot be reached or may not be asked for; nothing was sent then.
    pub async fn carry(&self, shard: &Shard) -> Result<Relayed, Failure> {
        if self.to.own_ports.contains(&self.destination.port()) {
            let detail = format!("{} is the agent's own port there", self.destination);
            let failure = Failure { reason: Reason::AgentPort, detail: detail.into() };
            self.record(shard, Encryption::Local, failure.reason, &failure.detail, [0, 0], None);
            return Err(failure);
        }
        let began = Instant::now();
        shard.observe.opened(Direction::Inbound);
        let outcome = match self.unless_given_up(self.deliver()).await {
            Ok(delivered) => Ok(splice(self.app, &delivered.app, self.stop(shard)).await),
            Err(failure) => Err(failure),
        };
        let (reason, detail, moved) = match &outcome {
            Ok(relayed) => (relayed.reason, "", [relayed.from_app, relayed.to_app]),
            Err(failure) => (failure.reason, &*failure.detail, [0, 0]),
        };
        self.record(shard, Encryption::Local, reason, detail, moved, Some(began.elapsed()));
        outcome
    }

    /// The state of trust once it has both SVIDs, or as it is when that takes too long.
    async fn trust(&self, shard: &Shard) -> Arc<Snapshot> {
        let both = [&self.from.workload.id, &self.to.workload.id];
        let held = timeout(shard.tunnel.handshake_timeout, shard.trust.holding(&both)).await;
        held.unwrap_or_else(|_| shard.trust.snapshot())
    }

    async fn deliver(&self) -> Result<Delivered, Failure> {
        let client = self.client().ok_or_else(|| Failure {
            reason: Reason::Internal,
            detail: format!("{} has no address to show to {}", self.from.workload.id, self.destination)
                .into(),
        })?;
        let delivered = self.to.deliver.connect(self.destination, client).await;
        delivered.map_err(|error| Failure {
            reason: dial::connect_reason(&error),
            detail: format!("the application: {error}").into(),
        })
    }

    /// The address the application shall see: the opener's, if that is the pod's own. Any other (a
    /// container may give itself one) might be another workload's.
    fn client(&self) -> Option<SocketAddr> {
        let own = self.from.address(self.destination.ip(), self.source.port());
        if self.from.has(self.source.ip()) { Some(self.source) } else { own }
    }

    async fn unless_given_up<T>(&self, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        tokio::select! {
            biased;
            outcome = work => outcome,
            error = relay::failed(self.app) => {
                Err(Failure { reason: Reason::AppReset, detail: error.to_string().into() })
            }
        }
    }

    /// Resolves when the connection has to end: either pod is gone, or the drain's deadline has come.
    async fn stop(&self, shard: &Shard) -> Reason {
        tokio::select! {
            reason = shard.stop(&self.from.gone) => reason,
            () = self.to.gone.cancelled() => Reason::Draining,
        }
    }

    /// Logs and counts it as the asked workload's connection; the opener's is `outbound`'s to tell.
    fn record(
        &self,
        shard: &Shard,
        encryption: Encryption,
        reason: Reason,
        detail: &str,
        [sent_bytes, received_bytes]: [u64; 2],
        open_for: Option<Duration>,
    ) {
        // Who is not proven is nobody.
        let source_id = (encryption == Encryption::Local).then_some(&self.from.workload.id);
        let record = Finished {
            direction: Direction::Inbound,
            encryption,
            reason: seen_from_the_asked(reason),
            detail,
            source_id,
            source: self.client(),
            destination_id: Some(&self.to.workload.id),
            destination: Some(self.destination),
            sent_bytes,
            received_bytes,
            duration: open_for.unwrap_or_default(),
        };
        shard.observe.finished(&record, open_for.is_some());
    }
}

/// What one workload's side did is the other's peer's doing.
fn seen_from_the_asked(reason: Reason) -> Reason {
    match reason {
        Reason::AppReset => Reason::PeerReset,
        Reason::PeerReset => Reason::AppReset,
        other => other,
    }
}
