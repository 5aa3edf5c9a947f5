//! Resumption that is no bypass: real handshakes over TCP, each refusal after a success.
//!
//! Every test resumes first, so that what is refused afterwards is the change and nothing else.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hauberk::identity::bundle::TrustBundle;
use hauberk::identity::svid::{Leaf, X509Svid};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::keep::tickets;
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls::client::Dial;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::{Judged, Listener, Terms};
use hauberk::tls::ticket::{self, TicketKeys};
use hauberk::tls::verify::{Expected, Judge, Refused};
use hauberk::tls::{self, Settled};
use hauberk::verdict::{Reason, Unresumed};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::HandshakeKind;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Certificates begin here, and clocks a minute later.
const BEGIN: u64 = 1_800_000_000;
const LONG: u64 = 24 * 3600;

#[derive(Debug)]
struct Clock(AtomicU64);

impl Clock {
    fn new() -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(BEGIN + 60)))
    }

    fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.load(Ordering::Relaxed))))
    }
}

fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

fn id(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "test", name).unwrap()
}

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca_params(name: &str, life: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    valid(&mut params, life);
    params
}

fn root(name: &str) -> Ca {
    CertifiedIssuer::self_signed(ca_params(name, 10 * LONG), KeyPair::generate().unwrap()).unwrap()
}

fn intermediate(root: &Ca, life: u64) -> Ca {
    CertifiedIssuer::signed_by(ca_params("between", life), KeyPair::generate().unwrap(), root).unwrap()
}

fn valid(params: &mut CertificateParams, life: u64) {
    let time = |seconds| (UNIX_EPOCH + Duration::from_secs(seconds)).into();
    (params.not_before, params.not_after) = (time(BEGIN), time(BEGIN + life));
}

fn bundle(roots: &[&Ca]) -> TrustBundle {
    TrustBundle::new(domain(), roots.iter().map(|root| root.der().clone()).collect()).unwrap()
}

