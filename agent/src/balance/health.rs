//! What the agent knows of one endpoint: its connections, and whether it is in use.
//!
//! Every thread and every service with that endpoint share one. As long as nothing speaks against
//! the endpoint, two atomics are all that is touched; the lock is only for one in trouble.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ejection::{Ejection, Probe, Standing};
use crate::telemetry::Observe;

/// One endpoint's health.
pub(super) struct Health {
    outstanding: AtomicUsize,
    /// Whether `ejection` has anything to say; changed only under its lock.
    troubled: AtomicBool,
    ejection: Mutex<Ejection>,
    observe: Observe,
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").field("outstanding", &self.outstanding).finish_non_exhaustive()
    }
}

impl Health {
    pub(super) fn new(observe: Observe) -> Self {
        Self {
            outstanding: AtomicUsize::new(0),
            troubled: AtomicBool::new(false),
            ejection: Mutex::default(),
            observe,
        }
    }

    /// Connections of this agent to it.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Relaxed)
    }

    pub(super) fn begin(&self) {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self) {
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn standing(&self, now: Instant) -> Standing {
        if self.troubled.load(Ordering::Relaxed) { self.lock().standing(now) } else { Standing::Trusted }
    }

    pub(super) fn is_out(&self) -> bool {
        self.troubled.load(Ordering::Relaxed) && self.lock().is_out()
    }

    pub(super) fn probe(&self, now: Instant) -> Option<Probe> {
        self.lock().probe(now)
    }

    pub(super) fn abandoned(&self, probe: Probe) {
        self.lock().abandoned(probe);
    }

    /// See [`Ejection::succeeded`].
    pub(super) fn succeeded(&self, now: Instant) -> bool {
        let mut ejection = self.lock();
        let back = ejection.succeeded(now);
        self.troubled.store(false, Ordering::Relaxed);
        if back {
            self.observe.readmitted();
        }
        back
    }

    /// See [`Ejection::failed`].
    pub(super) fn failed(&self, probe: Option<Probe>, now: Instant, may_eject: bool) -> Option<Duration> {
        let mut ejection = self.lock();
        let was_out = ejection.is_out();
        let backoff = ejection.failed(probe, now, may_eject, fastrand::f64());
        self.troubled.store(true, Ordering::Relaxed);
        if backoff.is_some() && !was_out {
            self.observe.ejected();
        }
        backoff
    }

    fn lock(&self) -> MutexGuard<'_, Ejection> {
        // Every change under the lock is whole.
        self.ejection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        if self.is_out() {
            self.observe.readmitted();
        }
    }
}
