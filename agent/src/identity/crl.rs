//! Certificate revocation lists (RFC 5280, section 5) of CAs that are not our authority.
//!
//! A list answers for certificates of its issuer and for no others: those that name the issuer as it does, and
//! its key too where both say which. Only complete lists are taken, as a part of one says nothing of the rest.
//! Judging is pure: what no longer holds because of the time is marked by whoever keeps the lists. Our
//! authority's own list ([`super::revocation`]) is no CRL.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use rustls::pki_types::CertificateDer;
use x509_parser::der_parser::{Oid, oid};
use x509_parser::prelude::{
    CertificateRevocationList, FromDer, ParsedExtension, X509Certificate, X509Extension, X509Name,
};

use super::revocation::Revoked;
use super::svid::{Leaf, from_unix};

/// A larger list is not read: some 200,000 entries. More revocations than this are a case for a new CA.
pub const MAX_CRL_BYTES: u64 = 8 << 20;
/// RFC 5280, section 5.2.4.
const DELTA: Oid<'static> = oid!(2.5.29.27);
/// RFC 5280, section 5.2.5.
const ISSUING_DISTRIBUTION_POINT: Oid<'static> = oid!(2.5.29.28);

/// Why a list is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CrlError {
    /// Not DER, or no CRL.
    #[error("it is no certificate revocation list: {0}")]
    Malformed(String),
    /// Only what has changed since another list.
    #[error("it is a delta CRL; give the complete list")]
    Delta,
    /// About a part of the issuer's certificates, or about those of others.
    #[error(
        "it covers only a part of its issuer's certificates, or other issuers' (extension {0}); give the complete list"
    )]
    Partial(String),
    /// It would be good for ever.
    #[error("it does not say when the next one is due (nextUpdate)")]
    NoNextUpdate,
    /// Nobody known is the issuer.
    #[error(
        "its issuer is {0}, which is neither a root of the trust bundle nor, signed by one of them and valid, in the file that revocation.crls.issuer names"
    )]
    UnknownIssuer(String),
    /// Somebody else has made it.
    #[error("its signature is not by its issuer {0}, or by a key that may not sign CRLs")]
    Signature(String),
}

/// What names one certificate (RFC 5280, section 4.1.2.2), and the key that signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateId {
    /// The issuer's name, DER.
    pub issuer: Arc<[u8]>,
    /// The issuer's key identifier, if the certificate says it.
    pub key_id: Option<Arc<[u8]>>,
    /// Lower-case hex without separators.
    pub serial: Arc<str>,
}

impl CertificateId {
    /// Reads it from a certificate.
    pub(super) fn of(certificate: &X509Certificate<'_>) -> Self {
        Self {
            issuer: certificate.issuer().as_raw().into(),
            key_id: key_id(certificate.extensions()),
            serial: format!("{:x}", certificate.serial).into(),
        }
    }

    /// The issuer's name, for people.
    pub fn issuer_name(&self) -> String {
        X509Name::from_der(&self.issuer).map_or_else(|_| "?".into(), |(_, name)| name.to_string())
    }
}

/// A complete list. That its signature is good is said by [`verify`].
#[derive(Debug, PartialEq, Eq)]
pub struct Crl {
    issuer: Arc<[u8]>,
    issuer_name: String,
    key_id: Option<Arc<[u8]>>,
    number: Option<Vec<u8>>,
    this_update: SystemTime,
    next_update: SystemTime,
    serials: HashSet<Box<str>>,
}

impl Crl {
    /// Reads a DER list.
    ///
    /// # Errors
    /// When it is none, or says less than a list must to be answered by.
    pub fn from_der(der: &[u8]) -> Result<Self, CrlError> {
        let list = parse(der)?;
        check_extensions(list.extensions())?;
        let mut serials = HashSet::new();
        for entry in list.iter_revoked_certificates() {
            check_extensions(entry.extensions())?;
            serials.insert(format!("{:x}", entry.user_certificate).into());
        }
        let next_update = list.next_update().ok_or(CrlError::NoNextUpdate)?;
        Ok(Self {
            issuer: list.issuer().as_raw().into(),
            issuer_name: list.issuer().to_string(),
            key_id: key_id(list.extensions()),
            number: list.crl_number().map(|number| number.to_bytes_be()),
            this_update: from_unix(list.last_update().timestamp()),
            next_update: from_unix(next_update.timestamp()),
            serials,
        })
    }

