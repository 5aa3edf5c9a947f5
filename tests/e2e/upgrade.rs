//! A new agent takes over from a running one: no new connection fails, open ones go on until the old
//! agent's deadline.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use hauberk::ca::{Ca, ProvenKey};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls;
use nix::sys::signal::Signal;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tests::host::bin;
use tests::{Host, Mode, Options, World};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

const DRAIN: Duration = Duration::from_secs(15);

/// Short connections without a pause for so many seconds, in some lanes; how many came to what.
fn lanes(world: &World, from: &str, to: &str, seconds: u64) -> Vec<std::thread::JoinHandle<Value>> {
    let seconds = seconds.to_string();
    let lane = |_| {
        let host = &world.get(from).host;
        let mut load = host.command(&bin("actor").unwrap(), &["loop", to, &seconds]).unwrap();
        load.stdout(Stdio::piped());
        std::thread::spawn(move || {
            tests::process::run(load, Duration::from_secs(90)).unwrap().json().unwrap()
        })
    };
    (0..4).map(lane).collect()
}

fn world() -> World {
    let options =
        Options { agent_yaml: format!("drainSeconds: {}\n", DRAIN.as_secs()), ..Options::default() };
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.pod("beside", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    world
}

fn upgrade(node: &str) {
    let mut world = world();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let mut keep = world.get("client").host.actor_server(&["keep", &to, "1000"]).unwrap();
    assert_eq!(keep.said().unwrap()["alive"], 1000);
    let tap = world.tap().unwrap();
    // Between the nodes, and within one.
    let mut load = lanes(&world, "client", &to, 14);
    load.extend(lanes(&world, "beside", &to, 14));
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    let mut old = world.agent(node).upgrade().unwrap();
    let took_over = began.elapsed();
    // One more, while the first is still drained; the node's own traffic goes on all the while.
    let outcomes: Vec<Value> =
        load.into_iter().map(|lane| lane.join().unwrap()["outcomes"].clone()).collect();
    for outcome in &outcomes {
        let all = outcome.as_object().unwrap();
        assert!(
            all.len() == 1 && all["ok"].as_u64().unwrap() > 100,
            "short connections, {node}: {outcomes:?}\n{}",
            world.agent_ref(node).log_tail(30)
        );
    }
    let seen = tap.finish().unwrap();
    assert_eq!((seen.plaintext_bytes, seen.not_tls_bytes), (0, 0), "{:?}", seen.plaintext_flows);
    assert!(old.runs(), "the old agent waits to be told to stop");

    // The long ones live until the old agent's deadline, and no longer.
    let mut last = 1000;
    let ended = loop {
        let alive = keep.said().unwrap()["alive"].as_u64().unwrap();
        assert!(alive == 1000 || alive < last || alive == 0, "{alive} after {last}");
        if alive < 1000 {
            break began.elapsed();
        }
        last = alive;
    };
    assert!(
        ended > DRAIN - Duration::from_secs(1),
        "{node}: cut after {ended:?}, took over in {took_over:?}"
    );
    assert!(ended < took_over + DRAIN + Duration::from_secs(15), "{node}: cut after {ended:?}");
    old.signal(Signal::SIGTERM);
    assert!(old.wait(Duration::from_secs(10)).unwrap().success(), "the old agent ends when it is told to");
    let log = world.agent_ref(node).log();
    assert!(log.contains("took up the keys of session tickets"), "{log}");
    // The successor has it all: it enrols, and hands over in its turn.
    let after = world.get("client").host.actor(&["many", &to, "100", "4"]).unwrap();
    assert_eq!(after["ok"], 100, "{after}");
    let next = world.agent(node).upgrade().unwrap();
    next.signal(Signal::SIGTERM);
    assert!(next.wait(Duration::from_secs(10)).unwrap().success());
    let after = world.get("client").host.actor(&["many", &to, "100", "4"]).unwrap();
    assert_eq!(after["ok"], 100, "{after}");
}

#[test]
fn an_upgrade_of_the_receiving_agent_fails_no_connection() {
    upgrade("n2");
}

#[test]
fn an_upgrade_of_the_sending_agent_fails_no_connection() {
    upgrade("n1");
}

#[test]
fn a_successor_that_comes_to_nothing_changes_nothing() {
    let mut world = world();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let load = lanes(&world, "client", &to, 6);
    let config = world.agent_ref("n2").config();
    let broken = world.dir().join("broken.yaml");
    let text = std::fs::read_to_string(&config).unwrap() + "policy: {file: /nonexistent.yaml}\n";
    std::fs::write(&broken, text).unwrap();
    let args = ["agent", "--config", broken.to_str().unwrap()];
    let failed = world.host("n2").run(&bin("hauberk").unwrap(), &args).unwrap();
    assert!(!failed.status.success() && failed.stderr.contains("/nonexistent.yaml"), "{failed:?}");
    for lane in load {
        let outcomes = lane.join().unwrap()["outcomes"].clone();
        assert_eq!(outcomes.as_object().unwrap().len(), 1, "{outcomes}");
    }
    let log = world.agent_ref("n2").log();
    assert!(log.contains("the successor came to nothing; going on"), "{log}");
    // Another one may try.
    let old = world.agent("n2").upgrade().unwrap();
    old.signal(Signal::SIGTERM);
    assert!(old.wait(Duration::from_secs(20)).unwrap().success());
}

/// How a peer with the client's own identity comes to the server's tunnel.
fn dials(world: &World) -> Arc<ClientConfig> {
    let domain = TrustDomain::parse("test.local").unwrap();
    let id = |name: &str| SpiffeId::workload(&domain, "demo", name).unwrap();
    let ca = Ca::from_pem(domain.clone(), &world.root_pem().unwrap()).unwrap();
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    let chain = ca.issue(&proven, &id("client"), Duration::from_secs(3600), SystemTime::now()).unwrap();
    tls::client::config(&key.with_chain(chain).unwrap(), ca.bundle(), id("server")).unwrap()
}

/// Connects so many peers, says so, and waits until each has been asked to leave; when that was.
async fn peers(
    count: usize,
    to: SocketAddr,
    config: Arc<ClientConfig>,
    opened: mpsc::Sender<()>,
) -> Vec<Instant> {
    let mut open = JoinSet::new();
    for _ in 0..count {
        let tcp = TcpStream::connect(to).await.unwrap();
        let name = ServerName::IpAddress(to.ip().into());
        let io = TlsConnector::from(Arc::clone(&config)).connect(name, tcp).await.unwrap();
        let (send, connection) = h2::client::handshake(io).await.unwrap();
        open.spawn(async move {
            // It has no streams: after the server's GOAWAY nothing keeps it.
            // However the server closes it then.
            let _ = connection.await;
            drop(send);
            Instant::now()
        });
    }
    opened.send(()).unwrap();
    open.join_all().await
}

#[test]
fn peers_are_asked_to_leave_one_after_another_where_a_successor_serves() {
    const PEERS: usize = 60;
    let mut world = world();
    let to: SocketAddr = world.get("server").v4(15008).parse().unwrap();
    let config = dials(&world);
    let out = Host { name: world.host("out").name.clone(), cgroup: None };
    let (opened, all_open) = mpsc::channel();
    let waiting = std::thread::spawn(move || {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let patience = 4 * DRAIN;
            runtime.block_on(async { tokio::time::timeout(patience, peers(PEERS, to, config, opened)).await })
        };
        out.inside(run).unwrap().expect("each peer is asked to leave")
    });
    all_open.recv().unwrap();
    let began = Instant::now();
    let old = world.agent("n2").upgrade().unwrap();
    let mut left = waiting.join().unwrap();
    left.sort();
    assert!(left[0] > began, "somebody was sent away before there was a successor");
    // Over a quarter of the drain, in an order of chance.
    let spread = left[PEERS - 1] - left[0];
    assert!(spread > DRAIN / 10, "all were asked within {spread:?}");
    assert!(spread < DRAIN / 2, "some were asked {spread:?} after others");
    let window = DRAIN / 20;
    let most =
        left.iter().map(|at| left.iter().filter(|it| **it >= *at && **it < *at + window).count()).max();
    assert!(most < Some(PEERS / 2), "{most:?} of {PEERS} were asked within {window:?}");
    old.signal(Signal::SIGTERM);
    assert!(old.wait(DRAIN + Duration::from_secs(10)).unwrap().success());
}
