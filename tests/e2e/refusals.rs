//! Hostile and broken peers at the tunnel's port: each is refused, for a reason that the operator
//! sees, and the next honest connection works.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod siege;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hauberk::ca::{Ca, ProvenKey};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls;
use http::{Method, Request, StatusCode};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use siege::{HOUR, Siege, domain, id};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

fn lay() -> Siege {
    Siege::of(|world| world.ghost("impostor", "192.168.60.2"))
}

/// The server's own tunnel.
fn tunnel(siege: &Siege) -> SocketAddr {
    siege.world.get("server").v4(15008).parse().unwrap()
}

/// TLS as the configuration says; then reads, as TLS 1.3 tells a client of its refusal only then.
async fn shake(to: SocketAddr, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(to).await?;
    TlsConnector::from(config).connect(ServerName::IpAddress(to.ip().into()), tcp).await
}

/// Whether the server lets the connection live: it sends its HTTP/2 settings, or an alert.
async fn is_let_in(to: SocketAddr, config: Arc<ClientConfig>) -> bool {
    match shake(to, config).await {
        Ok(mut tls) => matches!(tls.read(&mut [0; 64]).await, Ok(length) if length > 0),
        Err(_) => false,
    }
}

#[test]
fn peers_that_cannot_prove_who_they_are() {
    let siege = lay();
    let (to, now) = (tunnel(&siege), SystemTime::now());
    let bundle = siege.ca.bundle();
    let with = |svid: &X509Svid| tls::client::config(svid, bundle, id("server")).unwrap();

    let nobody = tls::client::anonymous(bundle, id("server"), tls::ALPN_H2).unwrap();
    assert!(!siege.attack(is_let_in(to, nobody)));
    siege.refused_for("no_client_certificate", 1);

    let expired = siege.svid_of(&id("client"), now - 2 * HOUR);
    assert!(!siege.attack(is_let_in(to, with(&expired))));
    siege.refused_for("expired", 1);

    let early = siege.svid_of(&id("client"), now + HOUR);
    assert!(!siege.attack(is_let_in(to, with(&early))));
    siege.refused_for("not_yet_valid", 1);

    // The right name from another CA.
    let other = Ca::from_pem(domain(), &hauberk::ca::create_root(&domain(), now).unwrap()).unwrap();
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    let forged = key.with_chain(other.issue(&proven, &id("client"), HOUR, now).unwrap()).unwrap();
    assert!(!siege.attack(is_let_in(to, with(&forged))));
    siege.refused_for("unknown_issuer", 1);

    // Another trust domain's name from our CA.
    let pem = siege.world.root_pem().unwrap();
    let foreign_domain = TrustDomain::parse("elsewhere.test").unwrap();
    let foreign = Ca::from_pem(foreign_domain.clone(), &pem).unwrap();
    let foreign_id = SpiffeId::workload(&foreign_domain, "demo", "client").unwrap();
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    let foreign = key.with_chain(foreign.issue(&proven, &foreign_id, HOUR, now).unwrap()).unwrap();
    assert!(!siege.attack(is_let_in(to, with(&foreign))));
    siege.refused_for("other_trust_domain", 1);

    assert!(siege.attack(is_let_in(to, with(&siege.svid_of(&id("client"), now)))), "a good one is let in");
    siege.still_serves();
}

#[test]
fn bytes_that_are_no_tls_or_too_old_or_too_slow() {
    let siege = lay();
    let to = tunnel(&siege);
    let dropped = |bytes: &'static [u8]| {
        siege.attack(async move {
            let mut tcp = TcpStream::connect(to).await.unwrap();
            tcp.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            // A reset is as good as an end.
            let _ = tcp.read_to_end(&mut answer).await;
            assert!(answer.len() < 64, "an alert at most");
        });
    };
    dropped(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n");
    siege.refused_for("plaintext", 1);
    dropped(&[0xff; 4096]);
    // A ClientHello that offers TLS 1.2 and nothing newer.
    dropped(include_bytes!("tls12_client_hello.bin"));
    siege.refused_for("tls_version", 1);
    // Nothing at all: the deadline is the only thing that ends it.
    dropped(b"");
    siege.refused_for("handshake_timeout", 1);
    // A record that never ends.
    dropped(&[22, 3, 1, 0x40, 0x00, 1, 0, 0x3f, 0xfc]);
    siege.still_serves();
}

/// Dials the server with a good certificate.
fn as_client(siege: &Siege) -> Arc<ClientConfig> {
    let svid = siege.svid_of(&id("client"), SystemTime::now());
    tls::client::config(&svid, siege.ca.bundle(), id("server")).unwrap()
}

#[test]
fn requests_that_no_authenticated_peer_may_make() {
    let siege = lay();
    let to = tunnel(&siege);
    let config = as_client(&siege);
    let server = siege.world.get("server");
    let (far, hbone, listener) = (siege.world.get("client").v4(80), server.v4(15008), server.v4(15001));
    let statuses = siege.attack(async {
        let (mut send, connection) = h2::client::handshake(shake(to, config).await.unwrap()).await.unwrap();
        tokio::spawn(connection);
        let mut statuses = Vec::new();
        for authority in [far.as_str(), &hbone, &listener, "web.demo:80", "127.0.0.1:80"] {
            let request = Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap();
            let (response, _body) = send.send_request(request, false).unwrap();
            statuses.push(response.await.unwrap().status());
        }
        let get = Request::get(format!("https://{}/", hbone)).body(()).unwrap();
        statuses.push(send.send_request(get, true).unwrap().0.await.unwrap().status());
        statuses
    });
    use StatusCode as S;
    let expected = [S::FORBIDDEN, S::FORBIDDEN, S::FORBIDDEN, S::BAD_REQUEST, S::FORBIDDEN, S::BAD_REQUEST];
    assert_eq!(statuses, expected);
    for reason in ["not_local", "agent_port", "bad_request"] {
        siege.refused_for(reason, 1);
    }
    siege.still_serves();
}

