//! A cluster's own policies, manifests and checks, against a real API server.
//!
//! It is Kubernetes 1.20, which drops the definitions' CEL rules (x-kubernetes-validations): what only they
//! refuse is accepted there, and marked by the authority.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use hauberk::document::Metadata;
use hauberk::identity::TrustDomain;
use hauberk::policy::kubernetes::kept::{read_access, read_mesh};
use serde_json::{Value, json};
use tests::kubernetes::{ADMIN, NAMESPACE, repository};
use tests::{Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(40);

const POLICIES: &str = "/apis/hauberk.dev/v1alpha1/namespaces/demo";

/// An API server that knows the policies' kinds; strict pods `client` and `other` on node 1, `server` on node 2.
fn world() -> World {
    let options = Options { cluster_policies: true, ..Options::default() };
    let mut world = World::new(options).unwrap();
    world.add_kubernetes().unwrap();
    let (cluster, host) = world.kubernetes();
    cluster.define_policies(host).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("other", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world
}

fn policy(kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "hauberk.dev/v1alpha1", "kind": kind, "metadata": {"name": name, "namespace": "demo"},
        "spec": spec,
    })
}

fn plural(kind: &str) -> &'static str {
    if kind == "AccessPolicy" { "accesspolicies" } else { "meshpolicies" }
}

fn apply(world: &mut World, kind: &str, name: &str, spec: Value) -> anyhow::Result<Value> {
    let (cluster, host) = world.kubernetes();
    cluster.apply(host, &format!("{POLICIES}/{}/{name}", plural(kind)), &policy(kind, name, &spec))
}

/// Status and message of a condition of an object.
fn condition(world: &mut World, kind: &str, name: &str, condition: &str) -> (String, String) {
    let (cluster, host) = world.kubernetes();
    let object = cluster.get(host, &format!("{POLICIES}/{}/{name}", plural(kind))).unwrap();
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = conditions
        .iter()
        .find(|it| it["type"] == condition && it["observedGeneration"] == object["metadata"]["generation"]);
    let text = |field: &str| found.map(|it| it[field].as_str().unwrap().to_owned()).unwrap_or_default();
    (text("status"), text("message"))
}

fn reaches(world: &World, from: &str, to: &str) -> bool {
    world.get(from).host.actor(&["poke", to]).unwrap()["end"] == "data"
}

