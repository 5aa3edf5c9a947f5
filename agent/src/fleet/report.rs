//! What an agent says of itself. Whoever reads it may be older or newer: fields that are not there have their
//! defaults, unknown ones are ignored.

use std::time::SystemTime;

use k8s_openapi::api::coordination::v1::Lease;
use serde::{Deserialize, Serialize};

/// The annotation of a Lease that holds a report.
pub const ANNOTATION: &str = "hauberk.dev/report";
/// The label, and its value, of the Leases that agents keep.
pub const LABEL: (&str, &str) = ("app.kubernetes.io/component", "hauberk-agent");
/// Most entries of a list in a report; the rest is counted only.
pub const MAX_LISTED: usize = 5;

/// What an agent says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Report {
    /// Of the agent.
    pub version: String,
    /// The node's kernel.
    pub kernel: String,
    /// What the agent is not ready for want of; empty when it is.
    pub missing: Vec<String>,
    /// Names the policies that are in force (see `Policies::digest`).
    pub policies: Option<String>,
    /// What is wrong with their source.
    pub policy_fault: Option<String>,
    /// What is wrong with the directory's source.
    pub directory_fault: Option<String>,
    /// Workloads that are captured.
    pub enrolled: usize,
    /// Workloads that should be.
    pub not_enrolled: usize,
    /// The first of those, each with its reason.
    pub why_not_enrolled: Vec<String>,
    /// When the first of the trust bundle's roots expires (Unix time).
    pub roots_until: Option<u64>,
    /// When the first SVID expires that could not be renewed (Unix time). Others are renewed in time, however short
    /// their lives are.
    pub svids_until: Option<u64>,
    /// The first SVIDs that could not be renewed, each with its reason.
    pub svid_failures: Vec<String>,
    /// Other nodes whose agents were looked for last.
    pub looked_for: Vec<String>,
    /// Those of them that were not reached, each with its reason.
    pub not_reached: Vec<(String, String)>,
}

impl Report {
    /// Whether another report says the same of what somebody waits for, or has to mend. Counts may differ.
    pub fn matches(&self, other: &Self) -> bool {
        let gist = |it: &Self| {
            (
                it.missing.is_empty(),
                it.not_enrolled == 0,
                it.svid_failures.is_empty(),
                it.looked_for.is_empty(),
            )
        };
        self.policies == other.policies
            && self.policy_fault.is_some() == other.policy_fault.is_some()
            && self.directory_fault.is_some() == other.directory_fault.is_some()
            && self.not_reached == other.not_reached
            && gist(self) == gist(other)
    }
}

/// An agent, as its Lease has it.
#[derive(Clone, Debug)]
pub struct Heard {
    /// Its node.
    pub node: String,
    /// When it said so, by its own clock.
    pub at: SystemTime,
    /// When the API server was told, by that one's clock, to the second.
    pub told: Option<SystemTime>,
    /// What it said.
    pub report: Report,
}

impl Heard {
    /// Reads a Lease; `None` if it is no agent's.
    pub fn read(lease: &Lease) -> Option<Self> {
        let spec = lease.spec.as_ref()?;
        let text = lease.metadata.annotations.as_ref()?.get(ANNOTATION)?;
        let updates = lease.metadata.managed_fields.iter().flatten();
        Some(Self {
            node: spec.holder_identity.clone()?,
            at: spec.renew_time.as_ref()?.0.into(),
            told: updates.filter_map(|entry| entry.time.as_ref()).map(|time| time.0.into()).max(),
            report: serde_json::from_str(text).ok()?,
        })
    }

    /// Whether it was heard of lately enough to count.
    pub fn is_live(&self, now: SystemTime) -> bool {
        now.duration_since(self.at).is_ok_and(|age| age < super::lease::GONE_AFTER) || self.at > now
    }
}
