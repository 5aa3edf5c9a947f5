//! An X.509-SVID: a certificate chain and its key for one SPIFFE ID.
//!
//! Holds what was issued; it does not decide whether to trust it (see `tls::verify`).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use x509_parser::der_parser::{Oid, oid};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::crl::CertificateId;
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

/// The subject attribute that names the node an SVID was issued to: `host` (RFC 4524, section 2.12).
const HOST: Oid<'static> = oid!(0.9.2342.19200300.100.1.9);

/// What a leaf certificate says of itself. Nothing in it is trusted until the chain is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The one SPIFFE ID of its URI SAN.
    pub id: SpiffeId,
    /// The node it was issued to, if the issuer says so: our authority does.
    pub node: Option<Arc<str>>,
    /// Serial number in lower-case hex without separators.
    pub serial: String,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// What names it and the certificates above it to whoever revokes them.
    pub chain: Arc<[CertificateId]>,
}

impl Leaf {
    /// Reads the fields of a DER leaf certificate (X509-SVID, sections 2 and 4).
    ///
    /// # Errors
    /// When the bytes are not X.509, or break a rule of the X509-SVID specification.
    pub fn from_der(der: &[u8]) -> Result<Self, SvidError> {
        Self::from_chain(der, &[])
    }

    /// The same with the certificates that stand above it.
    ///
    /// # Errors
    /// As [`Leaf::from_der`], and when one of those is not X.509.
    pub fn from_chain(der: &[u8], above: &[CertificateDer<'_>]) -> Result<Self, SvidError> {
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
        let id = SpiffeId::parse(uri)?;
        let host = certificate.subject().iter_attributes().find(|a| *a.attr_type() == HOST);
        let node = id.node_name().or_else(|| host?.as_str().ok()).map(Arc::from);
        let validity = certificate.validity();
        let mut chain = vec![CertificateId::of(&certificate)];
        for der in above {
            let (_, above) =
                X509Certificate::from_der(der).map_err(|e| SvidError::Malformed(e.to_string()))?;
            chain.push(CertificateId::of(&above));
        }
        Ok(Self {
            id,
            node,
            serial: format!("{:x}", certificate.serial),
            not_before: from_unix(validity.not_before.timestamp()),
            not_after: from_unix(validity.not_after.timestamp()),
            chain: chain.into(),
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

/// Takes DER certificates apart that follow one another without anything between, as SPIFFE's APIs send them.
///
/// # Errors
/// When there is anything else.
pub fn concatenated(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, SvidError> {
    let mut certificates = Vec::new();
    while !der.is_empty() {
        let (rest, _) = X509Certificate::from_der(der).map_err(|e| SvidError::Malformed(e.to_string()))?;
        let (certificate, _) = der.split_at(der.len() - rest.len());
        certificates.push(CertificateDer::from(certificate.to_vec()));
        der = rest;
    }
    Ok(certificates)
}

/// PEM (RFC 7468), whose lines have 64 characters.
pub fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        // Base64 is ASCII.
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text + &format!("-----END {label}-----\n")
}

/// Whether a certificate names itself as its issuer, as roots do: such need not be sent to anybody.
pub fn is_self_issued(der: &[u8]) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, certificate)| certificate.subject() == certificate.issuer())
}

/// Seconds since the epoch as a time; what lies before 1970 is 1970.
pub(super) fn from_unix(seconds: i64) -> SystemTime {
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
        let (leaf, above) = chain.split_first().ok_or(SvidError::Empty)?;
        let leaf = Leaf::from_chain(leaf, above)?;
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
