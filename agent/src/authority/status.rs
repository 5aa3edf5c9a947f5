//! How the authority stands, for its operator and for whoever scrapes it.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::counters::Counters;
use super::keeper::revoked;
use super::ledger::Ledger;
use super::queue::Queue;
use crate::ca::rotation::{Blocker, Rotation};
use crate::ca::state::{Root, TrustState, seconds};
use crate::directory::Live;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::NodeName;
use crate::policy::Policies;

/// Most nodes with samples of their own; more are counted only.
const MAX_NODES: usize = 10_000;

/// What is told.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) ledger: Arc<Ledger>,
    pub(super) queue: Arc<Queue>,
    pub(super) counters: Arc<Counters>,
    pub(super) directory: Arc<Live>,
    pub(super) policies: Arc<Policies>,
    pub(super) bundle: watch::Receiver<Arc<TrustBundle>>,
}

impl Status {
    /// What is served at a path of the admin address.
    pub(super) fn page(&self, path: &str) -> Option<String> {
        match path {
            "/metrics" => {
                let (waiting, of_nodes) = self.queue.depth();
                self.counters.queue(waiting, of_nodes);
                let own = self.counters.render()?;
                let nodes = samples(&self.ledger.state(SystemTime::now()).0);
                let policies = self.policies.standing().map(|standing| standing.render());
                Some(own + &nodes + &self.directory.standing().render() + &policies.unwrap_or_default())
            }
            "/healthz" | "/readyz" => Some("ok\n".into()),
            _ => None,
        }
    }

    /// All of it.
    pub(super) fn now(&self, now: SystemTime) -> Value {
        let (state, connected) = self.ledger.state(now);
        let bundle = Arc::clone(&self.bundle.borrow());
        let revoked = revoked(Arc::clone(&bundle), now);
        let (issued, lately) = self.counters.issued_so_far(now);
        let mut all = describe(&state, &connected, revoked, now);
        let (waiting, of_nodes) = self.queue.depth();
        all["queue"] = waiting.into();
        all["queueNodes"] = of_nodes.into();
        all["issued"] = issued.into();
        all["issuedLastMinute"] = lately.into();
        all["revocations"] = bundle.revocations().entries().len().into();
        all["directoryError"] = self.directory.standing().faults().into();
        all["warning"] = self.ledger.ahead().map(|(node, applied)| {
            format!("node {} has applied roots of generation {applied}: this state is older; restore the newest trust.json", node.as_str())
        }).into();
        all
    }
}

/// A trust state in words, of an authority that does not run.
pub(super) fn describe_at_rest(state: &TrustState, now: SystemTime) -> Value {
    describe(state, &[], |_| false, now)
}

/// A trust state in words that are no secret; `connected` and `revoked` say more of its nodes.
fn describe(
    state: &TrustState,
    connected: &[NodeName],
    revoked: impl Fn(&NodeName) -> bool,
    now: SystemTime,
) -> Value {
    let blockers = state.blockers(seconds(now), &revoked);
    let agents = state.nodes.iter().map(|(name, lease)| {
        json!({
            "node": name.as_str(),
            "connected": connected.contains(name),
            "seen": lease.seen,
            "generation": lease.applied,
            "svidsUntil": lease.until,
            "revoked": revoked(name),
        })
    });
    json!({
        "trustDomain": state.trust_domain.as_str(),
        "generation": state.generation,
        "roots": state.roots.iter().map(|root| describe_root(state, root)).collect::<Vec<_>>(),
        "rotation": {
            "phase": state.rotation.phase(),
            "since": since(&state.rotation),
            "waitsFor": blockers.iter().map(words).collect::<Vec<_>>(),
            "excluded": match &state.rotation {
                Rotation::Prepare { excluded, .. } => excluded.iter().map(NodeName::as_str).collect(),
                _ => Vec::new(),
            },
        },
        "agents": agents.collect::<Vec<_>>(),
    })
}

fn describe_root(state: &TrustState, root: &Root) -> Value {
    let standing = match &state.rotation {
        _ if root.id == state.signing => "signs",
        Rotation::Prepare { .. } => "prepared",
        _ => "leaving",
    };
    json!({
        "id": root.id.as_str(),
        "state": standing,
        "key": if root.chain.is_empty() { "own" } else { "supplied intermediate" },
        "since": root.since,
        "expires": root.not_after,
        "signedUntil": root.signed_until,
    })
}

fn since(rotation: &Rotation) -> Option<u64> {
    match rotation {
        Rotation::Idle => None,
        Rotation::Prepare { since, .. } | Rotation::Retire { since, .. } => Some(*since),
    }
}

/// What is waited for, and until when at most.
fn words(blocker: &Blocker) -> Value {
    let (text, until) = match blocker {
        Blocker::Node { name, applied, until } => {
            (format!("node {} to apply the roots (it has generation {applied})", name.as_str()), Some(until))
        }
        Blocker::Strangers { until } => {
            ("SVIDs to expire that were issued before nodes were counted".into(), Some(until))
        }
        Blocker::Signed { until } => {
            ("the last SVID that the leaving root signed to expire".into(), Some(until))
        }
        Blocker::Behind { name, applied } => (
            format!("this state to be restored: node {} has generation {applied} already", name.as_str()),
            None,
        ),
    };
    json!({"what": text, "until": until})
}

/// Samples of roots and nodes.
fn samples(state: &TrustState) -> String {
    let mut page = String::new();
    let roots = state.roots.iter().map(|root| {
        let standing = if root.id == state.signing { "signs" } else { "trusted" };
        (format!("{{root=\"{}\",state=\"{standing}\"}}", root.id), root.not_after)
    });
    let name = "hauberk_authority_root_expiry_timestamp_seconds";
    gauge(&mut page, name, "When a trusted root ends.", roots);
    // A node's name holds nothing that would have to be escaped.
    let nodes = state.nodes.iter().take(MAX_NODES);
    let nodes = nodes.map(|(node, lease)| (format!("{{node=\"{}\"}}", node.as_str()), lease.applied));
    let name = "hauberk_authority_agent_bundle_generation";
    gauge(&mut page, name, "Generation of the roots that a node has applied.", nodes);
    let count = [(String::new(), state.nodes.len() as u64)];
    let name = "hauberk_authority_agents";
    gauge(&mut page, name, "Nodes that hold SVIDs, or did a day ago.", count);
    page
}

fn gauge(page: &mut String, name: &str, help: &str, samples: impl IntoIterator<Item = (String, u64)>) {
    // Writing to a string cannot fail.
    let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} gauge");
    for (labels, value) in samples {
        let _ = writeln!(page, "{name}{labels} {value}");
    }
}
