//! The receiving agent's way: a peer's TLS connection, its streams, each authorized and delivered.

mod front;
mod stream;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep_until, timeout};

use crate::hbone::{self, LAST_WORDS, Lease, Term, server};
use crate::identity::SpiffeId;
use crate::identity::svid::{Leaf, X509Svid};
use crate::pool::{Word, dial};
use crate::proof::connection::Proofs;
use crate::proof::{Binding, Side};
use crate::shard::Shard;
use crate::telemetry::Role;
use crate::tls::handshake::{self, Established};
use crate::tls::{self, Settled, stream::TlsStream};
use crate::verdict::Reason;
use front::Tunnel;
pub use front::{Front, Node};
use stream::Refused;

/// An authenticated peer.
#[derive(Clone, Debug)]
struct Peer {
    id: SpiffeId,
    address: SocketAddr,
}

/// A finished handshake: its two certificates (when one is revoked, the tunnel is closed), and what
/// names the connection.
#[derive(Debug)]
struct Proof {
    peer: Leaf,
    own: Arc<X509Svid>,
    exporter: [u8; 32],
}

/// Accepts tunnels at a front until it is gone or the agent drains.
pub async fn serve(shard: Shard, front: Front, listener: TcpListener) {
    let Ok(local) = listener.local_addr() else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = front.gone().cancelled() => return,
            () = shard.draining() => return,
        };
        match accepted {
            Ok((tcp, address)) => {
                let address = SocketAddr::new(address.ip().to_canonical(), address.port());
                // While there is none, this listener accepts nothing more: what is over the limit waits
                // in the kernel and costs us nothing. An idle listener holds none.
                let Ok(permit) = Arc::clone(&shard.handshakes).acquire_owned().await else { return };
                let (shard, front) = (shard.clone(), front.clone());
                shard.clone().spawn(async move {
                    let Some((io, proof)) = handshake(&shard, &front, tcp, address).await else { return };
                    drop(permit);
                    tunnel(shard, front, io, proof, address).await;
                });
            }
            Err(error) if shard.may_accept_again(local, &error).await => {}
            Err(_) => return,
        }
    }
}

/// Mutual TLS with a deadline. A peer that cannot prove itself is logged, counted and gone.
async fn handshake(
    shard: &Shard,
    front: &Front,
    tcp: TcpStream,
    address: SocketAddr,
) -> Option<(TlsStream, Proof)> {
    let began = Instant::now();
    let shaking = async {
        // Another agent looks whether this one is here (see `fleet::reach`).
        let said_nothing = tcp.peek(&mut [0]).await.is_ok_and(|read| read == 0);
        if said_nothing { None } else { Some(prove(shard, front, tcp).await) }
    };
    let outcome = match timeout(shard.tunnel.handshake_timeout, shaking).await {
        Ok(outcome) => Ok(outcome?),
        Err(late) => Err(late),
    };
    let (reason, detail) = match outcome {
        Ok(Ok((stream, proof, resumed))) => {
            shard.observe.handshake(Role::Server, began.elapsed(), resumed);
            return Some((stream, proof));
        }
        Ok(Err((reason, detail))) => (reason, detail),
        Err(_) => (Reason::HandshakeTimeout, "the peer did not finish the TLS handshake in time".into()),
    };
    shard.observe.handshake_failed(Role::Server, began.elapsed(), reason);
    Refused { at: front.id(), source: address, source_id: None, reason, detail: &detail }.tell(shard);
    None
}

async fn prove(
    shard: &Shard,
    front: &Front,
    tcp: TcpStream,
) -> Result<(TlsStream, Proof, bool), (Reason, String)> {
    let internal = |error: io::Error| (Reason::Internal, error.to_string());
    dial::tune(&tcp).map_err(internal)?;
    let listener = || {
        front
            .listener(shard)
            .map_err(|reason| (reason, format!("{} has no SVID that it may present", front.id())))
    };
    let (before, _) = listener()?;
    let (config, judged) = before.accept();
    let refused = |error: io::Error| (tls::reason(&error), tls::explain(&error));
    let Established { stream, session } = handshake::accept(config, tcp).await.map_err(refused)?;
    if session.alpn.as_deref() != Some(front.alpn()) {
        return Err((Reason::NoProtocol, "the peer did not agree on the application protocol".into()));
    }
    // The very certificates that were judged in this handshake.
    let chain = session.peer_chain();
    let refused = |error: rustls::Error| (tls::rustls_reason(&error), error.to_string());
    let settled = judged.settle(Some(session.kind), chain).map_err(refused)?;
    // Trust may have changed while the peer took its time.
    let (after, own) = listener()?;
    if !Arc::ptr_eq(&before, &after) {
        after.judge(chain).map_err(refused)?;
    }
    let Settled { leaf, resumed } = settled;
    Ok((stream, Proof { peer: leaf, own, exporter: session.exporter }, resumed))
}

