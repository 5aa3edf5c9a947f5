//! A client and a server, each with a root, a clock and a memory of sessions of its own, and one
//! connection between them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use hauberk::identity::bundle::TrustBundle;
use hauberk::identity::crl::{Crl, Crls, Listed};
use hauberk::identity::svid::{Leaf, X509Svid};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls::client::Dial;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::{Listener, Terms};
use hauberk::tls::ticket::{self, TicketKeys};
use hauberk::tls::verify::{Expected, Judge, Refused};
use hauberk::tls::{self, Settled};
use hauberk::verdict::{Reason, Unresumed};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, IsCa, Issuer,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{PrivateKeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Certificates begin here, and clocks a minute later.
pub(crate) const BEGIN: u64 = 1_800_000_000;
pub(crate) const LONG: u64 = 24 * 3600;

#[derive(Debug)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(BEGIN + 60)))
    }

    pub(crate) fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.load(Ordering::Relaxed))))
    }
}

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

pub(crate) fn id(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "test", name).unwrap()
}

pub(crate) type Ca = CertifiedIssuer<'static, KeyPair>;

pub(crate) fn ca_params(name: &str, life: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    valid(&mut params, life);
    params
}

pub(crate) fn root(name: &str) -> Ca {
    CertifiedIssuer::self_signed(ca_params(name, 10 * LONG), KeyPair::generate().unwrap()).unwrap()
}

pub(crate) fn intermediate(root: &Ca, life: u64) -> Ca {
    CertifiedIssuer::signed_by(ca_params("between", life), KeyPair::generate().unwrap(), root).unwrap()
}

pub(crate) fn valid(params: &mut CertificateParams, life: u64) {
    let time = |seconds| (UNIX_EPOCH + Duration::from_secs(seconds)).into();
    (params.not_before, params.not_after) = (time(BEGIN), time(BEGIN + life));
}

pub(crate) fn bundle(roots: &[&Ca]) -> TrustBundle {
    TrustBundle::new(domain(), roots.iter().map(|root| root.der().clone()).collect()).unwrap()
}

pub(crate) fn svid(
    issuer: &Issuer<'static, KeyPair>,
    between: &[&Ca],
    who: &SpiffeId,
    life: u64,
) -> X509Svid {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(who.as_str().try_into().unwrap())];
    valid(&mut params, life);
    let leaf = params.signed_by(&key, issuer).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let key = tls::provider::provider().key_provider.load_private_key(key).unwrap();
    let chain = [leaf.der().clone()].into_iter().chain(between.iter().map(|ca| ca.der().clone()));
    X509Svid::new(chain.collect(), key).unwrap()
}

/// A CA's CRL of these, as it stands in a bundle; `unknown` says why it cannot be answered by.
pub(crate) fn crls(
    issuer: &Issuer<'static, KeyPair>,
    revoked: &[&X509Svid],
    unknown: Option<&str>,
) -> Arc<Crls> {
    let serial = |svid: &&X509Svid| {
        let (_, leaf) = X509Certificate::from_der(&svid.certified_key().cert[0]).unwrap();
        SerialNumber::from_slice(leaf.raw_serial())
    };
    let time = |seconds| (UNIX_EPOCH + Duration::from_secs(seconds)).into();
    let params = CertificateRevocationListParams {
        this_update: time(BEGIN),
        next_update: time(BEGIN + LONG),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: revoked
            .iter()
            .map(|svid| RevokedCertParams {
                serial_number: serial(svid),
                revocation_time: time(BEGIN),
                reason_code: None,
                invalidity_date: None,
            })
            .collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let crl = Arc::new(Crl::from_der(params.signed_by(issuer).unwrap().der()).unwrap());
    Arc::new(Crls(vec![Listed { file: "a.crl".into(), crl, unknown: unknown.map(Into::into), fault: None }]))
}

/// A rule that can be turned on, and that may or may not show in its name.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) reason: Reason,
    pub(crate) on: AtomicBool,
    pub(crate) name: u8,
}

impl Rule {
    pub(crate) fn new(reason: Reason, name: u8) -> Arc<Self> {
        Arc::new(Self { reason, on: AtomicBool::new(false), name })
    }
}

