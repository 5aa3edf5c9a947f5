//! Certificate requests (PKCS#10, RFC 2986) from whoever asks: what is taken is the public key, and a request that
//! asks for more than its identity is refused, so that nobody believes to have got it.
//!
//! The signature is verified last, being the dear part.

use rcgen::{PublicKeyData, SubjectPublicKeyInfo};
use x509_parser::certification_request::X509CertificationRequestInfo;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{ParsedExtension, X509Extension};
use x509_parser::prelude::{FromDer, GeneralName, X509CertificationRequest};

use crate::identity::SpiffeId;

/// A CSR with a P-384 key is a tenth of this.
pub const MAX_CSR_BYTES: usize = 8 * 1024;

/// Why a CSR is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Too many bytes.
    #[error("the CSR is too large: at most {MAX_CSR_BYTES} bytes are read")]
    TooLarge,
    /// Not PKCS#10.
    #[error("the CSR is not PKCS#10 (DER): {0}")]
    Malformed(String),
    /// A kind of key that is not accepted.
    #[error("the CSR's key is of a kind that is not accepted; use P-256, P-384 or Ed25519")]
    KeyKind,
    /// Not signed by its own key.
    #[error("the CSR is not signed by its own key")]
    Signature,
    /// It wants to be a CA.
    #[error(
        "the CSR asks to be a CA (basicConstraints, keyCertSign, cRLSign or nameConstraints), which no SVID is"
    )]
    Ca,
    /// It names something else than the identity that is asked for.
    #[error("the CSR names {named:?} but may name {id} alone")]
    Names {
        /// What it names.
        named: String,
        /// What it may name.
        id: SpiffeId,
    },
    /// It names an identity of another trust domain.
    #[error("the CSR names {named:?}, which is not in trust domain {domain}")]
    TrustDomain {
        /// What it names.
        named: String,
        /// The authority's own.
        domain: String,
    },
    /// An extension that no SVID has.
    #[error("the CSR asks for extension {0}, which no SVID has")]
    Extension(String),
    /// Its subject holds bytes that no name has.
    #[error("the CSR's subject holds control characters")]
    ControlCharacters,
}

impl CsrError {
    /// For metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::TooLarge => "csr_too_large",
            Self::Malformed(_) => "csr_malformed",
            Self::KeyKind => "csr_key_kind",
            Self::Signature => "csr_signature",
            Self::Ca => "csr_ca",
            Self::Names { .. } => "csr_names",
            Self::TrustDomain { .. } => "csr_trust_domain",
            Self::Extension(_) => "csr_extension",
            Self::ControlCharacters => "csr_control_characters",
        }
    }
}

/// A public key whose owner has proven to hold the private one.
#[derive(Debug)]
pub struct ProvenKey(SubjectPublicKeyInfo);

impl ProvenKey {
    /// Takes the public key out of a DER CSR, whatever else that asks for.
    ///
    /// # Errors
    /// When it is too large, malformed, not signed by its own key, or of another kind of key.
    pub fn from_csr(der: &[u8]) -> Result<Self, CsrError> {
        Self::read(der, |_| Ok(()))
    }

    /// The same of a CSR that asks for `id` and nothing else, or for nothing at all.
    ///
    /// # Errors
    /// As [`ProvenKey::from_csr`], and when it asks for anything else.
    pub fn for_id(der: &[u8], id: &SpiffeId) -> Result<Self, CsrError> {
        Self::read(der, |info| asks_only_for(info, id))
    }

