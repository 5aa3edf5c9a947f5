//! The accepting side's TLS configuration.
//!
//! rustls hands a ticketer neither the connection nor the peer, so each accepted connection gets a
//! configuration of its own, in which verifier and ticketer share what is known of its peer. A
//! session is resumed when its ticket opens under the listener's [`Binding`], has not been used, and
//! its peer would be accepted by a full handshake now; otherwise the same handshake goes on as a full
//! one. There is no early data, and no resumption without a new key exchange (RFC 8446, 4.2.9).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ProducesTickets};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{ConfigBuilder, DistinguishedName, Error, HandshakeKind, ServerConfig, WantsVerifier};

use super::Settled;
use super::provider::provider;
use super::roots::{Roots, Usage, unix};
use super::ticket::content::Content;
use super::ticket::{Binding, LIFETIME_SECONDS, TicketKeys};
use super::verify::{Expected, Judge, PeerVerifier, signatures};
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::{Leaf, X509Svid};
use crate::telemetry::{Observe, Role};
use crate::verdict::Unresumed;

/// Tickets after a full handshake: each works once, and a peer needs one for its next connection and
/// one for when that handshake breaks, or for another of its threads. A resumed connection gets one,
/// for the one it used.
const TICKETS: usize = 2;

/// Accepts as `svid` any client of the bundle's trust domain that proves itself. Resumes nothing.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn config(svid: &X509Svid, bundle: &TrustBundle) -> Result<Arc<ServerConfig>, Error> {
    build(svid, PeerVerifier::new(bundle, None)?)
}

/// Accepts clients that prove themselves, and clients without a certificate as nobody.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn config_with_anonymous_clients(
    svid: &X509Svid,
    bundle: &TrustBundle,
) -> Result<Arc<ServerConfig>, Error> {
    build(svid, PeerVerifier::with_anonymous_clients(bundle)?)
}

/// Accepts anybody, without asking who it is: for what is public, over HTTP/1.1.
///
/// # Errors
/// When the crypto provider cannot do what we ask of it, which it can.
pub fn public(certified: Arc<CertifiedKey>) -> Result<Arc<ServerConfig>, Error> {
    let identity = Arc::new(SingleCertAndKey::from(certified));
    let mut config = builder(provider())?.with_no_client_auth().with_cert_resolver(identity);
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// A certificate chain and its key (PEM) of the Web PKI.
///
/// # Errors
/// When they are not PEM, or do not belong together.
pub fn certified(chain: &[u8], key: &[u8]) -> Result<Arc<CertifiedKey>, Error> {
    let not_pem = |what: &str| Error::General(format!("{what} is not PEM"));
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
        .collect::<Result<_, _>>()
        .map_err(|_| not_pem("the certificate"))?;
    if chain.is_empty() {
        return Err(not_pem("the certificate"));
    }
    // The reader's words could repeat a part of the key.
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| not_pem("the key"))?;
    CertifiedKey::from_der(chain, key, &provider()).map(Arc::new)
}

fn build(svid: &X509Svid, verifier: Arc<PeerVerifier>) -> Result<Arc<ServerConfig>, Error> {
    let alpn = [super::ALPN_H2.to_vec()];
    Ok(Arc::new(complete(builder(provider())?, verifier, identity(svid), &alpn)))
}

fn builder(provider: Arc<CryptoProvider>) -> Result<ConfigBuilder<ServerConfig, WantsVerifier>, Error> {
    ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13])
}

fn identity(svid: &X509Svid) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from(Arc::clone(svid.certified_key())))
}

fn complete(
    builder: ConfigBuilder<ServerConfig, WantsVerifier>,
    verifier: Arc<dyn ClientCertVerifier>,
    identity: Arc<SingleCertAndKey>,
    alpn: &[Vec<u8>],
) -> ServerConfig {
    let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(identity);
    config.alpn_protocols = alpn.to_vec();
    // Our order counts, not the client's: it knows which cipher this CPU accelerates.
    config.ignore_client_order = true;
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config
}

/// What a listener is made of. Everything in it that decides about a peer goes into its [`Binding`].
#[derive(Debug)]
pub struct Terms<'a> {
    /// Who answers.
    pub svid: &'a X509Svid,
    /// The trust of this moment.
    pub roots: &'a Arc<Roots>,
    /// Who may come.
    pub peers: Expected,
    /// What else has to hold of a peer.
    pub judge: Option<Arc<dyn Judge>>,
    /// The application protocols (ALPN).
    pub alpn: &'a [&'a [u8]],
    /// Which listener this is: its kind, and the workload with its addresses.
    pub place: &'a [&'a [u8]],
    /// The workload's mode.
    pub mode: &'a str,
}

