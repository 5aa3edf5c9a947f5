//! Our record layer against rustls' own, in both roles: whatever the other end does must come out the same,
//! or end in the right error. `cargo xtask vm` runs the same with the records in the kernel.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod kernel;

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::time::SystemTime;

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls::exporter::LABEL;
use hauberk::tls::handshake::{self, Established};
use hauberk::tls::stream::TlsStream;
use hauberk::tls::{self, reason};
use hauberk::verdict::Reason;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::crypto::{CipherSuiteCommon, CryptoProvider};
use rustls::pki_types::ServerName;
use rustls::server::ServerSessionMemoryCache;
use rustls::version::TLS13;
use rustls::{ClientConfig, HandshakeKind, ServerConfig, SupportedCipherSuite, Tls13CipherSuite};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    kernel::if_asked();
    let (domain, now) = (TrustDomain::parse("td.test").unwrap(), SystemTime::now());
    let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now).unwrap()).unwrap();
    let svid = |name: &str| -> X509Svid {
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let id = SpiffeId::workload(&domain, "test", name).unwrap();
        key.with_chain(ca.issue(&proven, &id, std::time::Duration::from_secs(600), now).unwrap()).unwrap()
    };
    let server = svid("server");
    let client = tls::client::config(&svid("client"), ca.bundle(), server.id().clone()).unwrap();
    (client, tls::server::config(&server, ca.bundle()).unwrap())
}

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

fn name() -> ServerName<'static> {
    ServerName::try_from("unused").unwrap()
}

/// We dial, rustls accepts.
async fn we_dial() -> (Established, server::TlsStream<TcpStream>) {
    let (client, server) = configs();
    dial(client, server).await
}

async fn dial(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (Established, server::TlsStream<TcpStream>) {
    let (near, far) = tcp().await;
    let accepting = TlsAcceptor::from(server);
    let (ours, theirs) = tokio::join!(handshake::connect(client, name(), near), accepting.accept(far));
    (ours.unwrap(), theirs.unwrap())
}

/// rustls dials, we accept.
async fn we_accept() -> (Established, client::TlsStream<TcpStream>) {
    let (client, server) = configs();
    accept(client, server).await
}

async fn accept(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> (Established, client::TlsStream<TcpStream>) {
    let (near, far) = tcp().await;
    let connecting = TlsConnector::from(client);
    let (ours, theirs) = tokio::join!(handshake::accept(server, far), connecting.connect(name(), near));
    (ours.unwrap(), theirs.unwrap())
}

/// Random lengths, so that records of every size and place of cut occur.
async fn exchange(one: impl AsyncRead + AsyncWrite, other: impl AsyncRead + AsyncWrite) {
    let sent: Arc<Vec<u8>> = Arc::new((0..5_000_000u32).map(|i| (i % 251) as u8).collect());
    let (one_in, one_out) = tokio::io::split(one);
    let (other_in, other_out) = tokio::io::split(other);
    let write = |mut out: tokio::io::WriteHalf<_>| {
        let sent = Arc::clone(&sent);
        async move {
            let mut at = 0;
            while at < sent.len() {
                let end = (at + fastrand::usize(1..80_000)).min(sent.len());
                out.write_all(&sent[at..end]).await.unwrap();
                at = end;
            }
            out.shutdown().await.unwrap();
        }
    };
    async fn read(mut from: impl AsyncRead + Unpin, sent: &[u8]) {
        let mut got = Vec::new();
        let mut chunk = vec![0; 300_000];
        loop {
            let room = fastrand::usize(1..chunk.len());
            match from.read(&mut chunk[..room]).await.unwrap() {
                0 => break,
                length => got.extend_from_slice(&chunk[..length]),
            }
        }
        assert!(got == sent, "{} of {} bytes, or not the same", got.len(), sent.len());
    }
    // One type each way, so the closure is written out twice.
    let other_write = async {
        let mut out = other_out;
        for chunk in sent.chunks(33_333) {
            out.write_all(chunk).await.unwrap();
        }
        out.shutdown().await.unwrap();
    };
    tokio::join!(write(one_out), other_write, read(one_in, &sent), read(other_in, &sent));
}

#[tokio::test]
async fn bytes_pass_both_ways_in_either_role() {
    let (ours, theirs) = we_dial().await;
    exchange(ours.stream, theirs).await;
    let (ours, theirs) = we_accept().await;
    exchange(ours.stream, theirs).await;
}

#[tokio::test]
async fn the_exporter_is_the_one_that_rustls_computes() {
    let (ours, theirs) = we_dial().await;
    let exported = theirs.get_ref().1.export_keying_material([0; 32], LABEL, None).unwrap();
    assert_eq!(ours.session.exporter, exported, "as the client");
    let (ours, theirs) = we_accept().await;
    let exported = theirs.get_ref().1.export_keying_material([0; 32], LABEL, None).unwrap();
    assert_eq!(ours.session.exporter, exported, "as the server");
}

#[tokio::test]
async fn a_new_key_of_the_peers_is_taken_up_and_answered() {
    let (ours, mut theirs) = we_accept().await;
    let mut ours = ours.stream;
    for round in 0..3u8 {
        // Asks for our next key as well.
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
        theirs.write_all(&[round; 1000]).await.unwrap();
        theirs.flush().await.unwrap();
        let mut got = [9; 1000];
        ours.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [round; 1000]);
        ours.write_all(&got).await.unwrap();
        ours.flush().await.unwrap();
        theirs.read_exact(&mut got).await.unwrap();
        assert_eq!(got, [round; 1000], "sealed with the key that was asked for");
    }
}

/// A server whose suites are these, and a client that accepts it.
fn with_suites(suites: Vec<SupportedCipherSuite>) -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let (client, server) = configs();
    let provider = CryptoProvider { cipher_suites: suites, ..(*tls::provider::provider()).clone() };
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(&server.cert_resolver));
    config.alpn_protocols = server.alpn_protocols.clone();
    (client, Arc::new(config))
}

