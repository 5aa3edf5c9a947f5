//! Pods that come and go: enrolled when their sandbox appears, held back until then, also after a start of
//! the node, and captured to their end.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tests::host::bin;
use tests::process::Process;
use tests::{Host, Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(40);

/// An API server; pod `server` on node 2, strict.
fn world() -> World {
    let mut world = World::new(Options::default()).unwrap();
    world.add_kubernetes().unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world
}

/// Exchanges with a server without a pause, for so many seconds; how many came to what.
fn lane(host: &Host, to: &str, seconds: &str) -> std::thread::JoinHandle<Value> {
    let mut load = host.command(&bin("actor").unwrap(), &["loop", to, seconds]).unwrap();
    load.stdout(Stdio::piped());
    std::thread::spawn(move || {
        tests::process::run(load, Duration::from_secs(60)).unwrap().json().unwrap()["outcomes"].clone()
    })
}

fn poke(host: &Host, to: &str) -> Value {
    host.actor(&["poke", to]).unwrap()
}

fn verdicts(world: &World, node: &str, verdict: &str) -> f64 {
    let label = format!("verdict=\"{verdict}\"");
    world.agent_ref(node).metric("hauberk_capture_verdicts_total", &[&label]).unwrap()
}

#[test]
fn a_pod_is_enrolled_with_its_first_process_and_sends_nothing_in_plaintext_before() {
    let mut world = world();
    world.start().unwrap();
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let to = world.get("server").v4(8080);

    // The first process there is connects at once, and nobody has told the pod's addresses.
    world.bare_pod("new", "n1", Mode::Strict).unwrap();
    let tap = world.tap().unwrap();
    let seen = lane(&world.get("new").host, &to, "6").join().unwrap();
    assert!(seen["ok"].as_u64().unwrap() > 50, "{seen}");
    let others: u64 =
        seen.as_object().unwrap().iter().filter(|(k, _)| *k != "ok").filter_map(|(_, n)| n.as_u64()).sum();
    let refused = seen["refused"].as_u64().unwrap_or(0);
    assert_eq!(others, refused, "whoever is too early is refused, as if nobody listened yet: {seen}");
    assert!(world.agent_ref("n1").log().contains("enrolled workload=\"demo/new\""));
    let wire = tap.finish().unwrap();
    assert_eq!((wire.plaintext_bytes, wire.not_tls_bytes), (0, 0), "{:?}", wire.plaintext_flows);

    // Its addresses, told at last, are the same: nothing begins anew.
    world.tell_addresses("new").unwrap();
    let server = world.get("server").host.clone();
    let _own = world.get("new").host.actor_server(&["echo", "0.0.0.0:7070"]).unwrap();
    let own = world.get("new").v4(7070);
    wait_until(SOON, "others reach it", || poke(&server, &own)["end"] == "data");
    let log = world.agent_ref("n1").log();
    assert_eq!(log.matches("enrolled workload=\"demo/new\"").count(), 1, "{log}");
}

#[test]
fn without_an_agent_new_pods_are_closed_and_then_served() {
    let mut world = world();
    world.start().unwrap();
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let to = world.get("server").v4(8080);
    world.agent("n1").kill9();
    world.pod("strict", "n1", Mode::Strict).unwrap();
    let _own = world.get("strict").host.actor_server(&["echo", "0.0.0.0:7070"]).unwrap();
    let own = world.get("strict").v4(7070);
    let tap = world.tap().unwrap();
    for _ in 0..3 {
        assert_eq!(poke(&world.get("strict").host, &to)["connect"], "refused");
    }
    assert_eq!(poke(world.host("out"), &own)["connect"], "timeout", "nobody reaches it");
    assert_eq!(poke(&world.get("strict").host, "127.0.0.1:7070")["end"], "data", "but itself");
    world.agent("n1").restart().unwrap();
    assert_eq!(poke(&world.get("strict").host, &to)["end"], "data");
    assert_eq!(poke(world.host("out"), &own)["connect"], "refused", "enrolled: refused, not dropped");
    assert_eq!(tap.finish().unwrap().plaintext_bytes, 0);
    assert!(verdicts(&world, "n1", "held") >= 4.0);
}

#[test]
fn after_a_start_of_the_node_nothing_is_sent_in_plaintext_and_nobody_is_locked_out() {
    let mut world = world();
    // Somebody who is no pod, and DNS over TCP on the node.
    let _out = world.host("out").actor_server(&["echo", "0.0.0.0:9000"]).unwrap();
    let _dns = world.host("n1").actor_server(&["echo", "192.168.50.1:53"]).unwrap();
    let (out, dns, server) = ("192.168.60.2:9000", "192.168.50.1:53", "192.168.50.1:6443");
    world.prepare().unwrap();
    // Nothing is pinned; the unit that runs before the kubelet does its work and ends.
    let config = world.configure_agent("n1").unwrap();
    let guard = ["guard", "--config", config.to_str().unwrap()];
    world.host("n1").run(&bin("hauberk").unwrap(), &guard).unwrap().ok().unwrap();

    world.pod("strict", "n1", Mode::Strict).unwrap();
    world.pod("plain", "n1", Mode::Off).unwrap();
    // A pod of the node's own network, as the API server and the agent are.
    let of_node = world.pods_cgroup("n1").unwrap().join("burstable/pod8f1c2d3e-0000-4a5b-9c8d-001122334455");
    let of_node = Host { name: world.host("n1").name.clone(), cgroup: Some(of_node) };
    std::fs::create_dir_all(of_node.cgroup.as_ref().unwrap()).unwrap();
    let _node_server = of_node.actor_server(&["echo", "0.0.0.0:9100"]).unwrap();
    let listen = ["echo", "0.0.0.0:7070"];
    let _strict = world.get("strict").host.actor_server(&listen).unwrap();
    let _plain = world.get("plain").host.actor_server(&listen).unwrap();
    let tap = world.tap_on("n1", "uplink").unwrap();
    for pod in ["strict", "plain"] {
        let host = &world.get(pod).host;
        assert_eq!(poke(host, out)["connect"], "refused", "{pod} may be strict, and {out} a member");
        assert_eq!(poke(host, dns)["end"], "data", "{pod} reaches DNS");
        assert_ne!(poke(host, server)["connect"], "refused", "{pod} reaches the API server");
        assert_eq!(poke(host, "127.0.0.1:7070")["end"], "data", "{pod} reaches itself");
        assert_eq!(
            poke(world.host("out"), &world.get(pod).v4(7070))["connect"],
            "timeout",
            "{pod} is closed"
        );
    }
    assert_eq!(poke(&of_node, out)["end"], "data", "the node's own network is nobody's business");
    assert_eq!(poke(world.host("out"), "192.168.60.1:9100")["end"], "data", "in either direction");
    let wire = tap.finish().unwrap();
    let of_pods: Vec<_> = wire.plaintext_flows.iter().filter(|flow| flow.contains("10.1.1.")).collect();
    assert!(of_pods.is_empty(), "{of_pods:?}");

    // Authority and agents come last, and get ready all the same.
    world.start_authority().unwrap();
    world.start_agent("n1").unwrap();
    world.start_agent("n2").unwrap();
    for node in ["n1", "n2"] {
        world.agent(node).wait_ready().unwrap();
    }
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let (strict, plain) = (world.get("strict"), world.get("plain"));
    assert_eq!(poke(&strict.host, &world.get("server").v4(8080))["end"], "data", "by the mesh");
    assert_eq!(poke(world.host("out"), &strict.v4(7070))["connect"], "refused");
    assert_eq!(poke(&strict.host, out)["end"], "data", "who is no member is none of the mesh's business");
    assert_eq!(poke(&plain.host, out)["end"], "data");
    assert_eq!(poke(world.host("out"), &plain.v4(7070))["end"], "data");
}

#[test]
fn a_deleted_pod_stays_captured_until_nothing_runs_in_it() {
    let mut world = world();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.start().unwrap();
    let echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let to = world.get("server").v4(8080);
    assert_eq!(poke(&world.get("client").host, &to)["end"], "data");
    world.delete_object("server").unwrap();
    wait_until(SOON, "the agent hears of it", || {
        world.agent_ref("n2").log().contains("captured until nothing runs in it workload=\"demo/server\"")
    });
    // Not yet: a second look finds its processes as well.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(poke(world.host("out"), &to)["connect"], "refused", "its application may still answer");
    let stay: Process = echo.process;
    drop(stay);
    world.end_sandbox("server");
    wait_until(SOON, "it is removed with its last process", || {
        world.agent_ref("n2").log().contains("removed workload=\"demo/server\"")
    });
}
