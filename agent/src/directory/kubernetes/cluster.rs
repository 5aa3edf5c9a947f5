//! The cluster as its objects were told, and the directory that follows from it: every rule about objects
//! together. Told of the same objects in whatever order it comes to the same directory.
//!
//! Changes are taken note of as they come and worked into the directory when it is asked for, once for
//! each service however often it changed meanwhile. Nothing here waits or talks to anybody.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use kube::runtime::watcher::Event;

use super::objects::{self, Kind};
use super::rows::{self, EndpointRow, Name, PodSeen, ServiceRow, SliceRow};
use super::told::{Objects, Unusable};
use crate::config::Mode;
use crate::directory::{Directory, Endpoint, Node, Service, Workload};
use crate::identity::TrustDomain;
use crate::mesh_policy::{Exclusions, Labels, Loaded};

/// What is the same for the whole life of a directory.
#[derive(Clone, Debug)]
pub struct Rules {
    /// The trust domain of every identity.
    pub domain: TrustDomain,
    /// The node whose pods' network namespaces are needed, if any.
    pub node: Option<String>,
    /// The mode of pods without a label, in namespaces without one.
    pub default_mode: Mode,
    /// Namespaces whose pods are never in the mesh.
    pub excluded: HashSet<String>,
}

/// What was told of one kind of objects, or that it is told anew.
#[derive(Debug)]
pub enum Update {
    /// Of pods.
    Pod(Event<objects::Pod>),
    /// Of services.
    Service(Event<objects::Service>),
    /// Of EndpointSlices.
    Slice(Event<objects::Slice>),
    /// Of nodes.
    Node(Event<objects::Node>),
    /// Of namespaces.
    Namespace(Event<objects::Namespace>),
}

#[derive(Debug)]
struct PodRow {
    /// What its own label says.
    label: Option<Mode>,
    /// Shared by pods that have the same.
    labels: Arc<Labels>,
    /// What its own annotations exclude.
    exclude: Arc<Exclusions>,
    workload: Arc<Workload>,
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    rules: Rules,
    mesh: Arc<Loaded>,
    /// Every set of labels that a pod has.
    labels: HashSet<Arc<Labels>>,
    no_exclusions: Arc<Exclusions>,
    namespaces: Objects<Option<Mode>>,
    pods: Objects<PodRow>,
    services: Objects<ServiceRow>,
    slices: Objects<SliceRow>,
    nodes: Objects<Arc<Node>>,
    slices_of: HashMap<Name, Vec<Name>>,
    /// The services that an address serves.
    served_by: HashMap<IpAddr, Vec<Name>>,
    /// As they are in the directory.
    published: HashMap<Name, Arc<Service>>,
    directory: Directory,
    is_changed: bool,
    /// Services to be worked into the directory.
    changed_services: HashSet<Name>,
    /// Namespaces whose pods' modes are to be looked at.
    changed_namespaces: HashSet<Name>,
}

