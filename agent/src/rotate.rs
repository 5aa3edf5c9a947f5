//! Keeps every SVID fresh: the task that renews what is due. When that is, [`schedule`] says.
//!
//! A failed renewal keeps what is held and tries again; one that is revoked is renewed at once. Every renewal has a
//! new key.

pub mod schedule;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::identity::SpiffeId;
use crate::identity::svid::X509Svid;
use crate::issue::keep::Keep;
use crate::issue::{self, IssueError, Issuer, Keypair, Obtained};
use crate::telemetry::Observe;
use crate::telemetry::metrics::Margin;
use crate::trust::{Snapshot, Trust};
use crate::verdict::{Issuance, IssuerKind};
use schedule::{FIRST_BACKOFF, backoff, renewal};
pub use schedule::{Moment, Standing};

/// Requests under way at once: a node with many identities shall not crowd out the others.
const CONCURRENT: usize = 8;
/// The longest sleep. Short, because the clock may jump.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);
/// The longest wait before the bundle's stream is opened again: while it is closed, revocations do not
/// arrive.
const LONGEST_UNHEARD: Duration = Duration::from_secs(5);

/// How all of them stand.
#[derive(Debug, Default)]
pub struct Status(Mutex<HashMap<SpiffeId, Standing>>);

impl Status {
    /// The state as of now.
    pub fn now(&self) -> HashMap<SpiffeId, Standing> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SpiffeId, Standing>> {
        // Entries are whole at every instant.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long what is held outlives the issuer, and whether that is as long as it shall be.
pub fn margin(held: &Snapshot, target: Option<Duration>, now: SystemTime) -> Margin {
    let ends = held.svids.values().map(|svid| svid.leaf().not_after).min();
    let left = ends.map(|end| end.duration_since(now).unwrap_or_default());
    let at_risk = left.zip(target).is_some_and(|(left, target)| left < target);
    Margin { left, target, at_risk }
}

/// Keeps SVIDs fresh.
#[derive(Debug)]
pub struct Rotator {
    trust: Arc<Trust>,
    issuer: Arc<dyn Issuer>,
    /// `None` where the issuer issues no identities of nodes.
    node: Option<SpiffeId>,
    keep: Keep,
    target: Option<Duration>,
    observe: Observe,
    status: Arc<Status>,
}

type Renewed = (SpiffeId, Result<(X509Svid, Option<Keypair>), IssueError>);

impl Rotator {
    /// For the node's own identity, if it has one, and the identities of its workloads. What is held shall
    /// outlive an outage of `target`.
    pub fn new(
        trust: Arc<Trust>,
        issuer: Arc<dyn Issuer>,
        node: Option<SpiffeId>,
        keep: Keep,
        target: Option<Duration>,
        observe: Observe,
    ) -> Self {
        let keep = keep.configured_with(&trust.snapshot().bundle);
        take_up(&trust, &keep, node.as_ref(), issuer.kind());
        Self { trust, issuer, node, keep, target, observe, status: Arc::default() }
    }

    /// How the SVIDs stand.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// Where SVID and revocations are kept.
    pub fn keep(&self) -> Keep {
        self.keep.clone()
    }

    /// Runs for ever: obtains, renews and forgets SVIDs as `wanted` changes.
    pub async fn run(self, mut wanted: watch::Receiver<Vec<SpiffeId>>) {
        let mut under_way: JoinSet<Renewed> = JoinSet::new();
        let mut asking: HashMap<SpiffeId, ()> = HashMap::new();
        let mut bundles = self.trust.subscribe_bundle();
        let mut at_risk = false;
        loop {
            let identities = self.identities(&wanted.borrow_and_update());
            self.forget(&identities);
            let now = Moment::now();
            self.tell_of_margin(&mut at_risk, now.wall);
            let sleep = self.ask_for_due(&identities, now, &mut under_way, &mut asking);
            tokio::select! {
                Some(renewed) = under_way.join_next(), if !under_way.is_empty() => {
                    // A task that panicked was reported by the panic hook; its identity is due again.
                    match renewed {
                        Ok((id, outcome)) => {
                            asking.remove(&id);
                            self.take(id, outcome, Moment::now());
                        }
                        Err(_) => asking.clear(),
                    }
                }
                changed = wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                Ok(()) = bundles.changed() => self.retry(Moment::now(), |standing| standing.failures > 0),
                () = self.issuer.pushed() => self.retry(Moment::now(), |_| true),
                () = tokio::time::sleep(sleep) => {}
            }
        }
    }

    /// Says once when what is held would no longer outlive an outage of the target's length, and when it would
    /// again.
    fn tell_of_margin(&self, was_at_risk: &mut bool, now: SystemTime) {
        let margin = margin(&self.trust.snapshot(), self.target, now);
        if std::mem::replace(was_at_risk, margin.at_risk) == margin.at_risk {
            return;
        }
        let left = margin.left.unwrap_or_default().as_secs();
        let target = margin.target.unwrap_or_default().as_secs();
        if margin.at_risk {
            tracing::warn!(
                left,
                target,
                "an SVID ends sooner than availabilityTargetSeconds: give SVIDs a longer life, or see why the issuer gives none"
            );
        } else {
            tracing::info!(
                left,
                target,
                "what is held outlives an outage of availabilityTargetSeconds again"
            );
        }
    }

    /// With other roots or revocations, what was refused may be granted now; an issuer may have news for all.
    fn retry(&self, now: Moment, which: impl Fn(&Standing) -> bool) {
        self.status
            .lock()
            .values_mut()
            .filter(|standing| which(standing))
            .for_each(|standing| standing.again(now));
    }

    /// The node first: nothing else is issued without it.
    fn identities(&self, wanted: &[SpiffeId]) -> Vec<SpiffeId> {
        let mut identities: Vec<SpiffeId> = self.node.iter().cloned().collect();
        identities.extend(wanted.iter().filter(|id| Some(*id) != self.node.as_ref()).cloned());
        identities
    }

    fn forget(&self, identities: &[SpiffeId]) {
        self.trust.retain(|id| identities.contains(id));
        self.issuer.retain(identities);
        self.status.lock().retain(|id, _| identities.contains(id));
    }

    /// Starts what is due, the one nearest its end first; says how long nothing will be.
    fn ask_for_due(
        &self,
        identities: &[SpiffeId],
        now: Moment,
        under_way: &mut JoinSet<Renewed>,
        asking: &mut HashMap<SpiffeId, ()>,
    ) -> Duration {
        let held = self.trust.snapshot();
        let attested = self.node.as_ref().is_none_or(|node| held.valid(node, now.wall).is_some());
        let mut due: Vec<(Option<SystemTime>, SpiffeId)> = Vec::new();
        let mut sleep = LONGEST_SLEEP;
        {
            let mut status = self.status.lock();
            for id in identities.iter().filter(|id| !asking.contains_key(*id)) {
                let not_after = held.svids.get(id).map(|svid| svid.leaf().not_after);
                let standing = status.entry(id.clone()).or_insert_with(|| {
                    // What is held was obtained before a restart: its age is not known, so renew soon.
                    Standing::held(
                        not_after,
                        not_after.map_or(Duration::ZERO, |end| self.renewal(end, now)),
                        now,
                    )
                });
                // What is expired or revoked is of no use.
                let useless = not_after.is_some() && held.valid(id, now.wall).is_none();
                let wait = standing.left(useless, now);
                if !wait.is_zero() {
                    sleep = sleep.min(wait);
                } else if attested || Some(id) == self.node.as_ref() {
                    due.push((not_after, id.clone()));
                } else {
                    sleep = sleep.min(FIRST_BACKOFF);
                }
            }
        }
        // Nothing held at all (`None`) sorts first.
        due.sort();
        let room = CONCURRENT.saturating_sub(under_way.len());
        for (_, id) in due.into_iter().take(room) {
            asking.insert(id.clone(), ());
            under_way.spawn(renew(Arc::clone(&self.issuer), Arc::clone(&self.trust), id));
        }
        sleep.max(Duration::from_millis(10))
    }

    /// How long an SVID that ends then is used before it is renewed.
    fn renewal(&self, not_after: SystemTime, now: Moment) -> Duration {
        let life = not_after.duration_since(now.wall).unwrap_or_default();
        renewal(life, self.target, fastrand::f64())
    }

    fn take(&self, id: SpiffeId, outcome: Result<(X509Svid, Option<Keypair>), IssueError>, now: Moment) {
        let before = self.trust.svid(&id);
        let held = before.as_ref().map(|svid| svid.leaf().not_after);
        let is_held = |svid: &X509Svid| {
            before.as_ref().is_some_and(|held| held.certified_key().cert == svid.certified_key().cert)
        };
        let count = match &outcome {
            Ok((svid, _)) if is_held(svid) => Issuance::Unchanged,
            Ok(_) => Issuance::Issued,
            Err(error) => error.outcome(),
        };
        self.observe.asked_issuer(self.issuer.kind(), count);
        let mut status = self.status.lock();
        let Some(standing) = status.get_mut(&id) else { return };
        match outcome {
            Ok((svid, _))
                if count == Issuance::Unchanged && self.trust.snapshot().valid(&id, now.wall).is_none() =>
            {
                let serial = &svid.leaf().serial;
                let error = format!("{} still gives serial {serial}, which is revoked", self.issuer.name());
                standing.failed(error, None, None, fastrand::f64(), now);
            }
            Ok((svid, _)) if count == Issuance::Unchanged => {
                // Whoever makes its keys itself renews them in its own time; look again, sooner and sooner.
                let not_after = svid.leaf().not_after;
                let wait = self.renewal(not_after, now).max(FIRST_BACKOFF);
                *standing = Standing::held(Some(not_after), wait, now);
            }
            Ok((svid, key)) => {
                let not_after = svid.leaf().not_after;
                tracing::info!(%id, serial = svid.leaf().serial, renewed = held.is_some(), "SVID issued");
                if Some(&id) == self.node.as_ref()
                    && let Some(key) = key
                    && let Err(error) = self.keep.save(&svid, &key)
                {
                    tracing::warn!(%error, "cannot keep the node's SVID; a restarted agent needs a new join token");
                }
                *standing = Standing::held(Some(not_after), self.renewal(not_after, now), now);
                drop(status);
                self.trust.insert(svid);
            }
            Err(error) => {
                let asked = match &error {
                    IssueError::Refused { retry_after, .. } => *retry_after,
                    _ => None,
                };
                let left = held.map(|end| end.duration_since(now.wall).unwrap_or_default());
                standing.failed(error.to_string(), left, asked, fastrand::f64(), now);
                tracing::warn!(%id, %error, failures = standing.failures, "no SVID issued; keeping what is held and trying again");
            }
        }
    }
}

/// Takes up what was kept before a restart. Without the revocations that were known then, the SVID
/// stays where it is: the node attests itself anew, and is told of them in the answer.
fn take_up(trust: &Trust, keep: &Keep, node: Option<&SpiffeId>, issuer: IssuerKind) {
    match keep.load_revocations() {
        Ok(list) => trust.set_revocations(list),
        Err(error) => {
            tracing::error!(%error, "the revocations from before the restart cannot be read; this node has to join again");
            return;
        }
    }
    if issuer == IssuerKind::Authority
        && let Some(roots) = keep.load_bundle(trust.snapshot().bundle.domain())
    {
        tracing::info!(generation = roots.generation(), "took up the roots from before the restart");
        trust.set_bundle(roots);
    }
    let Some(node) = node else { return };
    let now = SystemTime::now();
    let bundle = &trust.snapshot().bundle;
    if let Some(svid) = keep.load(node, now) {
        // Another issuer may have been configured since. The authority alone may have sent roots that are not
        // in the file yet.
        if issuer != IssuerKind::Authority && issue::check(&svid, node, bundle, now).is_err() {
            return;
        }
        tracing::info!(id = %node, "took up the node's SVID from before the restart");
        trust.insert(svid);
    }
}

/// Runs for ever: keeps roots and revocations beside the node's SVID.
pub async fn keep_bundle(trust: Arc<Trust>, keep: Keep) {
    let mut bundles = trust.subscribe_bundle();
    let before = trust.snapshot();
    let mut kept = before.bundle.revocations().generation();
    let (mut kept_roots, mut kept_others) = (before.bundle.generation(), before.bundle.federation().cloned());
    while bundles.changed().await.is_ok() {
        let bundle = Arc::clone(&trust.snapshot().bundle);
        let others = bundle.federation();
        // With another issuer than the authority they are not taken up again, and its own sources say them.
        let is_other = bundle.generation() > 0 && kept_others.as_ref() != others;
        if std::mem::replace(&mut kept_roots, bundle.generation()) != bundle.generation() || is_other {
            kept_others = others.cloned();
            tracing::info!(roots = bundle.roots().len(), generation = kept_roots, "roots received");
            if let Err(error) = keep.save_bundle(&bundle) {
                tracing::warn!(%error, "cannot keep the roots; after a restart this agent has those of its file until the authority has sent them");
            }
        }
        let list = bundle.revocations();
        if list.generation() == kept {
            continue;
        }
        kept = list.generation();
        tracing::info!(entries = list.entries().len(), generation = kept, "revocations received");
        if let Err(error) = keep.save_revocations(list) {
            tracing::error!(%error, "cannot keep the revocations; after a restart this agent does not know them until the authority has sent them");
        }
    }
}

/// Asks for one SVID, and takes the roots that came with it into use.
async fn renew(issuer: Arc<dyn Issuer>, trust: Arc<Trust>, id: SpiffeId) -> Renewed {
    let outcome = async {
        let Obtained { svid, key, bundle } = issuer.obtain(&id).await?;
        let held = Arc::clone(&trust.snapshot().bundle);
        // Roots that are older than those held are not taken; the SVID has to stand without them.
        let verifying = bundle.as_ref().filter(|bundle| bundle.supersedes(&held)).unwrap_or(&held);
        issue::check(&svid, &id, verifying, SystemTime::now())
            .map_err(|detail| IssueError::Unusable { issuer: issuer.name(), detail })?;
        // The roots must be trusted before the SVID that needs them is used.
        if let Some(bundle) = bundle {
            trust.set_bundle(bundle);
        }
        Ok((svid, key))
    };
    let outcome = outcome.await;
    (id, outcome)
}

/// Runs for ever: takes new trust bundles into use as the issuer sends them.
pub async fn follow_bundle(trust: Arc<Trust>, issuer: Arc<dyn Issuer>) {
    let mut failures = 0;
    loop {
        match issuer.next_bundle().await {
            Ok(bundle) => {
                failures = 0;
                trust.set_bundle(bundle);
            }
            Err(error) => {
                failures += 1;
                if matches!(error, IssueError::Unreachable { .. }) {
                    tracing::debug!(%error, "the trust bundle's stream ended");
                } else {
                    tracing::warn!(%error, "no trust bundle; keeping what is held");
                }
                // A fleet that lost its authority shall not come back in one instant.
                let wait = backoff(failures, None, 1.0).min(LONGEST_UNHEARD);
                tokio::time::sleep(wait.mul_f64(0.5 + 0.5 * fastrand::f64())).await;
            }
        }
    }
}
