//! What came of asking for SVIDs, when what is held ends and how long it would outlive the issuer, which roots
//! hold, and how CRLs stand.

use std::time::Duration;

use prometheus::{Gauge, GaugeVec, IntCounter, IntGauge, Opts, Registry};

use super::{counters, register, unix};
use crate::trust::Snapshot;
use crate::verdict::{Issuance as Outcome, IssuerKind};

/// How long the SVID that ends first is still valid, and what was asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Margin {
    /// Of the SVID that ends first; `None` while none is held.
    pub left: Option<Duration>,
    /// `availabilityTargetSeconds`.
    pub target: Option<Duration>,
    /// Whether some SVID has less life left than the target.
    pub at_risk: bool,
}

pub(in crate::telemetry) struct Issuance {
    /// `[issuer][outcome]`.
    asked: Vec<IntCounter>,
    left: Gauge,
    target: Gauge,
    at_risk: IntGauge,
    /// By class of identity.
    first_end: GaugeVec,
    roots: IntGauge,
    crls: IntGauge,
    crls_unusable: IntGauge,
}

const CLASSES: [&str; 2] = ["node", "workload"];

impl Issuance {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        let asked = counters(
            registry,
            "hauberk_svid_requests_total",
            "SVIDs asked for, by issuer and what came of it.",
            &["issuer", "outcome"],
        )?;
        let gauge = |name, help| register(registry, Gauge::new(name, help)?);
        let mut all = Vec::new();
        for issuer in IssuerKind::ALL {
            let each = Outcome::ALL.iter().map(|o| asked.with_label_values(&[issuer.as_str(), o.as_str()]));
            all.extend(each);
        }
        Ok(Self {
            asked: all,
            left: gauge(
                "hauberk_outage_margin_seconds",
                "How long the SVID that ends first is still valid: the outage of the issuer that would be outlived.",
            )?,
            target: gauge(
                "hauberk_availability_target_seconds",
                "The outage of the issuer that shall be outlived; 0 when none was configured.",
            )?,
            at_risk: register(
                registry,
                IntGauge::new(
                    "hauberk_availability_at_risk",
                    "1 while an SVID has less life left than the availability target.",
                )?,
            )?,
            first_end: register(
                registry,
                GaugeVec::new(
                    Opts::new(
                        "hauberk_svid_first_expiry_timestamp_seconds",
                        "When the SVID ends that ends first, by class of identity (node, workload); none held: absent.",
                    ),
                    &["class"],
                )?,
            )?,
            roots: register(
                registry,
                IntGauge::new(
                    "hauberk_bundle_generation",
                    "Generation of the authority's roots that are applied; 0 with roots of another source.",
                )?,
            )?,
            crls: register(registry, IntGauge::new("hauberk_crls", "CRLs that are configured.")?)?,
            crls_unusable: register(
                registry,
                IntGauge::new(
                    "hauberk_crls_unusable",
                    "CRLs whose file cannot be used now, or that cannot be answered by any more.",
                )?,
            )?,
        })
    }

    pub(in crate::telemetry) fn asked(&self, issuer: IssuerKind, outcome: Outcome) {
        self.asked[issuer as usize * Outcome::ALL.len() + outcome as usize].inc();
    }

    pub(super) fn set(&self, margin: Margin, trust: &Snapshot) {
        self.first_end.reset();
        for class in CLASSES {
            let of_class = trust.svids.iter().filter(|(id, _)| id.node_name().is_some() == (class == "node"));
            if let Some(end) = of_class.map(|(_, svid)| svid.leaf().not_after).min() {
                self.first_end.with_label_values(&[class]).set(unix(end));
            }
        }
        self.roots.set(i64::try_from(trust.bundle.generation()).unwrap_or(i64::MAX));
        let crls = trust.bundle.crls();
        let unusable =
            crls.0.iter().filter(|listed| listed.unknown.is_some() || listed.fault.is_some()).count();
        self.crls.set(i64::try_from(crls.0.len()).unwrap_or(i64::MAX));
        self.crls_unusable.set(i64::try_from(unusable).unwrap_or(i64::MAX));
        self.left.set(margin.left.unwrap_or_default().as_secs_f64());
        self.target.set(margin.target.unwrap_or_default().as_secs_f64());
        self.at_risk.set(margin.at_risk.into());
    }
}