    /// Since when it holds.
    pub fn this_update(&self) -> SystemTime {
        self.this_update
    }

    /// Until when the next one is due.
    pub fn next_update(&self) -> SystemTime {
        self.next_update
    }

    /// How many certificates it revokes.
    pub fn entries(&self) -> usize {
        self.serials.len()
    }

    /// Whether `other` came after this one: by the issuer's count, or else by the time.
    pub fn is_older_than(&self, other: &Self) -> bool {
        match (&self.number, &other.number) {
            (Some(ours), Some(theirs)) => (ours.len(), ours) < (theirs.len(), theirs),
            _ => self.this_update < other.this_update,
        }
    }

    /// Whether both are one issuer's: the same in name and, where both say so, in key.
    pub fn has_issuer_of(&self, other: &Self) -> bool {
        self.is_by(&other.issuer, other.key_id.as_deref())
    }

    /// The issuer's name, for people.
    pub fn issuer_name(&self) -> &str {
        &self.issuer_name
    }

    /// Whether it is the one to ask.
    fn answers_for(&self, certificate: &CertificateId) -> bool {
        self.is_by(&certificate.issuer, certificate.key_id.as_deref())
    }

    fn is_by(&self, issuer: &[u8], key_id: Option<&[u8]>) -> bool {
        let same_key = match (self.key_id.as_deref(), key_id) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => true,
        };
        *self.issuer == *issuer && same_key
    }
}

/// Whether a DER list was signed by its issuer: a root, or one of `others` that a root signed and that is valid
/// at `now`.
///
/// # Errors
/// When it was not, or nobody is known who could have.
pub fn verify(
    der: &[u8],
    roots: &[CertificateDer<'_>],
    others: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<(), CrlError> {
    let list = parse(der)?;
    let read = |der| X509Certificate::from_der(der).ok().map(|(_, certificate)| certificate);
    let roots: Vec<_> = roots.iter().filter_map(|root| read(root)).collect();
    let vouched = |other: &X509Certificate<'_>| {
        let by_root = |root: &X509Certificate<'_>| {
            root.subject().as_raw() == other.issuer().as_raw()
                && other.verify_signature(Some(root.public_key())).is_ok()
        };
        let validity = other.validity();
        let valid = from_unix(validity.not_before.timestamp()) <= now
            && now < from_unix(validity.not_after.timestamp());
        other.is_ca() && valid && roots.iter().any(by_root)
    };
    let others: Vec<_> = others.iter().filter_map(|other| read(other)).filter(vouched).collect();
    let named = |certificate: &&X509Certificate<'_>| certificate.subject().as_raw() == list.issuer().as_raw();
    let candidates: Vec<_> = roots.iter().chain(&others).filter(named).collect();
    if candidates.is_empty() {
        return Err(CrlError::UnknownIssuer(list.issuer().to_string()));
    }
    let signed = |certificate: &&X509Certificate<'_>| {
        let usage = certificate.key_usage().ok().flatten();
        usage.is_none_or(|usage| usage.value.crl_sign())
            && list.verify_signature(certificate.public_key()).is_ok()
    };
    if candidates.into_iter().any(|certificate| signed(&certificate)) {
        Ok(())
    } else {
        Err(CrlError::Signature(list.issuer().to_string()))
    }
}

fn parse(der: &[u8]) -> Result<CertificateRevocationList<'_>, CrlError> {
    let (rest, list) =
        CertificateRevocationList::from_der(der).map_err(|e| CrlError::Malformed(e.to_string()))?;
    if rest.is_empty() { Ok(list) } else { Err(CrlError::Malformed("bytes follow it".into())) }
}

