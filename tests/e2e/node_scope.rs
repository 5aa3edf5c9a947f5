//! Hostile and odd peers in node scope: a node with a good certificate is believed only what its workloads
//! prove, and a node that proves nothing gets no byte of an application.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod intruder;
mod siege;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use hauberk::hbone::PROOF_HEADER;
use hauberk::identity::SpiffeId;
use hauberk::identity::svid::X509Svid;
use hauberk::proof::{Binding, Side, prove};
use hauberk::tls::handshake::{self, Established};
use hauberk::tls::{self, ALPN_H2, ALPN_NODE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use intruder::{NODE, lay, node};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use siege::{HOUR, Siege, id};
use tests::{Agent, Mode, Options, World};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};

/// Where the directory has the node `evil`, and its workload `mole`.
const EVIL: &str = "192.168.60.2:15008";
const MOLE: &str = "192.168.60.3:15008";

fn told(agent: &Agent, words: &str) {
    let log = agent.log();
    assert!(log.lines().any(|line| line.contains(words)), "the log tells {words}:\n{}", agent.log_tail(10));
}

#[test]
fn a_node_is_believed_only_what_a_workload_of_it_proves_on_this_very_connection() {
    let siege = lay();
    let server = siege.world.get("server");
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let (mole, rat, client) = (id("mole"), id("rat"), id("client"));
    let [key, evil, stolen] = [&mole, &node("evil"), &client].map(|id| siege.svid(id));
    let expired = siege.svid_of(&rat, SystemTime::now() - 2 * HOUR);
    siege.attack(async {
        let (one, other) = (siege.intrude("evil").await, siege.intrude("evil").await);
        let unlisted = siege.intrude("nowhere").await;
        let to = server.v4(8081);
        let backwards = prove(&key, &one.binding, Side::Server).unwrap();
        // A proof that another node has made for its own connection, as an unknown key share would.
        let shared = Binding { client: node("n1"), ..one.binding.clone() };
        let shared = prove(&key, &shared, Side::Client).unwrap();
        let cases = [
            ("no source", &one, None, None, "unproven"),
            ("no proof", &one, Some(&mole), None, "unproven"),
            ("another connection's proof", &one, Some(&mole), Some(other.proves(&key)), "bad_proof"),
            ("a server's proof", &one, Some(&mole), Some(backwards), "bad_proof"),
            ("another node's proof", &one, Some(&mole), Some(shared), "bad_proof"),
            ("another source's proof", &one, Some(&rat), Some(one.proves(&key)), "bad_proof"),
            ("a node's own identity", &one, Some(&evil.id().clone()), Some(one.proves(&evil)), "bad_proof"),
            ("an expired certificate", &one, Some(&rat), Some(one.proves(&expired)), "expired"),
            ("a key stolen from node 1", &one, Some(&client), Some(one.proves(&stolen)), "not_placed"),
            ("a node nobody lists", &unlisted, Some(&mole), Some(unlisted.proves(&key)), "not_placed"),
            ("its own workload", &one, Some(&mole), Some(one.proves(&key)), "200"),
            ("and once it is proven", &one, Some(&mole), None, "200"),
            ("proven on the other only", &other, Some(&mole), None, "unproven"),
        ]
        .map(|(what, on, source, proof, expected)| (what, on, source.cloned(), proof, expected));
        for (what, on, source, proof, expected) in cases {
            let answer = on.ask(&to, source.as_ref(), proof.as_deref()).await.unwrap();
            assert_eq!(answer, expected, "{what}");
        }
    });
    for (reason, times) in [("unproven", 3), ("bad_proof", 5), ("expired", 1), ("not_placed", 2)] {
        siege.refused_for(reason, times);
    }
    for detail in ["was not signed for this connection", "sa/mole, the stream of", "on node evil"] {
        told(siege.world.agent_ref("n2"), detail);
    }
    siege.still_serves();
}

#[test]
fn a_proven_workload_reaches_nothing_but_the_applications_of_this_nodes_pods() {
    let siege = lay();
    let (server, far) = (siege.world.get("server"), siege.world.get("client").v4(80));
    let (mole, key) = (id("mole"), siege.svid(&id("mole")));
    siege.attack(async {
        let evil = siege.intrude("evil").await;
        let proof = evil.proves(&key);
        for (to, expected) in [
            (far.as_str(), "not_local"),
            (NODE, "not_local"),
            ("127.0.0.1:15020", "not_local"),
            (&server.v4(15008), "agent_port"),
            (&server.v4(15001), "agent_port"),
            ("web.demo:80", "bad_request"),
        ] {
            assert_eq!(evil.ask(to, Some(&mole), Some(&proof)).await.unwrap(), expected, "{to}");
        }
    });
    for (reason, times) in [("not_local", 3), ("agent_port", 2), ("bad_request", 1)] {
        siege.refused_for(reason, times);
    }
    siege.still_serves();
}

