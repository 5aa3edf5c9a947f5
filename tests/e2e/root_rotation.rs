//! The root of trust is changed under load and nobody notices; who cannot hear of it is waited for by name, and
//! who was away for all of it finds the way back.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::{Duration, Instant};

use serde_json::Value;
use tests::world::AUTHORITY;
use tests::{Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(30);

fn world(svid_seconds: u64) -> World {
    let mut world = World::new(Options { svid_seconds, ..Options::default() }).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    world
}

fn status(world: &World) -> Value {
    serde_json::from_str(&world.authority_command(&["status", "-o", "json"]).unwrap()).unwrap()
}

fn phase(world: &World) -> String {
    status(world)["rotation"]["phase"].as_str().unwrap().to_owned()
}

fn roots(world: &World) -> Vec<(String, String)> {
    let text = |root: &Value, key: &str| root[key].as_str().unwrap().to_owned();
    let all = status(world)["roots"].as_array().unwrap().clone();
    all.iter().map(|root| (text(root, "id"), text(root, "state"))).collect()
}

fn agent(world: &World, node: &str) -> Value {
    let all = status(world)["agents"].clone();
    all.as_array().unwrap().iter().find(|agent| agent["node"] == node).unwrap().clone()
}

/// Cuts a node off from the authority and from nothing else, or joins it again.
fn cut(world: &World, node: &str, act: &str) {
    let (address, port) = AUTHORITY.split_once(':').unwrap();
    let rule = ["rule", act, "to", address, "ipproto", "tcp", "dport", port, "blackhole"];
    world.host(node).ip(&rule).unwrap();
}

#[test]
fn a_new_root_under_load_fails_no_request_and_waits_for_an_agent_that_is_cut_off() {
    let world = world(50);
    let (client, server) = (world.get("client"), world.get("server"));
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let _watch = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let mut stay = client.host.actor_server(&["stay", &server.v4(8080)]).unwrap();
    let before = roots(&world);
    assert_eq!(before.len(), 1);
    wait_until(SOON, "both agents have said what they applied", || {
        ["n1", "n2"].iter().all(|node| agent(&world, node)["generation"] == 1)
    });
    cut(&world, "n2", "add");

    let (lanes, printed) = std::thread::scope(|scope| {
        let lane = || client.host.actor(&["loop", &server.v4(8081), "100"]).unwrap();
        let lanes: Vec<_> = (0..2).map(|_| scope.spawn(lane)).collect();
        let rotating = scope.spawn(|| world.authority_command(&["rotate-root"]).unwrap());

        wait_until(SOON, "the connected agent has both roots", || agent(&world, "n1")["generation"] == 2);
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until {
            let now = status(&world);
            assert_eq!(now["rotation"]["phase"], "prepare", "it goes on without n2: {now}");
            let waits = now["rotation"]["waitsFor"].as_array().unwrap();
            assert!(waits.len() == 1 && waits[0]["what"].as_str().unwrap().contains("node n2"), "{now}");
            std::thread::sleep(Duration::from_millis(500));
        }
        // Whoever asks again goes on with the one that is under way.
        let again = world.authority_command(&["rotate-root", "--no-wait", "-o", "json"]).unwrap();
        assert!(again.contains("\"prepare\"") && again.contains("node n2"), "{again}");

        cut(&world, "n2", "del");
        wait_until(SOON, "the agent hears of the root by itself, and the new one signs", || {
            phase(&world) == "retire"
        });
        assert_eq!(agent(&world, "n2")["generation"], 2);
        let printed = rotating.join().unwrap();
        (lanes.into_iter().map(|lane| lane.join().unwrap()).collect::<Vec<_>>(), printed)
    });
    for lane in &lanes {
        assert!(lane["ok"].as_u64().unwrap() > 0, "{lane}");
        assert_eq!(lane["ok"], lane["all"], "every exchange during the whole rotation: {lane}");
    }
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines.iter().any(|line| line.starts_with("prepare") && line.contains("node n2")), "{printed}");
    assert!(lines.iter().any(|line| line.starts_with("retire")), "{printed}");
    assert!(lines.last().unwrap().starts_with("idle (generation 3"), "{printed}");
    let after = roots(&world);
    assert!(after.len() == 1 && after[0].0 != before[0].0 && after[0].1 == "signs", "{after:?}");
    wait_until(SOON, "both agents trust the new root alone", || {
        ["n1", "n2"].iter().all(|node| agent(&world, node)["generation"] == 3)
    });
    let last = client.host.actor(&["many", &server.v4(8081), "50", "4"]).unwrap();
    assert_eq!(last["ok"], 50, "{last}");
    stay.process.close_stdin();
}

#[test]
fn a_node_that_was_away_while_the_root_changed_finds_the_way_with_the_old_roots_file() {
    let mut world = world(10);
    let to = world.get("server").v4(8081);
    world.agent("n2").kill9();
    let before = roots(&world);
    let printed = world.authority_command(&["rotate-root"]).unwrap();
    assert!(printed.contains("node n2"), "it was waited for until what it held had expired: {printed}");
    assert_ne!(roots(&world)[0].0, before[0].0);
    // Its file has the old root only; the token is new, as what it held has expired.
    world.start_agent("n2").unwrap();
    world.agent("n2").wait_ready().unwrap();
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    wait_until(SOON, "its pods are reached again", || {
        world.get("client").host.actor(&["poke", &to]).unwrap()["end"] == "data"
    });
    wait_until(SOON, "it has said so", || agent(&world, "n2")["generation"] == 3);
}

#[test]
fn an_aborted_rotation_and_one_over_an_authoritys_death_leave_the_mesh_as_it_is() {
    let mut world = world(20);
    let to = world.get("server").v4(8081);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let before = roots(&world);
    cut(&world, "n2", "add");
    world.authority_command(&["rotate-root", "--no-wait"]).unwrap();
    let aborted = world.authority_command(&["rotate-root", "--abort"]).unwrap();
    assert!(aborted.starts_with("idle"), "{aborted}");
    assert_eq!(roots(&world), before);
    let nothing = world.authority_command(&["rotate-root", "--abort"]).unwrap_err().to_string();
    assert!(nothing.contains("no rotation is under way"), "{nothing}");

    world.authority_command(&["rotate-root", "--no-wait"]).unwrap();
    world.stop_authority();
    let alone = world.authority_command(&["rotate-root"]).unwrap_err().to_string();
    assert!(alone.contains("only while the authority runs"), "{alone}");
    let resting = status(&world);
    assert!(resting["warning"].as_str().unwrap().contains("state on disk"), "{resting}");
    assert_eq!(resting["rotation"]["phase"], "prepare");
    world.start_authority().unwrap();
    let excluded = world.authority_command(&["rotate-root", "--no-wait", "--exclude-node", "n2"]).unwrap();
    assert!(excluded.contains("generation"), "{excluded}");
    wait_until(SOON, "it goes on without the excluded node", || phase(&world) == "retire");
    world.authority_command(&["rotate-root", "--abort"]).unwrap();
    cut(&world, "n2", "del");
    wait_until(Duration::from_secs(90), "the new root leaves again", || phase(&world) == "idle");
    assert_eq!(roots(&world), before, "the old one signs as before");
    wait_until(SOON, "everybody reaches everybody", || {
        world.get("client").host.actor(&["poke", &to]).unwrap()["end"] == "data"
    });
}
