//! One stream, from its CONNECT to its log line.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;

use super::Peer;
use super::front::{Admitted, Front, Tunnel};
use crate::deliver::Delivered;
use crate::hbone::{self, Recv, Stream, server};
use crate::identity::SpiffeId;
use crate::pod::Pod;
use crate::policy::{self, Attempt, Denial};
use crate::pool::dial;
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::Finished;
use crate::verdict::{Direction, Encryption, Reason};

pub(super) async fn serve(
    shard: &Shard,
    front: &Front,
    tunnel: &Tunnel,
    peer: &Peer,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let began = Instant::now();
    let admitted = match front.admit(shard, tunnel, &request) {
        Ok(admitted) => admitted,
        Err(refusal) => {
            server::refuse(respond, request.into_body(), refusal.reason);
            let (at, source, source_id) = (front.id(), peer.address, Some(&peer.id));
            let (reason, detail) = (refusal.reason, &*refusal.detail);
            return Refused { at, source, source_id, reason, detail }.tell(shard);
        }
    };
    // The headers have said what they had to.
    let body = request.into_body();
    let client = client(shard, &admitted, peer);
    let Admitted { pod, source, asked, .. } = &admitted;
    let tell = |relayed: Relayed, detail: &str, denial: Option<&Denial>, was_open| {
        let record = Finished {
            direction: Direction::Inbound,
            encryption: Encryption::Mtls,
            reason: relayed.reason,
            detail,
            policy: denial.map(|denial| &*denial.policy),
            source_id: Some(source),
            source: Some(client),
            destination_id: Some(&pod.workload.id),
            destination: Some(asked.authority),
            sent_bytes: relayed.to_app,
            received_bytes: relayed.from_app,
            duration: began.elapsed(),
        };
        shard.observe.finished(&record, was_open);
    };
    let permit = match shard.policies.judge(attempt(&admitted, client)) {
        Ok(permit) => permit,
        Err(denial) => {
            server::refuse(respond, body, Reason::DeniedByPolicy);
            let nothing = Relayed { from_app: 0, to_app: 0, reason: Reason::DeniedByPolicy };
            return tell(nothing, &denial.to_string(), Some(&denial), false);
        }
    };
    shard.observe.opened(Direction::Inbound);
    let connecting = async {
        tokio::select! {
            delivered = pod.deliver.connect(asked.authority, client) => delivered,
            // The opener gave up: nobody waits for the application any more.
            _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    };
    let outcome: io::Result<_> = connecting.await;
    let mut denial = None;
    let (relayed, detail) = match outcome {
        Err(error) => {
            let reason = match error.kind() {
                io::ErrorKind::ConnectionAborted => Reason::PeerReset,
                _ => dial::connect_reason(&error),
            };
            server::refuse(respond, body, reason);
            (Relayed { from_app: 0, to_app: 0, reason }, format!("the application: {error}"))
        }
        Ok(delivered) => {
            let until = stop(shard, pod, permit, &mut denial);
            let relayed = relay(&admitted, delivered, body, respond, until).await;
            (relayed, denial.as_ref().map(Denial::to_string).unwrap_or_default())
        }
    };
    tell(relayed, &detail, denial.as_ref(), true);
}

/// What the policies are asked.
fn attempt(admitted: &Admitted, client: SocketAddr) -> Attempt {
    Attempt {
        peer: admitted.source.clone(),
        source: client.ip(),
        workload: Arc::clone(&admitted.pod.workload),
        port: admitted.asked.authority.port(),
    }
}

/// Resolves when an open stream has to end; by a change of the policies, it says which.
async fn stop(shard: &Shard, pod: &Pod, permit: policy::Admitted, denial: &mut Option<Denial>) -> Reason {
    tokio::select! {
        reason = shard.stop(&pod.gone) => reason,
        revoked = permit.revoked() => {
            *denial = Some(revoked);
            Reason::DeniedByPolicy
        }
    }
}

async fn relay(
    admitted: &Admitted,
    mut delivered: Delivered,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    stop: impl Future<Output = Reason>,
) -> Relayed {
    match server::accept(respond) {
        Ok(send) => {
            let recv = Recv::Open(body);
            let stream = Stream { send, recv, place: None, lease: Some(Arc::clone(&admitted.lease)) };
            let relayed = relay::relay(&mut delivered.app, stream, stop).await;
            if relayed.from_app > 0 {
                delivered.answered();
            }
            relayed
        }
        Err(error) => {
            relay::reset(&delivered.app);
            Relayed { from_app: 0, to_app: 0, reason: hbone::reason(&error) }
        }
    }
}

/// The address the application shall see: the one the peer names, if the directory places the
/// authenticated identity there; otherwise the one the tunnel comes from.
fn client(shard: &Shard, admitted: &Admitted, peer: &Peer) -> SocketAddr {
    let directory = shard.directory.load();
    let asked = &admitted.asked;
    let believed = asked.source.filter(|source| {
        let at = directory.workload_at(source.ip());
        let placed = at.is_some_and(|workload| workload.id == admitted.source);
        // An address of another family is none that the application's socket could report.
        placed && source.is_ipv4() == asked.authority.is_ipv4()
    });
    believed.unwrap_or(peer.address)
}

/// Something that was refused before it was a connection of a workload.
pub(super) struct Refused<'a> {
    /// Whose front it was refused at.
    pub(super) at: &'a SpiffeId,
    pub(super) source: SocketAddr,
    pub(super) source_id: Option<&'a SpiffeId>,
    pub(super) reason: Reason,
    pub(super) detail: &'a str,
}

impl Refused<'_> {
    /// Logs and counts it.
    pub(super) fn tell(&self, shard: &Shard) {
        let record = Finished {
            direction: Direction::Inbound,
            encryption: if self.source_id.is_some() { Encryption::Mtls } else { Encryption::None },
            reason: self.reason,
            detail: self.detail,
            policy: None,
            source_id: self.source_id,
            source: Some(self.source),
            destination_id: Some(self.at),
            destination: None,
            sent_bytes: 0,
            received_bytes: 0,
            duration: Duration::ZERO,
        };
        shard.observe.finished(&record, false);
    }
}
