//! Bytes, ends and failures of connections, few and many.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use tests::host::assert_reset;
use tests::{Mode, Options, World};

#[test]
fn a_gibibyte_each_way_at_once_arrives_whole() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let seen = client.host.actor(&["bulk", &server.v4(8080), &(1u64 << 30).to_string()]).unwrap();
    assert_eq!(seen["same"], true, "{seen}");
}

#[test]
fn each_side_may_end_first() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _sum = server.host.actor_server(&["sum", "0.0.0.0:8080"]).unwrap();
    let seen = client.host.actor(&["half-close", &server.v4(8080), "3000000"]).unwrap();
    assert_eq!(seen["same"], true, "the client ended first: {seen}");
    let mut end_first = server.host.actor_server(&["end-first", "0.0.0.0:8081"]).unwrap();
    let seen = client.host.actor(&["send-after-end", &server.v4(8081), "3000000"]).unwrap();
    assert_eq!(seen["read"], "the end", "{seen}");
    let seen = end_first.said().unwrap();
    assert_eq!((seen["received"].as_u64(), seen["ended"].as_str()), (Some(3_000_000), Some("end")), "{seen}");
}

#[test]
fn failures_reach_the_client_as_resets_at_once() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.pod("neighbour", "n1", Mode::Strict).unwrap();
    // In node 2's network, but nobody has it; and a node that does not answer at all.
    world.ghost("unreachable", "10.1.2.250");
    world.ghost("silent", "192.168.60.77");
    world.start().unwrap();
    let (client, server, neighbour) = (world.get("client"), world.get("server"), world.get("neighbour"));
    let poke = |to: &str| client.host.actor(&["poke", to]).unwrap();
    let _reset = server.host.actor_server(&["reset", "0.0.0.0:8080"]).unwrap();
    let _near = neighbour.host.actor_server(&["reset", "0.0.0.0:8080"]).unwrap();
    for (on, pod) in [("the other node", server), ("the same node", neighbour)] {
        assert_reset(&poke(&pod.v4(8080)), &format!("a server's reset on {on}"));
        assert_reset(&poke(&pod.v4(9)), &format!("a closed port on {on}"));
        assert_reset(&poke(&pod.v6(9)), &format!("a closed port on {on}, IPv6"));
    }
    assert_reset(&poke("10.1.2.250:80"), "an address that nobody has");
    assert_reset(&poke("192.168.60.77:80"), "a node that does not answer");
    let outbound = |reason: &str| {
        let label = format!("reason=\"{reason}\"");
        world.agent_ref("n1").wait_metric("hauberk_connections_total", &["outbound", &label], 1.0).unwrap();
    };
    outbound("refused");
    outbound("unreachable");

    let mut watch = server.host.actor_server(&["watch", "0.0.0.0:8082"]).unwrap();
    client.host.actor(&["abort", &server.v4(8082)]).unwrap();
    assert_eq!(watch.said().unwrap()["ended"], "reset", "a client's reset is the server's");
}

#[test]
fn ten_thousand_short_connections_are_all_served() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["echo", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    let seen = client.host.actor(&["many", &server.v4(8080), "10000", "32"]).unwrap();
    assert_eq!(seen["ok"], 10_000, "{seen}");
    let seen = client.host.actor(&["many", &server.v6(8081), "500", "32"]).unwrap();
    assert_eq!(seen["ok"], 500, "{seen}");
    let handshakes =
        world.agent_ref("n1").metric("hauberk_tls_handshakes_total", &["outcome=\"ok\""]).unwrap();
    assert!(handshakes <= 16.0, "10,500 connections took {handshakes} handshakes");
}

#[test]
fn few_handshakes_at_once_are_enough_for_many_listeners() {
    // Fewer permits than a pod has listeners: an idle listener must not hold one.
    let agent_yaml = "tunnel: {maxHandshakes: 1}\n".into();
    let mut world = World::new(Options { agent_yaml, ..Options::default() }).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.pod("other", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    let client = &world.get("client").host;
    for pod in ["server", "other"] {
        let _echo = world.get(pod).host.actor_server(&["echo", "0.0.0.0:8080", "[::]:8081"]).unwrap();
        for to in [world.get(pod).v4(8080), world.get(pod).v6(8081)] {
            assert_eq!(client.actor(&["many", &to, "64", "16"]).unwrap()["ok"], 64, "{to}");
        }
    }
}

#[test]
fn two_thousand_connections_at_once_all_live() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let mut hold = client.host.actor_server(&["hold", &server.v4(8080), "2000"]).unwrap();
    let seen = hold.said().unwrap();
    assert_eq!((seen["ok"].as_u64(), seen["alive"].as_u64()), (Some(2000), Some(2000)), "{seen}");
}

#[test]
fn one_pod_may_open_more_connections_than_one_listener_has_ports_for() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    // A thousand source ports instead of 28,232: all of a pod's connections share the listeners'
    // address, and it takes the second listener to have more than a thousand at once.
    client.host.sysctl("net/ipv4/ip_local_port_range", "40000 40999").unwrap();
    let mut hold = client.host.actor_server(&["hold", &server.v4(8080), "1800"]).unwrap();
    let seen = hold.said().unwrap();
    assert_eq!((seen["ok"].as_u64(), seen["alive"].as_u64()), (Some(1800), Some(1800)), "{seen}");
    drop(hold);

    // The same in full size, where a process may have that many files.
    let (_, files) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    if files < 70_000 && !may_raise_limits() {
        eprintln!("30,000 at once: left out, as a process may have only {files} open files here");
        return;
    }
    client.host.sysctl("net/ipv4/ip_local_port_range", "32768 60999").unwrap();
    let mut hold = client.host.actor_server(&["hold", &server.v4(8080), "30000"]).unwrap();
    let seen = hold.said().unwrap();
    assert_eq!((seen["ok"].as_u64(), seen["alive"].as_u64()), (Some(30_000), Some(30_000)), "{seen}");
}

/// CAP_SYS_RESOURCE lets a process raise its hard limits.
fn may_raise_limits() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(effective.trim(), 16).unwrap() & 1 << 24 != 0
}

#[test]
fn a_reader_that_stops_holds_a_bounded_amount_and_hurts_nobody() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _stall = server.host.actor_server(&["stall", "0.0.0.0:8080"]).unwrap();
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let resident = |node: &str| world.agent_ref(node).metric("process_resident_memory_bytes", &[]).unwrap();
    client.host.actor(&["many", &server.v4(8081), "200", "8"]).unwrap();
    let before = resident("n1") + resident("n2");
    let mut pushes: Vec<_> =
        (0..8).map(|_| client.host.actor_server(&["push", &server.v4(8080)]).unwrap()).collect();
    for push in &mut pushes {
        let written = push.said().unwrap()["written"].as_u64().unwrap();
        assert!(written < 64 << 20, "the writer was pushed back after {written} bytes");
    }
    let grown = resident("n1") + resident("n2") - before;
    // README: one stream window, one frame and what lies between, per stream and agent.
    assert!(grown < 8.0 * 12e6, "eight stalled streams made the agents grow by {grown} bytes");
    let seen = client.host.actor(&["bulk", &server.v4(8081), "50000000"]).unwrap();
    assert_eq!(seen["same"], true, "another stream on the same connection: {seen}");
}
