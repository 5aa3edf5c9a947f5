//! What differs between two states of the directory, and making the later one from the earlier.
//!
//! Rows are told by value: what was taken away and put back alike between the two is no difference. Between
//! the empty directory and another one everything differs.

use std::collections::HashSet;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use super::table::Table;
use super::{Directory, Node, Service, Workload};

/// A workload or a service, and at which of its addresses it is found: another may have the others by now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Found<T> {
    pub(super) of: Arc<T>,
    pub(super) at: Vec<IpAddr>,
}

/// Names a workload for removal: node, namespace, name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) node: String,
    pub(super) namespace: String,
    pub(super) name: String,
}

/// What leads from one state to another, but for services: an endpoint names a workload, which has to be
/// there first.
#[derive(Debug, Default)]
pub(super) struct Delta {
    pub(super) gone_nodes: Vec<String>,
    pub(super) nodes: Vec<Arc<Node>>,
    pub(super) gone_workloads: Vec<Gone>,
    pub(super) workloads: Vec<Found<Workload>>,
    /// Addresses at which there is no workload any more.
    pub(super) workload_addresses: Vec<IpAddr>,
    pub(super) services: Vec<Found<Service>>,
    /// Addresses at which there is no service any more.
    pub(super) service_addresses: Vec<IpAddr>,
}

impl Delta {
    /// What leads from `before` to `now`.
    pub(super) fn between(before: &Directory, now: &Directory) -> Self {
        let mut delta = Self::default();
        for name in changed(&now.nodes, &before.nodes) {
            match now.nodes.get(name) {
                Some(node) => delta.nodes.push(Arc::clone(node)),
                None => delta.gone_nodes.push(name.clone()),
            }
        }
        delta.compare_workloads(before, now);
        (delta.services, delta.service_addresses) =
            by_address(&now.services, &before.services, |service| &service.addresses);
        delta
    }

    fn compare_workloads(&mut self, before: &Directory, now: &Directory) {
        let (mut found, freed) =
            by_address(&now.by_address, &before.by_address, |workload| &workload.addresses);
        self.workload_addresses = freed;
        let told: HashSet<_> = found.iter().map(|found| Arc::as_ptr(&found.of)).collect();
        for node in changed(&now.by_node, &before.by_node) {
            let on = |directory: &Directory| directory.by_node.get(node).cloned().unwrap_or_default();
            let (was, is) = (on(before), on(now));
            let gone = was.iter().filter(|old| !is.iter().any(|new| has_name_of(new, old)));
            self.gone_workloads.extend(gone.map(|old| Gone {
                node: old.node.clone(),
                namespace: old.namespace.clone(),
                name: old.name.clone(),
            }));
            let other = is.iter().filter(|new| !told.contains(&Arc::as_ptr(new)) && !was.contains(new));
            found.extend(other.map(|new| found_in(&now.by_address, new, &new.addresses)));
        }
        self.workloads = found;
    }
}

/// The keys whose values differ, each once.
fn changed<'a, K: Hash + Eq + Clone, V: Clone + PartialEq>(
    now: &'a Table<K, V>,
    before: &'a Table<K, V>,
) -> impl Iterator<Item = &'a K> {
    let keys: HashSet<&K> = now.maybe_changed(before).collect();
    keys.into_iter().filter(|key| now.get(*key) != before.get(*key))
}

/// What is at addresses where something else was, each with all its addresses; addresses where nothing is.
fn by_address<T: Eq>(
    now: &Table<IpAddr, Arc<T>>,
    before: &Table<IpAddr, Arc<T>>,
    addresses: impl Fn(&T) -> &Vec<IpAddr>,
) -> (Vec<Found<T>>, Vec<IpAddr>) {
    let (mut found, mut freed, mut told) = (Vec::new(), Vec::new(), HashSet::new());
    for address in changed(now, before) {
        match now.get(address) {
            Some(of) if told.insert(Arc::as_ptr(of)) => found.push(found_in(now, of, addresses(of))),
            Some(_) => {}
            None => freed.push(*address),
        }
    }
    (found, freed)
}

fn found_in<T>(table: &Table<IpAddr, Arc<T>>, of: &Arc<T>, addresses: &[IpAddr]) -> Found<T> {
    let is_there = |address: &&IpAddr| table.get(*address).is_some_and(|there| Arc::ptr_eq(there, of));
    Found { of: Arc::clone(of), at: addresses.iter().filter(is_there).copied().collect() }
}

fn has_name_of(one: &Workload, other: &Workload) -> bool {
    one.name == other.name && one.namespace == other.namespace
}

impl Directory {
    /// Takes over what differs, but for services.
    pub(super) fn apply(&mut self, delta: &Delta) {
        delta.gone_nodes.iter().for_each(|name| self.remove_node(name));
        delta.nodes.iter().for_each(|node| self.insert_node(Arc::clone(node)));
        for Gone { node, namespace, name } in &delta.gone_workloads {
            self.change_node(node, |here| here.retain(|it| it.name != *name || it.namespace != *namespace));
        }
        for Found { of, at } in &delta.workloads {
            self.change_node(&of.node, |here| {
                here.retain(|old| !has_name_of(old, of));
                here.push(Arc::clone(of));
            });
            for address in at {
                self.by_address.insert(*address, Arc::clone(of));
            }
        }
        for address in &delta.workload_addresses {
            self.by_address.remove(address);
        }
    }

    /// Takes over what differs of services.
    pub(super) fn apply_services(&mut self, services: Vec<Found<Service>>, freed: &[IpAddr]) {
        for Found { of, at } in services {
            for address in at {
                self.services.insert(address, Arc::clone(&of));
            }
        }
        for address in freed {
            self.services.remove(address);
        }
    }

    /// This directory, with the workloads of one node as `own` has them.
    pub(super) fn with_own(&self, node: &str, own: &Self) -> Self {
        let mut merged = self.clone();
        self.on_node(node).for_each(|told| merged.remove_workload(told));
        own.on_node(node).for_each(|seen| merged.insert_workload(Arc::clone(seen)));
        merged
    }

    fn change_node(&mut self, node: &str, change: impl FnOnce(&mut Vec<Arc<Workload>>)) {
        let mut here = self.by_node.get(node).cloned().unwrap_or_default();
        change(&mut here);
        match here.is_empty() {
            true => self.by_node.remove(node),
            false => self.by_node.insert(node.to_owned(), here),
        };
    }
}

#[cfg(test)]
impl Directory {
    /// Everything that can be asked for, in an order of its own.
    pub(super) fn all(&self) -> [Vec<String>; 4] {
        fn sorted<V: std::fmt::Debug>(rows: impl Iterator<Item = V>) -> Vec<String> {
            let mut rows: Vec<String> = rows.map(|row| format!("{row:?}")).collect();
            rows.sort();
            rows
        }
        [
            sorted(self.by_address.iter()),
            sorted(self.by_node.iter().flat_map(|(node, here)| here.iter().map(move |it| (node, it)))),
            sorted(self.services.iter()),
            sorted(self.nodes.iter()),
        ]
    }
}
