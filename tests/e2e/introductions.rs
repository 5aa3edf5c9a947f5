//! Workloads that prove themselves before they have a stream: it saves the first one a round trip, and admits
//! nobody.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod intruder;
mod siege;

use std::time::Duration;

use intruder::lay;
use siege::id;
use tests::{Mode, Options, World, wait_until};

#[test]
fn an_introduction_admits_nobody_whose_stream_would_not_be_admitted() {
    let siege = lay();
    let server = siege.world.get("server");
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let (to, mole, rat, client) = (server.v4(8081), id("mole"), id("rat"), id("client"));
    let [key, stolen] = [&mole, &client].map(|id| siege.svid(id));
    siege.attack(async {
        let evil = siege.intrude("evil").await;
        let (proof, stolen) = (evil.proves(&key), evil.proves(&stolen));
        for (what, destination, source, proof, expected) in [
            ("no proof", "server", &mole, None, "unproven"),
            ("another source's proof", "server", &rat, Some(&proof), "bad_proof"),
            ("a key stolen from node 1", "server", &client, Some(&stolen), "not_placed"),
            ("a workload of node 1", "client", &mole, Some(&proof), "not_local"),
            ("its own workload", "server", &mole, Some(&proof), "200"),
        ] {
            let answer = evil.introduce(&id(destination), source, proof.map(String::as_str)).await;
            assert_eq!(answer, expected, "{what}");
        }
        assert_eq!(evil.ask(&to, Some(&mole), None).await.unwrap(), "200", "and is known from then on");
        assert_eq!(evil.ask(&to, Some(&client), None).await.unwrap(), "not_placed", "the other is not");
        for _ in 0..16 {
            evil.introduce(&id("server"), &rat, Some("AQ")).await;
        }
        evil.ask(&to, Some(&mole), None).await.expect_err("sixteen bad proofs end the connection");
    });
    siege.still_serves();
}

#[test]
fn the_first_request_of_workloads_that_have_been_introduced_verifies_nothing() {
    let options = Options { agent_yaml: "workers: 1\n".into(), ..Options::default() };
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    let verified = |agent: &str| -> f64 {
        let count = |result: &str| {
            let result = format!("result=\"{result}\"");
            world.agent_ref(agent).metric("hauberk_tls_verified_chains_total", &[&result]).unwrap()
        };
        count("hit") + count("miss")
    };
    // Each dials the other: on two connections, both nodes and both workloads.
    wait_until(Duration::from_secs(30), "both have verified both ends of both connections", || {
        verified("n1") >= 4.0 && verified("n2") >= 4.0
    });
    let before = (verified("n1"), verified("n2"));
    let server = world.get("server");
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let seen = world.get("client").host.actor(&["many", &server.v4(8080), "1", "1"]).unwrap();
    assert_eq!(seen["ok"], 1, "{seen}");
    assert_eq!((verified("n1"), verified("n2")), before, "all was proven before");
}
