//! The directory from a real API server: who is a member, how services lead to endpoints, and what happens
//! while the server is away or denies.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use serde_json::{Value, json};
use tests::host::assert_reset;
use tests::{Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(40);

const WEB: &str = "10.96.0.10:80";

/// An API server, and pods `client` on node 1, `one` and `two` on node 2, all strict by label.
fn world() -> World {
    world_of(Options::default())
}

fn world_of(options: Options) -> World {
    let mut world = World::new(options).unwrap();
    world.add_kubernetes().unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("one", "n2", Mode::Strict).unwrap();
    world.pod("two", "n2", Mode::Strict).unwrap();
    world
}

fn apply(world: &mut World, path: &str, object: Value) {
    let (cluster, host) = world.kubernetes();
    cluster.apply(host, path, &object).unwrap();
}

fn patch(world: &mut World, path: &str, change: Value) {
    let (cluster, host) = world.kubernetes();
    cluster.patch(host, path, &change).unwrap();
}

/// The service [`WEB`], with a target port by name, and a slice for each pod that has it at another number.
fn serve(world: &mut World, endpoints: &[(&str, u16)]) {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {
            "clusterIP": "10.96.0.10",
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    });
    apply(world, "/api/v1/namespaces/demo/services/web", service);
    for (pod, port) in endpoints {
        slice(world, pod, *port, json!({"ready": true}));
    }
}

fn slice(world: &mut World, pod: &str, port: u16, conditions: Value) {
    let (name, address) = (format!("web-{pod}"), world.get(pod).v4);
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1beta1", "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": conditions}],
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
    });
    apply(world, &format!("/apis/discovery.k8s.io/v1beta1/namespaces/demo/endpointslices/{name}"), slice);
}

/// Who answers one connection of the client's to the service, and who it is taken for there.
fn ask(world: &World) -> Option<Value> {
    let seen = world.get("client").host.actor(&["ask", WEB]).ok()?;
    seen["server"].is_object().then(|| seen["server"].clone())
}

fn answers(world: &World, pod: &str, port: u16) -> bool {
    ask(world).is_some_and(|server| server["local"] == world.get(pod).v4(port))
}

