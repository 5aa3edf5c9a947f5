//! Kubernetes' objects, as far as the directory reads them: what is not here is dropped while parsing, so
//! that neither managed fields nor container specs ever take memory.

use std::borrow::Cow;
use std::collections::BTreeMap;

use kube::api::ObjectMeta;
use kube::core::DynamicResourceScope;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::document;

/// Of labels and annotations that are ours.
const OUR_PREFIX: &str = "hauberk.dev/";
/// On the object that a kubelet makes for a static pod: the UID by which it runs the pod.
pub(super) const MIRROR: &str = "kubernetes.io/config.mirror";

/// What the API server calls a kind of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    kind: &'static str,
    group: &'static str,
    version: &'static str,
    /// Its name in paths, RBAC rules, and our metrics.
    pub plural: &'static str,
}

impl Kind {
    const fn core(kind: &'static str, plural: &'static str) -> Self {
        Self { kind, group: "", version: "v1", plural }
    }

    /// Pods.
    pub const PODS: Self = Self::core("Pod", "pods");
    /// Services.
    pub const SERVICES: Self = Self::core("Service", "services");
    /// Nodes.
    pub const NODES: Self = Self::core("Node", "nodes");
    /// Namespaces.
    pub const NAMESPACES: Self = Self::core("Namespace", "namespaces");
    /// EndpointSlices, as Kubernetes 1.21 and later serve them.
    pub const SLICES: Self =
        Self { kind: "EndpointSlice", group: "discovery.k8s.io", version: "v1", plural: "endpointslices" };
    /// EndpointSlices, as earlier ones do. The fields that are read are the same.
    pub const SLICES_BETA: Self = Self { version: "v1beta1", ..Self::SLICES };

    /// Access policies.
    pub const ACCESS_POLICIES: Self = Self::ours("AccessPolicy", "accesspolicies");
    /// Mesh policies.
    pub const MESH_POLICIES: Self = Self::ours("MeshPolicy", "meshpolicies");

    const fn ours(kind: &'static str, plural: &'static str) -> Self {
        Self { kind, group: document::GROUP, version: document::VERSION, plural }
    }

    /// Whether it is a kind that our own definitions (CRDs) make.
    pub fn is_ours(self) -> bool {
        self.group == document::GROUP
    }

    /// Group and version, as paths have them.
    pub fn group_version(self) -> String {
        format!("{}/{}", self.group, self.version)
    }
}

macro_rules! resource {
    ($($name:ty),+) => {$(
        impl kube::Resource for $name {
            type DynamicType = Kind;
            type Scope = DynamicResourceScope;
            fn kind(kind: &Kind) -> Cow<'_, str> {
                kind.kind.into()
            }
            fn group(kind: &Kind) -> Cow<'_, str> {
                kind.group.into()
            }
            fn version(kind: &Kind) -> Cow<'_, str> {
                kind.version.into()
            }
            fn plural(kind: &Kind) -> Cow<'_, str> {
                kind.plural.into()
            }
            fn meta(&self) -> &ObjectMeta {
                &self.metadata
            }
            fn meta_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    )+};
}

resource!(Pod, Service, Slice, Node, Namespace, Policy);

/// A pod.
#[derive(Clone, Debug, Deserialize)]
pub struct Pod {
    #[serde(deserialize_with = "metadata")]
    pub(super) metadata: ObjectMeta,
    pub(super) spec: PodSpec,
    #[serde(default)]
    pub(super) status: PodStatus,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub(super) node_name: Option<String>,
    #[serde(default)]
    pub(super) host_network: bool,
    pub(super) service_account_name: Option<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodStatus {
    pub(super) phase: Option<String>,
    #[serde(rename = "podIP")]
    pub(super) pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pub(super) pod_ips: Option<Vec<PodIp>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct PodIp {
    pub(super) ip: Option<String>,
}

/// A service.
#[derive(Clone, Debug, Deserialize)]
pub struct Service {
    #[serde(deserialize_with = "metadata")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) spec: ServiceSpec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceSpec {
    #[serde(rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    pub(super) cluster_ips: Option<Vec<String>>,
    pub(super) ports: Option<Vec<Port>>,
    pub(super) internal_traffic_policy: Option<String>,
    pub(super) session_affinity: Option<String>,
    pub(super) session_affinity_config: Option<AffinityConfig>,
}

/// A port of a service or a slice.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Port {
    pub(super) name: Option<String>,
    pub(super) port: Option<u16>,
    pub(super) protocol: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct AffinityConfig {
    #[serde(rename = "clientIP")]
    pub(super) client_ip: Option<ClientIp>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ClientIp {
    pub(super) timeout_seconds: Option<u64>,
}

/// An EndpointSlice.
#[derive(Clone, Debug, Deserialize)]
pub struct Slice {
    #[serde(deserialize_with = "metadata")]
    pub(super) metadata: ObjectMeta,
    /// `null` where there is none.
    pub(super) endpoints: Option<Vec<SliceEndpoint>>,
    pub(super) ports: Option<Vec<Port>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct SliceEndpoint {
    pub(super) addresses: Vec<String>,
    #[serde(default)]
    pub(super) conditions: Conditions,
    pub(super) hints: Option<Hints>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(super) struct Conditions {
    pub(super) ready: Option<bool>,
    pub(super) serving: Option<bool>,
    pub(super) terminating: Option<bool>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hints {
    pub(super) for_zones: Option<Vec<ForZone>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct ForZone {
    pub(super) name: String,
}

/// A node.
#[derive(Clone, Debug, Deserialize)]
pub struct Node {
    #[serde(deserialize_with = "metadata")]
    pub(super) metadata: ObjectMeta,
    #[serde(default)]
    pub(super) status: NodeStatus,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct NodeStatus {
    pub(super) addresses: Option<Vec<NodeAddress>>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NodeAddress {
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) address: String,
}

/// A namespace.
#[derive(Clone, Debug, Deserialize)]
pub struct Namespace {
    #[serde(deserialize_with = "metadata")]
    pub(super) metadata: ObjectMeta,
}

/// A policy of ours: its own kind's type reads the rest.
#[derive(Clone, Debug, Deserialize)]
pub struct Policy {
    /// Its name, generation and UID.
    #[serde(deserialize_with = "metadata")]
    pub metadata: ObjectMeta,
    /// What it says.
    #[serde(default)]
    pub spec: Value,
    /// What has been said of it.
    #[serde(default)]
    pub status: Value,
}

/// Metadata without what nobody reads.
fn metadata<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Read {
        name: Option<String>,
        namespace: Option<String>,
        uid: Option<String>,
        resource_version: Option<String>,
        generation: Option<i64>,
        labels: Option<BTreeMap<String, String>>,
        annotations: Option<BTreeMap<String, String>>,
    }
    let mut read = Read::deserialize(deserializer)?;
    if let Some(annotations) = &mut read.annotations {
        // Others keep whole documents there.
        annotations.retain(|key, _| key.starts_with(OUR_PREFIX) || key == MIRROR);
    }
    let Read { name, namespace, uid, resource_version, generation, labels, annotations } = read;
    Ok(ObjectMeta {
        name,
        namespace,
        uid,
        resource_version,
        generation,
        labels,
        annotations,
        ..ObjectMeta::default()
    })
}
