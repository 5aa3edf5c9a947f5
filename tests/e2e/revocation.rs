//! Revocation, from the operator's command to the live connection: who is revoked is out within a
//! second, everybody else notices nothing, and no restart brings anybody back.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use hauberk::ca::{Ca, ProvenKey};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls;
use serde_json::Value;
use tests::host::{Actor, bin};
use tests::{Mode, Options, World, wait_until};
use tokio::io::AsyncReadExt;

const AT_ONCE: Duration = Duration::from_secs(1);

/// Pods `client` and `other` on node 1, `server` and `near` on node 2.
fn world() -> World {
    let mut world = World::new(Options::default()).unwrap();
    for (pod, node) in [("client", "n1"), ("other", "n1"), ("server", "n2"), ("near", "n2")] {
        world.pod(pod, node, Mode::Strict).unwrap();
    }
    world.start().unwrap();
    world
}

fn id(pod: &str) -> String {
    format!("spiffe://test.local/ns/demo/sa/{pod}")
}

fn stay(world: &World, from: &str, to: &str) -> Actor {
    world.get(from).host.actor_server(&["stay", to]).unwrap()
}

/// Whether one exchange on a new connection works.
fn reaches(world: &World, from: &str, to: &str) -> bool {
    world.get(from).host.actor(&["poke", to]).unwrap()["end"] == "data"
}

fn open(world: &World, node: &str, direction: &str) -> f64 {
    world.agent_ref(node).metric("hauberk_connections_open", &[direction]).unwrap()
}

/// What `hauberk certs` says of a pod's certificate.
fn cert(world: &World, node: &str, pod: &str) -> Value {
    let config = world.agent_ref(node).config().to_string_lossy().into_owned();
    let args = ["certs", "-o", "json", "--config", &config];
    let out = world.host(node).run(&bin("hauberk").unwrap(), &args).unwrap().ok().unwrap();
    let rows: Value = serde_json::from_str(&out).unwrap();
    rows.as_array().unwrap().iter().find(|row| row["id"] == id(pod)).unwrap().clone()
}

/// A sample of the authority's metrics.
fn authority_metric(world: &World, sample: &str) -> f64 {
    let address: SocketAddr = "127.0.0.1:15014".parse().unwrap();
    let (_, page) = world.host("n1").http(address, "/metrics").unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix(sample));
    line.map_or(0.0, |value| value.trim().parse().unwrap())
}

#[test]
fn a_revoked_identity_is_out_at_both_ends_within_a_second_and_the_others_stay() {
    let world = world();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let watched = world.get("server").v4(8081);
    let mut watch = world.get("server").host.actor_server(&["watch", "0.0.0.0:8081"]).unwrap();
    let _back = world.get("client").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let mut live = stay(&world, "client", &watched);
    let _unconcerned = stay(&world, "other", &to);
    assert_eq!(open(&world, "n1", "outbound"), 2.0);

    world.authority_command(&["revoke", "--spiffe-id", &id("client")]).unwrap();
    let began = Instant::now();
    assert_eq!(live.said().unwrap()["ended"], "reset", "the client's application");
    assert_eq!(watch.said().unwrap()["ended"], "reset", "the server's application");
    assert!(began.elapsed() < AT_ONCE, "took {:?}", began.elapsed());

    for (node, direction, role) in [("n1", "outbound", "client"), ("n2", "inbound", "server")] {
        let agent = world.agent_ref(node);
        let labels = [direction, "reason=\"revoked\"", "denied"];
        agent.wait_metric("hauberk_connections_total", &labels, 1.0).unwrap();
        agent.wait_metric("hauberk_revoked_tunnels_total", &[role], 1.0).unwrap();
        let log = agent.log();
        let said = log.lines().find(|line| line.contains("closing a tunnel"));
        assert!(said.is_some_and(|line| line.contains(&id("client"))), "{node}: {}", agent.log_tail(10));
    }
    wait_until(AT_ONCE, "the other client's connection is the only one left", || {
        open(&world, "n1", "outbound") == 1.0 && open(&world, "n2", "inbound") == 1.0
    });
    assert!(!reaches(&world, "client", &to), "as a client it is refused");
    assert!(!reaches(&world, "near", &world.get("client").v4(8080)), "as a server it is refused");
    let others = world.get("other").host.actor(&["many", &to, "50", "4"]).unwrap();
    assert_eq!(others["ok"], 50, "{others}");
    // The agent learns of an end a moment after the application.
    wait_until(AT_ONCE, "and its old connection still lives", || open(&world, "n1", "outbound") == 1.0);

    let held = cert(&world, "n1", "client");
    assert!(held["revoked"].as_str().unwrap().contains("sa/client"), "{held}");
    assert!(held["error"].as_str().unwrap().contains("revoked"), "it is issued no other: {held}");
    let refused = "hauberk_authority_refused_total{reason=\"revoked\"}";
    assert!(authority_metric(&world, refused) >= 1.0);
    assert_eq!(authority_metric(&world, "hauberk_authority_revocations "), 1.0);
    let listed = world.authority_command(&["revocations"]).unwrap();
    assert!(listed.contains(&id("client")) && listed.contains("banned"), "{listed}");

    world.authority_command(&["unrevoke", "--spiffe-id", &id("client")]).unwrap();
    wait_until(Duration::from_secs(10), "the client is let in again, with a new certificate", || {
        reaches(&world, "client", &to)
    });
    assert_ne!(cert(&world, "n1", "client")["serial"], held["serial"]);
}

