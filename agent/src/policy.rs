//! Access policies: may this peer reach this workload?
//!
//! The receiving agent has the last word: it judges every stream when it is asked for, and again
//! whenever the policies change, for as long as the stream is open. The sending agent refuses early
//! what the receiving one would refuse. A policy decides on identities that were proven on the very
//! connection, never on names or addresses that a peer claims; deliberately absent are patterns,
//! requests' contents, and anything that would have to be waited for.

pub mod document;
pub mod kubernetes;
pub mod neighbours;
pub mod rule;
pub mod source;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::watch;

use crate::config::{self, ConfigError, Fault};
use crate::directory::{Standing, Workload};
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh_policy::MeshPolicies;
use document::{AccessPolicy, Documents};
use neighbours::Neighbours;
use rule::{Decision, Outcome, Rules};

/// Who wants to reach whom.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The identity that the opener has proven.
    pub peer: SpiffeId,
    /// The opener's address.
    pub source: IpAddr,
    /// The workload that is asked.
    pub workload: Arc<Workload>,
    /// Its application's port.
    pub port: u16,
}

/// What a policy has come to; kept over reloads as long as a policy of its name is there.
#[derive(Debug, Default)]
pub struct Counts {
    /// Connections that it matched first: let in by an allow policy, refused by a deny policy, or,
    /// in a dry run, what would have been.
    pub hits: AtomicU64,
    /// Connections refused because of it.
    pub denied: AtomicU64,
    /// Connections that would be refused because of it, were it enforced.
    pub would_deny: AtomicU64,
}

/// A policy in use.
#[derive(Debug)]
pub struct Policy {
    /// `namespace/name`.
    pub name: Arc<str>,
    /// What it came to.
    pub counts: Arc<Counts>,
}

/// One consistent state: what is enforced.
#[derive(Debug, Default)]
pub struct Loaded {
    generation: u64,
    rules: Rules,
    policies: Vec<Policy>,
    documents: Vec<AccessPolicy>,
    neighbours: Neighbours,
}

impl Loaded {
    /// The policies in use with their documents, in the order of names.
    pub fn policies(&self) -> impl Iterator<Item = (&Policy, &AccessPolicy)> {
        self.policies.iter().zip(&self.documents)
    }
}

/// Why a connection is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    /// `namespace/name` of the policy; `None` where one would have to allow it and none is about the workload.
    pub policy: Option<Arc<str>>,
    /// Whether the policy refuses this peer, rather than none allowing it.
    matched: bool,
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.policy, self.matched) {
            (Some(policy), true) => write!(f, "the deny policy {policy} matches"),
            (Some(policy), false) => {
                write!(f, "{policy} is about this workload, and no allow policy matches")
            }
            (None, _) => f.write_str("no policy allows it, which an identity of another trust domain needs"),
        }
    }
}

/// The policies as they change.
#[derive(Debug)]
pub struct Policies {
    domain: TrustDomain,
    now: ArcSwap<Loaded>,
    /// Serialises writers; readers never take it.
    writing: Mutex<()>,
    /// Tells of every change of [`Policies::generation`].
    changed: watch::Sender<()>,
    /// Why the newest state of the source is not in use.
    fault: ArcSwapOption<String>,
    /// How workloads take part in the mesh: the same source's, for the directory to ask.
    mesh: Arc<MeshPolicies>,
    /// Whether the source has been read in whole. Until then nobody may be let in.
    read: watch::Sender<bool>,
    /// Names what is in use, where the source has versions of it.
    digest: ArcSwapOption<String>,
    /// How the source fares, where it can be away.
    standing: Option<Arc<Standing>>,
}

impl Policies {
    /// Without any policy: every identity of the own trust domain may reach every workload.
    pub fn none(domain: TrustDomain) -> Arc<Self> {
        let policies = Self::new(domain, MeshPolicies::none(), None);
        policies.read.send_replace(true);
        Arc::new(policies)
    }

    fn new(domain: TrustDomain, mesh: Arc<MeshPolicies>, standing: Option<Arc<Standing>>) -> Self {
        Self {
            domain,
            now: ArcSwap::from_pointee(Loaded::default()),
            writing: Mutex::default(),
            changed: watch::Sender::new(()),
            fault: ArcSwapOption::empty(),
            mesh,
            read: watch::Sender::new(false),
            digest: ArcSwapOption::empty(),
            standing,
        }
    }

    /// None that are known of yet, from a source that can be away.
    pub(crate) fn unread(domain: TrustDomain, standing: Standing) -> Arc<Self> {
        Arc::new(Self::new(domain, MeshPolicies::unread(), Some(Arc::new(standing))))
    }

