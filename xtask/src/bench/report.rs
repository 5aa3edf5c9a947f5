//! What was found, as text, as JSON, as Markdown; and where the report is kept.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::bars::{self, Bar, Behind};
use super::field::{
    DIRECT, DIRECT_SAME_NODE, NOT_RESUMING, RESUMING, SAME_NODE, SAME_NODE_FIGURES, is_column, label,
};
use super::figures::{Figure, Results, median};
use super::handshakes::{Handshakes, Rates};
use super::machine::Machine;
use super::memory::Memory;
use super::restart::Restart;
use super::table::{Table, shown};
use super::{cpu, plots};

/// Everything that one run found.
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) seconds: u64,
    pub(super) ways: Vec<String>,
    pub(super) results: Results,
    pub(super) handshakes: Handshakes,
    pub(super) restart: Restart,
    pub(super) memory: Memory,
    pub(super) rounds: Vec<RoundNoise>,
    /// What makes figures less comparable than one might think.
    pub(super) warnings: Vec<String>,
}

/// What others did to a round.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundNoise {
    /// Cores used by others right before it.
    pub(super) others: f64,
    /// Seconds that the hypervisor took away during it.
    pub(super) stolen: f64,
}

impl RoundNoise {
    /// Looks before a round; the answer says what happened until it is asked again.
    pub(super) fn before() -> Result<impl FnOnce() -> Result<Self>> {
        let (others, stolen) = (cpu::others()?, cpu::Machine::now()?.stolen);
        Ok(move || Ok(Self { others, stolen: cpu::Machine::now()?.stolen - stolen }))
    }
}

/// From so many rounds on, medians are what the bars are meant for.
const ENOUGH_ROUNDS: usize = 5;
/// Cores that others may use without more than noise.
const BUSY: f64 = 0.25;

/// Where README shows the report.
const BEGIN: &str = "<!-- bench:begin -->";
const END: &str = "<!-- bench:end -->";

impl Report {
    fn bars(&self) -> Vec<Bar> {
        bars::all(&self.results, &self.handshakes, &self.memory)
    }

    fn columns(&self) -> Vec<String> {
        self.ways.iter().filter(|way| is_column(way)).cloned().collect()
    }

    fn behind(&self) -> Vec<Behind> {
        bars::behind(&self.columns(), &self.results)
    }

    /// For a terminal.
    pub(super) fn text(&self) -> String {
        let mut text = format!("\n{}\n", self.comparison().text());
        text += &format!("{}\n", self.same_node().text());
        if let Some(table) = self.restart.table() {
            text += &format!("{}\n{}\n", self.restart.title(), table.text());
        }
        text += &format!("{}\n", self.bars_table().text());
        let lines =
            [self.sentences(), self.behind_lines(), self.noise_lines(), self.warnings.clone()].concat();
        text + &lines.iter().map(|line| format!("{line}\n")).collect::<String>()
    }

    /// For `bench/report.md`, and for README with the pictures.
    pub(super) fn markdown(&self) -> String {
        let list = |lines: Vec<String>| lines.iter().map(|line| format!("- {line}\n")).collect::<String>();
        let behind = self.behind_lines();
        let ahead = "Node scope is ahead of both pairs in every row.\n".to_owned();
        format!(
            "{}\n\n{}\nIn brackets: the share of the direct path. Within one node:\n\n{}\n{}The bars for node scope:\n\n{}\n{}\n{}\n{}",
            self.preamble(),
            self.comparison().markdown(),
            self.same_node().markdown(),
            self.restart.table().map_or_else(String::new, |table| {
                format!("{}\n\n{}\n", self.restart.title(), table.markdown())
            }),
            self.bars_table().markdown(),
            list(self.sentences()),
            if behind.is_empty() {
                ahead
            } else {
                format!("Where another proxy is ahead:\n\n{}", list(behind))
            },
            list([self.noise_lines(), self.warnings.clone()].concat()),
        )
    }

    fn preamble(&self) -> String {
        format!(
            "Medians; rounds: {}, of {} s for each figure, every way in turn; reno in every namespace. {}.",
            self.rounds.len(),
            self.seconds,
            self.machine.words()
        )
    }

    fn comparison(&self) -> Table {
        let columns = self.columns();
        self.table(&Figure::ALL, &columns, DIRECT)
    }

    fn same_node(&self) -> Table {
        self.table(&SAME_NODE_FIGURES, &[DIRECT_SAME_NODE.into(), SAME_NODE.into()], DIRECT_SAME_NODE)
    }

