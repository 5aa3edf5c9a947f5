//! The tunnel without the kernel side: pool, TLS, HBONE and relay between two ends on loopback.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod kernel;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hauberk::config::TunnelConfig;
use hauberk::hbone::client::Ask;
use hauberk::hbone::{Recv, Stream, server};
use hauberk::identity::bundle::TrustBundle;
use hauberk::identity::revocation::{Revocations, Serial, Subject};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::pool::dial::Dialer;
use hauberk::pool::{Key, Pool, Route, Seat};
use hauberk::relay;
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls;
use hauberk::tls::handshake::Established;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::Terms;
use hauberk::tls::verify::Expected;
use hauberk::trust::Trust;
use hauberk::verdict::Reason;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;

struct Root {
    issuer: Issuer<'static, KeyPair>,
    bundle: TrustBundle,
}

fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

fn root() -> Root {
    kernel::if_asked();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    let bundle = TrustBundle::new(domain(), vec![certificate.der().clone()]).unwrap();
    Root { issuer: Issuer::new(params, key), bundle }
}

fn id(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "test", name).unwrap()
}

fn svid(root: &Root, id: &SpiffeId) -> X509Svid {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    let certificate = params.signed_by(&key, &root.issuer).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let key = tls::provider::provider().key_provider.load_private_key(key).unwrap();
    X509Svid::new(vec![certificate.der().clone()], key).unwrap()
}

/// A peer that serves every stream by connecting to where it asks; counts its connections.
async fn peer(root: &Root, who: &str, window: u32) -> (SocketAddr, Arc<AtomicUsize>) {
    let (address, connections, _) = closable_peer(root, who, window).await;
    (address, connections)
}

/// The same; aborting what is returned last closes its listener, and no connection.
async fn closable_peer(
    root: &Root,
    who: &str,
    window: u32,
) -> (SocketAddr, Arc<AtomicUsize>, tokio::task::AbortHandle) {
    let config = tls::server::config(&svid(root, &id(who)), &root.bundle).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    let accepting = tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (config, count) = (Arc::clone(&config), Arc::clone(&count));
            tokio::spawn(async move {
                let Ok(established) = tls::handshake::accept(config, tcp).await else { return };
                count.fetch_add(1, Ordering::Relaxed);
                let mut connection = server::start(established.stream, window, 1000).await.unwrap();
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(serve(request, respond));
                }
            });
        }
    });
    (address, connections, accepting.abort_handle())
}

async fn serve(request: http::Request<h2::RecvStream>, respond: h2::server::SendResponse<bytes::Bytes>) {
    let asked = server::parse(&request).unwrap();
    match TcpStream::connect(asked.authority).await {
        Ok(mut app) => {
            let send = server::accept(respond).unwrap();
            let stream = Stream { send, recv: Recv::Open(request.into_body()), place: None, lease: None };
            relay::relay(&mut app, stream, std::future::pending()).await;
        }
        Err(_) => server::refuse(respond, request.into_body(), Reason::Refused),
    }
}

/// The dialling agent: applications connect to `listen`, and come out at `app` behind `peer`.
struct Near {
    listen: SocketAddr,
    trust: Arc<Trust>,
}

fn pool(root: &Root) -> (Arc<Trust>, Pool) {
    let trust = Trust::new(root.bundle.clone());
    trust.insert(svid(root, &id("client")));
    let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
    let tls = Memory::new(Some(tls::ticket::fleeting()), observe.clone());
    let dialer = Dialer::new(Arc::clone(&trust), tls, Arc::new(TunnelConfig::default()), observe);
    (trust, Pool::new(dialer, 1000, tokio::sync::broadcast::Sender::new(1), Seat::default()))
}

async fn near(root: &Root, peer: SocketAddr, who: &str, app: SocketAddr) -> Near {
    let (trust, pool) = pool(root);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listen = listener.local_addr().unwrap();
    let key = Key { source: id("client"), destination: id(who), address: peer };
    tokio::spawn(async move {
        while let Ok((mut tcp, source)) = listener.accept().await {
            let (pool, key) = (pool.clone(), key.clone());
            tokio::spawn(async move {
                let route = Route { workload: key, node: None };
                match pool.open(&route, Ask { authority: app, source }, Instant::now()).await {
                    Ok(stream) => drop(relay::relay(&mut tcp, stream, std::future::pending()).await),
                    Err(_) => relay::reset(&tcp),
                }
            });
        }
    });
    Near { listen, trust }
}

