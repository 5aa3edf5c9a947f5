//! What was issued to whom and what they have applied: exact in memory, and on disk never less than that.
//!
//! Nothing is signed before the disk says that it may be valid for that long, so a crash forgets no SVID. What
//! is on disk reaches two lifetimes ahead: a node's entry is written once in a lifetime, and many nodes'
//! together. An authority that is stopped leaves the exact times, so only after a crash a rotation waits longer than it
//! has to for a node that is gone. [`super::keeper`] does the writing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};

use crate::ca::rotation::{Blocker, Rotation};
use crate::ca::state::{Lease, RootId, TrustState, seconds, with_skew};
use crate::ca::{Ca, CaError};
use crate::identity::revocation::NodeName;

/// How old what the disk says of connected nodes may be.
const SEEN_WITHIN: u64 = 300;
/// An agent has one, and for a while those that it has lost.
const MAX_STREAMS: usize = 8;
/// A node that holds nothing valid and was not seen for so long is forgotten.
const FORGET_AFTER: u64 = 24 * 3600;

/// The ledger.
#[derive(Debug)]
pub(super) struct Ledger {
    lifetime: Duration,
    inner: Mutex<Inner>,
    /// Somebody waits for the disk, or an agent has said something new.
    pub(super) wanted: Notify,
    written: watch::Sender<Result<(), String>>,
}

#[derive(Debug)]
struct Inner {
    /// As on disk, but for nodes and `signed_until`, which are exact.
    state: TrustState,
    ca: Arc<Ca>,
    /// What is on disk.
    nodes: BTreeMap<NodeName, Lease>,
    signed: BTreeMap<RootId, u64>,
    connected: BTreeMap<NodeName, usize>,
    /// Counts what the disk does not know; how far it was when the disk was last written, and when that was.
    news: u64,
    told: (u64, u64),
}

/// A node's stream is open for as long as this lives.
#[derive(Debug)]
pub(super) struct Presence {
    ledger: Arc<Ledger>,
    node: NodeName,
}

impl Ledger {
    /// From a state as it is on disk.
    pub(super) fn new(state: TrustState, lifetime: Duration) -> Result<Arc<Self>, CaError> {
        let ca = Arc::new(state.signing()?.ca(&state.trust_domain)?);
        let (nodes, signed) = on_disk(&state);
        let connected = BTreeMap::new();
        let inner = Mutex::new(Inner { state, ca, nodes, signed, connected, news: 0, told: (0, 0) });
        let written = watch::Sender::new(Ok(()));
        Ok(Arc::new(Self { lifetime, inner, wanted: Notify::new(), written }))
    }