    /// Medians; rows that no way has are left out.
    fn table(&self, figures: &[Figure], ways: &[String], direct: &str) -> Table {
        let mut table = Table::default();
        table.head.push("median".into());
        table.head.extend(ways.iter().map(|way| label(way).to_owned()));
        for figure in figures {
            let about = figure.about();
            let cell = |way: &String| {
                let value = shown(self.results.median(*figure, way));
                let share = self.results.share(*figure, way, direct);
                match share.filter(|_| figure.has_share() && way != direct) {
                    Some(share) => format!("{value} ({share:.2})"),
                    None => value,
                }
            };
            if ways.iter().any(|way| !self.results.all(*figure, way).is_empty()) {
                let mut row = vec![format!("{} {}", about.label, about.unit).trim().to_owned()];
                row.extend(ways.iter().map(cell));
                table.rows.push(row);
            }
        }
        table
    }

    fn bars_table(&self) -> Table {
        let head = ["bar", "limit", "figure", "outcome"].map(str::to_owned).to_vec();
        let row = |bar: &Bar| {
            let [limit, figure] = bar.words();
            vec![bar.what.clone(), limit, figure, bar.outcome().to_owned()]
        };
        Table { head, rows: self.bars().iter().map(row).collect() }
    }

    /// What is no row of a table.
    fn sentences(&self) -> Vec<String> {
        let rates = |kind: &str, rates: &Rates| {
            let [bare, hauberk] = [&rates.bare, &rates.hauberk].map(|all| shown(median(all)));
            format!("{kind} handshakes accepted per second per core: {hauberk}, bare rustls {bare}")
        };
        let mut lines =
            vec![rates("full", &self.handshakes.full), rates("resumed", &self.handshakes.resumed)];
        let redial = |way| self.results.median(Figure::Redial, way);
        let off = match redial(NOT_RESUMING) {
            Some(off) => format!("{} ms without resumption", shown(Some(off))),
            None => "the agent has no tunnel.resumption to compare with".into(),
        };
        lines.push(format!(
            "first request after the tunnel was closed as idle: {} ms; {off}",
            shown(redial(RESUMING))
        ));
        let left_out = self.memory.left_out.iter().map(|what| format!("not measured: {what}"));
        lines.extend(left_out);
        lines
    }

    fn behind_lines(&self) -> Vec<String> {
        self.behind().iter().map(|behind| format!("behind in {}", behind.words())).collect()
    }

    /// What others did, and what makes these figures weaker than they look.
    fn noise_lines(&self) -> Vec<String> {
        let list = |of: fn(&RoundNoise) -> f64| {
            self.rounds.iter().map(|r| format!("{:.2}", of(r))).collect::<Vec<_>>().join(", ")
        };
        let mut lines = vec![format!(
            "used by others before each round: {} cores; taken by the hypervisor during each: {} s",
            list(|round| round.others),
            list(|round| round.stolen)
        )];
        if self.rounds.len() < ENOUGH_ROUNDS {
            lines.push(format!("the bars are meant for medians of at least {ENOUGH_ROUNDS} rounds"));
        }
        if self.rounds.iter().any(|round| round.others > BUSY) {
            lines.push("others were using the machine: not even shares mean much".into());
        }
        lines
    }

    pub(super) fn json(&self) -> Value {
        let figure = |figure: &Figure| {
            let about = figure.about();
            let of = |way: &String| {
                let spread = self.results.spread(*figure, way)?;
                let all = self.results.all(*figure, way);
                let value = json!({"median": spread.median, "min": spread.min, "max": spread.max, "all": all,
                    "shareOfDirect": self.results.share(*figure, way, DIRECT)});
                Some((way.clone(), value))
            };
            let values: serde_json::Map<String, Value> = self.ways.iter().filter_map(of).collect();
            json!({"key": about.key, "label": about.label, "unit": about.unit,
                "moreIsBetter": about.more_is_better, "ways": values})
        };
        let bar = |bar: &Bar| {
            json!({"bar": bar.what, "limit": bar.limit, "atLeast": bar.at_least, "unit": bar.unit,
                "figure": bar.figure, "reached": bar.reached()})
        };
        let behind = |behind: &Behind| {
            json!({"figure": behind.figure.about().key, "peer": behind.peer,
                "hauberk": behind.ours, "theirs": behind.theirs})
        };
        let rates = |rates: &Rates| json!({"bare": rates.bare, "hauberk": rates.hauberk});
        let churn: Vec<Value> =
            self.memory.churn.iter().map(|(count, mb)| json!({"connections": count, "mb": mb})).collect();
        let stalled = self.memory.stalled.as_ref();
        json!({
            "machine": self.machine.json(),
            "secondsEach": self.seconds,
            "rounds": self.rounds.iter().map(|round| json!({
                "coresUsedByOthersBefore": round.others, "secondsStolenDuring": round.stolen,
            })).collect::<Vec<_>>(),
            "figures": Figure::ALL.iter().map(figure).collect::<Vec<_>>(),
            "handshakesPerSecondPerCore": {
                "full": rates(&self.handshakes.full), "resumed": rates(&self.handshakes.resumed),
            },
            "rollingRestart": self.restart.json(),
            "memory": {
                "churn": churn,
                "stalled": stalled.map(|s| json!({
                    "readers": s.readers, "grownMb": s.grown_mb, "boundMb": s.bound_mb,
                })),
                "leftOut": self.memory.left_out,
            },
            "bars": self.bars().iter().map(bar).collect::<Vec<_>>(),
            "behind": self.behind().iter().map(behind).collect::<Vec<_>>(),
            "warnings": self.warnings,
        })
    }

