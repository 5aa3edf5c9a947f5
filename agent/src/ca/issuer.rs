//! An intermediate CA that the operator supplies, whose root's key is elsewhere: what has to hold of it before
//! anything is signed with it.
//!
//! The last check is the one that counts: something is signed as an SVID would be, and verified as an agent
//! would verify it. Those before it are there to say what is wrong.

use std::time::{Duration, SystemTime};

use rcgen::KeyPair;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::state::{Root, RootId, certificates, seconds};
use super::{Ca, CaError, ProvenKey};
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::{is_self_issued, pem};
use crate::identity::{SpiffeId, TrustDomain};

/// Most certificates between the signing key and the root: each SVID carries them all.
const MAX_CHAIN: usize = 4;

/// Why a supplied issuer cannot be used. Each says which of its three parts is wrong.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// A part is no PEM of its kind.
    #[error("{part}: {detail}")]
    Part {
        /// `certificate`, `key` or `root`.
        part: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// All parts are what they should be, and nothing signed with them verifies.
    #[error("what it signs does not verify under the root: {0}")]
    Unverifiable(String),
    /// What it is made of.
    #[error(transparent)]
    Ca(#[from] CaError),
}

/// The three texts (PEM) that an operator supplies.
#[derive(Debug)]
pub struct Supplied<'a> {
    /// The intermediate's certificate, then those above it, if any.
    pub certificate: &'a str,
    /// Its private key.
    pub key: &'a str,
    /// The root: what agents will trust.
    pub root: &'a str,
}

impl Supplied<'_> {
    /// A root of the trust state from it, that signs SVIDs which live for `lifetime`.
    ///
    /// # Errors
    /// When any part is not what it must be, or agents would refuse what it signs.
    pub fn check(
        &self,
        domain: &TrustDomain,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Root, IssuerError> {
        let root = self.root()?;
        let chain = self.chain(&root)?;
        self.key_of(chain.first().unwrap_or(&root))?;
        for certificate in chain.iter().chain([&root]) {
            is_ca(certificate, if *certificate == root { "root" } else { "certificate" })?;
        }
        let ca = Ca::new(domain.clone(), root.clone(), chain.clone(), self.key)?;
        if ca.not_after() < now + lifetime {
            let words =
                "it, or a certificate above it, ends before an SVID issued now would (svidLifetimeSeconds)";
            return Err(part("certificate", words));
        }
        leads_to(ca.bundle(), &ca, &[], lifetime, now)?;
        Ok(Root {
            id: RootId::of(&root),
            certificate: all_pem(&[root]),
            chain: all_pem(&chain),
            key: self.key.to_owned().into(),
            cross: None,
            since: seconds(now),
            not_after: seconds(ca.not_after()),
            signed_until: 0,
        })
    }

    fn root(&self) -> Result<CertificateDer<'static>, IssuerError> {
        let mut roots = certificates(self.root).map_err(|e| part("root", &e.to_string()))?;
        match (roots.pop(), roots.len()) {
            (Some(root), 0) if is_self_issued(&root) => Ok(root),
            (Some(_), 0) => Err(part("root", "it is not self-signed: give the root itself, no intermediate")),
            _ => Err(part("root", "it must be exactly one certificate (PEM)")),
        }
    }

    fn chain(&self, root: &CertificateDer<'static>) -> Result<Vec<CertificateDer<'static>>, IssuerError> {
        let mut chain = certificates(self.certificate).map_err(|e| part("certificate", &e.to_string()))?;
        if chain.is_empty() || chain.len() > MAX_CHAIN {
            return Err(part("certificate", &format!("it must be 1 to {MAX_CHAIN} certificates (PEM)")));
        }
        if chain.len() == 1 && chain.first() == Some(root) {
            return Err(part(
                "certificate",
                "it is the root itself, whose key had better stay offline: supply an intermediate",
            ));
        }
        // Some put the root at the end; agents have it.
        chain.retain(|certificate| certificate != root);
        Ok(chain)
    }

    fn key_of(&self, certificate: &CertificateDer<'_>) -> Result<(), IssuerError> {
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes())
            .map_err(|e| part("key", &format!("no private key (PEM, not encrypted) in it: {e}")))?;
        let key = KeyPair::try_from(&key).map_err(|e| part("key", &format!("it cannot be used: {e}")))?;
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|e| part("certificate", &e.to_string()))?;
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err(part("key", "it does not belong to the certificate"));
        }
        Ok(())
    }
}

