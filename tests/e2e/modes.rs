//! Strict, permissive and off; enrolment, removal, services and rotation while the agent runs.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use tests::{Host, Mode, Options, World, wait_until};

/// How long a directory's change may take.
const SOON: Duration = Duration::from_secs(10);

fn verdicts(world: &World, node: &str, verdict: &str) -> f64 {
    let label = format!("verdict=\"{verdict}\"");
    world.agent_ref(node).metric("hauberk_capture_verdicts_total", &[&label]).unwrap()
}

#[test]
fn plaintext_from_outside_is_refused_by_strict_and_counted_by_permissive() {
    let options = Options { agent_yaml: "probes: {exempt: [169.254.1.1]}\n".into(), ..Options::default() };
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("strict", "n2", Mode::Strict).unwrap();
    world.pod("open", "n2", Mode::Permissive).unwrap();
    world.start().unwrap();
    let (strict, open, out) = (world.get("strict"), world.get("open"), world.host("out"));
    let listen = ["echo", "0.0.0.0:8080", "[::]:8081"];
    let _strict = strict.host.actor_server(&listen).unwrap();
    let _open = open.host.actor_server(&listen).unwrap();
    let poke = |host: &Host, to: &str| host.actor(&["poke", to]).unwrap();

    assert_eq!(poke(out, &strict.v4(8080))["connect"], "refused");
    assert_eq!(poke(out, &strict.v6(8081))["connect"], "refused");
    // The kernel may look a socket up more than once for one IPv6 connection attempt.
    assert!(verdicts(&world, "n2", "plaintext_refused") >= 2.0);
    assert_eq!(poke(out, &open.v4(8080))["end"], "data");
    assert_eq!(poke(out, &open.v6(8081))["end"], "data");
    assert!(verdicts(&world, "n2", "plaintext_accepted") >= 2.0);
    wait_until(SOON, "the log names source and destination of refused plaintext", || {
        let log = world.agent_ref("n2").log();
        log.contains("plaintext to a strict workload was refused") && log.contains("192.168.60.2 port")
    });
    // The agent's own listeners are nobody else's business, in either mode.
    for pod in [strict, open] {
        assert_eq!(poke(out, &pod.v4(15001))["connect"], "refused");
    }
    assert!(verdicts(&world, "n2", "listener_refused") >= 2.0);
    // The kubelet's address on this node may probe.
    assert_eq!(poke(world.host("n2"), &strict.v4(8080))["end"], "data");
    assert!(verdicts(&world, "n2", "probe_accepted") >= 1.0);
    // Between members it is mutual TLS in both modes.
    assert_eq!(poke(&world.get("client").host, &strict.v4(8080))["end"], "data");
    assert_eq!(poke(&world.get("client").host, &open.v4(8080))["end"], "data");
    world
        .agent_ref("n2")
        .wait_metric("hauberk_connections_total", &["inbound", "encryption=\"mtls\"", "allowed"], 2.0)
        .unwrap();
}

#[test]
fn what_goes_round_the_capture_is_dropped_by_the_egress_guard() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    let tap = world.tap().unwrap();
    // In the pod's network but not in its cgroup: no hook on connect() sees it.
    let escaped = Host { name: client.host.name.clone(), cgroup: None };
    for to in [server.v4(8080), server.v6(8081)] {
        let seen = escaped.actor(&["poke", &to]).unwrap();
        assert_eq!(seen["connect"], "timeout", "{to}: {seen}");
    }
    assert!(verdicts(&world, "n1", "egress_dropped") >= 2.0);
    let seen = tap.finish().unwrap();
    assert_eq!(seen.plaintext_bytes, 0, "{:?}", seen.plaintext_flows);
}

#[test]
fn pods_are_enrolled_changed_and_removed_while_the_agent_runs() {
    let mut world = World::usual().unwrap();
    world.pod("late", "n2", Mode::Strict).unwrap();
    let _echo = world.get("late").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let late = world.get("late").v4(8080);
    let poke = |world: &World, from: &str| {
        let host = if from == "out" { world.host("out") } else { &world.get(from).host };
        host.actor(&["poke", &late]).unwrap()
    };
    assert_eq!(poke(&world, "out")["end"], "data", "nobody knows it yet");
    world.write_directory().unwrap();
    wait_until(SOON, "a pod that is added is closed to plaintext", || {
        poke(&world, "out")["connect"] == "refused"
    });
    wait_until(SOON, "and reachable from members", || poke(&world, "client")["end"] == "data");

    world.change("late", |pod| pod.mode = Mode::Permissive).unwrap();
    wait_until(SOON, "permissive: plaintext is accepted", || poke(&world, "out")["end"] == "data");
    assert_eq!(poke(&world, "client")["end"], "data");

    world.change("late", |pod| pod.mode = Mode::Strict).unwrap();
    wait_until(SOON, "strict again", || poke(&world, "out")["connect"] == "refused");

    world.change("late", |pod| pod.listed = false).unwrap();
    wait_until(SOON, "removed: nothing is captured or refused", || poke(&world, "out")["end"] == "data");
    wait_until(SOON, "from members it is plaintext now", || poke(&world, "client")["end"] == "data");

    std::fs::write(world.directory_file(), "workloads: [{nam: x}]").unwrap();
    wait_until(SOON, "a bad file is said in one line", || {
        world.agent_ref("n1").log().contains("the directory stays as it was")
    });
    assert_eq!(world.get("client").host.actor(&["poke", &late]).unwrap()["end"], "data");
}

#[test]
fn connections_from_before_the_enrolment_are_ended() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.change("client", |pod| pod.listed = false).unwrap();
    world.change("server", |pod| pod.listed = false).unwrap();
    let mut watch = world.get("server").host.actor_server(&["watch", "0.0.0.0:8080"]).unwrap();
    let to = world.get("server").v4(8080);
    let _hold = world.get("client").host.actor_server(&["hold", &to, "1"]).unwrap();
    world.change("client", |pod| pod.listed = true).unwrap();
    world.change("server", |pod| pod.listed = true).unwrap();
    world.start().unwrap();
    let ended = watch.said().unwrap();
    assert!(matches!(ended["ended"].as_str(), Some("reset" | "aborted")), "{ended}");
}

#[test]
fn a_service_address_leads_to_its_endpoints() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("one", "n2", Mode::Strict).unwrap();
    world.pod("two", "n2", Mode::Strict).unwrap();
    world.service("web", "10.96.0.10", 80, 8080, &["one", "two"]);
    world.start().unwrap();
    let _one = world.get("one").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let _two = world.get("two").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let client = &world.get("client").host;
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..24 {
        let seen = client.actor(&["ask", "10.96.0.10:80"]).unwrap();
        assert_eq!(seen["peer"], "10.96.0.10:80", "the client sees the service: {seen}");
        assert_eq!(seen["server"]["accept"], seen["local"], "{seen}");
        answered.insert(seen["server"]["local"].as_str().unwrap().to_owned());
    }
    assert_eq!(answered.len(), 2, "both endpoints, as near as each other, get their share: {answered:?}");
    let refused = client.actor(&["poke", "10.96.0.10:81"]).unwrap();
    let reset = refused["end"] == "reset" || refused["connect"] == "reset";
    assert!(reset, "a port that the service does not have: {refused}");
}
