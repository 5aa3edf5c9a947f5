//! Signs X.509-SVIDs: a public key and an identity in, a certificate out.
//!
//! It never listens, dials, reads a clock it was not given, or copies a field from a CSR other than
//! the public key: who gets which identity is decided before, by whoever calls.

pub mod cross;
mod csr;
pub mod issuer;
pub mod rotation;
pub mod state;
pub mod store;

use std::time::{Duration, SystemTime};

use aws_lc_rs::rand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::prelude::{FromDer, X509Certificate};

pub use csr::{CsrError, MAX_CSR_BYTES, ProvenKey};

use crate::identity::bundle::{BundleError, TrustBundle};
use crate::identity::svid::validity;
use crate::identity::{SpiffeId, TrustDomain};
use crate::text::hex;

/// Certificates begin this much before they are issued, so that a node whose clock is a little
/// behind accepts them.
pub const BACKDATED: Duration = Duration::from_secs(60);
/// How long a root made by us is valid.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// The subject attribute that names the node an SVID is issued to: `host` (RFC 4524, section 2.12).
/// With it a node can be revoked with everything it holds.
const HOST: &[u64] = &[0, 9, 2342, 19_200_300, 100, 1, 9];

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The CSR.
    #[error(transparent)]
    Csr(#[from] CsrError),
    /// The root or its key cannot be used.
    #[error("the CA's certificate or key cannot be used: {0}")]
    Material(String),
    /// The trust state says what it must not.
    #[error("{0}")]
    State(String),
    /// The identity is of another trust domain.
    #[error("{id} is not in this authority's trust domain {domain}")]
    TrustDomain {
        /// What was asked for.
        id: SpiffeId,
        /// What this authority speaks for.
        domain: TrustDomain,
    },
    /// The root or an intermediate has expired, or is about to.
    #[error(
        "the CA's own certificate does not outlive what was asked for; make a new root with `hauberk authority rotate-root`"
    )]
    Expired,
    /// The root is no usable trust anchor.
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// A certificate authority for one trust domain.
#[derive(Debug)]
pub struct Ca {
    domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    /// What stands between an SVID and the root: sent with each.
    above: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
    not_after: SystemTime,
}

/// A new root, as it is stored: certificate and key in one PEM text, so that they cannot part.
pub fn create_root(domain: &TrustDomain, now: SystemTime) -> Result<String, CaError> {
    named_root(domain, false, now)
}

/// The same with a name of its own, for a root that comes beside another: nobody shall take one for the other.
///
/// # Errors
/// When there is no randomness.
pub fn create_successor(domain: &TrustDomain, now: SystemTime) -> Result<String, CaError> {
    named_root(domain, true, now)
}

fn named_root(domain: &TrustDomain, marked: bool, now: SystemTime) -> Result<String, CaError> {
    let material = |e: rcgen::Error| CaError::Material(e.to_string());
    let key = KeyPair::generate().map_err(material)?;
    let mut params = CertificateParams::default();
    let serial = serial()?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Hauberk");
    let mark: String = hex(&serial.as_ref()[..4]);
    let mark = if marked { format!(" {mark}") } else { String::new() };
    params.distinguished_name.push(DnType::CommonName, format!("{domain} root{mark}"));
    // X509-SVID, section 4: a signing certificate may carry the trust domain's own ID.
    let uri = format!("spiffe://{domain}").try_into().map_err(material)?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    params.serial_number = Some(serial);
    let certificate = params.self_signed(&key).map_err(material)?;
    Ok(format!("{}{}", certificate.pem(), key.serialize_pem()))
}

impl Ca {
    /// Reads what [`create_root`] made.
    ///
    /// # Errors
    /// When certificate or key are missing, malformed, or do not belong together.
    pub fn from_pem(domain: TrustDomain, pem: &str) -> Result<Self, CaError> {
        let root = CertificateDer::from_pem_slice(pem.as_bytes());
        let root = root.map_err(|e| CaError::Material(e.to_string()))?;
        Self::new(domain, root, Vec::new(), pem)
    }

    /// One whose key belongs to the first of `chain`, which leads to `root`; to `root` itself if there is none.
    /// The key is the first private key in `key_pem`.
    ///
    /// # Errors
    /// When any part is malformed, or certificate and key do not belong together.
    pub fn new(
        domain: TrustDomain,
        root: CertificateDer<'static>,
        chain: Vec<CertificateDer<'static>>,
        key_pem: &str,
    ) -> Result<Self, CaError> {
        let material = |e: String| CaError::Material(e);
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|e| material(e.to_string()))?;
        let key = KeyPair::try_from(&key).map_err(|e| material(e.to_string()))?;
        let signing = chain.first().unwrap_or(&root);
        let (_, parsed) = X509Certificate::from_der(signing).map_err(|e| material(e.to_string()))?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(material("the key does not belong to the certificate".into()));
        }
        let mut not_after = ends(&root)?;
        for certificate in &chain {
            not_after = not_after.min(ends(certificate)?);
        }
        let bundle = TrustBundle::new(domain.clone(), vec![root.clone()])?;
        let issuer = Issuer::from_ca_cert_der(signing, key).map_err(|e| material(e.to_string()))?;
        Ok(Self { domain, issuer, above: chain, bundle, not_after })
    }

    /// Until when what it signs can be valid.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// The trust bundle that verifies what this authority signs.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// The trust domain it speaks for.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// Signs an X.509-SVID that says nothing of a node; see [`Ca::issue_to`].
    ///
    /// # Errors
    /// As [`Ca::issue_to`].
    pub fn issue(
        &self,
        key: &ProvenKey,
        id: &SpiffeId,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.issue_to(key, id, None, lifetime, now)
    }

    /// Signs an X.509-SVID (X509-SVID, sections 2 to 4) for an identity on a node; returns the chain,
    /// leaf first.
    ///
    /// # Errors
    /// When the identity is of another trust domain, or the CA's certificate would expire before.
    pub fn issue_to(
        &self,
        key: &ProvenKey,
        id: &SpiffeId,
        node: Option<&str>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, CaError> {
        if id.trust_domain() != self.domain.as_str() {
            return Err(CaError::TrustDomain { id: id.clone(), domain: self.domain.clone() });
        }
        let not_after = now + lifetime;
        if not_after > self.not_after {
            return Err(CaError::Expired);
        }
        let material = |e: rcgen::Error| CaError::Material(e.to_string());
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(node) = node {
            params.distinguished_name.push(DnType::CustomDnType(HOST.to_vec()), node);
        }
        let uri = id.as_str().try_into().map_err(material)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - BACKDATED).into();
        params.not_after = not_after.into();
        params.serial_number = Some(serial()?);
        let leaf = params.signed_by(key.public(), &self.issuer).map_err(material)?;
        Ok([leaf.der().clone()].into_iter().chain(self.above.iter().cloned()).collect())
    }
}