#[tokio::test]
async fn every_cipher_suite_is_ours_too() {
    for suite in &tls::provider::provider().cipher_suites {
        let (client, server) = with_suites(vec![*suite]);
        let (ours, theirs) = dial(Arc::clone(&client), Arc::clone(&server)).await;
        exchange(ours.stream, theirs).await;
        let (ours, theirs) = accept(client, server).await;
        exchange(ours.stream, theirs).await;
    }
}

#[tokio::test]
async fn a_key_is_changed_before_it_has_sealed_too_much() {
    let suite = cipher_suite::TLS13_AES_128_GCM_SHA256.tls13().unwrap();
    let common = CipherSuiteCommon { confidentiality_limit: 64, ..suite.common };
    let narrow: &Tls13CipherSuite = Box::leak(Box::new(Tls13CipherSuite { common, ..*suite }));
    let (client, server) = with_suites(vec![narrow.into()]);
    let (ours, mut theirs) = accept(client, server).await;
    let mut ours = ours.stream;
    for round in 0..300u32 {
        ours.write_all(&round.to_be_bytes()).await.unwrap();
        ours.flush().await.unwrap();
        assert_eq!(theirs.read_u32().await.unwrap(), round);
    }
}

#[tokio::test]
async fn a_ticket_behind_the_handshake_is_kept() {
    let (client, server) = configs();
    let mut client = Arc::unwrap_or_clone(client);
    client.resumption = Resumption::in_memory_sessions(8);
    let mut server = Arc::unwrap_or_clone(server);
    server.send_tls13_tickets = 2;
    server.session_storage = ServerSessionMemoryCache::new(8);
    let (client, server) = (Arc::new(client), Arc::new(server));
    for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
        let (ours, mut theirs) = dial(Arc::clone(&client), Arc::clone(&server)).await;
        assert_eq!(ours.session.kind, kind);
        // The ticket comes before it.
        theirs.write_all(b"data").await.unwrap();
        theirs.flush().await.unwrap();
        let mut ours = ours.stream;
        ours.read_exact(&mut [0; 4]).await.unwrap();
    }
}

/// What a client says last in the handshake, with data right behind it; where the data begins.
async fn finished_with(data: &[u8], client: Arc<ClientConfig>, tcp: &mut TcpStream) -> (Vec<u8>, usize) {
    let mut rustls = rustls::ClientConnection::new(client, name()).unwrap();
    let mut flight = Vec::new();
    rustls.write_tls(&mut flight).unwrap();
    tcp.write_all(&flight).await.unwrap();
    while rustls.is_handshaking() {
        let mut read = vec![0; 64 * 1024];
        let length = tcp.read(&mut read).await.unwrap();
        rustls.read_tls(&mut &read[..length]).unwrap();
        rustls.process_new_packets().unwrap();
    }
    let mut last = Vec::new();
    while rustls.wants_write() {
        rustls.write_tls(&mut last).unwrap();
    }
    let begin = last.len();
    rustls.set_buffer_limit(None);
    rustls.writer().write_all(data).unwrap();
    rustls.send_close_notify();
    while rustls.wants_write() {
        rustls.write_tls(&mut last).unwrap();
    }
    (last, begin)
}

#[tokio::test]
async fn data_right_behind_the_handshake_may_be_cut_anywhere() {
    const RECORD: usize = 16_384 + 22;
    let data: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    for cut in [0, 1, 4, 5, 6, 40, RECORD - 1, RECORD, RECORD + 1, RECORD + 5, 2 * RECORD, 3 * RECORD + 77] {
        let (client, server) = configs();
        let (mut near, far) = tcp().await;
        let (done, established) = tokio::sync::oneshot::channel();
        let peer = async {
            let (bytes, begin) = finished_with(&data, client, &mut near).await;
            near.write_all(&bytes[..begin + cut]).await.unwrap();
            established.await.unwrap();
            near.write_all(&bytes[begin + cut..]).await.unwrap();
        };
        let ours = async {
            let mut ours = handshake::accept(server, far).await.unwrap().stream;
            done.send(()).unwrap();
            let mut got = Vec::new();
            ours.read_to_end(&mut got).await.unwrap();
            assert!(got == data, "cut at {cut}: {} bytes, or not the same", got.len());
        };
        tokio::join!(peer, ours);
    }
}

