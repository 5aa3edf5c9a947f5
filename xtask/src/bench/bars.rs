//! What node scope has to reach, from the issue on scale: each bar with its figure, and the rows in
//! which another proxy is ahead.

use super::field::{DIRECT, HAUBERK, is_peer};
use super::figures::{Figure, Results};
use super::handshakes::Handshakes;
use super::memory::Memory;
use super::table::shown;

/// A bar.
#[derive(Debug)]
pub(super) struct Bar {
    pub(super) what: String,
    pub(super) figure: Option<f64>,
    pub(super) limit: f64,
    /// Whether the figure may not be less, or not be more.
    pub(super) at_least: bool,
    pub(super) unit: &'static str,
}

impl Bar {
    /// Nothing, when it was not measured.
    pub(super) fn reached(&self) -> Option<bool> {
        let at_least = self.at_least;
        self.figure.map(|figure| if at_least { figure >= self.limit } else { figure <= self.limit })
    }

    /// The outcome in words.
    pub(super) fn outcome(&self) -> &'static str {
        match self.reached() {
            Some(true) => "reached",
            Some(false) => "NOT reached",
            None => "not measured",
        }
    }

    /// The bar and the figure in words.
    pub(super) fn words(&self) -> [String; 2] {
        let bound = if self.at_least { "at least" } else { "at most" };
        let with_unit = |text: String| format!("{text} {}", self.unit).trim().to_owned();
        let limit = format!("{bound} {}", with_unit(shown(Some(self.limit))));
        [limit, with_unit(shown(self.figure))]
    }
}

/// Every bar, in the order of the issue.
pub(super) fn all(results: &Results, handshakes: &Handshakes, memory: &Memory) -> Vec<Bar> {
    let share = |figure| results.share(figure, HAUBERK, DIRECT);
    let of = |figure| results.median(figure, HAUBERK);
    let both = |one: Option<f64>, other: Option<f64>| Some(one? - other?);
    let p99 = of(Figure::ManyP99).zip(of(Figure::ManyP50)).map(|(p99, p50)| p99 / p50);
    let worst_cpu = of(Figure::Bulk1Cpu).zip(of(Figure::Bulk8Cpu)).map(|(one, eight)| one.max(eight));
    let flat = memory.churn.first().zip(memory.churn.last()).map(|(warm, end)| end.1 - warm.1);
    let failed = results.spread(Figure::Failed, HAUBERK).map(|spread| spread.max);
    let stalled = memory.stalled.as_ref();
    let churned = match (memory.churn.first(), memory.churn.last()) {
        (Some((warm, _)), Some((end, _))) => format!("from connection {warm} to {end}, opened and closed"),
        _ => "over connections opened and closed".into(),
    };
    let readers = stalled.map_or_else(String::new, |stalled| format!("{} ", stalled.readers));
    let least =
        |what: &str, figure, limit| Bar { what: what.into(), figure, limit, at_least: true, unit: "" };
    let most =
        |what: &str, figure, limit, unit| Bar { what: what.into(), figure, limit, at_least: false, unit };
    vec![
        least("bulk, 1 stream: share of direct", share(Figure::Bulk1), 0.48),
        least("bulk, 8 streams: share of direct", share(Figure::Bulk8), 0.48),
        most("bulk: CPU of the pair, the worse of 1 and 8 streams", worst_cpu, 0.55, "s/GB"),
        least("requests, 64 connections: share of direct", share(Figure::Many), 0.50),
        most("requests: CPU of the pair", of(Figure::ManyCpu), 28.0, "µs"),
        most("requests: p99 in p50s", p99, 2.0, ""),
        least("a connection per request: share of direct", share(Figure::New), 0.55),
        most("a connection per request: CPU of the pair", of(Figure::NewCpu), 125.0, "µs"),
        most("first request, freshly started agents", of(Figure::FirstCold), 1.2, "ms"),
        most(
            "first request to another pod of a connected node, beyond a warm one",
            both(of(Figure::FirstConnected), of(Figure::Warm)),
            0.3,
            "ms",
        ),
        most("memory, idle", of(Figure::IdleMb), 20.0, "MB"),
        most("memory per open idle stream and side", of(Figure::OpenKib), 5.0, "KiB"),
        most("the same, after it moved data", of(Figure::MovedKib), 5.0, "KiB"),
        most("memory per enrolled pod", of(Figure::PodKb), 40.0, "kB"),
        most(&format!("growth of both agents {churned}"), flat, memory.may_grow_mb(), "MB"),
        most(
            &format!("growth of both agents for {readers}stalled readers"),
            stalled.map(|s| s.grown_mb),
            stalled.map_or(0.0, |s| s.bound_mb),
            "MB",
        ),
        least("full handshakes: share of bare rustls", handshakes.full.share(), 0.85),
        least("resumed handshakes: share of bare rustls", handshakes.resumed.share(), 0.85),
        most("failed requests, in the worst run", failed, 0.0, ""),
    ]
}