    /// What signs for a node now, once the disk knows that it does.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) async fn begin(&self, node: &NodeName, now: SystemTime) -> Result<Arc<Ca>, String> {
        let until = with_skew(now + self.lifetime, self.lifetime);
        let mut written = self.written.subscribe();
        loop {
            if let Some(ca) = self.lock().record(node, until, now) {
                return Ok(ca);
            }
            self.wanted.notify_one();
            // The sender is our own.
            let _ = written.changed().await;
            written.borrow_and_update().clone()?;
        }
    }

    /// A node says which generation of roots it has applied.
    pub(super) fn applied(&self, node: &NodeName, generation: u64, now: SystemTime) {
        let mut inner = self.lock();
        let lease = inner.state.nodes.entry(node.clone()).or_default();
        lease.seen = seconds(now);
        if std::mem::replace(&mut lease.applied, generation) != generation {
            inner.news += 1;
            drop(inner);
            self.wanted.notify_one();
        }
    }

    /// A node's stream opens, on a certificate that is valid until then. `None` if it has too many.
    pub(super) fn connect(
        self: &Arc<Self>,
        node: NodeName,
        until: SystemTime,
        now: SystemTime,
    ) -> Option<Presence> {
        let mut inner = self.lock();
        if inner.connected.get(&node).is_some_and(|count| *count >= MAX_STREAMS) {
            return None;
        }
        let lease = inner.state.nodes.entry(node.clone()).or_default();
        // It may hold what an authority issued that did not count.
        lease.until = lease.until.max(with_skew(until, self.lifetime));
        lease.seen = seconds(now);
        *inner.connected.entry(node.clone()).or_default() += 1;
        inner.news += 1;
        drop(inner);
        Some(Presence { ledger: Arc::clone(self), node })
    }

    /// The exact state, and which nodes are connected.
    pub(super) fn state(&self, now: SystemTime) -> (TrustState, Vec<NodeName>) {
        let inner = self.lock();
        let mut state = inner.state.clone();
        let connected: Vec<NodeName> = inner.connected.keys().cloned().collect();
        for name in &connected {
            state.nodes.entry(name.clone()).or_default().seen = seconds(now);
        }
        (state, connected)
    }

    /// What the rotation waits for now.
    pub(super) fn blockers(&self, now: SystemTime, released: impl Fn(&NodeName) -> bool) -> Vec<Blocker> {
        self.lock().state.blockers(seconds(now), released)
    }

    /// How far the rotation is, which root signs, and which generation the roots have.
    pub(super) fn rotation(&self) -> (Rotation, RootId, u64) {
        let inner = self.lock();
        (inner.state.rotation.clone(), inner.state.signing.clone(), inner.state.generation)
    }

    /// Since when the root that signs is in use, and when it ends.
    pub(super) fn signing_root(&self) -> Option<(u64, u64)> {
        self.lock().state.signing().ok().map(|root| (root.since, root.not_after))
    }

    /// The highest generation that a node has applied and this state does not have yet: it is old then.
    pub(super) fn ahead(&self) -> Option<(NodeName, u64)> {
        let inner = self.lock();
        let newer = inner.state.nodes.iter().filter(|(_, lease)| lease.applied > inner.state.generation);
        newer.max_by_key(|(_, lease)| lease.applied).map(|(name, lease)| (name.clone(), lease.applied))
    }

    /// Whether there is something to write.
    pub(super) fn is_dirty(&self, now: SystemTime) -> bool {
        let inner = self.lock();
        let (news, at) = inner.told;
        inner.news != news || !inner.connected.is_empty() && at + SEEN_WITHIN < seconds(now)
    }

    /// Puts what is exact into a state that was read from disk. Whether its rotation is the one known here:
    /// else it must not go on yet, as this authority still signs as it did before.
    ///
    /// # Errors
    /// When it is no state that can follow the one known here: what agents were told is not taken back.
    pub(super) fn exact(&self, disk: &mut TrustState, now: SystemTime) -> Result<bool, CaError> {
        let mut inner = self.lock();
        inner.follows(disk)?;
        let now = seconds(now);
        inner.prune(now);
        inner.exact(disk);
        inner.told = (inner.news, now);
        Ok((&inner.state.rotation, &inner.state.signing) == (&disk.rotation, &disk.signing))
    }

    /// The same without forgetting anybody, for the last time: nothing more is issued.
    ///
    /// # Errors
    /// As [`Ledger::exact`].
    pub(super) fn last(&self, disk: &mut TrustState) -> Result<(), CaError> {
        let mut inner = self.lock();
        inner.follows(disk)?;
        inner.exact(disk);
        // Whoever still asks waits for a disk that nobody writes any more.
        (inner.nodes, inner.signed) = on_disk(disk);
        Ok(())
    }

    /// Puts what may be written into a state in place of what is exact.
    pub(super) fn reserve(&self, disk: &mut TrustState, now: SystemTime) {
        self.lock().reserve(disk, seconds(now), self.lifetime);
    }

    /// Takes up what is on disk now.
    ///
    /// # Errors
    /// When what signs there cannot be used; then it stays as it was.
    pub(super) fn take(&self, disk: TrustState) -> Result<(), CaError> {
        let mut inner = self.lock();
        let signing = disk.signing()?;
        if inner.state.signing()? != signing {
            // Compared whole: an intermediate may be another under the same root.
            inner.ca = Arc::new(signing.ca(&disk.trust_domain)?);
        }
        let (nodes, signed) = on_disk(&disk);
        let mut state = disk;
        inner.exact(&mut state);
        // A root that signs no more has a last certificate, which the disk is told at once.
        inner.news += u64::from(inner.state.signing != state.signing);
        (inner.state, inner.nodes, inner.signed) = (state, nodes, signed);
        Ok(())
    }

    /// Tells whoever waits how writing went.
    pub(super) fn wrote(&self, outcome: Result<(), String>) {
        if outcome.is_err() {
            self.lock().news += 1;
        }
        // What the one before said is of no interest.
        let _ = self.written.send_replace(outcome);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is one assignment; a panic between two leaves at most a lease that is too long.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Notes what is about to be signed; what signs, if the disk knows.
    fn record(&mut self, node: &NodeName, until: u64, now: SystemTime) -> Option<Arc<Ca>> {
        let lease = self.state.nodes.entry(node.clone()).or_default();
        (lease.seen, lease.until) = (seconds(now), lease.until.max(until));
        let signing = self.state.signing.clone();
        for root in self.state.roots.iter_mut().filter(|root| root.id == signing) {
            root.signed_until = root.signed_until.max(until);
        }
        let reserved = [self.nodes.get(node).map(|lease| lease.until), self.signed.get(&signing).copied()];
        let covered = reserved.iter().all(|reserved| reserved.is_some_and(|reserved| reserved >= until));
        self.news += u64::from(!covered);
        covered.then(|| Arc::clone(&self.ca))
    }

    fn follows(&self, disk: &TrustState) -> Result<(), CaError> {
        disk.check(&self.state.trust_domain)?;
        let ids = |state: &TrustState| state.roots.iter().map(|root| root.id.clone()).collect::<Vec<_>>();
        let (known, held) = (self.state.generation, disk.generation);
        if held < known || held == known && ids(disk) != ids(&self.state) {
            let words = format!(
                "its roots (generation {held}) are not those that this authority has told its agents (generation {known}); put the newest trust.json back"
            );
            return Err(CaError::State(words));
        }
        Ok(())
    }

    fn prune(&mut self, now: u64) {
        let Self { state, connected, .. } = self;
        for name in connected.keys() {
            state.nodes.entry(name.clone()).or_default().seen = now;
        }
        state.nodes.retain(|_, lease| lease.until > now || lease.seen + FORGET_AFTER > now);
    }

    fn exact(&self, disk: &mut TrustState) {
        disk.nodes.clone_from(&self.state.nodes);
        for root in &mut disk.roots {
            // Of a root that this authority has not heard of yet, the disk knows best.
            if let Some(known) = self.state.root(&root.id) {
                root.signed_until = known.signed_until;
            }
        }
    }

    fn reserve(&self, disk: &mut TrustState, now: u64, lifetime: Duration) {
        let ahead = now + 2 * lifetime.as_secs().max(10);
        for (name, lease) in &mut disk.nodes {
            let held = self.nodes.get(name).map_or(0, |held| held.until);
            lease.until = reserved(held, lease.until, ahead);
        }
        for root in disk.roots.iter_mut().filter(|root| root.id == disk.signing) {
            let held = self.signed.get(&root.id).copied().unwrap_or_default();
            root.signed_until = reserved(held, root.signed_until, ahead);
        }
    }
}