#[test]
fn policies_of_the_api_server_hold_say_who_applied_them_and_stay_while_it_is_away() {
    let mut world = world();
    world.start().unwrap();
    let to = world.get("server").v4(8080);
    let mut watch = world.get("server").host.actor_server(&["watch", "0.0.0.0:8081"]).unwrap();
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    wait_until(SOON, "without policies both reach it", || {
        reaches(&world, "client", &to) && reaches(&world, "other", &to)
    });
    let held = world.get("server").v4(8081);
    let mut hold = world.get("other").host.actor_server(&["hold", &held, "1"]).unwrap();
    assert_eq!(hold.said().unwrap()["alive"], 1);

    // A policy acts, on what is open too, and says how many agents have it in force.
    let only = json!({
        "selector": {"serviceAccounts": ["server"]}, "action": "allow",
        "from": [{"namespace": "demo", "serviceAccount": "client"}],
    });
    apply(&mut world, "AccessPolicy", "only", only.clone()).unwrap();
    assert_eq!(watch.said().unwrap()["ended"], "reset", "an open connection that it denies");
    wait_until(SOON, "new ones", || !reaches(&world, "other", &to) && reaches(&world, "client", &to));
    wait_until(SOON, "both agents have applied it", || {
        condition(&mut world, "AccessPolicy", "only", "Applied") == ("True".into(), "2 of 2 agents".into())
    });
    assert_eq!(condition(&mut world, "AccessPolicy", "only", "Accepted").0, "True");
    let columns = {
        let (cluster, host) = world.kubernetes();
        cluster.kubectl(host, &["get", "-A", "accesspolicies"]).unwrap()
    };
    assert!(columns.contains("allow") && columns.contains("2 of 2 agents"), "{columns}");
    let log = world.agent_ref("n1").log();
    assert!(!log.contains("cannot keep the agent's Lease"), "{log}");

    // One that cannot be used keeps what it said before, and says why; a new one closes what it is about.
    let bad = json!({"selector": {"serviceAccounts": ["server"]}, "action": "allow", "from": [{"serviceAccount": "x"}]});
    apply(&mut world, "AccessPolicy", "only", bad.clone()).unwrap();
    wait_until(SOON, "its status says why", || {
        let (status, message) = condition(&mut world, "AccessPolicy", "only", "Accepted");
        status == "False" && message == "spec.from[0].serviceAccount: needs its namespace beside it"
    });
    world.agent_ref("n2").wait_metric("hauberk_policies_stale", &[], 1.0).unwrap();
    assert!(reaches(&world, "client", &to) && !reaches(&world, "other", &to), "as before");
    apply(&mut world, "AccessPolicy", "only", only).unwrap();
    apply(&mut world, "AccessPolicy", "new", bad).unwrap();
    apply(
        &mut world,
        "AccessPolicy",
        "others",
        json!({"selector": {"workloads": ["client"]}, "action": "deny", "from": []}),
    )
    .unwrap();
    wait_until(SOON, "a deny policy without peers denies nobody, and is applied", || {
        condition(&mut world, "AccessPolicy", "others", "Applied").0 == "True"
    });
    assert!(reaches(&world, "client", &to), "another policy still allows it");

    // The server goes away: everything holds, and it is said. An agent that starts meanwhile lets nobody in.
    let (cluster, _) = world.kubernetes();
    cluster.stop_server();
    wait_until(SOON, "the agent says so", || {
        let (status, body) = world.agent_ref("n2").page("/readyz").unwrap();
        status == 200 && body.contains("policies are stale: cannot watch")
    });
    assert!(reaches(&world, "client", &to) && !reaches(&world, "other", &to), "while it is away");
    world.agent("n2").kill9();
    world.agent("n2").start_again().unwrap();
    wait_until(SOON, "an agent that starts meanwhile says what it waits for", || {
        world
            .agent_ref("n2")
            .page("/readyz")
            .is_ok_and(|(status, body)| status == 503 && body.contains("policies: cannot list"))
    });
    assert!(!reaches(&world, "client", &to), "closed");
    let (cluster, host) = world.kubernetes();
    cluster.start_server(host).unwrap();
    world.agent("n2").wait_ready().unwrap();
    wait_until(SOON, "and all is as before", || {
        reaches(&world, "client", &to) && !reaches(&world, "other", &to)
    });
    let (cluster, host) = world.kubernetes();
    for name in ["only", "new", "others"] {
        cluster.delete(host, &format!("{POLICIES}/accesspolicies/{name}")).unwrap();
    }
    wait_until(SOON, "without policies everybody reaches it", || reaches(&world, "other", &to));
}

