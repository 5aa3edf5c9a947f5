//! The cluster as its objects were told, and the directory that follows from it: every rule about objects
//! together. Told of the same objects in whatever order it comes to the same directory.
//!
//! Changes are taken note of as they come and worked into the directory when it is asked for, once for
//! each service however often it changed meanwhile. Nothing here waits or talks to anybody.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use kube::Resource;
use kube::runtime::watcher::Event;

use super::objects::{self, Kind};
use super::rows::{self, EndpointRow, Name, ServiceRow, SliceRow};
use crate::config::Mode;
use crate::directory::{Directory, Endpoint, Node, Service, Workload};
use crate::identity::TrustDomain;

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

/// An object that cannot be used; the others can.
#[derive(Debug, PartialEq, Eq)]
pub struct Unusable {
    /// Which, by kind and name.
    pub object: String,
    /// What is wrong with it.
    pub why: String,
}

#[derive(Debug)]
struct PodRow {
    /// What its own label says.
    label: Option<Mode>,
    workload: Arc<Workload>,
}

/// Objects of one kind.
#[derive(Debug)]
struct Objects<T> {
    rows: HashMap<Name, T>,
    /// While all are told anew: those that were.
    told: Option<HashSet<Name>>,
    is_read: bool,
}

impl<T> Default for Objects<T> {
    fn default() -> Self {
        Self { rows: HashMap::new(), told: None, is_read: false }
    }
}

impl<T> Objects<T> {
    /// What an event changes: rows by name, none for an object that is gone or cannot be used.
    fn hear<K: Resource<DynamicType = Kind>, R>(
        &mut self,
        kind: Kind,
        event: Event<K>,
        read: impl FnOnce(K) -> Result<Option<R>, String>,
    ) -> Heard<R> {
        let mut unusable = None;
        let changes = match event {
            Event::Init => {
                self.told = Some(HashSet::new());
                Vec::new()
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let name = rows::name(object.meta());
                if let Some(told) = &mut self.told {
                    told.insert(Arc::clone(&name));
                }
                let row = read(object).unwrap_or_else(|why| {
                    unusable = Some(Unusable { object: format!("{} {name}", kind.plural), why });
                    None
                });
                vec![(name, row)]
            }
            Event::Delete(object) => vec![(rows::name(object.meta()), None)],
            Event::InitDone => {
                self.is_read = true;
                let told = self.told.take().unwrap_or_default();
                let gone = self.rows.keys().filter(|name| !told.contains(*name));
                gone.map(|name| (Arc::clone(name), None)).collect()
            }
        };
        Heard { changes, unusable }
    }
}

/// What an event changes.
struct Heard<R> {
    changes: Vec<(Name, Option<R>)>,
    unusable: Option<Unusable>,
}

/// The cluster.
#[derive(Debug)]
pub struct Cluster {
    rules: Rules,
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

    /// Whether every kind has been told in whole, at least once.
    pub fn is_read(&self) -> bool {
        self.namespaces.is_read
            && self.pods.is_read
            && self.services.is_read
            && self.slices.is_read
            && self.nodes.is_read
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
            let mut concerned = Vec::new();
            for (name, row) in &self.pods.rows {
                let mode = self.mode(&row.workload.namespace, row.label);
                if namespaces.contains(&*row.workload.namespace) && mode != row.workload.mode {
                    concerned.push((
                        Arc::clone(name),
                        row.label,
                        Workload { mode, ..(*row.workload).clone() },
                    ));
                }
            }
            for (name, label, workload) in concerned {
                self.set_pod(name, Some((workload, label)));
            }
        }
        for name in std::mem::take(&mut self.changed_services) {
            self.publish(name);
        }
        self.is_changed = false;
        self.directory.clone()
    }

    fn mode(&self, namespace: &str, label: Option<Mode>) -> Mode {
        if self.rules.excluded.contains(namespace) {
            return Mode::Off;
        }
        let of_namespace = || self.namespaces.rows.get(namespace).copied().flatten();
        label.or_else(of_namespace).unwrap_or(self.rules.default_mode)
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

    fn set_pod(&mut self, name: Name, pod: Option<(Workload, Option<Mode>)>) {
        let pod = pod.map(|(mut workload, label)| {
            workload.mode = self.mode(&workload.namespace, label);
            (workload, label)
        });
        let before = self.pods.rows.get_mut(&name);
        if let (Some(before), Some((workload, label))) = (&before, &pod)
            && *before.workload == *workload
            && before.label == *label
        {
            return;
        }
        self.is_changed = true;
        if let Some(before) = self.pods.rows.remove(&name) {
            self.directory.remove_workload(&before.workload);
            self.touch(&before.workload.addresses);
        }
        if let Some((workload, label)) = pod {
            let workload = Arc::new(workload);
            self.directory.insert_workload(Arc::clone(&workload));
            self.touch(&workload.addresses);
            self.pods.rows.insert(name, PodRow { label, workload });
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
