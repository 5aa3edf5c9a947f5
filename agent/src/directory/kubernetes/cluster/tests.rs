//! Every rule, told as the API server would tell it: in JSON.

use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::*;
use crate::directory::{NetnsAt, Resolved};
use crate::identity::SpiffeId;

fn rules() -> Rules {
    Rules {
        domain: TrustDomain::parse("td.test").unwrap(),
        node: Some("n1".into()),
        default_mode: Mode::Off,
        excluded: ["kube-system".to_owned()].into(),
    }
}

fn read<T: DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).unwrap()
}

/// An update, as one object is told.
fn apply(kind: &str, object: Value) -> Update {
    match kind {
        "pod" => Update::Pod(Event::Apply(read(object))),
        "service" => Update::Service(Event::Apply(read(object))),
        "slice" => Update::Slice(Event::Apply(read(object))),
        "node" => Update::Node(Event::Apply(read(object))),
        "namespace" => Update::Namespace(Event::Apply(read(object))),
        _ => unreachable!("no kind {kind}"),
    }
}

fn delete(kind: &str, object: Value) -> Update {
    match apply(kind, object) {
        Update::Pod(Event::Apply(object)) => Update::Pod(Event::Delete(object)),
        Update::Service(Event::Apply(object)) => Update::Service(Event::Delete(object)),
        Update::Slice(Event::Apply(object)) => Update::Slice(Event::Delete(object)),
        Update::Node(Event::Apply(object)) => Update::Node(Event::Delete(object)),
        Update::Namespace(Event::Apply(object)) => Update::Namespace(Event::Delete(object)),
        other => other,
    }
}

fn cluster(objects: impl IntoIterator<Item = (&'static str, Value)>) -> Cluster {
    let mut cluster = Cluster::new(rules());
    for (kind, object) in objects {
        cluster.update(apply(kind, object)).unwrap();
    }
    cluster
}

fn namespace(name: &str, mode: Option<&str>) -> (&'static str, Value) {
    let labels = mode.map(|mode| json!({"hauberk.dev/mode": mode}));
    ("namespace", json!({"metadata": {"name": name, "labels": labels}}))
}

/// A running pod on node n1 in `shop`, strict by its own label, with changes.
fn pod(name: &str, ip: &str, change: Value) -> (&'static str, Value) {
    let mut pod = json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"),
            "labels": {"hauberk.dev/mode": "strict"},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {}}],
        },
        "spec": {"nodeName": "n1", "serviceAccountName": "web", "containers": [{"name": "c"}]},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": []},
    });
    merge(&mut pod, change);
    ("pod", pod)
}

fn service(name: &str, ip: &str, change: Value) -> (&'static str, Value) {
    let mut service = json!({
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": ip, "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]},
    });
    merge(&mut service, change);
    ("service", service)
}

/// A slice of service `web`: each address with its conditions and zones.
fn slice(name: &str, port: u16, endpoints: Value) -> (&'static str, Value) {
    (
        "slice",
        json!({
            "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}],
        }),
    )
}

/// RFC 7386.
fn merge(object: &mut Value, change: Value) {
    match change {
        Value::Object(fields) => {
            for (key, value) in fields {
                merge(&mut object[key.as_str()], value);
            }
        }
        Value::Null if object.is_null() => {}
        other => *object = other,
    }
}