/// What RFC 5280 asks of a CA's certificate, as far as agents look at it.
fn is_ca(der: &CertificateDer<'_>, which: &'static str) -> Result<(), IssuerError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| part(which, &e.to_string()))?;
    if !certificate.is_ca() {
        return Err(part(which, "it is no CA certificate (basicConstraints CA:TRUE)"));
    }
    let usage = certificate.key_usage().map_err(|e| part(which, &e.to_string()))?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err(part(which, "its keyUsage has no keyCertSign"));
    }
    let constraints = certificate.name_constraints().map_err(|e| part(which, &e.to_string()))?;
    let subtrees = constraints.iter().flat_map(|found| {
        let value = found.value;
        [&value.permitted_subtrees, &value.excluded_subtrees]
    });
    // rustls-webpki refuses every chain with such a one, whatever it says.
    if subtrees.flatten().flatten().any(|subtree| matches!(subtree.base, GeneralName::URI(_))) {
        return Err(part(
            which,
            "it has a name constraint for URIs, which agents cannot judge and so refuse",
        ));
    }
    Ok(())
}

/// Whether what `ca` signs is believed by who knows the roots of `bundle` and is shown `more` certificates.
pub(super) fn leads_to(
    bundle: &TrustBundle,
    ca: &Ca,
    more: &[CertificateDer<'_>],
    lifetime: Duration,
    now: SystemTime,
) -> Result<(), IssuerError> {
    let unverifiable = |detail: String| IssuerError::Unverifiable(detail);
    let key = KeyPair::generate().map_err(|e| unverifiable(e.to_string()))?;
    let csr = rcgen::CertificateParams::default().serialize_request(&key);
    let csr = csr.map_err(|e| unverifiable(e.to_string()))?;
    let probe = SpiffeId::authority(ca.domain());
    let proven = ProvenKey::from_csr(csr.der()).map_err(CaError::from)?;
    let chain = ca.issue(&proven, &probe, lifetime, now)?;
    let (leaf, above) = chain.split_first().ok_or_else(|| unverifiable("an empty chain".into()))?;
    let above: Vec<_> = above.iter().chain(more).cloned().collect();
    let anchors: Result<Vec<_>, _> = bundle.roots().iter().map(anchor_from_trusted_cert).collect();
    let anchors = anchors.map_err(|e| part("root", &e.to_string()))?;
    let leaf = EndEntityCert::try_from(leaf).map_err(|e| unverifiable(e.to_string()))?;
    let now = UnixTime::since_unix_epoch(Duration::from_secs(seconds(now)));
    let algorithms = webpki::ALL_VERIFICATION_ALGS;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(algorithms, &anchors, &above, now, usage, None, None).map_err(|error| {
            unverifiable(match error {
                webpki::Error::PathLenConstraintViolated => {
                    "a pathLenConstraint forbids so many certificates below it".into()
                }
                webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                    "the certificate's chain does not lead to the root".into()
                }
                other => other.to_string(),
            })
        })?;
    }
    Ok(())
}

fn part(part: &'static str, detail: &str) -> IssuerError {
    IssuerError::Part { part, detail: detail.to_owned() }
}

