//! Where SVIDs come from: one trait, and what an issuer may answer.
//!
//! A [`Signer`] is given requests for keys that are made here and stay here; other issuers bring the keys
//! themselves, by files or a local socket.

pub mod authority;
mod bundle_file;
pub mod files;
mod grpc;
pub mod istio;
pub mod keep;
pub mod kubernetes;
pub mod spire;
pub mod vault;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::config::IssuerConfig;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
pub use crate::identity::svid::pem;
use crate::identity::svid::{SvidError, X509Svid, is_self_issued};
use crate::tls;
use crate::tls::provider::provider;
use crate::tls::roots::{Roots, Usage, unix};
use crate::trust::Trust;
use crate::verdict::{Issuance, IssuerKind, Reason};

/// Why no SVID was issued.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IssueError {
    /// The issuer cannot be reached, or did not answer in time.
    #[error("{issuer} cannot be reached: {detail}")]
    Unreachable {
        /// Which issuer.
        issuer: String,
        /// What happened.
        detail: String,
    },
    /// The issuer said no.
    #[error("{issuer} refused: {detail}")]
    Refused {
        /// Which issuer.
        issuer: String,
        /// Its words.
        detail: String,
        /// When it wants to be asked again, if it said so.
        retry_after: Option<Duration>,
    },
    /// The issuer's answer cannot be used.
    #[error("{issuer} issued something unusable: {detail}")]
    Unusable {
        /// Which issuer.
        issuer: String,
        /// What is wrong with it.
        detail: String,
    },
    /// Something is missing or wrong on our side.
    #[error("{0}")]
    Ours(String),
}

impl IssueError {
    /// For metrics.
    pub fn outcome(&self) -> Issuance {
        match self {
            Self::Unreachable { .. } => Issuance::Unreachable,
            Self::Refused { .. } => Issuance::Refused,
            Self::Unusable { .. } => Issuance::Unusable,
            Self::Ours(_) => Issuance::Failed,
        }
    }
}

/// What a signer returns.
#[derive(Debug)]
pub struct Issued {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The trust bundle as the signer has it now, where it is the signer who says so.
    pub bundle: Option<TrustBundle>,
}

/// What an issuer gives. Nothing of it is used before it was [`check`]ed.
#[derive(Debug)]
pub struct Obtained {
    /// Chain and key.
    pub svid: X509Svid,
    /// The key, if it was made here: such an SVID is kept over a restart.
    pub key: Option<Keypair>,
    /// The trust bundle as the issuer has it now, where it is the issuer who says so.
    pub bundle: Option<TrustBundle>,
}

/// Where the SVIDs of this node's identities come from.
pub trait Issuer: Send + Sync + std::fmt::Debug {
    /// For metrics.
    fn kind(&self) -> IssuerKind;

    /// Which it is, in words, for errors.
    fn name(&self) -> String;

    /// Asks for an SVID; one that makes keys itself may give the same one again.
    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Obtained, IssueError>>;

    /// Waits for the next state of the trust bundle: the current one at the first call after a
    /// connection is made, then each change.
    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>>;

    /// Resolves when there is news for identities that were obtained before: ask again for all. Never for
    /// an issuer that does not tell.
    fn pushed(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    /// From now on only these identities are of interest.
    fn retain(&self, _ids: &[SpiffeId]) {}
}

/// Signs requests for keys that are made here: the issuers of this kind.
pub trait Signer: Send + Sync + std::fmt::Debug {
    /// As [`Issuer::kind`].
    fn kind(&self) -> IssuerKind;

    /// As [`Issuer::name`].
    fn name(&self) -> String;

    /// Asks for a certificate. `csr` is DER PKCS#10 and names the identity too.
    fn sign<'a>(&'a self, id: &'a SpiffeId, csr: &'a [u8]) -> BoxFuture<'a, Result<Issued, IssueError>>;

    /// As [`Issuer::next_bundle`].
    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>>;
}

/// A new key each time.
impl<S: Signer> Issuer for S {
    fn kind(&self) -> IssuerKind {
        Signer::kind(self)
    }

    fn name(&self) -> String {
        Signer::name(self)
    }

    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Obtained, IssueError>> {
        Box::pin(async move {
            let key = Keypair::generate()?;
            let Issued { chain, bundle } = self.sign(id, &key.csr_for(id)?).await?;
            let svid = key.with_chain(chain).map_err(|error| IssueError::Unusable {
                issuer: Signer::name(self),
                detail: error.to_string(),
            })?;
            Ok(Obtained { svid, key: Some(key), bundle })
        })
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Signer::next_bundle(self)
    }
}

