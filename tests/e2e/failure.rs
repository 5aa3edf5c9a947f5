//! What happens when things go wrong: killed agents, restarts, drains, bad configuration.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::process::Command;
use std::time::Duration;

use tests::host::bin;
use tests::{Mode, Options, World};

#[test]
fn an_agent_killed_under_load_leaks_nothing_and_its_successor_takes_over() {
    for victim in ["n1", "n2"] {
        let mut world = World::usual().unwrap();
        let to = world.get("server").v4(8080);
        let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
        let tap = world.tap().unwrap();
        let mut load = world.get("client").host.command(&bin("actor").unwrap(), &["loop", &to, "6"]).unwrap();
        load.stdout(std::process::Stdio::piped());
        let load = std::thread::spawn(move || tests::process::run(load, Duration::from_secs(30)).unwrap());
        std::thread::sleep(Duration::from_millis(1500));
        world.agent(victim).kill9();
        std::thread::sleep(Duration::from_millis(1000));
        // Plaintext from outside stays out as well, while nobody is there.
        if victim == "n2" {
            assert_eq!(world.host("out").actor(&["poke", &to]).unwrap()["connect"], "refused");
        }
        world.agent(victim).restart().unwrap();
        let log = world.agent_ref(victim).log();
        assert!(log.contains("took up the node's SVID"), "the restart needs no new join token");
        let load = load.join().unwrap().json().unwrap();
        let seen = tap.finish().unwrap();
        assert_eq!(seen.plaintext_bytes, 0, "{victim}: {:?}", seen.plaintext_flows);
        assert_eq!(seen.not_tls_bytes, 0, "{victim}");
        let outcomes = load["outcomes"].as_object().unwrap();
        assert!(outcomes["ok"].as_u64().unwrap() > 100, "{victim}: {load}");
        let failed: u64 = outcomes.iter().filter(|(k, _)| *k != "ok").filter_map(|(_, v)| v.as_u64()).sum();
        assert!(failed > 10, "{victim} was away for a second, and its strict pods closed: {load}");
        assert!(!outcomes.contains_key("hang"), "{victim}: failures are prompt: {load}");
        let after = world.get("client").host.actor(&["many", &to, "200", "8"]).unwrap();
        assert_eq!(after["ok"], 200, "{victim}: the successor serves: {after}");
        if victim == "n2" {
            assert!(log.contains("took up the keys of session tickets"), "{log}");
            let resumed = ["kind=\"resumed\"", "outcome=\"ok\"", "role=\"server\""];
            let resumed = world.agent_ref(victim).metric("hauberk_tls_handshakes_total", &resumed).unwrap();
            assert!(resumed >= 1.0, "the peer's tunnels came back without a full handshake");
        }
    }
}

#[test]
fn without_an_agent_strict_is_closed_and_permissive_goes_its_own_way() {
    let mut world = World::new(Options::default()).unwrap();
    world.pod("strict", "n1", Mode::Strict).unwrap();
    world.pod("open", "n1", Mode::Permissive).unwrap();
    world.pod("server", "n2", Mode::Permissive).unwrap();
    world.start().unwrap();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    world.agent("n1").kill9();
    let poke = |from: &str| world.get(from).host.actor(&["poke", &to]).unwrap();
    assert_eq!(poke("strict")["connect"], "refused");
    // Until the heartbeat is old, nobody can know that the agent is gone.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(poke("open")["end"], "data");
    assert_eq!(poke("strict")["connect"], "refused");
}

#[test]
fn a_graceful_stop_waits_for_open_connections_until_its_deadline() {
    let mut world = World::usual().unwrap();
    let to = world.get("server").v4(8080);
    let mut watch = world.get("server").host.actor_server(&["watch", "0.0.0.0:8080"]).unwrap();
    let mut hold = world.get("client").host.actor_server(&["hold", &to, "1"]).unwrap();
    assert_eq!(hold.said().unwrap()["alive"], 1);
    // The connection outlasts the deadline (5 s), and is reset then.
    let took = world.agent("n1").stop(Duration::from_secs(20)).unwrap();
    assert!(took > Duration::from_millis(4500) && took < Duration::from_secs(9), "{took:?}");
    assert_eq!(watch.said().unwrap()["ended"], "reset");
    drop(hold);

    world.agent("n1").restart().unwrap();
    let mut hold = world.get("client").host.actor_server(&["hold", &to, "1"]).unwrap();
    assert_eq!(hold.said().unwrap()["alive"], 1);
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1000));
        hold.process.close_stdin();
        hold
    });
    // With nothing open any more it does not wait for the deadline.
    let took = world.agent("n1").stop(Duration::from_secs(20)).unwrap();
    assert!(took > Duration::from_millis(700) && took < Duration::from_secs(4), "{took:?}");
    assert_eq!(watch.said().unwrap()["ended"], "end", "and the connection ended cleanly");
    drop(ending.join().unwrap());
}