#[test]
fn a_mesh_policy_says_mode_exclusions_and_how_long_svids_live() {
    let mut world = world();
    world.start().unwrap();
    // Its own label is taken away: no word of its own, none of its namespace.
    world.pod("late", "n2", Mode::Off).unwrap();
    let path = "/api/v1/namespaces/demo/pods/late";
    let (cluster, host) = world.kubernetes();
    let labels = json!({"metadata": {"labels": {"hauberk.dev/mode": null, "app": "late"}}});
    cluster.patch(host, path, &labels).unwrap();
    let _echo = world.get("late").host.actor_server(&["echo", "0.0.0.0:8080", "0.0.0.0:9090"]).unwrap();
    let (app, metrics) = (world.get("late").v4(8080), world.get("late").v4(9090));
    let outside = |world: &World, to: &str| world.host("out").actor(&["poke", to]).unwrap()["end"] == "data";
    assert!(outside(&world, &app), "not in the mesh");

    let spec = json!({"selector": {"matchLabels": {"app": "late"}}, "mode": "strict", "certificateLifetimeSeconds": 900});
    apply(&mut world, "MeshPolicy", "late", spec).unwrap();
    wait_until(SOON, "it is enrolled, and closed to plaintext", || {
        world.agent_ref("n2").log().contains("enrolled workload=\"demo/late\"") && !outside(&world, &app)
    });
    wait_until(SOON, "and reached by mutual TLS", || reaches(&world, "client", &app));
    wait_until(SOON, "both agents have applied it", || {
        condition(&mut world, "MeshPolicy", "late", "Applied").1 == "2 of 2 agents"
    });
    let config = world.agent_ref("n2").config().display().to_string();
    let certs = world
        .host("n2")
        .run(&tests::host::bin("hauberk").unwrap(), &["certs", "--config", &config, "-o", "json"]);
    let certs: Vec<Value> = serde_json::from_str(&certs.unwrap().ok().unwrap()).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let left = |account: &str| {
        let id = format!("spiffe://test.local/ns/demo/sa/{account}");
        certs.iter().find(|it| it["id"] == *id).unwrap()["notAfter"].as_u64().unwrap() - now
    };
    assert!(left("late") <= 900 && left("server") > 1800, "{} and {}", left("late"), left("server"));

    // An annotation of the pod's own, and one that cannot be read.
    assert!(!outside(&world, &metrics));
    let annotate = |world: &mut World, ports: &str| {
        let change = json!({"metadata": {"annotations": {"hauberk.dev/exclude-inbound-ports": ports}}});
        let (cluster, host) = world.kubernetes();
        cluster.patch(host, path, &change).unwrap();
    };
    annotate(&mut world, "9090, 9091");
    wait_until(SOON, "an excluded port takes plaintext", || outside(&world, &metrics));
    assert!(!outside(&world, &app), "and no other");
    annotate(&mut world, "9090;9091");
    wait_until(SOON, "what cannot be read excludes nothing", || !outside(&world, &metrics));

    let (cluster, host) = world.kubernetes();
    cluster.delete(host, &format!("{POLICIES}/meshpolicies/late")).unwrap();
    wait_until(SOON, "without the policy it leaves the mesh", || outside(&world, &app));
}

