//! TLS handshakes per second per core: Hauberk's own accepting and dialling configurations against
//! bare rustls with its WebPKI verifiers, in turns, over buffers in memory. No sockets, one thread,
//! the thread's own CPU time.
//!
//! Prints one JSON object; `cargo xtask bench` puts it into the report. The only argument that
//! counts is the number of seconds.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls;
use hauberk::tls::client::Dial;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::{Judged, Listener, Terms};
use hauberk::tls::verify::Expected;
use nix::time::{ClockId, clock_gettime};
use rcgen::{CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::Ticketer;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, HandshakeKind, RootCertStore, ServerConfig,
    ServerConnection, SideData,
};
use serde_json::{Value, json};

/// The agent's own: what is compared allocates alike.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Handshakes of one kind before the next has its turn.
const TURN: usize = 20;

/// A client and a server that belong together, and what their handshakes have cost so far.
struct Pair {
    client: Arc<ClientConfig>,
    server: Accept,
    /// What judges the server of a resumed session, as the agent's dialler does.
    dial: Option<Arc<Dial>>,
    name: ServerName<'static>,
    kind: HandshakeKind,
    done: usize,
    spent: Spent,
}

/// How the server comes to its configuration.
enum Accept {
    /// One for all connections.
    Fixed(Arc<ServerConfig>),
    /// One for each, and a judgement when its handshake is done: the agents' way.
    Ours(Arc<Listener>),
}

/// CPU time by side.
#[derive(Clone, Copy, Default)]
struct Spent {
    client: Duration,
    server: Duration,
}

fn main() -> Result<()> {
    let seconds = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(1.0);
    let full = compare([bare(false)?, hauberk(false)?], seconds)?;
    let resumed = compare([bare(true)?, hauberk(true)?], seconds)?;
    println!("{}", json!({"full": full, "resumed": resumed}));
    Ok(())
}

/// Measures both in turns for so long; `null` for one that does not make this kind of handshake.
fn compare(mut pairs: [Pair; 2], seconds: f64) -> Result<Value> {
    let mut able = [false; 2];
    for (pair, able) in pairs.iter_mut().zip(&mut able) {
        *able = pair.makes_its_kind()?;
    }
    let began = thread_time()?;
    while (thread_time()? - began).as_secs_f64() < seconds {
        for (pair, _) in pairs.iter_mut().zip(able).filter(|(_, able)| *able) {
            for _ in 0..TURN {
                pair.handshake()?;
            }
        }
    }
    let [bare, hauberk] = [0, 1].map(|i| if able[i] { pairs[i].per_second() } else { Value::Null });
    Ok(json!({"bare": bare, "hauberk": hauberk}))
}

impl Pair {
    fn new(
        client: Arc<ClientConfig>,
        server: Accept,
        dial: Option<Arc<Dial>>,
        name: ServerName<'static>,
        resume: bool,
    ) -> Self {
        let kind = if resume { HandshakeKind::Resumed } else { HandshakeKind::Full };
        Self { client, server, dial, name, kind, done: 0, spent: Spent::default() }
    }

    /// Warms up; whether a later handshake is of the kind that is to be measured.
    fn makes_its_kind(&mut self) -> Result<bool> {
        for _ in 0..TURN {
            self.connect(&mut Spent::default())?;
        }
        Ok(self.connect(&mut Spent::default())? == self.kind)
    }

    fn handshake(&mut self) -> Result<()> {
        let mut spent = self.spent;
        let kind = self.connect(&mut spent)?;
        ensure!(kind == self.kind, "a handshake was {kind:?}, not {:?}", self.kind);
        self.spent = spent;
        self.done += 1;
        Ok(())
    }

    /// One connection until both sides may send and the server's tickets have arrived.
    fn connect(&self, spent: &mut Spent) -> Result<HandshakeKind> {
        let mut wire = Vec::with_capacity(8192);
        let mut client =
            timed(&mut spent.client, || ClientConnection::new(Arc::clone(&self.client), self.name.clone()))??;
        let (mut server, judged) = timed(&mut spent.server, || self.accept())??;
        while client.wants_write() || server.wants_write() {
            timed(&mut spent.client, || send(&mut client, &mut wire))??;
            timed(&mut spent.server, || receive(&mut server, &mut wire))??;
            timed(&mut spent.server, || send(&mut server, &mut wire))??;
            timed(&mut spent.client, || receive(&mut client, &mut wire))??;
        }
        ensure!(!client.is_handshaking() && !server.is_handshaking(), "a handshake stopped half-way");
        if let Some(judged) = judged {
            let settle = || judged.settle(server.handshake_kind(), server.peer_certificates());
            timed(&mut spent.server, settle)??;
        }
        if let Some(dial) = &self.dial {
            let settle = || dial.settle(client.handshake_kind(), client.peer_certificates());
            timed(&mut spent.client, settle)??;
        }
        server.handshake_kind().context("a finished handshake is of some kind")
    }

