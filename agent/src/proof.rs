#![doc = include_str!("proof.md")]

pub mod connection;

use std::sync::Arc;

use aws_lc_rs::digest::{Context, SHA256};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::SignatureScheme;
use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::EndEntityCert;

use crate::identity::SpiffeId;
use crate::identity::svid::X509Svid;
use crate::tls;
use crate::tls::provider::provider;
use crate::tls::roots::{Digest, Usage, Verified, digest};
use crate::tls::verify::PeerVerifier;
use crate::verdict::Reason;

const VERSION: u8 = 1;
/// Longest proof in a header, in bytes of base64.
pub const MAX_HEADER_BYTES: usize = 12 * 1024;
const MAX_CERTIFICATES: usize = 8;
/// RFC 8446, section 4.2.3: what may sign in TLS 1.3.
const SCHEMES: [SignatureScheme; 6] = [
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::ED25519,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
];

/// Why an identity is not proven: the label, and what an operator needs to know.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct Refusal {
    /// For metrics and logs.
    pub reason: Reason,
    /// In words.
    pub detail: String,
}

impl Refusal {
    fn bad(detail: &str) -> Self {
        Self { reason: Reason::BadProof, detail: format!("an identity proof that {detail}") }
    }
}

/// The end of the connection that a proof is made at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It dialled.
    Client,
    /// It accepted.
    Server,
}

impl Side {
    /// Who is at the other end.
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    fn context(self) -> &'static [u8] {
        match self {
            Self::Client => b"hauberk identity proof v1, client",
            Self::Server => b"hauberk identity proof v1, server",
        }
    }

    fn usage(self) -> Usage {
        match self {
            Self::Client => Usage::Client,
            Self::Server => Usage::Server,
        }
    }
}

/// The one connection that proofs are good for.
#[derive(Clone, Debug)]
pub struct Binding {
    /// The TLS exporter's bytes.
    pub exporter: [u8; 32],
    /// The node that dialled.
    pub client: SpiffeId,
    /// The node that accepted.
    pub server: SpiffeId,
}