/// The mode of the only workload; `None` when there is none.
fn mode_of(objects: impl IntoIterator<Item = (&'static str, Value)>) -> Option<Mode> {
    cluster(objects).directory().workloads().next().map(|workload| workload.mode)
}

/// Where clients on a node are sent to by a service's address and port.
fn leads(directory: &Directory, to: &str, node: &str) -> Vec<String> {
    let zone = directory.node(node).and_then(|node| node.zone.clone());
    match directory.resolve(to.parse().unwrap()) {
        Ok(Resolved::Service(endpoints)) => {
            let chosen = endpoints.for_clients_on(node, zone.as_deref());
            chosen.iter().map(|to| to.address.to_string()).collect()
        }
        Ok(Resolved::Workload(to)) => vec![format!("{} itself", to.workload.full_name())],
        Err(error) => vec![error.to_string()],
    }
}

#[test]
fn the_pods_label_decides_then_its_namespaces_then_the_default() {
    let label =
        |mode: Value| pod("a", "10.1.0.1", json!({"metadata": {"labels": {"hauberk.dev/mode": mode}}}));
    let unlabelled = || label(Value::Null);
    let mut plain = unlabelled();
    plain.1["metadata"]["labels"] = json!(null);
    assert_eq!(mode_of([plain.clone()]), Some(Mode::Off), "the default");
    assert_eq!(mode_of([namespace("shop", Some("permissive")), plain.clone()]), Some(Mode::Permissive));
    assert_eq!(mode_of([plain.clone(), namespace("shop", Some("strict"))]), Some(Mode::Strict), "told later");
    assert_eq!(mode_of([namespace("shop", Some("strict")), label(json!("off"))]), Some(Mode::Off));
    assert_eq!(mode_of([namespace("shop", Some("off")), label(json!("strict"))]), Some(Mode::Strict));
    assert_eq!(mode_of([label(json!("Off"))]), Some(Mode::Strict), "a word that is none is kept safe");
    let system = pod("a", "10.1.0.1", json!({"metadata": {"namespace": "kube-system"}}));
    assert_eq!(mode_of([system]), Some(Mode::Off), "excluded, whatever it says");
}

#[test]
fn a_namespaces_label_that_changes_or_goes_changes_its_pods() {
    let mut plain = pod("a", "10.1.0.1", json!({}));
    plain.1["metadata"]["labels"] = json!(null);
    let mut cluster = cluster([namespace("shop", Some("strict")), plain]);
    let mode = |cluster: &mut Cluster| cluster.directory().workloads().next().unwrap().mode;
    assert_eq!(mode(&mut cluster), Mode::Strict);
    let (kind, object) = namespace("shop", None);
    cluster.update(apply(kind, object.clone())).unwrap();
    assert!(cluster.is_changed());
    assert_eq!(mode(&mut cluster), Mode::Off);
    assert!(!cluster.is_changed());
    let (kind, labelled) = namespace("shop", Some("permissive"));
    cluster.update(apply(kind, labelled)).unwrap();
    assert_eq!(mode(&mut cluster), Mode::Permissive);
    cluster.update(delete(kind, object)).unwrap();
    assert_eq!(mode(&mut cluster), Mode::Off);
}

fn mesh(specs: &[&str]) -> Arc<Loaded> {
    let policy = |(number, spec): (usize, &&str)| {
        let text = format!(
            "{{apiVersion: hauberk.dev/v1alpha1, kind: MeshPolicy, metadata: {{name: p{number}, namespace: shop}}, spec: {spec}}}"
        );
        serde_yaml::from_str(&text).unwrap()
    };
    Arc::new(Loaded::new(specs.iter().enumerate().map(policy).collect()))
}

#[test]
fn a_mesh_policy_decides_between_the_pods_label_and_its_namespaces() {
    let labelled = |name: &str, ip: &str, labels: Value| {
        let mut pod = pod(name, ip, json!({}));
        pod.1["metadata"]["labels"] = labels;
        pod
    };
    let pods = [
        labelled("a", "10.1.0.1", json!({"app": "a"})),
        labelled("b", "10.1.0.2", json!({"app": "a"})),
        labelled("own", "10.1.0.3", json!({"app": "a", "hauberk.dev/mode": "off"})),
    ];
    let mut cluster = cluster([namespace("shop", Some("permissive"))].into_iter().chain(pods));
    let modes = |cluster: &mut Cluster| {
        let directory = cluster.directory();
        ["10.1.0.1", "10.1.0.2", "10.1.0.3"]
            .map(|ip| directory.workload_at(ip.parse().unwrap()).unwrap().mode)
    };
    use Mode::{Off, Permissive, Strict};
    assert_eq!(modes(&mut cluster), [Permissive, Permissive, Off]);
    cluster.set_mesh(mesh(&[
        "{selector: {matchLabels: {app: a}}, mode: strict, certificateLifetimeSeconds: 600}",
    ]));
    assert!(cluster.is_changed());
    assert_eq!(modes(&mut cluster), [Strict, Strict, Off]);
    let id = SpiffeId::parse("spiffe://td.test/ns/shop/sa/web").unwrap();
    let lifetime = cluster.directory().svid_lifetime(&id, "n1");
    assert_eq!(lifetime, Some(std::time::Duration::from_secs(600)));
    // Labels that change count at once; sets that nobody has any more are forgotten.
    assert_eq!(cluster.labels.len(), 2);
    let (kind, relabelled) = labelled("b", "10.1.0.2", json!({"app": "b"}));
    cluster.update(apply(kind, relabelled)).unwrap();
    assert_eq!(modes(&mut cluster), [Strict, Permissive, Off]);
    assert_eq!(cluster.labels.len(), 3);
    let (kind, back) = labelled("b", "10.1.0.2", json!({"app": "a"}));
    cluster.update(apply(kind, back)).unwrap();
    assert_eq!(cluster.labels.len(), 2);
    cluster.set_mesh(mesh(&[]));
    assert_eq!(modes(&mut cluster), [Permissive, Permissive, Off]);
    cluster.set_mesh(mesh(&[]));
    assert!(!cluster.is_changed(), "nothing new");
}

#[test]
fn annotations_and_policies_exclude_together_and_what_cannot_be_read_excludes_nothing() {
    let annotated = |ports: &str| {
        let annotations = json!({
            "hauberk.dev/exclude-inbound-ports": ports,
            "hauberk.dev/exclude-outbound-cidrs": "10.8.0.0/16,fd00::/8",
        });
        pod("a", "10.1.0.1", json!({"metadata": {"annotations": annotations}}))
    };
    let mut cluster = cluster([annotated(" 9090, 80")]);
    let excluded = |cluster: &mut Cluster| {
        cluster.directory().workload_at("10.1.0.1".parse().unwrap()).unwrap().exclusions.words()
    };
    assert_eq!(excluded(&mut cluster), ["in:80", "in:9090", "out:10.8.0.0/16", "out:fd00::/8"]);
    cluster.set_mesh(mesh(&["{selector: {all: true}, exclude: {outboundPorts: [53], inboundPorts: [80]}}"]));
    assert_eq!(excluded(&mut cluster), ["in:80", "in:9090", "out:53", "out:10.8.0.0/16", "out:fd00::/8"]);
    for bad in ["9090;80", "70000", "-1", &vec!["1"; 65].join(",")] {
        let (kind, object) = annotated(bad);
        cluster.update(apply(kind, object)).unwrap();
        assert_eq!(excluded(&mut cluster), ["in:80", "out:53", "out:10.8.0.0/16", "out:fd00::/8"], "{bad}");
    }
}

#[test]
fn a_pod_is_a_workload_while_it_has_a_network_of_its_own() {
    let here = cluster([pod("a", "10.1.0.1", json!({}))]).directory();
    let workload = here.workload_at([10, 1, 0, 1].into()).unwrap();
    assert_eq!(workload.id.as_str(), "spiffe://td.test/ns/shop/sa/web");
    assert_eq!(workload.netns, Some(NetnsAt::PodUid("uid-a".into())), "on the agent's own node");
    let both =
        json!({"status": {"podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]}, "spec": {"nodeName": "n2"}});
    let dual = cluster([pod("a", "10.1.0.1", both)]).directory();
    let workload = dual.workload_at("fd00::1".parse().unwrap()).unwrap();
    assert_eq!((workload.addresses.len(), &workload.netns), (2, &None), "elsewhere no namespace is needed");
    for gone in [
        json!({"spec": {"hostNetwork": true}}),
        json!({"status": {"phase": "Succeeded"}}),
        json!({"status": {"phase": "Failed"}}),
        json!({"spec": {"nodeName": null}}),
    ] {
        let mut absent = pod("a", "10.1.0.1", json!({}));
        for (part, fields) in gone.as_object().unwrap() {
            for (key, value) in fields.as_object().unwrap() {
                absent.1[part][key] = value.clone();
            }
        }
        assert_eq!(mode_of([absent]), None, "{gone}");
    }
    // Placed and not told of yet: its node's agent may find its addresses before its kubelet tells them.
    let early = json!({"status": {"podIP": null, "podIPs": null}});
    let early = cluster([pod("a", "10.1.0.1", early)]).directory();
    let workload = early.enrolled_on("n1").next().unwrap();
    assert!(workload.addresses.is_empty() && workload.netns.is_some(), "{workload:?}");
    // Being deleted it may still send and receive.
    let leaving = json!({"metadata": {"deletionTimestamp": "2026-11-25T00:00:00Z"}});
    assert_eq!(mode_of([pod("a", "10.1.0.1", leaving)]), Some(Mode::Strict));
}

#[test]
fn a_static_pod_is_known_by_its_manifests_hash_and_nobody_elses_uid_can_be_claimed() {
    let uid_of = |mirror: &str| {
        let annotations = json!({"metadata": {"annotations": {"kubernetes.io/config.mirror": mirror}}});
        let mut cluster = cluster([pod("a", "10.1.0.1", annotations)]);
        let directory = cluster.directory();
        directory.on_node("n1").next().unwrap().netns.clone()
    };
    let hash = "0123456789abcdef0123456789abcdef";
    assert_eq!(uid_of(hash), Some(NetnsAt::PodUid(hash.into())));
    for claimed in ["8f1c2d3e-0000-4a5b-9c8d-001122334455", "0123456789ABCDEF0123456789ABCDEF", "", "file"] {
        assert_eq!(uid_of(claimed), Some(NetnsAt::PodUid("uid-a".into())), "{claimed:?}");
    }
}

#[test]
fn an_object_that_cannot_be_used_is_named_and_counts_as_absent() {
    let mut cluster = cluster([pod("a", "10.1.0.1", json!({}))]);
    let (kind, bad) = pod("a", "10.1.0.1", json!({"spec": {"serviceAccountName": "a b"}}));
    let unusable = cluster.update(apply(kind, bad)).unwrap_err();
    assert_eq!(unusable.object, "pods shop/a");
    assert!(unusable.why.starts_with("namespace, serviceAccountName"), "{}", unusable.why);
    assert_eq!(cluster.directory().workloads().count(), 0);
    let (kind, bad) = service("web", "127.0.0.1", json!({}));
    assert!(cluster.update(apply(kind, bad)).unwrap_err().why.contains("127.0.0.1"));
}

#[test]
fn a_service_leads_to_the_ports_that_its_slices_name() {
    let both = json!({"spec": {
        "clusterIPs": ["10.96.0.1", "fd96::1"],
        "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "other", "port": 81}],
    }});
    let mut six = slice("web-6", 8086, json!([{"addresses": ["fd00::1"]}]));
    six.1["addressType"] = json!("IPv6");
    let dual = json!({"status": {"podIPs": [{"ip": "10.1.0.1"}, {"ip": "fd00::1"}]}});
    let directory = cluster([
        slice("web-1", 8080, json!([{"addresses": ["10.1.0.1"]}, {"addresses": ["203.0.113.7"]}])),
        slice("web-2", 9090, json!([{"addresses": ["10.1.0.2"], "conditions": {"ready": true}}])),
        six,
        service("web", "10.96.0.1", both),
        pod("a", "10.1.0.1", dual),
        pod("b", "10.1.0.2", json!({})),
    ])
    .directory();
    assert_eq!(
        leads(&directory, "10.96.0.1:80", "n1"),
        ["10.1.0.1:8080", "10.1.0.2:9090"],
        "of a stranger nothing"
    );
    assert_eq!(leads(&directory, "[fd96::1]:80", "n1"), ["[fd00::1]:8086"]);
    assert_eq!(leads(&directory, "10.96.0.1:81", "n1"), ["the service has no endpoint"]);
    assert_eq!(leads(&directory, "10.96.0.1:53", "n1"), ["the service does not expose this port"]);
    assert_eq!(leads(&directory, "10.1.0.1:1", "n1"), ["shop/a itself"]);
}

#[test]
fn services_without_an_address_or_a_member_are_not_captured() {
    let captured = |change: Value, endpoints: Value| {
        let objects =
            [service("web", "10.96.0.1", change), slice("s", 1, endpoints), pod("a", "10.1.0.1", json!({}))];
        let directory = cluster(objects).directory();
        let addresses: HashSet<IpAddr> = directory.mesh_addresses().collect();
        assert!(addresses.contains(&IpAddr::from([10, 1, 0, 1])));
        addresses.len() - 1
    };
    let member = || json!([{"addresses": ["10.1.0.1"]}]);
    assert_eq!(captured(json!({}), member()), 1);
    assert_eq!(captured(json!({"spec": {"clusterIP": "None"}}), member()), 0, "headless");
    assert_eq!(captured(json!({"spec": {"type": "ExternalName", "clusterIP": ""}}), member()), 0);
    assert_eq!(captured(json!({}), json!([{"addresses": ["203.0.113.7"]}])), 0, "outside the mesh");
    assert_eq!(captured(json!({}), json!(null)), 0, "nobody");
}

#[test]
fn not_ready_endpoints_do_not_serve_and_terminating_ones_only_alone() {
    let pods = || [pod("a", "10.1.0.1", json!({})), pod("b", "10.1.0.2", json!({}))];
    let serving = |one: Value, other: Value| {
        let endpoints = json!([
            {"addresses": ["10.1.0.1"], "conditions": one},
            {"addresses": ["10.1.0.2"], "conditions": other},
        ]);
        let objects = [service("web", "10.96.0.1", json!({})), slice("s", 1, endpoints)];
        leads(&cluster(objects.into_iter().chain(pods())).directory(), "10.96.0.1:80", "n1")
    };
    let stopping = || json!({"ready": false, "serving": true, "terminating": true});
    assert_eq!(serving(json!({}), json!({"ready": null})), ["10.1.0.1:1", "10.1.0.2:1"], "unknown is ready");
    assert_eq!(serving(json!({"ready": false}), json!({"ready": true})), ["10.1.0.2:1"]);
    assert_eq!(serving(stopping(), json!({"ready": true})), ["10.1.0.2:1"]);
    assert_eq!(serving(stopping(), json!({"ready": false})), ["10.1.0.1:1"]);
    // What publishNotReadyAddresses comes to in a slice.
    assert_eq!(
        serving(json!({"ready": true, "serving": false, "terminating": true}), json!({"ready": false})),
        ["10.1.0.1:1"]
    );
    let none =
        serving(json!({"ready": false}), json!({"ready": false, "serving": false, "terminating": true}));
    assert_eq!(none, ["the service has no endpoint"]);
}

#[test]
fn policy_hints_and_affinity_are_read() {
    let node = |name: &str, zone: &str| {
        (
            "node",
            json!({
                "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
                "status": {"addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": format!("192.0.2.{}", &name[1..])}]},
            }),
        )
    };
    let hinted =
        |address: &str, zone: &str| json!({"addresses": [address], "hints": {"forZones": [{"name": zone}]}});
    let objects = |change: Value| {
        [
            service("web", "10.96.0.1", change),
            slice("s", 1, json!([hinted("10.1.0.1", "a"), hinted("10.1.0.2", "b")])),
            pod("a", "10.1.0.1", json!({})),
            pod("b", "10.1.0.2", json!({"spec": {"nodeName": "n2"}})),
            node("n1", "a"),
            node("n2", "b"),
        ]
    };
    let directory = cluster(objects(json!({}))).directory();
    assert_eq!(leads(&directory, "10.96.0.1:80", "n1"), ["10.1.0.1:1"]);
    assert_eq!(leads(&directory, "10.96.0.1:80", "n2"), ["10.1.0.2:1"]);
    assert_eq!(directory.node("n2").unwrap().address, IpAddr::from([192, 0, 2, 2]));
    let local = json!({"spec": {"internalTrafficPolicy": "Local"}});
    let directory = cluster(objects(local)).directory();
    assert_eq!(leads(&directory, "10.96.0.1:80", "n2"), ["10.1.0.2:1"]);
    assert_eq!(leads(&directory, "10.96.0.1:80", "n3"), [""; 0]);
    let affinity = |spec: Value| {
        let directory = cluster(objects(json!({"spec": spec}))).directory();
        match directory.resolve("10.96.0.1:80".parse().unwrap()) {
            Ok(Resolved::Service(endpoints)) => endpoints.service.affinity.map(|timeout| timeout.as_secs()),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(affinity(json!({"sessionAffinity": "None"})), None);
    assert_eq!(affinity(json!({"sessionAffinity": "ClientIP"})), Some(10_800));
    let timeout = json!({"clientIP": {"timeoutSeconds": 60}});
    assert_eq!(affinity(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": timeout})), Some(60));
}

#[test]
fn what_is_told_anew_replaces_what_was_and_is_whole_only_then() {
    let mut cluster = cluster([pod("a", "10.1.0.1", json!({})), pod("b", "10.1.0.2", json!({}))]);
    let names = |cluster: &mut Cluster| {
        let mut names: Vec<_> = cluster.directory().workloads().map(|w| w.name.clone()).collect();
        names.sort();
        names
    };
    let told = |pods: &[&str]| {
        let pods = pods.iter().map(|name| pod(name, "10.1.0.3", json!({})).1);
        let each = pods.map(|pod| Update::Pod(Event::InitApply(read(pod))));
        [Update::Pod(Event::Init)].into_iter().chain(each).collect::<Vec<_>>()
    };
    told(&["c"]).into_iter().for_each(|update| cluster.update(update).unwrap());
    assert_eq!(names(&mut cluster), ["a", "b", "c"], "nobody is missing until all are told");
    cluster.update(Update::Pod(Event::InitDone)).unwrap();
    assert_eq!(names(&mut cluster), ["c"]);
    assert!(!cluster.is_read(), "the other kinds are not read");
    for update in [
        Update::Service(Event::Init),
        Update::Service(Event::InitDone),
        Update::Slice(Event::Init),
        Update::Slice(Event::InitDone),
    ] {
        cluster.update(update).unwrap();
    }
    for update in [Update::Node(Event::Init), Update::Node(Event::InitDone), Update::Namespace(Event::Init)] {
        cluster.update(update).unwrap();
    }
    assert!(!cluster.is_read());
    cluster.update(Update::Namespace(Event::InitDone)).unwrap();
    assert!(cluster.is_read());
}

/// A small cluster's objects, in every state that matters.
fn object() -> impl Strategy<Value = (&'static str, Value)> {
    let mode = || prop::sample::select(vec!["strict", "permissive", "off"]);
    prop_oneof![
        (0..2, prop::option::of(mode())).prop_map(|(n, mode)| namespace(["shop", "other"][n as usize], mode)),
        (1u8..6, prop::option::of(mode()), any::<bool>()).prop_map(|(n, mode, runs)| {
            let mut pod = pod(&format!("p{n}"), &format!("10.1.0.{n}"), json!({}));
            pod.1["metadata"]["labels"] = json!(mode.map(|mode| json!({"hauberk.dev/mode": mode})));
            pod.1["status"]["phase"] = json!(if runs { "Running" } else { "Failed" });
            pod
        }),
        prop::sample::select(vec!["None", "10.96.0.1", "10.96.0.2"]).prop_map(|ip| service("web", ip, json!({}))),
        (0..3, prop::collection::vec((1u8..6, any::<bool>()), 0..4)).prop_map(|(n, endpoints)| {
            let endpoint = |(n, ready): &(u8, bool)| json!({"addresses": [format!("10.1.0.{n}")], "conditions": {"ready": ready}});
            slice(&format!("web-{n}"), 8080 + n as u16 % 2, endpoints.iter().map(endpoint).collect())
        }),
    ]
}

/// Everything that can be seen of a directory.
fn seen(directory: &Directory) -> (Vec<String>, Vec<IpAddr>, [Vec<String>; 2]) {
    let mut workloads: Vec<_> =
        directory.workloads().map(|w| format!("{} {:?}", w.full_name(), w.mode)).collect();
    workloads.sort();
    let mut mesh: Vec<_> = directory.mesh_addresses().collect();
    mesh.sort();
    (workloads, mesh, ["10.96.0.1:80", "10.96.0.2:80"].map(|to| leads(directory, to, "n1")))
}

proptest! {
    #[test]
    fn any_way_to_the_same_objects_leads_to_the_same_directory(
        steps in prop::collection::vec((object(), any::<bool>(), any::<bool>()), 0..40),
    ) {
        let mut by_changes = Cluster::new(rules());
        let mut last: std::collections::BTreeMap<(&str, Name), Value> = std::collections::BTreeMap::new();
        let mut before = by_changes.directory();
        for ((kind, object), is_deleted, is_asked) in steps {
            let name = rows::name(&read::<objects::Namespace>(object.clone()).metadata);
            match is_deleted {
                true => {
                    by_changes.update(delete(kind, object)).unwrap();
                    last.remove(&(kind, name));
                }
                false => {
                    by_changes.update(apply(kind, object.clone())).unwrap();
                    last.insert((kind, name), object);
                }
            }
            if is_asked {
                let now = by_changes.directory();
                // What is told of the mesh step by step comes to the same as the whole.
                let (added, removed) = now.mesh_changes(&before);
                let mut stepped: HashSet<IpAddr> = before.mesh_addresses().collect();
                prop_assert!(added.is_disjoint(&stepped) && removed.is_subset(&stepped));
                stepped.extend(added);
                stepped.retain(|address| !removed.contains(address));
                prop_assert_eq!(stepped, now.mesh_addresses().collect::<HashSet<_>>());
                before = now;
            }
        }
        let mut at_once = cluster(last.into_iter().rev().map(|((kind, _), object)| (kind, object)));
        prop_assert_eq!(seen(&by_changes.directory()), seen(&at_once.directory()));
        prop_assert_eq!(by_changes.counts(), at_once.counts());
    }
}