#[test]
fn a_stream_reaches_only_the_workload_that_it_is_for() {
    let siege = lay();
    let server = siege.world.get("server");
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let (to, mole, key) = (server.v4(8081), id("mole"), siege.svid(&id("mole")));
    siege.attack(async {
        let evil = siege.intrude("evil").await;
        let proof = evil.proves(&key);
        for (destination, expected) in
            [(Some(id("server")), "200"), (Some(id("former")), "wrong_identity"), (None, "bad_request")]
        {
            let answer = evil.ask_for(destination.as_ref(), &to, Some(&mole), Some(&proof)).await.unwrap();
            assert_eq!(answer, expected, "for {destination:?}");
        }
    });
    siege.refused_for("wrong_identity", 1);
    siege.refused_for("bad_request", 1);
    told(siege.world.agent_ref("n2"), "at its address is spiffe://");
    siege.still_serves();
}

#[test]
fn proofs_that_are_none_end_the_connection_and_large_ones_the_stream() {
    let siege = lay();
    let (to, mole, key) = (siege.world.get("server").v4(8081), id("mole"), siege.svid(&id("mole")));
    siege.attack(async {
        let evil = siege.intrude("evil").await;
        for tried in 0..16 {
            let answer = evil.ask(&to, Some(&mole), Some("AQ")).await.unwrap();
            assert_eq!(answer, "bad_proof", "after {tried}");
        }
        let proof = evil.proves(&key);
        evil.ask(&to, Some(&mole), Some(&proof)).await.expect_err("also a good proof comes too late");

        let evil = siege.intrude("evil").await;
        let large = "A".repeat(13 * 1024);
        assert_eq!(evil.ask(&to, Some(&mole), Some(&large)).await.unwrap(), "bad_proof", "13 KiB");
        let larger = "A".repeat(20 * 1024);
        match evil.ask(&to, Some(&mole), Some(&larger)).await {
            Ok(answer) => assert_eq!(answer, "431", "20 KiB"),
            Err(error) => assert!(error.is_remote(), "20 KiB: {error}"),
        }
    });
    siege.refused_for("bad_proof", 17);
    siege.refused_for("http2", 1);
    told(siege.world.agent_ref("n2"), "too many identity proofs that prove nothing");
    siege.still_serves();
}

/// Whether a server lets the connection live: it sends its HTTP/2 settings, or an alert.
async fn is_let_in(to: &str, config: Arc<ClientConfig>) -> bool {
    let to: SocketAddr = to.parse().unwrap();
    let tcp = TcpStream::connect(to).await.unwrap();
    let name = ServerName::IpAddress(to.ip().into());
    let Ok(mut made) = handshake::connect(config, name, tcp).await else { return false };
    matches!(made.stream.read(&mut [0; 64]).await, Ok(length) if length > 0)
}

#[test]
fn nodes_and_workloads_are_let_in_at_their_own_listeners_with_their_own_protocol_only() {
    let siege = lay();
    let pod = siege.world.get("server").v4(15008);
    let (evil, mole) = (siege.svid(&node("evil")), siege.svid(&id("mole")));
    let try_in = |to: &str, svid: &X509Svid, expected: SpiffeId, alpn: &[&[u8]]| {
        siege.attack(is_let_in(to, siege.dials(svid, expected, alpn)))
    };
    assert!(!try_in(NODE, &mole, node("n2"), &[ALPN_NODE]), "a workload as a node");
    siege.refused_for("wrong_identity", 1);
    assert!(!try_in(NODE, &evil, node("n2"), &[ALPN_H2]), "HBONE at a node");
    assert!(!try_in(NODE, &evil, node("n2"), &[]), "no protocol at a node");
    assert!(!try_in(&pod, &mole, id("server"), &[ALPN_NODE]), "node scope at a pod");
    siege.refused_for("no_protocol", 3);
    assert!(!try_in(&pod, &evil, id("server"), &[ALPN_H2]), "a node as a workload");
    siege.refused_for("wrong_identity", 2);
    assert!(try_in(NODE, &evil, node("n2"), &[ALPN_NODE]), "a node is let in at a node");
    assert!(try_in(&pod, &mole, id("server"), &[ALPN_H2]), "a workload is let in at a pod");
    siege.still_serves();
}