    /// Reads a file's policies.
    ///
    /// # Errors
    /// When they cannot be used; one line that names file and field.
    pub fn load(path: &Path, domain: TrustDomain) -> Result<Arc<Self>, ConfigError> {
        let policies = Self::new(domain, MeshPolicies::unread(), None);
        let documents = document::load(path)?;
        policies.take(documents).map_err(|fault| ConfigError::invalid(path, fault))?;
        Ok(Arc::new(policies))
    }

    /// Runs for ever: takes the file's policies into use whenever it changes. A bad file changes
    /// nothing, and is said once.
    pub async fn watch(self: Arc<Self>, path: PathBuf) {
        let file = path.clone();
        let take = move |loaded: Result<Documents, ConfigError>| {
            let replaced = loaded.and_then(|documents| {
                let count = documents.count();
                let changed = self.take(documents).map_err(|fault| ConfigError::invalid(&file, fault))?;
                Ok((count, changed))
            });
            match replaced {
                Ok((policies, changed)) => {
                    if changed {
                        let generation = self.generation();
                        tracing::info!(file = %file.display(), policies, generation, "access policies read");
                    }
                    self.fault.store(None);
                }
                Err(error) => {
                    tracing::error!(%error, "the access policies stay as they were");
                    self.fault.store(Some(Arc::new(error.to_string())));
                }
            }
        };
        config::watch::watch(path, document::load, take).await;
    }

    /// Takes the source's newest state into use; whether it differs from the one before.
    ///
    /// # Errors
    /// When an access policy cannot be compiled; nothing changes then.
    pub fn take(&self, documents: Documents) -> Result<bool, Fault> {
        let access = self.replace(documents.access)?;
        let mesh = self.mesh.replace(documents.mesh);
        self.read.send_replace(true);
        Ok(access || mesh)
    }

    /// Takes access policies into use; whether they differ from those before. Open connections are judged
    /// again.
    ///
    /// # Errors
    /// When one cannot be compiled; nothing changes then.
    pub fn replace(&self, mut documents: Vec<AccessPolicy>) -> Result<bool, Fault> {
        documents.sort_by_cached_key(AccessPolicy::name);
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.change(documents, self.now.load().neighbours.clone())
    }

    /// Takes into use what is known of other trust domains; open connections are judged again.
    pub fn know(&self, neighbours: Neighbours) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.now.load();
        // Asked after every change of trust, and hardly any is one of these.
        if before.neighbours == neighbours {
            return;
        }
        // What could be compiled can be with other names for the same trust domain; the fault is told if not.
        if let Err((at, what)) = self.change(before.documents.clone(), neighbours) {
            tracing::error!(policy = at, error = what, "the access policies stay as they were");
        }
    }

    fn change(&self, documents: Vec<AccessPolicy>, neighbours: Neighbours) -> Result<bool, Fault> {
        let before = self.now.load();
        if before.documents == documents && before.neighbours == neighbours {
            return Ok(false);
        }
        let rules = Rules::compile(&neighbours.canonical(&documents, &self.domain), &self.domain)
            .map_err(|(index, error)| (documents[index].name(), error.to_string()))?;
        let policies = documents.iter().map(|document| {
            let name: Arc<str> = document.name().into();
            let known = before.policies.binary_search_by(|policy| policy.name.cmp(&name));
            let counts = known.map(|at| Arc::clone(&before.policies[at].counts)).unwrap_or_default();
            Policy { name, counts }
        });
        let policies = policies.collect();
        let generation = before.generation + 1;
        self.now.store(Arc::new(Loaded { generation, rules, policies, documents, neighbours }));
        self.changed.send_replace(());
        Ok(true)
    }

    /// What is enforced now.
    pub fn loaded(&self) -> Arc<Loaded> {
        self.now.load_full()
    }

    /// The mesh policies of the same source.
    pub fn mesh(&self) -> &Arc<MeshPolicies> {
        &self.mesh
    }

    /// Whether the source has been read in whole.
    pub fn is_read(&self) -> bool {
        *self.read.borrow()
    }

    /// Resolves when the source has been read in whole.
    pub async fn read(&self) {
        // Cannot fail: the sender is ours.
        let _ = self.read.subscribe().wait_for(|read| *read).await;
    }

    /// Names what is in use, where the source has versions of it.
    pub fn digest(&self) -> Option<Arc<String>> {
        self.digest.load_full()
    }

    /// How the source fares, where it can be away.
    pub fn standing(&self) -> Option<&Arc<Standing>> {
        self.standing.as_ref()
    }

    /// Why the newest state of the source, or of a part of it, is not in use, if it is not.
    pub fn fault(&self) -> Option<String> {
        let away = self.standing.as_ref().and_then(|standing| standing.faults());
        let unusable = self.fault.load().as_ref().map(|words| words.as_str().to_owned());
        let faults: Vec<String> = away.into_iter().chain(unusable).collect();
        (!faults.is_empty()).then(|| faults.join("; "))
    }

    /// Grows with every change of what is enforced.
    pub fn generation(&self) -> u64 {
        self.now.load().generation
    }

    /// The receiving agent's word, which is the last: judges a connection and counts it.
    ///
    /// What comes back must live as long as the connection; see [`Admitted::revoked`].
    ///
    /// # Errors
    /// The policy that refuses it.
    pub fn judge(self: &Arc<Self>, attempt: Attempt) -> Result<Admitted, Denial> {
        // Before looking: a change after this is seen by `revoked`.
        let changes = self.changed.subscribe();
        let now = self.now.load();
        let outcome = now.judge(&attempt, &self.domain);
        now.count_hit(outcome.enforced);
        if let Some(denial) = now.denial(outcome.enforced) {
            now.count(outcome.enforced, |counts| &counts.denied);
            return Err(denial);
        }
        if outcome.tried != outcome.enforced {
            now.count_hit(outcome.tried);
        }
        if let Some(denial) = now.denial(outcome.tried) {
            now.count(outcome.tried, |counts| &counts.would_deny);
            would_deny(&attempt, &denial);
        }
        Ok(Admitted { policies: Arc::clone(self), attempt, generation: now.generation, changes })
    }

    /// The sending agent's word: refuses, and counts, what the receiving agent would refuse. What
    /// it lets pass is judged and counted there.
    ///
    /// # Errors
    /// The policy that refuses it.
    pub fn deny_early(&self, attempt: &Attempt) -> Result<(), Denial> {
        let now = self.now.load();
        let outcome = now.judge(attempt, &self.domain);
        let Some(denial) = now.denial(outcome.enforced) else { return Ok(()) };
        now.count(outcome.enforced, |counts| &counts.denied);
        Err(denial)
    }

    /// Whether a peer may reach a workload at all, on some port and from some address: what has to
    /// hold for a connection to be worth keeping. Each stream on it is judged for itself.
    pub fn may_reach(&self, peer: &SpiffeId, workload: &Workload) -> bool {
        let now = self.now.load();
        let peer = peer.under(&self.domain, &now.neighbours.aliases);
        now.rules.may_reach(&peer, workload, !now.neighbours.is_outsider(&peer, &self.domain))
    }
}

