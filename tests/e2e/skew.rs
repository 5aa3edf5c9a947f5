//! Agents and an authority of this version beside those of another: `cargo xtask skew` builds one and runs this.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use nix::sys::signal::Signal;
use tests::host::bin;
use tests::{Mode, Options, World};

fn other() -> String {
    std::env::var("HAUBERK_OTHER").expect("HAUBERK_OTHER names another version's binary")
}

/// A world in which some are of the other version.
fn world(others: &[&str]) -> World {
    let builds = others.iter().map(|who| ((*who).to_owned(), other())).collect();
    let mut world = World::new(Options { builds, ..Options::default() }).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    world
}

fn exchange(world: &World, count: u64) {
    let to = world.get("server").v4(8080);
    let seen = world.get("client").host.actor(&["many", &to, &count.to_string(), "4"]).unwrap();
    assert_eq!(seen["ok"], count, "{seen}");
}

#[test]
#[ignore = "needs another version's binary: cargo xtask skew"]
fn whoever_is_of_the_other_version_is_understood() {
    for others in [&["n1"][..], &["n2"], &["authority"], &["n1", "n2"]] {
        let world = world(others);
        let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
        let tap = world.tap().unwrap();
        exchange(&world, 200);
        let seen = tap.finish().unwrap();
        assert!(seen.tls_records > 0, "{others:?}");
        assert_eq!(
            (seen.plaintext_bytes, seen.not_tls_bytes),
            (0, 0),
            "{others:?}: {:?}",
            seen.plaintext_flows
        );
    }
}

#[test]
#[ignore = "needs another version's binary: cargo xtask skew"]
fn an_agent_is_upgraded_and_downgraded_while_it_serves() {
    let mut world = world(&["n2"]);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    for build in [bin("hauberk").unwrap(), other()] {
        exchange(&world, 100);
        world.agent("n2").replace_build(&build);
        let old = world.agent("n2").upgrade().unwrap();
        exchange(&world, 100);
        old.signal(Signal::SIGTERM);
        assert!(old.wait(Duration::from_secs(20)).unwrap().success());
        exchange(&world, 100);
    }
}
