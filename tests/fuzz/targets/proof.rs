//! An identity proof, as any node may send one: only the very bytes that were signed prove anything.
#![no_main]
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::proof::{Binding, Side, prove, verify};
use hauberk::tls::verify::PeerVerifier;
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::UnixTime;

struct Scene {
    binding: Binding,
    verifier: Arc<PeerVerifier>,
    now: UnixTime,
    good: Vec<u8>,
}

static SCENE: LazyLock<Scene> = LazyLock::new(|| scene().expect("a proof of one identity is made"));

fn scene() -> Result<Scene, Box<dyn std::error::Error>> {
    let (domain, began) = (TrustDomain::parse("td.test")?, SystemTime::now());
    let ca = Ca::from_pem(domain.clone(), &create_root(&domain, began)?)?;
    let key = Keypair::generate()?;
    let id = SpiffeId::workload(&domain, "shop", "web")?;
    let chain = ca.issue(&ProvenKey::from_csr(&key.csr()?)?, &id, Duration::from_secs(86_400), began)?;
    let (client, server) = (SpiffeId::node(&domain, "n1")?, SpiffeId::node(&domain, "n2")?);
    let binding = Binding { exporter: [7; 32], client, server };
    let header = prove(&key.with_chain(chain)?, &binding, Side::Client)?;
    let verifier = PeerVerifier::new(ca.bundle(), None)?;
    let now = UnixTime::since_unix_epoch(began.duration_since(SystemTime::UNIX_EPOCH)?);
    Ok(Scene { binding, verifier, now, good: URL_SAFE_NO_PAD.decode(header)? })
}

impl Scene {
    fn proves(&self, header: &[u8]) -> bool {
        verify(header, &self.binding, Side::Client, &self.verifier, self.now).is_ok()
    }
}

fuzz_target!(|bytes: &[u8]| {
    let scene = &*SCENE;
    assert!(!scene.proves(bytes));
    assert!(!scene.proves(URL_SAFE_NO_PAD.encode(bytes).as_bytes()) || bytes == scene.good);
    // The same bytes as a change of a good proof: past its version, lengths and certificates.
    let changed: Vec<u8> =
        scene.good.iter().enumerate().map(|(at, byte)| byte ^ bytes.get(at).copied().unwrap_or(0)).collect();
    assert_eq!(scene.proves(URL_SAFE_NO_PAD.encode(&changed).as_bytes()), changed == scene.good);
});
