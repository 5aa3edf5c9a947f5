//! The report's pictures: throughput, latency, CPU.

use super::field::label;
use super::figures::{Figure, Results};
use super::svg::{Chart, Panel, render};

/// File names and contents.
pub(super) fn all(ways: &[String], results: &Results) -> Vec<(&'static str, String)> {
    let throughput = [Figure::Bulk1, Figure::Bulk8, Figure::Many, Figure::New, Figure::NewFull];
    let cpu = [Figure::Bulk1Cpu, Figure::Bulk8Cpu, Figure::ManyCpu, Figure::NewCpu, Figure::NewFullCpu];
    let latency = [
        ("request, 1 connection", Figure::OneP50, Figure::OneP99),
        ("request, 64 connections", Figure::ManyP50, Figure::ManyP99),
    ];
    let single = |figures: [Figure; 5]| {
        let panel = |figure: &Figure| panel(figure.about().label, &[("", *figure)], ways, results);
        figures.iter().filter_map(panel).collect()
    };
    let double = |(title, p50, p99)| panel(title, &[("p50", p50), ("p99", p99)], ways, results);
    let latency = latency.into_iter().filter_map(double).collect();
    [
        ("throughput.svg", "Throughput (more is better)", single(throughput)),
        ("latency.svg", "Latency (less is better)", latency),
        ("cpu.svg", "CPU of the pair of proxies (less is better)", single(cpu)),
    ]
    .into_iter()
    .map(|(file, title, panels)| (file, render(&Chart { title: title.into(), panels })))
    .collect()
}

/// The ways that have the figures; nothing when none has.
fn panel(
    title: &str,
    series: &[(&'static str, Figure)],
    ways: &[String],
    results: &Results,
) -> Option<Panel> {
    let row = |way: &String| {
        let bars: Vec<_> = series.iter().map(|(_, figure)| results.median(*figure, way)).collect();
        bars.iter().any(Option::is_some).then(|| (label(way).to_owned(), bars))
    };
    let rows: Vec<_> = ways.iter().filter_map(row).collect();
    let unit = series.first()?.1.about().unit;
    let series = series.iter().map(|(name, _)| *name).collect();
    (!rows.is_empty()).then(|| Panel { title: title.into(), unit, series, rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_show_the_ways_that_were_measured_and_leave_out_what_nobody_was() {
        let mut results = Results::default();
        results.add(Figure::Bulk1, "hauberk", 512.0);
        results.add(Figure::OneP50, "nginx", 77.0);
        results.add(Figure::OneP99, "nginx", 99.0);
        let plots = all(&["hauberk".into(), "nginx".into()], &results);
        let names: Vec<_> = plots.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["throughput.svg", "latency.svg", "cpu.svg"]);
        assert!(plots[0].1.contains("Hauberk, node scope") && !plots[0].1.contains("nginx pair"));
        assert!(plots[0].1.contains("bulk, 1 stream") && !plots[0].1.contains("bulk, 8 streams"));
        assert!(plots[1].1.contains(">77.0<") && plots[1].1.contains(">99.0<"));
    }
}