impl Judge for Rule {
    fn judge(&self, peer: &Leaf, _: UnixTime) -> Result<(), Refused> {
        if self.on.load(Ordering::Relaxed) {
            return Err(Refused { reason: self.reason, detail: format!("{} may not", peer.id) });
        }
        Ok(())
    }

    fn digest(&self) -> [u8; 32] {
        [self.name; 32]
    }
}

/// What the accepting side is made of; tests change one thing of it at a time.
pub(crate) struct Server {
    pub(crate) memory: Arc<Memory>,
    pub(crate) bundle: TrustBundle,
    pub(crate) epoch: u64,
    pub(crate) svid: X509Svid,
    pub(crate) judge: Option<Arc<dyn Judge>>,
    pub(crate) alpn: Vec<&'static [u8]>,
    pub(crate) place: Vec<&'static [u8]>,
    pub(crate) mode: &'static str,
}

impl Server {
    pub(crate) fn listener(&self) -> Arc<Listener> {
        let roots = self.memory.roots(&self.bundle, self.epoch).unwrap();
        let terms = Terms {
            svid: &self.svid,
            roots: &roots,
            peers: Expected::Member,
            judge: self.judge.clone(),
            alpn: &self.alpn,
            place: &self.place,
            mode: self.mode,
        };
        self.memory.listener(&terms).unwrap()
    }
}

pub(crate) struct Client {
    pub(crate) memory: Arc<Memory>,
    pub(crate) bundle: TrustBundle,
    pub(crate) epoch: u64,
    pub(crate) svid: X509Svid,
    pub(crate) judge: Option<Arc<dyn Judge>>,
}

impl Client {
    pub(crate) fn dial(&self) -> Arc<Dial> {
        let roots = self.memory.roots(&self.bundle, self.epoch).unwrap();
        self.memory.dial(&self.svid, &roots, Expected::Member, &[b"h2"], self.judge.clone()).unwrap()
    }
}

pub(crate) fn memory(keys: Option<Arc<TicketKeys>>, clock: &Arc<Clock>) -> Arc<Memory> {
    memory_with(keys, clock, tls::provider::provider())
}

pub(crate) fn memory_with(
    keys: Option<Arc<TicketKeys>>,
    clock: &Arc<Clock>,
    provider: Arc<CryptoProvider>,
) -> Arc<Memory> {
    let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
    let clock: Arc<Clock> = Arc::clone(clock);
    Memory::with(keys, observe, provider, clock)
}

/// A client and a server, each with a root, a clock and a memory of its own.
pub(crate) struct World {
    pub(crate) client: Client,
    pub(crate) server: Server,
    pub(crate) client_root: Ca,
    pub(crate) server_root: Ca,
    pub(crate) client_clock: Arc<Clock>,
    pub(crate) server_clock: Arc<Clock>,
}

pub(crate) fn world() -> World {
    let (client_root, server_root) = (root("clients"), root("servers"));
    let (client_clock, server_clock) = (Clock::new(), Clock::new());
    let both = bundle(&[&client_root, &server_root]);
    let client = Client {
        memory: memory(Some(ticket::fleeting()), &client_clock),
        bundle: both.clone(),
        epoch: 1,
        svid: svid(&client_root, &[], &id("client"), LONG),
        judge: None,
    };
    let server = Server {
        memory: memory(Some(ticket::fleeting()), &server_clock),
        bundle: both,
        epoch: 1,
        svid: svid(&server_root, &[], &id("server"), LONG),
        judge: None,
        alpn: vec![b"h2"],
        place: vec![b"workload", b"test", b"server-0"],
        mode: "strict",
    };
    World { client, server, client_root, server_root, client_clock, server_clock }
}

/// How one connection went, on both sides.
#[derive(Debug)]
pub(crate) struct Went {
    pub(crate) client: Result<Settled, Reason>,
    pub(crate) server: Result<Settled, Reason>,
    /// Why the server did not honour a ticket, if it saw one.
    pub(crate) unresumed: Option<Unresumed>,
    /// What the client sent.
    pub(crate) sent: Vec<u8>,
}

