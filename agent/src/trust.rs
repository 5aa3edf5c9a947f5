//! What holds now: the trust bundle and this agent's SVIDs, as one atomic snapshot.
//!
//! Readers on the hot path take a snapshot with one atomic load. Every change makes a new snapshot
//! with a higher epoch, so what was derived from an older one (TLS configurations, verified chains,
//! pooled connections) can tell that it is old. Nothing here talks to an issuer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::X509Svid;

/// One consistent state of trust.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Grows with every change.
    pub epoch: u64,
    /// Grows only when the trust bundle changes: what must be verified again.
    pub bundle_epoch: u64,
    /// The roots.
    pub bundle: Arc<TrustBundle>,
    /// The SVIDs this agent holds: its own node's and its local workloads'.
    pub svids: HashMap<SpiffeId, Arc<X509Svid>>,
}

/// The shared, changing state of trust.
#[derive(Debug)]
pub struct Trust {
    now: ArcSwap<Snapshot>,
    /// Serialises writers; readers never take it.
    writing: Mutex<()>,
    changed: watch::Sender<u64>,
}

impl Trust {
    /// Starts from a bundle, holding no SVID.
    pub fn new(bundle: TrustBundle) -> Arc<Self> {
        let first = Snapshot { epoch: 1, bundle_epoch: 1, bundle: Arc::new(bundle), svids: HashMap::new() };
        Arc::new(Self {
            now: ArcSwap::from_pointee(first),
            writing: Mutex::new(()),
            changed: watch::Sender::new(1),
        })
    }

    /// The state as of now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.now.load_full()
    }

    /// The SVID held for an identity.
    pub fn svid(&self, id: &SpiffeId) -> Option<Arc<X509Svid>> {
        self.now.load().svids.get(id).cloned()
    }

    /// The first state that holds an SVID for each of these: now, or once they are issued.
    pub async fn holding(&self, ids: &[&SpiffeId]) -> Arc<Snapshot> {
        let mut changes = self.subscribe();
        loop {
            let now = self.snapshot();
            // The sender lives as long as `self`, so waiting cannot fail.
            if ids.iter().all(|id| now.svids.contains_key(*id)) || changes.changed().await.is_err() {
                return now;
            }
        }
    }

    /// Notifies of every new epoch.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes a newly issued SVID into use.
    pub fn insert(&self, svid: X509Svid) {
        self.change(|next| {
            next.svids.insert(svid.id().clone(), Arc::new(svid));
        });
    }

    /// Forgets the SVIDs of identities that `keep` refuses.
    pub fn retain(&self, keep: impl Fn(&SpiffeId) -> bool) {
        if self.now.load().svids.keys().all(&keep) {
            return;
        }
        self.change(|next| next.svids.retain(|id, _| keep(id)));
    }

    /// Takes a new trust bundle into use; a bundle equal to the current one changes nothing.
    pub fn set_bundle(&self, bundle: TrustBundle) {
        if *self.now.load().bundle == bundle {
            return;
        }
        self.change(|next| {
            next.bundle = Arc::new(bundle);
            next.bundle_epoch += 1;
        });
    }

    fn change(&self, edit: impl FnOnce(&mut Snapshot)) {
        // A writer that panicked left the old snapshot in place, which is still consistent.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = Snapshot::clone(&self.now.load());
        edit(&mut next);
        next.epoch += 1;
        let epoch = next.epoch;
        self.now.store(Arc::new(next));
        self.changed.send_replace(epoch);
    }
}