/// A row in which another proxy is ahead of node scope.
#[derive(Debug, PartialEq)]
pub(super) struct Behind {
    pub(super) figure: Figure,
    pub(super) peer: String,
    pub(super) ours: f64,
    pub(super) theirs: f64,
}

impl Behind {
    pub(super) fn words(&self) -> String {
        let about = self.figure.about();
        let by = if about.more_is_better { self.theirs / self.ours } else { self.ours / self.theirs };
        format!(
            "{}: {} {unit} against {}'s {} {unit} ({by:.2} times)",
            about.label,
            shown(Some(self.ours)),
            super::field::label(&self.peer),
            shown(Some(self.theirs)),
            unit = about.unit
        )
    }
}

/// Every such row.
pub(super) fn behind(ways: &[String], results: &Results) -> Vec<Behind> {
    let mut behind = Vec::new();
    for figure in Figure::ALL {
        for peer in ways.iter().filter(|way| is_peer(way)) {
            let (Some(ours), Some(theirs)) = (results.median(figure, HAUBERK), results.median(figure, peer))
            else {
                continue;
            };
            if (figure.about().more_is_better && theirs > ours)
                || (!figure.about().more_is_better && theirs < ours)
            {
                behind.push(Behind { figure, peer: peer.clone(), ours, theirs });
            }
        }
    }
    behind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_reached_at_its_limit_and_not_reached_without_a_figure() {
        let mut bar = Bar { what: "x".into(), figure: Some(0.48), limit: 0.48, at_least: true, unit: "" };
        assert_eq!(bar.reached(), Some(true));
        bar.at_least = false;
        bar.figure = Some(0.49);
        assert_eq!((bar.reached(), bar.outcome()), (Some(false), "NOT reached"));
        bar.figure = None;
        assert_eq!((bar.reached(), bar.outcome()), (None, "not measured"));
    }

    #[test]
    fn bars_are_measured_against_node_scope_and_the_direct_path() {
        let mut results = Results::default();
        for (way, bulk) in [(DIRECT, 1000.0), (HAUBERK, 479.0), ("hauberk-workload", 900.0)] {
            results.add(Figure::Bulk1, way, bulk);
        }
        results.add(Figure::FirstConnected, HAUBERK, 0.7);
        results.add(Figure::Warm, HAUBERK, 0.5);
        let bars = all(&results, &Handshakes::default(), &Memory::default());
        assert_eq!(bars[0].reached(), Some(false));
        assert_eq!(bars[9].reached(), Some(true), "0.2 ms beyond a warm one");
        assert!(bars[1].reached().is_none());
    }

    #[test]
    fn a_peer_that_is_ahead_is_named_whichever_way_is_better() {
        let mut results = Results::default();
        for (figure, ours, theirs) in
            [(Figure::Bulk1, 10.0, 20.0), (Figure::OneP50, 10.0, 20.0), (Figure::ManyCpu, 20.0, 10.0)]
        {
            results.add(figure, HAUBERK, ours);
            results.add(figure, "nginx", theirs);
            results.add(figure, DIRECT, if figure == Figure::Bulk1 { 99.0 } else { 1.0 });
        }
        let ways = [DIRECT, HAUBERK, "nginx"].map(str::to_owned);
        let seen: Vec<_> = behind(&ways, &results).iter().map(|b| b.figure).collect();
        assert_eq!(seen, [Figure::Bulk1, Figure::ManyCpu]);
        let words = behind(&ways, &results)[1].words();
        assert_eq!(words, "CPU of the pair for a request: 20.0 µs against nginx pair's 10.0 µs (2.00 times)");
    }
}
