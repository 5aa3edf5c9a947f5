//! What holds of kernel TLS only. Everything else that it has to do is in `records.rs`, `tunnel.rs` and
//! `node_scope.rs`, which `cargo xtask vm` runs with the records in the kernel.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::io::ErrorKind;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls::stream::TlsStream;
use hauberk::tls::{self, handshake, ktls};
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsConnector, client};

/// Tried once: while a module is being loaded for one try, another may miss it.
static ABILITY: LazyLock<ktls::Ability> = LazyLock::new(|| {
    let ability = ktls::probe().unwrap();
    ability.switch_on();
    ability
});

/// rustls dials, we accept.
async fn we_accept() -> (TlsStream, client::TlsStream<TcpStream>) {
    let (domain, now) = (TrustDomain::parse("td.test").unwrap(), SystemTime::now());
    let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now).unwrap()).unwrap();
    let svid = |name: &str| -> X509Svid {
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let id = SpiffeId::workload(&domain, "test", name).unwrap();
        key.with_chain(ca.issue(&proven, &id, Duration::from_secs(600), now).unwrap()).unwrap()
    };
    let server = svid("server");
    let config = tls::client::config(&svid("client"), ca.bundle(), server.id().clone()).unwrap();
    let connecting = TlsConnector::from(config);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let far = listener.accept().await.unwrap().0;
    let accepting = handshake::accept(tls::server::config(&server, ca.bundle()).unwrap(), far);
    let name = ServerName::try_from("unused").unwrap();
    let (ours, theirs) = tokio::join!(accepting, connecting.connect(name, near));
    (ours.unwrap().stream, theirs.unwrap())
}

/// One of the kernel's counts (Documentation/networking/tls.rst).
fn count(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/net/tls_stat").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().parse().unwrap()
}

#[tokio::test]
#[ignore = "cargo xtask vm runs it: it needs a kernel with TLS"]
async fn both_keys_are_the_kernels() {
    LazyLock::force(&ABILITY);
    let counts = || ["TlsTxSw ", "TlsRxSw ", "TlsDecryptError "].map(count);
    let [sending, receiving, failed] = counts();
    let (mut ours, mut theirs) = we_accept().await;
    theirs.write_all(b"data").await.unwrap();
    theirs.flush().await.unwrap();
    ours.read_exact(&mut [0; 4]).await.unwrap();
    let [now_sending, now_receiving, now_failed] = counts();
    assert!(now_sending > sending, "it seals");
    assert!(now_receiving > receiving, "it opens");
    assert_eq!(now_failed, failed);
}

#[tokio::test]
#[ignore = "cargo xtask vm runs it: it needs a kernel with TLS"]
async fn a_new_key_of_the_peers_is_followed_or_the_end() {
    let ability = *ABILITY;
    let (mut ours, mut theirs) = we_accept().await;
    // The kernel takes over with the first read.
    theirs.write_all(b"old").await.unwrap();
    theirs.flush().await.unwrap();
    ours.read_exact(&mut [0; 3]).await.unwrap();
    theirs.get_mut().1.refresh_traffic_keys().unwrap();
    theirs.write_all(b"new").await.unwrap();
    theirs.flush().await.unwrap();
    let mut got = [0; 3];
    let read = ours.read_exact(&mut got).await;
    if ability.rekeys {
        read.unwrap();
        assert_eq!(&got, b"new");
        return;
    }
    let error = read.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    assert!(error.to_string().contains("the peer has changed its key"), "{error}");
    let told = theirs.read(&mut [0; 1]).await.unwrap_err();
    assert!(told.to_string().contains("InternalError"), "the peer is told: {told}");
}