/// Specs, and whether the API server's schema must refuse them itself, without CEL.
fn specs() -> Vec<(&'static str, Value, bool)> {
    let all = json!({"all": true});
    let access = |change: Value| {
        let mut spec = json!({"selector": {"all": true}, "action": "allow", "from": [{"any": true}]});
        for (key, value) in change.as_object().unwrap() {
            spec[key] = value.clone();
        }
        ("AccessPolicy", spec)
    };
    let from = |peer: Value| access(json!({"from": [peer]}));
    let mesh = |spec: Value| ("MeshPolicy", spec);
    let long = "x".repeat(254);
    let labels: serde_json::Map<String, Value> = (0..17).map(|n| (format!("l{n}"), json!("x"))).collect();
    let refused = [
        access(json!({"action": "audit"})),
        access(json!({"selector": {}})),
        access(json!({"selector": {"all": false}})),
        access(json!({"selector": {"all": true, "workloads": ["a"]}})),
        access(json!({"selector": {"workloads": ["a b"]}})),
        access(json!({"selector": {"workloads": [long]}})),
        access(json!({"selector": {"workloads": vec!["a"; 257]}})),
        access(json!({"from": null})),
        access(json!({"from": vec![json!({"any": true}); 257]})),
        access(json!({"ports": [0]})),
        access(json!({"ports": [65536]})),
        access(json!({"ports": vec![1; 129]})),
        from(json!({})),
        from(json!({"any": false})),
        from(json!({"namespace": "*"})),
        from(json!({"spiffeId": "spiffe://td/*"})),
        from(json!({"spiffeId": "https://td/a"})),
        from(json!({"trustDomain": "A"})),
        from(json!({"cidr": "10.0.0.0"})),
        mesh(json!({"mode": "strict"})),
        mesh(json!({"selector": all})),
        mesh(json!({"selector": all, "mode": "Strict"})),
        mesh(json!({"selector": all, "mode": false})),
        mesh(json!({"selector": {"matchLabels": {}}, "mode": "off"})),
        mesh(json!({"selector": {"all": true, "matchLabels": {"a": "b"}}, "mode": "off"})),
        mesh(json!({"selector": {"matchLabels": labels}, "mode": "off"})),
        mesh(json!({"selector": {"matchLabels": {"a": "-"}}, "mode": "off"})),
        mesh(json!({"selector": all, "exclude": {}})),
        mesh(json!({"selector": all, "exclude": {"inboundPorts": [0]}})),
        mesh(json!({"selector": all, "exclude": {"outboundPorts": vec![1; 65]}})),
        mesh(json!({"selector": all, "exclude": {"outboundCidrs": ["10.0.0.0"]}})),
        mesh(json!({"selector": all, "exclude": {"outboundCidrs": vec!["10.0.0.0/8"; 65]}})),
        mesh(json!({"selector": all, "certificateLifetimeSeconds": 59})),
        mesh(json!({"selector": all, "certificateLifetimeSeconds": 2592001})),
    ];
    // A schema cannot say these: CEL rules or the agents refuse them.
    let passed = [
        from(json!({"any": true, "namespace": "a"})),
        from(json!({"serviceAccount": "a"})),
        from(json!({"spiffeId": "spiffe://td/a", "namespace": "a"})),
        from(json!({"cidr": "10.0.0.1/8"})),
        from(json!({"cidr": "10.0.0.0/33"})),
        access(json!({"selector": {"workloads": [".."]}})),
        mesh(json!({"selector": {"matchLabels": {"a b": "c"}}, "mode": "off"})),
        mesh(json!({"selector": all, "exclude": {"outboundCidrs": ["10.0.0.1/8"]}})),
    ];
    let refused = refused.into_iter().map(|(kind, spec)| (kind, spec, true));
    refused.chain(passed.into_iter().map(|(kind, spec)| (kind, spec, false))).collect()
}

/// Specs that both must take.
fn good() -> Vec<(&'static str, Value)> {
    let peers = json!([
        {"any": true}, {"spiffeId": "spiffe://td.test/ns/a/sa/b"}, {"namespace": "a"},
        {"namespace": "a", "serviceAccount": "b.c", "trustDomain": "other.test", "cidr": "10.0.0.0/8"},
        {"cidr": "fd00::/16"}, {"cidr": "::ffff:10.0.0.0/104"}, {"trustDomain": "a_b-c.test"},
    ]);
    let selectors = [json!({"all": true}), json!({"serviceAccounts": []}), json!({"workloads": ["a.b-C_0"]})];
    let access = selectors.map(|selector| {
        let spec = json!({"selector": selector, "action": "deny", "from": peers, "ports": [1, 65535], "dryRun": true});
        ("AccessPolicy", spec)
    });
    let exclude =
        json!({"inboundPorts": [1], "outboundPorts": [], "outboundCidrs": ["0.0.0.0/0", "fd00::/8"]});
    // No empty value: this old API server takes it for null under a pattern.
    let labels = json!({"app.kubernetes.io/name": "a", "c": "A.b-c_1"});
    let mesh = [
        json!({"selector": {"all": true}, "mode": "off", "exclude": exclude, "certificateLifetimeSeconds": 60}),
        json!({"selector": {"matchLabels": labels}, "mode": "permissive"}),
        json!({"selector": {"all": true}, "certificateLifetimeSeconds": 2592000}),
    ];
    let empty = ("AccessPolicy", json!({"selector": {"all": true}, "action": "allow", "from": []}));
    access.into_iter().chain([empty]).chain(mesh.map(|spec| ("MeshPolicy", spec))).collect()
}