/// How a fake agent answers for `mole`.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// Grants the stream, and sends the opener's own proof back.
    Reflected,
    /// Grants the stream without a word of who grants it.
    Unproven,
    /// Proves another workload.
    Other,
    /// Proves `mole`.
    Good,
}

/// What a fake agent has, and what it has got.
struct Fake {
    answer: Mutex<Answer>,
    node: SpiffeId,
    mole: X509Svid,
    rat: X509Svid,
    streams: AtomicUsize,
    payload: AtomicUsize,
}

impl Siege {
    /// A fake agent at an address of the outside host; it serves until the test process ends.
    fn fake(&self, at: &'static str, svid: &X509Svid, alpn: &[u8], answer: Answer) -> Arc<Fake> {
        let config = tls::server::config(svid, self.ca.bundle()).unwrap();
        let mut config = ServerConfig::clone(&config);
        config.alpn_protocols = vec![alpn.to_vec()];
        let (answer, node) = (Mutex::new(answer), svid.id().clone());
        let [mole, rat] = ["mole", "rat"].map(|name| self.svid(&id(name)));
        let (streams, payload) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let fake = Arc::new(Fake { answer, node, mole, rat, streams, payload });
        let listener = self.world.host("out").inside(|| std::net::TcpListener::bind(at).unwrap()).unwrap();
        let (serving, config) = (Arc::clone(&fake), Arc::new(config));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                listener.set_nonblocking(true).unwrap();
                let listener = TcpListener::from_std(listener).unwrap();
                while let Ok((tcp, _)) = listener.accept().await {
                    tokio::spawn(Arc::clone(&serving).tunnel(Arc::clone(&config), tcp));
                }
            });
        });
        fake
    }

    /// A client's application sends a byte to `mole`; how that ends.
    fn poke(&self) -> serde_json::Value {
        let seen = self.world.get("client").host.actor(&["poke", "192.168.60.3:80"]).unwrap();
        // A reset may be so quick that connect() already reports it.
        if seen["connect"] == "ok" { seen["end"].clone() } else { seen["connect"].clone() }
    }
}

impl Fake {
    async fn tunnel(self: Arc<Self>, config: Arc<ServerConfig>, tcp: TcpStream) {
        let Ok(Established { stream, session }) = handshake::accept(config, tcp).await else { return };
        let binding = Binding { exporter: session.exporter, client: node("n1"), server: self.node.clone() };
        let mut connection = h2::server::handshake(stream).await.unwrap();
        while let Some(Ok((request, respond))) = connection.accept().await {
            tokio::spawn(Arc::clone(&self).grant(binding.clone(), request, respond));
        }
    }

    async fn grant(
        self: Arc<Self>,
        binding: Binding,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
    ) {
        if request.method() == Method::OPTIONS {
            // It does not want to be introduced: what is asked here is how streams end.
            let refusal = Response::builder().status(StatusCode::METHOD_NOT_ALLOWED).body(()).unwrap();
            let _ = respond.send_response(refusal, true);
            return;
        }
        self.streams.fetch_add(1, Ordering::Relaxed);
        let proven = |svid| HeaderValue::from_str(&prove(svid, &binding, Side::Server).unwrap()).unwrap();
        let proof = match *self.answer.lock().unwrap() {
            Answer::Reflected => Some(request.headers()[PROOF_HEADER].clone()),
            Answer::Unproven => None,
            Answer::Other => Some(proven(&self.rat)),
            Answer::Good => Some(proven(&self.mole)),
        };
        // An application's bytes that did not wait for the answer would be here by then.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let mut response = Response::new(());
        if let Some(proof) = proof {
            response.headers_mut().insert(PROOF_HEADER, proof);
        }
        let mut send = respond.send_response(response, false).unwrap();
        let mut body = request.into_body();
        while let Some(Ok(data)) = body.data().await {
            self.payload.fetch_add(data.len(), Ordering::Relaxed);
            let _ = send.send_data(data, false);
        }
    }
}

#[test]
fn a_node_that_does_not_prove_the_destination_gets_no_byte_of_the_application() {
    let siege = lay();
    let fake = siege.fake(EVIL, &siege.svid(&node("evil")), ALPN_NODE, Answer::Reflected);
    let cases =
        [(Answer::Reflected, "bad_proof"), (Answer::Unproven, "unproven"), (Answer::Other, "wrong_identity")];
    for (tried, (answer, reason)) in cases.into_iter().enumerate() {
        *fake.answer.lock().unwrap() = answer;
        assert_eq!(siege.poke(), "reset", "{answer:?}");
        assert_eq!(fake.streams.load(Ordering::Relaxed), tried + 1, "{answer:?}: it was asked once");
        let label = format!("reason=\"{reason}\"");
        let agent = siege.world.agent_ref("n1");
        agent.wait_metric("hauberk_connections_total", &["outbound", &label], 1.0).unwrap();
        told(agent, &label);
        assert_eq!(fake.payload.load(Ordering::Relaxed), 0, "{answer:?}: bytes of the application arrived");
    }
    *fake.answer.lock().unwrap() = Answer::Good;
    assert_eq!(siege.poke(), "data", "the same node is spoken to once it proves the destination");
    assert_eq!(fake.payload.load(Ordering::Relaxed), 1, "the application's one byte arrived");
    siege.still_serves();
}