/// The configured issuer, for the agent of `node`. Needs to be in a tokio runtime.
pub fn configured(config: &IssuerConfig, node: SpiffeId, trust: Arc<Trust>) -> Arc<dyn Issuer> {
    let domain = trust.snapshot().bundle.domain().clone();
    match config.clone() {
        IssuerConfig::Authority(config) => {
            Arc::new(authority::AuthorityIssuer::new(config.address, config.join_token, node, trust))
        }
        IssuerConfig::Istio(config) => Arc::new(istio::IstioIssuer::new(config, domain)),
        IssuerConfig::Vault(config) => Arc::new(vault::VaultIssuer::new(config, domain)),
        IssuerConfig::Kubernetes(config) => Arc::new(kubernetes::KubernetesIssuer::new(config, domain)),
        IssuerConfig::Files(config) => Arc::new(files::FilesIssuer::new(config, domain)),
        IssuerConfig::Spire(config) => Arc::new(spire::SpireIssuer::new(config, node, domain)),
    }
}

/// What else than SVIDs the authority is asked for goes over a connection of its own; `None` with another
/// issuer.
pub fn line(config: &IssuerConfig, node: SpiffeId, trust: Arc<Trust>) -> Option<Arc<authority::Line>> {
    let IssuerConfig::Authority(config) = config else { return None };
    Some(Arc::new(authority::Line::new(config.address.clone(), node, trust)))
}

/// What has to hold of an SVID before it is used: it is `id`'s and no other's, and valid now as a client's and
/// as a server's under `bundle`. That its key is ours was checked when it was put together.
///
/// # Errors
/// In words.
pub fn check(svid: &X509Svid, id: &SpiffeId, bundle: &TrustBundle, now: SystemTime) -> Result<(), String> {
    if svid.id() != id {
        return Err(format!("asked for {id}, was issued {}", svid.id()));
    }
    let (leaf, above) = svid.certified_key().cert.split_first().ok_or("an empty chain")?;
    let roots = Roots::new(bundle, None).map_err(|error| error.to_string())?;
    for usage in [Usage::Client, Usage::Server] {
        roots.verify(leaf, above, unix(now), usage).map_err(|error| match tls::rustls_reason(&error) {
            Reason::UnknownIssuer => {
                format!("its chain leads to none of the {} roots of the trust bundle", bundle.roots().len())
            }
            Reason::Expired => "it has expired already; is this node's clock right?".to_owned(),
            Reason::NotYetValid => "it is not valid yet; is this node's clock right?".to_owned(),
            _ => format!("it cannot be used by a {usage:?}: {error}").to_lowercase(),
        })?;
    }
    Ok(())
}

/// The chain in an issuer's PEM, without roots.
fn chain_from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>().map(without_roots)
}

/// A chain without the roots that some issuers put at its end: peers have them, or trust them not at all.
fn without_roots(mut chain: Vec<CertificateDer<'static>>) -> Vec<CertificateDer<'static>> {
    let mut is_leaf = true;
    chain.retain(|certificate| std::mem::take(&mut is_leaf) || !is_self_issued(certificate));
    chain
}

/// A new private key (P-256), made here and never sent anywhere.
pub struct Keypair(KeyPair);

impl std::fmt::Debug for Keypair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keypair").finish_non_exhaustive()
    }
}

impl Keypair {
    /// Makes one.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate() -> Result<Self, IssueError> {
        KeyPair::generate().map(Self).map_err(|e| IssueError::Ours(format!("cannot make a key: {e}")))
    }

    /// Takes a PKCS#8 key back.
    ///
    /// # Errors
    /// When it is no such key.
    pub fn from_pem(pem: &str) -> Result<Self, IssueError> {
        let ours = |e: String| IssueError::Ours(format!("cannot read a key: {e}"));
        // rcgen's own reader takes the first PEM block only, and certificates may come before.
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| ours(e.to_string()))?;
        KeyPair::try_from(&key).map(Self).map_err(|e| ours(e.to_string()))
    }

    /// A request (PKCS#10, DER) that proves possession of the key, and asks for nothing.
    ///
    /// # Errors
    /// When signing fails.
    pub fn csr(&self) -> Result<Vec<u8>, IssueError> {
        self.request(Vec::new())
    }

    /// The same that names whom it is for, as signers of other make want it (a URI SAN).
    ///
    /// # Errors
    /// When signing fails.
    pub fn csr_for(&self, id: &SpiffeId) -> Result<Vec<u8>, IssueError> {
        let uri = id.as_str().try_into().map_err(|e| IssueError::Ours(format!("cannot make a CSR: {e}")))?;
        self.request(vec![SanType::URI(uri)])
    }

    fn request(&self, names: Vec<SanType>) -> Result<Vec<u8>, IssueError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        let csr = params.serialize_request(&self.0);
        csr.map(|csr| csr.der().to_vec()).map_err(|e| IssueError::Ours(format!("cannot make a CSR: {e}")))
    }

    /// The key as PKCS#8 PEM.
    pub fn to_pem(&self) -> String {
        self.0.serialize_pem()
    }

    /// Puts the issued chain and this key together.
    ///
    /// # Errors
    /// When the chain is another key's, or no X.509-SVID.
    pub fn with_chain(&self, chain: Vec<CertificateDer<'static>>) -> Result<X509Svid, SvidError> {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.0.serialize_der()));
        let key: Arc<dyn rustls::sign::SigningKey> = provider().key_provider.load_private_key(key)?;
        X509Svid::new(chain, key)
    }
}