impl Loaded {
    fn judge(&self, attempt: &Attempt, domain: &TrustDomain) -> Outcome {
        let Attempt { peer, source, workload, port } = attempt;
        if self.neighbours.is_foreign(workload, domain) {
            return Outcome { enforced: Decision::Allowed(None), tried: Decision::Allowed(None) };
        }
        let peer = peer.under(domain, &self.neighbours.aliases);
        let Outcome { enforced, tried } = self.rules.judge(&peer, *source, workload, *port);
        let outsider = self.neighbours.is_outsider(&peer, domain);
        let decide = |decision: Decision| match decision {
            Decision::Allowed(None) if outsider => Decision::Outsider,
            decided => decided,
        };
        Outcome { enforced: decide(enforced), tried: decide(tried) }
    }

    fn denial(&self, decision: Decision) -> Option<Denial> {
        let named = |at: usize| self.policies.get(at).map(|policy| Arc::clone(&policy.name));
        let matched = matches!(decision, Decision::Denied(_));
        decision.denies().then(|| Denial { policy: decision.policy().and_then(named), matched })
    }

    /// Counts a policy that matched; one that is merely about the workload did not.
    fn count_hit(&self, decision: Decision) {
        if !matches!(decision, Decision::NotAllowed(_)) {
            self.count(decision, |counts| &counts.hits);
        }
    }

    fn count(&self, decision: Decision, which: impl Fn(&Counts) -> &AtomicU64) {
        if let Some(policy) = decision.policy().and_then(|index| self.policies.get(index)) {
            which(&policy.counts).fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A connection that the policies let in, for as long as they do.
#[derive(Debug)]
pub struct Admitted {
    policies: Arc<Policies>,
    attempt: Attempt,
    generation: u64,
    changes: watch::Receiver<()>,
}

impl Admitted {
    /// Resolves when a change of the policies denies the connection. While nothing changes it costs
    /// a waker.
    pub async fn revoked(&mut self) -> Denial {
        loop {
            let generation = self.policies.generation();
            if generation != self.generation {
                self.generation = generation;
                if let Err(denial) = self.policies.deny_early(&self.attempt) {
                    return denial;
                }
            }
            if self.changes.changed().await.is_err() {
                // Impossible while `policies` holds the sender; then nothing can change any more.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The line of a dry run: what enforcing the policy would refuse.
fn would_deny(attempt: &Attempt, denial: &Denial) {
    tracing::warn!(
        target: "access",
        policy = denial.policy.as_deref(),
        source_id = %attempt.peer,
        source = %attempt.source,
        destination_id = %attempt.workload.id,
        destination = format!("{}:{}", attempt.workload.full_name(), attempt.port),
        detail = %denial,
        "would be denied"
    );
}

#[cfg(test)]
mod tests;
