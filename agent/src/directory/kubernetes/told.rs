//! Objects of one kind as they are told: one by one, or all anew.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use kube::Resource;
use kube::runtime::watcher::Event;

use super::objects::Kind;
use super::rows::{self, Name};

/// An object that cannot be used; the others can.
#[derive(Debug, PartialEq, Eq)]
pub struct Unusable {
    /// Which, by kind and name.
    pub object: String,
    /// What is wrong with it.
    pub why: String,
}

/// Objects of one kind.
#[derive(Debug)]
pub(crate) struct Objects<T> {
    /// What is known of each, by name.
    pub(crate) rows: HashMap<Name, T>,
    /// While all are told anew: those that were.
    told: Option<HashSet<Name>>,
    /// Whether all have been told, at least once.
    pub(crate) is_read: bool,
}

impl<T> Default for Objects<T> {
    fn default() -> Self {
        Self { rows: HashMap::new(), told: None, is_read: false }
    }
}

impl<T> Objects<T> {
    /// What an event changes: rows by name, none for an object that is gone or cannot be used.
    pub(crate) fn hear<K: Resource<DynamicType = Kind>, R>(
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
pub(crate) struct Heard<R> {
    /// Rows by name, none for what is gone.
    pub(crate) changes: Vec<(Name, Option<R>)>,
    /// The object that was told, if it cannot be used.
    pub(crate) unusable: Option<Unusable>,
}