fn all_pem(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|der| pem("CERTIFICATE", der)).collect()
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DistinguishedName, DnType, GeneralSubtree, IsCa, Issuer,
        KeyUsagePurpose, NameConstraints,
    };

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    /// A CA of somebody's own make.
    struct Made {
        params: CertificateParams,
        key: KeyPair,
        pem: String,
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = (SystemTime::now() - HOUR).into();
        params.not_after = (SystemTime::now() + 24 * HOUR).into();
        params
    }

    fn made(params: CertificateParams, by: Option<&Made>) -> Made {
        let key = KeyPair::generate().unwrap();
        let certificate = match by {
            Some(by) => params.signed_by(&key, &Issuer::from_params(&by.params, &by.key)).unwrap(),
            None => params.self_signed(&key).unwrap(),
        };
        Made { pem: certificate.pem(), params, key }
    }

    fn check(intermediate: &Made, above: &[&Made], key: &str, root: &str) -> Result<Root, String> {
        let chain: String = [intermediate].iter().chain(above).map(|made| made.pem.as_str()).collect();
        Supplied { certificate: &chain, key, root }
            .check(&domain(), HOUR, SystemTime::now())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn what_an_intermediate_signs_carries_the_chain_and_leads_to_the_root_alone() {
        let root = made(params("offline root"), None);
        let middle = made(params("middle"), Some(&root));
        let low = made(params("online"), Some(&middle));
        let key = low.key.serialize_pem();
        // The root at the end is not sent.
        let supplied = check(&low, &[&middle, &root], &key, &root.pem).unwrap();
        let ca = supplied.ca(&domain()).unwrap();
        assert_eq!(ca.bundle().roots(), certificates(&root.pem).unwrap());
        let csr = CertificateParams::default().serialize_request(&KeyPair::generate().unwrap()).unwrap();
        let id = SpiffeId::node(&domain(), "n1").unwrap();
        let proven = ProvenKey::from_csr(csr.der()).unwrap();
        let chain = ca.issue(&proven, &id, HOUR, SystemTime::now()).unwrap();
        assert_eq!(chain[1..], certificates(&(low.pem + &middle.pem)).unwrap());
        assert!(matches!(ca.issue(&proven, &id, 48 * HOUR, SystemTime::now()), Err(CaError::Expired)));
    }

    #[test]
    fn each_part_that_is_wrong_is_named() {
        let root = made(params("root"), None);
        let good = made(params("online"), Some(&root));
        let key = good.key.serialize_pem();
        let stranger = made(params("stranger"), None);
        let edited = |edit: &dyn Fn(&mut CertificateParams)| {
            let mut params = params("online");
            edit(&mut params);
            made(params, Some(&root))
        };
        let refused = |made: &Made| check(made, &[], &made.key.serialize_pem(), &root.pem).unwrap_err();

        assert!(check(&good, &[], &key, &root.pem).is_ok());
        let wrong = check(&good, &[], &stranger.key.serialize_pem(), &root.pem).unwrap_err();
        assert_eq!(wrong, "key: it does not belong to the certificate");
        assert!(check(&good, &[], "", &root.pem).unwrap_err().starts_with("key: no private key"));
        assert!(check(&good, &[], &key, &good.pem).unwrap_err().starts_with("root: it is not self-signed"));
        assert!(check(&good, &[], &key, "").unwrap_err().starts_with("root: it must be exactly one"));
        assert!(check(&good, &[], &key, &stranger.pem).unwrap_err().contains("does not lead to the root"));
        let itself = check(&root, &[], &root.key.serialize_pem(), &root.pem).unwrap_err();
        assert!(itself.contains("had better stay offline"), "{itself}");

        let leaf = edited(&|params| params.is_ca = IsCa::ExplicitNoCa);
        assert!(refused(&leaf).contains("no CA certificate"));
        let usage = edited(&|params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
        assert!(refused(&usage).contains("no keyCertSign"));
        let short = edited(&|params| params.not_after = (SystemTime::now() + HOUR / 2).into());
        assert!(refused(&short).contains("svidLifetimeSeconds"));
        let constrained = edited(&|params| {
            let subtree = GeneralSubtree::DnsName("example.com".into());
            params.name_constraints =
                Some(NameConstraints { permitted_subtrees: vec![subtree], excluded_subtrees: Vec::new() });
        });
        assert!(
            check(&constrained, &[], &constrained.key.serialize_pem(), &root.pem).is_ok(),
            "names no URI"
        );
        let mut flat = params("flat");
        flat.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let flat = made(flat, Some(&root));
        let below = made(params("below"), Some(&flat));
        let long = check(&below, &[&flat], &below.key.serialize_pem(), &root.pem).unwrap_err();
        assert!(long.contains("pathLenConstraint"), "{long}");
    }
}
