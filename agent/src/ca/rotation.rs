//! Which root signs and which are trusted, from one root to the next, with no moment in which an agent meets
//! an SVID whose root it does not know. Pure: a state, what is wanted, and the time.
//!
//! ```text
//!            start                 activate                     retire
//!   idle ───────────► prepare ────────────────► retire (old) ──────────► idle
//!    ▲                   │  every node with live     │   nothing that the leaving
//!    │       abort       │  SVIDs has applied        │   root signed is valid
//!    ├───────────────────┘  both roots               │ abort
//!    │                                               ▼
//!    └────────────────────────────────────── retire (new): the old one signs again
//! ```
//!
//! In *prepare* both roots are trusted and the old one signs; from *activate* on the new one signs. A root
//! leaves the bundle only when it does not sign and nothing that it signed is valid. Each step is one change
//! of the state, so whoever goes on after a crash finds it done or not done.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::state::{Root, RootId, TrustState};
use crate::identity::revocation::NodeName;

/// Most cross certificates kept: an agent that was away for more rotations needs a new bundle file.
const MAX_CROSSES: usize = 8;

/// How far a rotation has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Rotation {
    /// None is under way.
    Idle,
    /// Another root is trusted besides, and signs nothing yet.
    Prepare {
        /// That root.
        next: RootId,
        /// Since when.
        since: u64,
        /// Nodes that are not waited for.
        excluded: BTreeSet<NodeName>,
    },
    /// A root that signs no more is still trusted.
    Retire {
        /// That root.
        leaving: RootId,
        /// Since when.
        since: u64,
        /// Whether it is the new one, as the rotation was aborted.
        aborted: bool,
    },
}

impl Rotation {
    /// The root besides the one that signs.
    pub fn root(&self) -> Option<&RootId> {
        match self {
            Self::Idle => None,
            Self::Prepare { next, .. } => Some(next),
            Self::Retire { leaving, .. } => Some(leaving),
        }
    }

    /// In one word.
    pub fn phase(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Prepare { .. } => "prepare",
            Self::Retire { aborted: false, .. } => "retire",
            Self::Retire { aborted: true, .. } => "abort",
        }
    }
}

/// Why something cannot be done now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RotationError {
    /// One at a time.
    #[error("a rotation is under way ({0}); let it end first, or abort it")]
    UnderWay(&'static str),
    /// Nothing to change to.
    #[error("root {0} is trusted already")]
    SameRoot(RootId),
    /// This state is not the newest.
    #[error(
        "node {} has applied roots of generation {applied}, this state's are {generation}: it is old, or the node lies; restore the newest trust.json, or revoke the node",
        node.as_str()
    )]
    Behind {
        /// Who says so.
        node: NodeName,
        /// What it has applied.
        applied: u64,
        /// What this state has.
        generation: u64,
    },
    /// Nothing to abort.
    #[error("no rotation is under way that could be aborted ({0})")]
    NothingToAbort(&'static str),
    /// The root that would have to sign again has ended.
    #[error("root {0} has expired and cannot sign again")]
    OldRootExpired(RootId),
    /// There is nobody to exclude.
    #[error("nodes are excluded from a rotation in its prepare phase; this one is in {0}")]
    NothingToExclude(&'static str),
}

/// What keeps a rotation from going on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blocker {
    /// A node that holds valid SVIDs and has not applied the roots.
    Node {
        /// Which.
        name: NodeName,
        /// What it has applied.
        applied: u64,
        /// Nothing that was issued to it is valid after this.
        until: u64,
    },
    /// Nodes that an earlier authority issued to, without counting them.
    Strangers {
        /// Nothing that was issued to them is valid after this.
        until: u64,
    },
    /// Something that the leaving root signed is valid until then.
    Signed {
        /// When it leaves.
        until: u64,
    },
    /// The state is not the newest.
    Behind {
        /// Who says so.
        name: NodeName,
        /// What it has applied.
        applied: u64,
    },
}

/// A step that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// This root signs now.
    Activated(RootId),
    /// This root is trusted no more.
    Retired(RootId),
}

impl TrustState {
    /// Begins to trust another root.
    ///
    /// # Errors
    /// While one is on its way already, or when this state is older than a node's.
    pub fn start(&mut self, next: Root, now: u64) -> Result<(), RotationError> {
        if self.rotation != Rotation::Idle {
            return Err(RotationError::UnderWay(self.rotation.phase()));
        }
        if self.root(&next.id).is_some() {
            return Err(RotationError::SameRoot(next.id));
        }
        if let Some((node, lease)) = self.nodes.iter().find(|(_, lease)| lease.applied > self.generation) {
            let (node, applied, generation) = (node.clone(), lease.applied, self.generation);
            return Err(RotationError::Behind { node, applied, generation });
        }
        self.rotation =
            Rotation::Prepare { next: next.id.clone(), since: now, excluded: BTreeSet::default() };
        self.roots.push(next);
        self.generation += 1;
        Ok(())
    }

