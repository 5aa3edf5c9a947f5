//! A map of many rows that is cheap to change while others read an earlier state of it.
//!
//! Rows are spread over shards. A copy of the table shares all of them, and a change copies the one that
//! it touches: some hundred rows of 100,000. Two states tell what differs by the shards they do not share.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::Arc;

/// A copy costs one count for each, a change one 256th of the rows.
const SHARDS: usize = 256;

/// Without a random key, so that the shards of two tables hold the same keys. Nobody outside the cluster
/// names keys, and who may name a node there can do worse.
type Hasher = BuildHasherDefault<DefaultHasher>;
type Shard<K, V> = HashMap<K, V, Hasher>;

/// The map.
#[derive(Clone, Debug)]
pub(crate) struct Table<K, V> {
    shards: Box<[Arc<Shard<K, V>>]>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        let empty: Arc<Shard<K, V>> = Arc::default();
        Self { shards: vec![empty; SHARDS].into() }
    }
}

impl<K, V> Table<K, V> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    /// Whether both are one state. Says no of equal tables that were made apart.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.shards.iter().zip(&other.shards).all(|(one, other)| Arc::ptr_eq(one, other))
    }

    /// The keys of either that may have other values in the other; some of them twice.
    pub(crate) fn maybe_changed<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a K> {
        let changed =
            self.shards.iter().zip(&before.shards).filter(|(now, before)| !Arc::ptr_eq(now, before));
        changed.flat_map(|(now, before)| now.keys().chain(before.keys()))
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Table<K, V> {
    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[place(key)].get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let place = place(&key);
        Arc::make_mut(&mut self.shards[place]).insert(key, value)
    }

    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let place = place(key);
        // What is not there is no reason to copy a shard.
        self.shards[place].get(key)?;
        Arc::make_mut(&mut self.shards[place]).remove(key)
    }
}

/// Not by the hash's first or last bits, which place a row within its shard.
fn place<Q: Hash + ?Sized>(key: &Q) -> usize {
    (Hasher::default().hash_one(key) >> 24) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_a_map_and_an_earlier_state_stays_as_it_was(
            steps in prop::collection::vec((0u16..600, any::<Option<u8>>()), 0..400),
            at in 0usize..400,
        ) {
            let (mut table, mut model) = (Table::default(), BTreeMap::new());
            let mut earlier = (table.clone(), model.clone());
            for (number, (key, value)) in steps.into_iter().enumerate() {
                if number == at {
                    earlier = (table.clone(), model.clone());
                    prop_assert!(table.is_same(&earlier.0));
                }
                let (was, should) = match value {
                    Some(value) => (table.insert(key, value), model.insert(key, value)),
                    None => (table.remove(&key), model.remove(&key)),
                };
                prop_assert_eq!(was, should);
            }
            for (table, model) in [(&table, &model), (&earlier.0, &earlier.1)] {
                let rows: BTreeMap<u16, u8> = table.iter().map(|(k, v)| (*k, *v)).collect();
                prop_assert_eq!(&rows, model);
                prop_assert_eq!(table.len(), model.len());
            }
            let told: BTreeSet<u16> = table.maybe_changed(&earlier.0).copied().collect();
            for key in (0..600).filter(|key| model.get(key) != earlier.1.get(key)) {
                prop_assert!(told.contains(&key));
            }
        }
    }
}