#[test]
fn the_definitions_refuse_what_agents_refuse_and_take_what_they_take() {
    let mut world = World::new(Options::default()).unwrap();
    world.add_kubernetes().unwrap();
    let (cluster, host) = world.kubernetes();
    cluster.define_policies(host).unwrap();
    let domain = TrustDomain::parse("td.test").unwrap();
    let agent_takes = |kind: &str, spec: &Value| {
        let metadata = Metadata { name: "p".into(), namespace: "demo".into() };
        match kind {
            "AccessPolicy" => read_access(metadata, spec.clone(), &domain).0.map(drop),
            _ => read_mesh(metadata, spec.clone()).0.map(drop),
        }
    };
    let server_takes = |kind: &str, spec: &Value| {
        let path = format!("{POLICIES}/{}?dryRun=All", plural(kind));
        cluster.ask(host, "POST", &path, "application/json", &policy(kind, "p", spec).to_string())
    };
    for (kind, spec, by_schema) in specs() {
        assert!(agent_takes(kind, &spec).is_err(), "agents refuse {kind} {spec}");
        let outcome = server_takes(kind, &spec);
        assert_eq!(outcome.is_err(), by_schema, "the API server and {kind} {spec}: {outcome:?}");
    }
    for (kind, spec) in good() {
        agent_takes(kind, &spec).unwrap_or_else(|why| panic!("agents take {kind} {spec}: {why:?}"));
        let made = server_takes(kind, &spec).unwrap_or_else(|why| panic!("{kind} {spec}: {why}"));
        assert_eq!(made["spec"], spec, "nothing of it is pruned");
    }
    // The rules for newer servers are in the definition, and it is as it should be without them.
    let text = std::fs::read_to_string(repository().join("manifests/crds/accesspolicies.yaml")).unwrap();
    assert_eq!(text.matches("- rule:").count(), 3);
}

/// Manifests as this API server can have them: its DaemonSets cannot surge yet.
fn for_this_server(manifests: &str) -> String {
    let surging = "    rollingUpdate:\n      maxSurge: 1\n      maxUnavailable: 0\n";
    assert_eq!(manifests.matches(surging).count(), 1, "the agents' DaemonSet surges");
    manifests.replace(surging, "    rollingUpdate:\n      maxUnavailable: 1\n")
}

