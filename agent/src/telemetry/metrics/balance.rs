//! What the balancer counts.

use prometheus::{IntCounter, IntGauge, Registry};

use super::{counters, register};
use crate::verdict::Locality;

/// Picks, retries and ejections of services' endpoints.
pub(in crate::telemetry) struct Balance {
    /// By [`Locality`].
    picks: Vec<IntCounter>,
    retries: IntCounter,
    ejections: IntCounter,
    out: IntGauge,
}

impl Balance {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let picks = counters(
            registry,
            "hauberk_balance_picks_total",
            "Endpoints picked for connections to services, by how near they are; retries too.",
            &["locality"],
        )?;
        let retries = IntCounter::new(
            "hauberk_balance_retries_total",
            "Connections to services tried at another endpoint, before anything was sent.",
        )?;
        let ejections = IntCounter::new(
            "hauberk_balance_ejections_total",
            "Endpoints taken out of use after failures in a row.",
        )?;
        let out = IntGauge::new("hauberk_balance_ejected", "Endpoints out of use now.")?;
        Ok(Self {
            picks: Locality::ALL.iter().map(|l| picks.with_label_values(&[l.as_str()])).collect(),
            retries: register(registry, retries)?,
            ejections: register(registry, ejections)?,
            out: register(registry, out)?,
        })
    }

    pub(in crate::telemetry) fn picked(&self, locality: Locality, again: bool) {
        self.picks[locality as usize].inc();
        if again {
            self.retries.inc();
        }
    }

    pub(in crate::telemetry) fn ejected(&self) {
        self.ejections.inc();
        self.out.inc();
    }

    pub(in crate::telemetry) fn readmitted(&self) {
        self.out.dec();
    }
}