#[test]
fn objects_of_an_api_server_are_the_mesh_while_they_change_and_the_server_is_away() {
    let mut world = world();
    serve(&mut world, &[("one", 8080), ("two", 9090)]);
    world.start().unwrap();
    let _one = world.get("one").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let two = world.get("two").host.actor_server(&["whoami", "0.0.0.0:9090"]).unwrap();
    let _client = world.get("client").host.actor_server(&["whoami", "0.0.0.0:7070"]).unwrap();

    // By the service, whose target port is another number at each pod, and not in plaintext.
    let tap = world.tap().unwrap();
    wait_until(SOON, "both endpoints answer at their own ports", || answers(&world, "one", 8080));
    wait_until(SOON, "both endpoints answer at their own ports", || answers(&world, "two", 9090));
    assert_eq!(
        ask(&world).unwrap()["accept"].as_str().unwrap().split(':').next(),
        Some("10.1.1.2"),
        "the true client"
    );
    assert!(world.agent_ref("n1").metric("hauberk_connections_total", &["mtls", "outbound"]).unwrap() >= 3.0);
    let seen = tap.finish().unwrap();
    assert!(seen.tls_records > 0 && seen.plaintext_bytes == 0, "{:?}", seen.plaintext_flows);

    // Not ready: it serves no more. Terminating and alone: it serves again.
    slice(&mut world, "one", 8080, json!({"ready": false}));
    wait_until(SOON, "the other serves alone", || (0..10).all(|_| answers(&world, "two", 9090)));
    slice(&mut world, "one", 8080, json!({"ready": false, "serving": true, "terminating": true}));
    slice(&mut world, "two", 9090, json!({"ready": false}));
    wait_until(SOON, "who stops serves when nobody else does", || {
        (0..10).all(|_| answers(&world, "one", 8080))
    });
    slice(&mut world, "one", 8080, json!({"ready": true}));

    // A pod that comes later is enrolled, and one that goes is not known any more.
    world.pod("late", "n2", Mode::Strict).unwrap();
    let _late = world.get("late").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let late = world.get("late").v4(8080);
    let reaches = |world: &World, address: &str| {
        world.get("client").host.actor(&["ask", address]).is_ok_and(|seen| seen["server"]["local"] == address)
    };
    wait_until(SOON, "a new pod is enrolled and reached", || {
        world.agent_ref("n2").log().contains("enrolled workload=\"demo/late\"") && reaches(&world, &late)
    });
    let outside = world.host("out").run("curl", &["-sS", "-m", "3", &format!("http://{late}/")]).unwrap();
    assert!(!outside.status.success(), "and closed to plaintext: {outside:?}");

    // Relabelled: out of the mesh, plaintext and all.
    patch(
        &mut world,
        "/api/v1/namespaces/demo/pods/late",
        json!({"metadata": {"labels": {"hauberk.dev/mode": "off"}}}),
    );
    wait_until(SOON, "a pod that is relabelled leaves", || {
        world.agent_ref("n2").log().contains("removed workload=\"demo/late\"")
    });
    world.host("out").actor(&["ask", &late]).unwrap();

    // The server goes away: everything goes on, and it is said.
    let (cluster, _) = world.kubernetes();
    cluster.stop_server();
    wait_until(SOON, "the agent says so", || {
        let (status, body) = world.agent_ref("n1").page("/readyz").unwrap();
        assert_eq!(status, 200, "still ready: {body}");
        body.contains("directory is stale: cannot") && body.contains("the API server cannot be reached")
    });
    assert!(world.agent_ref("n1").metric("hauberk_directory_errors_total", &["unreachable"]).unwrap() >= 1.0);
    for _ in 0..20 {
        assert!(ask(&world).is_some(), "traffic goes on");
    }
    world.agent("n2").stop(Duration::from_secs(20)).unwrap();
    world.agent("n2").start_again().unwrap();
    wait_until(SOON, "an agent that starts meanwhile says what it waits for", || {
        world
            .agent_ref("n2")
            .page("/readyz")
            .is_ok_and(|(status, body)| status == 503 && body.contains("directory: cannot"))
    });
    let strict = world.get("one").v4(8080);
    let outside = world.host("out").run("curl", &["-sS", "-m", "3", &format!("http://{strict}/")]).unwrap();
    assert!(!outside.status.success(), "what is pinned keeps strict pods closed: {outside:?}");

    let (cluster, host) = world.kubernetes();
    cluster.start_server(host).unwrap();
    world.agent("n2").wait_ready().unwrap();
    world.delete_pod("two").unwrap();
    // Captured until nothing runs in it.
    drop(two);
    wait_until(SOON, "changes are heard again", || {
        let (_, body) = world.agent_ref("n1").page("/readyz").unwrap();
        world.agent_ref("n2").log().contains("removed workload=\"demo/two\"") && body == "ready\n"
    });
    wait_until(SOON, "and traffic goes on", || ask(&world).is_some());
}

#[test]
fn a_denial_is_told_with_verb_and_resource_and_ends_when_it_is_lifted() {
    let mut world = world();
    let (cluster, host) = world.kubernetes();
    cluster.grant(host, false).unwrap();
    world.prepare().unwrap();
    world.start_authority().unwrap();
    world.start_agent("n1").unwrap();
    world.start_agent("n2").unwrap();
    wait_until(SOON, "the agent says what it is denied", || {
        world.agent_ref("n1").page("/readyz").is_ok_and(|(status, body)| {
            status == 503
                && body.contains("directory: cannot list ")
                && body.contains("the API server answers 403")
                && body.contains("(a ClusterRole must grant list and watch on pods)")
        })
    });
    assert!(world.agent_ref("n1").metric("hauberk_directory_errors_total", &["forbidden"]).unwrap() >= 1.0);
    let config = world.agent_ref("n1").config();
    let check = world
        .host("n1")
        .run(&tests::host::bin("hauberk").unwrap(), &["check", "--config", config.to_str().unwrap()]);
    let said = check.unwrap().stdout;
    assert!(said.contains("cannot list nodes: the API server answers 403"), "{said}");

    let (cluster, host) = world.kubernetes();
    cluster.grant(host, true).unwrap();
    for node in ["n1", "n2"] {
        world.agent(node).wait_ready().unwrap();
    }
    let _one = world.get("one").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let one = world.get("one").v4(8080);
    let seen = world.get("client").host.actor(&["ask", &one]).unwrap();
    assert_eq!(seen["server"]["local"], one, "{seen}");
    // Nobody's address in the mesh's range is still refused as such.
    let closed = world.get("client").host.actor(&["poke", &world.get("two").v4(8080)]).unwrap();
    assert_reset(&closed, "a port where nothing listens");
}

