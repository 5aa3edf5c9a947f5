//! Makes a connection: TCP, mutual TLS as the source, HTTP/2. The only place that dials peers.

use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustls::HandshakeKind;
use rustls::pki_types::{ServerName, UnixTime};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::slot::Epoch;
use super::{Failure, Key};
use crate::config::TunnelConfig;
use crate::hbone::client::{Driver, Tunnel};
use crate::hbone::{LAST_WORDS, Lease};
use crate::identity::SpiffeId;
use crate::identity::svid::{Leaf, X509Svid};
use crate::proof::connection::Proofs;
use crate::proof::{Binding, Side};
use crate::telemetry::{Observe, Role};
use crate::tls::client::Dial;
use crate::tls::handshake::{self, Established};
use crate::tls::memory::Memory;
use crate::tls::roots::Roots;
use crate::tls::verify::Expected;
use crate::tls::{self, Settled};
use crate::trust::{Snapshot, Trust};
use crate::verdict::Reason;

/// A peer that acknowledges nothing for this long is gone, whatever TCP still hopes.
const DEAD_AFTER: Duration = Duration::from_secs(30);

/// A connection and the trust it rests on.
pub(super) struct Dialled {
    pub(super) tunnel: Tunnel,
    /// In node scope, what is proven on it.
    pub(super) proofs: Option<Arc<Proofs>>,
    pub(super) epoch: Epoch,
}

/// Dials peers.
#[derive(Clone, Debug)]
pub struct Dialer {
    trust: Arc<Trust>,
    tls: Arc<Memory>,
    config: Arc<TunnelConfig>,
    observe: Observe,
}

impl Dialer {
    /// Presents SVIDs from `trust` and verifies against its bundle; resumes what `tls` remembers.
    pub fn new(trust: Arc<Trust>, tls: Arc<Memory>, config: Arc<TunnelConfig>, observe: Observe) -> Self {
        Self { trust, tls, config, observe }
    }

    /// The state of trust that a connection of `source` must rest on now; `None` without an SVID.
    pub(super) fn epoch(&self, source: &SpiffeId) -> Option<Epoch> {
        let now = self.trust.snapshot();
        now.svids.get(source).map(|svid| epoch(svid, &now))
    }

    pub(super) async fn dial(&self, key: &Key) -> Result<Dialled, Failure> {
        let (svid, snapshot) = self.svid(&key.source).await?;
        let mut again = true;
        let (tunnel, proofs, peer, driver) = loop {
            let tcp = self.connect(key).await.map_err(|f| Failure { reason: scoped(key, f.reason), ..f })?;
            let began = Instant::now();
            let handshake =
                timeout(self.config.handshake_timeout, self.handshake(key, &svid, &snapshot, tcp));
            let outcome = handshake.await.unwrap_or_else(|_| Err(Refusal::from(io::ErrorKind::TimedOut)));
            let refusal = match outcome {
                Ok(Made { tunnel, proofs, driver, settled: Settled { leaf: peer, resumed } }) => {
                    self.observe.handshake(Role::Client, began.elapsed(), resumed);
                    break (tunnel, proofs, peer, driver);
                }
                Err(refusal) => refusal,
            };
            let reason = scoped(key, tls::reason(&refusal.error));
            self.observe.handshake_failed(Role::Client, began.elapsed(), reason);
            // The peer of a resumed session shows in a full handshake who it is today.
            if !(refusal.resumed && std::mem::take(&mut again)) {
                return Err(failure(key, reason, &refusal.error));
            }
        };
        self.observe.pool(1);
        let (dialler, own) = (self.clone(), svid.leaf().clone());
        let (lease, held) = (Arc::downgrade(tunnel.lease()), proofs.clone());
        tokio::spawn(async move {
            dialler.drive(driver, [&own, &peer], lease, held).await;
            dialler.observe.pool(-1);
        });
        Ok(Dialled { tunnel, proofs, epoch: epoch(&svid, &snapshot) })
    }

