//! Worlds do not meet, and leave nothing behind.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::process::Command;

use tests::sweep::{remains, stale};
use tests::{Mode, World};

#[test]
fn two_worlds_at_once_do_not_disturb_each_other() {
    let (one, two) = (World::usual().unwrap(), World::usual().unwrap());
    assert_ne!(one.id(), two.id());
    let serve = |world: &World| world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let _servers = [serve(&one), serve(&two)];
    // Same addresses in both: each client reaches its own world's server.
    for world in [&one, &two] {
        let to = world.get("server").v4(8080);
        assert_eq!(world.get("client").host.actor(&["many", &to, "50", "4"]).unwrap()["ok"], 50);
        let label = ["direction=\"outbound\"", "allowed"];
        world.agent_ref("n1").wait_metric("hauberk_connections_total", &label, 50.0).unwrap();
        assert_eq!(world.agent_ref("n1").metric("hauberk_connections_total", &label).unwrap(), 50.0);
    }
    let ids = [one.id().to_owned(), two.id().to_owned()];
    drop(one);
    let to = two.get("server").v4(8080);
    assert_eq!(
        two.get("client").host.actor(&["many", &to, "50", "4"]).unwrap()["ok"],
        50,
        "after the other's end"
    );
    drop(two);
    for id in ids {
        assert_eq!(remains(&id).unwrap(), Vec::<String>::new());
    }
}

#[test]
fn a_test_that_panics_leaves_nothing() {
    let (told, id) = std::sync::mpsc::channel();
    let failed = std::thread::spawn(move || {
        let mut world = World::usual().unwrap();
        world.pod("third", "n1", Mode::Permissive).unwrap();
        told.send(world.id().to_owned()).unwrap();
        let _running = world.get("server").host.spawn("sleep", &["1000"]).unwrap();
        panic!("on purpose");
    });
    let id = id.recv().unwrap();
    assert!(failed.join().is_err());
    assert_eq!(remains(&id).unwrap(), Vec::<String>::new());
}

/// Run again by the next test, in a process of its own that is killed.
#[test]
fn a_world_for_a_process_that_will_be_killed() {
    let Some(file) = std::env::var_os("HAUBERK_TEST_KILL") else { return };
    let world = World::usual().unwrap();
    std::fs::write(file, world.id()).unwrap();
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn what_a_killed_run_leaves_is_swept_by_the_next() {
    let file = std::env::temp_dir().join(format!("hauberk-kill-{}", std::process::id()));
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_world_for_a_process_that_will_be_killed"])
        .env("HAUBERK_TEST_KILL", &file)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let id = loop {
        match std::fs::read_to_string(&file) {
            Ok(id) if !id.is_empty() => break id,
            _ => std::thread::sleep(std::time::Duration::from_millis(50)),
        }
    };
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_file(&file).unwrap();
    assert!(!remains(&id).unwrap().is_empty(), "a killed process cannot clean up");
    stale();
    assert_eq!(remains(&id).unwrap(), Vec::<String>::new());
}