/// What the authority counts.
fn told(world: &World, metric: &str) -> f64 {
    let (_, page) = world.host("n1").http("127.0.0.1:15014".parse().unwrap(), "/metrics").unwrap();
    let name = format!("hauberk_authority_directory_{metric} ");
    page.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
}

#[test]
fn the_authority_tells_agents_the_directory_and_they_go_on_while_it_is_away() {
    let mut world = world_of(Options { told_directory: true, ..Options::default() });
    serve(&mut world, &[("one", 8080), ("two", 9090)]);
    world.start().unwrap();
    let _one = world.get("one").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let _two = world.get("two").host.actor_server(&["whoami", "0.0.0.0:9090"]).unwrap();
    for (pod, port) in [("one", 8080), ("two", 9090)] {
        wait_until(SOON, "both endpoints answer at their own ports", || answers(&world, pod, port));
    }
    assert_eq!((told(&world, "streams"), told(&world, "told_anew_total")), (2.0, 2.0));
    slice(&mut world, "one", 8080, json!({"ready": false}));
    wait_until(SOON, "a change reaches the agents", || (0..10).all(|_| answers(&world, "two", 9090)));
    assert_eq!(told(&world, "told_anew_total"), 2.0, "only what differs is told");

    world.stop_authority();
    wait_until(SOON, "the agent says that its directory is stale, and is ready", || {
        let (status, body) = world.agent_ref("n1").page("/readyz").unwrap();
        status == 200 && body.contains("directory is stale: the authority does not tell the directory")
    });
    assert!(world.agent_ref("n1").metric("hauberk_directory_errors_total", &["unreachable"]).unwrap() >= 1.0);
    for _ in 0..10 {
        assert!(answers(&world, "two", 9090), "traffic goes on");
    }
    // What nobody can tell now; and a pod of the node's own, which it sees for itself.
    slice(&mut world, "one", 8080, json!({"ready": true}));
    slice(&mut world, "two", 9090, json!({"ready": false}));
    world.pod("late", "n2", Mode::Strict).unwrap();
    wait_until(SOON, "a node's own new pod is enrolled meanwhile", || {
        world.agent_ref("n2").log().contains("enrolled workload=\"demo/late\"")
    });
    assert!(answers(&world, "two", 9090), "as it was told last");

    world.start_authority().unwrap();
    wait_until(SOON, "what has changed is told", || (0..10).all(|_| answers(&world, "one", 8080)));
    wait_until(SOON, "and nothing is stale any more", || {
        world.agent_ref("n1").page("/readyz").is_ok_and(|(_, body)| body == "ready\n")
    });
    let _late = world.get("late").host.actor_server(&["whoami", "0.0.0.0:8080"]).unwrap();
    let late = world.get("late").v4(8080);
    wait_until(SOON, "the new pod is reached from the other node", || {
        let seen = world.get("client").host.actor(&["ask", &late]);
        seen.is_ok_and(|seen| seen["server"]["local"] == late)
    });

    // An agent that starts while the authority is away waits for it, and touches nothing.
    world.stop_authority();
    world.agent("n2").stop(Duration::from_secs(20)).unwrap();
    world.agent("n2").start_again().unwrap();
    wait_until(SOON, "an agent that starts meanwhile says what it waits for", || {
        world.agent_ref("n2").page("/readyz").is_ok_and(|(status, body)| {
            status == 503 && body.contains("directory: the authority does not tell the directory")
        })
    });
    world.start_authority().unwrap();
    world.agent("n2").wait_ready().unwrap();
    wait_until(SOON, "and traffic goes on", || ask(&world).is_some());
}