    /// Goes on without waiting for a node: what it holds stays as it is, but until it hears of the new root it
    /// refuses whoever shows an SVID under that. Returns whether it was waited for before.
    ///
    /// # Errors
    /// When nothing waits for nodes.
    pub fn exclude(&mut self, node: NodeName) -> Result<bool, RotationError> {
        match &mut self.rotation {
            Rotation::Prepare { excluded, .. } => Ok(excluded.insert(node)),
            other => Err(RotationError::NothingToExclude(other.phase())),
        }
    }

    /// Goes back to the root before. One that has signed already stays trusted for as long as that is valid.
    ///
    /// # Errors
    /// When there is nothing to go back from, or to.
    pub fn abort(&mut self, now: u64) -> Result<(), RotationError> {
        match self.rotation.clone() {
            Rotation::Prepare { next, .. } => {
                self.rotation = Rotation::Idle;
                self.remove(&next);
                Ok(())
            }
            Rotation::Retire { leaving, aborted: false, .. } => {
                if self.root(&leaving).is_none_or(|root| root.not_after <= now) {
                    return Err(RotationError::OldRootExpired(leaving));
                }
                let leaving = std::mem::replace(&mut self.signing, leaving);
                self.rotation = Rotation::Retire { leaving, since: now, aborted: true };
                Ok(())
            }
            other => Err(RotationError::NothingToAbort(other.phase())),
        }
    }

    /// What the rotation waits for; `released` says of a node that nobody listens to it any more.
    pub fn blockers(&self, now: u64, released: impl Fn(&NodeName) -> bool) -> Vec<Blocker> {
        match &self.rotation {
            Rotation::Idle => Vec::new(),
            Rotation::Prepare { excluded, .. } => {
                self.unprepared(now, |node| excluded.contains(node) || released(node))
            }
            Rotation::Retire { leaving, .. } => {
                let until = self.root(leaving).map_or(0, |root| root.signed_until);
                if until > now { vec![Blocker::Signed { until }] } else { Vec::new() }
            }
        }
    }

    fn unprepared(&self, now: u64, released: impl Fn(&NodeName) -> bool) -> Vec<Blocker> {
        let waited_for = self.nodes.iter().filter(|(name, lease)| !released(name) && lease.until > now);
        let mut blockers: Vec<_> = waited_for
            .filter_map(|(name, lease)| {
                let (name, applied, until) = (name.clone(), lease.applied, lease.until);
                match applied.cmp(&self.generation) {
                    std::cmp::Ordering::Less => Some(Blocker::Node { name, applied, until }),
                    std::cmp::Ordering::Equal => None,
                    std::cmp::Ordering::Greater => Some(Blocker::Behind { name, applied }),
                }
            })
            .collect();
        if self.strangers_until > now {
            blockers.push(Blocker::Strangers { until: self.strangers_until });
        }
        blockers
    }

    /// Takes the next step, if nothing keeps it back.
    pub fn advance(&mut self, now: u64, released: impl Fn(&NodeName) -> bool) -> Option<Step> {
        if !self.blockers(now, released).is_empty() {
            return None;
        }
        match self.rotation.clone() {
            Rotation::Idle => None,
            Rotation::Prepare { next, .. } => {
                let leaving = std::mem::replace(&mut self.signing, next.clone());
                self.rotation = Rotation::Retire { leaving, since: now, aborted: false };
                Some(Step::Activated(next))
            }
            Rotation::Retire { leaving, aborted, .. } => {
                self.rotation = Rotation::Idle;
                if !aborted {
                    let cross = self.root(&self.signing).and_then(|root| root.cross.clone());
                    // Without one, nobody who knows an earlier root only can be shown the way to this one.
                    match cross {
                        Some(cross) => self.crosses.insert(0, cross),
                        None => self.crosses.clear(),
                    }
                    self.crosses.truncate(MAX_CROSSES);
                }
                self.remove(&leaving);
                Some(Step::Retired(leaving))
            }
        }
    }

    fn remove(&mut self, id: &RootId) {
        self.roots.retain(|root| root.id != *id);
        self.generation += 1;
    }
}

#[cfg(test)]
mod tests;
