//! Services: an address with ports, and which of its endpoints a node's workloads may be sent to.
//!
//! The rules are those that Kubernetes' own proxies follow, so that a service behaves alike with and
//! without Hauberk. Which of the endpoints that remain is taken is `balance`'s.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::{Destination, Mode, Workload};

/// A service address and the workloads behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name, unique in its namespace.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports at its addresses.
    pub ports: Vec<u16>,
    /// The workloads that serve it.
    pub endpoints: Vec<Endpoint>,
    /// Whether only endpoints on the client's own node will do (`internalTrafficPolicy: Local`).
    pub local_only: bool,
    /// How long after its last connection a client is sent to the same endpoint again
    /// (`sessionAffinity: ClientIP`).
    pub affinity: Option<Duration>,
}

/// One address that serves a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Who must be there.
    pub workload: Arc<Workload>,
    /// Where: one of the workload's addresses.
    pub address: IpAddr,
    /// Which port of the workload serves a port of the service. Endpoints may differ in it.
    pub targets: Arc<[Target]>,
    /// Whether it stops already: it serves only when nobody else does.
    pub is_draining: bool,
    /// The zones whose clients it is for (topology hints); empty where nobody has said.
    pub zones: Arc<[String]>,
}

/// Which port of a workload serves a port of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target {
    /// The service's port.
    pub port: u16,
    /// The workload's.
    pub target: u16,
}

impl Service {
    /// Whether any endpoint is in the mesh.
    pub fn is_in_mesh(&self) -> bool {
        self.endpoints.iter().any(|endpoint| endpoint.workload.mode != Mode::Off)
    }
}

/// Those who serve a port of a service; at least one, on whatever node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The service.
    pub service: Arc<Service>,
    /// The service's address and port.
    pub address: SocketAddr,
}

impl Endpoints {
    /// Every endpoint in the mesh that serves this port at an address of the same family.
    fn serving(&self) -> impl Iterator<Item = (&Endpoint, Destination)> {
        self.service.endpoints.iter().filter_map(|endpoint| {
            let target = endpoint.targets.iter().find(|target| target.port == self.address.port())?.target;
            let fits =
                endpoint.workload.mode != Mode::Off && endpoint.address.is_ipv4() == self.address.is_ipv4();
            let address = SocketAddr::new(endpoint.address, target);
            fits.then(|| (endpoint, Destination { workload: Arc::clone(&endpoint.workload), address }))
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.serving().next().is_none()
    }

    /// The endpoints for clients on a node, in the order of these rules: of a local-only service those on
    /// the node; of these the ones that do not stop, or if all do, all; of these the ones that are meant
    /// for the node's zone, if each endpoint says which zones it is for and at least one names this one.
    pub fn for_clients_on(&self, node: &str, zone: Option<&str>) -> Vec<Destination> {
        let local_only = self.service.local_only;
        let mut left: Vec<_> =
            self.serving().filter(|(e, _)| !local_only || e.workload.node == node).collect();
        if left.iter().any(|(endpoint, _)| !endpoint.is_draining) {
            left.retain(|(endpoint, _)| !endpoint.is_draining);
            let is_hinted = left.iter().all(|(endpoint, _)| !endpoint.zones.is_empty());
            let is_near = |endpoint: &Endpoint| endpoint.zones.iter().any(|to| Some(to.as_str()) == zone);
            if !local_only && is_hinted && left.iter().any(|(endpoint, _)| is_near(endpoint)) {
                left.retain(|(endpoint, _)| is_near(endpoint));
            }
        }
        left.into_iter().map(|(_, destination)| destination).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{SpiffeId, TrustDomain};

    /// Endpoints written `node`, with `!` for one that stops and `@zone` for a hint.
    fn chosen(local_only: bool, endpoints: &[&str], node: &str, zone: &str) -> Vec<usize> {
        let domain = TrustDomain::parse("td.test").unwrap();
        let endpoint = |(index, text): (usize, &&str)| {
            let (node, hint) = text.split_once('@').map_or((*text, None), |(n, z)| (n, Some(z)));
            let address: IpAddr = [10, 1, 0, index as u8].into();
            let workload = Workload {
                name: format!("w{index}"),
                namespace: "shop".into(),
                id: SpiffeId::workload(&domain, "shop", "web").unwrap(),
                node: node.trim_end_matches('!').into(),
                addresses: vec![address],
                mode: Mode::Strict,
                netns: None,
                exclusions: Arc::default(),
                svid_lifetime: None,
            };
            Endpoint {
                workload: Arc::new(workload),
                address,
                targets: [Target { port: 80, target: 8080 }].into(),
                is_draining: node.ends_with('!'),
                zones: hint.map(str::to_owned).into_iter().collect(),
            }
        };
        let service = Service {
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec![[10, 96, 0, 1].into()],
            ports: vec![80],
            endpoints: endpoints.iter().enumerate().map(endpoint).collect(),
            local_only,
            affinity: None,
        };
        let endpoints = Endpoints { service: service.into(), address: ([10, 96, 0, 1], 80).into() };
        let last = |address: SocketAddr| match address.ip() {
            IpAddr::V4(v4) => usize::from(v4.octets()[3]),
            IpAddr::V6(_) => unreachable!("all are IPv4"),
        };
        endpoints.for_clients_on(node, Some(zone)).iter().map(|to| last(to.address)).collect()
    }

    #[test]
    fn a_local_only_service_has_no_endpoint_elsewhere() {
        assert_eq!(chosen(true, &["n1", "n2", "n1"], "n1", "a"), [0, 2]);
        assert_eq!(chosen(true, &["n2"], "n1", "a"), [0; 0]);
        assert_eq!(chosen(true, &["n1!", "n2"], "n1", "a"), [0], "its own last one, though it stops");
        assert_eq!(chosen(true, &["n1@b", "n1@a"], "n1", "a"), [0, 1], "hints say nothing here");
    }

    #[test]
    fn who_stops_serves_only_when_nobody_else_does() {
        assert_eq!(chosen(false, &["n1!", "n2"], "n1", "a"), [1]);
        assert_eq!(chosen(false, &["n1!", "n2!"], "n1", "a"), [0, 1]);
    }

    #[test]
    fn hints_are_followed_when_all_have_them_and_one_is_for_this_zone() {
        assert_eq!(chosen(false, &["n1@a", "n2@b"], "n9", "b"), [1]);
        assert_eq!(chosen(false, &["n1@a", "n2@b"], "n9", "c"), [0, 1], "none for this zone");
        assert_eq!(chosen(false, &["n1@a", "n2"], "n9", "a"), [0, 1], "one without a hint");
        assert_eq!(chosen(false, &["n1@a", "n2!", "n3@b"], "n9", "a"), [0], "one that stops does not count");
    }
}