/// How connections are accepted at one place, under one state of trust.
#[derive(Debug)]
pub struct Listener {
    builder: ConfigBuilder<ServerConfig, WantsVerifier>,
    identity: Arc<SingleCertAndKey>,
    alpn: Vec<Vec<u8>>,
    verifier: Arc<PeerVerifier>,
    binding: Binding,
    /// The end of our own certificate.
    until: UnixTime,
    keys: Option<Arc<TicketKeys>>,
    clock: Arc<dyn TimeProvider>,
    observe: Observe,
}

impl Listener {
    pub(super) fn new(
        terms: &Terms<'_>,
        keys: Option<Arc<TicketKeys>>,
        provider: Arc<CryptoProvider>,
        clock: Arc<dyn TimeProvider>,
        observe: Observe,
    ) -> Result<Arc<Self>, Error> {
        let verifier = PeerVerifier::under(Arc::clone(terms.roots), terms.peers.clone(), terms.judge.clone());
        let alpn = terms.alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(Arc::new(Self {
            binding: binding(terms, &verifier, &provider),
            builder: builder(provider)?,
            identity: identity(terms.svid),
            alpn,
            verifier,
            until: unix(terms.svid.leaf().not_after),
            keys,
            clock,
            observe,
        }))
    }

    /// The configuration for one connection, and what is to be asked when its handshake is done.
    pub fn accept(self: &Arc<Self>) -> (Arc<ServerConfig>, Judged) {
        let connection = Arc::new(Connection { listener: Arc::clone(self), known: Mutex::default() });
        let verifier: Arc<Connection> = Arc::clone(&connection);
        let identity = Arc::clone(&self.identity);
        let mut config = complete(self.builder.clone(), verifier, identity, &self.alpn);
        config.time_provider = Arc::clone(&self.clock);
        if self.keys.is_some() {
            config.send_tls13_tickets = TICKETS;
            let ticketer: Arc<Connection> = Arc::clone(&connection);
            config.ticketer = ticketer;
        }
        (Arc::new(config), Judged(connection))
    }

    /// Whether this listener would accept a peer that another state of trust has accepted.
    ///
    /// # Errors
    /// In rustls' words.
    pub fn judge(&self, chain: Option<&[CertificateDer<'_>]>) -> Result<(), Error> {
        let now = self.clock.current_time().ok_or(Error::FailedToGetCurrentTime)?;
        let (leaf, intermediates) =
            chain.and_then(|chain| chain.split_first()).ok_or(Error::NoCertificatesPresented)?;
        self.verifier.verify(leaf, intermediates, now, Usage::Client).map(drop)
    }
}

/// The SVID is named by its SPIFFE ID, not by its key: a renewed SVID is the same identity, and no
/// ticket outlives the SVID under which it was issued.
fn binding(terms: &Terms<'_>, verifier: &PeerVerifier, provider: &CryptoProvider) -> Binding {
    let [roots, rules] = verifier.epoch();
    let peers = format!("{:?}", terms.peers);
    let mut place: Vec<&[u8]> = vec![terms.svid.id().as_str().as_bytes(), peers.as_bytes()];
    place.extend(terms.place);
    let suites = provider.cipher_suites.iter().map(|suite| u16::from(suite.suite()));
    let suites: Vec<u8> = suites.flat_map(u16::to_be_bytes).collect();
    let groups = provider.kx_groups.iter().map(|group| u16::from(group.name()));
    let groups: Vec<u8> = groups.flat_map(u16::to_be_bytes).collect();
    let mut rest: Vec<&[u8]> = vec![b"TLS 1.3", &suites, &groups, terms.mode.as_bytes()];
    rest.extend(terms.alpn);
    Binding::new(&[&roots, &rules], &place, &rest)
}

/// One connection's verifier and ticketer.
#[derive(Debug)]
struct Connection {
    listener: Arc<Listener>,
    known: Mutex<Known>,
}

/// What is known of one connection's peer.
#[derive(Debug, Default)]
struct Known {
    /// The peer's certificates, verified now, in this handshake or on opening its ticket.
    chain: Vec<CertificateDer<'static>>,
    /// Until when they are valid.
    until: Option<UnixTime>,
    /// The end of the ticket that was used.
    inherited: Option<u64>,
    /// Whether a ticket was looked at.
    offered: bool,
    issued: usize,
    /// Of the ticket issued last, in seconds.
    lifetime: u32,
    refused: Option<Unresumed>,
}

impl Connection {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Written by one thread at a time, whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Option<UnixTime> {
        self.listener.clock.current_time()
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<UnixTime, Error> {
        Ok(self.listener.verifier.verify(leaf, intermediates, now, Usage::Client)?.until)
    }