#[test]
fn a_revoked_serial_is_that_certificate_alone() {
    let world = world();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let serial = cert(&world, "n1", "client")["serial"].as_str().unwrap().to_owned();
    let mut live = stay(&world, "client", &to);
    let _unconcerned = stay(&world, "other", &to);
    world.authority_command(&["revoke", "--serial", &serial.to_uppercase()]).unwrap();
    let began = Instant::now();
    assert_eq!(live.said().unwrap()["ended"], "reset");
    assert!(began.elapsed() < AT_ONCE, "took {:?}", began.elapsed());
    wait_until(Duration::from_secs(5), "the agent asks for another certificate at once", || {
        let held = cert(&world, "n1", "client");
        held["serial"] != serial.as_str() && held["revoked"].is_null()
    });
    assert!(reaches(&world, "client", &to), "the identity itself is not revoked");
    assert_eq!(open(&world, "n1", "outbound"), 1.0, "the other client's connection still lives");
}

#[test]
fn a_revoked_node_gets_nothing_any_more_and_its_tunnels_die() {
    let mut world = world();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let mut lost = [stay(&world, "client", &to), stay(&world, "other", &to)];
    let _unconcerned = stay(&world, "near", &to);
    world.authority_command(&["revoke", "--node", "n1"]).unwrap();
    let began = Instant::now();
    for live in &mut lost {
        assert_eq!(live.said().unwrap()["ended"], "reset");
    }
    assert!(began.elapsed() < AT_ONCE, "took {:?}", began.elapsed());
    assert!(!reaches(&world, "client", &to));
    assert!(reaches(&world, "near", &to), "pods of the other node go on");
    assert_eq!(open(&world, "n2", "outbound"), 1.0, "and so do their connections");

    // Whoever took the node's key away gets nothing for it, and its agent no new token.
    assert!(!knows(&world, "n1"), "the node's certificate is no good at the authority");
    assert!(knows(&world, "n2"));
    let error = world.authority_command(&["token", "--node", "n1"]).unwrap_err().to_string();
    assert!(error.contains("node n1 is revoked"), "{error}");

    world.authority_command(&["unrevoke", "--node", "n1"]).unwrap();
    assert!(!reaches(&world, "client", &to), "what was issued before stays refused");
    let token = world.authority_command(&["token", "--node", "n1"]).unwrap();
    std::fs::write(world.dir().join("n1/token"), token).unwrap();
    wait_until(Duration::from_secs(30), "the node joins again", || reaches(&world, "client", &to));
    world.agent("n1").wait_ready().unwrap();
}

