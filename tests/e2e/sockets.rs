//! What applications see of their sockets: addresses, errors, options.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use tests::{Mode, Options, World};

#[test]
fn both_sides_see_each_others_true_address() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["whoami", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    for (to, local) in [
        (server.v4(8080), client.v4.to_string()),
        (server.v6(8081), client.v6.to_string()),
        (format!("[::ffff:{}]:8080", server.v4), client.v4.to_string()),
        // An IPv4 client of a dual-stack listener.
        (server.v4(8081), client.v4.to_string()),
    ] {
        let seen = client.host.actor(&["ask", &to]).unwrap();
        let expected = to.replace("[::ffff:", "").replace(&format!("{}]", server.v4), &server.v4.to_string());
        assert_eq!(seen["peer"], expected, "the client's getpeername() for {to}: {seen}");
        assert!(seen["local"].as_str().unwrap().contains(&local), "{seen}");
        assert_eq!(seen["server"]["accept"], seen["local"], "accept() at the server for {to}: {seen}");
        assert_eq!(seen["server"]["getpeername"], seen["local"], "{seen}");
        assert_eq!(seen["server"]["local"], expected, "{seen}");
    }
}

#[test]
fn unusual_ways_to_connect_work() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["whoami", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    let (v4, v6) = (server.v4(8080), server.v6(8081));
    let any_port = format!("{}:0", client.v4);
    let port = format!("{}:4321", client.v4);
    let port6 = format!("[{}]:4322", client.v6);
    for args in [
        vec!["ask", &v4, "--nonblocking"],
        vec!["ask", &v4, "--nonblocking", "--connect-twice"],
        vec!["ask", &v6, "--nonblocking"],
        vec!["ask", &v4, "--bind", &any_port],
        vec!["ask", &v4, "--bind", &port],
        // The port again at once: what the first connection leaves in TIME_WAIT must not matter.
        vec!["ask", &v4, "--bind", &port, "--reuse"],
        vec!["ask", &v6, "--bind", &port6, "--reuse", "--nonblocking"],
    ] {
        let seen = client.host.actor(&args).unwrap();
        assert_eq!(seen["server"]["accept"], seen["local"], "{args:?}: {seen}");
        if args.contains(&port.as_str()) {
            assert_eq!(seen["local"], port.as_str(), "the bound port is kept: {seen}");
        }
    }
}

#[test]
fn single_bytes_without_delay_all_arrive() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let seen = client.host.actor(&["chatty", &server.v4(8080), "60000"]).unwrap();
    assert_eq!(seen["same"], true, "{seen}");
}

#[test]
fn what_is_not_the_meshs_is_left_alone() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.pod("stranger", "n2", Mode::Off).unwrap();
    world.start().unwrap();
    let (client, server, stranger) = (world.get("client"), world.get("server"), world.get("stranger"));
    let listen = ["whoami", "0.0.0.0:8080", "[::]:8081"];
    let _own = client.host.actor_server(&listen).unwrap();
    let _strange = stranger.host.actor_server(&listen).unwrap();
    let captured = || world_metric(&world);
    for to in [
        // Loopback inside the pod, the pod's own address, and a destination outside the mesh.
        "127.0.0.1:8080".to_owned(),
        "[::1]:8081".to_owned(),
        client.v4(8080),
        client.v6(8081),
        stranger.v4(8080),
        stranger.v6(8081),
    ] {
        let seen = client.host.actor(&["ask", &to]).unwrap();
        assert_eq!(seen["peer"], to.as_str(), "{seen}");
        assert_eq!(seen["server"]["accept"], seen["local"], "{seen}");
    }
    let _udp = server.host.actor_server(&["udp-echo", "0.0.0.0:9000"]).unwrap();
    let seen = client.host.actor(&["udp-ask", &server.v4(9000)]).unwrap();
    assert_eq!(seen["answer"], "ping", "UDP to a mesh member passes: {seen}");
    assert_eq!(captured(), 0.0, "none of these was captured");
}

/// Connections that the kernel side rewrote on both nodes.
fn world_metric(world: &World) -> f64 {
    let label = ["verdict=\"captured\""];
    ["n1", "n2"]
        .iter()
        .map(|n| world.agent_ref(n).metric("hauberk_capture_verdicts_total", &label).unwrap())
        .sum()
}
