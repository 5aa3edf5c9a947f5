//! Bar charts as SVG, written by hand: panels under each other, each with its own axis, because each
//! has its own unit. Colours follow the reader's light or dark mode.

use std::fmt::Write as _;

use super::table::shown;

/// A picture.
#[derive(Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) panels: Vec<Panel>,
}

/// Bars of one unit.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) unit: &'static str,
    /// What each bar of a row is; one of them needs no name.
    pub(super) series: Vec<&'static str>,
    /// A name, and a bar for each of the series.
    pub(super) rows: Vec<(String, Vec<Option<f64>>)>,
}

const WIDTH: f64 = 760.0;
/// Where bars begin and the longest may end.
const LEFT: f64 = 190.0;
const RIGHT: f64 = 690.0;
const BAR: f64 = 14.0;
const GAP: f64 = 8.0;

const STYLE: &str = "<style>
  .paper { fill: #ffffff } text { fill: #1f2328; font: 12px sans-serif }
  .title { font-size: 16px; font-weight: 600 } .name { font-weight: 600 } .soft { fill: #59636e }
  .grid { stroke: #d1d9e0 } .s0 { fill: #0969da } .s1 { fill: #8ec1f5 }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #0d1117 } text { fill: #f0f6fc } .soft { fill: #9198a1 }
    .grid { stroke: #3d444d } .s0 { fill: #4493f8 } .s1 { fill: #1f4f8f }
  }
</style>\n";

/// Draws it.
pub(super) fn render(chart: &Chart) -> String {
    let mut body = String::new();
    let mut y = 52.0;
    for panel in &chart.panels {
        y = draw(panel, y, &mut body) + 28.0;
    }
    let title = escape(&chart.title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\" role=\"img\" aria-label=\"{title}\">\n\
         {STYLE}<rect class=\"paper\" width=\"{WIDTH}\" height=\"{y}\" rx=\"6\"/>\n\
         <text class=\"title\" x=\"16\" y=\"28\">{title}</text>\n{body}</svg>\n"
    )
}

/// Draws a panel below `top`; where it ends.
fn draw(panel: &Panel, top: f64, svg: &mut String) -> f64 {
    let most = panel.rows.iter().flat_map(|(_, bars)| bars).flatten().copied().fold(0.0, f64::max);
    let step = step(most);
    let end = (most / step).ceil().max(1.0) * step;
    let x = |value: f64| LEFT + value / end * (RIGHT - LEFT);
    let rows = panel.rows.len() as f64;
    let row_height = BAR * panel.series.len() as f64 + GAP;
    let bottom = top + 14.0 + rows * row_height;
    // Writing to a String cannot fail.
    let _ = writeln!(svg, "<text class=\"name\" x=\"16\" y=\"{top}\">{}</text>", escape(&panel.title));
    legend(panel, top, svg);
    for tick in 0..=(end / step).round() as u32 {
        let value = f64::from(tick) * step;
        let at = x(value);
        let unit = if value == end { format!(" {}", panel.unit) } else { String::new() };
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{bottom:.1}\"/>\
             <text class=\"soft\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}{unit}</text>",
            top + 8.0,
            bottom + 14.0,
            tick_text(value, step)
        );
    }
    for (number, (name, bars)) in panel.rows.iter().enumerate() {
        let y = top + 14.0 + number as f64 * row_height;
        let middle = y + (row_height - GAP) / 2.0 + 4.0;
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{middle:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            escape(name)
        );
        for (series, value) in bars.iter().enumerate() {
            let y = y + series as f64 * BAR;
            let to = x(value.unwrap_or(0.0));
            let _ = writeln!(
                svg,
                "<rect class=\"s{series}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                to - LEFT,
                BAR - 2.0,
                to + 5.0,
                y + BAR - 4.0,
                shown(*value)
            );
        }
    }
    bottom + 18.0
}

fn legend(panel: &Panel, y: f64, svg: &mut String) {
    if panel.series.len() < 2 {
        return;
    }
    for (number, name) in panel.series.iter().enumerate() {
        let x = RIGHT - 60.0 * (panel.series.len() - number) as f64;
        let _ = writeln!(
            svg,
            "<rect class=\"s{number}\" x=\"{x}\" y=\"{:.1}\" width=\"10\" height=\"10\"/><text x=\"{:.1}\" y=\"{y}\">{name}</text>",
            y - 9.0,
            x + 14.0
        );
    }
}

/// 1, 2 or 5 times a power of ten, so that an axis has at most six of them.
fn step(most: f64) -> f64 {
    if most <= 0.0 || !most.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf((most / 6.0).log10().floor());
    let fits = |step: &f64| most / step <= 6.0;
    [1.0, 2.0, 5.0].map(|digit| digit * power).into_iter().find(fits).unwrap_or(10.0 * power)
}

/// As many decimals as the steps between ticks have.
fn tick_text(value: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    format!("{value:.decimals$}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_few_round_ticks_that_reach_over_the_longest_bar() {
        for (most, expected) in
            [(0.0, 1.0), (5.9, 1.0), (7.0, 2.0), (1300.0, 500.0), (0.44, 0.1), (60.1, 20.0)]
        {
            let step = step(most);
            assert!((step - expected).abs() < 1e-9, "the step up to {most} is {step}");
        }
        assert_eq!((tick_text(0.4, 0.1), tick_text(500.0, 500.0)), ("0.4".into(), "500".into()));
    }

    #[test]
    fn a_chart_shows_every_name_and_value_and_no_markup_of_theirs() {
        let rows =
            vec![("a<b".to_owned(), vec![Some(5.0), Some(9.5)]), ("c".to_owned(), vec![None, Some(1.0)])];
        let panel = Panel { title: "p & q".into(), unit: "ms", series: vec!["p50", "p99"], rows };
        let svg = render(&Chart { title: "latency".into(), panels: vec![panel] });
        for part in ["a&lt;b", "p &amp; q", ">9.50<", ">–<", " ms<", "p99", "prefers-color-scheme: dark"] {
            assert!(svg.contains(part), "{part} is missing in {svg}");
        }
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