#[test]
fn a_source_address_is_believed_only_from_the_one_who_has_it() {
    let siege = lay();
    let server = siege.world.get("server");
    let _whoami = server.host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let (to, app, client) = (tunnel(&siege), server.v4(8080), siege.world.get("client").v4);
    let now = SystemTime::now();
    let mut seen = Vec::new();
    for (who, claims) in
        [("client", client.to_string()), ("impostor", client.to_string()), ("client", "8.8.8.8".into())]
    {
        let config =
            tls::client::config(&siege.svid_of(&id(who), now), siege.ca.bundle(), id("server")).unwrap();
        seen.push(siege.attack(async {
            let (mut send, connection) =
                h2::client::handshake(shake(to, config).await.unwrap()).await.unwrap();
            tokio::spawn(connection);
            let request = Request::builder()
                .method(Method::CONNECT)
                .uri(app.as_str())
                .header("forwarded", format!("for=\"{claims}:7777\""));
            let (response, _sending) = send.send_request(request.body(()).unwrap(), false).unwrap();
            let mut body = response.await.unwrap().into_body();
            String::from_utf8(body.data().await.unwrap().unwrap().to_vec()).unwrap()
        }));
    }
    assert!(seen[0].contains(&format!("{client}:7777")), "its own address: {}", seen[0]);
    assert!(seen[1].contains("192.168.60.2:"), "another's address: {}", seen[1]);
    assert!(seen[2].contains("192.168.60.2:"), "an address of nobody: {}", seen[2]);
}

#[test]
fn http_2_abuse_ends_the_abusers_connection_only() {
    let siege = lay();
    let to = tunnel(&siege);
    let config = as_client(&siege);
    let app = siege.world.get("server").v4(9);

    // Headers without end.
    let config2 = Arc::clone(&config);
    let refused = siege.attack(async {
        let (mut send, connection) = h2::client::handshake(shake(to, config2).await.unwrap()).await.unwrap();
        tokio::spawn(connection);
        let large = "x".repeat(64 * 1024);
        let request = Request::builder().method(Method::CONNECT).uri(app.as_str()).header("large", large);
        match send.send_request(request.body(()).unwrap(), true) {
            Ok((response, _)) => response.await.map(|r| r.status().is_client_error()).unwrap_or(true),
            Err(_) => true,
        }
    });
    assert!(refused, "64 KiB of headers");

    // Rapid reset (CVE-2023-44487): streams opened and reset in one breath.
    let config3 = Arc::clone(&config);
    let ended = siege.attack(async {
        let (send, connection) = h2::client::Builder::new()
            .handshake::<_, Bytes>(shake(to, config3).await.unwrap())
            .await
            .unwrap();
        let mut driver = tokio::spawn(connection);
        for _ in 0..50 {
            for _ in 0..100 {
                let Ok(mut ready) = send.clone().ready().await else { break };
                let request = Request::builder().method(Method::CONNECT).uri(app.as_str()).body(()).unwrap();
                let Ok((_, mut stream)) = ready.send_request(request, false) else { break };
                stream.send_reset(h2::Reason::CANCEL);
            }
            tokio::task::yield_now().await;
            if driver.is_finished() {
                break;
            }
        }
        tokio::time::timeout(Duration::from_secs(5), &mut driver).await
    });
    let error = ended.expect("the connection is ended").unwrap().expect_err("by an error");
    // Its own writes may fail before it reads the reason.
    assert!(error.is_io() || error.reason() == Some(h2::Reason::ENHANCE_YOUR_CALM), "{error}");
    siege.refused_for("http2", 1);

    // No HTTP/2 at all behind good TLS.
    siege.attack(async {
        let mut tls = shake(to, config).await.unwrap();
        let garbage: Vec<u8> = (0..20_000u32).map(|i| ((i * 7919) >> 3) as u8).collect();
        let _ = tls.write_all(&garbage).await;
        let mut answer = Vec::new();
        let _ = tls.read_to_end(&mut answer).await;
    });
    siege.still_serves();
}

#[test]
fn a_server_that_is_not_who_the_directory_says_gets_no_byte() {
    let siege = lay();
    // Holds a good SVID of the mesh, but not the impostor's whose address it has.
    let config =
        tls::server::config(&siege.svid_of(&id("client"), SystemTime::now()), siege.ca.bundle()).unwrap();
    let serving = siege
        .world
        .host("out")
        .inside(|| std::net::TcpListener::bind("192.168.60.2:15008").unwrap())
        .unwrap();
    let acceptor = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async move {
            serving.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(serving).unwrap();
            let (tcp, _) = listener.accept().await.unwrap();
            tokio_rustls::TlsAcceptor::from(config).accept(tcp).await.is_ok()
        })
    });
    let seen = siege.world.get("client").host.actor(&["poke", "192.168.60.2:80"]).unwrap();
    assert!(seen["end"] == "reset" || seen["connect"] == "reset", "{seen}");
    assert!(!acceptor.join().unwrap(), "the handshake did not succeed");
    let label = ["outbound", "reason=\"wrong_identity\""];
    siege.world.agent_ref("n1").wait_metric("hauberk_connections_total", &label, 1.0).unwrap();
    let log = siege.world.agent_ref("n1").log();
    assert!(log.contains("sa/impostor must answer there"), "the log names both identities: {log}");
    siege.still_serves();
}