/// Whatever must be understood and is not makes the list unusable (RFC 5280, section 5.2).
fn check_extensions(extensions: &[X509Extension<'_>]) -> Result<(), CrlError> {
    for extension in extensions {
        if extension.oid == DELTA {
            return Err(CrlError::Delta);
        }
        if extension.critical || extension.oid == ISSUING_DISTRIBUTION_POINT {
            return Err(CrlError::Partial(extension.oid.to_id_string()));
        }
    }
    Ok(())
}

fn key_id(extensions: &[X509Extension<'_>]) -> Option<Arc<[u8]>> {
    extensions.iter().find_map(|extension| match extension.parsed_extension() {
        ParsedExtension::AuthorityKeyIdentifier(key) => key.key_identifier.as_ref().map(|id| id.0.into()),
        _ => None,
    })
}

/// A list from a file, and how it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The file, for messages.
    pub file: Arc<str>,
    /// The last good list; before there is one, one that only says whose certificates cannot be judged.
    pub crl: Arc<Crl>,
    /// Why it cannot be answered by: certificates of its issuer are refused then.
    pub unknown: Option<Arc<str>>,
    /// What is wrong with the file as it is now, though a list from before may still hold.
    pub fault: Option<Arc<str>>,
}

/// All lists that are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Crls(pub Vec<Listed>);

impl Crls {
    /// Whether a certificate of the leaf's chain is revoked, or cannot be judged though there is a list for it.
    pub fn judge(&self, leaf: &Leaf) -> Option<Revoked> {
        self.0.iter().find_map(|listed| {
            let concerned = leaf.chain.iter().filter(|certificate| listed.crl.answers_for(certificate));
            let mut concerned = concerned.peekable();
            concerned.peek()?;
            let (name, file) = (&listed.crl.issuer_name, &listed.file);
            let (by, unknown) = match &listed.unknown {
                Some(why) => (format!("the CRL {file} of {name}: {why}"), true),
                None => {
                    let revoked = concerned.find(|one| listed.crl.serials.contains(&*one.serial))?;
                    (format!("serial {} in the CRL {file} of {name}", revoked.serial), false)
                }
            };
            Some(Revoked { id: leaf.id.clone(), serial: leaf.serial.clone(), by, unknown })
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use rcgen::{
        CertificateRevocationListParams, CrlDistributionPoint, CrlIssuingDistributionPoint, Issuer,
        KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    };
    use rustls::pki_types::pem::PemObject;

    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::{SpiffeId, TrustDomain};
    use crate::issue::Keypair;

    pub(crate) struct Authority {
        pub(crate) ca: Ca,
        issuer: Issuer<'static, KeyPair>,
        root: CertificateDer<'static>,
    }

    pub(crate) fn authority() -> Authority {
        let domain = TrustDomain::parse("td.test").unwrap();
        let pem = create_root(&domain, SystemTime::now()).unwrap();
        let root = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let key = KeyPair::from_pem(&pem[pem.find("-----BEGIN PRIVATE").unwrap()..]).unwrap();
        let issuer = Issuer::from_ca_cert_der(&root, key).unwrap();
        Authority { ca: Ca::from_pem(domain, &pem).unwrap(), issuer, root }
    }

    pub(crate) fn leaf(authority: &Authority) -> Leaf {
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let id = SpiffeId::parse("spiffe://td.test/ns/a/sa/web").unwrap();
        let chain = authority.ca.issue(&proven, &id, Duration::from_secs(60), SystemTime::now()).unwrap();
        Leaf::from_der(&chain[0]).unwrap()
    }

    pub(crate) fn list(authority: &Authority, number: u64, serials: &[&str], part: Option<&str>) -> Vec<u8> {
        let now = SystemTime::now();
        let revoked = serials.iter().map(|hex| RevokedCertParams {
            serial_number: SerialNumber::from_slice(
                &(0..hex.len() / 2)
                    .map(|at| u8::from_str_radix(&hex[2 * at..][..2], 16).unwrap())
                    .collect::<Vec<_>>(),
            ),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let point = |uri: &str| CrlIssuingDistributionPoint {
            distribution_point: CrlDistributionPoint { uris: vec![uri.into()] },
            scope: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + Duration::from_secs(60)).into(),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: part.map(point),
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&authority.issuer).unwrap().der().to_vec()
    }

    fn crls(der: &[u8], unknown: Option<&str>) -> Crls {
        let crl = Arc::new(Crl::from_der(der).unwrap());
        Crls(vec![Listed { file: "a.crl".into(), crl, unknown: unknown.map(Into::into), fault: None }])
    }

    #[test]
    fn a_list_answers_for_certificates_of_its_issuer_and_for_no_others() {
        let (ours, theirs) = (authority(), authority());
        let (web, other, foreign) = (leaf(&ours), leaf(&ours), leaf(&theirs));
        assert_eq!(web.chain[0].issuer, foreign.chain[0].issuer, "alike in name, not in key");
        let der = list(&ours, 1, &[&web.serial, &foreign.serial], None);
        let revoked = crls(&der, None).judge(&web).unwrap();
        assert!(!revoked.unknown && revoked.to_string().contains("is revoked, by serial"), "{revoked}");
        assert!(revoked.to_string().contains("a.crl"), "{revoked}");
        assert_eq!(crls(&der, None).judge(&other), None);
        assert_eq!(
            crls(&der, None).judge(&foreign),
            None,
            "the same serial of another key is another certificate"
        );
        let lost = crls(&der, Some("it has expired"));
        let refused = lost.judge(&other).unwrap();
        assert!(refused.unknown && refused.to_string().contains("it has expired"), "{refused}");
        assert_eq!(lost.judge(&foreign), None);
    }

    #[test]
    fn a_revoked_intermediate_takes_what_it_signed() {
        let ours = authority();
        let above = leaf(&ours);
        let mut below = leaf(&ours);
        below.chain = [below.chain[0].clone(), above.chain[0].clone()].into();
        let der = list(&ours, 1, &[&above.serial], None);
        assert!(crls(&der, None).judge(&below).is_some());
    }

    #[test]
    fn only_complete_lists_that_the_issuer_signed_are_taken() {
        let (ours, theirs) = (authority(), authority());
        let der = list(&ours, 1, &[], None);
        let now = SystemTime::now();
        assert_eq!(verify(&der, std::slice::from_ref(&ours.root), &[], now), Ok(()));
        let foreign = verify(&der, std::slice::from_ref(&theirs.root), &[], now);
        assert!(matches!(foreign, Err(CrlError::Signature(_))), "the same name, another key: {foreign:?}");
        assert!(matches!(verify(&der, &[], &[], now), Err(CrlError::UnknownIssuer(_))));
        let unvouched =
            verify(&der, std::slice::from_ref(&theirs.root), std::slice::from_ref(&ours.root), now);
        assert!(matches!(unvouched, Err(CrlError::Signature(_))), "nobody vouches for it: {unvouched:?}");
        let part = list(&ours, 1, &[], Some("http://a/part"));
        assert!(matches!(Crl::from_der(&part), Err(CrlError::Partial(_))));
        let longer = [der.as_slice(), &[0]].concat();
        assert!(matches!(Crl::from_der(&longer), Err(CrlError::Malformed(_))));
    }

    #[test]
    fn lists_are_ordered_by_the_issuers_count() {
        let ours = authority();
        let crl = |number| Crl::from_der(&list(&ours, number, &[], None)).unwrap();
        assert!(crl(255).is_older_than(&crl(256)) && !crl(256).is_older_than(&crl(255)));
        assert!(!crl(7).is_older_than(&crl(7)));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = Crl::from_der(&bytes);
            let _ = verify(&bytes, &[], &[], SystemTime::UNIX_EPOCH);
        }

        #[test]
        fn whatever_is_changed_in_a_list_says_the_same_or_is_not_believed(
            at: proptest::sample::Index,
            flip in 1u8..,
        ) {
            let ours = authority();
            let mut der = list(&ours, 1, &["ab"], None);
            let before = Crl::from_der(&der).unwrap();
            let at = at.index(der.len());
            der[at] ^= flip;
            if verify(&der, std::slice::from_ref(&ours.root), &[], SystemTime::now()).is_ok() {
                // The bytes around what is signed.
                proptest::prop_assert_eq!(Crl::from_der(&der), Ok(before));
            }
        }
    }
}
