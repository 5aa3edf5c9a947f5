//! Who is where: workloads, services and nodes, indexed by address.
//!
//! An address answers only the question "which identity must be there?"; it is never itself an
//! identity. The peer's certificate has the last word. Sources live below (`directory/file.rs`).

pub mod file;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::identity::SpiffeId;

/// How a workload's plaintext is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Only mutual TLS, in both directions; plaintext is refused.
    #[default]
    Strict,
    /// Mutual TLS with mesh members; plaintext from outside is accepted and counted.
    Permissive,
    /// Not part of the mesh.
    Off,
}

/// A pod, or a declared endpoint outside Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Name, unique in its namespace.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// The identity it must present.
    pub id: SpiffeId,
    /// The node it runs on.
    pub node: String,
    /// Its own addresses, IPv4 and IPv6; never empty.
    pub addresses: Vec<IpAddr>,
    /// How its plaintext is treated.
    pub mode: Mode,
    /// Its network namespace, as a file on its node; needed only there.
    pub netns: Option<PathBuf>,
}

impl Workload {
    /// `namespace/name`, by which logs and the admin server call it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its address of the same family as `like`, with a port.
    pub fn address(&self, like: IpAddr, port: u16) -> Option<SocketAddr> {
        let ip = self.addresses.iter().find(|a| a.is_ipv4() == like.is_ipv4())?;
        Some(SocketAddr::new(*ip, port))
    }
}

/// A node with an agent of ours on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its agent's identity, `spiffe://TRUST-DOMAIN/node/NAME`.
    pub id: SpiffeId,
    /// Where its agent accepts connections that carry every workload's streams (node scope).
    pub address: IpAddr,
    /// Its zone, if it is in one: nearer endpoints of a service are preferred.
    pub zone: Option<String>,
}

/// A service address and the workloads behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name, unique in its namespace.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Virtual addresses.
    pub addresses: Vec<IpAddr>,
    /// Service port to workload port.
    pub ports: HashMap<u16, u16>,
    /// The workloads that serve it.
    pub endpoints: Vec<Arc<Workload>>,
}

/// Who must answer, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Who must answer.
    pub workload: Arc<Workload>,
    /// Where its application listens.
    pub address: SocketAddr,
}

/// What an original destination turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// A workload's own address: nobody else will do.
    Workload(Destination),
    /// A service's port: any of its endpoints will do.
    Service(Endpoints),
}

/// Those who serve a port of a service; at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoints {
    /// The service.
    pub service: Arc<Service>,
    /// The service's address and port.
    pub address: SocketAddr,
    /// The workloads' port.
    target: u16,
}

impl Endpoints {
    /// Each endpoint in the mesh, at its address of the same family as the service's.
    pub fn destinations(&self) -> impl Iterator<Item = Destination> + '_ {
        self.service.endpoints.iter().filter(|w| w.mode != Mode::Off).filter_map(|workload| {
            let address = workload.address(self.address.ip(), self.target)?;
            Some(Destination { workload: Arc::clone(workload), address })
        })
    }
}

/// Why an original destination leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// No workload or service has this address (any more).
    #[error("no workload or service in the directory has this address")]
    UnknownAddress,
    /// The service has no such port.
    #[error("the service does not expose this port")]
    UnknownPort,
    /// The service has no workload that can serve it.
    #[error("the service has no endpoint")]
    NoEndpoint,
}

/// One consistent state of the directory.
#[derive(Debug, Default)]
pub struct Directory {
    workloads: Vec<Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    /// The nodes on which an identity runs.
    placed: HashMap<SpiffeId, HashSet<String>>,
    services: HashMap<IpAddr, Arc<Service>>,
    nodes: HashMap<String, Arc<Node>>,
}

impl Directory {
    /// Indexes workloads, services and nodes. Addresses must be unique; the sources check that.
    pub fn new(workloads: Vec<Arc<Workload>>, services: Vec<Arc<Service>>, nodes: Vec<Arc<Node>>) -> Self {
        let by_address =
            workloads.iter().flat_map(|w| w.addresses.iter().map(|a| (*a, Arc::clone(w)))).collect();
        let mut placed: HashMap<SpiffeId, HashSet<String>> = HashMap::new();
        for workload in workloads.iter().filter(|w| w.mode != Mode::Off) {
            placed.entry(workload.id.clone()).or_default().insert(workload.node.clone());
        }
        let services =
            services.iter().flat_map(|s| s.addresses.iter().map(|a| (*a, Arc::clone(s)))).collect();
        let nodes = nodes.into_iter().map(|node| (node.name.clone(), node)).collect();
        Self { workloads, by_address, placed, services, nodes }
    }

    /// A node that is known to have an agent of ours.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    /// Every node that is known to have an agent of ours.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// Every workload.
    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// The workloads that run on a node and are in the mesh.
    pub fn enrolled_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.workloads.iter().filter(move |w| w.node == node && w.mode != Mode::Off)
    }

    /// The workload that has an address.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// Whether an identity runs on a node.
    pub fn places(&self, id: &SpiffeId, node: &str) -> bool {
        self.placed.get(id).is_some_and(|nodes| nodes.contains(node))
    }

    /// Every address whose traffic is captured: workloads in the mesh, and services with at least
    /// one endpoint in it.
    pub fn mesh_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let workloads = self.by_address.iter().filter(|(_, w)| w.mode != Mode::Off).map(|(a, _)| *a);
        let services = self
            .services
            .iter()
            .filter(|(_, s)| s.endpoints.iter().any(|w| w.mode != Mode::Off))
            .map(|(a, _)| *a);
        workloads.chain(services)
    }

    /// Where an original destination leads.
    ///
    /// # Errors
    /// When the directory does not (any more) know the address, the port or an endpoint.
    pub fn resolve(&self, original_dst: SocketAddr) -> Result<Resolved, ResolveError> {
        let ip = original_dst.ip().to_canonical();
        let address = SocketAddr::new(ip, original_dst.port());
        if let Some(workload) = self.by_address.get(&ip) {
            return Ok(Resolved::Workload(Destination { workload: Arc::clone(workload), address }));
        }
        let service = self.services.get(&ip).ok_or(ResolveError::UnknownAddress)?;
        let target = *service.ports.get(&address.port()).ok_or(ResolveError::UnknownPort)?;
        let endpoints = Endpoints { service: Arc::clone(service), address, target };
        if endpoints.destinations().next().is_none() {
            return Err(ResolveError::NoEndpoint);
        }
        Ok(Resolved::Service(endpoints))
    }
}

/// The directory as it changes.
#[derive(Debug)]
pub struct Live {
    now: ArcSwap<Directory>,
    changed: watch::Sender<u64>,
}

impl Live {
    /// Starts from a first state.
    pub fn new(first: Directory) -> Arc<Self> {
        Arc::new(Self { now: ArcSwap::from_pointee(first), changed: watch::Sender::new(1) })
    }

    /// The state as of now.
    pub fn load(&self) -> Arc<Directory> {
        self.now.load_full()
    }

    /// Takes a new state into use.
    pub fn replace(&self, next: Directory) {
        self.now.store(Arc::new(next));
        self.changed.send_modify(|n| *n += 1);
    }

    /// Notifies of every new state.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}
