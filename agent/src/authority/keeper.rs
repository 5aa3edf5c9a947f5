//! The one who writes the trust state while the authority runs: what was issued, what agents have applied, and
//! each step of a rotation as soon as nothing keeps it back. What an operator's command writes meanwhile is
//! taken up, and so holds at once.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::clock::Cautious;
use super::config::RootRotation;
use super::counters::Counters;
use super::ledger::Ledger;
use super::serve::OWN_LIFETIME;
use super::state::next_root;
use crate::ca::rotation::{Blocker, Rotation, Step};
use crate::ca::state::{Root, TrustState, seconds};
use crate::ca::store::documents::{Document, Version};
use crate::ca::store::{Store, StoreError};
use crate::ca::{BACKDATED, Ca, CaError};
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::NodeName;

/// How often the document is looked at, and whether a step of a rotation is due.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Writes that nobody waits for, which are many when a fleet comes back, are done together.
const TOGETHER: Duration = Duration::from_millis(20);

/// What the authority shows itself with.
#[derive(Debug)]
pub(super) struct Own {
    /// Signs the authority's own SVID: the oldest root that can, as every agent knows that one.
    pub(super) ca: Ca,
    /// Later roots by earlier ones, for agents that were away.
    pub(super) crosses: Vec<CertificateDer<'static>>,
}

impl Own {
    /// As the state has it; what it signs with has to be valid for `lifetime` still.
    pub(super) fn new(state: &TrustState, lifetime: Duration, now: SystemTime) -> Result<Self, CaError> {
        let lasting = |root: &&Root| root.not_after > seconds(now + lifetime);
        let root = match state.roots.iter().find(lasting) {
            Some(root) => root,
            None => state.signing()?,
        };
        Ok(Self { ca: root.ca(&state.trust_domain)?, crosses: state.crosses()? })
    }
}

/// The keeper.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) store: Arc<Store>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) schedule: Option<RootRotation>,
    pub(super) own: watch::Sender<Arc<Own>>,
    pub(super) bundle: watch::Sender<Arc<TrustBundle>>,
    pub(super) counters: Arc<Counters>,
}