impl Went {
    pub(crate) fn resumed(&self) -> bool {
        match (&self.client, &self.server) {
            (Ok(client), Ok(server)) => {
                assert_eq!(client.resumed, server.resumed, "the sides disagree");
                client.resumed
            }
            _ => false,
        }
    }

    #[track_caller]
    pub(crate) fn must_be_resumed(&self) {
        assert!(self.resumed(), "not resumed: {self:?}");
    }

    /// The ticket was offered and not honoured, and a full handshake succeeded.
    #[track_caller]
    pub(crate) fn must_be_full(&self, why: Unresumed) {
        assert_eq!(self.unresumed, Some(why), "{self:?}");
        assert!(self.client.is_ok() && self.server.is_ok(), "the full handshake failed: {self:?}");
        assert!(!self.resumed(), "resumed all the same");
    }

    /// The ticket was offered and not honoured, and the peer was refused.
    #[track_caller]
    pub(crate) fn must_be_refused(&self, why: Unresumed, reason: Reason) {
        assert_eq!(self.unresumed, Some(why), "{self:?}");
        assert_eq!(self.server.as_ref().map(drop), Err(&reason), "{self:?}");
    }
}

/// The client's TCP connection, with a copy of what it sends.
pub(crate) struct Tapped(TcpStream, Vec<u8>);

impl tokio::io::AsyncRead for Tapped {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        into: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_read(cx, into)
    }
}

impl tokio::io::AsyncWrite for Tapped {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        let poll = std::pin::Pin::new(&mut self.0).poll_write(cx, bytes);
        if let std::task::Poll::Ready(Ok(n)) = poll {
            self.1.extend(&bytes[..n]);
        }
        poll
    }

    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// One connection. The server's word after the handshake brings the tickets with it.
pub(crate) async fn connect(dial: &Arc<Dial>, listener: &Arc<Listener>) -> Went {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (config, judged) = listener.accept();
    let server = async {
        let (tcp, _) = socket.accept().await.unwrap();
        let mut io = TlsAcceptor::from(config).accept(tcp).await.map_err(|e| tls::reason(&e))?;
        let (_, session) = io.get_ref();
        let settled = judged.settle(session.handshake_kind(), session.peer_certificates());
        let settled = settled.map_err(|e| tls::rustls_reason(&e))?;
        let _ = io.write_all(b"!").await;
        let _ = io.flush().await;
        Ok((settled, io))
    };
    let client = async {
        let tapped = Tapped(TcpStream::connect(address).await.unwrap(), Vec::new());
        let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into());
        let connector = TlsConnector::from(Arc::clone(dial.config()));
        let mut io = match connector.connect(name, tapped).await {
            Ok(io) => io,
            Err(error) => return (Err(tls::reason(&error)), Vec::new()),
        };
        let (tapped, session) = io.get_ref();
        let sent = tapped.1.clone();
        let settled = match dial.settle(session.handshake_kind(), session.peer_certificates()) {
            Ok(settled) => settled,
            Err(error) => return (Err(tls::rustls_reason(&error)), sent),
        };
        // A server that refuses the client says so only now (RFC 8446, 4.4.2.4).
        match io.read_u8().await {
            Ok(b'!') => (Ok(settled), sent),
            Ok(other) => panic!("the server said {other}"),
            Err(error) => (Err(tls::reason(&error)), sent),
        }
    };
    let (server, (client, sent)) = tokio::join!(server, client);
    Went { client, server: server.map(|(settled, _)| settled), unresumed: judged.unresumed(), sent }
}

impl World {
    /// A full handshake, then a resumed one.
    pub(crate) async fn resume(&self) -> Went {
        let (dial, listener) = (self.client.dial(), self.server.listener());
        let first = connect(&dial, &listener).await;
        assert!(first.client.is_ok() && first.server.is_ok(), "the first handshake failed: {first:?}");
        assert!(!first.resumed() && first.unresumed.is_none(), "there was nothing to resume: {first:?}");
        let second = connect(&dial, &listener).await;
        second.must_be_resumed();
        second
    }

    pub(crate) async fn again(&self) -> Went {
        connect(&self.client.dial(), &self.server.listener()).await
    }
}
