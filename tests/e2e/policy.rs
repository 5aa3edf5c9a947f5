//! Access policies, enforced: over every data path, on open connections too, and never less after a
//! bad file or a restart.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::process::Command;
use std::time::{Duration, Instant};

use tests::host::bin;
use tests::{Mode, Options, World};

/// A policy of namespace `demo` on all its workloads.
fn policy(name: &str, spec: &str) -> String {
    in_namespace("demo", name, &format!("selector: {{all: true}}, {spec}"))
}

fn in_namespace(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{spec}}}\n"
    )
}

const CLIENT: &str = "{namespace: demo, serviceAccount: client}";

/// Pods `client` (namespace demo) and `stranger` (namespace other) on node 1; `near` on node 1 and
/// `server` on node 2 to be asked.
fn world(policies: &str, node_scope: bool, mode: Mode) -> World {
    let options = Options { policies: Some(policies.into()), node_scope, ..Options::default() };
    let mut world = World::new(options).unwrap();
    for (pod, node) in [("client", "n1"), ("stranger", "n1"), ("near", "n1"), ("server", "n2")] {
        world.pod(pod, node, mode).unwrap();
    }
    world.change("stranger", |pod| pod.namespace = "other".into()).unwrap();
    world.start().unwrap();
    world
}

/// How often a node's agent has said something.
fn said(world: &World, node: &str, words: &str) -> usize {
    world.agent_ref(node).log().matches(words).count()
}

