//! What the authority counts.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

use crate::ca::state::seconds;
use crate::identity::revocation::Revocations;

/// Seconds over which the rate of issuing is told.
const RATE_OVER: usize = 60;

/// Counters and gauges.
#[derive(Debug)]
pub(super) struct Counters {
    registry: Registry,
    issued: IntCounterVec,
    refused: IntCounterVec,
    rotations: IntCounterVec,
    revocations: IntGauge,
    revocations_generation: IntGauge,
    generation: IntGauge,
    waited_for: IntGauge,
    behind: IntGauge,
    queue: IntGauge,
    queue_nodes: IntGauge,
    directory_streams: IntGauge,
    directory_told_anew: IntCounter,
    lately: Mutex<Lately>,
}

/// SVIDs issued in each of the last seconds, in a ring.
#[derive(Debug)]
struct Lately {
    second: u64,
    counts: [u64; RATE_OVER],
}

impl Lately {
    fn turn(&mut self, second: u64) {
        for passed in self.second + 1..=second.min(self.second + RATE_OVER as u64) {
            self.counts[(passed % RATE_OVER as u64) as usize] = 0;
        }
        // A clock that was set back a little counts into the latest second; by more, and the ring begins anew.
        if second + (RATE_OVER as u64) < self.second {
            *self = Self { second, counts: [0; RATE_OVER] };
        }
        self.second = self.second.max(second);
    }
}

impl Counters {
    /// All at zero.
    ///
    /// # Errors
    /// When two counters have one name, which is a mistake in this file.
    pub(super) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let vec = |name, help, label| {
            let counter = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(counter.clone()))?;
            prometheus::Result::Ok(counter)
        };
        let gauge = |name, help| {
            let gauge = IntGauge::new(name, help)?;
            registry.register(Box::new(gauge.clone()))?;
            prometheus::Result::Ok(gauge)
        };
        let told_anew = IntCounter::new(
            "hauberk_authority_directory_told_anew_total",
            "How often an agent was told the whole directory, having none or one that is not remembered.",
        )?;
        registry.register(Box::new(told_anew.clone()))?;
        Ok(Self {
            issued: vec("hauberk_authority_issued_total", "SVIDs issued, by kind of identity.", "kind")?,
            refused: vec(
                "hauberk_authority_refused_total",
                "Requests and handshakes refused, by reason.",
                "reason",
            )?,
            rotations: vec(
                "hauberk_authority_root_rotation_steps_total",
                "Steps of root rotations, by step (activated, retired).",
                "step",
            )?,
            revocations: gauge("hauberk_authority_revocations", "Revocations in force.")?,
            revocations_generation: gauge(
                "hauberk_authority_revocations_generation",
                "Generation of the list of revocations.",
            )?,
            generation: gauge("hauberk_authority_bundle_generation", "Generation of the trusted roots.")?,
            waited_for: gauge(
                "hauberk_authority_rotation_waits_for_nodes",
                "Nodes that keep the root's rotation from going on.",
            )?,
            behind: gauge(
                "hauberk_authority_state_is_old",
                "1 if an agent has applied newer roots than this authority's state has.",
            )?,
            queue: gauge("hauberk_authority_queue", "Requests that are worked on or wait for it.")?,
            queue_nodes: gauge("hauberk_authority_queue_nodes", "Nodes whose requests those are.")?,
            directory_streams: gauge(
                "hauberk_authority_directory_streams",
                "Agents that are told the directory now.",
            )?,
            directory_told_anew: told_anew,
            lately: Mutex::new(Lately { second: 0, counts: [0; RATE_OVER] }),
            registry,
        })
    }

    /// So many agents more, or fewer, are told the directory.
    pub(super) fn directory_streams(&self, more: i64) {
        self.directory_streams.add(more);
    }

    /// An agent is told the whole directory.
    pub(super) fn directory_told_anew(&self) {
        self.directory_told_anew.inc();
    }

    /// Counts an SVID.
    pub(super) fn issued(&self, kind: &str, now: SystemTime) {
        self.issued.with_label_values(&[kind]).inc();
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        lately.turn(seconds(now));
        let slot = (lately.second % RATE_OVER as u64) as usize;
        lately.counts[slot] += 1;
    }

    /// SVIDs issued since the start, and in the last minute.
    pub(super) fn issued_so_far(&self, now: SystemTime) -> (u64, u64) {
        let total =
            ["node", "workload"].iter().map(|kind| self.issued.with_label_values(&[kind]).get()).sum();
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        lately.turn(seconds(now));
        (total, lately.counts.iter().sum())
    }

    /// Counts a refusal; `reason` is one of a fixed set.
    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// Counts a step of a rotation.
    pub(super) fn rotated(&self, step: &'static str) {
        self.rotations.with_label_values(&[step]).inc();
    }

    /// Tells of the list in force.
    pub(super) fn revocations(&self, list: &Revocations) {
        self.revocations.set(whole(list.entries().len() as u64));
        self.revocations_generation.set(whole(list.generation()));
    }

    /// Tells of the roots in force, and how many nodes their rotation waits for.
    pub(super) fn trust(&self, generation: u64, waited_for: usize) {
        self.generation.set(whole(generation));
        self.waited_for.set(whole(waited_for as u64));
    }

    /// Tells whether an agent knows newer roots.
    pub(super) fn behind(&self, behind: bool) {
        self.behind.set(behind.into());
    }

    /// Tells how much waits to be signed, and of how many nodes.
    pub(super) fn queue(&self, requests: usize, nodes: usize) {
        self.queue.set(whole(requests as u64));
        self.queue_nodes.set(whole(nodes as u64));
    }

    /// As Prometheus reads it.
    pub(super) fn render(&self) -> Option<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather()).ok()
    }
}

fn whole(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_rate_is_of_the_last_minute() {
        let counters = Counters::new().unwrap();
        let now = SystemTime::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        for second in 0..90 {
            counters.issued("node", after(second));
        }
        counters.issued("workload", after(89));
        assert_eq!(counters.issued_so_far(after(89)), (91, 61));
        assert_eq!(counters.issued_so_far(after(119)), (91, 31));
        assert_eq!(counters.issued_so_far(after(100_000)), (91, 0));
        // The clock was a day ahead.
        counters.issued("node", after(200));
        assert_eq!(counters.issued_so_far(after(210)), (92, 1));
        assert_eq!(counters.issued_so_far(after(261)), (92, 0));
    }
}
