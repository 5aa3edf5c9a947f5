//! Services' endpoints: nearest, least loaded, and none that is dead.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::{Duration, Instant};

use tests::{Mode, Options, World};

const WEB: &str = "10.96.0.10:80";

/// Tries until it holds, for as long as a few back-offs take.
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A client on node 1, endpoints on the nodes given, and the service [`WEB`] of all of them.
fn world(options: Options, endpoints: &[(&str, &str)]) -> World {
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    for (name, node) in endpoints {
        world.pod(name, node, Mode::Strict).unwrap();
    }
    let names: Vec<_> = endpoints.iter().map(|(name, _)| *name).collect();
    world.service("web", "10.96.0.10", 80, 8080, &names);
    world
}

fn count(world: &World, metric: &str, labels: &[&str]) -> f64 {
    world.agent_ref("n1").metric(&format!("hauberk_balance_{metric}"), labels).unwrap()
}

/// Who answers one connection to the service.
fn answers(world: &World) -> String {
    let seen = world.get("client").host.actor(&["ask", WEB]).unwrap();
    seen["server"]["local"].as_str().unwrap().to_owned()
}

#[test]
fn a_dead_application_loses_few_connections_none_once_ejected_and_comes_back() {
    let mut world = world(Options::default(), &[("one", "n2"), ("two", "n2")]);
    world.start().unwrap();
    let one = world.get("one").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let many = |count: &str| world.get("client").host.actor(&["many", WEB, count, "4"]).unwrap();
    // Only those that are on their way before the first refusal comes back: one in each lane.
    let seen = many("200");
    assert!(seen["ok"].as_u64().unwrap() >= 196, "{seen}");
    soon("the dead endpoint is ejected", || {
        many("8");
        count(&world, "ejections_total", &[]) == 1.0
    });
    assert_eq!(count(&world, "ejected", &[]), 1.0);
    // Long enough that back-offs end: who is sent to probe is sent on to the other.
    let until = Instant::now() + Duration::from_secs(4);
    let before = count(&world, "retries_total", &[]);
    while Instant::now() < until {
        let seen = many("50");
        assert_eq!(seen["ok"], 50, "{seen}");
    }
    assert!(count(&world, "retries_total", &[]) > before, "there were probes");
    let log = world.agent_ref("n1").log();
    let ejected = log.lines().find(|line| line.contains("an endpoint is ejected")).unwrap();
    assert!(ejected.contains("sa/two"), "the log says who it is: {ejected}");

    let two = world.get("two").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    soon("it comes back", || {
        let seen = many("20");
        assert_eq!(seen["ok"], 20, "{seen}");
        count(&world, "ejected", &[]) == 0.0
    });
    drop((one, two));
}

#[test]
fn endpoints_that_cannot_be_reached_lose_no_connection() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("live", "n2", Mode::Strict).unwrap();
    world.ghost("gone", "10.1.2.77");
    world.ghost("silent", "10.1.2.78");
    world.host("n2").ip(&["route", "add", "unreachable", "10.1.2.77/32"]).unwrap();
    world.host("n2").ip(&["route", "add", "blackhole", "10.1.2.78/32"]).unwrap();
    world.service("some-gone", "10.96.0.10", 80, 8080, &["live", "gone"]);
    world.service("some-silent", "10.96.0.11", 80, 8080, &["live", "silent"]);
    world.service("all-gone", "10.96.0.12", 80, 8080, &["gone", "silent"]);
    world.start().unwrap();
    let _live = world.get("live").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let client = &world.get("client").host;
    for (service, ejections) in [(WEB, 1.0), ("10.96.0.11:80", 2.0)] {
        soon("it is ejected", || {
            let seen = client.actor(&["many", service, "20", "4"]).unwrap();
            assert_eq!(seen["ok"], 20, "{service}: {seen}");
            count(&world, "ejections_total", &[]) == ejections
        });
    }
    assert!(count(&world, "retries_total", &[]) >= 6.0, "three failures each were tried again");
    // With nobody left the end is a reset, and comes in time.
    let seen = client.actor(&["poke", "10.96.0.12:80"]).unwrap();
    assert!(seen["end"] == "reset" || seen["connect"] == "reset", "{seen}");
    // A ghost's own address is nobody's to choose, and not to be ejected either.
    let before = count(&world, "picks_total", &[]);
    let seen = client.actor(&["poke", "10.1.2.77:8080"]).unwrap();
    assert!(seen["end"] == "reset" || seen["connect"] == "reset", "{seen}");
    assert_eq!(count(&world, "picks_total", &[]), before, "no pick");
}

#[test]
fn an_endpoint_on_the_same_node_is_preferred_while_it_serves() {
    let mut world = world(Options::default(), &[("far", "n2"), ("near", "n1")]);
    world.start().unwrap();
    let _far = world.get("far").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let near_app = world.get("near").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let (near, far) = (world.get("near").v4(8080), world.get("far").v4(8080));
    for _ in 0..20 {
        assert_eq!(answers(&world), near);
    }
    assert_eq!(count(&world, "picks_total", &["locality=\"node\""]), 20.0);
    assert_eq!(count(&world, "picks_total", &["locality=\"other\""]), 0.0);
    drop(near_app);
    for _ in 0..20 {
        assert_eq!(answers(&world), far, "inside the node nothing is sent before the application accepts");
    }
    let _near_app = world.get("near").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    soon("it is preferred again", || answers(&world) == near);
}

#[test]
fn the_least_loaded_endpoint_is_preferred_and_a_crowded_near_one_overflows() {
    let options = Options { log: "info,access=info".into(), ..Options::default() };
    let mut world = world(options, &[("one", "n2"), ("two", "n2")]);
    world.pod("near", "n1", Mode::Strict).unwrap();
    world.service("one-alone", "10.96.0.11", 80, 8080, &["one"]);
    world.service("local", "10.96.0.12", 80, 8080, &["near", "two"]);
    world.start().unwrap();
    let _apps: Vec<_> = ["one", "two", "near"]
        .map(|name| world.get(name).host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap())
        .into();
    let client = &world.get("client").host;
    let mut held = client.actor_server(&["hold", "10.96.0.11:80", "20"]).unwrap();
    assert_eq!(held.said().unwrap()["alive"], 20);
    let seen = client.actor(&["many", WEB, "30", "1"]).unwrap();
    assert_eq!(seen["ok"], 30, "{seen}");
    // Both services count the connections that `one` has.
    let to = |name: &str| {
        let address = world.get(name).v4(8080);
        let log = world.agent_ref("n1").log();
        log.lines()
            .filter(|l| l.contains("outbound") && l.contains(&format!("destination=\"{address}\"")))
            .count()
    };
    soon("the log tells of all", || to("one") + to("two") >= 30);
    assert_eq!((to("one"), to("two")), (0, 30), "all went to the one with fewer");

    let mut crowd = client.actor_server(&["hold", "10.96.0.12:80", "62"]).unwrap();
    assert_eq!(crowd.said().unwrap()["alive"], 62);
    let near = count(&world, "picks_total", &["locality=\"node\""]);
    // The nearer holds its 32 and twice as many as the farther: 52 and 10.
    assert!((50.0..=54.0).contains(&near), "{near}");
}