async fn echo_app() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = tcp.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            });
        }
    });
    address
}

#[tokio::test]
async fn bytes_arrive_whole_in_both_directions_and_ends_are_passed_on() {
    let root = root();
    let (address, _) = peer(&root, "server", 1 << 20).await;
    let near = near(&root, address, "server", echo_app().await).await;
    let sent: Vec<u8> = (0..16 << 20).map(|i: u32| (i % 251) as u8).collect();
    let mut tcp = TcpStream::connect(near.listen).await.unwrap();
    let (mut read, mut write) = tcp.split();
    let mut received = Vec::new();
    let (written, got) = tokio::join!(
        async {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await
        },
        read.read_to_end(&mut received)
    );
    written.unwrap();
    got.unwrap();
    assert!(received == sent, "{} of {} bytes came back, or not the same", received.len(), sent.len());
}

#[tokio::test]
async fn streams_share_one_connection_and_a_new_svid_takes_a_new_one() {
    let root = root();
    let (address, connections) = peer(&root, "server", 1 << 20).await;
    let near = near(&root, address, "server", echo_app().await).await;
    let mut open = Vec::new();
    for _ in 0..200 {
        open.push(TcpStream::connect(near.listen).await.unwrap());
    }
    async fn ping(tcp: &mut TcpStream) {
        tcp.write_all(b"x").await.unwrap();
        assert_eq!(tcp.read_u8().await.unwrap(), b'x');
    }
    for tcp in &mut open {
        ping(tcp).await;
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1, "200 streams share one connection");
    near.trust.insert(svid(&root, &id("client")));
    let mut fresh = TcpStream::connect(near.listen).await.unwrap();
    ping(&mut fresh).await;
    assert_eq!(connections.load(Ordering::Relaxed), 2, "the renewed SVID made a connection of its own");
    for tcp in &mut open {
        ping(tcp).await;
    }
}

#[tokio::test]
async fn a_new_stream_keeps_off_a_connection_that_carries_bulk() {
    let root = root();
    let (address, connections, listener) = closable_peer(&root, "server", 1 << 20).await;
    let (_, pool) = pool(&root);
    let key = Key { source: id("client"), destination: id("server"), address };
    let route = Route { workload: key, node: None };
    let ask = Ask { authority: echo_app().await, source: "10.0.0.1:1".parse().unwrap() };
    let open = async || pool.open(&route, ask, Instant::now()).await.unwrap();
    let is_bulk = |stream: &Stream| {
        // Far ahead, so that it stays bulk however slow the test is.
        let now = Instant::now() + Duration::from_secs(60);
        let place = stream.place.as_ref().unwrap();
        place.moved(64 << 20, || now);
        place.moved(64 << 20, || now);
    };
    let (first, beside) = (open().await, open().await);
    assert_eq!(connections.load(Ordering::Relaxed), 1, "two small streams share a connection");
    is_bulk(&first);
    let (apart, with) = (open().await, open().await);
    assert_eq!(connections.load(Ordering::Relaxed), 2, "what is new shares one without bulk");
    listener.abort();
    is_bulk(&apart);
    let crowded = open().await;
    assert_eq!(connections.load(Ordering::Relaxed), 2, "where no more can be had, bulk is put up with");
    drop((first, beside, apart, with, crowded));
}

/// A peer as an agent is one, whose tunnels end with their first stream; says of each whether it
/// resumed a session.
async fn fickle_peer(root: &Root) -> (SocketAddr, mpsc::UnboundedReceiver<bool>) {
    let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
    let memory = Memory::new(Some(tls::ticket::fleeting()), observe);
    let svid = svid(root, &id("server"));
    let roots = memory.roots(&root.bundle, 1).unwrap();
    let terms = Terms {
        svid: &svid,
        roots: &roots,
        peers: Expected::Member,
        judge: None,
        alpn: &[tls::ALPN_H2],
        place: &[b"test"],
        mode: "strict",
    };
    let tunnels = memory.listener(&terms).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (tell, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = socket.accept().await {
            let (config, judged) = tunnels.accept();
            let Established { stream, session } = tls::handshake::accept(config, tcp).await.unwrap();
            let settled = judged.settle(Some(session.kind), session.peer_chain()).unwrap();
            tell.send(settled.resumed).unwrap();
            let mut connection = server::start(stream, 1 << 20, 1000).await.unwrap();
            let (request, respond) = connection.accept().await.unwrap().unwrap();
            let stream = tokio::spawn(serve(request, respond));
            tokio::select! {
                _ = connection.accept() => {}
                _ = stream => {}
            }
        }
    });
    (address, told)
}

