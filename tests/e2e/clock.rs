//! Clocks that jump, by hours or weeks, ahead and back: nothing breaks that a wrong clock need not break, nobody
//! storms the authority, and all is well again when the clock is right, without a restart.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::clock::Clock;
use tests::host::bin;
use tests::{Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(40);
const DAY: i64 = 24 * 3600;

/// The usual world, in which each has a clock of its own.
fn world(svid_seconds: u64) -> (World, BTreeMap<&'static str, Clock>) {
    let mut world = World::new(Options { svid_seconds, ..Options::default() }).unwrap();
    let clocks: BTreeMap<_, _> = ["n1", "n2", "authority"]
        .into_iter()
        .map(|who| (who, Clock::new(&world.dir(), who, &bin("hauberk").unwrap()).unwrap()))
        .collect();
    let builds = clocks.iter().map(|(who, clock)| ((*who).to_owned(), clock.program())).collect();
    world.configure(|options| options.builds = builds);
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    (world, clocks)
}

fn reaches(world: &World) -> bool {
    let to = world.get("server").v4(8081);
    world.get("client").host.actor(&["poke", &to]).unwrap()["end"] == "data"
}

/// How often an agent has asked the authority.
fn asked(world: &World, node: &str) -> f64 {
    world.agent_ref(node).metric("hauberk_svid_requests_total", &[]).unwrap()
}

/// Seconds of processor time that an agent has used.
fn busy(world: &World, node: &str) -> f64 {
    world.agent_ref(node).metric("process_cpu_seconds_total", &[]).unwrap()
}

fn panicked(world: &World) -> bool {
    ["n1", "n2"].iter().any(|node| world.agent_ref(node).log().contains("panicked"))
        || std::fs::read_to_string(world.dir().join("authority.log")).unwrap().contains("panicked")
}

#[test]
fn an_agent_whose_clock_jumps_is_back_when_the_clock_is_and_has_cut_nothing() {
    let (world, clocks) = world(600);
    let server = world.get("server");
    let _echoes =
        [8080, 8081].map(|port| server.host.actor_server(&["echo", &format!("0.0.0.0:{port}")]).unwrap());
    let _stay = world.get("client").host.actor_server(&["stay", &server.v4(8080)]).unwrap();
    let open = || world.agent_ref("n1").metric("hauberk_connections_open", &["outbound"]).unwrap();
    wait_until(SOON, "it is connected", || reaches(&world) && open() == 1.0);
    for jump in [3 * DAY, -3 * DAY, 40 * DAY] {
        let (asked_before, busy_before, began) = (asked(&world, "n1"), busy(&world, "n1"), Instant::now());
        clocks["n1"].set(jump).unwrap();
        if jump > 0 {
            wait_until(SOON, "by its clock everybody has expired", || !reaches(&world));
        }
        // Long enough for every loop of the agent to notice.
        std::thread::sleep(Duration::from_secs(8));
        let (asked, busy) = (asked(&world, "n1") - asked_before, busy(&world, "n1") - busy_before);
        let passed = began.elapsed().as_secs_f64();
        assert!(asked <= 4.0 + passed, "{asked} requests to the authority in {passed} s");
        assert!(busy <= 0.5 * passed, "{busy} s of processor time in {passed} s");
        assert_eq!(open(), 1.0, "the open connection lives on (jump of {jump} s)");
        clocks["n1"].set(0).unwrap();
        wait_until(SOON, "all is well when the clock is right", || reaches(&world));
        assert_eq!(open(), 1.0, "the open connection lives on (jump of {jump} s back)");
    }
    assert!(!panicked(&world));
}

#[test]
fn the_authoritys_clock_retires_no_root_by_jumping_and_issues_again_when_it_is_right() {
    let (mut world, clocks) = world(600);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    wait_until(SOON, "it is connected", || reaches(&world));
    world.authority_command(&["rotate-root", "--no-wait"]).unwrap();
    let rotation = |world: &World| -> Value {
        let status = world.authority_command(&["status", "-o", "json"]).unwrap();
        serde_json::from_str::<Value>(&status).unwrap()
    };
    let phase = |world: &World| rotation(world)["rotation"]["phase"].as_str().unwrap().to_owned();
    wait_until(SOON, "the new root signs", || phase(&world) == "retire");
    let log = |world: &World| std::fs::read_to_string(world.dir().join("authority.log")).unwrap();
    clocks["authority"].set(40 * DAY).unwrap();
    wait_until(SOON, "it notices", || log(&world).contains("the clock has jumped ahead"));
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        assert_eq!(phase(&world), "retire", "a root left because a clock jumped");
        assert!(reaches(&world), "agents need no authority for this");
    }
    clocks["authority"].set(-2 * DAY).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(reaches(&world));
    clocks["authority"].set(0).unwrap();
    // What is new needs an SVID.
    world.pod("late", "n1", Mode::Strict).unwrap();
    world.write_directory().unwrap();
    let to = world.get("server").v4(8081);
    wait_until(SOON, "it issues again", || {
        world.get("late").host.actor(&["poke", &to]).unwrap()["end"] == "data"
    });
    assert_eq!(rotation(&world)["roots"].as_array().unwrap().len(), 2);
    assert!(!panicked(&world));
}

#[test]
fn svids_of_a_time_that_was_taken_back_are_replaced_at_once() {
    let (world, clocks) = world(3600);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    wait_until(SOON, "it is connected", || reaches(&world));
    let before = [asked(&world, "n1"), asked(&world, "n2")];
    // Far enough that all is renewed, and nothing has expired.
    for clock in clocks.values() {
        clock.set(40 * 60).unwrap();
    }
    for (node, before) in ["n1", "n2"].into_iter().zip(before) {
        wait_until(SOON, "everything is renewed", || asked(&world, node) >= before + 2.0);
    }
    wait_until(SOON, "by a clock that all share all is well", || reaches(&world));
    for clock in clocks.values() {
        clock.set(0).unwrap();
    }
    // By the clock's word the new ones are not valid for another 39 minutes.
    for node in ["n1", "n2"] {
        let valid = || {
            let (_, page) = world.agent_ref(node).page("/metrics").unwrap();
            let now =
                std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
            let ends =
                page.lines().filter(|line| line.starts_with("hauberk_certificate_expiry_timestamp_seconds{"));
            let ends: Vec<f64> = ends.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
            ends.len() == 2 && ends.iter().all(|end| *end <= now + 3601.0)
        };
        wait_until(SOON, "they are replaced", valid);
    }
    wait_until(SOON, "and all is well", || reaches(&world));
    assert!(!panicked(&world));
}
