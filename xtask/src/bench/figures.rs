//! What is measured, and what was: a figure of a way has one value for each round.

use std::collections::BTreeMap;

/// What is measured of a way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Figure {
    Bulk1,
    Bulk8,
    Bulk1Cpu,
    Bulk8Cpu,
    BulkMachineCpu,
    OneP50,
    OneP99,
    Many,
    ManyP50,
    ManyP99,
    ManyCpu,
    New,
    NewCpu,
    NewFull,
    NewFullCpu,
    FirstCold,
    FirstConnected,
    Warm,
    Redial,
    IdleMb,
    OpenKib,
    MovedKib,
    PodKb,
    Failed,
}

/// How a figure is called, and which way is better.
pub(super) struct About {
    /// Its name in JSON.
    pub(super) key: &'static str,
    pub(super) label: &'static str,
    pub(super) unit: &'static str,
    pub(super) more_is_better: bool,
}

impl Figure {
    /// In the order they are shown.
    pub(super) const ALL: [Self; 24] = [
        Self::Bulk1,
        Self::Bulk8,
        Self::Bulk1Cpu,
        Self::Bulk8Cpu,
        Self::BulkMachineCpu,
        Self::OneP50,
        Self::OneP99,
        Self::Many,
        Self::ManyP50,
        Self::ManyP99,
        Self::ManyCpu,
        Self::New,
        Self::NewCpu,
        Self::NewFull,
        Self::NewFullCpu,
        Self::FirstCold,
        Self::FirstConnected,
        Self::Warm,
        Self::Redial,
        Self::IdleMb,
        Self::OpenKib,
        Self::MovedKib,
        Self::PodKb,
        Self::Failed,
    ];

    pub(super) fn about(self) -> About {
        let (key, label, unit, more_is_better) = match self {
            Self::Bulk1 => ("bulk1", "bulk, 1 stream", "MB/s", true),
            Self::Bulk8 => ("bulk8", "bulk, 8 streams", "MB/s", true),
            Self::Bulk1Cpu => ("bulk1Cpu", "CPU of the pair, 1 stream", "s/GB", false),
            Self::Bulk8Cpu => ("bulk8Cpu", "CPU of the pair, 8 streams", "s/GB", false),
            Self::BulkMachineCpu => ("bulkMachineCpu", "CPU of the whole machine, 1 stream", "s/GB", false),
            Self::OneP50 => ("request1P50", "request p50, 1 connection", "µs", false),
            Self::OneP99 => ("request1P99", "request p99, 1 connection", "µs", false),
            Self::Many => ("requests64", "requests, 64 connections", "/s", true),
            Self::ManyP50 => ("request64P50", "request p50, 64 connections", "µs", false),
            Self::ManyP99 => ("request64P99", "request p99, 64 connections", "µs", false),
            Self::ManyCpu => ("request64Cpu", "CPU of the pair for a request", "µs", false),
            Self::New => ("connections64", "a connection per request, 64 clients", "/s", true),
            Self::NewCpu => ("connectionCpu", "CPU of the pair for a connection", "µs", false),
            Self::NewFull => ("fullHandshakes64", "the same, a full handshake each", "/s", true),
            Self::NewFullCpu => ("fullHandshakeCpu", "CPU of the pair for one of those", "µs", false),
            Self::FirstCold => ("firstCold", "first request, freshly started", "ms", false),
            Self::FirstConnected => {
                ("firstConnected", "first request to another pod of a connected node", "ms", false)
            }
            Self::Warm => ("warm", "any later request on a new connection", "ms", false),
            Self::Redial => ("redial", "request after the tunnel was closed as idle", "ms", false),
            Self::IdleMb => ("idleMb", "memory of one proxy, idle", "MB", false),
            Self::OpenKib => ("openKib", "memory per open connection and side", "KiB", false),
            Self::MovedKib => ("movedKib", "the same, after 256 KiB each way", "KiB", false),
            Self::PodKb => ("podKb", "memory per enrolled pod", "kB", false),
            Self::Failed => ("failed", "failed requests", "", false),
        };
        About { key, label, unit, more_is_better }
    }

    /// Whether a share of the direct path says something: the direct path has this figure too, and
    /// more of it is better.
    pub(super) fn has_share(self) -> bool {
        self.about().more_is_better
    }
}

/// Every value of every figure, by way.
#[derive(Debug, Default)]
pub(super) struct Results(BTreeMap<(Figure, String), Vec<f64>>);

/// What the rounds came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Results {
    pub(super) fn add(&mut self, figure: Figure, way: &str, value: f64) {
        self.0.entry((figure, way.to_owned())).or_default().push(value);
    }

    /// One value for each time it was measured.
    pub(super) fn all(&self, figure: Figure, way: &str) -> &[f64] {
        self.0.get(&(figure, way.to_owned())).map_or(&[], Vec::as_slice)
    }

    pub(super) fn spread(&self, figure: Figure, way: &str) -> Option<Spread> {
        let mut sorted = self.all(figure, way).to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Spread { median: median(&sorted)?, min, max })
    }

    pub(super) fn median(&self, figure: Figure, way: &str) -> Option<f64> {
        self.spread(figure, way).map(|spread| spread.median)
    }

    /// A way's median as a share of the direct path's.
    pub(super) fn share(&self, figure: Figure, way: &str, direct: &str) -> Option<f64> {
        let share = self.median(figure, way)? / self.median(figure, direct)?;
        share.is_finite().then_some(share)
    }
}

/// The median, of values in any order.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = sorted[(sorted.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_the_middle_and_the_ends_of_the_rounds() {
        let mut results = Results::default();
        for value in [3.0, 1.0, 8.0, 2.0] {
            results.add(Figure::Many, "x", value);
        }
        results.add(Figure::Many, "direct", 5.0);
        let spread = Spread { median: 2.5, min: 1.0, max: 8.0 };
        assert_eq!(results.spread(Figure::Many, "x"), Some(spread));
        assert_eq!(results.share(Figure::Many, "x", "direct"), Some(0.5));
        assert_eq!(results.spread(Figure::Many, "y"), None, "what was not measured has no figure");
    }

    #[test]
    fn every_figure_is_shown_once_and_under_a_key_of_its_own() {
        let mut keys: Vec<_> = Figure::ALL.iter().map(|figure| figure.about().key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), Figure::ALL.len());
    }
}