/// What is written for something that is valid until `exact`, when `held` is on disk.
fn reserved(held: u64, exact: u64, ahead: u64) -> u64 {
    if exact <= held { held } else { exact.max(ahead) }
}

fn on_disk(state: &TrustState) -> (BTreeMap<NodeName, Lease>, BTreeMap<RootId, u64>) {
    let signed = state.roots.iter().map(|root| (root.id.clone(), root.signed_until)).collect();
    (state.nodes.clone(), signed)
}

impl Drop for Presence {
    fn drop(&mut self) {
        let mut inner = self.ledger.lock();
        if let Some(count) = inner.connected.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                inner.connected.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::state::Root;
    use crate::identity::TrustDomain;

    const MINUTE: Duration = Duration::from_secs(60);

    fn node(name: &str) -> NodeName {
        NodeName::parse(name).unwrap()
    }

    fn ledger(now: SystemTime) -> (Arc<Ledger>, TrustState) {
        let domain = TrustDomain::parse("td.test").unwrap();
        let state = TrustState::new(domain.clone(), Root::create(&domain, now).unwrap());
        (Ledger::new(state.clone(), MINUTE).unwrap(), state)
    }

    /// What the keeper does, on a disk that is `disk`.
    fn write(ledger: &Ledger, disk: &mut TrustState, now: SystemTime) {
        assert!(ledger.exact(disk, now).unwrap());
        ledger.reserve(disk, now);
        ledger.take(disk.clone()).unwrap();
        ledger.wrote(Ok(()));
    }

    #[tokio::test]
    async fn nothing_is_signed_before_the_disk_knows_how_long_it_may_be_valid() {
        let now = SystemTime::now();
        let (ledger, mut disk) = ledger(now);
        let n1 = node("n1");
        let asked = {
            let (ledger, n1) = (Arc::clone(&ledger), n1.clone());
            tokio::spawn(async move { ledger.begin(&n1, now).await })
        };
        ledger.wanted.notified().await;
        assert!(!asked.is_finished() && ledger.is_dirty(now));
        write(&ledger, &mut disk, now);
        asked.await.unwrap().unwrap();
        let until = with_skew(now + MINUTE, MINUTE);
        assert!(disk.nodes[&n1].until >= until && disk.roots[0].signed_until >= until);
        assert!(!ledger.is_dirty(now));

        let later = now + MINUTE / 2;
        ledger.begin(&n1, later).await.unwrap();
        assert!(!ledger.is_dirty(later), "the disk has room for that");
        let exact = ledger.state(later).0;
        assert_eq!(exact.nodes[&n1].until, with_skew(later + MINUTE, MINUTE), "here it is known exactly");
        assert_eq!(exact.roots[0].signed_until, exact.nodes[&n1].until);
        let again = Ledger::new(disk.clone(), MINUTE).unwrap();
        assert!(again.state(later).0.nodes[&n1].until >= exact.nodes[&n1].until, "a restart forgets nothing");
    }

    #[tokio::test]
    async fn a_disk_that_cannot_be_written_refuses_and_the_next_one_tries_again() {
        let now = SystemTime::now();
        let (ledger, mut disk) = ledger(now);
        let n1 = node("n1");
        let (refused, ()) = tokio::join!(ledger.begin(&n1, now), async {
            ledger.wanted.notified().await;
            ledger.exact(&mut disk.clone(), now).unwrap();
            ledger.wrote(Err("the disk is full".into()));
        });
        assert_eq!(refused.unwrap_err(), "the disk is full");
        assert!(ledger.is_dirty(now));
        write(&ledger, &mut disk, now);
        ledger.begin(&n1, now).await.unwrap();
    }

    #[tokio::test]
    async fn a_root_that_signs_no_more_is_written_down_exactly() {
        let now = SystemTime::now();
        let (ledger, mut disk) = ledger(now);
        let n1 = node("n1");
        ledger.applied(&n1, 1, now);
        write(&ledger, &mut disk, now);
        let (begun, ()) = tokio::join!(ledger.begin(&n1, now), async {
            ledger.wanted.notified().await;
            write(&ledger, &mut disk, now);
        });
        let old = begun.unwrap();
        let next = Root::create_next(&disk.trust_domain, now).unwrap();
        disk.start(next, seconds(now)).unwrap();
        assert!(!ledger.exact(&mut disk.clone(), now).unwrap(), "it has to be heard of first");
        ledger.take(disk.clone()).unwrap();
        assert!(!ledger.blockers(now, |_| false).is_empty());
        ledger.applied(&n1, 2, now);
        assert!(ledger.exact(&mut disk, now).unwrap());
        disk.advance(seconds(now), |_| false).unwrap();
        ledger.reserve(&mut disk, now);
        ledger.take(disk.clone()).unwrap();
        assert!(ledger.is_dirty(now));
        write(&ledger, &mut disk, now);
        assert_eq!(disk.roots[0].signed_until, with_skew(now + MINUTE, MINUTE), "{:?}", disk.rotation);
        let (begun, ()) = tokio::join!(ledger.begin(&n1, now), async {
            ledger.wanted.notified().await;
            write(&ledger, &mut disk, now);
        });
        assert_ne!(begun.unwrap().bundle(), old.bundle(), "the new one signs");
    }

    #[test]
    fn a_disk_that_goes_back_or_is_anothers_is_not_taken_up() {
        let now = SystemTime::now();
        let (ledger, mut disk) = ledger(now);
        let old = disk.clone();
        let next = Root::create_next(&disk.trust_domain, now).unwrap();
        disk.start(next, seconds(now)).unwrap();
        ledger.exact(&mut disk.clone(), now).unwrap();
        ledger.take(disk.clone()).unwrap();
        let error = ledger.exact(&mut old.clone(), now).unwrap_err().to_string();
        assert!(error.contains("generation 1") && error.contains("newest trust.json"), "{error}");
        let mut other =
            TrustState::new(old.trust_domain.clone(), Root::create(&old.trust_domain, now).unwrap());
        other.generation = disk.generation;
        assert!(ledger.exact(&mut other, now).is_err(), "as new, with other roots");
        ledger.exact(&mut disk, now).unwrap();
    }

    #[test]
    fn who_is_connected_counts_as_seen_and_who_is_gone_for_long_is_forgotten() {
        let now = SystemTime::now();
        let (ledger, mut disk) = ledger(now);
        let here = ledger.connect(node("here"), now + MINUTE, now).unwrap();
        let more: Vec<_> =
            (0..MAX_STREAMS).map(|_| ledger.connect(node("gone"), now + MINUTE, now)).collect();
        assert!(more.iter().all(Option::is_some) && ledger.connect(node("gone"), now, now).is_none());
        drop(more);
        let later = now + Duration::from_secs(2 * FORGET_AFTER);
        write(&ledger, &mut disk, later);
        assert_eq!(disk.nodes.keys().collect::<Vec<_>>(), [&node("here")]);
        assert_eq!(disk.nodes[&node("here")].seen, seconds(later));
        assert_eq!(ledger.state(later).1, [node("here")]);
        drop(here);
        assert_eq!(ledger.state(later).1, []);
    }
}
