//! The dialling side's TLS configuration.
//!
//! A [`Dial`] is kept as long as source, destination and trust are the same: rustls resumes a session
//! only under the very configuration it began with. rustls does not verify the server again when it
//! resumes (`client/tls13.rs`), so [`Dial::settle`] does, before a byte is sent.

use std::sync::Arc;

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, Tls12Resumption, WebPkiServerVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::sign::SingleCertAndKey;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{ClientConfig, Error, HandshakeKind, RootCertStore};

use super::Settled;
use super::provider::provider;
use super::roots::{Usage, unix};
use super::session::Sessions;
use super::verify::{PeerVerifier, signatures};
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::{Leaf, X509Svid};
use crate::telemetry::{Observe, Role};

/// Dials as `svid`, and accepts nobody but `expected` under `bundle`. Resumes nothing.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn config(svid: &X509Svid, bundle: &TrustBundle, expected: SpiffeId) -> Result<Arc<ClientConfig>, Error> {
    Ok(Arc::new(build(Some(svid), PeerVerifier::new(bundle, Some(expected))?)?))
}

/// Dials as nobody whoever must be `expected`: for a node that has no SVID yet, and for what is public.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn anonymous(bundle: &TrustBundle, expected: SpiffeId, alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
    let mut config = build(None, PeerVerifier::new(bundle, Some(expected))?)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

/// Dials as nobody a server of the common Web PKI's kind, which is verified by its host's name under these PEM
/// roots.
///
/// # Errors
/// When the roots are unusable.
pub fn named(roots: &[u8], alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
    let mut store = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(roots) {
        store.add(root.map_err(|e| Error::General(format!("not PEM: {e}")))?)?;
    }
    web(store, alpn)
}

/// The same under these roots.
///
/// # Errors
/// When there is none.
pub fn web(store: RootCertStore, alpn: &[u8]) -> Result<Arc<ClientConfig>, Error> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider())
        .build()
        .map_err(|e| Error::General(e.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn build(svid: Option<&X509Svid>, verifier: Arc<dyn ServerCertVerifier>) -> Result<ClientConfig, Error> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match svid {
        Some(svid) => {
            let identity = SingleCertAndKey::from(Arc::clone(svid.certified_key()));
            builder.with_client_cert_resolver(Arc::new(identity))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![super::ALPN_H2.to_vec()];
    // Identities are SPIFFE IDs, which no server name can carry.
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// How one source dials one destination identity under one state of trust.
#[derive(Debug)]
pub struct Dial {
    config: Arc<ClientConfig>,
    verifier: Arc<PeerVerifier>,
    sessions: Option<Arc<Sessions>>,
    clock: Arc<dyn TimeProvider>,
    observe: Observe,
}

impl Dial {
    pub(super) fn new(
        svid: &X509Svid,
        verifier: Arc<PeerVerifier>,
        alpn: &[&[u8]],
        resume: bool,
        clock: Arc<dyn TimeProvider>,
        observe: Observe,
    ) -> Result<Arc<Self>, Error> {
        let until = unix(svid.leaf().not_after);
        let sessions = resume.then(|| Sessions::new(Arc::clone(&clock), until));
        let noting = Noting { verifier: Arc::clone(&verifier), sessions: sessions.clone() };
        let mut config = build(Some(svid), Arc::new(noting))?;
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        config.time_provider = Arc::clone(&clock);
        if let Some(sessions) = &sessions {
            let sessions: Arc<Sessions> = Arc::clone(sessions);
            config.resumption = Resumption::store(sessions).tls12_resumption(Tls12Resumption::Disabled);
        }
        Ok(Arc::new(Self { config: Arc::new(config), verifier, sessions, clock, observe }))
    }

    /// What rustls takes.
    pub fn config(&self) -> &Arc<ClientConfig> {
        &self.config
    }

    /// Who the peer is, after the handshake and before a byte is sent to it. One whose session was
    /// resumed is judged as in a full handshake.
    ///
    /// # Errors
    /// When the peer is not acceptable now. Its sessions are forgotten: close the connection, and dial
    /// once more, which makes a full handshake.
    pub fn settle(
        &self,
        kind: Option<HandshakeKind>,
        chain: Option<&[CertificateDer<'_>]>,
    ) -> Result<Settled, Error> {
        let resumed = kind == Some(HandshakeKind::Resumed);
        let (leaf, intermediates) =
            chain.and_then(|chain| chain.split_first()).ok_or(Error::NoCertificatesPresented)?;
        if !resumed {
            // rustls has asked our verifier just now.
            let leaf =
                Leaf::from_chain(leaf, intermediates).map_err(|error| Error::General(error.to_string()))?;
            return Ok(Settled { leaf, resumed });
        }
        let now = self.clock.current_time().ok_or(Error::FailedToGetCurrentTime)?;
        let judged = self.verifier.verify(leaf, intermediates, now, Usage::Server);
        if let Err(error) = &judged {
            self.observe.unresumed(Role::Client, super::unresumed(error));
            if let Some(sessions) = &self.sessions {
                sessions.forget();
            }
        }
        judged.map(|verified| Settled { leaf: verified.leaf.clone(), resumed })
    }
}

/// Verifies, and notes for how long what was verified is good.
#[derive(Debug)]
struct Noting {
    verifier: Arc<PeerVerifier>,
    sessions: Option<Arc<Sessions>>,
}

impl ServerCertVerifier for Noting {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.verifier.verify(leaf, intermediates, now, Usage::Server)?;
        if let Some(sessions) = &self.sessions {
            sessions.proven(name, verified.until);
        }
        Ok(ServerCertVerified::assertion())
    }

    signatures!(ServerTlsVersionIsDisabledByOurConfig, verifier.roots.algorithms);
}