/// When a certificate ends.
fn ends(der: &CertificateDer<'_>) -> Result<SystemTime, CaError> {
    let (_, until) = validity(der).map_err(|e| CaError::Material(e.to_string()))?;
    Ok(until)
}

/// 127 random bits: positive, and never twice (RFC 5280, section 4.1.2.2).
fn serial() -> Result<SerialNumber, CaError> {
    let mut bytes = [0; 16];
    rand::fill(&mut bytes).map_err(|_| CaError::Material("no randomness".into()))?;
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
mod tests {
    use rcgen::CertificateParams;

    use super::*;
    use crate::identity::svid::Leaf;

    const HOUR: Duration = Duration::from_secs(3600);

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    fn ca(now: SystemTime) -> Ca {
        Ca::from_pem(domain(), &create_root(&domain(), now).unwrap()).unwrap()
    }

    fn csr(params: CertificateParams) -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    #[test]
    fn a_csr_that_asks_for_more_gets_its_key_signed_and_nothing_else() {
        let now = SystemTime::now();
        let mut greedy = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        greedy.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = ProvenKey::from_csr(&csr(greedy)).unwrap();
        let id = SpiffeId::workload(&domain(), "a", "b").unwrap();
        let chain = ca(now).issue(&key, &id, HOUR, now).unwrap();
        let leaf = Leaf::from_der(&chain[0]).unwrap();
        assert_eq!(leaf.id, id);
        let (_, parsed) = X509Certificate::from_der(&chain[0]).unwrap();
        assert!(!parsed.is_ca());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 1);
        assert!(names.critical, "RFC 5280: critical when the subject is empty");
        let usage = parsed.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
    }

    #[test]
    fn a_leaf_names_the_node_it_was_issued_to() {
        let now = SystemTime::now();
        let ca = ca(now);
        let key = ProvenKey::from_csr(&csr(CertificateParams::default())).unwrap();
        let id = SpiffeId::workload(&domain(), "a", "b").unwrap();
        let on = |node| Leaf::from_der(&ca.issue_to(&key, &id, node, HOUR, now).unwrap()[0]).unwrap().node;
        assert_eq!(on(Some("n1.example")).as_deref(), Some("n1.example"));
        assert_eq!(on(None), None);
        let node = ca.issue(&key, &SpiffeId::node(&domain(), "n2").unwrap(), HOUR, now).unwrap();
        assert_eq!(Leaf::from_der(&node[0]).unwrap().node.as_deref(), Some("n2"), "its identity says it");
    }

    #[test]
    fn serials_differ_for_the_same_key_and_validity_is_bounded() {
        let now = SystemTime::now();
        let ca = ca(now);
        let key = ProvenKey::from_csr(&csr(CertificateParams::default())).unwrap();
        let id = SpiffeId::node(&domain(), "n").unwrap();
        let [a, b] = [0, 1].map(|_| Leaf::from_der(&ca.issue(&key, &id, HOUR, now).unwrap()[0]).unwrap());
        assert_ne!(a.serial, b.serial);
        assert!(a.not_before <= now && a.not_after <= now + HOUR && a.not_after > now + HOUR / 2);
        assert!(matches!(ca.issue(&key, &id, ROOT_LIFETIME * 2, now), Err(CaError::Expired)));
    }

    #[test]
    fn another_trust_domain_is_refused() {
        let now = SystemTime::now();
        let key = ProvenKey::from_csr(&csr(CertificateParams::default())).unwrap();
        let id = SpiffeId::parse("spiffe://other/x").unwrap();
        assert!(matches!(ca(now).issue(&key, &id, HOUR, now), Err(CaError::TrustDomain { .. })));
    }

    #[test]
    fn a_root_with_another_key_is_refused() {
        let now = SystemTime::now();
        let one = create_root(&domain(), now).unwrap();
        let other = create_root(&domain(), now).unwrap();
        let split = one.find("-----BEGIN PRIVATE KEY").unwrap();
        let key_at = other.find("-----BEGIN PRIVATE KEY").unwrap();
        let mixed = format!("{}{}", &one[..split], &other[key_at..]);
        assert!(matches!(Ca::from_pem(domain(), &mixed), Err(CaError::Material(_))));
    }
}
