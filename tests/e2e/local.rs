//! Two pods of one node: everything as between nodes, but nothing on any wire and no handshake.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use tests::host::assert_reset;
use tests::{Mode, Options, Pod, World};

/// A world whose client and server are neighbours on node 1, both strict.
fn neighbours(options: Options) -> World {
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n1", Mode::Strict).unwrap();
    world.start().unwrap();
    world
}

fn two(world: &World) -> (&Pod, &Pod) {
    (world.get("client"), world.get("server"))
}

fn wait_ended(world: &World, direction: &str, labels: &[&str], at_least: f64) {
    let labels = [&[direction], labels].concat();
    world.agent_ref("n1").wait_metric("hauberk_connections_total", &labels, at_least).unwrap();
}

/// As many pods as that are enrolled on node 1, no more and no fewer.
fn wait_enrolled(world: &World, pods: f64) {
    let now = || world.agent_ref("n1").metric("hauberk_enrolled_pods", &[]).unwrap();
    for _ in 0..200 {
        if now() == pods {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{} pods are enrolled, not {pods}", now());
}

#[test]
fn nothing_of_it_is_on_a_wire_and_no_handshake_is_made() {
    // Nor by another node's agent that comes before it is needed.
    let agent_yaml = "tunnel: {warmNodes: 0}\n".into();
    let world = neighbours(Options { log: "info".into(), agent_yaml, ..Options::default() });
    let (client, server) = two(&world);
    let taps = ["pod2", "pod3", "wire"].map(|link| world.tap_on("n1", link).unwrap());
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    for to in [server.v4(8080), server.v6(8081)] {
        let seen = client.host.actor(&["bulk", &to, "100000000"]).unwrap();
        assert_eq!(seen["same"], true, "{to}: {seen}");
        assert_eq!(client.host.actor(&["many", &to, "500", "16"]).unwrap()["ok"], 500, "{to}");
    }
    for (tap, link) in taps.into_iter().zip(["the client's link", "the server's link", "the nodes' wire"]) {
        let seen = tap.finish().unwrap();
        assert_eq!(seen.plaintext_bytes, 0, "{link}: {:?}", seen.plaintext_flows);
        assert_eq!((seen.tls_bytes, seen.not_tls_bytes), (0, 0), "nor a tunnel on {link}");
    }
    let agent = world.agent_ref("n1");
    assert_eq!(agent.metric("hauberk_tls_handshakes_total", &[]).unwrap(), 0.0);
    assert_eq!(agent.metric("hauberk_pool_connections", &[]).unwrap(), 0.0);

    // One record on either side for each connection, with both identities, and an honest label.
    for direction in ["outbound", "inbound"] {
        wait_ended(&world, direction, &["encryption=\"local\"", "reason=\"done\""], 1002.0);
        let all = agent.metric("hauberk_connections_total", &[direction]).unwrap();
        assert_eq!(all, 1002.0, "{direction}");
        let bytes = agent.metric("hauberk_bytes_total", &[direction, "flow=\"sent\""]).unwrap();
        assert!(bytes >= 200e6, "{direction}: {bytes} bytes");
        assert_eq!(agent.metric("hauberk_connections_open", &[direction]).unwrap(), 0.0);
        let log = agent.log();
        let line = log.lines().find(|line| line.contains(&format!("direction=\"{direction}\""))).unwrap();
        for part in ["encryption=\"local\"", "/sa/client", "/sa/server", &client.v4.to_string()] {
            assert!(line.contains(part), "{direction}: {part} is not in {line}");
        }
    }
}

#[test]
fn a_gibibyte_each_way_at_once_arrives_whole() {
    let world = neighbours(Options::default());
    let (client, server) = two(&world);
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let seen = client.host.actor(&["bulk", &server.v4(8080), &(1u64 << 30).to_string()]).unwrap();
    assert_eq!(seen["same"], true, "{seen}");
}

#[test]
fn each_side_may_end_first_and_single_bytes_all_arrive() {
    let world = neighbours(Options::default());
    let (client, server) = two(&world);
    let _sum = server.host.actor_server(&["sum", "0.0.0.0:8080"]).unwrap();
    let seen = client.host.actor(&["half-close", &server.v4(8080), "3000000"]).unwrap();
    assert_eq!(seen["same"], true, "the client ended first: {seen}");
    let mut end_first = server.host.actor_server(&["end-first", "0.0.0.0:8081"]).unwrap();
    let seen = client.host.actor(&["send-after-end", &server.v4(8081), "3000000"]).unwrap();
    assert_eq!(seen["read"], "the end", "{seen}");
    let seen = end_first.said().unwrap();
    assert_eq!((seen["received"].as_u64(), seen["ended"].as_str()), (Some(3_000_000), Some("end")), "{seen}");
    let _echo = server.host.actor_server(&["echo", "[::]:8082"]).unwrap();
    for to in [server.v4(8082), server.v6(8082)] {
        let seen = client.host.actor(&["chatty", &to, "20000"]).unwrap();
        assert_eq!(seen["same"], true, "{to}: {seen}");
    }
}

#[test]
fn failures_are_resets_at_once_for_the_same_reasons() {
    let world = neighbours(Options::default());
    let (client, server) = two(&world);
    let poke = |to: &str| client.host.actor(&["poke", to]).unwrap();
    let _reset = server.host.actor_server(&["reset", "[::]:8080"]).unwrap();
    for to in [server.v4(8080), server.v6(8080)] {
        assert_reset(&poke(&to), "a server's reset");
    }
    wait_ended(&world, "outbound", &["reason=\"peer_reset\"", "encryption=\"local\"", "allowed"], 2.0);
    wait_ended(&world, "inbound", &["reason=\"app_reset\"", "encryption=\"local\"", "allowed"], 2.0);
    for to in [server.v4(9), server.v6(9)] {
        assert_reset(&poke(&to), "a closed port");
    }
    for direction in ["outbound", "inbound"] {
        wait_ended(&world, direction, &["reason=\"refused\"", "failed"], 2.0);
    }
    // The agent's own ports, as a peer would be refused them.
    for port in [15001, 15002, 15008] {
        assert_reset(&poke(&server.v4(port)), "a port of the agent's");
    }
    for direction in ["outbound", "inbound"] {
        wait_ended(&world, direction, &["reason=\"agent_port\"", "denied"], 3.0);
    }
    let mut watch = server.host.actor_server(&["watch", "0.0.0.0:8082"]).unwrap();
    client.host.actor(&["abort", &server.v4(8082)]).unwrap();
    assert_eq!(watch.said().unwrap()["ended"], "reset", "a client's reset is the server's");
    wait_ended(&world, "outbound", &["reason=\"app_reset\""], 1.0);
    wait_ended(&world, "inbound", &["reason=\"peer_reset\""], 1.0);
}

#[test]
fn both_sides_see_each_others_true_address_and_no_borrowed_one() {
    let world = neighbours(Options::default());
    let (client, server) = two(&world);
    let _server = server.host.actor_server(&["whoami", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    for (to, local) in [
        (server.v4(8080), client.v4.to_string()),
        (server.v6(8081), client.v6.to_string()),
        (server.v4(8081), client.v4.to_string()),
    ] {
        let seen = client.host.actor(&["ask", &to]).unwrap();
        assert_eq!(seen["peer"], to.as_str(), "the client's getpeername() for {to}: {seen}");
        assert!(seen["local"].as_str().unwrap().contains(&local), "{seen}");
        assert_eq!(seen["server"]["accept"], seen["local"], "accept() at the server for {to}: {seen}");
        assert_eq!(seen["server"]["getpeername"], seen["local"], "{seen}");
        assert_eq!(seen["server"]["local"], to.as_str(), "{seen}");
    }
    // A container that may configure its network takes another pod's address.
    client.host.ip(&["addr", "add", "10.1.1.77/32", "dev", "lo"]).unwrap();
    let seen = client.host.actor(&["ask", &server.v4(8080), "--bind", "10.1.1.77:0"]);
    // It gets no connection, or one that shows its own address.
    if let Ok(seen) = seen {
        let shown = seen["server"]["accept"].as_str().unwrap();
        assert!(shown.starts_with(&format!("{}:", client.v4)), "{seen}");
    }
}

#[test]
fn a_pod_reaches_itself_and_its_neighbours_by_a_service_address() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n1", Mode::Permissive).unwrap();
    world.service("both", "10.96.0.10", 80, 8080, &["client", "server"]);
    world.start().unwrap();
    let listen = ["whoami", "0.0.0.0:8080"];
    let _servers = ["client", "server"].map(|pod| world.get(pod).host.actor_server(&listen).unwrap());
    let client = world.get("client");
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..24 {
        let seen = client.host.actor(&["ask", "10.96.0.10:80"]).unwrap();
        assert_eq!(seen["peer"], "10.96.0.10:80", "{seen}");
        assert_eq!(seen["server"]["accept"], seen["local"], "{seen}");
        answered.insert(seen["server"]["local"].as_str().unwrap().to_owned());
    }
    assert!(answered.contains(&world.get("server").v4(8080)), "{answered:?}");
    wait_ended(&world, "inbound", &["encryption=\"local\""], 24.0);
}

#[test]
fn many_short_and_many_held_connections_cost_no_descriptor_in_the_end() {
    let world = neighbours(Options::default());
    let (client, server) = two(&world);
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    let agent = world.agent_ref("n1");
    client.host.actor(&["many", &server.v4(8080), "200", "32"]).unwrap();
    let files = || agent.metric("process_open_fds", &[]).unwrap();
    let before = files();
    let seen = client.host.actor(&["many", &server.v4(8080), "10000", "32"]).unwrap();
    assert_eq!(seen["ok"], 10_000, "{seen}");
    let seen = client.host.actor(&["many", &server.v6(8081), "500", "32"]).unwrap();
    assert_eq!(seen["ok"], 500, "{seen}");

    let resident = || agent.metric("process_resident_memory_bytes", &[]).unwrap();
    let idle = resident();
    let mut hold = client.host.actor_server(&["hold", &server.v4(8080), "2000"]).unwrap();
    let seen = hold.said().unwrap();
    assert_eq!((seen["ok"].as_u64(), seen["alive"].as_u64()), (Some(2000), Some(2000)), "{seen}");
    let (open, each) = (files() - before, (resident() - idle) / 2000.0);
    assert!(open < 2.0 * 2000.0 + 200.0, "{open} descriptors for 2,000 connections: two for each");
    // The bar is 5 KiB for a stream at each of two agents; this is all there is of it, unoptimised.
    assert!(each < 8.0 * 1024.0, "{each} bytes for each open idle connection");
    hold.process.close_stdin();
    drop(hold);
    for _ in 0..100 {
        if files() <= before + 150.0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("{} descriptors more than before stay open", files() - before);
}

#[test]
fn a_reader_that_stops_holds_a_bounded_amount_and_hurts_nobody() {
    let world = neighbours(Options::default());
    let (client, server) = two(&world);
    let _stall = server.host.actor_server(&["stall", "0.0.0.0:8080"]).unwrap();
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let resident = || world.agent_ref("n1").metric("process_resident_memory_bytes", &[]).unwrap();
    client.host.actor(&["bulk", &server.v4(8081), "50000000"]).unwrap();
    let before = resident();
    let mut pushes: Vec<_> =
        (0..8).map(|_| client.host.actor_server(&["push", &server.v4(8080)]).unwrap()).collect();
    for push in &mut pushes {
        let written = push.said().unwrap()["written"].as_u64().unwrap();
        assert!(written < 64 << 20, "the writer was pushed back after {written} bytes");
    }
    // README: a pipe of 256 KiB for each, which is the kernel's memory, or a read of 64 KiB.
    let grown = resident() - before;
    assert!(grown < 8.0 * 128e3 + 2e6, "eight stalled readers made the agent grow by {grown} bytes");
    let seen = client.host.actor(&["bulk", &server.v4(8081), "50000000"]).unwrap();
    assert_eq!(seen["same"], true, "another connection meanwhile: {seen}");
}

#[test]
fn a_pod_that_is_removed_takes_its_connections_with_it() {
    let mut world = neighbours(Options::default());
    let to = world.get("server").v4(8080);
    for gone in ["client", "server"] {
        let mut watch = world.get("server").host.actor_server(&["watch", "0.0.0.0:8080"]).unwrap();
        let mut hold = world.get("client").host.actor_server(&["hold", &to, "1"]).unwrap();
        assert_eq!(hold.said().unwrap()["alive"], 1);
        world.change(gone, |pod| pod.listed = false).unwrap();
        assert_eq!(watch.said().unwrap()["ended"], "reset", "{gone} is gone");
        wait_ended(&world, "outbound", &["reason=\"draining\""], 1.0);
        wait_ended(&world, "inbound", &["reason=\"draining\""], 1.0);
        drop((hold, watch));
        wait_enrolled(&world, 1.0);
        world.change(gone, |pod| pod.listed = true).unwrap();
        wait_enrolled(&world, 2.0);
        world.agent("n1").wait_ready().unwrap();
    }
}

#[test]
fn a_stopping_agent_waits_for_them_and_resets_them_at_its_deadline() {
    let mut world = neighbours(Options { agent_yaml: "drainSeconds: 2\n".into(), ..Options::default() });
    let to = world.get("server").v4(8080);
    let mut watch = world.get("server").host.actor_server(&["watch", "0.0.0.0:8080"]).unwrap();
    let mut hold = world.get("client").host.actor_server(&["hold", &to, "1"]).unwrap();
    assert_eq!(hold.said().unwrap()["alive"], 1);
    let took = world.agent("n1").stop(Duration::from_secs(20)).unwrap();
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(6), "{took:?}");
    assert_eq!(watch.said().unwrap()["ended"], "reset");
}

#[test]
fn who_has_no_svid_is_refused_in_both_roles() {
    let agent_yaml = "tunnel: {handshakeTimeoutMs: 1500}\n".into();
    let mut world = neighbours(Options { agent_yaml, ..Options::default() });
    world.stop_authority();
    world.pod("late", "n1", Mode::Strict).unwrap();
    world.write_directory().unwrap();
    let listen = ["echo", "0.0.0.0:8080"];
    let _echoes = ["late", "server"].map(|pod| world.get(pod).host.actor_server(&listen).unwrap());
    let poke = |from: &str, to: &str| world.get(from).host.actor(&["poke", &world.get(to).v4(8080)]).unwrap();
    for _ in 0..100 {
        if world.agent_ref("n1").log().contains("workload=\"demo/late\"") {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_reset(&poke("late", "server"), "a client without an SVID");
    assert_reset(&poke("client", "late"), "a server without an SVID");
    for direction in ["outbound", "inbound"] {
        wait_ended(&world, direction, &["reason=\"no_svid\"", "encryption=\"none\"", "failed"], 2.0);
    }
    let log = world.agent_ref("n1").log();
    assert!(log.contains("no SVID has been issued for spiffe://test.local/ns/demo/sa/late yet"), "{log}");
    assert_eq!(poke("client", "server")["end"], "data", "the others go on");
    // And once it is issued, nothing has to be restarted.
    world.start_authority().unwrap();
    world.agent("n1").wait_ready().unwrap();
    let to = world.get("server").v4(8080);
    assert_eq!(world.get("late").host.actor(&["poke", &to]).unwrap()["end"], "data");
}

#[test]
fn an_expired_svid_is_refused() {
    let mut world = neighbours(Options { svid_seconds: 10, ..Options::default() });
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let poke = |world: &World| world.get("client").host.actor(&["poke", &to]).unwrap();
    assert_eq!(poke(&world)["end"], "data");
    world.stop_authority();
    std::thread::sleep(Duration::from_secs(11));
    assert_reset(&poke(&world), "an expired SVID");
    for direction in ["outbound", "inbound"] {
        wait_ended(&world, direction, &["reason=\"expired\"", "encryption=\"none\"", "denied"], 1.0);
    }
}