#[tokio::test]
async fn nothing_is_lost_when_it_ends_with_tcp_full() {
    // Full records, the last one too: more than TCP has room for when it says that it has some. And a
    // small window, without which TCP takes more than it has room for.
    let data: Vec<u8> = (0..6 * 6 * 16_384u32).map(|i| (i % 251) as u8).collect();
    for size in [4_608, 30_000, 300_000] {
        let (client, server) = configs();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        socket2::SockRef::from(&listener).set_recv_buffer_size(size).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        socket2::SockRef::from(&near).set_send_buffer_size(size).unwrap();
        let far = listener.accept().await.unwrap().0;
        let accepting = TlsAcceptor::from(server);
        let (ours, theirs) = tokio::join!(handshake::connect(client, name(), near), accepting.accept(far));
        let (mut ours, mut theirs) = (ours.unwrap().stream, theirs.unwrap());
        let send = async {
            for chunk in data.chunks(6 * 16_384) {
                ours.write_all(chunk).await.unwrap();
            }
            ours.shutdown().await.unwrap();
            drop(ours);
        };
        let mut got = Vec::new();
        let (_, received) = tokio::join!(send, theirs.read_to_end(&mut got));
        received.unwrap();
        assert!(got == data, "{} of {} bytes, or not the same", got.len(), data.len());
    }
}

#[tokio::test]
async fn an_end_is_clean_only_with_a_close_notify() {
    let (ours, mut theirs) = we_dial().await;
    let mut ours = ours.stream;
    theirs.shutdown().await.unwrap();
    assert_eq!(ours.read(&mut [0; 8]).await.unwrap(), 0);

    let (ours, mut theirs) = we_dial().await;
    let mut ours = ours.stream;
    theirs.write_all(b"x").await.unwrap();
    theirs.shutdown().await.unwrap();
    assert_eq!(ours.read(&mut [0; 1]).await.unwrap(), 1);
    assert_eq!(ours.read(&mut [0; 1]).await.unwrap(), 0, "with room for less than an alert");

    let (ours, theirs) = we_dial().await;
    let mut ours = ours.stream;
    drop(theirs.into_inner().0);
    assert_eq!(ours.read(&mut [0; 8]).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);

    let (ours, mut theirs) = we_dial().await;
    let mut ours = ours.stream;
    ours.shutdown().await.unwrap();
    assert_eq!(theirs.read(&mut [0; 8]).await.unwrap(), 0, "ours is one too");
}

/// What our end makes of raw bytes behind the handshake.
async fn after(raw: &[u8]) -> io::Error {
    let (ours, theirs) = we_accept().await;
    let mut ours: TlsStream = ours.stream;
    let (mut tcp, mut rustls) = theirs.into_inner();
    tcp.write_all(raw).await.unwrap();
    let error = ours.read(&mut [0; 64]).await.unwrap_err();
    let mut told = Vec::new();
    drop(ours);
    // An alert, sealed, then the end.
    let _ = tcp.read_to_end(&mut told).await;
    rustls.read_tls(&mut &told[..]).unwrap();
    let told = rustls.process_new_packets().unwrap_err();
    assert!(matches!(told, rustls::Error::AlertReceived(_)), "the peer is told: {told}");
    error
}

#[tokio::test]
async fn records_that_are_none_end_the_connection() {
    let mut forged = vec![23, 3, 3, 0, 40];
    forged.extend([7; 40]);
    for (what, raw) in [
        ("not sealed with the key", forged.as_slice()),
        ("plaintext", b"GET / HTTP/1.1\r\n\r\n"),
        ("a record of an unencrypted alert", &[21, 3, 3, 0, 2, 2, 40]),
        ("too long", &[23, 3, 3, 0xff, 0xff]),
        ("too short", &[23, 3, 3, 0, 3, 1, 2, 3]),
        ("another version", &[23, 9, 9, 0, 30]),
    ] {
        let error = after(raw).await;
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{what}: {error}");
    }
}

#[tokio::test]
async fn bytes_that_are_no_handshake_are_refused_in_either_role() {
    let (_, server) = configs();
    for raw in [&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], &[0xff; 4096], &[22, 3, 1, 0, 4, 1, 2, 3, 4]] {
        let (mut near, far) = tcp().await;
        near.write_all(raw).await.unwrap();
        let error = handshake::accept(Arc::clone(&server), far).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{raw:?}: {error}");
        let (client, _) = configs();
        let (near, mut far) = tcp().await;
        far.write_all(raw).await.unwrap();
        let error = handshake::connect(client, name(), near).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{raw:?}: {error}");
    }
    let (mut near, far) = tcp().await;
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(reason(&handshake::accept(server, far).await.unwrap_err()), Reason::Plaintext);
}