impl Binding {
    /// What is signed.
    fn message(&self, side: Side, chain: &[CertificateDer<'_>]) -> Vec<u8> {
        let mut hash = Context::new(&SHA256);
        let mut part = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        part(self.client.as_str().as_bytes());
        part(self.server.as_str().as_bytes());
        chain.iter().for_each(|certificate| part(certificate));
        let mut message = vec![0x20; 64];
        message.extend_from_slice(side.context());
        message.push(0);
        message.extend_from_slice(&self.exporter);
        message.extend_from_slice(hash.finish().as_ref());
        message
    }
}

/// Proves an identity on a connection, from one of its ends; the header's value.
///
/// # Errors
/// When the SVID's key cannot sign, or its chain is too long to be sent.
pub fn prove(svid: &X509Svid, binding: &Binding, side: Side) -> Result<String, Refusal> {
    let ours = |detail: &str| Refusal { reason: Reason::Internal, detail: detail.into() };
    let certified = svid.certified_key();
    let signer =
        certified.key.choose_scheme(&SCHEMES).ok_or_else(|| ours("the SVID's key cannot sign in TLS 1.3"))?;
    let message = binding.message(side, &certified.cert);
    let signature = signer.sign(&message).map_err(|error| ours(&error.to_string()))?;
    let encoded = encode(signer.scheme(), &signature, &certified.cert);
    let encoded = encoded.ok_or_else(|| ours("the SVID's chain is too long for an identity proof"))?;
    let header = URL_SAFE_NO_PAD.encode(encoded);
    if header.len() > MAX_HEADER_BYTES {
        return Err(ours("the SVID's chain is too long for an identity proof"));
    }
    Ok(header)
}

fn encode(scheme: SignatureScheme, signature: &[u8], chain: &[CertificateDer<'_>]) -> Option<Vec<u8>> {
    if chain.len() > MAX_CERTIFICATES {
        return None;
    }
    let mut bytes = vec![VERSION];
    bytes.extend_from_slice(&u16::from(scheme).to_be_bytes());
    bytes.extend_from_slice(&u16::try_from(signature.len()).ok()?.to_be_bytes());
    bytes.extend_from_slice(signature);
    bytes.push(u8::try_from(chain.len()).ok()?);
    for certificate in chain {
        bytes.extend_from_slice(&u16::try_from(certificate.len()).ok()?.to_be_bytes());
        bytes.extend_from_slice(certificate);
    }
    Some(bytes)
}

/// An identity that is proven.
#[derive(Clone, Debug)]
pub struct Proven {
    /// Its certificate, verified.
    pub verified: Arc<Verified>,
    /// Names the proof's bytes.
    sent: Digest,
    chain: Vec<CertificateDer<'static>>,
}

impl Proven {
    /// Judges the chain once more, under the trust of this moment.
    fn again(&self, side: Side, verifier: &PeerVerifier, now: UnixTime) -> Result<Arc<Verified>, Refusal> {
        judge(&self.chain, side, verifier, now)
    }
}

fn judge(
    chain: &[CertificateDer<'_>],
    side: Side,
    verifier: &PeerVerifier,
    now: UnixTime,
) -> Result<Arc<Verified>, Refusal> {
    let (leaf, intermediates) = chain.split_first().ok_or_else(|| Refusal::bad("has no certificate"))?;
    verifier.verify(leaf, intermediates, now, side.usage()).map_err(|error| Refusal {
        reason: tls::rustls_reason(&error),
        detail: format!("an identity proof's certificate: {}", tls::explain(&std::io::Error::other(error))),
    })
}

/// Verifies a proof that came from `side` of a connection.
///
/// # Errors
/// With the reason that is told to the peer; nothing of the proof may be believed then.
pub fn verify(
    header: &[u8],
    binding: &Binding,
    side: Side,
    verifier: &PeerVerifier,
    now: UnixTime,
) -> Result<Proven, Refusal> {
    let proof = parse(header).ok_or_else(|| Refusal::bad("is malformed"))?;
    let verified = judge(&proof.chain, side, verifier, now)?;
    if verified.leaf.id.node_name().is_some() {
        return Err(Refusal::bad("is a node's, where a workload's is needed"));
    }
    let signature = (proof.scheme, proof.signature.as_slice());
    if !signed(&proof.chain[0], signature, &binding.message(side, &proof.chain)) {
        return Err(Refusal::bad("was not signed for this connection"));
    }
    Ok(Proven { verified, sent: digest(&[header]), chain: proof.chain })
}

fn signed(leaf: &CertificateDer<'_>, (scheme, signature): (SignatureScheme, &[u8]), message: &[u8]) -> bool {
    if !SCHEMES.contains(&scheme) {
        return false;
    }
    let Ok(certificate) = EndEntityCert::try_from(leaf) else { return false };
    let algorithms = provider().signature_verification_algorithms.mapping;
    let of_scheme = algorithms.iter().filter(|(known, _)| *known == scheme).flat_map(|(_, of)| of.iter());
    // TLS 1.3 binds a curve to each ECDSA scheme: the first is the one.
    of_scheme.take(1).any(|algorithm| certificate.verify_signature(*algorithm, message, signature).is_ok())
}

struct Parsed {
    scheme: SignatureScheme,
    signature: Vec<u8>,
    chain: Vec<CertificateDer<'static>>,
}

fn parse(header: &[u8]) -> Option<Parsed> {
    if header.len() > MAX_HEADER_BYTES {
        return None;
    }
    let bytes = URL_SAFE_NO_PAD.decode(header).ok()?;
    let (&[version, a, b], rest) = bytes.split_first_chunk()?;
    if version != VERSION {
        return None;
    }
    let scheme = SignatureScheme::from(u16::from_be_bytes([a, b]));
    let (signature, rest) = block(rest)?;
    let (&count, mut rest) = rest.split_first()?;
    if usize::from(count) > MAX_CERTIFICATES {
        return None;
    }
    let mut chain = Vec::with_capacity(count.into());
    for _ in 0..count {
        let (certificate, behind) = block(rest)?;
        chain.push(CertificateDer::from(certificate.to_vec()));
        rest = behind;
    }
    rest.is_empty().then(|| Parsed { scheme, signature: signature.to_vec(), chain })
}

/// Two bytes of length, and as much as they say.
fn block(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk()?;
    rest.split_at_checked(u16::from_be_bytes(*length).into())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::TrustDomain;
    use crate::issue::Keypair;

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    fn node(name: &str) -> SpiffeId {
        SpiffeId::node(&domain(), name).unwrap()
    }

    struct Scene {
        ca: Ca,
        now: SystemTime,
    }

    impl Scene {
        fn new() -> Self {
            let now = SystemTime::now();
            Self { ca: Ca::from_pem(domain(), &create_root(&domain(), now).unwrap()).unwrap(), now }
        }

        fn svid(&self, id: &SpiffeId) -> X509Svid {
            let key = Keypair::generate().unwrap();
            let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
            key.with_chain(self.ca.issue(&proven, id, Duration::from_secs(600), self.now).unwrap()).unwrap()
        }

        fn workload(&self, name: &str) -> X509Svid {
            self.svid(&SpiffeId::workload(&domain(), "shop", name).unwrap())
        }

        fn verify(&self, header: &str, binding: &Binding, side: Side) -> Result<SpiffeId, Reason> {
            self.verify_at(header, binding, side, self.now)
        }

        fn verify_at(
            &self,
            header: &str,
            binding: &Binding,
            side: Side,
            at: SystemTime,
        ) -> Result<SpiffeId, Reason> {
            let verifier = PeerVerifier::new(self.ca.bundle(), None).unwrap();
            let at = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).unwrap());
            let proven = verify(header.as_bytes(), binding, side, &verifier, at);
            proven.map(|proven| proven.verified.leaf.id.clone()).map_err(|refusal| refusal.reason)
        }
    }

    fn binding(exporter: u8) -> Binding {
        Binding { exporter: [exporter; 32], client: node("n1"), server: node("n2") }
    }

    #[test]
    fn a_proof_is_good_for_its_connection_and_direction() {
        let scene = Scene::new();
        let svid = scene.workload("web");
        for side in [Side::Client, Side::Server] {
            let header = prove(&svid, &binding(1), side).unwrap();
            assert_eq!(scene.verify(&header, &binding(1), side).as_ref(), Ok(svid.id()));
        }
    }

    #[test]
    fn replayed_on_another_connection_it_proves_nothing() {
        let scene = Scene::new();
        let header = prove(&scene.workload("web"), &binding(1), Side::Client).unwrap();
        assert_eq!(scene.verify(&header, &binding(2), Side::Client), Err(Reason::BadProof));
    }

    #[test]
    fn reflected_it_proves_nothing() {
        let scene = Scene::new();
        let header = prove(&scene.workload("web"), &binding(1), Side::Server).unwrap();
        assert_eq!(scene.verify(&header, &binding(1), Side::Client), Err(Reason::BadProof));
    }

    #[test]
    fn made_for_another_node_it_proves_nothing() {
        let scene = Scene::new();
        let header = prove(&scene.workload("web"), &binding(1), Side::Client).unwrap();
        let stolen = Binding { client: node("evil"), ..binding(1) };
        assert_eq!(scene.verify(&header, &stolen, Side::Client), Err(Reason::BadProof), "unknown key share");
        let misled = Binding { server: node("evil"), ..binding(1) };
        assert_eq!(scene.verify(&header, &misled, Side::Client), Err(Reason::BadProof));
    }

    #[test]
    fn another_identitys_certificate_cannot_be_put_in() {
        let scene = Scene::new();
        let (web, db) = (scene.workload("web"), scene.workload("db"));
        let message = binding(1).message(Side::Client, &db.certified_key().cert);
        let signer = web.certified_key().key.choose_scheme(&SCHEMES).unwrap();
        let signature = signer.sign(&message).unwrap();
        let forged = encode(signer.scheme(), &signature, &db.certified_key().cert).unwrap();
        let forged = URL_SAFE_NO_PAD.encode(forged);
        assert_eq!(scene.verify(&forged, &binding(1), Side::Client), Err(Reason::BadProof));
    }

    #[test]
    fn a_nodes_identity_is_no_workloads() {
        let scene = Scene::new();
        let header = prove(&scene.svid(&node("n1")), &binding(1), Side::Client).unwrap();
        assert_eq!(scene.verify(&header, &binding(1), Side::Client), Err(Reason::BadProof));
    }

    #[test]
    fn expired_and_foreign_certificates_are_named() {
        let scene = Scene::new();
        let header = prove(&scene.workload("web"), &binding(1), Side::Client).unwrap();
        let late = scene.now + Duration::from_secs(3600);
        assert_eq!(scene.verify_at(&header, &binding(1), Side::Client, late), Err(Reason::Expired));
        let other = Scene::new();
        let foreign = prove(&other.workload("web"), &binding(1), Side::Client).unwrap();
        assert_eq!(scene.verify(&foreign, &binding(1), Side::Client), Err(Reason::UnknownIssuer));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let _ = parse(URL_SAFE_NO_PAD.encode(&bytes).as_bytes());
        }

        #[test]
        fn what_is_encoded_is_parsed(signature: Vec<u8>, chain in proptest::collection::vec(
            proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300), 0..8)
        ) {
            let chain: Vec<CertificateDer<'static>> = chain.into_iter().map(CertificateDer::from).collect();
            let encoded = encode(SignatureScheme::ED25519, &signature, &chain).unwrap();
            let parsed = parse(URL_SAFE_NO_PAD.encode(encoded).as_bytes()).unwrap();
            proptest::prop_assert_eq!(parsed.signature, signature);
            proptest::prop_assert_eq!(parsed.chain, chain);
        }
    }
}