/// Serves one tunnel's streams until it ends, a certificate of it is revoked, or its term is over; asks the peer to
/// leave when the agent drains, and when the first certificate expires.
async fn tunnel(shard: Shard, front: Front, io: TlsStream, proof: Proof, address: SocketAddr) {
    let peer = Peer { id: proof.peer.id.clone(), address };
    let start = server::start(io, shard.tunnel.stream_window, shard.tunnel.max_streams);
    let mut connection = match timeout(shard.tunnel.handshake_timeout, start).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return broken(&shard, &front, &peer, &error),
        Err(_) => return broke(&shard, &front, &peer, "no HTTP/2 preface in time"),
    };
    let tunnel = rests_on(&front, &proof);
    if matches!(front, Front::Node(_)) {
        // Nobody listens when nothing is made ahead.
        let _ = shard.words.send(Word::Arrived(peer.id.clone()));
    }
    let leaves = [&proof.peer, proof.own.leaf()];
    let mut revoked = std::pin::pin!(shard.trust.until_revoked(&leaves));
    let mut changes = shard.trust.subscribe();
    let mut farewell = std::pin::pin!(shard.farewell());
    let term = Term::of(leaves, shard.tunnel.outlive, SystemTime::now(), Instant::now());
    let mut retire = std::pin::pin!(sleep_until(term.retire.into()));
    let mut end = std::pin::pin!(sleep_until(term.end.into()));
    let mut draining = false;
    loop {
        let accepted = tokio::select! {
            // First: a stream that waits beside a revocation is not taken.
            biased;
            revoked = &mut revoked => {
                shard.observe.cut(Role::Server, &revoked);
                tunnel.cut(Reason::Revoked);
                let _ = timeout(LAST_WORDS, connection.abort(hbone::code(Reason::Revoked))).await;
                return;
            }
            changed = changes.changed(), if matches!(tunnel, Tunnel::Node(_)) => {
                if changed.is_err() {
                    return;
                }
                cut_revoked(&shard, &tunnel);
                continue;
            }
            accepted = connection.accept() => accepted,
            () = async { tokio::select! { () = &mut farewell => {}, () = &mut retire => {} } }, if !draining => {
                connection.graceful_shutdown();
                draining = true;
                continue;
            }
            () = &mut end => {
                shard.observe.outlived(&peer.id);
                tunnel.cut(Reason::Expired);
                let _ = timeout(LAST_WORDS, connection.abort(hbone::code(Reason::Expired))).await;
                return;
            }
            () = front.gone().cancelled() => return,
        };
        match accepted {
            Some(Ok((request, mut respond))) => {
                if matches!(&tunnel, Tunnel::Node(proofs) if proofs.is_hopeless()) {
                    broke(&shard, &front, &peer, "too many identity proofs that prove nothing");
                    let _ = timeout(LAST_WORDS, connection.abort(h2::Reason::ENHANCE_YOUR_CALM)).await;
                    return;
                }
                if let Some(shown) = front.proof(&shard, &tunnel, &request) {
                    // Whoever has given the stream up wants no proof any more.
                    let _ = server::prove(&mut respond, &shown.header);
                }
                let (front, tunnel, peer) = (front.clone(), tunnel.clone(), peer.clone());
                let serving = stream::serve(shard.clone(), front, tunnel, peer, request, respond);
                shard.clone().spawn(serving);
            }
            Some(Err(error)) => return broken(&shard, &front, &peer, &error),
            None => return,
        }
    }
}

fn rests_on(front: &Front, proof: &Proof) -> Tunnel {
    let peer = proof.peer.id.clone();
    match front {
        Front::Pod(_) => Tunnel::Workload { peer, lease: Arc::new(Lease::default()) },
        Front::Node(_) => {
            let binding = Binding { exporter: proof.exporter, client: peer, server: front.id().clone() };
            Tunnel::Node(Proofs::new(binding, Side::Server))
        }
    }
}

fn cut_revoked(shard: &Shard, tunnel: &Tunnel) {
    let Tunnel::Node(proofs) = tunnel else { return };
    if let Some(revoked) = proofs.cut_revoked(&shard.trust.snapshot()) {
        shard.observe.cut(Role::Server, &revoked);
    }
}

/// Logs and counts the end of a tunnel that a peer broke the rules on.
fn broken(shard: &Shard, front: &Front, peer: &Peer, error: &h2::Error) {
    // A peer that just closes its connection has broken no rule.
    if error.is_io() || error.is_remote() {
        return;
    }
    broke(shard, front, peer, &error.to_string());
}

fn broke(shard: &Shard, front: &Front, peer: &Peer, detail: &str) {
    let (at, source, source_id) = (front.id(), peer.address, Some(&peer.id));
    Refused { at, source, source_id, reason: Reason::Http2, detail }.tell(shard);
}