impl Cluster {
    /// Knows of nothing yet.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            mesh: Arc::default(),
            labels: HashSet::new(),
            no_exclusions: Arc::default(),
            namespaces: Objects::default(),
            pods: Objects::default(),
            services: Objects::default(),
            slices: Objects::default(),
            nodes: Objects::default(),
            slices_of: HashMap::new(),
            served_by: HashMap::new(),
            published: HashMap::new(),
            directory: Directory::default(),
            is_changed: false,
            changed_services: HashSet::new(),
            changed_namespaces: HashSet::new(),
        }
    }

    /// Takes note of what was told.
    ///
    /// # Errors
    /// When an object cannot be used; it counts as absent then.
    pub fn update(&mut self, update: Update) -> Result<(), Unusable> {
        let rules = &self.rules;
        let unusable = match update {
            Update::Namespace(event) => {
                let read = |it: objects::Namespace| Ok(Some(rows::mode(&it.metadata)));
                let heard = self.namespaces.hear(Kind::NAMESPACES, event, read);
                heard.changes.into_iter().for_each(|(name, row)| self.set_namespace(name, row));
                heard.unusable
            }
            Update::Pod(event) => {
                let read = |pod| rows::workload(pod, &rules.domain, rules.node.as_deref());
                let heard = self.pods.hear(Kind::PODS, event, read);
                heard.changes.into_iter().for_each(|(name, row)| self.set_pod(name, row));
                heard.unusable
            }
            Update::Service(event) => {
                let heard = self.services.hear(Kind::SERVICES, event, |it| rows::service(&it));
                heard.changes.into_iter().for_each(|(name, row)| self.set_service(name, row));
                heard.unusable
            }
            Update::Slice(event) => {
                let heard = self.slices.hear(Kind::SLICES, event, rows::slice);
                heard.changes.into_iter().for_each(|(name, row)| self.set_slice(name, row));
                heard.unusable
            }
            Update::Node(event) => {
                let heard = self.nodes.hear(Kind::NODES, event, |it| rows::node(it, &rules.domain));
                heard.changes.into_iter().for_each(|(name, row)| self.set_node(name, row));
                heard.unusable
            }
        };
        unusable.map_or(Ok(()), Err)
    }

    /// Takes other mesh policies into use.
    pub fn set_mesh(&mut self, mesh: Arc<Loaded>) {
        self.changed_namespaces.extend(mesh.differing(&self.mesh).map(Name::from));
        self.mesh = mesh;
    }

    /// Whether every kind has been told in whole, at least once.
    pub fn is_read(&self) -> bool {
        self.namespaces.is_read
            && self.pods.is_read
            && self.services.is_read
            && self.slices.is_read
            && self.nodes.is_read
    }

    /// Whether pods and namespaces have been told in whole: all that is told of a node's own pods.
    pub fn has_read_pods(&self) -> bool {
        self.namespaces.is_read && self.pods.is_read
    }

    /// Whether [`Cluster::directory`] may differ from when it was asked for last.
    pub fn is_changed(&self) -> bool {
        self.is_changed || !self.changed_services.is_empty() || !self.changed_namespaces.is_empty()
    }

    /// How many objects are known, by kind.
    pub fn counts(&self) -> [(Kind, usize); 5] {
        [
            (Kind::PODS, self.pods.rows.len()),
            (Kind::SERVICES, self.services.rows.len()),
            (Kind::SLICES, self.slices.rows.len()),
            (Kind::NODES, self.nodes.rows.len()),
            (Kind::NAMESPACES, self.namespaces.rows.len()),
        ]
    }

    /// The directory as it follows from everything told.
    pub fn directory(&mut self) -> Directory {
        let namespaces = std::mem::take(&mut self.changed_namespaces);
        if !namespaces.is_empty() {
            let concerned =
                self.pods.rows.iter().filter(|(_, row)| namespaces.contains(&*row.workload.namespace));
            let concerned: Vec<Name> = concerned.map(|(name, _)| Arc::clone(name)).collect();
            for name in concerned {
                let Some(row) = self.pods.rows.get(&name) else { continue };
                let row = PodRow {
                    label: row.label,
                    labels: Arc::clone(&row.labels),
                    exclude: Arc::clone(&row.exclude),
                    workload: Arc::clone(&row.workload),
                };
                self.set_row(name, row);
            }
        }
        for name in std::mem::take(&mut self.changed_services) {
            self.publish(name);
        }
        self.is_changed = false;
        self.directory.clone()
    }

    /// A pod's mode: what its own label says, else a policy, else its namespace's label, else the default.
    fn mode(&self, namespace: &str, label: Option<Mode>, policy: Option<Mode>) -> Mode {
        if self.rules.excluded.contains(namespace) {
            return Mode::Off;
        }
        let of_namespace = || self.namespaces.rows.get(namespace).copied().flatten();
        label.or(policy).or_else(of_namespace).unwrap_or(self.rules.default_mode)
    }

    /// The pod's workload as everything that is known now makes it; `None` if it is that already.
    fn settled(&self, row: &PodRow) -> Option<Workload> {
        let workload = &*row.workload;
        let mut said = self.mesh.of(&workload.namespace, &row.labels);
        let mode = self.mode(&workload.namespace, row.label, said.mode);
        said.exclusions.merge(&row.exclude);
        let is_same = workload.mode == mode
            && *workload.exclusions == said.exclusions
            && workload.svid_lifetime == said.svid_lifetime;
        let exclusions = match said.exclusions == *self.no_exclusions {
            true => Arc::clone(&self.no_exclusions),
            false => Arc::new(said.exclusions),
        };
        let svid_lifetime = said.svid_lifetime;
        (!is_same).then(|| Workload { mode, exclusions, svid_lifetime, ..workload.clone() })
    }

    /// The set of labels that is kept of those that are equal to it.
    fn shared(&mut self, labels: Labels) -> Arc<Labels> {
        if let Some(known) = self.labels.get(&labels) {
            return Arc::clone(known);
        }
        let labels = Arc::new(labels);
        self.labels.insert(Arc::clone(&labels));
        labels
    }

    fn set_namespace(&mut self, name: Name, label: Option<Option<Mode>>) {
        if self.namespaces.rows.get(&name) == label.as_ref() {
            return;
        }
        match label {
            Some(label) => self.namespaces.rows.insert(Arc::clone(&name), label),
            None => self.namespaces.rows.remove(&name),
        };
        self.changed_namespaces.insert(name);
    }

    fn set_pod(&mut self, name: Name, pod: Option<PodSeen>) {
        let Some(PodSeen { workload, label, labels, exclude }) = pod else {
            self.forget_pod(&name);
            return;
        };
        let exclude = match exclude == *self.no_exclusions {
            true => Arc::clone(&self.no_exclusions),
            false => Arc::new(exclude),
        };
        let labels = self.shared(labels);
        self.set_row(name, PodRow { label, labels, exclude, workload: Arc::new(workload) });
    }

    fn set_row(&mut self, name: Name, mut row: PodRow) {
        if let Some(settled) = self.settled(&row) {
            row.workload = Arc::new(settled);
        }
        if let Some(before) = self.pods.rows.get_mut(&name)
            && *before.workload == *row.workload
        {
            // Nothing for the directory; what the next policy is asked about may have changed.
            row.workload = Arc::clone(&before.workload);
            let before = std::mem::replace(before, row);
            self.release(before.labels);
            return;
        }
        self.forget_pod(&name);
        self.is_changed = true;
        self.directory.insert_workload(Arc::clone(&row.workload));
        self.touch(&row.workload.addresses);
        self.pods.rows.insert(name, row);
    }

    fn forget_pod(&mut self, name: &Name) {
        let Some(before) = self.pods.rows.remove(name) else { return };
        self.is_changed = true;
        self.directory.remove_workload(&before.workload);
        self.touch(&before.workload.addresses);
        self.release(before.labels);
    }

    /// Forgets a set of labels that nobody else has.
    fn release(&mut self, labels: Arc<Labels>) {
        if Arc::strong_count(&labels) == 2 {
            self.labels.remove(&labels);
        }
    }

    /// Who is at these addresses has changed.
    fn touch(&mut self, addresses: &[IpAddr]) {
        let services = addresses.iter().filter_map(|address| self.served_by.get(address)).flatten();
        self.changed_services.extend(services.cloned());
    }

    fn set_service(&mut self, name: Name, row: Option<ServiceRow>) {
        if self.services.rows.get(&name) == row.as_ref() {
            return;
        }
        match row {
            Some(row) => self.services.rows.insert(Arc::clone(&name), row),
            None => self.services.rows.remove(&name),
        };
        self.changed_services.insert(name);
    }

    fn set_slice(&mut self, name: Name, row: Option<SliceRow>) {
        if self.slices.rows.get(&name) == row.as_ref() {
            return;
        }
        if let Some(before) = self.slices.rows.remove(&name) {
            for endpoint in &before.endpoints {
                forget(&mut self.served_by, &endpoint.address, &before.service);
            }
            forget(&mut self.slices_of, &before.service, &name);
            self.changed_services.insert(before.service);
        }
        if let Some(row) = row {
            for endpoint in &row.endpoints {
                self.served_by.entry(endpoint.address).or_default().push(Arc::clone(&row.service));
            }
            self.slices_of.entry(Arc::clone(&row.service)).or_default().push(Arc::clone(&name));
            self.changed_services.insert(Arc::clone(&row.service));
            self.slices.rows.insert(name, row);
        }
    }

    fn set_node(&mut self, name: Name, node: Option<Node>) {
        if self.nodes.rows.get(&name).map(|node| &**node) == node.as_ref() {
            return;
        }
        self.is_changed = true;
        match node.map(Arc::new) {
            Some(node) => {
                self.directory.insert_node(Arc::clone(&node));
                self.nodes.rows.insert(name, node);
            }
            None => {
                self.directory.remove_node(&name);
                self.nodes.rows.remove(&name);
            }
        }
    }

    /// Works a service into the directory as it is now.
    fn publish(&mut self, name: Name) {
        let now = self.services.rows.get(&name).map(|row| self.build(&name, row));
        let before = self.published.get(&name);
        if before.map(|before| &**before) == now.as_ref() {
            return;
        }
        if let Some(before) = self.published.remove(&name) {
            self.directory.remove_service(&before);
        }
        if let Some(now) = now.map(Arc::new) {
            self.directory.insert_service(Arc::clone(&now));
            self.published.insert(name, now);
        }
    }

    fn build(&self, name: &Name, row: &ServiceRow) -> Service {
        let mut endpoints: Vec<Endpoint> = Vec::new();
        let slices = self.slices_of.get(name).into_iter().flatten();
        for slice in slices.filter_map(|slice| self.slices.rows.get(slice)) {
            let targets = rows::targets(row, slice);
            for EndpointRow { address, is_draining, zones } in &slice.endpoints {
                // Who is no pod of this cluster has no identity to be asked for.
                let Some(workload) = self.directory.workload_at(*address) else { continue };
                let endpoint = Endpoint {
                    workload: Arc::clone(workload),
                    address: *address,
                    targets: Arc::clone(&targets),
                    is_draining: *is_draining,
                    zones: Arc::clone(zones),
                };
                endpoints.push(endpoint);
            }
        }
        // In an order of its own, and each once: while Kubernetes moves an endpoint from one slice to
        // another, it is in both.
        endpoints.sort_unstable_by(|a, b| {
            let key = |e: &Endpoint| (e.address, e.is_draining);
            key(a).cmp(&key(b)).then_with(|| a.targets.cmp(&b.targets))
        });
        endpoints.dedup_by(|next, kept| next.address == kept.address && next.targets == kept.targets);
        let (namespace, own) = name.split_once('/').unwrap_or_default();
        Service {
            name: own.into(),
            namespace: namespace.into(),
            addresses: row.addresses.clone(),
            ports: row.ports.iter().map(|(_, port)| *port).collect(),
            endpoints,
            local_only: row.local_only,
            affinity: row.affinity,
        }
    }
}

/// Removes one occurrence of a value at a key.
fn forget<K: std::hash::Hash + Eq>(map: &mut HashMap<K, Vec<Name>>, key: &K, value: &Name) {
    let Some(values) = map.get_mut(key) else { return };
    if let Some(at) = values.iter().position(|other| other == value) {
        values.swap_remove(at);
    }
    if values.is_empty() {
        map.remove(key);
    }
}

#[cfg(test)]
mod tests;