    fn accept(&self) -> Result<(ServerConnection, Option<Judged>)> {
        Ok(match &self.server {
            Accept::Fixed(config) => (ServerConnection::new(Arc::clone(config))?, None),
            Accept::Ours(listener) => {
                let (config, judged) = listener.accept();
                (ServerConnection::new(config)?, Some(judged))
            }
        })
    }

    fn per_second(&self) -> Value {
        let rate = |side: Duration| (self.done as f64 / side.as_secs_f64()).round();
        json!({"server": rate(self.spent.server), "client": rate(self.spent.client), "handshakes": self.done})
    }
}

fn send<S: SideData>(from: &mut ConnectionCommon<S>, wire: &mut Vec<u8>) -> Result<()> {
    while from.wants_write() {
        from.write_tls(&mut wire.by_ref())?;
    }
    Ok(())
}

fn receive<S: SideData>(to: &mut ConnectionCommon<S>, wire: &mut Vec<u8>) -> Result<()> {
    let mut rest = wire.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest.by_ref())?;
        to.process_new_packets()?;
    }
    wire.clear();
    Ok(())
}

/// Adds what `act` took of this thread's CPU time.
fn timed<T>(total: &mut Duration, act: impl FnOnce() -> T) -> Result<T> {
    let began = thread_time()?;
    let done = act();
    *total += thread_time()? - began;
    Ok(done)
}

/// The CPU time of this thread alone: others on the machine do not count.
fn thread_time() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// What the agents use, with their memory of verified chains: SVIDs of the authority's CA, SPIFFE IDs verified on both sides.
fn hauberk(resume: bool) -> Result<Pair> {
    let (now, lifetime) = (SystemTime::now(), Duration::from_secs(3600));
    let domain = TrustDomain::parse("bench.local")?;
    let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now)?)?;
    let svid = |account: &str| -> Result<_> {
        let id = SpiffeId::workload(&domain, "bench", account)?;
        let key = Keypair::generate()?;
        let chain = ca.issue(&ProvenKey::from_csr(&key.csr()?)?, &id, lifetime, now)?;
        Ok(key.with_chain(chain)?)
    };
    let (client, server) = (svid("client")?, svid("server")?);
    let observe = Observe::new(Arc::new(Metrics::new()?));
    let memory = Memory::new(resume.then(tls::ticket::fleeting), observe);
    let roots = memory.roots(ca.bundle(), 1)?;
    let terms = Terms {
        svid: &server,
        roots: &roots,
        peers: Expected::Member,
        judge: None,
        alpn: &[tls::ALPN_H2],
        place: &[b"bench"],
        mode: "strict",
    };
    let listener = memory.listener(&terms)?;
    let dial = memory.dial(&client, &roots, Expected::Exactly(server.id().clone()), &[tls::ALPN_H2], None)?;
    let config = Arc::clone(dial.config());
    let name = ServerName::from(std::net::Ipv4Addr::LOCALHOST);
    Ok(Pair::new(config, Accept::Ours(listener), Some(dial), name, resume))
}

/// rustls as one would set it up without SPIFFE: the same provider, keys of the same kind, WebPKI
/// verifiers on both sides, a ticket for each connection.
fn bare(resume: bool) -> Result<Pair> {
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(rcgen::BasicConstraints::Constrained(1));
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let issuer = CertifiedIssuer::self_signed(root, KeyPair::generate()?)?;
    let leaf = || -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["peer.bench.local".to_owned()])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &issuer)?;
        Ok((vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
    };
    let mut roots = RootCertStore::empty();
    roots.add(issuer.der().clone())?;
    let roots = Arc::new(roots);
    let provider = tls::provider::provider;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider()).build()?;
    let (chain, key) = leaf()?;
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    server.ticketer = Ticketer::new()?;
    server.send_tls13_tickets = usize::from(resume);
    server.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    let (chain, key) = leaf()?;
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    client.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    if !resume {
        client.resumption = Resumption::disabled();
    }
    let server = Accept::Fixed(Arc::new(server));
    Ok(Pair::new(Arc::new(client), server, None, ServerName::try_from("peer.bench.local")?, resume))
}
