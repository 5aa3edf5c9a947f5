//! What holds now: the trust bundle and this agent's SVIDs, as one atomic snapshot.
//!
//! Readers on the hot path take a snapshot with one atomic load. Every change makes a new snapshot
//! with a higher epoch, so what was derived from an older one (TLS configurations, verified chains,
//! pooled connections) can tell that it is old. Revocations are part of the bundle; the newest list
//! seen holds. Nothing here talks to an issuer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::crl::Crls;
use crate::identity::federation::Federation;
use crate::identity::revocation::{Revocations, Revoked};
use crate::identity::svid::{Leaf, X509Svid};

/// One consistent state of trust.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Grows with every change.
    pub epoch: u64,
    /// Grows only when the trust bundle or its revocations change: what must be verified again.
    pub bundle_epoch: u64,
    /// Grows only when roots change, ours or another trust domain's: connections that rest on the same
    /// roots are not dialled again for a revocation. Those that it concerns are cut, the others go on.
    pub roots_epoch: u64,
    /// The roots, and what is revoked.
    pub bundle: Arc<TrustBundle>,
    /// The SVIDs this agent holds: its own node's and its local workloads'.
    pub svids: HashMap<SpiffeId, Arc<X509Svid>>,
}

impl Snapshot {
    /// Whether this certificate, its identity or its node has been revoked, or cannot be judged.
    pub fn revoked(&self, leaf: &Leaf) -> Option<Revoked> {
        self.bundle.judge(leaf)
    }

    /// The SVID held for an identity, if it is valid now and not revoked. Another would be no better where
    /// only nobody knows.
    pub fn valid(&self, id: &SpiffeId, now: SystemTime) -> Option<&Arc<X509Svid>> {
        self.svids.get(id).filter(|svid| self.is_good(svid, now))
    }

    /// The same of an SVID that need not be held any more.
    pub fn is_good(&self, svid: &X509Svid, now: SystemTime) -> bool {
        let leaf = svid.leaf();
        // It had begun when it was taken: only a clock that was set back makes it begin later.
        let is_valid = leaf.not_before <= now && leaf.not_after > now;
        is_valid && self.revoked(leaf).is_none_or(|why| why.unknown)
    }
}

/// The shared, changing state of trust.
#[derive(Debug)]
pub struct Trust {
    now: ArcSwap<Snapshot>,
    /// Serialises writers; readers never take it.
    writing: Mutex<()>,
    changed: watch::Sender<u64>,
    bundle_changed: watch::Sender<u64>,
}

