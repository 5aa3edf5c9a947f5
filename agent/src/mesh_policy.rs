//! Mesh policies: how the workloads of a namespace take part in the mesh.
//!
//! They say a mode, what is left alone (ports, ranges of addresses) and how long SVIDs are valid. The
//! directory asks them about each of its workloads; a policy is about workloads of its own namespace only.
//! Who may reach whom is the access policies' to say.

pub mod document;
pub mod exclusions;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::config::Mode;
use document::MeshPolicy;
pub use exclusions::Exclusions;

/// A workload's labels.
pub type Labels = BTreeMap<String, String>;

/// What the policies say of a workload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Its mode, unless its own label says one.
    pub mode: Option<Mode>,
    /// What is left alone.
    pub exclusions: Exclusions,
    /// How long its SVIDs are valid, at most.
    pub svid_lifetime: Option<Duration>,
}

/// One consistent state of the policies.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    by_namespace: HashMap<Box<str>, Vec<MeshPolicy>>,
}

impl Loaded {
    /// Takes checked documents.
    pub fn new(policies: Vec<MeshPolicy>) -> Self {
        let mut by_namespace: HashMap<Box<str>, Vec<MeshPolicy>> = HashMap::new();
        for policy in policies {
            by_namespace.entry(policy.metadata.namespace.as_str().into()).or_default().push(policy);
        }
        // The same documents in another order are the same state.
        by_namespace.values_mut().for_each(|list| list.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name)));
        Self { by_namespace }
    }

    /// How many policies there are.
    pub fn count(&self) -> usize {
        self.by_namespace.values().map(Vec::len).sum()
    }

    /// The namespaces whose policies are others than those of `other`.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'a str> {
        let here = self.by_namespace.keys();
        let gone = other.by_namespace.keys().filter(|namespace| !self.by_namespace.contains_key(*namespace));
        let names = here.chain(gone).map(|namespace| &**namespace);
        names.filter(|namespace| self.by_namespace.get(*namespace) != other.by_namespace.get(*namespace))
    }

    /// What is said of a workload.
    ///
    /// A mode for its labels counts before one for the whole namespace; of two that count alike the one that
    /// promises more. Exclusions add up, and the shortest life holds.
    pub fn of(&self, namespace: &str, labels: &Labels) -> Said {
        let (mut by_labels, mut by_namespace) = (None, None);
        let mut said = Said::default();
        let policies = self.by_namespace.get(namespace).into_iter().flatten();
        for policy in policies.filter(|policy| policy.selects(labels)) {
            let spec = &policy.spec;
            let mode = if policy.is_about_all() { &mut by_namespace } else { &mut by_labels };
            *mode = stricter(*mode, spec.mode);
            if let Some(exclude) = &spec.exclude {
                said.exclusions.add(exclude);
            }
            let lifetime = spec.certificate_lifetime_seconds.map(Duration::from_secs);
            said.svid_lifetime = said.svid_lifetime.into_iter().chain(lifetime).min();
        }
        said.mode = by_labels.or(by_namespace);
        said
    }
}

fn stricter(one: Option<Mode>, other: Option<Mode>) -> Option<Mode> {
    let rank = |mode: &Mode| match mode {
        Mode::Off => 0,
        Mode::Permissive => 1,
        Mode::Strict => 2,
    };
    one.into_iter().chain(other).max_by_key(rank)
}

/// The policies as they change.
#[derive(Debug)]
pub struct MeshPolicies {
    now: ArcSwap<Loaded>,
    /// Counts the states; 0 until the source has been read in whole.
    changed: watch::Sender<u64>,
}

impl MeshPolicies {
    /// None, for good.
    pub fn none() -> Arc<Self> {
        let none = Self::unread();
        none.replace(Vec::new());
        none
    }

    /// None that are known of yet: nobody must take that for none at all.
    pub fn unread() -> Arc<Self> {
        Arc::new(Self { now: ArcSwap::default(), changed: watch::Sender::new(0) })
    }