/// Waits until a node's agent has said something more than so many times.
fn wait_said(world: &World, node: &str, words: &str, before: usize) {
    let until = Instant::now() + Duration::from_secs(10);
    while said(world, node, words) <= before {
        let log = world.agent_ref(node).log_tail(10);
        assert!(Instant::now() < until, "{node} did not say {words:?}:\n{log}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Writes the policies, and waits until both agents have said what shows that they have looked.
fn apply(world: &World, policies: &str, words: &str) {
    let before = ["n1", "n2"].map(|node| said(world, node, words));
    world.write_policies(policies).unwrap();
    for (node, before) in ["n1", "n2"].into_iter().zip(before) {
        wait_said(world, node, words, before);
    }
}

/// Whether a pod reaches an address; refusals come at once and as resets.
fn reaches(world: &World, from: &str, to: &str) -> bool {
    let seen = world.get(from).host.actor(&["poke", to]).unwrap();
    let reset = |of: &serde_json::Value| matches!(of.as_str(), Some("reset" | "broken pipe"));
    assert!(
        seen["end"] == "data" || reset(&seen["end"]) || reset(&seen["connect"]),
        "{from} to {to}: {seen}"
    );
    assert!(seen["ms"].as_u64().unwrap() < 4000, "{from} to {to} must not hang: {seen}");
    seen["end"] == "data"
}

/// When policies are tried.
#[derive(Clone, Copy, PartialEq)]
enum When {
    /// The running agents have read them.
    Changed,
    /// Agents have started with them, each in a dead one's place.
    Restarted,
}

/// What must hold on every path that a connection may take.
fn suite(node_scope: bool, mode: Mode, when: When) {
    let mut world = world("---\n", node_scope, mode);
    let listen = ["echo", "0.0.0.0:8080", "[::]:8081"];
    let _servers = ["near", "server"].map(|pod| world.get(pod).host.actor_server(&listen).unwrap());
    let address = format!("{}/32", world.get("client").v4);
    let v6 = format!("{}/128", world.get("client").v6);
    let only_server =
        |spec: &str| in_namespace("demo", "p", &format!("selector: {{serviceAccounts: [server]}}, {spec}"));
    // What is written, and whether then the client and the stranger reach port 8080 (IPv4) and port
    // 8081 (IPv6) of the server on the other node, and of the one on their own.
    let (yes, no) = ([true; 2], [false; 2]);
    for (what, policies, client, stranger, near_stranger) in [
        ("without policies", "---\n".to_owned(), yes, yes, yes),
        (
            "an allow policy closes the rest",
            policy("p", &format!("action: allow, from: [{CLIENT}]")),
            yes,
            no,
            no,
        ),
        ("a deny policy", policy("p", "action: deny, from: [{namespace: other}]"), yes, no, no),
        (
            "deny wins",
            policy("a", "action: allow, from: [{any: true}]")
                + &policy(
                    "d",
                    "action: deny, from: [{spiffeId: 'spiffe://test.local/ns/other/sa/stranger'}]",
                ),
            yes,
            no,
            no,
        ),
        (
            "ports",
            policy("p", "action: allow, from: [{any: true}], ports: [8080]"),
            [true, false],
            [true, false],
            [true, false],
        ),
        ("nobody", policy("p", "action: allow, from: []"), no, no, no),
        ("nobody is denied", policy("p", "action: deny, from: []"), yes, yes, yes),
        (
            "another namespace's",
            in_namespace("other", "p", "selector: {all: true}, action: deny, from: [{any: true}]"),
            yes,
            yes,
            yes,
        ),
        (
            "ranges of addresses",
            policy("p", &format!("action: allow, from: [{{cidr: {address}}}, {{cidr: '{v6}'}}]")),
            yes,
            no,
            no,
        ),
        ("one workload's", only_server("action: deny, from: [{namespace: other}]"), yes, no, yes),
        (
            "trust domains",
            policy(
                "p",
                "action: deny, from: [{trustDomain: elsewhere.test}, {namespace: other, trustDomain: elsewhere.test}]",
            ),
            yes,
            yes,
            yes,
        ),
    ] {
        match when {
            When::Changed if what == "without policies" => {}
            When::Changed => apply(&world, &policies, "access policies read"),
            When::Restarted => {
                ["n1", "n2"].into_iter().for_each(|node| world.agent(node).kill9());
                world.write_policies(&policies).unwrap();
                ["n1", "n2"].into_iter().for_each(|node| world.agent(node).restart().unwrap());
            }
        }
        let (server, near) = (world.get("server"), world.get("near"));
        for (from, to, expected) in [
            ("client", server, client),
            ("client", near, client),
            ("stranger", server, stranger),
            ("stranger", near, near_stranger),
        ] {
            let seen = [reaches(&world, from, &to.v4(8080)), reaches(&world, from, &to.v6(8081))];
            assert_eq!(seen, expected, "{what}: {from} to {} (IPv4 8080, IPv6 8081)", to.v4);
        }
    }
}

#[test]
fn policies_hold_between_nodes_and_on_one_node() {
    suite(true, Mode::Strict, When::Changed);
}

#[test]
fn policies_hold_in_workload_scope() {
    suite(false, Mode::Strict, When::Changed);
}

#[test]
fn policies_hold_between_permissive_members() {
    suite(true, Mode::Permissive, When::Changed);
}

#[test]
fn policies_hold_after_a_restart() {
    suite(true, Mode::Strict, When::Restarted);
}

#[test]
fn policies_hold_after_a_restart_in_workload_scope() {
    suite(false, Mode::Strict, When::Restarted);
}

/// Takes the policies away from node 1's agent, so that only the receiving one, on node 2, has them.
fn blind_the_sender(world: &mut World) {
    let file = world.agent_ref("n1").config();
    let config = std::fs::read_to_string(&file).unwrap();
    let without: String =
        config.lines().filter(|l| !l.starts_with("policy:")).map(|l| l.to_owned() + "\n").collect();
    assert_ne!(config, without);
    std::fs::write(&file, without).unwrap();
    world.agent("n1").stop(Duration::from_secs(20)).unwrap();
    world.agent("n1").restart().unwrap();
}

#[test]
fn the_receiving_agent_has_the_last_word_and_both_say_why() {
    let only = in_namespace(
        "demo",
        "only-client",
        &format!("selector: {{workloads: [server]}}, action: allow, from: [{CLIENT}]"),
    );
    let mut world = world(&only, true, Mode::Strict);
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();

    // With the policies on both nodes the connection does not leave the first.
    assert!(!reaches(&world, "stranger", &to));
    let denied = ["policy=\"demo/only-client\""];
    world.agent_ref("n1").wait_metric("hauberk_policy_denied_total", &denied, 1.0).unwrap();
    assert_eq!(world.agent_ref("n2").metric("hauberk_policy_denied_total", &denied).unwrap(), 0.0);

    blind_the_sender(&mut world);
    assert!(!reaches(&world, "stranger", &to));
    assert!(reaches(&world, "client", &to));
    world.agent_ref("n2").wait_metric("hauberk_policy_denied_total", &denied, 1.0).unwrap();
    let reason = "reason=\"denied_by_policy\"";
    for (node, direction) in [("n2", "inbound"), ("n1", "outbound")] {
        let labels = [direction, "denied", reason];
        world.agent_ref(node).wait_metric("hauberk_connections_total", &labels, 1.0).unwrap();
        let log = world.agent_ref(node).log();
        let line = log.lines().rfind(|l| l.contains(direction) && l.contains(reason)).unwrap();
        for words in
            ["spiffe://test.local/ns/other/sa/stranger", "spiffe://test.local/ns/demo/sa/server", &to]
        {
            assert!(line.contains(words), "{node} names {words}: {line}");
        }
        assert_eq!(line.contains("policy=\"demo/only-client\""), node == "n2", "{line}");
    }
}

#[test]
fn a_change_resets_open_connections_that_it_denies_and_no_others() {
    let mut world = world("---\n", true, Mode::Strict);
    // The sending agent must learn of it from the receiving one.
    blind_the_sender(&mut world);
    let server = world.get("server");
    let mut watch = server.host.actor_server(&["watch", "0.0.0.0:8080"]).unwrap();
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let hold = |pod: &str, port: u16, many: &str| {
        let mut hold = world.get(pod).host.actor_server(&["hold", &server.v4(port), many]).unwrap();
        assert_eq!(hold.said().unwrap()["alive"].to_string(), many);
        hold
    };
    let _holds = [hold("stranger", 8080, "1"), hold("stranger", 8081, "200"), hold("client", 8081, "7")];
    let open = || world.agent_ref("n2").metric("hauberk_connections_open", &["inbound"]).unwrap();
    assert_eq!(open(), 208.0);
    // Dry runs and policies for others end nothing.
    let dry = policy("dry", "action: deny, dryRun: true, from: [{any: true}]");
    world.write_policies(&dry).unwrap();
    wait_said(&world, "n2", "access policies read", 1);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(open(), 208.0);
    let began = Instant::now();
    world
        .write_policies(&(dry + &policy("no-strangers", "action: deny, from: [{namespace: other}]")))
        .unwrap();
    assert_eq!(watch.said().unwrap()["ended"], "reset", "the application sees a reset, and no end");
    let took = began.elapsed();
    // Half a second until the file is looked at; the rest is this machine's.
    assert!(took < Duration::from_millis(1000), "it took {took:?}");
    let reason = "reason=\"denied_by_policy\"";
    world.agent_ref("n2").wait_metric("hauberk_connections_total", &["inbound", reason], 201.0).unwrap();
    world.agent_ref("n1").wait_metric("hauberk_connections_total", &["outbound", reason], 201.0).unwrap();
    assert_eq!(open(), 7.0, "the client's are left alone");
    let denied = ["policy=\"demo/no-strangers\""];
    assert_eq!(world.agent_ref("n2").metric("hauberk_policy_denied_total", &denied).unwrap(), 201.0);
    let log = world.agent_ref("n2").log();
    let line = log.lines().rfind(|l| l.contains(reason)).unwrap();
    assert!(line.contains("policy=\"demo/no-strangers\"") && line.contains("sa/stranger"), "{line}");
}

#[test]
fn a_dry_run_denies_nothing_and_says_what_it_would() {
    let dry = "selector: {all: true}, action: allow, dryRun: true, from: [{namespace: demo}]";
    let world = world(&in_namespace("demo", "tried", dry), true, Mode::Strict);
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    assert!(reaches(&world, "stranger", &to) && reaches(&world, "client", &to));
    let agent = world.agent_ref("n2");
    agent.wait_metric("hauberk_policy_would_deny_total", &["policy=\"demo/tried\""], 1.0).unwrap();
    assert_eq!(agent.metric("hauberk_policy_denied_total", &[]).unwrap(), 0.0);
    let log = agent.log();
    let lines: Vec<_> = log.lines().filter(|l| l.contains("would be denied")).collect();
    assert_eq!(lines.len(), 1, "one line, for the stranger: {lines:?}");
    for words in ["policy=\"demo/tried\"", "ns/other/sa/stranger", "ns/demo/sa/server", "demo/server:8080"] {
        assert!(lines[0].contains(words), "{words}: {}", lines[0]);
    }

    // And `hauberk policy` lists it, with its counts.
    let socket = world.dir().join("n2/run/admin.sock");
    let ask = |args: &[&str]| {
        let output = Command::new(bin("hauberk").unwrap()).arg("policy").args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let socket = socket.to_str().unwrap();
    let rows: serde_json::Value = serde_json::from_str(&ask(&["--socket", socket, "-o", "json"])).unwrap();
    let expected = serde_json::json!([{
        "policy": "demo/tried", "action": "allow", "dryRun": true, "hits": 1, "denied": 0, "wouldDeny": 1,
    }]);
    assert_eq!(rows, expected);
    assert!(ask(&["--socket", socket]).contains("demo/tried"));
}

#[test]
fn a_bad_file_and_a_restart_leave_the_policies_enforced() {
    let deny = policy("no-strangers", "action: deny, from: [{namespace: other}]");
    let mut world = world(&deny, true, Mode::Strict);
    let (to, near) = (world.get("server").v4(8080), world.get("near").v4(8080));
    let _servers =
        ["near", "server"].map(|pod| world.get(pod).host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap());
    let holds = |world: &World, when: &str| {
        assert!(!reaches(world, "stranger", &to), "{when}: to the other node");
        assert!(!reaches(world, "stranger", &near), "{when}: on one node");
        assert!(reaches(world, "client", &to), "{when}: others");
    };
    holds(&world, "at first");
    for (bad, words) in [
        ("not: policies", "policies.yaml: document 1"),
        ("", "there is no policy in it"),
        (
            &deny.replace("from: [{namespace: other}]", "form: [{namespace: other}]")[..],
            "unknown field `form`",
        ),
    ] {
        apply(&world, bad, "the access policies stay as they were");
        let log = world.agent_ref("n2").log();
        assert!(log.lines().any(|l| l.contains("ERROR") && l.contains(words)), "{words}: {log}");
        holds(&world, bad);
    }
    world.agent_ref("n2").wait_metric("hauberk_policies_stale", &[], 1.0).unwrap();
    std::fs::remove_file(world.policies_file()).unwrap();
    wait_said(&world, "n2", "cannot read", 0);
    holds(&world, "without a file");

    // An agent without good policies does not start; its strict pods are closed.
    world.agent("n2").kill9();
    let error = world.agent("n2").restart().unwrap_err().to_string();
    assert!(error.contains("cannot read") && error.contains("policies.yaml"), "{error}");
    assert!(!reaches_or_refused(&world, "client", &to), "closed without an agent");

    world.write_policies(&deny).unwrap();
    world.agent("n2").restart().unwrap();
    holds(&world, "after the receiver's restart");
    world.agent("n1").kill9();
    world.agent("n1").restart().unwrap();
    holds(&world, "after the sender's restart");
    assert_eq!(world.agent_ref("n2").metric("hauberk_policies_stale", &[]).unwrap(), 0.0);
}

/// As [`reaches`], where the destination's agent may be away.
fn reaches_or_refused(world: &World, from: &str, to: &str) -> bool {
    world.get(from).host.actor(&["poke", to]).unwrap()["end"] == "data"
}

#[test]
fn files_are_checked_without_an_agent() {
    let dir = std::env::temp_dir().join(format!("hauberk-policy-check-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let check = |name: &str, text: &str| {
        let file = dir.join(name);
        std::fs::write(&file, text).unwrap();
        let output =
            Command::new(bin("hauberk").unwrap()).args(["policy", "check"]).arg(&file).output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, out, _) = check("good.yaml", &policy("p", "action: allow, from: [{any: true}]"));
    assert!(code == Some(0) && out.contains("good.yaml: 1 good"), "{code:?} {out}");
    let (code, _, error) = check("bad.yaml", &policy("p", "action: allow"));
    assert_eq!((code, error.lines().count()), (Some(1), 1), "{error}");
    for words in ["bad.yaml", "demo/p", "spec.from", "[{any: true}]"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
