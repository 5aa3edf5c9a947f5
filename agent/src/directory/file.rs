//! The directory from a YAML file, read again whenever it changes.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::{Directory, Endpoint, Live, Mode, NetnsAt, Node, Service, Target, Workload};
use crate::config::{self, ConfigError, Fault, read_yaml};
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh_policy::{Labels, Loaded, MeshPolicies};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    #[serde(default)]
    workloads: Vec<WorkloadEntry>,
    #[serde(default)]
    services: Vec<ServiceEntry>,
    #[serde(default)]
    nodes: Vec<NodeEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NodeEntry {
    name: String,
    address: IpAddr,
    zone: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WorkloadEntry {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    #[serde(default = "default_namespace")]
    service_account: String,
    /// Of another trust domain: it runs on no node of ours.
    trust_domain: Option<TrustDomain>,
    node: Option<String>,
    addresses: Vec<IpAddr>,
    /// Strict unless a mesh policy says otherwise.
    mode: Option<Mode>,
    #[serde(default)]
    labels: Labels,
    netns: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ServiceEntry {
    name: String,
    #[serde(default = "default_namespace")]
    namespace: String,
    addresses: Vec<IpAddr>,
    ports: Vec<PortEntry>,
    endpoints: Vec<EndpointEntry>,
    #[serde(default)]
    local_only: bool,
    affinity_seconds: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum EndpointEntry {
    /// `namespace/name` of a workload.
    Name(String),
    More(MoreOfEndpoint),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct MoreOfEndpoint {
    workload: String,
    /// Instead of the service's.
    ports: Option<Vec<PortEntry>>,
    #[serde(default)]
    draining: bool,
    #[serde(default)]
    zones: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct PortEntry {
    port: u16,
    target_port: u16,
}

/// Kubernetes' own default for both.
fn default_namespace() -> String {
    "default".into()
}

/// Reads the file; `mesh` has its say about each workload.
///
/// # Errors
/// One line that names the file, the entry and what is wrong with it.
pub fn load(path: &Path, domain: &TrustDomain, mesh: &Loaded) -> Result<Directory, ConfigError> {
    let document: Document = read_yaml(path)?;
    build(document, domain, mesh).map_err(|fault| ConfigError::invalid(path, fault))
}

fn build(document: Document, domain: &TrustDomain, mesh: &Loaded) -> Result<Directory, Fault> {
    let mut taken: HashSet<IpAddr> = HashSet::new();
    let mut workloads: HashMap<String, Arc<Workload>> = HashMap::new();
    let mut ordered = Vec::new();
    for (index, entry) in document.workloads.into_iter().enumerate() {
        let at = |field: &str| format!("workloads[{index}] ({}/{}).{field}", entry.namespace, entry.name);
        let addresses = addresses(&entry.addresses, &mut taken).map_err(|e| (at("addresses"), e))?;
        for family in [true, false] {
            if addresses.iter().filter(|a| a.is_ipv4() == family).count() > 1 {
                return Err((at("addresses"), "at most one IPv4 and one IPv6 address".into()));
            }
        }
        let foreign = entry.trust_domain.as_ref().filter(|named| *named != domain);
        let id = SpiffeId::workload(foreign.unwrap_or(domain), &entry.namespace, &entry.service_account)
            .map_err(|e| (at("namespace, serviceAccount"), e.to_string()))?;
        if entry.name.is_empty() || entry.name.contains('/') || entry.namespace.contains('/') {
            return Err((at("name"), "must not be empty or contain '/'".into()));
        }
        let node = match (foreign, entry.node.as_deref().unwrap_or_default()) {
            (None, "") => return Err((at("node"), "must name the node it runs on".into())),
            (None, node) => node.to_owned(),
            // No node's name: whoever carries its streams is none of our agents.
            (Some(_), "") => String::new(),
            (Some(_), _) => {
                let words = "must not be given: a workload of another trust domain runs on none of our nodes";
                return Err((at("node"), words.into()));
            }
        };
        let key = format!("{}/{}", entry.namespace, entry.name);
        let duplicate = at("name");
        let said = mesh.of(&entry.namespace, &entry.labels);
        let workload = Arc::new(Workload {
            name: entry.name,
            namespace: entry.namespace,
            id,
            node,
            addresses,
            mode: entry.mode.or(said.mode).unwrap_or_default(),
            netns: entry.netns.map(NetnsAt::File),
            exclusions: Arc::new(said.exclusions),
            svid_lifetime: said.svid_lifetime,
        });
        ordered.push(Arc::clone(&workload));
        if workloads.insert(key, workload).is_some() {
            return Err((duplicate, "another workload has this namespace and name".into()));
        }
    }
    let services = document
        .services
        .into_iter()
        .enumerate()
        .map(|(index, entry)| service(index, entry, &workloads, &mut taken))
        .collect::<Result<Vec<_>, Fault>>()?;
    let nodes = nodes(document.nodes, domain, &mut taken)?;
    Ok(Directory::new(ordered, services, nodes))
}

fn nodes(
    entries: Vec<NodeEntry>,
    domain: &TrustDomain,
    taken: &mut HashSet<IpAddr>,
) -> Result<Vec<Arc<Node>>, Fault> {
    let mut names = HashSet::new();
    let mut nodes = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let at = |field: &str| format!("nodes[{index}] ({}).{field}", entry.name);
        let id = SpiffeId::node(domain, &entry.name).map_err(|e| (at("name"), e.to_string()))?;
        let address = addresses(&[entry.address], taken).map_err(|e| (at("address"), e))?[0];
        if !names.insert(entry.name.clone()) {
            return Err((at("name"), "another node has this name".into()));
        }
        nodes.push(Arc::new(Node { name: entry.name, id, address, zone: entry.zone }));
    }
    Ok(nodes)
}

fn service(
    index: usize,
    entry: ServiceEntry,
    workloads: &HashMap<String, Arc<Workload>>,
    taken: &mut HashSet<IpAddr>,
) -> Result<Arc<Service>, Fault> {
    let at = |field: &str| format!("services[{index}] ({}/{}).{field}", entry.namespace, entry.name);
    let targets = targets(&entry.ports).map_err(|e| (at("ports"), e))?;
    let mut endpoints = Vec::new();
    for endpoint in &entry.endpoints {
        let (name, more) = match endpoint {
            EndpointEntry::Name(name) => (name, None),
            EndpointEntry::More(more) => (&more.workload, Some(more)),
        };
        let workload = workloads.get(name).ok_or_else(|| {
            (at("endpoints"), format!("no workload is called {name} (write namespace/name)"))
        })?;
        let own = more.and_then(|more| more.ports.as_deref());
        let targets = match own.map(self::targets) {
            Some(own) => own.map_err(|e| (at("endpoints"), format!("{name}: {e}")))?,
            None => Arc::clone(&targets),
        };
        endpoints.extend(workload.addresses.iter().map(|address| Endpoint {
            workload: Arc::clone(workload),
            address: *address,
            targets: Arc::clone(&targets),
            is_draining: more.is_some_and(|more| more.draining),
            zones: more.map(|more| more.zones.as_slice()).unwrap_or_default().into(),
        }));
    }
    let addresses = addresses(&entry.addresses, taken).map_err(|e| (at("addresses"), e))?;
    Ok(Arc::new(Service {
        name: entry.name,
        namespace: entry.namespace,
        addresses,
        ports: targets.iter().map(|target| target.port).collect(),
        endpoints,
        local_only: entry.local_only,
        affinity: entry.affinity_seconds.map(Duration::from_secs),
    }))
}

fn targets(ports: &[PortEntry]) -> Result<Arc<[Target]>, String> {
    let mut targets: Vec<Target> = Vec::new();
    for PortEntry { port, target_port } in ports {
        if *port == 0 || *target_port == 0 {
            return Err("a port must not be 0".into());
        }
        if targets.iter().any(|target| target.port == *port) {
            return Err(format!("port {port} is given twice"));
        }
        targets.push(Target { port: *port, target: *target_port });
    }
    Ok(targets.into())
}

/// Checks addresses, and that nobody else has them.
fn addresses(listed: &[IpAddr], taken: &mut HashSet<IpAddr>) -> Result<Vec<IpAddr>, String> {
    if listed.is_empty() {
        return Err("at least one address is needed".into());
    }
    let mut addresses = Vec::new();
    for address in listed {
        let address = address.to_canonical();
        if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} cannot be a workload's or service's address"));
        }
        if !taken.insert(address) {
            return Err(format!("{address} is given twice"));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

/// Takes what was read into use.
pub(super) fn take(live: &Live, directory: Directory) {
    live.standing().heard("workloads", true);
    live.standing().objects("workloads", directory.workloads().count());
    live.standing().objects("nodes", directory.node_count());
    live.replace(directory);
}

/// Runs for ever: reads the file again when it changes, or the mesh policies do. A bad file changes nothing,
/// and is said once.
pub async fn watch(path: PathBuf, domain: TrustDomain, mesh: Arc<MeshPolicies>, live: Arc<Live>) {
    mesh.read().await;
    let mut changes = mesh.subscribe();
    loop {
        tokio::select! {
            () = follow(path.clone(), domain.clone(), mesh.load(), Arc::clone(&live)) => {}
            // An error means that the sender is gone, and it is ours.
            _ = changes.changed() => {}
        }
    }
}

/// Runs for ever: follows the file under one state of the mesh policies.
async fn follow(path: PathBuf, domain: TrustDomain, mesh: Arc<Loaded>, live: Arc<Live>) {
    let file = path.clone();
    let took = move |loaded: Result<Directory, ConfigError>| match loaded {
        Ok(directory) => {
            let workloads = directory.workloads().count();
            tracing::info!(file = %file.display(), workloads, "directory read");
            take(&live, directory);
        }
        Err(error) => {
            live.standing().failed("file");
            live.standing().fault("workloads", &error.to_string());
            tracing::error!(%error, "the directory stays as it was");
        }
    };
    config::watch::watch(path, move |path| load(path, &domain, &mesh), took).await;
}

#[cfg(test)]
mod tests {
    use super::super::Resolved;
    use super::*;

    fn parse(text: &str) -> Result<Directory, String> {
        let document: Document = serde_yaml::from_str(text).map_err(|e| e.to_string())?;
        build(document, &TrustDomain::parse("td.test").unwrap(), &Loaded::default())
            .map_err(|(at, what)| format!("{at}: {what}"))
    }

    const TWO: &str = "
workloads:
  - {name: a, namespace: shop, serviceAccount: web, node: n1, addresses: [10.1.0.2, 'fd00::2']}
  - {name: b, namespace: shop, serviceAccount: db, node: n2, addresses: [10.2.0.2], mode: permissive}
";

    #[test]
    fn a_workload_of_another_trust_domain_runs_on_no_node_of_ours() {
        let entry = |more: &str| {
            parse(&format!(
                "workloads: [{{name: db, namespace: shop, serviceAccount: db, addresses: [10.9.0.1]{more}}}]"
            ))
        };
        let directory = entry(", trustDomain: other.test").unwrap();
        let workload = directory.workloads().next().unwrap();
        assert_eq!(workload.id.as_str(), "spiffe://other.test/ns/shop/sa/db");
        assert!(directory.node(&workload.node).is_none(), "its streams go to it, by workload scope");
        assert!(!directory.places(&workload.id, "n1"));
        assert!(entry(", trustDomain: other.test, node: n1").unwrap_err().contains(").node"));
        assert!(entry(", trustDomain: td.test").unwrap_err().contains(").node"), "our own needs one");
        assert!(entry(", trustDomain: td.test, node: n1").is_ok());
    }

    #[test]
    fn a_good_file_resolves_workloads_and_services() {
        let text = format!(
            "{TWO}services:\n  - {{name: db, namespace: shop, addresses: [10.96.0.1], ports: [{{port: 80, targetPort: 8080}}], endpoints: [shop/b]}}"
        );
        let directory = parse(&text).unwrap();
        let to = |address: &str| {
            directory.resolve(address.parse().unwrap()).map(|to| match to {
                Resolved::Workload(destination) => destination,
                Resolved::Service(endpoints) => endpoints.for_clients_on("n1", None).remove(0),
            })
        };
        assert_eq!(to("10.96.0.1:80").unwrap().address, "10.2.0.2:8080".parse().unwrap());
        assert_eq!(to("[::ffff:10.1.0.2]:5").unwrap().workload.id.path(), "/ns/shop/sa/web");
        assert_eq!(to("10.96.0.1:81"), Err(super::super::ResolveError::UnknownPort));
        assert_eq!(to("10.9.9.9:1"), Err(super::super::ResolveError::UnknownAddress));
        assert_eq!(directory.mesh_addresses().count(), 4);
        assert!(directory.places(&to("10.1.0.2:1").unwrap().workload.id, "n1"));
    }

    #[test]
    fn a_service_leads_to_the_endpoints_of_its_address_family_that_are_in_the_mesh() {
        let text = "
workloads:
  - {name: both, node: n1, addresses: [10.1.0.1, 'fd00::1']}
  - {name: four, node: n1, addresses: [10.1.0.2]}
  - {name: out, node: n1, addresses: [10.1.0.3], mode: off}
services:
  - {name: s, addresses: [10.96.0.1, 'fd96::1'], ports: [{port: 80, targetPort: 81}], endpoints: [default/both, default/four, default/out]}
  - {name: none, addresses: ['fd96::2'], ports: [{port: 80, targetPort: 81}], endpoints: [default/four, default/out]}
";
        let directory = parse(text).unwrap();
        let to = |address: &str| match directory.resolve(address.parse().unwrap()) {
            Ok(Resolved::Service(all)) => {
                let all = all.for_clients_on("n1", None);
                all.iter().map(|d| d.address.to_string()).collect()
            }
            other => vec![format!("{other:?}")],
        };
        assert_eq!(to("10.96.0.1:80"), ["10.1.0.1:81", "10.1.0.2:81"]);
        assert_eq!(to("[::ffff:10.96.0.1]:80"), ["10.1.0.1:81", "10.1.0.2:81"]);
        assert_eq!(to("[fd96::1]:80"), ["[fd00::1]:81"]);
        assert_eq!(to("[fd96::2]:80"), ["Err(NoEndpoint)"]);
    }

    #[test]
    fn endpoints_may_differ_in_ports_and_stop_and_services_may_be_local_or_sticky() {
        let text = format!(
            "{TWO}services:
  - name: s
    addresses: [10.96.0.1]
    ports: [{{port: 80, targetPort: 81}}]
    endpoints: [shop/a, {{workload: shop/b, ports: [{{port: 80, targetPort: 82}}], zones: [z]}}]
    affinitySeconds: 60
  - {{name: l, addresses: [10.96.0.2], ports: [{{port: 80, targetPort: 81}}], endpoints: [shop/a, shop/b], localOnly: true}}
  - name: d
    addresses: [10.96.0.3]
    ports: [{{port: 80, targetPort: 81}}]
    endpoints: [shop/a, {{workload: shop/b, draining: true}}]
"
        );
        let directory = parse(&text).unwrap();
        let to = |address: &str, node: &str| match directory.resolve(address.parse().unwrap()) {
            Ok(Resolved::Service(all)) => {
                let to = all.for_clients_on(node, Some("z"));
                (all.service.affinity, to.iter().map(|d| d.address.to_string()).collect::<Vec<_>>())
            }
            other => panic!("{other:?}"),
        };
        let sticky = Some(Duration::from_secs(60));
        assert_eq!(to("10.96.0.1:80", "n1"), (sticky, vec!["10.1.0.2:81".into(), "10.2.0.2:82".into()]));
        assert_eq!(to("10.96.0.2:80", "n2"), (None, vec!["10.2.0.2:81".into()]));
        assert_eq!(to("10.96.0.3:80", "n2"), (None, vec!["10.1.0.2:81".into()]));
    }

    #[test]
    fn each_fault_names_its_place() {
        for (text, place) in [
            ("workloads: [{name: a, node: n, addresses: []}]", "workloads[0] (default/a).addresses"),
            ("workloads: [{name: a, node: n, addresses: [127.0.0.1]}]", "127.0.0.1"),
            ("workloads: [{name: a, node: n, addresses: [10.0.0.1, 10.0.0.2]}]", "at most one IPv4"),
            ("workloads: [{name: a, node: n, addresses: [10.0.0.1, '::ffff:10.0.0.1']}]", "given twice"),
            (
                "workloads: [{name: a, node: n, addresses: [10.0.0.1], serviceAccount: 'a b'}]",
                "serviceAccount",
            ),
            ("workloads: [{name: a, nod: n, addresses: [10.0.0.1]}]", "nod"),
            (
                "services: [{name: s, addresses: [10.0.0.1], ports: [], endpoints: [x/y]}]",
                "services[0] (default/s).endpoints",
            ),
            (
                "services: [{name: s, addresses: [10.0.0.1], ports: [{port: 0, targetPort: 1}], endpoints: []}]",
                "ports",
            ),
            (
                "workloads: [{name: a, node: n, addresses: [10.0.0.1]}]\nservices: [{name: s, addresses: [10.0.0.2], ports: [], endpoints: [{workload: default/a, ports: [{port: 1, targetPort: 0}]}]}]",
                "services[0] (default/s).endpoints: default/a: a port must not be 0",
            ),
            ("nodes: [{name: 'a b', address: 10.0.0.1}]", "nodes[0] (a b).name"),
            ("nodes: [{name: a, address: 127.0.0.1}]", "nodes[0] (a).address"),
            ("nodes: [{name: a, address: 10.0.0.1}, {name: a, address: 10.0.0.2}]", "nodes[1] (a).name"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(place), "{text}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[a-z:\\[\\]{} ,\n0-9.-]{0,80}") {
            let _ = parse(&text);
        }
    }
}