#[tokio::test]
async fn a_tunnel_that_broke_is_made_again_by_resuming_its_session() {
    let root = root();
    let (address, mut resumed) = fickle_peer(&root).await;
    let near = near(&root, address, "server", echo_app().await).await;
    for expected in [false, true, true, true] {
        let mut tcp = TcpStream::connect(near.listen).await.unwrap();
        tcp.write_all(b"x").await.unwrap();
        assert_eq!(tcp.read_u8().await.unwrap(), b'x');
        assert_eq!(resumed.recv().await, Some(expected));
        drop(tcp);
        // The next stream must not be opened on the tunnel that is about to end.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    near.trust.insert(svid(&root, &id("client")));
    let mut tcp = TcpStream::connect(near.listen).await.unwrap();
    tcp.write_all(b"x").await.unwrap();
    assert_eq!(tcp.read_u8().await.unwrap(), b'x');
    assert_eq!(resumed.recv().await, Some(false), "a renewed SVID proves itself");
}

#[tokio::test]
async fn the_wrong_identity_and_a_refused_port_are_resets() {
    let root = root();
    let (address, _) = peer(&root, "impostor", 1 << 20).await;
    let wrong = near(&root, address, "server", echo_app().await).await;
    let mut tcp = TcpStream::connect(wrong.listen).await.unwrap();
    let error = tcp.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let closed = { TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap() };
    let refused = near(&root, address, "impostor", closed).await;
    let mut tcp = TcpStream::connect(refused.listen).await.unwrap();
    let error = tcp.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_is_a_reset_at_the_other_end_in_both_directions() {
    let root = root();
    let (address, _) = peer(&root, "server", 1 << 20).await;
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = near(&root, address, "server", app.local_addr().unwrap()).await;
    for client_resets in [true, false] {
        let mut client = TcpStream::connect(near.listen).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        let (mut served, _) = app.accept().await.unwrap();
        let mut hello = [0; 5];
        served.read_exact(&mut hello).await.unwrap();
        let mut left = if client_resets {
            relay::reset(&client);
            drop(client);
            served
        } else {
            relay::reset(&served);
            drop(served);
            client
        };
        let read = tokio::time::timeout(Duration::from_secs(2), left.read_u8()).await;
        let error = read.expect("the reset arrives at once").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "client_resets={client_resets}");
    }
}

#[tokio::test]
async fn a_stalled_reader_holds_a_window_and_hurts_no_other_stream() {
    let root = root();
    let window = 1 << 18;
    let (address, _) = peer(&root, "server", window).await;
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = near(&root, address, "server", app.local_addr().unwrap()).await;
    let mut stalled = TcpStream::connect(near.listen).await.unwrap();
    stalled.write_all(b"x").await.unwrap();
    let (_never_read, _) = app.accept().await.unwrap();
    // One byte at a time is the dearest way to fill a window.
    let mut written = 0usize;
    let chunk = [7u8; 64 * 1024];
    while let Ok(Ok(n)) = tokio::time::timeout(Duration::from_millis(500), stalled.write(&chunk)).await {
        written += n;
        assert!(written < 64 << 20, "a stalled reader must push back");
    }
    let mut other = TcpStream::connect(near.listen).await.unwrap();
    let (mut served, _) = app.accept().await.unwrap();
    other.write_all(&chunk).await.unwrap();
    let mut got = vec![0; chunk.len()];
    let read = tokio::time::timeout(Duration::from_secs(2), served.read_exact(&mut got)).await;
    read.expect("another stream is not held up").unwrap();
}

/// A list that revokes this.
fn revoking(subject: Subject) -> Revocations {
    let mut list = Revocations::default();
    list.revoke(subject, std::time::SystemTime::now()).unwrap();
    list
}

/// How a handshake ends for the client and for the server.
async fn shake(
    client: Arc<rustls::ClientConfig>,
    server: Arc<rustls::ServerConfig>,
) -> (Result<(), Reason>, Result<(), Reason>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let name = rustls::pki_types::ServerName::try_from("unused").unwrap();
    let reason = |error: std::io::Error| tls::reason(&error);
    let accepting = async {
        let mut tls = TlsAcceptor::from(server).accept(far).await.map_err(reason)?;
        // The client has gone through with it when this comes.
        tls.read_u8().await.map_err(reason)?;
        tls.shutdown().await.map_err(reason)
    };
    let connecting = async {
        let connector = tokio_rustls::TlsConnector::from(client);
        let mut tls = connector.connect(name, near).await.map_err(reason)?;
        tls.write_all(b"x").await.map_err(reason)?;
        // TLS 1.3 tells a client that it was refused only when it reads.
        match tls.read(&mut [0]).await {
            Ok(_) => Ok(()),
            Err(error) => Err(reason(error)),
        }
    };
    let (connected, accepted) = tokio::join!(connecting, accepting);
    (connected, accepted)
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_from_either_side_and_both_are_told_why() {
    let root = root();
    let (client, server) = (svid(&root, &id("client")), svid(&root, &id("server")));
    let with = |subject: Option<Subject>| {
        let list = subject.map(revoking).unwrap_or_default();
        root.bundle.clone().with_revocations(Arc::new(list))
    };
    let handshake = |at_client: Option<Subject>, at_server: Option<Subject>| {
        let client = tls::client::config(&client, &with(at_client), id("server")).unwrap();
        let server = tls::server::config(&server, &with(at_server)).unwrap();
        shake(client, server)
    };
    let serial = |svid: &X509Svid| Some(Subject::Serial(Serial::parse(&svid.leaf().serial).unwrap()));
    let by_id = |name: &str| Some(Subject::SpiffeId(id(name)));

    assert_eq!(handshake(None, None).await, (Ok(()), Ok(())), "nobody is revoked");
    let other = svid(&root, &id("client"));
    assert_ne!(other.leaf().serial, client.leaf().serial);
    let others = (by_id("server"), serial(&other));
    assert_eq!(
        handshake(others.1, others.0).await,
        (Ok(()), Ok(())),
        "others' revocations concern nobody here"
    );
    for at_server in [by_id("client"), serial(&client)] {
        let said = format!("{at_server:?}");
        let ends = handshake(None, at_server).await;
        assert_eq!(ends, (Err(Reason::Revoked), Err(Reason::Revoked)), "the client: {said}");
    }
    for at_client in [by_id("server"), serial(&server)] {
        let said = format!("{at_client:?}");
        let ends = handshake(at_client, None).await;
        assert_eq!(ends, (Err(Reason::Revoked), Err(Reason::Revoked)), "the server: {said}");
    }
}

#[tokio::test]
async fn a_revocation_resets_live_streams_and_lets_no_new_one_in() {
    let root = root();
    let (address, connections) = peer(&root, "server", 1 << 20).await;
    for revoked in ["server", "client"] {
        let near = near(&root, address, "server", echo_app().await).await;
        let mut live = TcpStream::connect(near.listen).await.unwrap();
        live.write_all(b"x").await.unwrap();
        assert_eq!(live.read_u8().await.unwrap(), b'x');
        let before = connections.load(Ordering::Relaxed);

        // Somebody else's revocation neither cuts the tunnel nor has it dialled anew.
        near.trust.set_revocations(revoking(Subject::SpiffeId(id("somebody"))));
        let mut second = TcpStream::connect(near.listen).await.unwrap();
        for tcp in [&mut live, &mut second] {
            tcp.write_all(b"y").await.unwrap();
            assert_eq!(tcp.read_u8().await.unwrap(), b'y', "{revoked}");
        }
        assert_eq!(connections.load(Ordering::Relaxed), before, "the tunnel is still the same");

        let mut list = Revocations::clone(near.trust.snapshot().bundle.revocations());
        list.revoke(Subject::SpiffeId(id(revoked)), std::time::SystemTime::now()).unwrap();
        near.trust.set_revocations(list);
        for tcp in [&mut live, &mut second] {
            let ended = tokio::time::timeout(Duration::from_secs(1), tcp.read_u8()).await;
            let error = ended.expect("within a second").unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{revoked}");
        }
        let mut late = TcpStream::connect(near.listen).await.unwrap();
        let error = late.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{revoked} stays out");
    }
}