#[test]
fn the_manifests_are_taken_by_an_api_server_and_a_cluster_is_checked() {
    let mut world = world();
    let (cluster, host) = world.kubernetes();
    let root = repository().join("manifests").display().to_string();
    let made = for_this_server(&cluster.kubectl(host, &["kustomize", &root]).unwrap());
    let (newer, served): (Vec<&str>, Vec<&str>) =
        made.split("\n---\n").partition(|document| document.contains("apiVersion: policy/v1\n"));
    assert_eq!(newer.len(), 1, "the disruption budget, whose version this API server is too old for");
    let file = world.dir().join("manifests.yaml");
    std::fs::write(&file, served.join("\n---\n")).unwrap();
    let file = file.display().to_string();
    let (cluster, host) = world.kubernetes();
    let applied =
        cluster.kubectl(host, &["apply", "--server-side", "--validate=false", "-f", &file]).unwrap();
    assert_eq!(applied.lines().count(), served.len(), "{applied}");
    for overlay in ["spire", "vault", "istio-csr", "prometheus-annotations", "prometheus-operator"] {
        let made = for_this_server(
            &cluster.kubectl(host, &["kustomize", &format!("{root}/overlays/{overlay}")]).unwrap(),
        );
        let served = made.split("\n---\n").filter(|document| {
            !document.contains("apiVersion: policy/v1\n")
                && !document.contains("apiVersion: monitoring.coreos.com/")
        });
        std::fs::write(&file, served.collect::<Vec<_>>().join("\n---\n")).unwrap();
        let dry = [
            "apply",
            "--server-side",
            "--dry-run=server",
            "--force-conflicts",
            "--validate=false",
            "-f",
            &file,
        ];
        cluster.kubectl(host, &dry).unwrap_or_else(|error| panic!("{overlay}: {error:#}"));
    }

    world.start().unwrap();
    let kubeconfig = world.kubernetes().0.kubeconfig(ADMIN).display().to_string();
    let check = |world: &World| {
        let args = ["check", "--cluster", "--kubeconfig", &kubeconfig, "-o", "json"];
        let said = world.host("n1").run(&tests::host::bin("hauberk").unwrap(), &args).unwrap();
        let rows: Vec<Value> = serde_json::from_str(&said.stdout).unwrap_or_else(|_| panic!("{said:?}"));
        (said.status.success(), rows)
    };
    let row =
        |world: &World, name: &str| check(world).1.into_iter().find(|row| row["check"] == name).unwrap();
    let failed = |rows: &[Value]| {
        let failed = rows.iter().filter(|row| row["outcome"] == "FAIL");
        failed.map(|row| row["check"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    // There is no controller that would run the authority's Deployment.
    wait_until(SOON, "only that the authority's Deployment has no pods is wrong", || {
        let (passed, rows) = check(&world);
        !passed
            && failed(&rows) == ["authority"]
            && !rows.iter().any(|row| row["detail"] == "no agent has looked yet")
    });
    let (cluster, host) = world.kubernetes();
    let deployments = format!("/apis/apps/v1/namespaces/{NAMESPACE}/deployments");
    cluster.delete(host, &format!("{deployments}/hauberk-authority")).unwrap();
    let (passed, rows) = check(&world);
    assert!(passed && failed(&rows).is_empty(), "{rows:?}");
    assert_eq!(row(&world, "15008 between nodes")["detail"], "2 connections tried, all made");
    assert_eq!(row(&world, "captured pods")["detail"], "all 3 pods of the mesh");

    // Rights that are taken away, an agent that is gone, a policy that cannot be used.
    let (cluster, host) = world.kubernetes();
    let roles = "/apis/rbac.authorization.k8s.io/v1";
    cluster.delete(host, &format!("{roles}/clusterrolebindings/hauberk-agent")).unwrap();
    wait_until(SOON, "missing rights are named", || {
        let row = row(&world, "RBAC");
        row["outcome"] == "FAIL"
            && row["detail"].as_str().unwrap().contains("hauberk-agent may not list pods")
    });
    let leases = format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases");
    world.agent("n2").stop(Duration::from_secs(20)).unwrap();
    let (cluster, host) = world.kubernetes();
    cluster.delete(host, &format!("{leases}/hauberk-agent-n2")).unwrap();
    let gone = row(&world, "agents");
    assert_eq!(gone["detail"], "1 of 2 nodes have no agent that was heard of lately: n2", "{gone}");
    apply(
        &mut world,
        "AccessPolicy",
        "bad",
        json!({"selector": {"all": true}, "action": "allow", "from": [{"serviceAccount": "x"}]}),
    )
    .unwrap();
    let bad = row(&world, "policies");
    assert!(
        bad["outcome"] == "FAIL"
            && bad["detail"].as_str().unwrap().contains("accesspolicies demo/bad: spec.from[0]"),
        "{bad}"
    );

    // As kubectl's plugin it is about the cluster without being told.
    let plugin = world.dir().join("kubectl-hauberk");
    std::os::unix::fs::symlink(tests::host::bin("hauberk").unwrap(), &plugin).unwrap();
    let path = format!("PATH={}:{}", world.dir().display(), std::env::var("PATH").unwrap());
    let kubectl = tests::kubernetes::kubectl().unwrap();
    let said = world
        .host("n1")
        .run("env", &[&path, &kubectl, "hauberk", "check", "--kubeconfig", &kubeconfig])
        .unwrap();
    assert!(!said.status.success() && said.stdout.contains("15008 between nodes"), "{said:?}");
}

/// What the manifests say that this version does not know yet, by file: the authority's part in a cluster.
/// Whoever makes it known takes it off this list.
const AWAITED: [(&str, &str); 2] =
    [("base/agent/agent.yaml", "serviceAccountToken"), ("base/authority/authority.yaml", "kubernetes")];

/// A configuration without the awaited field and what is below it.
fn without(text: &str, field: &str) -> String {
    let is_field = |line: &&str| line.trim_start().starts_with(&format!("{field}:"));
    // The last: one of `directory` has the same name.
    let at = text.lines().enumerate().filter(|(_, line)| is_field(line)).last().unwrap().0;
    let indent = |line: &str| line.len() - line.trim_start().len();
    let own = indent(text.lines().nth(at).unwrap());
    let rest = text.lines().skip(at + 1).skip_while(|line| line.is_empty() || indent(line) > own);
    text.lines().take(at).chain(rest).map(|line| format!("{line}\n")).collect()
}

#[test]
fn every_configuration_and_argument_of_the_manifests_is_one_that_the_program_takes() {
    let root = repository().join("manifests");
    let dir = std::env::temp_dir().join(format!("hauberk-manifests-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let hauberk = tests::host::bin("hauberk").unwrap();
    let run = |args: &[&str]| {
        std::process::Command::new(&hauberk).env("HAUBERK_NODE", "n1").args(args).output().unwrap()
    };
    // Why a configuration is refused, if it is.
    let refused = |file: &str, text: &str| {
        let path = dir.join("config.yaml");
        std::fs::write(&path, text).unwrap();
        if file.contains("authority") {
            return hauberk::authority::AuthorityConfig::load(&path).err().map(|error| error.to_string());
        }
        let said = run(&["check", "--config", path.to_str().unwrap(), "-o", "json"]);
        let rows: Vec<Value> = serde_json::from_slice(&said.stdout).unwrap();
        let row = rows.into_iter().find(|row| row["check"] == "configuration").unwrap();
        (row["outcome"] != "ok").then(|| row["detail"].as_str().unwrap().to_owned())
    };
    for file in [
        "base/agent/agent.yaml",
        "base/authority/authority.yaml",
        "overlays/spire/agent.yaml",
        "overlays/vault/agent.yaml",
        "overlays/istio-csr/agent.yaml",
    ] {
        let mut text = std::fs::read_to_string(root.join(file)).unwrap();
        if let Some((_, field)) = AWAITED.iter().find(|(awaited, _)| *awaited == file) {
            let why = refused(file, &text).unwrap_or_default();
            assert!(
                why.contains(&format!("unknown field `{field}`")),
                "{file}: {field} is awaited no more: {why}"
            );
            text = without(&text, field);
            if file.contains("authority") {
                text += "stateDir: /var/lib/hauberk\n";
            }
        }
        assert_eq!(refused(file, &text), None, "{file}");
    }
    for file in ["base/agent/daemonset.yaml", "base/authority/deployment.yaml"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.trim().strip_prefix("args: [")).unwrap();
        let args: Vec<&str> = line.trim_end_matches(']').split(", ").collect();
        let said = run(&args);
        let words = String::from_utf8_lossy(&said.stderr).into_owned();
        // 2 would be wrong usage.
        assert!(
            said.status.code() == Some(1) && words.contains("cannot read /etc/hauberk/"),
            "{args:?}: {words}"
        );
    }
    let rules = std::fs::read_to_string(root.join("components/monitoring/prometheusrule.yaml")).unwrap();
    let readme = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    for (at, _) in rules.match_indices("hauberk_") {
        let metric: String = rules[at..].chars().take_while(|c| is_name(*c)).collect();
        assert!(
            readme.contains(&format!("`{metric}`")),
            "alerts use {metric}, which the README does not list"
        );
    }
    std::fs::remove_dir_all(&dir).unwrap();
}