/// Whether the authority lets in who has a certificate of this node.
fn knows(world: &World, node: &str) -> bool {
    let domain = TrustDomain::parse("test.local").unwrap();
    let pem = world.root_pem().unwrap();
    let ca = Ca::from_pem(domain.clone(), &pem).unwrap();
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    let id = SpiffeId::node(&domain, node).unwrap();
    let chain = ca.issue(&proven, &id, Duration::from_secs(60), SystemTime::now()).unwrap();
    let svid = key.with_chain(chain).unwrap();
    let config = tls::client::config(&svid, ca.bundle(), SpiffeId::authority(&domain)).unwrap();
    let to: SocketAddr = tests::world::AUTHORITY.parse().unwrap();
    let shake = async {
        let tcp = tokio::net::TcpStream::connect(to).await.unwrap();
        let name = rustls::pki_types::ServerName::IpAddress(to.ip().into());
        let connected = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await;
        // It sends its HTTP/2 settings, or an alert.
        matches!(connected.unwrap().read(&mut [0; 64]).await, Ok(length) if length > 0)
    };
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { tokio::time::timeout(Duration::from_secs(5), shake).await.unwrap() })
    };
    world.host("n1").inside(run).unwrap()
}

#[test]
fn who_is_revoked_stays_out_while_the_authority_is_away_and_over_restarts() {
    let mut world = world();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    world.authority_command(&["revoke", "--spiffe-id", &id("client")]).unwrap();
    wait_until(AT_ONCE, "the client is out", || !reaches(&world, "client", &to));
    world.stop_authority();
    assert!(!reaches(&world, "client", &to), "while the authority is away");
    assert!(reaches(&world, "other", &to));

    // Both agents start again with nobody to ask.
    for node in ["n1", "n2"] {
        world.agent(node).kill9();
        world.agent(node).start_again().unwrap();
    }
    for node in ["n1", "n2"] {
        wait_until(Duration::from_secs(10), "the restarted agent knows what was revoked", || {
            world.agent_ref(node).metric("hauberk_revocations", &[]).is_ok_and(|held| held == 1.0)
        });
    }
    // A change made while the authority is down holds from its start on.
    world.authority_command(&["revoke", "--serial", "abcdef"]).unwrap();
    world.start_authority().unwrap();
    for node in ["n1", "n2"] {
        world.agent_ref(node).wait_metric("hauberk_revocations", &[], 2.0).unwrap();
    }
    wait_until(Duration::from_secs(20), "the others are served again", || reaches(&world, "other", &to));
    assert!(!reaches(&world, "client", &to), "and the client is not");
    let (_, body) = world.agent_ref("n1").page("/readyz").unwrap();
    assert!(body.contains("sa/client") && body.contains("revoked"), "readiness says why: {body}");
}

#[test]
fn the_commands_say_what_is_wrong() {
    let world = World::new(Options::default()).unwrap();
    let file = world.dir().join("authority.yaml");
    let state = world.dir().join("authority");
    let yaml = format!(
        "trustDomain: test.local\nstateDir: {}\ndirectory: {{file: /nonexistent}}\n",
        state.display()
    );
    std::fs::write(&file, yaml).unwrap();
    let fails = |args: &[&str]| world.authority_command(args).unwrap_err().to_string();
    let revoke = |args: &[&str]| fails(&[&["revoke"], args].concat());
    assert!(
        revoke(&["--spiffe-id", "spiffe://elsewhere/x"]).contains("not in this authority's trust domain")
    );
    assert!(revoke(&["--spiffe-id", "client"]).contains("begins with spiffe://"));
    let own = revoke(&["--spiffe-id", "spiffe://test.local/hauberk/authority"]);
    assert!(own.contains("the authority itself"), "{own}");
    assert!(revoke(&["--node", "a/b"]).contains("not a node's name"));
    assert!(revoke(&["--serial", "xyz"]).contains("not a serial number"));
    assert!(revoke(&[]).contains("--spiffe-id"), "one of three is needed");
    assert!(revoke(&["--node", "n1", "--serial", "1"]).contains("cannot be used with"));
    assert!(fails(&["unrevoke", "--node", "n1"]).contains("node n1 is not revoked"));
    assert_eq!(world.authority_command(&["revocations"]).unwrap(), "none\n");
    world.authority_command(&["revoke", "--node", "n1"]).unwrap();
    assert!(world.authority_command(&["revoke", "--node", "n1"]).unwrap().contains("already"));
    let listed = world.authority_command(&["revocations", "-o", "json"]).unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["revocations"][0]["node"], "n1");
    assert_eq!(listed["revocations"][0]["state"], "banned");
    std::fs::write(state.join("revocations.json"), "[]").unwrap();
    let error = fails(&["revocations"]);
    assert!(error.contains("revocations.json") && error.contains("not what the authority wrote"), "{error}");
}