    /// Moves a tunnel's bytes until it ends, or until one of its two certificates is revoked; in node
    /// scope, cuts the streams of workloads that are.
    async fn drive(
        &self,
        driver: Driver,
        leaves: [&Leaf; 2],
        lease: Weak<Lease>,
        proofs: Option<Arc<Proofs>>,
    ) {
        let mut driver = std::pin::pin!(driver);
        let mut changes = self.trust.subscribe();
        let mut revoked = std::pin::pin!(self.trust.until_revoked(&leaves));
        let revoked = loop {
            tokio::select! {
                // How it ended shows in the streams; a pooled connection that just ends is no event.
                _ = &mut driver => return,
                revoked = &mut revoked => break revoked,
                changed = changes.changed(), if proofs.is_some() => {
                    let cut = proofs.as_ref().and_then(|proofs| proofs.cut_revoked(&self.trust.snapshot()));
                    if let Some(revoked) = cut {
                        self.observe.cut(Role::Client, &revoked);
                    }
                    if changed.is_err() {
                        return;
                    }
                }
            }
        };
        if let Some(lease) = lease.upgrade() {
            lease.cut();
        }
        if let Some(proofs) = proofs {
            proofs.cut_all();
        }
        self.observe.cut(Role::Client, &revoked);
        // The streams' resets tell the peer why.
        let _ = timeout(LAST_WORDS, driver).await;
    }

    /// The trust bundle of a moment, ready to verify with.
    pub(super) fn roots(&self, snapshot: &Snapshot) -> Result<Arc<Roots>, Failure> {
        let roots = self.tls.roots(&snapshot.bundle, snapshot.bundle_epoch);
        roots.map_err(|error| Failure { reason: Reason::Internal, detail: error.to_string().into() })
    }

    /// Counts a connection that was made ahead, or could not be.
    pub(super) fn made_ahead(&self, made: bool) {
        self.observe.ahead(made);
    }

    /// The state of trust as of now.
    pub(super) fn trust(&self) -> Arc<Snapshot> {
        self.trust.snapshot()
    }

    /// How long a destination's proof is waited for: it is a part of the handshake that its node made for it.
    pub(super) fn proof_timeout(&self) -> Duration {
        self.config.handshake_timeout
    }

    /// The time, as certificates count it.
    pub(super) fn now(&self) -> UnixTime {
        self.tls.now()
    }

    /// The source's SVID; one that is just being issued is worth a moment's patience.
    pub(super) async fn svid(&self, source: &SpiffeId) -> Result<(Arc<X509Svid>, Arc<Snapshot>), Failure> {
        let held = timeout(self.config.handshake_timeout, self.trust.holding(&[source])).await.ok();
        let held = held.and_then(|now| Some((Arc::clone(now.svids.get(source)?), now)));
        let (svid, now) = held.ok_or_else(|| Failure {
            reason: Reason::NoSvid,
            detail: format!("no SVID has been issued for {source} yet").into(),
        })?;
        match now.revoked(svid.leaf()) {
            None => Ok((svid, now)),
            Some(revoked) => Err(Failure { reason: Reason::Revoked, detail: revoked.to_string().into() }),
        }
    }