#[test]
fn an_authority_that_is_away_stops_nothing() {
    let mut world = World::usual().unwrap();
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    world.stop_authority();
    let seen = world.get("client").host.actor(&["many", &to, "200", "8"]).unwrap();
    assert_eq!(seen["ok"], 200, "{seen}");
    // A pod whose identity is not issued yet is closed, and readiness says why.
    world.pod("late", "n2", Mode::Strict).unwrap();
    world.write_directory().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    let (status, body) = world.agent_ref("n2").page("/readyz").unwrap();
    assert_eq!(status, 503);
    assert!(body.contains("sa/late") && body.contains("192.168.50.1:15012 cannot be reached"), "{body}");
    world.start_authority().unwrap();
    world.agent("n2").wait_ready().unwrap();
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    let mut world = World::usual().unwrap();
    world.agent("n1").stop(Duration::from_secs(20)).unwrap();
    let good = std::fs::read_to_string(world.agent_ref("n1").config()).unwrap();
    let dir = world.dir();
    let bundle = dir.join("bundle.pem").to_string_lossy().into_owned();
    let directory = world.directory_file().to_string_lossy().into_owned();
    std::fs::write(dir.join("empty.pem"), "").unwrap();
    std::fs::write(dir.join("bad.yaml"), "workloads: [{name: a, node: n, addresses: [127.0.0.1]}]").unwrap();
    for (from, to, words) in [
        ("node: n1", "nodes: n1", &["agent.yaml", "nodes"][..]),
        ("trustDomain: test.local", "trustDomain: Test.Local", &["agent.yaml", "a-z"][..]),
        (&bundle, "/nonexistent.pem", &["/nonexistent.pem", "authority.trustBundle"][..]),
        (&bundle, &dir.join("empty.pem").to_string_lossy(), &["empty.pem", "no certificate"][..]),
        (&directory, &dir.join("bad.yaml").to_string_lossy(), &["bad.yaml", "workloads[0]", "127.0.0.1"][..]),
        ("cgroup: ", "cgroup: /nonexistent", &["/nonexistent", "capture.cgroup"][..]),
        ("drainSeconds: 5", "workers: 0", &["workers", "at least 1"][..]),
    ] {
        let file = dir.join("agent.yaml");
        assert!(good.contains(from), "{from}");
        std::fs::write(&file, good.replace(from, to)).unwrap();
        let args = ["agent", "--config", &file.to_string_lossy()];
        let output = world.host("n1").run(&bin("hauberk").unwrap(), &args).unwrap();
        assert_eq!(output.status.code(), Some(1), "{to}: {output:?}");
        let last = output.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("hauberk: "), "{to}: {}", output.stderr);
        for word in words {
            assert!(last.contains(word), "{to}: {last:?} lacks {word:?}");
        }
    }
    let usage = Command::new(bin("hauberk").unwrap()).args(["agent"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2), "wrong usage");
    // Without privileges.
    let file = world.agent_ref("n1").config();
    std::fs::write(&file, &good).unwrap();
    let hauberk = bin("hauberk").unwrap();
    let drop_caps = [
        "--bounding-set=-sys_admin,-bpf,-net_admin",
        "--inh-caps=-all",
        "--",
        &hauberk,
        "agent",
        "--config",
        &file.to_string_lossy(),
    ];
    let output = world.host("n1").run("setpriv", &drop_caps).unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let last = output.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("CAP_"), "names the privilege: {last}");
}

#[test]
fn the_operators_commands_answer() {
    let mut world = World::usual().unwrap();
    let config = world.agent("n1").config().to_string_lossy().into_owned();
    let hauberk = bin("hauberk").unwrap();
    let ask = |args: &[&str]| {
        let all = [args, &["--config", &config]].concat();
        let output = world.host("n1").run(&hauberk, &all).unwrap();
        (output.status.code(), output.stdout)
    };
    let (code, status) = ask(&["status", "-o", "json"]);
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    assert_eq!(
        (code, status["ready"].as_bool(), status["enrolled"].as_u64()),
        (Some(0), Some(true), Some(1))
    );
    let (_, table) = ask(&["workloads"]);
    assert!(
        table.contains("demo/client") && table.contains("enrolled") && table.contains("remote"),
        "{table}"
    );
    let (_, table) = ask(&["certs"]);
    assert!(table.contains("spiffe://test.local/ns/demo/sa/client"), "{table}");
    let (code, check) = ask(&["check", "-o", "json"]);
    let check: serde_json::Value = serde_json::from_str(&check).unwrap();
    let failed: Vec<_> = check.as_array().unwrap().iter().filter(|f| f["outcome"] == "FAIL").collect();
    assert!(code == Some(0) && failed.is_empty(), "{failed:?}");
    let nobody = world.host("n1").run(&hauberk, &["status", "--socket", "/nonexistent"]).unwrap();
    assert_eq!(nobody.status.code(), Some(1));
    assert!(nobody.stderr.contains("does it run?"), "{}", nobody.stderr);
    for metric in [
        "hauberk_connections_total",
        "hauberk_tls_handshakes_total",
        "hauberk_pool_connections",
        "hauberk_certificate_expiry_timestamp_seconds",
        "hauberk_capture_verdicts_total",
    ] {
        let (_, page) = world.agent_ref("n1").page("/metrics").unwrap();
        assert!(page.contains(&format!("# TYPE {metric}")), "{metric}");
    }
}
