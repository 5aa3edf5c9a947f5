//! A new agent takes over from a running one: no new connection fails, open ones go on until the old
//! agent's deadline.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tests::host::bin;
use tests::{Mode, Options, World};

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
