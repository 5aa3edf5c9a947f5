//! How the local workloads stand, for readiness and the operator.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How a local workload stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Served, and closed to what its mode forbids.
    Enrolled,
    /// There is nothing to enrol yet: its sandbox is still to come.
    Waiting(String),
    /// Should be enrolled and is not, or not wholly: why.
    Failed(String),
}

impl Standing {
    /// Why it is not served, if it should be.
    pub fn fault(&self) -> Option<&str> {
        match self {
            Self::Failed(reason) => Some(reason),
            Self::Enrolled | Self::Waiting(_) => None,
        }
    }
}

/// How each local workload stands, by `namespace/name`.
#[derive(Debug, Default)]
pub struct Status {
    standing: Mutex<BTreeMap<String, Standing>>,
    repairs: AtomicU64,
}

impl Status {
    /// The state as of now.
    pub fn now(&self) -> BTreeMap<String, Standing> {
        self.lock().clone()
    }

    /// Takes note of how one stands; how it stood before.
    pub(super) fn note(&self, name: &str, standing: Standing) -> Option<Standing> {
        self.lock().insert(name.into(), standing)
    }

    /// Forgets all but some.
    pub(super) fn retain(&self, keep: impl Fn(&str) -> bool) {
        self.lock().retain(|name, _| keep(name));
    }

    /// Whether one stands so.
    pub(super) fn any(&self, is_so: impl Fn(&Standing) -> bool) -> bool {
        self.lock().values().any(is_so)
    }

    /// Whether this one is where it should be.
    pub(super) fn has_failed(&self, name: &str) -> bool {
        self.lock().get(name).is_some_and(|standing| standing.fault().is_some())
    }

    /// Takes note that something was put back in place.
    pub(super) fn repaired(&self) {
        self.repairs.fetch_add(1, Ordering::Relaxed);
    }

    /// As metrics.
    pub fn render(&self) -> String {
        let failed = self.lock().values().filter(|standing| standing.fault().is_some()).count();
        let repairs = self.repairs.load(Ordering::Relaxed);
        format!(
            "# HELP hauberk_pods_failed Pods that are not enrolled, or whose capture could not be verified.\n\
             # TYPE hauberk_pods_failed gauge\nhauberk_pods_failed {failed}\n\
             # HELP hauberk_capture_repairs_total What was found missing of the capture and put back.\n\
             # TYPE hauberk_capture_repairs_total counter\nhauberk_capture_repairs_total {repairs}\n"
        )
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Standing>> {
        // Entries are whole at every instant.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
