//! Who is where: workloads, services and nodes, indexed by address.
//!
//! An address answers only the question "which identity must be there?"; it is never itself an
//! identity. The peer's certificate has the last word.
//!
//! - `table`: maps that are cheap to change while others read an earlier state
//! - `service`: which endpoints of a service a node's workloads may be sent to
//! - `live`: the newest state, and word of every change
//! - `delta`: what differs between two states
//! - `file`, `kubernetes`, `stream` (the authority's): the sources; `source` is whichever is configured,
//!   `standing` how it fares

mod delta;
pub mod file;
pub mod kubernetes;
mod live;
mod service;
pub mod source;
mod standing;
pub mod stream;
mod table;

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use crate::config::Mode;
use crate::identity::SpiffeId;
use crate::mesh_policy::Exclusions;
pub use live::Live;
pub use service::{Endpoint, Endpoints, Service, Target};
pub use standing::Standing;
use table::Table;

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
    /// Its own addresses, IPv4 and IPv6; none while a new pod's are not told yet.
    pub addresses: Vec<IpAddr>,
    /// How its plaintext is treated.
    pub mode: Mode,
    /// Its network namespace; needed only on its own node.
    pub netns: Option<NetnsAt>,
    /// What of its connections is left alone.
    pub exclusions: Arc<Exclusions>,
    /// How long its SVIDs are valid, at most, if a policy says so.
    pub svid_lifetime: Option<Duration>,
}

/// Where a workload's network namespace is found on its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetnsAt {
    /// A file that names it.
    File(PathBuf),
    /// A pod's UID: it is that of the pod's processes.
    PodUid(Box<str>),
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

/// One consistent state of the directory. A copy is cheap, and so is a change to a copy.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    by_node: Table<String, Vec<Arc<Workload>>>,
    by_address: Table<IpAddr, Arc<Workload>>,
    services: Table<IpAddr, Arc<Service>>,
    nodes: Table<String, Arc<Node>>,
}

impl Directory {
    /// Indexes workloads, services and nodes. Addresses must be unique; the sources check that.
    pub fn new(workloads: Vec<Arc<Workload>>, services: Vec<Arc<Service>>, nodes: Vec<Arc<Node>>) -> Self {
        let mut directory = Self::default();
        workloads.into_iter().for_each(|workload| directory.insert_workload(workload));
        services.into_iter().for_each(|service| directory.insert_service(service));
        nodes.into_iter().for_each(|node| directory.insert_node(node));
        directory
    }

    /// Adds a workload. Addresses that another one has become its own.
    pub(crate) fn insert_workload(&mut self, workload: Arc<Workload>) {
        for address in &workload.addresses {
            self.by_address.insert(*address, Arc::clone(&workload));
        }
        let mut here = self.by_node.get(&workload.node).cloned().unwrap_or_default();
        here.push(Arc::clone(&workload));
        self.by_node.insert(workload.node.clone(), here);
    }

    /// Removes this very workload, and of its addresses those that are still its own.
    pub(crate) fn remove_workload(&mut self, workload: &Arc<Workload>) {
        for address in &workload.addresses {
            if self.by_address.get(address).is_some_and(|now| Arc::ptr_eq(now, workload)) {
                self.by_address.remove(address);
            }
        }
        let Some(here) = self.by_node.get(&workload.node) else { return };
        let mut here = here.clone();
        here.retain(|other| !Arc::ptr_eq(other, workload));
        match here.is_empty() {
            true => self.by_node.remove(&workload.node),
            false => self.by_node.insert(workload.node.clone(), here),
        };
    }

    /// Adds a service.
    pub(crate) fn insert_service(&mut self, service: Arc<Service>) {
        for address in &service.addresses {
            self.services.insert(*address, Arc::clone(&service));
        }
    }

    /// Removes this very service.
    pub(crate) fn remove_service(&mut self, service: &Arc<Service>) {
        for address in &service.addresses {
            if self.services.get(address).is_some_and(|now| Arc::ptr_eq(now, service)) {
                self.services.remove(address);
            }
        }
    }

    /// Adds a node, or puts it in its predecessor's place.
    pub(crate) fn insert_node(&mut self, node: Arc<Node>) {
        self.nodes.insert(node.name.clone(), node);
    }

    /// Removes a node.
    pub(crate) fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    /// A node that is known to have an agent of ours.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(name)
    }

    /// Every node that is known to have an agent of ours.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// How many nodes are known to have an agent of ours.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing about nodes differs between the two; may say no though nothing does.
    pub(crate) fn has_same_nodes(&self, other: &Self) -> bool {
        self.nodes.is_same(&other.nodes)
    }

    /// How many addresses of workloads, addresses of services and nodes there are.
    fn sizes(&self) -> [usize; 3] {
        [self.by_address.len(), self.services.len(), self.nodes.len()]
    }

    /// Every workload.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_node.values().flatten()
    }

    /// The workloads that run on a node, in the mesh or not.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.by_node.get(node).into_iter().flatten()
    }

    /// The workloads that run on a node and are in the mesh.
    pub fn enrolled_on(&self, node: &str) -> impl Iterator<Item = &Arc<Workload>> {
        self.on_node(node).filter(|w| w.mode != Mode::Off)
    }

    /// The workload that has an address.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// Whether an identity runs on a node.
    pub fn places(&self, id: &SpiffeId, node: &str) -> bool {
        self.enrolled_on(node).any(|workload| workload.id == *id)
    }

    /// How long SVIDs of an identity are valid on a node, at most, if a policy says so.
    pub fn svid_lifetime(&self, id: &SpiffeId, node: &str) -> Option<Duration> {
        self.enrolled_on(node).filter(|workload| workload.id == *id).filter_map(|it| it.svid_lifetime).min()
    }

    /// Whether traffic to an address is captured: a workload's in the mesh, or a service's with at least
    /// one endpoint in it.
    fn has_member(&self, address: &IpAddr) -> bool {
        self.by_address.get(address).is_some_and(|workload| workload.mode != Mode::Off)
            || self.services.get(address).is_some_and(|service| service.is_in_mesh())
    }

    /// Every address whose traffic is captured.
    pub fn mesh_addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let addresses = self.by_address.iter().map(|(a, _)| a).chain(self.services.iter().map(|(a, _)| a));
        addresses.filter(|address| self.has_member(address)).copied()
    }

    /// The addresses whose traffic is captured now and was not `before`, and the other way round.
    pub fn mesh_changes(&self, before: &Self) -> (HashSet<IpAddr>, HashSet<IpAddr>) {
        let (mut added, mut removed) = (HashSet::new(), HashSet::new());
        let workloads = self.by_address.maybe_changed(&before.by_address);
        for address in workloads.chain(self.services.maybe_changed(&before.services)) {
            match (before.has_member(address), self.has_member(address)) {
                (false, true) => added.insert(*address),
                (true, false) => removed.insert(*address),
                _ => continue,
            };
        }
        (added, removed)
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
        if !service.ports.contains(&address.port()) {
            return Err(ResolveError::UnknownPort);
        }
        let endpoints = Endpoints { service: Arc::clone(service), address };
        if endpoints.is_empty() {
            return Err(ResolveError::NoEndpoint);
        }
        Ok(Resolved::Service(endpoints))
    }
}
