//! From Kubernetes' objects to the directory's rows: every rule about a single object.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use kube::api::ObjectMeta;

use super::objects;
use crate::config::Mode;
use crate::directory::{NetnsAt, Node, Target, Workload};
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh_policy::document::{Exclude, MAX_CIDRS, MAX_PORTS};
use crate::mesh_policy::{Exclusions, Labels};

/// On a namespace or a pod: `strict`, `permissive` or `off`.
pub const MODE_LABEL: &str = "hauberk.dev/mode";
/// On a pod: ports and ranges of addresses that are left alone, separated by commas.
const INBOUND_PORTS: &str = "hauberk.dev/exclude-inbound-ports";
const OUTBOUND_PORTS: &str = "hauberk.dev/exclude-outbound-ports";
const OUTBOUND_CIDRS: &str = "hauberk.dev/exclude-outbound-cidrs";
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Kubernetes' own default (`service.spec.sessionAffinityConfig.clientIP.timeoutSeconds`).
const AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);

/// `namespace/name`, or of what is in no namespace the name.
pub(crate) type Name = Arc<str>;

/// An object's name.
pub(super) fn name(meta: &ObjectMeta) -> Name {
    let name = meta.name.as_deref().unwrap_or_default();
    match &meta.namespace {
        Some(namespace) => format!("{namespace}/{name}").into(),
        None => name.into(),
    }
}

/// What an object's label says of its mode. A word that is none asks for something, so it gets the mode
/// that promises most: a misspelt `off` is noticed, a misspelt `strict` is kept.
pub(super) fn mode(meta: &ObjectMeta) -> Option<Mode> {
    let word = meta.labels.as_ref()?.get(MODE_LABEL)?;
    Some(match word.as_str() {
        "strict" => Mode::Strict,
        "permissive" => Mode::Permissive,
        "off" => Mode::Off,
        _ => {
            tracing::error!(object = %name(meta), label = word, "{MODE_LABEL} must be strict, permissive or off; taken for strict");
            Mode::Strict
        }
    })
}

/// What an object's annotations exclude. A list that cannot be read excludes nothing, and is logged: what it
/// was meant to leave alone is captured, or refused.
fn exclusions(meta: &ObjectMeta) -> Exclusions {
    fn list<T: std::str::FromStr>(meta: &ObjectMeta, key: &str, most: usize) -> Option<Vec<T>> {
        let text = meta.annotations.as_ref()?.get(key)?;
        let words = text.split(',').map(str::trim).filter(|word| !word.is_empty());
        let listed: Result<Vec<T>, _> = words.map(str::parse).collect();
        let usable = listed.ok().filter(|list| list.len() <= most);
        if usable.is_none() {
            tracing::error!(object = %name(meta), annotation = key, text, "not a list of at most {most}, separated by commas; nothing is excluded by it");
        }
        usable
    }
    let exclude = Exclude {
        inbound_ports: list(meta, INBOUND_PORTS, MAX_PORTS),
        outbound_ports: list(meta, OUTBOUND_PORTS, MAX_PORTS),
        outbound_cidrs: list(meta, OUTBOUND_CIDRS, MAX_CIDRS),
    };
    let mut exclusions = Exclusions::default();
    exclusions.add(&exclude);
    exclusions
}

/// A pod as it was told.
#[derive(Debug)]
pub(super) struct PodSeen {
    /// The workload, before anything but its own object had a say.
    pub(super) workload: Workload,
    /// The mode that its own label asks for.
    pub(super) label: Option<Mode>,
    /// Its labels.
    pub(super) labels: Labels,
    /// What its annotations exclude.
    pub(super) exclude: Exclusions,
}

/// The UID that names the pod's cgroup. A static pod's is not its object's, but a hash of its manifest, which the
/// kubelet writes on the object. Whoever may make pods may write that too: it is believed only in the form that
/// no other pod's UID has, so that it never leads to a pod of the API server's.
fn uid(meta: &ObjectMeta) -> Option<String> {
    let mirrored = meta.annotations.as_ref().and_then(|annotations| annotations.get(objects::MIRROR));
    let is_hash = |text: &&String| {
        text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
    };
    mirrored.filter(is_hash).or(meta.uid.as_ref()).cloned()
}

/// A pod as a workload; `None` when it has no network of its own: in the node's, not placed yet, or ended. Its
/// addresses may be told later than it starts.
pub(super) fn workload(
    pod: objects::Pod,
    domain: &TrustDomain,
    own_node: Option<&str>,
) -> Result<Option<PodSeen>, String> {
    let ended = matches!(pod.status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if pod.spec.host_network || ended {
        return Ok(None);
    }
    let listed = pod.status.pod_ips.into_iter().flatten().filter_map(|ip| ip.ip);
    let mut addresses: Vec<IpAddr> = Vec::new();
    for text in listed.chain(pod.status.pod_ip) {
        let ip = address(&text)?;
        // Kubernetes gives at most one of each family; of more the first counts there too.
        if !addresses.iter().any(|known| known.is_ipv4() == ip.is_ipv4()) {
            addresses.push(ip);
        }
    }
    let Some(node) = pod.spec.node_name else { return Ok(None) };
    let (label, exclude) = (mode(&pod.metadata), exclusions(&pod.metadata));
    let uid = uid(&pod.metadata);
    let namespace = pod.metadata.namespace.unwrap_or_default();
    let account = pod.spec.service_account_name.as_deref().filter(|name| !name.is_empty());
    let id = SpiffeId::workload(domain, &namespace, account.unwrap_or("default"))
        .map_err(|e| format!("namespace, serviceAccountName: {e}"))?;
    let is_here = own_node == Some(&*node);
    let netns = uid.filter(|_| is_here).map(|uid| NetnsAt::PodUid(uid.into()));
    let name = pod.metadata.name.unwrap_or_default();
    let workload = Workload {
        name,
        namespace,
        id,
        node,
        addresses,
        mode: Mode::Off,
        netns,
        exclusions: Arc::default(),
        svid_lifetime: None,
    };
    Ok(Some(PodSeen { workload, label, labels: pod.metadata.labels.unwrap_or_default(), exclude }))
}

/// A service without its endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServiceRow {
    pub(super) addresses: Vec<IpAddr>,
    /// Its TCP ports; slices name the workloads' ports by the same names.
    pub(super) ports: Vec<(Box<str>, u16)>,
    pub(super) local_only: bool,
    pub(super) affinity: Option<Duration>,
}