#[test]
fn a_restarted_agent_connects_before_anybody_needs_it_unless_told_not_to() {
    let handshakes = |world: &World| {
        let done = ["role=\"client\"", "outcome=\"ok\""];
        world.agent_ref("n1").metric("hauberk_tls_handshakes_total", &done).unwrap()
    };
    for warm in [true, false] {
        let agent_yaml = format!("workers: 1\ndrainSeconds: 1\ntunnel: {{warmNodes: {}}}\n", u8::from(warm));
        let mut world = World::new(Options { agent_yaml, ..Options::default() }).unwrap();
        world.pod("client", "n1", Mode::Strict).unwrap();
        world.pod("server", "n2", Mode::Strict).unwrap();
        world.start().unwrap();
        let to = world.get("server").v4(8080);
        let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
        for again in [false, true] {
            if again {
                ["n1", "n2"].iter().for_each(|node| world.agent(node).kill9());
                // The first finds the second away, and hears when it is back.
                ["n1", "n2"].iter().for_each(|node| world.agent(node).restart().unwrap());
            }
            if warm {
                let made = ["outcome=\"ok\""];
                world.agent_ref("n1").wait_metric("hauberk_pool_made_ahead_total", &made, 1.0).unwrap();
            }
            let before = handshakes(&world);
            assert_eq!(before > 0.0, warm, "{before} handshakes before the first stream");
            let seen = world.get("client").host.actor(&["many", &to, "20", "4"]).unwrap();
            assert_eq!(seen["ok"], 20, "{seen}");
            let made = handshakes(&world) - before;
            assert_eq!(made, f64::from(u8::from(!warm)), "handshakes that the first stream waited for");
        }
    }
}

#[test]
fn where_nothing_listens_at_a_nodes_address_its_workloads_are_dialled() {
    let siege = lay();
    let mole = siege.fake(MOLE, &siege.svid(&id("mole")), ALPN_H2, Answer::Unproven);
    assert_eq!(siege.poke(), "data");
    assert_eq!(mole.streams.load(Ordering::Relaxed), 1);
    told(siege.world.agent_ref("n1"), "no node scope there; dialling its workloads for a while");
    siege.still_serves();
}

#[test]
fn where_a_nodes_address_speaks_no_node_scope_its_workloads_are_dialled() {
    let siege = lay();
    let evil = siege.fake(EVIL, &siege.svid(&node("evil")), ALPN_H2, Answer::Good);
    let mole = siege.fake(MOLE, &siege.svid(&id("mole")), ALPN_H2, Answer::Unproven);
    assert_eq!(siege.poke(), "data");
    assert_eq!(mole.streams.load(Ordering::Relaxed), 1);
    assert_eq!(evil.streams.load(Ordering::Relaxed), 0, "the node is asked for nothing in HBONE");
    let agent = siege.world.agent_ref("n1");
    let labels = ["client", "failed", "reason=\"no_node_scope\""];
    agent.wait_metric("hauberk_tls_handshakes_total", &labels, 1.0).unwrap();
    told(agent, "no node scope there; dialling its workloads for a while");
    siege.still_serves();
}

#[test]
fn a_wrong_identity_at_a_nodes_address_is_an_error_and_no_reason_to_fall_back() {
    let siege = lay();
    let evil = siege.fake(EVIL, &siege.svid(&node("elsewhere")), ALPN_NODE, Answer::Good);
    let mole = siege.fake(MOLE, &siege.svid(&id("mole")), ALPN_H2, Answer::Unproven);
    assert_eq!(siege.poke(), "reset");
    let labels = ["outbound", "reason=\"wrong_identity\""];
    siege.world.agent_ref("n1").wait_metric("hauberk_connections_total", &labels, 1.0).unwrap();
    let asked = [&evil, &mole].map(|fake| fake.streams.load(Ordering::Relaxed));
    assert_eq!(asked, [0, 0], "neither was asked for a stream");
    siege.still_serves();
}
