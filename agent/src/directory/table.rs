//! A map of many rows that is cheap to change while others read an earlier state of it.
//!
//! Rows are spread over shards, and these over groups. A copy of the table shares all groups; a change copies
//! the group and the shard that it touches: of 100,000 rows some two dozen, and no value of any other. What
//! differs between two states is in what they do not share.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::sync::Arc;

/// Groups of a table, and shards of a group. A copy of a table counts one reference for each group, a change
/// one for each shard of a group and one for each row of a shard. References are counted in memory that
/// nobody has touched lately, which is what both cost.
const WIDTH: usize = 64;

/// Without a random key, so that the shards of two tables hold the same keys. Nobody outside the cluster
/// names keys, and who may name a node there can do worse.
type Hasher = BuildHasherDefault<DefaultHasher>;
type Shard<K, V> = HashMap<K, V, Hasher>;
type Group<K, V> = [Arc<Shard<K, V>>; WIDTH];

/// The map.
#[derive(Clone, Debug)]
pub(crate) struct Table<K, V> {
    groups: Box<[Arc<Group<K, V>>]>,
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        let shard: Arc<Shard<K, V>> = Arc::default();
        let group: Arc<Group<K, V>> = Arc::new(std::array::from_fn(|_| Arc::clone(&shard)));
        Self { groups: vec![group; WIDTH].into() }
    }
}

impl<K, V> Table<K, V> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards().flat_map(|shard| shard.iter())
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    pub(crate) fn len(&self) -> usize {
        self.shards().map(|shard| shard.len()).sum()
    }

    /// Whether both are one state. Says no of equal tables that were made apart.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.differing(other).next().is_none()
    }

    /// The keys of either that may have other values in the other; some of them twice.
    pub(crate) fn maybe_changed<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a K> {
        self.differing(before).flat_map(|[now, before]| now.keys().chain(before.keys()))
    }

    fn shards(&self) -> impl Iterator<Item = &Arc<Shard<K, V>>> {
        self.groups.iter().flat_map(|group| group.iter())
    }

    /// The shards that the two do not share, each with its counterpart.
    fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = [&'a Arc<Shard<K, V>>; 2]> {
        let groups = self.groups.iter().zip(&other.groups).filter(|(one, other)| !Arc::ptr_eq(one, other));
        let shards = groups.flat_map(|(one, other)| one.iter().zip(other.iter())).map(<[_; 2]>::from);
        shards.filter(|[one, other]| !Arc::ptr_eq(one, other))
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Table<K, V> {
    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let (group, shard) = place(key);
        self.groups[group][shard].get(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.shard_mut(place(&key)).insert(key, value)
    }

    pub(crate) fn remove<Q: Hash + Eq + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // What is not there is no reason to copy a shard.
        self.get(key)?;
        self.shard_mut(place(key)).remove(key)
    }

    fn shard_mut(&mut self, (group, shard): (usize, usize)) -> &mut Shard<K, V> {
        Arc::make_mut(&mut Arc::make_mut(&mut self.groups[group])[shard])
    }
}

/// Which group, and which shard of it. Not by the hash's first or last bits, which place a row within its
/// shard.
fn place<Q: Hash + ?Sized>(key: &Q) -> (usize, usize) {
    let hash = (Hasher::default().hash_one(key) >> 24) as usize;
    (hash / WIDTH % WIDTH, hash % WIDTH)
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

    #[test]
    fn a_change_copies_no_more_than_what_is_near_it() {
        let mut table: Table<u32, Arc<()>> = Table::default();
        let values: Vec<Arc<()>> = (0..100_000).map(|_| Arc::default()).collect();
        for (key, value) in (0..).zip(&values) {
            table.insert(key, Arc::clone(value));
        }
        let before = table.clone();
        table.insert(7, Arc::default());
        // Besides ours and that of `before`.
        let copied = values.iter().filter(|value| Arc::strong_count(value) > 2).count();
        assert!(copied < 100, "{copied} rows were copied for one");
        let told: BTreeSet<u32> = table.maybe_changed(&before).copied().collect();
        assert!(told.contains(&7) && told.len() < 100, "{} keys told for one", told.len());
        assert_eq!(table.len(), 100_000);
    }
}