    fn read(
        der: &[u8],
        check: impl FnOnce(&X509CertificationRequestInfo<'_>) -> Result<(), CsrError>,
    ) -> Result<Self, CsrError> {
        let malformed = |e: String| CsrError::Malformed(e);
        if der.len() > MAX_CSR_BYTES {
            return Err(CsrError::TooLarge);
        }
        let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|e| malformed(e.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes follow it".into()));
        }
        let info = &csr.certification_request_info;
        // Whatever cannot be read is no key of the kinds that can.
        let key = SubjectPublicKeyInfo::from_der(info.subject_pki.raw).map_err(|_| CsrError::KeyKind)?;
        let accepted = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
        if !accepted.contains(&key.algorithm()) {
            return Err(CsrError::KeyKind);
        }
        check(info)?;
        csr.verify_signature().map_err(|_| CsrError::Signature)?;
        Ok(Self(key))
    }

    /// The key.
    pub(super) fn public(&self) -> &SubjectPublicKeyInfo {
        &self.0
    }
}

fn asks_only_for(info: &X509CertificationRequestInfo<'_>, id: &SpiffeId) -> Result<(), CsrError> {
    let is_control = |byte: &u8| byte.is_ascii_control();
    if info.subject.iter_attributes().any(|attribute| attribute.as_slice().iter().any(is_control)) {
        return Err(CsrError::ControlCharacters);
    }
    for attribute in info.iter_attributes() {
        if let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() {
            requested.extensions.iter().try_for_each(|extension| is_harmless(extension, id))?;
        }
    }
    Ok(())
}

fn is_harmless(extension: &X509Extension<'_>, id: &SpiffeId) -> Result<(), CsrError> {
    match extension.parsed_extension() {
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => Err(CsrError::Ca),
        ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => Err(CsrError::Ca),
        ParsedExtension::NameConstraints(_) => Err(CsrError::Ca),
        ParsedExtension::SubjectAlternativeName(names) => {
            names.general_names.iter().try_for_each(|name| is_named(name, id))
        }
        // What an SVID has anyway, or does not mind.
        ParsedExtension::BasicConstraints(_)
        | ParsedExtension::KeyUsage(_)
        | ParsedExtension::ExtendedKeyUsage(_)
        | ParsedExtension::SubjectKeyIdentifier(_) => Ok(()),
        ParsedExtension::ParseError { .. } => {
            Err(CsrError::Malformed(format!("extension {} cannot be read", extension.oid)))
        }
        _ => Err(CsrError::Extension(extension.oid.to_string())),
    }
}

fn is_named(name: &GeneralName<'_>, id: &SpiffeId) -> Result<(), CsrError> {
    let named = match name {
        GeneralName::URI(uri) if *uri == id.as_str() => return Ok(()),
        GeneralName::URI(uri) => (*uri).to_owned(),
        other => other.to_string(),
    };
    // Whoever sent it chose its length.
    let named: String = named.chars().take(128).collect();
    match SpiffeId::parse(&named) {
        Ok(other) if other.trust_domain() != id.trust_domain() => {
            Err(CsrError::TrustDomain { named, domain: id.trust_domain().to_owned() })
        }
        _ => Err(CsrError::Names { named, id: id.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType,
        ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
    };

    use super::*;

    fn id() -> SpiffeId {
        SpiffeId::parse("spiffe://td.test/ns/a/sa/b").unwrap()
    }

    fn asks(edit: impl FnOnce(&mut CertificateParams)) -> Result<ProvenKey, CsrError> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        edit(&mut params);
        ProvenKey::for_id(params.serialize_request(&key).unwrap().der(), &id())
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    #[test]
    fn a_csr_that_asks_for_its_identity_or_for_nothing_is_taken() {
        assert!(asks(|_| {}).is_ok());
        let usual = asks(|params| {
            params.subject_alt_names = vec![uri(id().as_str())];
            params.distinguished_name.push(DnType::OrganizationName, "Somebody");
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            params.is_ca = IsCa::ExplicitNoCa;
        });
        assert!(usual.is_ok(), "{usual:?}");
    }

    #[test]
    fn whatever_else_a_csr_asks_for_is_refused_and_named() {
        let refused = |edit: fn(&mut CertificateParams)| {
            let error = asks(edit).unwrap_err();
            (error.reason(), error.to_string())
        };
        let ca = refused(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert_eq!(ca.0, "csr_ca");
        assert_eq!(refused(|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]).0, "csr_ca");
        let constraints = refused(|params| {
            // permittedSubtrees: [dNSName "x"]
            let content = vec![0x30, 0x07, 0xa0, 0x05, 0x30, 0x03, 0x82, 0x01, b'x'];
            params.custom_extensions = vec![CustomExtension::from_oid_content(&[2, 5, 29, 30], content)];
        });
        assert_eq!(constraints.0, "csr_ca");
        let dns = refused(|params| {
            params.subject_alt_names =
                vec![uri(id().as_str()), SanType::DnsName("a.test".try_into().unwrap())]
        });
        assert!(dns.0 == "csr_names" && dns.1.contains("a.test"), "{dns:?}");
        let other = refused(|params| params.subject_alt_names = vec![uri("spiffe://td.test/ns/a/sa/other")]);
        assert!(other.0 == "csr_names" && other.1.contains("sa/other"), "{other:?}");
        let two =
            refused(|params| params.subject_alt_names = vec![uri(id().as_str()), uri("https://x.test")]);
        assert_eq!(two.0, "csr_names");
        let domain = refused(|params| params.subject_alt_names = vec![uri("spiffe://elsewhere/ns/a/sa/b")]);
        assert!(domain.0 == "csr_trust_domain" && domain.1.contains("td.test"), "{domain:?}");
        let nul = refused(|params| params.subject_alt_names = vec![uri("spiffe://td.test/ns/a/sa/b\0")]);
        assert!(nul.0 == "csr_names" && nul.1.contains("\\0"), "shown escaped: {nul:?}");
        let control = refused(|params| params.distinguished_name.push(DnType::CommonName, "a\nb"));
        assert_eq!(control.0, "csr_control_characters");
        let unknown = refused(|params| {
            let custom = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
            params.custom_extensions = vec![custom];
        });
        assert!(unknown.0 == "csr_extension" && unknown.1.contains("99999"), "{unknown:?}");
        let huge = refused(|params| {
            let content = vec![0; MAX_CSR_BYTES];
            let custom = CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], content);
            params.custom_extensions = vec![custom];
        });
        assert_eq!(huge.0, "csr_too_large");
    }

    #[test]
    fn a_key_of_another_kind_and_a_signature_of_another_key_are_refused() {
        let rsa = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
        let csr = CertificateParams::default().serialize_request(&rsa).unwrap();
        assert_eq!(ProvenKey::from_csr(csr.der()).unwrap_err(), CsrError::KeyKind);
        let key = KeyPair::generate().unwrap();
        let mut der = CertificateParams::default().serialize_request(&key).unwrap().der().to_vec();
        let last = der.len() - 1;
        der[last] ^= 1;
        assert_eq!(ProvenKey::from_csr(&der).unwrap_err(), CsrError::Signature);
        der.push(0);
        assert_eq!(ProvenKey::from_csr(&der).unwrap_err().reason(), "csr_malformed");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes: Vec<u8>) {
            let _ = ProvenKey::for_id(&bytes, &id());
        }

        #[test]
        fn no_change_of_a_byte_makes_the_reader_panic_or_take_another_key(at: proptest::sample::Index, to: u8) {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![uri(id().as_str())];
            let mut der = params.serialize_request(&key).unwrap().der().to_vec();
            let at = at.index(der.len());
            der[at] = to;
            if let Ok(proven) = ProvenKey::for_id(&der, &id()) {
                proptest::prop_assert_eq!(
                    proven.public().subject_public_key_info(),
                    PublicKeyData::subject_public_key_info(&key)
                );
            }
        }
    }
}
