//! An agent's threads and the connections between nodes: few streams share one, many have one for each thread.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::thread::sleep;
use std::time::Duration;

use tests::{Mode, Options, World, wait_until};

const THREADS: f64 = 4.0;

#[test]
fn few_streams_share_one_connection_whichever_thread_accepts_them_and_many_do_not() {
    let options = Options { agent_yaml: "workers: 4\n".into(), ..Options::default() };
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let dialled = || {
        let labels = ["role=\"client\"", "outcome=\"ok\""];
        world.agent_ref("n1").metric("hauberk_tls_handshakes_total", &labels).unwrap()
    };
    let exchange = |count: &str, at_once: &str| {
        let seen = client.host.actor(&["many", &server.v4(8080), count, at_once]).unwrap();
        assert_eq!(seen["ok"].to_string(), count, "{seen}");
    };
    wait_until(Duration::from_secs(30), "a connection is made ahead", || dialled() >= 1.0);
    // The kernel gives each to any of the four threads: all on one has a chance of one in a thousand.
    for _ in 0..6 {
        exchange("1", "1");
        // No thread gets two within a second.
        sleep(Duration::from_millis(1050));
    }
    assert_eq!(dialled(), 1.0, "one connection is enough for all threads");
    exchange("400", "16");
    wait_until(Duration::from_secs(10), "other threads have a connection of their own", || dialled() > 1.0);
    exchange("400", "16");
    assert!(dialled() <= THREADS, "{} connections for {THREADS} threads", dialled());
}
