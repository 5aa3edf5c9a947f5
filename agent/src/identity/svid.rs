//! An X.509-SVID: a certificate chain and its key for one SPIFFE ID.
//!
//! Holds what was issued; it does not decide whether to trust it (see `tls::verify`).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{ParseError, SpiffeId};

/// Why a certificate is not a usable X.509-SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    /// No certificate at all.
    #[error("the certificate chain is empty")]
    Empty,
    /// Not DER, or not X.509.
    #[error("the certificate cannot be read: {0}")]
    Malformed(String),
    /// X509-SVID section 2: exactly one URI SAN.
    #[error("an X.509-SVID carries exactly one URI SAN, this one has {0}")]
    UriSans(usize),
    /// The URI SAN is no SPIFFE ID.
    #[error("the URI SAN is not a SPIFFE ID: {0}")]
    Id(#[from] ParseError),
    /// X509-SVID section 4.1: a leaf is not a CA.
    #[error("the leaf certificate is a CA certificate, which no X.509-SVID may be")]
    LeafIsCa,
    /// The key does not belong to the certificate.
    #[error("the private key does not belong to the certificate: {0}")]
    Key(#[from] rustls::Error),
}

/// What a leaf certificate says of itself. Nothing in it is trusted until the chain is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The one SPIFFE ID of its URI SAN.
    pub id: SpiffeId,
    /// Serial number in lower-case hex without separators.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl Leaf {
    /// Reads the fields of a DER leaf certificate (X509-SVID, sections 2 and 4).
    ///
    /// # Errors
    /// When the bytes are not X.509, or break a rule of the X509-SVID specification.
    pub fn from_der(der: &[u8]) -> Result<Self, SvidError> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|e| SvidError::Malformed(e.to_string()))?;
        if certificate.is_ca() {
            return Err(SvidError::LeafIsCa);
        }
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| SvidError::Malformed(e.to_string()))?
            .map(|extension| extension.value.general_names.as_slice())
            .unwrap_or_default();
        let mut uris = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let (Some(uri), None) = (uris.next(), uris.next()) else {
            let count = names.iter().filter(|n| matches!(n, GeneralName::URI(_))).count();
            return Err(SvidError::UriSans(count));
        };
        let validity = certificate.validity();
        Ok(Self {
            id: SpiffeId::parse(uri)?,
            serial: format!("{:x}", certificate.serial),
            not_before: from_unix(validity.not_before.timestamp()),
            not_after: from_unix(validity.not_after.timestamp()),
        })
    }
}

/// When a certificate of any kind is valid: from, until.
///
/// # Errors
/// When the bytes are not X.509.
pub fn validity(der: &[u8]) -> Result<(SystemTime, SystemTime), SvidError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| SvidError::Malformed(e.to_string()))?;
    let validity = certificate.validity();
    Ok((from_unix(validity.not_before.timestamp()), from_unix(validity.not_after.timestamp())))
}

/// Seconds since the epoch as a time; what lies before 1970 is 1970.
fn from_unix(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// An X.509-SVID with its private key, ready for TLS.
#[derive(Clone)]
pub struct X509Svid {
    leaf: Leaf,
    key: Arc<CertifiedKey>,
    generation: u64,
}

impl X509Svid {
    /// Puts a chain (leaf first) and its key together.
    ///
    /// # Errors
    /// When the leaf is no X.509-SVID or the key is another's.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn rustls::sign::SigningKey>,
    ) -> Result<Self, SvidError> {
        let leaf = Leaf::from_der(chain.first().ok_or(SvidError::Empty)?)?;
        let certified = CertifiedKey::new(chain, key);
        certified.keys_match()?;
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        Ok(Self { leaf, key: Arc::new(certified), generation })
    }

    /// A number that no other SVID of this process has: tells a renewed one from its predecessor.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The SPIFFE ID.
    pub fn id(&self) -> &SpiffeId {
        &self.leaf.id
    }

    /// What the leaf says: identity, serial, validity.
    pub fn leaf(&self) -> &Leaf {
        &self.leaf
    }

    /// Chain and key in the form rustls takes.
    pub fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.key
    }
}

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509Svid").field("leaf", &self.leaf).finish_non_exhaustive()
    }
}
