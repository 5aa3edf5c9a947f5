//! A map that forgets: what was not looked up lately goes first, half of it at a time.

use std::collections::HashMap;
use std::hash::Hash;

/// Holds at most `bound` entries.
///
/// Two halves: new and looked-up entries are in the young one; when that is full it becomes the old
/// one, and the old one is dropped.
#[derive(Debug)]
pub(super) struct Bounded<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    half: usize,
}

impl<K: Hash + Eq, V: Clone> Bounded<K, V> {
    /// An empty map for at most `bound` entries, at least two.
    pub(super) fn new(bound: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (bound / 2).max(1) }
    }

    /// The entry, which stays for longer now.
    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        self.insert(key, value.clone());
        Some(value)
    }

    /// Puts an entry in, in place of an earlier one with its key.
    pub(super) fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn it_never_holds_more_than_its_bound_and_keeps_the_half_used_last(
            bound in 2usize..40, keys in proptest::collection::vec(0u8..100, 1..400)
        ) {
            let mut map = Bounded::new(bound);
            let mut used: Vec<u8> = Vec::new();
            for key in keys {
                if map.get(&key).is_none() {
                    map.insert(key, key);
                }
                used.retain(|k| *k != key);
                used.push(key);
                proptest::prop_assert!(map.young.len() + map.old.len() <= bound);
            }
            for key in used.iter().rev().take((bound / 2).max(1)) {
                proptest::prop_assert_eq!(map.get(key), Some(*key), "used lately, and forgotten");
            }
        }
    }
}
