//! Measures Hauberk in both scopes against the direct path and other proxies that do mutual TLS
//! between the same nodes, side by side in one run, round by round. Shares count, not absolute
//! figures: machines differ, and this one may be busy.
//!
//! - [`field`]: the worlds, and the ways through them; [`pair`] ([`haproxy`], [`nginx`],
//!   [`certificates`]) and [`peer`] are other proxies, [`programs`] what else runs
//! - [`rounds`], [`first`], [`memory`], [`handshakes`], [`restart`]: what is measured, with [`clients`] and
//!   [`cpu`]; [`only`]: which of it
//! - [`figures`]: what was found; [`bars`]: whether it is enough; [`report`] ([`table`], [`plots`],
//!   [`svg`], [`machine`]): how it is shown and kept

mod bars;
mod certificates;
mod clients;
mod cpu;
mod field;
mod figures;
mod first;
pub(crate) mod handshakes;
mod haproxy;
mod machine;
mod memory;
mod nginx;
mod only;
mod pair;
mod peer;
mod plots;
mod programs;
mod report;
pub(crate) mod restart;
mod rounds;
mod svg;
mod table;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Args;

pub(crate) use clients::{iperf, wrk};

use crate::setup;
use crate::shell::{self, build, build_beside, say, step};
use field::Field;
use figures::Results;
use handshakes::Handshakes;
use memory::{Amounts, Memory};
use only::{FIRST, HANDSHAKES, MEMORY, Only, RESTART};
use peer::Peer;
use report::{Report, RoundNoise};
use restart::Restart;

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
    /// Rounds; each measures every way once, and the medians are shown [default: 3, for a report 5].
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds for each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Only shows that the benchmark itself works: one round, a second each, small amounts.
    #[arg(long, conflicts_with_all = ["report", "full", "rounds", "seconds"])]
    quick: bool,
    /// A million connections opened and closed, a thousand readers that stall; some minutes more.
    #[arg(long)]
    full: bool,
    /// Write bench/ (JSON, tables, pictures) and README's part of it.
    #[arg(long)]
    report: bool,
    /// Another proxy that listens already: NAME=ADDR:PORT[,BULK_ADDR:PORT][@NETNS]. Behind the first
    /// address is a web server with /1k, behind the second an iperf3 server; clients run in the
    /// namespace, or here.
    #[arg(long = "peer", value_name = "NAME=ADDR:PORT")]
    peers: Vec<Peer>,
    /// Only these ways (direct, hauberk, haproxy ...) and measures (bulk1, bulk8, one, many, new, newfull,
    /// first, handshakes, restart, memory); of a kind that none is named of, all.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', conflicts_with_all = ["report", "quick"])]
    only: Vec<String>,
    /// Where the binaries are; built first if this is not given.
    #[arg(skip)]
    bins: Option<PathBuf>,
}

impl Bench {
    /// Whether the benchmark works, with binaries that are there already.
    pub(crate) fn quick(bins: PathBuf) -> Self {
        Self {
            json: false,
            rounds: None,
            seconds: 1,
            quick: true,
            full: false,
            report: false,
            peers: Vec::new(),
            only: Vec::new(),
            bins: Some(bins),
        }
    }

    pub(crate) fn run(self) -> Result<()> {
        if self.json {
            shell::keep_stdout_for_the_result();
        }
        self.find_binaries()?;
        let report = self.measure()?;
        if self.report {
            report.keep(&shell::root())?;
            say("\nwritten: bench/, README.md");
        }
        if self.json {
            println!("{:#}", report.json());
        } else {
            println!("{}", report.text());
        }
        Ok(())
    }

    /// Builds them, unless `HAUBERK_BIN_DIR` says that somebody has.
    fn find_binaries(&self) -> Result<()> {
        let given = std::env::var_os("HAUBERK_BIN_DIR").map(PathBuf::from);
        let bins = match self.bins.clone().or(given) {
            Some(bins) => bins,
            None => {
                setup::ensure()?;
                step("building with optimisation");
                let bins = build(true)?;
                build_beside(&bins, handshakes::PROGRAM, true)?;
                build_beside(&bins, restart::PROGRAM, true)?;
                bins
            }
        };
        // SAFETY: nothing else runs in this process yet.
        unsafe { std::env::set_var("HAUBERK_BIN_DIR", bins) };
        Ok(())
    }

    fn measure(&self) -> Result<Report> {
        let rounds = self.rounds.unwrap_or(match () {
            () if self.quick => 1,
            () if self.report => 5,
            () => 3,
        });
        ensure!(rounds > 0, "no rounds, no figures: --rounds is at least 1");
        let seconds = if self.quick { 1 } else { self.seconds };
        let warnings: Vec<_> = self.peers.iter().map(Peer::look).collect::<Result<_>>()?;
        let mut results = Results::default();
        let mut handshakes = Handshakes::default();
        let mut restart = Restart::default();
        let mut noise = Vec::new();
        step("worlds, and the ways through them");
        let mut field = Field::make()?;
        let only = Only::of(&self.only, field.ways(&self.peers, self.quick)?.iter().map(|way| &*way.name))?;
        for round in 1..=rounds {
            step(&format!("round {round} of {rounds}"));
            let after = RoundNoise::before()?;
            for way in field.ways(&self.peers, self.quick)?.into_iter().filter(|way| only.way(&way.name)) {
                say(&format!("  {}", way.name));
                rounds::measure(&way, seconds, &only, &mut results)?;
            }
            if only.measure(FIRST) {
                say("  first requests");
                first::measure(&mut field, &mut results)?;
            }
            if only.measure(HANDSHAKES) {
                say("  handshakes");
                handshakes.measure(seconds)?;
            }
            if only.measure(RESTART) {
                say("  a rolling restart");
                restart.measure(if self.quick { restart::FEW_PEERS } else { restart::PEERS })?;
            }
            noise.push(after()?);
        }
        let amounts = match () {
            () if self.quick => Amounts::QUICK,
            () if self.full => Amounts::FULL,
            () if self.report => Amounts::REPORT,
            () => Amounts::USUAL,
        };
        let memory = match only.measure(MEMORY) {
            true => Memory::measure(&mut field, amounts, &mut results)?,
            false => Memory::default(),
        };
        let mut ways: Vec<_> = field.ways(&self.peers, self.quick)?.into_iter().map(|way| way.name).collect();
        ways.extend([field::RESUMING, field::NOT_RESUMING].map(str::to_owned));
        Ok(Report {
            machine: machine::Machine::look()?,
            seconds,
            ways,
            results,
            handshakes,
            restart,
            memory,
            rounds: noise,
            warnings: warnings.into_iter().flatten().collect(),
        })
    }
}
