//! A SPIFFE bundle as a document: a JWK set (SPIFFE Trust Domain and Bundle, section 4; X509-SVID, section 6).
//!
//! Keys of other uses (`jwt-svid`) are passed over. An X.509 entry that cannot be used spoils the whole document:
//! whoever holds an older state keeps it, rather than half of a newer one.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use rustls::pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::{Value, json};
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey;

use crate::identity::bundle::BundleError;
use crate::identity::federation::{Admit, Federated, MAX_ROOTS};

/// The longest document, in bytes: a bundle has a few keys.
pub const MAX_DOCUMENT_BYTES: usize = 256 << 10;
/// Most entries of any use.
const MAX_KEYS: usize = 8 * MAX_ROOTS;

/// Why a document is not a bundle.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Longer than any bundle is.
    #[error("longer than {MAX_DOCUMENT_BYTES} bytes")]
    TooLong,
    /// Not JSON, or not a JWK set.
    #[error("not a SPIFFE bundle (a JWK set): {0}")]
    Json(#[from] serde_json::Error),
    /// More entries than any bundle has.
    #[error("more than {MAX_KEYS} keys")]
    TooMany,
    /// An entry for X.509-SVIDs without exactly one certificate.
    #[error("keys[{0}] is for X.509-SVIDs and must have exactly one certificate in x5c")]
    X5c(usize),
    /// A certificate that is not base64.
    #[error("keys[{0}].x5c is not base64")]
    Base64(usize),
    /// Keys, and none for X.509-SVIDs.
    #[error("none of its keys is for X.509-SVIDs (use: x509-svid)")]
    NoRoots,
    /// The certificates are no roots.
    #[error(transparent)]
    Roots(#[from] BundleError),
}

/// A bundle, as it was published.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Document {
    /// The roots, DER, in the order of the document. None: the trust domain takes back all that it published.
    pub roots: Vec<CertificateDer<'static>>,
    /// Grows with every change, if the publisher counts (`spiffe_sequence`).
    pub sequence: Option<u64>,
    /// How often to look again, in seconds (`spiffe_refresh_hint`).
    pub refresh_hint: Option<u64>,
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<Jwk>,
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<u64>,
}

#[derive(Deserialize)]
struct Jwk {
    #[serde(rename = "use")]
    usage: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
}

impl Document {
    /// Reads what an endpoint, or a file, says.
    ///
    /// # Errors
    /// When it is no bundle, or one whose roots cannot all be used.
    pub fn parse(text: &[u8]) -> Result<Self, DocumentError> {
        if text.len() > MAX_DOCUMENT_BYTES {
            return Err(DocumentError::TooLong);
        }
        let set: JwkSet = serde_json::from_slice(text)?;
        if set.keys.len() > MAX_KEYS {
            return Err(DocumentError::TooMany);
        }
        let mut roots = Vec::new();
        for (index, key) in set.keys.iter().enumerate() {
            if key.usage.as_deref() != Some("x509-svid") {
                continue;
            }
            let [certificate] = key.x5c.as_slice() else { return Err(DocumentError::X5c(index)) };
            let der = STANDARD.decode(certificate).map_err(|_| DocumentError::Base64(index))?;
            roots.push(CertificateDer::from(der));
        }
        if roots.is_empty() && !set.keys.is_empty() {
            return Err(DocumentError::NoRoots);
        }
        Federated::new(roots.clone(), Admit::default())?;
        Ok(Self { roots, sequence: set.spiffe_sequence, refresh_hint: set.spiffe_refresh_hint })
    }

    /// Writes it for others to read.
    ///
    /// # Errors
    /// When a root is no certificate, or its key is of a kind that no JWK is written for here.
    pub fn to_json(&self) -> Result<String, String> {
        let keys: Vec<Value> = self.roots.iter().map(jwk).collect::<Result<_, _>>()?;
        let mut set = json!({"keys": keys});
        if let Some(sequence) = self.sequence {
            set["spiffe_sequence"] = sequence.into();
        }
        if let Some(hint) = self.refresh_hint {
            set["spiffe_refresh_hint"] = hint.into();
        }
        Ok(set.to_string())
    }
}

