//! What a mesh policy excludes: ports and ranges of addresses that are neither captured nor refused, and
//! nothing else.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use serde_json::Value;
use tests::{Host, Mode, Options, World, wait_until};

/// How long a change may take on a loaded machine.
const SOON: Duration = Duration::from_secs(20);

const NONE: &str = "---\n";

fn mesh_policy(spec: &str) -> String {
    format!(
        "---\napiVersion: hauberk.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {{name: p, namespace: demo}}\nspec: {{selector: {{all: true}}, {spec}}}\n"
    )
}

/// Strict pods `client` on node 1 and `server` on node 2, and a permissive one, `open`, beside it.
fn world(policies: &str) -> World {
    let mut world = World::new(Options { policies: Some(policies.into()), ..Options::default() }).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.pod("open", "n2", Mode::Permissive).unwrap();
    world.start().unwrap();
    world
}

fn poke(host: &Host, to: &str) -> Value {
    host.actor(&["poke", to]).unwrap()
}

fn verdicts(world: &World, node: &str, verdict: &str) -> f64 {
    let label = format!("verdict=\"{verdict}\"");
    world.agent_ref(node).metric("hauberk_capture_verdicts_total", &[&label]).unwrap()
}

fn tunnelled(world: &World) -> f64 {
    let agent = world.agent_ref("n2");
    agent.metric("hauberk_connections_total", &["inbound", "mtls", "allowed"]).unwrap()
}

/// Writes policies, and waits until an agent's pod is changed by them.
fn apply(world: &World, policies: &str, pod: &str, node: &str) {
    let words = format!("mode or exclusions changed workload=\"demo/{pod}\"");
    let before = world.agent_ref(node).log().matches(&words).count();
    world.write_policies(policies).unwrap();
    wait_until(SOON, "the pod's exclusions change", || {
        world.agent_ref(node).log().matches(&words).count() > before
    });
}

#[test]
fn an_excluded_inbound_port_takes_plaintext_and_members_still_come_by_mutual_tls() {
    let world = world(NONE);
    let (client, server, out) = (world.get("client"), world.get("server"), world.host("out"));
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:9000", "[::]:9001", "0.0.0.0:8080"]).unwrap();
    assert_eq!(poke(out, &server.v4(9000))["connect"], "refused", "strict, so far");
    apply(&world, &mesh_policy("exclude: {inboundPorts: [9000, 9001]}"), "server", "n2");
    assert_eq!(poke(out, &server.v4(9000))["end"], "data");
    assert_eq!(poke(out, &server.v6(9001))["end"], "data");
    assert!(verdicts(&world, "n2", "excluded") >= 2.0);
    assert_eq!(poke(out, &server.v4(8080))["connect"], "refused", "and no other port");
    let before = tunnelled(&world);
    assert_eq!(poke(&client.host, &server.v4(9000))["end"], "data");
    wait_until(SOON, "members come by mutual TLS", || tunnelled(&world) > before);

    apply(&world, NONE, "server", "n2");
    assert_eq!(poke(out, &server.v4(9000))["connect"], "refused", "strict again");
}

#[test]
fn excluded_destinations_are_connected_to_in_plaintext_and_no_others() {
    let world = world(NONE);
    let (client, server, open) = (world.get("client"), world.get("server"), world.get("open"));
    let listen = ["echo", "0.0.0.0:9000", "[::]:9001", "0.0.0.0:8080", "[::]:8081"];
    let _echo = [server, open].map(|pod| pod.host.actor_server(&listen).unwrap());
    let exclude = |what: &str| mesh_policy(&format!("exclude: {{{what}}}"));
    let passed = || verdicts(&world, "n2", "plaintext_accepted");

    // By port: the egress guard lets it out too, and a permissive pod takes it in.
    apply(&world, &exclude("outboundPorts: [9000, 9001]"), "client", "n1");
    let before = passed();
    assert_eq!(poke(&client.host, &open.v4(9000))["end"], "data");
    assert_eq!(poke(&client.host, &open.v6(9001))["end"], "data");
    assert!(passed() >= before + 2.0, "in plaintext");
    assert!(verdicts(&world, "n1", "excluded") >= 2.0);
    assert_eq!(
        poke(&client.host, &server.v4(9000))["connect"],
        "refused",
        "what is strict does not take it in"
    );
    let (before, came) = (tunnelled(&world), passed());
    assert_eq!(poke(&client.host, &open.v4(8080))["end"], "data");
    wait_until(SOON, "other ports are captured", || tunnelled(&world) > before);
    assert_eq!(passed(), came);

    // By range of addresses.
    let range = format!("outboundCidrs: [{}/32, '{}/128']", open.v4, open.v6);
    apply(&world, &exclude(&range), "client", "n1");
    assert_eq!(poke(&client.host, &open.v4(8080))["end"], "data");
    assert_eq!(poke(&client.host, &open.v6(8081))["end"], "data");
    assert!(passed() >= came + 2.0, "in plaintext");
    let before = tunnelled(&world);
    assert_eq!(poke(&client.host, &server.v4(8080))["end"], "data");
    wait_until(SOON, "other addresses are captured", || tunnelled(&world) > before);

    // A restarted agent finds and keeps what is excluded, and drops what is so no more while it was away.
    let mut world = world;
    world.agent("n1").kill9();
    world.write_policies(&exclude("outboundPorts: [9000]")).unwrap();
    world.agent("n1").restart().unwrap();
    let (client, open) = (world.get("client"), world.get("open"));
    let came = verdicts(&world, "n2", "plaintext_accepted");
    assert_eq!(poke(&client.host, &open.v4(9000))["end"], "data");
    assert!(verdicts(&world, "n2", "plaintext_accepted") > came, "still excluded");
    let (before, came) = (tunnelled(&world), verdicts(&world, "n2", "plaintext_accepted"));
    assert_eq!(poke(&client.host, &open.v4(8080))["end"], "data");
    wait_until(SOON, "no more excluded", || tunnelled(&world) > before);
    assert_eq!(verdicts(&world, "n2", "plaintext_accepted"), came);
}

#[test]
fn what_is_excluded_no_more_does_not_go_on_in_plaintext() {
    let world = world(&mesh_policy("exclude: {outboundPorts: [9000]}"));
    let (client, open) = (world.get("client"), world.get("open"));
    let mut watch = open.host.actor_server(&["watch", "0.0.0.0:9000"]).unwrap();
    let mut hold = client.host.actor_server(&["hold", &open.v4(9000), "1"]).unwrap();
    assert_eq!(hold.said().unwrap()["alive"], 1);
    wait_until(SOON, "a connection in plaintext", || verdicts(&world, "n2", "plaintext_accepted") >= 1.0);
    apply(&world, NONE, "client", "n1");
    assert!(watch.said().unwrap()["ended"].is_string(), "its end is seen at once");
    assert!(world.agent_ref("n1").log().contains("ended plaintext connections"), "by the agent");
}