fn svid(issuer: &Issuer<'static, KeyPair>, between: &[&Ca], who: &SpiffeId, life: u64) -> X509Svid {
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

/// A rule that can be turned on, and that may or may not show in its name.
#[derive(Debug)]
struct Rule {
    reason: Reason,
    on: AtomicBool,
    name: u8,
}

impl Rule {
    fn new(reason: Reason, name: u8) -> Arc<Self> {
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
struct Server {
    memory: Arc<Memory>,
    bundle: TrustBundle,
    epoch: u64,
    svid: X509Svid,
    judge: Option<Arc<dyn Judge>>,
    alpn: Vec<&'static [u8]>,
    place: Vec<&'static [u8]>,
    mode: &'static str,
}

impl Server {
    fn listener(&self) -> Arc<Listener> {
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

struct Client {
    memory: Arc<Memory>,
    bundle: TrustBundle,
    epoch: u64,
    svid: X509Svid,
    judge: Option<Arc<dyn Judge>>,
}

impl Client {
    fn dial(&self) -> Arc<Dial> {
        let roots = self.memory.roots(&self.bundle, self.epoch).unwrap();
        self.memory.dial(&self.svid, &roots, Expected::Member, &[b"h2"], self.judge.clone()).unwrap()
    }
}

fn memory(keys: Option<Arc<TicketKeys>>, clock: &Arc<Clock>) -> Arc<Memory> {
    memory_with(keys, clock, tls::provider::provider())
}

fn memory_with(
    keys: Option<Arc<TicketKeys>>,
    clock: &Arc<Clock>,
    provider: Arc<CryptoProvider>,
) -> Arc<Memory> {
    let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
    let clock: Arc<Clock> = Arc::clone(clock);
    Memory::with(keys, observe, provider, clock)
}

/// A client and a server, each with a root, a clock and a memory of its own.
struct World {
    client: Client,
    server: Server,
    client_root: Ca,
    server_root: Ca,
    client_clock: Arc<Clock>,
    server_clock: Arc<Clock>,
}

fn world() -> World {
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
struct Went {
    client: Result<Settled, Reason>,
    server: Result<Settled, Reason>,
    /// Why the server did not honour a ticket, if it saw one.
    unresumed: Option<Unresumed>,
    /// What the client sent.
    sent: Vec<u8>,
}

impl Went {
    fn resumed(&self) -> bool {
        match (&self.client, &self.server) {
            (Ok(client), Ok(server)) => {
                assert_eq!(client.resumed, server.resumed, "the sides disagree");
                client.resumed
            }
            _ => false,
        }
    }

    #[track_caller]
    fn must_be_resumed(&self) {
        assert!(self.resumed(), "not resumed: {self:?}");
    }

    /// The ticket was offered and not honoured, and a full handshake succeeded.
    #[track_caller]
    fn must_be_full(&self, why: Unresumed) {
        assert_eq!(self.unresumed, Some(why), "{self:?}");
        assert!(self.client.is_ok() && self.server.is_ok(), "the full handshake failed: {self:?}");
        assert!(!self.resumed(), "resumed all the same");
    }

    /// The ticket was offered and not honoured, and the peer was refused.
    #[track_caller]
    fn must_be_refused(&self, why: Unresumed, reason: Reason) {
        assert_eq!(self.unresumed, Some(why), "{self:?}");
        assert_eq!(self.server.as_ref().map(drop), Err(&reason), "{self:?}");
    }
}

/// The client's TCP connection, with a copy of what it sends.
struct Tapped(TcpStream, Vec<u8>);

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
async fn connect(dial: &Arc<Dial>, listener: &Arc<Listener>) -> Went {
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
    async fn resume(&self) -> Went {
        let (dial, listener) = (self.client.dial(), self.server.listener());
        let first = connect(&dial, &listener).await;
        assert!(first.client.is_ok() && first.server.is_ok(), "the first handshake failed: {first:?}");
        assert!(!first.resumed() && first.unresumed.is_none(), "there was nothing to resume: {first:?}");
        let second = connect(&dial, &listener).await;
        second.must_be_resumed();
        second
    }

    async fn again(&self) -> Went {
        connect(&self.client.dial(), &self.server.listener()).await
    }
}

#[tokio::test]
async fn sessions_are_resumed_again_and_again_and_both_sides_know_the_peer() {
    let world = world();
    let went = world.resume().await;
    assert_eq!(went.client.unwrap().leaf.id, id("server"));
    assert_eq!(went.server.unwrap().leaf.id, id("client"));
    for _ in 0..10 {
        world.again().await.must_be_resumed();
    }
}

#[tokio::test]
async fn without_resumption_on_either_side_every_handshake_is_full() {
    for (client, server) in [(true, false), (false, true)] {
        let mut world = world();
        let keys = |on: bool| on.then(ticket::fleeting);
        world.client.memory = memory(keys(client), &world.client_clock);
        world.server.memory = memory(keys(server), &world.server_clock);
        for _ in 0..3 {
            let went = world.again().await;
            assert!(went.client.is_ok() && !went.resumed() && went.unresumed.is_none(), "{went:?}");
        }
    }
}

#[tokio::test]
async fn refused_after_the_peers_root_was_removed() {
    let mut world = world();
    world.resume().await;
    (world.server.bundle, world.server.epoch) = (bundle(&[&world.server_root]), 2);
    world.again().await.must_be_refused(Unresumed::TrustChanged, Reason::UnknownIssuer);
}

#[tokio::test]
async fn refused_after_the_bundle_changed() {
    let mut world = world();
    world.resume().await;
    let roots = bundle(&[&world.client_root, &world.server_root, &root("another")]);
    (world.server.bundle, world.server.epoch) = (roots, 2);
    world.again().await.must_be_full(Unresumed::TrustChanged);
    world.again().await.must_be_resumed();
}

#[tokio::test]
async fn equal_trust_of_another_process_resumes() {
    let mut world = world();
    let keys = ticket::fleeting();
    world.server.memory = memory(Some(Arc::clone(&keys)), &world.server_clock);
    world.resume().await;
    // The same roots in another order, in a process that has counted other epochs.
    world.server.memory = memory(Some(keys), &world.server_clock);
    (world.server.bundle, world.server.epoch) = (bundle(&[&world.server_root, &world.client_root]), 77);
    world.again().await.must_be_resumed();
}

#[tokio::test]
async fn refused_after_the_peers_leaf_expired() {
    let mut world = world();
    world.client.svid = svid(&world.client_root, &[], &id("client"), 600);
    world.resume().await;
    // The client's clock is behind: it still offers its session.
    world.server_clock.advance(600);
    world.again().await.must_be_refused(Unresumed::Expired, Reason::Expired);
}

#[tokio::test]
async fn refused_after_an_intermediate_expired() {
    let mut world = world();
    let between = intermediate(&world.client_root, 600);
    world.client.svid = svid(&between, &[&between], &id("client"), LONG);
    world.resume().await;
    world.server_clock.advance(600);
    world.again().await.must_be_refused(Unresumed::Expired, Reason::Expired);
}

#[tokio::test]
async fn refused_after_the_servers_own_svid_expired() {
    let mut world = world();
    world.server.svid = svid(&world.server_root, &[], &id("server"), 600);
    world.resume().await;
    world.server_clock.advance(600);
    // Renewed, as the same identity; the old one's sessions are over.
    world.server.svid = svid(&world.server_root, &[], &id("server"), LONG);
    world.again().await.must_be_full(Unresumed::Expired);
}

#[tokio::test]
async fn refused_after_the_peers_leaf_was_revoked() {
    let mut world = world();
    let rule = Rule::new(Reason::Revoked, 1);
    world.server.judge = Some(Arc::clone(&rule) as Arc<dyn Judge>);
    world.resume().await;
    // Nothing but the peer's standing changes: the ticket opens, and its peer is judged.
    rule.on.store(true, Ordering::Relaxed);
    world.again().await.must_be_refused(Unresumed::Revoked, Reason::Revoked);
}

#[tokio::test]
async fn refused_after_a_policy_came_to_deny_the_peer() {
    let mut world = world();
    let rule = Rule::new(Reason::DeniedByPolicy, 1);
    world.server.judge = Some(Arc::clone(&rule) as Arc<dyn Judge>);
    world.resume().await;
    rule.on.store(true, Ordering::Relaxed);
    world.again().await.must_be_refused(Unresumed::Policy, Reason::DeniedByPolicy);
}

#[tokio::test]
async fn refused_after_the_rules_changed_though_they_still_allow_the_peer() {
    let mut world = world();
    world.server.judge = Some(Rule::new(Reason::DeniedByPolicy, 1));
    world.resume().await;
    world.server.judge = Some(Rule::new(Reason::DeniedByPolicy, 2));
    world.again().await.must_be_full(Unresumed::TrustChanged);
}

#[tokio::test]
async fn refused_after_the_listeners_identity_changed() {
    let mut world = world();
    world.resume().await;
    world.server.svid = svid(&world.server_root, &[], &id("other"), LONG);
    let went = world.again().await;
    went.must_be_full(Unresumed::OtherListener);
    assert_eq!(went.client.unwrap().leaf.id, id("other"), "the client knows who answers now");
}

#[tokio::test]
async fn resumed_after_the_servers_svid_was_renewed_as_the_same_identity() {
    let mut world = world();
    world.resume().await;
    world.server.svid = svid(&world.server_root, &[], &id("server"), LONG);
    world.again().await.must_be_resumed();
}

#[tokio::test]
async fn refused_on_another_workloads_listener() {
    let mut world = world();
    world.resume().await;
    world.server.place = vec![b"workload", b"test", b"server-1"];
    world.again().await.must_be_full(Unresumed::OtherListener);
}

#[tokio::test]
async fn refused_in_another_scope() {
    let mut world = world();
    world.resume().await;
    world.server.place = vec![b"node", b"test", b"server-0"];
    world.again().await.must_be_full(Unresumed::OtherListener);
}

#[tokio::test]
async fn refused_after_the_mode_went_from_permissive_to_strict() {
    let mut world = world();
    world.server.mode = "permissive";
    world.resume().await;
    world.server.mode = "strict";
    world.again().await.must_be_full(Unresumed::TermsChanged);
}

#[tokio::test]
async fn refused_after_the_application_protocols_changed() {
    let mut world = world();
    world.server.alpn = vec![b"h2", b"http/1.1"];
    world.resume().await;
    world.server.alpn = vec![b"h2"];
    world.again().await.must_be_full(Unresumed::TermsChanged);
}

#[tokio::test]
async fn refused_after_the_cipher_suites_changed() {
    let mut world = world();
    let keys = ticket::fleeting();
    world.server.memory = memory(Some(Arc::clone(&keys)), &world.server_clock);
    world.resume().await;
    // The suite of the session is still the first: it is the policy that has changed.
    let mut fewer = CryptoProvider::clone(&tls::provider::provider());
    fewer.cipher_suites.pop();
    world.server.memory = memory_with(Some(keys), &world.server_clock, Arc::new(fewer));
    world.again().await.must_be_full(Unresumed::TermsChanged);
}

#[tokio::test]
async fn refused_after_a_restart_with_new_keys() {
    let mut world = world();
    world.resume().await;
    world.server.memory = memory(Some(ticket::fleeting()), &world.server_clock);
    world.again().await.must_be_full(Unresumed::UnknownTicket);
    world.again().await.must_be_resumed();
}

/// Sends recorded bytes to a listener: how it would go on, and why not as a resumed session.
fn replay(listener: &Arc<Listener>, recorded: &[u8]) -> (Option<HandshakeKind>, Judged) {
    let (config, judged) = listener.accept();
    let mut session = rustls::ServerConnection::new(config).unwrap();
    let mut rest = recorded;
    while !rest.is_empty() && session.read_tls(&mut rest.by_ref()).unwrap() > 0 {
        // What comes after the hello cannot fit: the replayer has no keys.
        if session.process_new_packets().is_err() {
            break;
        }
    }
    (session.handshake_kind(), judged)
}

#[tokio::test]
async fn refused_when_the_ticket_was_used_before() {
    let world = world();
    let went = world.resume().await;
    let (kind, judged) = replay(&world.server.listener(), &went.sent);
    assert_eq!(judged.unresumed(), Some(Unresumed::Reused));
    assert_eq!(kind, Some(HandshakeKind::Full), "the replayed hello began a full handshake");
    world.again().await.must_be_resumed();
}

/// A directory on a tmpfs.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        Self(Path::new("/dev/shm").join(format!("hauberk-resumption-{:x}", fastrand::u64(..))))
    }

    fn keys(&self) -> Arc<TicketKeys> {
        tickets::take_up(&self.0, SystemTime::UNIX_EPOCH + Duration::from_secs(BEGIN + 60))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn resumed_by_a_successor_that_took_the_keys_up_which_also_knows_what_was_used() {
    let mut world = world();
    let dir = Dir::new();
    world.server.memory = memory(Some(dir.keys()), &world.server_clock);
    let went = world.resume().await;
    world.server.memory = memory(Some(dir.keys()), &world.server_clock);
    world.again().await.must_be_resumed();
    let (_, judged) = replay(&world.server.listener(), &went.sent);
    assert_eq!(judged.unresumed(), Some(Unresumed::Reused), "used before the restart");
}

#[tokio::test]
async fn a_peer_that_only_resumes_proves_its_key_again_within_the_hour() {
    let world = world();
    world.resume().await;
    for resumed in 0..12 {
        world.server_clock.advance(500);
        let went = world.again().await;
        assert!(went.client.is_ok(), "{went:?}");
        if !went.resumed() {
            assert_eq!(went.unresumed, Some(Unresumed::Expired));
            assert_eq!(resumed, 7, "3,500 of 3,600 seconds");
            return;
        }
    }
    panic!("never a full handshake in 6,000 seconds");
}

#[tokio::test]
async fn a_hello_full_of_tickets_costs_one_decryption() {
    let world = world();
    let listener = world.server.listener();
    let (config, judged) = listener.accept();
    // The first is looked at, and refused; the second is not looked at: it would be good.
    let went = world.resume().await;
    assert!(went.resumed());
    assert_eq!(config.ticketer.decrypt(&[0; 64]), None);
    assert_eq!(judged.unresumed(), Some(Unresumed::UnknownTicket));
    assert_eq!(config.ticketer.decrypt(&[]), None);
    assert_eq!(judged.unresumed(), Some(Unresumed::UnknownTicket), "not looked at");
    assert_eq!(config.max_early_data_size, 0);
}

#[tokio::test]
async fn the_client_judges_the_server_of_a_resumed_session_before_a_byte_is_sent() {
    let mut world = world();
    let rule = Rule::new(Reason::Revoked, 1);
    world.client.judge = Some(Arc::clone(&rule) as Arc<dyn Judge>);
    world.resume().await;
    rule.on.store(true, Ordering::Relaxed);
    let went = world.again().await;
    assert!(went.server.as_ref().is_ok_and(|s| s.resumed), "the server resumed: {went:?}");
    assert_eq!(went.client.map(drop), Err(Reason::Revoked));
    // Sessions are forgotten, and a full handshake fares no better.
    let went = world.again().await;
    assert_eq!((went.client.map(drop), went.unresumed), (Err(Reason::Revoked), None));
    rule.on.store(false, Ordering::Relaxed);
    let went = world.again().await;
    assert!(went.client.is_ok_and(|s| !s.resumed) && went.unresumed.is_none());
}

#[tokio::test]
async fn the_client_offers_no_session_after_trust_or_its_own_svid_changed() {
    let mut world = world();
    world.resume().await;
    (world.client.bundle, world.client.epoch) = (bundle(&[&world.client_root, &world.server_root]), 2);
    let went = world.again().await;
    assert!(went.client.is_ok() && !went.resumed() && went.unresumed.is_none(), "trust: {went:?}");
    world.again().await.must_be_resumed();
    world.client.svid = svid(&world.client_root, &[], &id("client"), LONG);
    let went = world.again().await;
    assert!(went.client.is_ok() && !went.resumed() && went.unresumed.is_none(), "SVID: {went:?}");
}

#[tokio::test]
async fn the_client_offers_no_session_of_a_server_whose_certificate_expired() {
    let mut world = world();
    world.server.svid = svid(&world.server_root, &[], &id("server"), 600);
    world.resume().await;
    world.client_clock.advance(600);
    let went = world.again().await;
    assert_eq!((went.client.map(drop), went.unresumed), (Err(Reason::Expired), None));
}

#[tokio::test]
async fn the_client_offers_no_session_after_its_own_certificate_expired() {
    let mut world = world();
    world.client.svid = svid(&world.client_root, &[], &id("client"), 600);
    world.resume().await;
    world.client_clock.advance(600);
    let went = world.again().await;
    assert!(!went.resumed() && went.unresumed.is_none(), "{went:?}");
}

#[tokio::test]
async fn certificates_other_than_the_judged_ones_are_refused() {
    let world = world();
    let listener = world.server.listener();
    let (_, judged) = listener.accept();
    let chain: Vec<CertificateDer<'static>> = world.client.svid.certified_key().cert.clone();
    assert!(judged.settle(Some(HandshakeKind::Full), Some(&chain)).is_err(), "never judged");
    assert!(judged.settle(Some(HandshakeKind::Resumed), Some(&chain)).is_err(), "never opened");
    assert!(judged.settle(Some(HandshakeKind::Full), None).is_err(), "nobody");
}
