//! One stream, from its CONNECT to its log line.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;

use super::Peer;
use super::front::{Admitted, Front, Tunnel};
use crate::deliver::Delivered;
use crate::hbone::server::Asked;
use crate::hbone::{self, Recv, Stream, server};
use crate::identity::SpiffeId;
use crate::pod::Pod;
use crate::policy::{self, Attempt, Denial};
use crate::pool::dial;
use crate::proof::Refusal;
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::Finished;
use crate::verdict::{Direction, Encryption, Reason};

/// A stream that is delivered to its application.
struct Open {
    shard: Shard,
    pod: Arc<Pod>,
    /// Who opened it, as was proven.
    source: SpiffeId,
    asked: Asked,
    client: SocketAddr,
    began: Instant,
    permit: policy::Admitted,
    delivered: Delivered,
}

/// One stream's whole task.
pub(super) fn serve(
    shard: Shard,
    front: Front,
    tunnel: Tunnel,
    peer: Peer,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) -> impl Future<Output = ()> + Send {
    // On the heap, and gone once the stream is open: for the rest of its life it is only a relay.
    let opening = Box::pin(open(shard, front, tunnel, peer, request, respond));
    async move {
        let Some((mut open, stream)) = opening.await else { return };
        open.relay(stream).await;
    }
}

/// From a request to an open stream; `None` if it was refused. Told and counted then.
async fn open(
    shard: Shard,
    front: Front,
    tunnel: Tunnel,
    peer: Peer,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) -> Option<(Open, Stream)> {
    let began = Instant::now();
    if server::is_introduction(&request) {
        introduce(&shard, &front, &tunnel, &peer, request, respond);
        return None;
    }
    let admitted = match front.admit(&shard, &tunnel, &request) {
        Ok(admitted) => admitted,
        Err(refusal) => {
            server::refuse(respond, request.into_body(), refusal.reason);
            let (at, source, source_id) = (front.id(), peer.address, Some(&peer.id));
            let (reason, detail) = (refusal.reason, &*refusal.detail);
            Refused { at, source, source_id, reason, detail }.tell(&shard);
            return None;
        }
    };
    // The headers have said what they had to.
    let body = request.into_body();
    let client = client(&shard, &admitted, &peer);
    let Admitted { pod, source, asked, lease } = admitted;
    let about = About { pod: &pod, source: &source, asked, client, began };
    let permit = match shard.policies.judge(attempt(&about)) {
        Ok(permit) => permit,
        Err(denial) => {
            server::refuse(respond, body, Reason::DeniedByPolicy);
            about.tell(&shard, nothing(Reason::DeniedByPolicy), &denial.to_string(), Some(&denial), false);
            return None;
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
    let delivered = match outcome {
        Ok(delivered) => delivered,
        Err(error) => {
            let reason = match error.kind() {
                io::ErrorKind::ConnectionAborted => Reason::PeerReset,
                _ => dial::connect_reason(&error),
            };
            server::refuse(respond, body, reason);
            about.tell(&shard, nothing(reason), &format!("the application: {error}"), None, true);
            return None;
        }
    };
    match server::accept(respond) {
        Ok(send) => {
            let stream = Stream { send, recv: Recv::Open(body), place: None, lease: Some(lease) };
            Some((Open { shard, pod, source, asked, client, began, permit, delivered }, stream))
        }
        Err(error) => {
            relay::reset(&delivered.app);
            about.tell(&shard, nothing(hbone::reason(&error)), "", None, true);
            None
        }
    }
}

/// Answers who wants no stream yet. It is no connection of anybody's, and so none that is counted.
fn introduce(
    shard: &Shard,
    front: &Front,
    tunnel: &Tunnel,
    peer: &Peer,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
) {
    match front.meet(shard, tunnel, &request) {
        Ok(()) => server::met(respond),
        Err(Refusal { reason, detail }) => {
            tracing::debug!(peer = %peer.id, reason = reason.as_str(), detail, "a workload has not been introduced");
            server::refuse(respond, request.into_body(), reason);
        }
    }
}

impl Open {
    /// Relays until the end, and then says how it was.
    async fn relay(&mut self, stream: Stream) {
        let Self { shard, pod, source, asked, client, began, permit, delivered } = self;
        let mut denial = None;
        let relayed = {
            let stop = pin!(stop(shard, pod, permit, &mut denial));
            relay::relay(&mut delivered.app, stream, stop).await
        };
        if relayed.from_app > 0 {
            delivered.answered();
        }
        let detail = denial.as_ref().map(Denial::to_string).unwrap_or_default();
        let about = About { pod, source, asked: *asked, client: *client, began: *began };
        about.tell(shard, relayed, &detail, denial.as_ref(), true);
    }
}

/// What a log line says of an admitted stream, however it ends.
struct About<'a> {
    pod: &'a Pod,
    source: &'a SpiffeId,
    asked: Asked,
    client: SocketAddr,
    began: Instant,
}

impl About<'_> {
    /// Logs and counts the end.
    fn tell(&self, shard: &Shard, relayed: Relayed, detail: &str, denial: Option<&Denial>, was_open: bool) {
        let record = Finished {
            direction: Direction::Inbound,
            encryption: Encryption::Mtls,
            reason: relayed.reason,
            detail,
            policy: denial.and_then(|denial| denial.policy.as_deref()),
            source_id: Some(self.source),
            source: Some(self.client),
            destination_id: Some(&self.pod.workload.id),
            destination: Some(self.asked.authority),
            sent_bytes: relayed.to_app,
            received_bytes: relayed.from_app,
            duration: self.began.elapsed(),
        };
        shard.observe.finished(&record, was_open);
    }
}

fn nothing(reason: Reason) -> Relayed {
    Relayed { from_app: 0, to_app: 0, reason }
}

/// What the policies are asked.
fn attempt(about: &About<'_>) -> Attempt {
    Attempt {
        peer: about.source.clone(),
        source: about.client.ip(),
        workload: Arc::clone(&about.pod.workload),
        port: about.asked.authority.port(),
    }
}

/// Resolves when an open stream has to end; by a change of the policies, it says which.
async fn stop(
    shard: &Shard,
    pod: &Pod,
    permit: &mut policy::Admitted,
    denial: &mut Option<Denial>,
) -> Reason {
    tokio::select! {
        reason = shard.stop(&pod.gone) => reason,
        revoked = permit.revoked() => {
            *denial = Some(revoked);
            Reason::DeniedByPolicy
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

#[cfg(test)]
mod tests {
    use super::*;

    fn size<A, B, C, D, E, F, Task>(_: impl Fn(A, B, C, D, E, F) -> Task) -> usize {
        size_of::<Task>()
    }

    #[test]
    fn an_idle_streams_task_is_small() {
        let bytes = size(serve);
        assert!(
            bytes <= 1184,
            "{bytes} bytes for each stream that is open; what opens it belongs on the heap"
        );
    }
}
