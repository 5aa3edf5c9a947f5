//! The receiving agent's way: a peer's TLS connection, its streams, each authorized and delivered.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::Request;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::hbone::server::{self, Asked};
use crate::hbone::{self, Recv, Stream, TLS_BUFFER_BYTES, Transport};
use crate::identity::SpiffeId;
use crate::identity::svid::Leaf;
use crate::pod::Pod;
use crate::policy::{Admitted, Attempt, Denial};
use crate::pool::dial;
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::{Finished, Role};
use crate::tls;
use crate::verdict::{Direction, Encryption, Reason};

/// An authenticated peer.
#[derive(Clone, Debug)]
struct Peer {
    id: SpiffeId,
    address: SocketAddr,
}

/// Accepts tunnels to a pod until the pod is gone or the agent drains.
pub async fn serve(shard: Shard, pod: Arc<Pod>, listener: TcpListener) {
    let Ok(local) = listener.local_addr() else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.gone.cancelled() => return,
            () = shard.draining() => return,
        };
        match accepted {
            Ok((tcp, address)) => {
                let address = SocketAddr::new(address.ip().to_canonical(), address.port());
                // While there is none, this listener accepts nothing more: what is over the limit waits
                // in the kernel and costs us nothing. An idle listener holds none.
                let Ok(permit) = Arc::clone(&shard.handshakes).acquire_owned().await else { return };
                let (shard, pod) = (shard.clone(), Arc::clone(&pod));
                shard.clone().spawn(async move {
                    let Some((io, peer)) = handshake(&shard, &pod, tcp, address).await else { return };
                    drop(permit);
                    tunnel(shard, pod, io, peer).await;
                });
            }
            Err(error) => shard.accept_failed(local, &error).await,
        }
    }
}

/// Mutual TLS with a deadline. A peer that cannot prove itself is logged, counted and gone.
async fn handshake(
    shard: &Shard,
    pod: &Pod,
    tcp: TcpStream,
    address: SocketAddr,
) -> Option<(TlsStream<Transport>, Peer)> {
    let began = Instant::now();
    let outcome = timeout(shard.tunnel.handshake_timeout, prove(shard, pod, tcp)).await;
    let (reason, detail) = match outcome {
        Ok(Ok((io, id))) => {
            shard.observe.handshake(Role::Server, began.elapsed(), None);
            return Some((io, Peer { id, address }));
        }
        Ok(Err((reason, detail))) => (reason, detail),
        Err(_) => (Reason::HandshakeTimeout, "the peer did not finish the TLS handshake in time".into()),
    };
    shard.observe.handshake(Role::Server, began.elapsed(), Some(reason));
    refused(shard, pod, address, None, None, reason, &detail);
    None
}

async fn prove(
    shard: &Shard,
    pod: &Pod,
    tcp: TcpStream,
) -> Result<(TlsStream<Transport>, SpiffeId), (Reason, String)> {
    let internal = |error: io::Error| (Reason::Internal, error.to_string());
    dial::tune(&tcp).map_err(internal)?;
    let config = pod
        .server_config(&shard.trust)
        .map_err(|reason| (reason, format!("no SVID has been issued for {} yet", pod.workload.id)))?;
    let mut io = TlsAcceptor::from(config)
        .accept(Transport::new(tcp))
        .await
        .map_err(|error| (tls::reason(&error), tls::explain(&error)))?;
    io.get_mut().1.set_buffer_limit(Some(TLS_BUFFER_BYTES));
    // The very certificate that was verified in this handshake.
    let (_, session) = io.get_ref();
    if session.alpn_protocol() != Some(tls::ALPN_H2) {
        return Err((Reason::Http2, "the peer did not agree on ALPN h2".into()));
    }
    let leaf = session.peer_certificates().and_then(|chain| chain.first());
    let leaf = leaf.ok_or((Reason::NoClientCertificate, "no client certificate".into()))?;
    let id = Leaf::from_der(leaf).map_err(|error| (Reason::BadCertificate, error.to_string()))?.id;
    Ok((io, id))
}

/// Serves one tunnel's streams until it ends; asks the peer to leave when the agent drains.
async fn tunnel(shard: Shard, pod: Arc<Pod>, io: TlsStream<Transport>, peer: Peer) {
    let start = server::start(io, shard.tunnel.stream_window, shard.tunnel.max_streams);
    let mut connection = match timeout(shard.tunnel.handshake_timeout, start).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return broken(&shard, &pod, &peer, &error),
        Err(_) => {
            return refused(
                &shard,
                &pod,
                peer.address,
                Some(&peer.id),
                None,
                Reason::Http2,
                "no HTTP/2 preface in time",
            );
        }
    };
    let mut draining = false;
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            () = shard.draining(), if !draining => {
                connection.graceful_shutdown();
                draining = true;
                continue;
            }
            () = pod.gone.cancelled() => return,
        };
        match accepted {
            Some(Ok((request, respond))) => {
                let (shard, pod, peer) = (shard.clone(), Arc::clone(&pod), peer.clone());
                shard.clone().spawn(async move { stream(shard, pod, peer, request, respond).await });
            }
            Some(Err(error)) => return broken(&shard, &pod, &peer, &error),
            None => return,
        }
    }
}