impl Trust {
    /// Starts from a bundle, holding no SVID.
    pub fn new(bundle: TrustBundle) -> Arc<Self> {
        let first = Snapshot {
            epoch: 1,
            bundle_epoch: 1,
            roots_epoch: 1,
            bundle: Arc::new(bundle),
            svids: HashMap::new(),
        };
        Arc::new(Self {
            now: ArcSwap::from_pointee(first),
            writing: Mutex::new(()),
            changed: watch::Sender::new(1),
            bundle_changed: watch::Sender::new(1),
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

    /// Notifies of every new bundle or list of revocations, but not of SVIDs, which a node renews all the
    /// time.
    pub fn subscribe_bundle(&self) -> watch::Receiver<u64> {
        self.bundle_changed.subscribe()
    }

    /// Takes a newly issued SVID into use.
    pub fn insert(&self, svid: X509Svid) {
        self.change(|next| {
            next.svids.insert(svid.id().clone(), Arc::new(svid));
            true
        });
    }

    /// Forgets the SVIDs of identities that `keep` refuses.
    pub fn retain(&self, keep: impl Fn(&SpiffeId) -> bool) {
        if self.now.load().svids.keys().all(&keep) {
            return;
        }
        self.change(|next| {
            next.svids.retain(|id, _| keep(id));
            true
        });
    }

    /// Takes a new trust bundle into use; a bundle equal to the current one changes nothing.
    ///
    /// Its roots are taken only if they supersede those held, and its revocations only if they are newer: an
    /// authority whose state was put back from a backup neither brings a retired root back nor un-revokes
    /// anybody. Returns whether the roots were taken, or were these already.
    pub fn set_bundle(&self, bundle: TrustBundle) -> bool {
        let mut taken = false;
        self.change_bundle(|held| {
            let newest = newer(held.revocations(), bundle.revocations());
            taken = bundle.supersedes(held);
            let next = if taken { bundle.in_place_of(held) } else { held.clone() };
            next.with_revocations(newest)
        });
        taken
    }

    /// Takes a list of revocations into use, if it is newer than the one held.
    pub fn set_revocations(&self, revocations: Revocations) {
        let revocations = Arc::new(revocations);
        self.change_bundle(|held| {
            let newest = newer(held.revocations(), &revocations);
            held.clone().with_revocations(newest)
        });
    }

    /// Takes the CRLs of other CAs into use, in place of those before.
    pub fn set_crls(&self, crls: Arc<Crls>) {
        self.change_bundle(|held| held.clone().with_crls(crls));
    }

    /// Takes the bundles of other trust domains into use, in place of those before.
    pub fn set_federation(&self, federation: Arc<Federation>) {
        self.change_bundle(|held| held.clone().with_federation(federation));
    }

    /// Resolves when one of these certificates is revoked, at once if it is so already.
    pub async fn until_revoked(&self, leaves: &[&Leaf]) -> Revoked {
        let mut changes = self.subscribe_bundle();
        loop {
            let now = self.snapshot();
            if let Some(revoked) = leaves.iter().find_map(|leaf| now.revoked(leaf)) {
                return revoked;
            }
            drop(now);
            if changes.changed().await.is_err() {
                // The sender is our own field.
                std::future::pending::<()>().await;
            }
        }
    }

    fn change_bundle(&self, edit: impl FnOnce(&TrustBundle) -> TrustBundle) {
        self.change(|next| {
            let bundle = edit(&next.bundle);
            if *next.bundle == bundle {
                return false;
            }
            next.bundle_epoch += 1;
            let same =
                next.bundle.roots() == bundle.roots() && next.bundle.federation() == bundle.federation();
            next.roots_epoch += u64::from(!same);
            next.bundle = Arc::new(bundle);
            true
        });
    }

    /// Makes a new snapshot, if `edit` says that it changed anything.
    fn change(&self, edit: impl FnOnce(&mut Snapshot) -> bool) {
        // A writer that panicked left the old snapshot in place, which is still consistent.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = Snapshot::clone(&self.now.load());
        if !edit(&mut next) {
            return;
        }
        next.epoch += 1;
        let (epoch, bundle) = (next.epoch, next.bundle_epoch);
        self.now.store(Arc::new(next));
        self.changed.send_replace(epoch);
        self.bundle_changed.send_if_modified(|told| std::mem::replace(told, bundle) != bundle);
    }
}

fn newer(held: &Arc<Revocations>, offered: &Arc<Revocations>) -> Arc<Revocations> {
    let newer = if offered.generation() > held.generation() { offered } else { held };
    Arc::clone(newer)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ca::{Ca, create_root};
    use crate::identity::TrustDomain;
    use crate::identity::federation::{Admit, Federated};
    use crate::identity::revocation::Subject;

    fn bundle() -> TrustBundle {
        let domain = TrustDomain::parse("td.test").unwrap();
        let root = create_root(&domain, SystemTime::now()).unwrap();
        Ca::from_pem(domain, &root).unwrap().bundle().clone()
    }

    fn leaf(name: &str) -> Leaf {
        Leaf {
            id: SpiffeId::parse(&format!("spiffe://td.test/ns/a/sa/{name}")).unwrap(),
            node: None,
            serial: "1".into(),
            not_before: SystemTime::UNIX_EPOCH,
            not_after: SystemTime::now() + Duration::from_secs(3600),
            chain: Arc::default(),
        }
    }

    fn revoking(leaf: &Leaf) -> Revocations {
        let mut list = Revocations::default();
        list.revoke(Subject::SpiffeId(leaf.id.clone()), SystemTime::now()).unwrap();
        list
    }

    #[test]
    fn a_revocation_is_a_change_of_trust_and_an_older_list_un_revokes_nobody() {
        let trust = Trust::new(bundle());
        let (web, before) = (leaf("web"), trust.snapshot());
        trust.set_revocations(revoking(&web));
        let revoked = trust.snapshot();
        assert!(revoked.bundle_epoch > before.bundle_epoch && revoked.revoked(&web).is_some());
        assert_eq!(revoked.roots_epoch, before.roots_epoch, "the roots are the same");
        trust.set_revocations(Revocations::default());
        assert_eq!(trust.snapshot().epoch, revoked.epoch, "an older list changes nothing");
        trust.set_bundle(bundle());
        let other_roots = trust.snapshot();
        assert!(other_roots.bundle_epoch > revoked.bundle_epoch);
        assert!(other_roots.roots_epoch > revoked.roots_epoch);
        assert!(other_roots.revoked(&web).is_some(), "roots that come without a list leave it as it is");
    }

    #[test]
    fn roots_of_an_older_generation_never_come_back() {
        let (first, second) = (bundle().with_generation(1), bundle().with_generation(2));
        let trust = Trust::new(bundle());
        assert!(trust.set_bundle(first.clone()) && trust.set_bundle(second.clone()));
        let held = trust.snapshot();
        assert_eq!(held.bundle.roots(), second.roots());
        assert!(!trust.set_bundle(first), "older");
        assert!(!trust.set_bundle(bundle()), "of unknown age");
        assert!(!trust.set_bundle(bundle().with_generation(2)), "another authority's, as old");
        assert!(trust.set_bundle(second), "the same again");
        assert_eq!(trust.snapshot().epoch, held.epoch, "and nothing changed");
        let mut list = Revocations::default();
        list.revoke(Subject::SpiffeId(leaf("web").id), SystemTime::now()).unwrap();
        trust.set_bundle(bundle().with_generation(1).with_revocations(list.into()));
        assert!(trust.snapshot().revoked(&leaf("web")).is_some(), "its newer revocations hold all the same");
    }

    fn federation(roots: &TrustBundle) -> Arc<Federation> {
        let mut federation = Federation::default();
        let federated = Federated::new(roots.roots().to_vec(), Admit::default()).unwrap();
        federation.insert(TrustDomain::parse("other.test").unwrap(), federated);
        Arc::new(federation)
    }

    #[test]
    fn other_trust_domains_are_a_part_of_trust_until_somebody_says_otherwise() {
        let trust = Trust::new(bundle().with_aliases([TrustDomain::parse("old.test").unwrap()].into()));
        let (first, before) = (federation(&bundle()), trust.snapshot());
        trust.set_federation(Arc::clone(&first));
        let known = trust.snapshot();
        assert!(known.bundle_epoch > before.bundle_epoch && known.roots_epoch > before.roots_epoch);
        trust.set_federation(Arc::clone(&first));
        assert_eq!(trust.snapshot().epoch, known.epoch, "the same changes nothing");
        trust.set_bundle(bundle());
        let other_roots = trust.snapshot();
        assert_eq!(other_roots.bundle.federation(), Some(&first), "roots that come alone leave it as it is");
        assert_eq!(other_roots.bundle.aliases().len(), 1, "aliases are the configuration's");
        trust.set_bundle(TrustBundle::clone(&other_roots.bundle).with_federation(federation(&bundle())));
        assert!(trust.snapshot().roots_epoch > other_roots.roots_epoch, "a foreign root was changed");
        trust.set_bundle(bundle().with_federation(Arc::default()));
        assert!(trust.snapshot().bundle.federation().unwrap().is_empty());
    }

    #[tokio::test]
    async fn who_came_by_federation_hears_of_its_end_and_of_nothing_else() {
        let trust = Trust::new(bundle());
        trust.set_federation(federation(&bundle()));
        let id = SpiffeId::parse("spiffe://other.test/node/n1").unwrap();
        let theirs = Leaf { id, node: Some("n1".into()), ..leaf("web") };
        let leaves = [&theirs];
        let waiting = trust.until_revoked(&leaves);
        tokio::pin!(waiting);
        let mut list = Revocations::default();
        let node = crate::identity::revocation::NodeName::parse("n1").unwrap();
        list.revoke(Subject::Node(node), SystemTime::now()).unwrap();
        trust.set_revocations(list);
        trust.set_federation(federation(&bundle()));
        let early = tokio::time::timeout(Duration::from_millis(50), &mut waiting).await;
        assert!(early.is_err(), "neither our node of that name nor a rotation is theirs: {early:?}");
        trust.set_federation(Arc::default());
        let ended = waiting.await;
        assert!(ended.to_string().contains("the end of federation with other.test"), "{ended}");
    }

    #[test]
    fn what_is_revoked_is_so_under_every_name_of_the_trust_domain() {
        let bundle = bundle().with_aliases([TrustDomain::parse("old.test").unwrap()].into());
        let bundle = bundle.with_revocations(Arc::new(revoking(&leaf("web"))));
        let old = |name: &str| {
            let id = SpiffeId::parse(&format!("spiffe://old.test/ns/a/sa/{name}")).unwrap();
            Leaf { id, ..leaf(name) }
        };
        assert!(bundle.judge(&old("web")).is_some());
        assert!(bundle.judge(&old("db")).is_none());
    }

    #[tokio::test]
    async fn whoever_waits_for_a_revocation_hears_of_its_own_only() {
        let trust = Trust::new(bundle());
        let (web, db) = (leaf("web"), leaf("db"));
        let leaves = [&web];
        let waiting = trust.until_revoked(&leaves);
        tokio::pin!(waiting);
        trust.set_revocations(revoking(&db));
        let early = tokio::time::timeout(Duration::from_millis(50), &mut waiting).await;
        assert!(early.is_err(), "another's revocation is none of ours: {early:?}");
        let mut both = Revocations::clone(trust.snapshot().bundle.revocations());
        both.revoke(Subject::SpiffeId(web.id.clone()), SystemTime::now()).unwrap();
        trust.set_revocations(both);
        assert_eq!(waiting.await.id, web.id);
    }
}