    async fn connect(&self, key: &Key) -> Result<TcpStream, Failure> {
        let connecting = timeout(self.config.connect_timeout, TcpStream::connect(key.address));
        let tcp = match connecting.await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(error)) => return Err(failure(key, connect_reason(&error), &error)),
            Err(_) => return Err(failure(key, Reason::ConnectTimeout, &io::ErrorKind::TimedOut.into())),
        };
        tune(&tcp).map_err(|error| failure(key, Reason::Internal, &error))?;
        Ok(tcp)
    }

    async fn handshake(
        &self,
        key: &Key,
        svid: &X509Svid,
        snapshot: &Snapshot,
        tcp: TcpStream,
    ) -> Result<Made, Refusal> {
        let dial =
            self.how(key, svid, snapshot).map_err(|e| Refusal { error: tls::broken(e), resumed: false })?;
        // SNI is off and identities are SPIFFE IDs: the name only tells sessions apart.
        let name = ServerName::IpAddress(key.address.ip().into());
        let Established { stream, session } =
            handshake::connect(Arc::clone(dial.config()), name, tcp).await?;
        let resumed = session.kind == HandshakeKind::Resumed;
        let settled = dial
            .settle(Some(session.kind), session.peer_chain())
            .map_err(|error| Refusal { error: tls::broken(error), resumed })?;
        if session.alpn.as_deref() != Some(alpn(key)) {
            // The peer speaks TLS, and went on without choosing what is spoken inside.
            return Err(Refusal { error: tls::broken(rustls::Error::NoApplicationProtocol), resumed: false });
        }
        let proofs = key.between_nodes().then(|| {
            // As it calls itself: under an alias, that is not the name it was dialled by.
            let (client, server) = (key.source.clone(), settled.leaf.id.clone());
            Proofs::new(Binding { exporter: session.exporter, client, server }, Side::Client)
        });
        let (tunnel, driver) = Tunnel::start(stream, self.config.stream_window).await.map_err(into_io)?;
        Ok(Made { tunnel, proofs, driver, settled })
    }

    fn how(&self, key: &Key, svid: &X509Svid, snapshot: &Snapshot) -> Result<Arc<Dial>, rustls::Error> {
        let roots = self.tls.roots(&snapshot.bundle, snapshot.bundle_epoch)?;
        self.tls.dial(svid, &roots, Expected::Exactly(key.destination.clone()), &[alpn(key)], None)
    }
}

/// A connection, and what was learnt in making it.
struct Made {
    tunnel: Tunnel,
    proofs: Option<Arc<Proofs>>,
    driver: Driver,
    settled: Settled,
}

/// What is spoken inside: a node's agent is dialled for node scope, and for nothing else.
fn alpn(key: &Key) -> &'static [u8] {
    if key.between_nodes() { tls::ALPN_NODE } else { tls::ALPN_H2 }
}

/// Nothing that listens at a node's address, or nothing that speaks node scope, is no failure of the peer:
/// an agent of another make, or of an earlier version, is reached at its workloads' addresses.
fn scoped(key: &Key, reason: Reason) -> Reason {
    match reason {
        Reason::Refused | Reason::NoProtocol if key.between_nodes() => Reason::NoNodeScope,
        reason => reason,
    }
}

/// Why there is no connection, and whether a session had been resumed for it.
struct Refusal {
    error: io::Error,
    resumed: bool,
}

impl<E: Into<io::Error>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self { error: error.into(), resumed: false }
    }
}

/// Names the state of trust that an SVID and a snapshot make.
fn epoch(svid: &Arc<X509Svid>, snapshot: &Snapshot) -> Epoch {
    Epoch { svid: svid.generation(), roots: snapshot.roots_epoch }
}

/// What every connection between agents has: no delay, and an end when the peer is gone.
pub fn tune(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    let probes = TcpKeepalive::new().with_time(DEAD_AFTER / 2).with_interval(DEAD_AFTER / 6).with_retries(3);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(DEAD_AFTER))
}

/// Why a TCP connect failed.
pub fn connect_reason(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Reason::Refused,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Reason::Unreachable,
        io::ErrorKind::TimedOut => Reason::ConnectTimeout,
        _ => Reason::Internal,
    }
}

/// Keeps rustls' own error inside h2's visible for [`tls::reason`].
fn into_io(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error.into_io().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into());
    }
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn failure(key: &Key, reason: Reason, error: &io::Error) -> Failure {
    let hint = match reason {
        Reason::Refused => {
            ": no agent listens there; is one running on the peer's node, and the peer enrolled?"
        }
        Reason::ConnectTimeout => {
            ": the node is down, or a firewall or NetworkPolicy drops the tunnel's port"
        }
        _ => "",
    };
    let detail = format!("{} at {}: {}{hint}", key.destination, key.address, tls::explain(error));
    Failure { reason, detail: detail.into() }
}