impl Keeper {
    /// Runs for ever.
    pub(super) async fn run(self) {
        let mut seen = None;
        let mut told = Told::default();
        let mut clock = Cautious::new(SystemTime::now(), Instant::now());
        let mut look = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = self.ledger.wanted.notified() => tokio::time::sleep(TOGETHER).await,
                _ = look.tick() => {}
            }
            let now = clock.now(SystemTime::now(), Instant::now());
            let outcome = self.turn(&mut seen, now).await;
            told.fault(outcome);
            self.tell(&mut told, now);
        }
    }

    /// Writes and takes up what there is to.
    async fn turn(&self, seen: &mut Option<Version>, now: SystemTime) -> Result<(), String> {
        let version = self.store.version(Document::Trust);
        let changed = version.is_some() && version != *seen;
        if !(changed || self.ledger.is_dirty(now) || self.is_due(now) || self.is_scheduled(now)) {
            return Ok(());
        }
        let outcome = match self.write(now).await {
            Ok((state, step)) => {
                // As it was before: if somebody wrote meanwhile, or this did, it is looked at once more.
                *seen = version;
                let published = self.publish(state, now).map_err(|error| error.to_string());
                step.iter().for_each(|step| self.took(step));
                published
            }
            Err(error) => Err(error.to_string()),
        };
        self.ledger.wrote(outcome.clone());
        outcome
    }

    /// One change of the document, on a thread that may wait for a disk.
    async fn write(&self, now: SystemTime) -> Result<(TrustState, Option<Step>), StoreError> {
        let (store, ledger) = (Arc::clone(&self.store), Arc::clone(&self.ledger));
        let (revoked, scheduled) = (self.revoked(now), self.is_scheduled(now));
        let change = move || {
            store.change_trust(|state: &mut TrustState| {
                let mut step = None;
                if ledger.exact(state, now)? {
                    step = state.advance(seconds(now), &revoked);
                    if scheduled && state.rotation == Rotation::Idle {
                        let next = next_root(state, None, now)?;
                        // What forbids it is told by `tell`.
                        let _ = state.start(next, seconds(now));
                    }
                }
                ledger.reserve(state, now);
                Ok::<_, CaError>(step)
            })
        };
        // A task that panicked was reported by the panic hook; this one is not to die of it.
        tokio::task::spawn_blocking(change).await.unwrap_or_else(|error| {
            Err(StoreError::Io { path: Document::Trust.name().into(), source: std::io::Error::other(error) })
        })
    }

    /// Takes a state into use: what signs, what is trusted, what the authority shows.
    fn publish(&self, state: TrustState, now: SystemTime) -> Result<(), CaError> {
        let bundle = state.bundle()?;
        let own = Own::new(&state, OWN_LIFETIME, now)?;
        self.ledger.take(state)?;
        self.own.send_replace(Arc::new(own));
        self.bundle.send_if_modified(|held| {
            let changed = (held.generation(), held.roots()) != (bundle.generation(), bundle.roots());
            if changed {
                *held = Arc::new(bundle.in_place_of(held));
            }
            changed
        });
        Ok(())
    }

    fn is_due(&self, now: SystemTime) -> bool {
        self.ledger.rotation().0 != Rotation::Idle && self.ledger.blockers(now, self.revoked(now)).is_empty()
    }

    fn is_scheduled(&self, now: SystemTime) -> bool {
        let Some(schedule) = &self.schedule else { return false };
        self.ledger.signing_root().is_some_and(|(since, until)| {
            self.ledger.rotation().0 == Rotation::Idle
                && self.ledger.ahead().is_none()
                && schedule.is_due(since, until, seconds(now))
        })
    }

    fn revoked(&self, now: SystemTime) -> impl Fn(&NodeName) -> bool + Send + 'static {
        revoked(Arc::clone(&self.bundle.borrow()), now)
    }

    fn took(&self, step: &Step) {
        match step {
            Step::Activated(root) => {
                tracing::info!(%root, "every agent trusts the new root: it signs now");
                self.counters.rotated("activated");
            }
            Step::Retired(root) => {
                tracing::info!(%root, "nothing that this root signed is valid any more: it is trusted no longer");
                self.counters.rotated("retired");
            }
        }
    }

    /// Says once what has changed: how far the rotation is, and whether this state is the newest.
    fn tell(&self, told: &mut Told, now: SystemTime) {
        let (rotation, signing, generation) = self.ledger.rotation();
        let blockers = self.ledger.blockers(now, self.revoked(now));
        let nodes = blockers.iter().filter(|b| matches!(b, Blocker::Node { .. } | Blocker::Behind { .. }));
        self.counters.trust(generation, nodes.count());
        let ahead = self.ledger.ahead();
        if told.rotation.as_ref() != Some(&(rotation.clone(), generation)) {
            tracing::info!(phase = rotation.phase(), generation, signing = %signing, "trusted roots");
            told.rotation = Some((rotation, generation));
        }
        self.counters.behind(ahead.is_some());
        if told.ahead != ahead {
            if let Some((node, applied)) = &ahead {
                tracing::error!(
                    node = node.as_str(),
                    applied,
                    generation,
                    "this authority's trust state is older than what an agent has applied: was it put back from a backup, or does another authority run? Restore the newest trust.json"
                );
            }
            told.ahead = ahead;
        }
    }
}

/// Writes down exactly until when what was issued is valid, now that nothing more is.
pub(super) fn close(store: &Store, ledger: &Ledger) {
    if let Err(error) = store.change_trust::<_, CaError>(|state| ledger.last(state)) {
        tracing::warn!(%error, "the trust state is left as after a crash: a rotation may wait longer for nodes that are gone");
    }
}

/// Tells nodes that nobody listens to any more.
pub(super) fn revoked(
    bundle: Arc<TrustBundle>,
    now: SystemTime,
) -> impl Fn(&NodeName) -> bool + Send + 'static {
    move |name| {
        let id = SpiffeId::node(bundle.domain(), name.as_str());
        let forbids = |id| bundle.revocations().forbids(&id, name.as_str(), now - BACKDATED).is_some();
        id.is_ok_and(forbids)
    }
}

/// What was said already.
#[derive(Default)]
struct Told {
    rotation: Option<(Rotation, u64)>,
    ahead: Option<(NodeName, u64)>,
    fault: Option<String>,
}

impl Told {
    /// Says once what keeps the state from being written.
    fn fault(&mut self, outcome: Result<(), String>) {
        let fault = outcome.err();
        if let Some(error) = fault.as_ref().filter(|_| fault != self.fault) {
            tracing::error!(
                error,
                "the trust state cannot be written or used: what was in force stays, and nothing is issued that the disk does not know of"
            );
        } else if fault.is_none() && self.fault.is_some() {
            tracing::info!("the trust state is written again");
        }
        self.fault = fault;
    }
}