    /// Takes checked documents into use; whether they differ from those before.
    pub fn replace(&self, policies: Vec<MeshPolicy>) -> bool {
        let next = Loaded::new(policies);
        if self.is_read() && **self.now.load() == next {
            return false;
        }
        self.now.store(Arc::new(next));
        self.changed.send_modify(|states| *states += 1);
        true
    }

    /// The state as of now.
    pub fn load(&self) -> Arc<Loaded> {
        self.now.load_full()
    }

    /// Whether the source has been read in whole.
    pub fn is_read(&self) -> bool {
        *self.changed.borrow() > 0
    }

    /// Resolves when the source has been read in whole.
    pub async fn read(&self) {
        // Cannot fail: the sender is ours.
        let _ = self.changed.subscribe().wait_for(|states| *states > 0).await;
    }

    /// Notifies of every new state.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(namespace: &str, name: &str, spec: &str) -> MeshPolicy {
        let text = format!(
            "{{apiVersion: hauberk.dev/v1alpha1, kind: MeshPolicy, metadata: {{name: {name}, namespace: {namespace}}}, spec: {spec}}}"
        );
        let policy: MeshPolicy = serde_yaml::from_str(&text).unwrap();
        policy.check().unwrap();
        policy
    }

    fn labels(text: &str) -> Labels {
        serde_yaml::from_str(text).unwrap()
    }

    #[test]
    fn labels_count_before_the_namespace_and_the_stricter_mode_before_the_other() {
        let loaded = Loaded::new(vec![
            policy("shop", "all", "{selector: {all: true}, mode: permissive}"),
            policy("shop", "all-too", "{selector: {all: true}, mode: strict}"),
            policy("shop", "db", "{selector: {matchLabels: {app: db}}, mode: permissive}"),
            policy("shop", "old", "{selector: {matchLabels: {app: db, tier: old}}, mode: off}"),
            policy("bank", "all", "{selector: {all: true}, mode: off}"),
        ]);
        let mode = |namespace: &str, text: &str| loaded.of(namespace, &labels(text)).mode;
        assert_eq!(mode("shop", "{}"), Some(Mode::Strict));
        assert_eq!(mode("shop", "{app: db}"), Some(Mode::Permissive));
        assert_eq!(mode("shop", "{app: db, tier: old}"), Some(Mode::Permissive));
        assert_eq!(mode("shop", "{app: dbx, tier: old}"), Some(Mode::Strict), "every label must match");
        assert_eq!(mode("bank", "{app: db}"), Some(Mode::Off), "a namespace's policies are about it alone");
        assert_eq!(mode("other", "{app: db}"), None);
    }

    #[test]
    fn exclusions_add_up_and_the_shortest_life_holds() {
        let loaded = Loaded::new(vec![
            policy(
                "shop",
                "a",
                "{selector: {all: true}, exclude: {inboundPorts: [9090], outboundCidrs: [10.0.0.0/8]}, certificateLifetimeSeconds: 900}",
            ),
            policy(
                "shop",
                "b",
                "{selector: {all: true}, exclude: {inboundPorts: [80, 9090]}, certificateLifetimeSeconds: 600}",
            ),
        ]);
        let said = loaded.of("shop", &Labels::new());
        assert_eq!(said.exclusions.inbound_ports(), [80, 9090]);
        assert!(said.exclusions.leaves_out([10, 1, 2, 3].into(), 5000));
        assert_eq!(said.svid_lifetime, Some(Duration::from_secs(600)));
    }

    #[test]
    fn a_state_is_told_once_and_unread_is_not_empty() {
        let policies = MeshPolicies::unread();
        assert!(!policies.is_read());
        assert!(policies.replace(Vec::new()), "read, and empty");
        assert!(policies.is_read() && !policies.replace(Vec::new()));
        let two = [
            policy("a", "x", "{selector: {all: true}, mode: off}"),
            policy("a", "y", "{selector: {all: true}, mode: off}"),
        ];
        assert!(policies.replace(two.to_vec()));
        assert!(!policies.replace(two.into_iter().rev().collect()), "in another order");
    }
}