    /// Opens a ticket and judges whose it is, as a full handshake would.
    fn resume(&self, keys: &TicketKeys, ticket: &[u8]) -> Result<Vec<u8>, Unresumed> {
        let now = self.now().ok_or(Unresumed::Expired)?;
        let opened = keys.open(&self.listener.binding, ticket, now)?;
        let content = Content::decode(&opened.plain).ok_or(Unresumed::Unreadable)?;
        if now.as_secs() >= content.expires {
            return Err(Unresumed::Expired);
        }
        let (leaf, intermediates) = content.chain.split_first().ok_or(Unresumed::Unreadable)?;
        let until = self.judge(leaf, intermediates, now).map_err(|error| super::unresumed(&error))?;
        keys.spend(&opened)?;
        let mut known = self.known();
        known.chain = content.chain;
        known.until = Some(until);
        known.inherited = Some(content.expires);
        Ok(content.session)
    }

    /// Seals the session of the peer that has proven itself.
    fn issue(&self, keys: &TicketKeys, session: &[u8]) -> Option<Vec<u8>> {
        let now = self.now()?;
        let mut known = self.known();
        let most = if known.inherited.is_some() { 1 } else { TICKETS };
        if known.issued >= most {
            return None;
        }
        // A chain of resumed sessions ends when the ticket of its full handshake does.
        let ends = [
            now.as_secs() + LIFETIME_SECONDS,
            known.until?.as_secs(),
            self.listener.until.as_secs(),
            known.inherited.unwrap_or(u64::MAX),
        ];
        let expires = ends.into_iter().min()?;
        // No lifetime of zero: clients take it for none.
        let lifetime = expires.checked_sub(now.as_secs()).filter(|left| *left > 0)?;
        let content = Content::encode(expires, &known.chain, session)?;
        let ticket = keys.seal(&self.listener.binding, content, now)?;
        known.lifetime = u32::try_from(lifetime).ok()?;
        known.issued += 1;
        Some(ticket)
    }
}

impl ProducesTickets for Connection {
    fn enabled(&self) -> bool {
        self.listener.keys.is_some()
    }

    fn lifetime(&self) -> u32 {
        self.known().lifetime
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        self.issue(self.listener.keys.as_ref()?, session)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let keys = self.listener.keys.as_ref()?;
        // Clients offer one. A hello full of them would be much work for a stranger's few bytes.
        if std::mem::replace(&mut self.known().offered, true) {
            return None;
        }
        match self.resume(keys, ticket) {
            Ok(session) => Some(session),
            Err(why) => {
                self.known().refused = Some(why);
                self.listener.observe.unresumed(Role::Server, why);
                None
            }
        }
    }
}

impl ClientCertVerifier for Connection {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.listener.verifier.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.listener.verifier.client_auth_mandatory()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let until = self.judge(leaf, intermediates, now)?;
        let mut known = self.known();
        // Also when a ticket was opened that rustls then had no use for: this is who is here.
        known.chain = [leaf].into_iter().chain(intermediates).map(|c| c.clone().into_owned()).collect();
        known.until = Some(until);
        known.inherited = None;
        Ok(ClientCertVerified::assertion())
    }

    signatures!(Tls12NotOfferedOrEnabled, listener.verifier.roots.algorithms);
}

/// What became of one connection's handshake.
#[derive(Debug)]
pub struct Judged(Arc<Connection>);

impl Judged {
    /// Who the peer is, after the handshake; the certificates that rustls names must be the ones that
    /// were judged.
    ///
    /// # Errors
    /// When they are not, which is a fault of ours: close the connection.
    pub fn settle(
        &self,
        kind: Option<HandshakeKind>,
        chain: Option<&[CertificateDer<'_>]>,
    ) -> Result<Settled, Error> {
        let resumed = kind == Some(HandshakeKind::Resumed);
        let judged = {
            let mut known = self.0.known();
            if resumed != known.inherited.is_some() {
                return Err(Error::General("a session was resumed that was not judged".into()));
            }
            std::mem::take(&mut known.chain)
        };
        let chain = chain.filter(|chain| !chain.is_empty()).ok_or(Error::NoCertificatesPresented)?;
        if judged != chain {
            return Err(Error::General("the peer's certificates are not those that were judged".into()));
        }
        let leaf =
            Leaf::from_chain(&chain[0], &chain[1..]).map_err(|error| Error::General(error.to_string()))?;
        Ok(Settled { leaf, resumed })
    }

    /// Why a ticket that the peer offered was not honoured, if it offered one.
    pub fn unresumed(&self) -> Option<Unresumed> {
        self.0.known().refused
    }
}