    /// Writes `bench/` and README's part of it.
    pub(super) fn keep(&self, root: &Path) -> Result<()> {
        let dir = root.join("bench");
        fs::create_dir_all(&dir)?;
        let markdown = self.markdown();
        fs::write(dir.join("report.json"), format!("{:#}\n", self.json()))?;
        fs::write(dir.join("report.md"), &markdown)?;
        let plots = plots::all(&self.columns(), &self.results);
        let mut shown = markdown;
        for (file, svg) in plots {
            fs::write(dir.join(file), svg)?;
            shown += &format!("\n![{}](bench/{file})\n", file.trim_end_matches(".svg"));
        }
        let readme = root.join("README.md");
        let text = fs::read_to_string(&readme)?;
        Ok(fs::write(&readme, splice(&text, &shown).context("README.md")?)?)
    }
}

/// Puts the report between README's marks.
fn splice(readme: &str, report: &str) -> Result<String> {
    let (before, rest) = readme.split_once(BEGIN).with_context(|| format!("it has no {BEGIN}"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("it has no {END} after {BEGIN}"))?;
    Ok(format!("{before}{BEGIN}\n{}\n{END}{after}", report.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::super::field::HAUBERK;
    use super::*;

    fn report() -> Report {
        let mut results = Results::default();
        for value in [1.0, 3.0, 2.0] {
            results.add(Figure::Bulk1, DIRECT, value * 1000.0);
            results.add(Figure::Bulk1, HAUBERK, value * 500.0);
            results.add(Figure::Bulk1, "nginx", value * 600.0);
        }
        Report {
            machine: Machine::default(),
            seconds: 3,
            ways: [DIRECT, HAUBERK, "nginx", DIRECT_SAME_NODE].map(str::to_owned).to_vec(),
            results,
            handshakes: Handshakes::default(),
            restart: Restart::default(),
            memory: Memory::default(),
            rounds: vec![RoundNoise { others: 0.25, stolen: 0.0 }],
            warnings: vec!["a warning".into()],
        }
    }

    #[test]
    fn every_form_says_the_same() {
        let report = report();
        let json = report.json();
        let hauberk = &json["figures"][0]["ways"][HAUBERK];
        assert_eq!((&hauberk["median"], &hauberk["shareOfDirect"]), (&json!(1000.0), &json!(0.5)));
        assert_eq!((&hauberk["min"], &hauberk["max"]), (&json!(500.0), &json!(1500.0)));
        assert_eq!(json["bars"][0]["reached"], json!(true));
        assert_eq!(json["behind"][0]["peer"], json!("nginx"));
        for text in [report.text(), report.markdown()] {
            assert!(text.contains("1000 (0.50)") && text.contains("1200 (0.60)"), "{text}");
            assert!(text.contains("behind in bulk, 1 stream: 1000 MB/s against nginx pair's 1200 MB/s"));
            assert!(text.contains("0.25") && text.contains("a warning") && text.contains("not measured"));
        }
    }

    #[test]
    fn what_is_kept_is_in_its_folder_and_between_readmes_marks() {
        let root = std::env::temp_dir().join(format!("hauberk-report-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        fs::write(root.join("README.md"), format!("a\n{BEGIN}\nold\n{END}\nb\n")).unwrap();
        report().keep(&root).unwrap();
        let readme = fs::read_to_string(root.join("README.md")).unwrap();
        let files = ["report.json", "report.md", "throughput.svg", "latency.svg", "cpu.svg"];
        let missing: Vec<_> = files.iter().filter(|file| !root.join("bench").join(file).is_file()).collect();
        fs::remove_dir_all(&root).unwrap();
        assert!(missing.is_empty(), "{missing:?}");
        assert!(readme.starts_with("a\n") && readme.ends_with(&format!("{END}\nb\n")), "{readme}");
        assert!(!readme.contains("old") && readme.contains("](bench/latency.svg)"), "{readme}");
    }

    #[test]
    fn a_readme_without_marks_is_not_touched() {
        assert!(splice("nothing", "x").is_err());
        assert!(splice(&format!("{END}{BEGIN}"), "x").is_err());
    }
}