/// One stream, from its CONNECT to its log line.
async fn stream(
    shard: Shard,
    pod: Arc<Pod>,
    peer: Peer,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let began = Instant::now();
    let asked = match authorize(&pod, &request) {
        Ok(asked) => asked,
        Err(reason) => {
            let authority = request.uri().authority().map(|a| a.as_str()).unwrap_or("no authority");
            let detail = format!("{} {authority}", request.method());
            server::refuse(respond, request.into_body(), reason);
            return refused(&shard, &pod, peer.address, Some(&peer.id), None, reason, &detail);
        }
    };
    let client = client(&shard, &peer, asked);
    let tell = |relayed: Relayed, detail: &str, denial: Option<&Denial>, was_open| {
        let record = Finished {
            direction: Direction::Inbound,
            encryption: Encryption::Mtls,
            reason: relayed.reason,
            detail,
            policy: denial.map(|denial| &*denial.policy),
            source_id: Some(&peer.id),
            source: Some(client),
            destination_id: Some(&pod.workload.id),
            destination: Some(asked.authority),
            sent_bytes: relayed.to_app,
            received_bytes: relayed.from_app,
            duration: began.elapsed(),
        };
        shard.observe.finished(&record, was_open);
    };
    let admitted = match shard.policies.judge(attempt(&peer, client, &pod, asked)) {
        Ok(admitted) => admitted,
        Err(denial) => {
            server::refuse(respond, request.into_body(), Reason::DeniedByPolicy);
            let nothing = Relayed { from_app: 0, to_app: 0, reason: Reason::DeniedByPolicy };
            return tell(nothing, &denial.to_string(), Some(&denial), false);
        }
    };
    let mut denial = None;
    shard.observe.opened(Direction::Inbound);
    let connecting = async {
        tokio::select! {
            delivered = pod.deliver.connect(asked.authority, client) => delivered,
            // The opener gave up: nobody waits for the application any more.
            _ = std::future::poll_fn(|cx| respond.poll_reset(cx)) => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    };
    let outcome: io::Result<_> = connecting.await;
    let (relayed, detail) = match outcome {
        Err(error) => {
            let reason = match error.kind() {
                io::ErrorKind::ConnectionAborted => Reason::PeerReset,
                _ => dial::connect_reason(&error),
            };
            server::refuse(respond, request.into_body(), reason);
            (Relayed { from_app: 0, to_app: 0, reason }, format!("the application: {error}"))
        }
        Ok(delivered) => {
            let relayed = match server::accept(respond) {
                Ok(send) => {
                    let stream = Stream { send, recv: Recv::Open(request.into_body()), lease: None };
                    relay::relay(&delivered.app, stream, stop(&shard, &pod, admitted, &mut denial)).await
                }
                Err(error) => {
                    relay::reset(&delivered.app);
                    Relayed { from_app: 0, to_app: 0, reason: hbone::reason(&error) }
                }
            };
            (relayed, denial.as_ref().map(Denial::to_string).unwrap_or_default())
        }
    };
    tell(relayed, &detail, denial.as_ref(), true);
}

/// What the policies are asked.
fn attempt(peer: &Peer, client: SocketAddr, pod: &Pod, asked: Asked) -> Attempt {
    Attempt {
        peer: peer.id.clone(),
        source: client.ip(),
        workload: Arc::clone(&pod.workload),
        port: asked.authority.port(),
    }
}

/// Resolves when an open stream has to end; by a change of the policies, it says which.
async fn stop(shard: &Shard, pod: &Pod, admitted: Admitted, denial: &mut Option<Denial>) -> Reason {
    tokio::select! {
        reason = shard.stop(&pod.gone) => reason,
        revoked = admitted.revoked() => {
            *denial = Some(revoked);
            Reason::DeniedByPolicy
        }
    }
}

/// May this be asked of this pod? The tunnel's server identity is the pod's, so only the pod's own
/// addresses may be named, and none of the agent's ports there.
fn authorize(pod: &Pod, request: &Request<RecvStream>) -> Result<Asked, Reason> {
    let asked = server::parse(request)?;
    if !pod.has(asked.authority.ip()) {
        return Err(Reason::NotLocal);
    }
    if pod.own_ports.contains(&asked.authority.port()) {
        return Err(Reason::AgentPort);
    }
    Ok(asked)
}

/// The address the application shall see: the one the peer names, if the directory places the
/// authenticated identity there; otherwise the one the tunnel comes from.
fn client(shard: &Shard, peer: &Peer, asked: Asked) -> SocketAddr {
    let directory = shard.directory.load();
    let believed = asked.source.filter(|source| {
        let placed = directory.workload_at(source.ip()).is_some_and(|workload| workload.id == peer.id);
        // An address of another family is none that the application's socket could report.
        placed && source.is_ipv4() == asked.authority.is_ipv4()
    });
    believed.unwrap_or(peer.address)
}

/// Logs and counts the end of a tunnel that a peer broke the rules on.
fn broken(shard: &Shard, pod: &Pod, peer: &Peer, error: &h2::Error) {
    // A peer that just closes its connection has broken no rule.
    if error.is_io() || error.is_remote() {
        return;
    }
    refused(shard, pod, peer.address, Some(&peer.id), None, Reason::Http2, &error.to_string());
}

fn refused(
    shard: &Shard,
    pod: &Pod,
    source: SocketAddr,
    source_id: Option<&SpiffeId>,
    destination: Option<SocketAddr>,
    reason: Reason,
    detail: &str,
) {
    let record = Finished {
        direction: Direction::Inbound,
        encryption: if source_id.is_some() { Encryption::Mtls } else { Encryption::None },
        reason,
        detail,
        policy: None,
        source_id,
        source: Some(source),
        destination_id: Some(&pod.workload.id),
        destination,
        sent_bytes: 0,
        received_bytes: 0,
        duration: Duration::ZERO,
    };
    shard.observe.finished(&record, false);
}