/// A service; `None` when it has no address: headless, ExternalName, not placed yet.
pub(super) fn service(service: &objects::Service) -> Result<Option<ServiceRow>, String> {
    let spec = &service.spec;
    if spec.kind.as_deref() == Some("ExternalName") {
        return Ok(None);
    }
    let mut addresses = Vec::new();
    // The field in the singular is repeated in the plural one, which older servers do not have.
    for text in spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip) {
        if matches!(text.as_str(), "" | "None") {
            continue;
        }
        let ip = address(text)?;
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    let sticky = spec.session_affinity.as_deref() == Some("ClientIP");
    let timeout = || {
        let configured = spec.session_affinity_config.as_ref()?.client_ip.as_ref()?.timeout_seconds;
        configured.map(Duration::from_secs)
    };
    let row = ServiceRow {
        ports: ports(spec.ports.as_deref()),
        local_only: spec.internal_traffic_policy.as_deref() == Some("Local"),
        affinity: sticky.then(|| timeout().unwrap_or(AFFINITY_TIMEOUT)),
        addresses,
    };
    Ok(Some(row).filter(|row| !row.addresses.is_empty()))
}

/// A slice of a service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SliceRow {
    pub(super) service: Name,
    ports: Vec<(Box<str>, u16)>,
    pub(super) endpoints: Vec<EndpointRow>,
}

/// An address that serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct EndpointRow {
    pub(super) address: IpAddr,
    pub(super) is_draining: bool,
    pub(super) zones: Arc<[String]>,
}

/// A slice; `None` when it belongs to no service.
pub(super) fn slice(slice: objects::Slice) -> Result<Option<SliceRow>, String> {
    let labels = slice.metadata.labels.as_ref();
    let Some(service) = labels.and_then(|labels| labels.get(SERVICE_LABEL)) else { return Ok(None) };
    let service = format!("{}/{service}", slice.metadata.namespace.as_deref().unwrap_or_default()).into();
    let no_zones: Arc<[String]> = Arc::default();
    let mut endpoints = Vec::new();
    for endpoint in slice.endpoints.into_iter().flatten() {
        let conditions = endpoint.conditions;
        let is_terminating = conditions.terminating == Some(true);
        // Unknown means ready, says the API. Who stops is never ready, but may serve still.
        let is_ready = conditions.ready.unwrap_or(!is_terminating);
        let is_draining = !is_ready && is_terminating && conditions.serving == Some(true);
        if !is_ready && !is_draining {
            continue;
        }
        let hints = endpoint.hints.and_then(|hints| hints.for_zones).unwrap_or_default();
        let zones = match hints.is_empty() {
            true => Arc::clone(&no_zones),
            false => hints.into_iter().map(|zone| zone.name).collect(),
        };
        // A name instead of an address (`addressType: FQDN`) is nothing that a proxy sends to. More
        // addresses than one are the same endpoint's.
        let Some(Ok(address)) = endpoint.addresses.first().map(|text| address(text)) else { continue };
        endpoints.push(EndpointRow { address, is_draining, zones });
    }
    Ok(Some(SliceRow { service, ports: ports(slice.ports.as_deref()), endpoints }))
}

/// Which ports of the slice's endpoints serve which of the service.
pub(super) fn targets(service: &ServiceRow, slice: &SliceRow) -> Arc<[Target]> {
    let target = |(name, port): &(Box<str>, u16)| {
        let (_, target) = slice.ports.iter().find(|(other, _)| other == name)?;
        Some(Target { port: *port, target: *target })
    };
    service.ports.iter().filter_map(target).collect()
}

fn ports(ports: Option<&[objects::Port]>) -> Vec<(Box<str>, u16)> {
    let tcp =
        ports.into_iter().flatten().filter(|port| matches!(port.protocol.as_deref(), None | Some("TCP")));
    tcp.filter_map(|port| Some((port.name.as_deref().unwrap_or_default().into(), port.port?))).collect()
}

/// A node, at the first of its internal addresses; `None` while it has none.
pub(super) fn node(node: objects::Node, domain: &TrustDomain) -> Result<Option<Node>, String> {
    let mut listed = node.status.addresses.into_iter().flatten();
    let Some(internal) = listed.find(|address| address.kind == "InternalIP") else { return Ok(None) };
    let name = node.metadata.name.unwrap_or_default();
    let id = SpiffeId::node(domain, &name).map_err(|e| format!("name: {e}"))?;
    let zone = node.metadata.labels.and_then(|mut labels| labels.remove(ZONE_LABEL));
    Ok(Some(Node { name, id, address: address(&internal.address)?, zone }))
}

fn address(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.parse().map_err(|_| format!("{text:?} is no address"))?;
    let ip = ip.to_canonical();
    if ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
        return Err(format!("{ip} cannot be a workload's, service's or node's address"));
    }
    Ok(ip)
}
