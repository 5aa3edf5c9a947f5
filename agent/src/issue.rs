//! Where SVIDs come from: one trait, a key that stays here, and what an issuer may answer.

pub mod authority;
pub mod keep;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::{SvidError, X509Svid};
use crate::tls::provider::provider;

/// Why no SVID was issued.
#[derive(Debug, thiserror::Error)]
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

/// What an issuer returns.
#[derive(Debug)]
pub struct Issued {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The trust bundle as the issuer has it now.
    pub bundle: TrustBundle,
}

/// Signs certificate requests for identities of this node.
pub trait Issuer: Send + Sync + std::fmt::Debug {
    /// Asks for an SVID. `csr` is DER PKCS#10; which identity it is for is said beside it.
    fn issue<'a>(&'a self, id: &'a SpiffeId, csr: &'a [u8]) -> BoxFuture<'a, Result<Issued, IssueError>>;

    /// Waits for the next state of the trust bundle: the current one at the first call after a
    /// connection is made, then each change.
    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>>;
}

/// A new private key (P-256), made here and never sent anywhere.
pub struct Keypair(KeyPair);

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
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
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