/// One root with its key in the words of RFC 7517 and 7518, as other readers want it.
fn jwk(root: &CertificateDer<'_>) -> Result<Value, String> {
    let (_, certificate) = X509Certificate::from_der(root).map_err(|e| e.to_string())?;
    let key = certificate.public_key().parsed().map_err(|e| e.to_string())?;
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let mut jwk = match key {
        PublicKey::EC(point) => {
            // SEC 1, section 2.3.3: 4, then both coordinates.
            let coordinates = point.data().strip_prefix(&[4]).unwrap_or_default();
            let curve = match coordinates.len() {
                64 => "P-256",
                96 => "P-384",
                _ => return Err("a root's key is of a curve that is neither P-256 nor P-384".into()),
            };
            let (x, y) = coordinates.split_at(coordinates.len() / 2);
            json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)})
        }
        PublicKey::RSA(rsa) => {
            let bare = |bytes: &[u8]| {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                encode(&bytes[zeros..])
            };
            json!({"kty": "RSA", "n": bare(rsa.modulus), "e": bare(rsa.exponent)})
        }
        PublicKey::Unknown(bytes) if bytes.len() == 32 => {
            json!({"kty": "OKP", "crv": "Ed25519", "x": encode(bytes)})
        }
        _ => return Err("a root's key is neither ECDSA, RSA nor Ed25519".into()),
    };
    jwk["use"] = "x509-svid".into();
    jwk["x5c"] = json!([STANDARD.encode(root)]);
    Ok(jwk)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;
    use crate::ca::{Ca, create_root};
    use crate::identity::TrustDomain;

    fn root() -> CertificateDer<'static> {
        let domain = TrustDomain::parse("other.test").unwrap();
        let pem = create_root(&domain, SystemTime::now()).unwrap();
        Ca::from_pem(domain, &pem).unwrap().bundle().roots()[0].clone()
    }

    fn parse(value: &Value) -> Result<Document, String> {
        Document::parse(value.to_string().as_bytes()).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_written_is_read_back_and_is_a_jwk() {
        let written = Document { roots: vec![root(), root()], sequence: Some(7), refresh_hint: Some(300) };
        let text = written.to_json().unwrap();
        assert_eq!(Document::parse(text.as_bytes()).unwrap(), written);
        let value: Value = serde_json::from_str(&text).unwrap();
        let key = &value["keys"][0];
        assert_eq!(
            (&key["kty"], &key["crv"], &key["use"]),
            (&json!("EC"), &json!("P-256"), &json!("x509-svid"))
        );
        assert_eq!(key["x"].as_str().map(str::len), Some(43), "32 bytes of base64url: {key}");
    }

    #[test]
    fn keys_of_other_uses_are_passed_over_and_what_is_half_usable_is_refused() {
        let der = STANDARD.encode(root());
        let good = json!({"use": "x509-svid", "kty": "EC", "x5c": [&der]});
        let jwt = json!({"use": "jwt-svid", "kty": "EC", "kid": "a"});
        let mixed = parse(&json!({"keys": [&jwt, &good], "spiffe_sequence": 3})).unwrap();
        assert_eq!((mixed.roots.len(), mixed.sequence, mixed.refresh_hint), (1, Some(3), None));
        assert_eq!(parse(&json!({"keys": []})).unwrap().roots, Vec::new(), "all taken back");
        let refused = |value: Value| parse(&value).unwrap_err();
        assert!(refused(json!({})).contains("keys"));
        assert!(refused(json!({"keys": [&jwt]})).contains("none of its keys"));
        let two = json!({"use": "x509-svid", "x5c": [&der, &der]});
        assert!(refused(json!({"keys": [&good, &two]})).contains("keys[1]"));
        assert!(refused(json!({"keys": [{"use": "x509-svid"}]})).contains("exactly one"));
        assert!(refused(json!({"keys": [{"use": "x509-svid", "x5c": ["?"]}]})).contains("base64"));
        assert!(refused(json!({"keys": [{"use": "x509-svid", "x5c": ["AAAA"]}]})).contains("root 0"));
        assert!(refused(json!({"keys": vec![&good; MAX_ROOTS + 1]})).contains("too many roots"));
        assert!(refused(json!({"keys": vec![&jwt; MAX_KEYS + 1]})).contains("keys"));
        assert!(refused(json!({"keys": [&good], "spiffe_sequence": -1})).contains("bundle"));
        let long = vec![b' '; MAX_DOCUMENT_BYTES + 1];
        assert!(matches!(Document::parse(&long), Err(DocumentError::TooLong)));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic_and_what_it_takes_it_writes(
            usage in "(x509-svid|jwt-svid|.{0,9})",
            x5c in proptest::collection::vec(prop_oneof![
                ".{0,20}".boxed(), Just(STANDARD.encode(root())).boxed()
            ], 0..3),
            sequence: Option<u64>,
            cut in 0usize..200,
        ) {
            let value = json!({"keys": [{"use": usage, "x5c": x5c}], "spiffe_sequence": sequence});
            let text = value.to_string();
            if let Ok(read) = Document::parse(text.as_bytes()) {
                prop_assert_eq!(read.sequence, sequence);
                let written = read.to_json().unwrap();
                prop_assert_eq!(Document::parse(written.as_bytes()).unwrap(), read);
            }
            let _ = Document::parse(&text.as_bytes()[..cut.min(text.len())]);
        }
    }
}
