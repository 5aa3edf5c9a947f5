//! What the agent has put in place is looked at again and again, put back when it is gone, and closed when
//! it cannot be; and who is the kubelet is known by its sockets.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tests::{Host, Mode, Options, World, wait_until};

/// Everything is verified every five seconds; machines may be slow.
const SOON: Duration = Duration::from_secs(40);

fn poke(host: &Host, to: &str) -> Value {
    host.actor(&["poke", to]).unwrap()
}

/// The pins on a node whose names end so.
fn pins(world: &World, node: &str, end: &str) -> Vec<PathBuf> {
    let dir = world.dir().join(node).join("bpf").join("v2");
    let all = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.to_string_lossy().ends_with(end)).collect()
}

fn repairs(world: &World, node: &str) -> f64 {
    world.agent_ref(node).metric("hauberk_capture_repairs_total", &[]).unwrap()
}

#[test]
fn what_is_taken_away_is_put_back() {
    let mut world = World::usual().unwrap();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    // As long as everything is there, nothing is mended.
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!((repairs(&world, "n1"), repairs(&world, "n2")), (0.0, 0.0), "{}", world.agent_ref("n1").log());
    assert!(!world.agent_ref("n1").log().contains("cannot try"), "the capture itself is tried");

    let links: Vec<PathBuf> =
        ["-lookup", "-hauberk_connect4"].iter().flat_map(|end| pins(&world, "n2", end)).collect();
    let guards: Vec<PathBuf> =
        pins(&world, "n2", "").into_iter().filter(|pin| pin.to_string_lossy().contains("-guard-")).collect();
    assert_eq!((links.len(), guards.len()), (2, 1), "{links:?} {guards:?}");
    for pin in links.iter().chain(&guards) {
        // Nothing else keeps the link: this detaches the program.
        std::fs::remove_file(pin).unwrap();
        wait_until(SOON, "a link that was removed is made anew", || pin.exists());
    }
    assert!(repairs(&world, "n2") >= 3.0);
    assert_eq!(poke(world.host("out"), &to)["connect"], "refused");

    // The listeners for other nodes' agents, closed by the kernel.
    let kill = ["-K", "-tln", "sport", "=", ":15008"];
    world.host("n2").run("ss", &kill).unwrap().ok().unwrap();
    wait_until(SOON, "the agent listens for other nodes again", || {
        world.agent_ref("n2").log().contains("the listeners for other nodes' agents are gone; listening anew")
    });
    wait_until(SOON, "and connections are carried", || poke(&world.get("client").host, &to)["end"] == "data");
    for node in ["n1", "n2"] {
        world.agent(node).wait_ready().unwrap();
    }
}

#[test]
fn what_cannot_be_put_back_is_not_ready_and_closed() {
    let mut world = World::usual().unwrap();
    let (to, own) = (world.get("server").v4(8080), world.get("client").v4(8080));
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let _own = world.get("client").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let lookup = pins(&world, "n2", "-lookup").remove(0);
    std::fs::remove_file(&lookup).unwrap();
    // No link can be pinned where a directory is.
    std::fs::create_dir(&lookup).unwrap();
    wait_until(SOON, "readiness names the pod and what is missing", || {
        let (status, body) = world.agent_ref("n2").page("/readyz").unwrap();
        status == 503 && body.contains("pods-enrolled: demo/server: cannot attach the inbound program")
    });
    assert!(world.agent_ref("n2").metric("hauberk_pods_failed", &[]).unwrap() >= 1.0);
    assert_eq!(poke(world.host("out"), &to)["connect"], "timeout", "closed to plaintext");
    assert_eq!(poke(&world.get("server").host, &own)["connect"], "refused", "and to members");
    std::fs::remove_dir(&lookup).unwrap();
    world.agent("n2").wait_ready().unwrap();
    assert_eq!(poke(&world.get("client").host, &to)["end"], "data");
    assert_eq!(poke(&world.get("server").host, &own)["end"], "data");
    assert_eq!(poke(world.host("out"), &to)["connect"], "refused");
}

#[test]
fn the_kubelet_is_known_by_its_sockets_and_not_by_its_address() {
    let mut world = World::new(Options::default()).unwrap();
    let beside = world.pods_cgroup("n2").unwrap().with_file_name("kubelet");
    world.configure(|options| {
        options.agent_yaml = format!("probes: {{kubeletCgroup: {}}}\n", beside.display());
    });
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    let node = world.host("n2").name.clone();
    let in_cgroup = |name: &str| {
        let cgroup = world.pods_cgroup("n2").unwrap().with_file_name(name);
        std::fs::create_dir_all(&cgroup).unwrap();
        Host { name: node.clone(), cgroup: Some(cgroup) }
    };
    let (kubelet, other) = (in_cgroup("kubelet"), in_cgroup("other"));
    world.start().unwrap();
    let (v4, v6) = (world.get("server").v4(8080), world.get("server").v6(8081));
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    for to in [&v4, &v6] {
        assert_eq!(poke(&kubelet, to)["end"], "data", "a probe of {to}");
        // From the very same address, on the same node.
        assert_eq!(poke(&other, to)["connect"], "refused", "{to}");
        assert_eq!(poke(world.host("n2"), to)["connect"], "refused", "{to}");
    }
    let accepted =
        world.agent_ref("n2").metric("hauberk_capture_verdicts_total", &["probe_accepted"]).unwrap();
    assert!(accepted >= 2.0);
    // Without an agent too: the pod would be killed for it otherwise.
    world.agent("n2").kill9();
    assert_eq!(poke(&kubelet, &v4)["end"], "data");
    assert_eq!(poke(&other, &v4)["connect"], "refused");
}
