//! One round: each way measured once, under load.

use anyhow::{Context, Result};

use super::clients::{iperf, wrk};
use super::cpu;
use super::field::Way;
use super::figures::{Figure, Results};
use super::only::Only;

/// One run of a client program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    Bulk1,
    Bulk8,
    One,
    Many,
    New,
    NewFull,
}

pub(super) const ALL: &[Measure] =
    &[Measure::Bulk1, Measure::Bulk8, Measure::One, Measure::Many, Measure::New, Measure::NewFull];
pub(super) const FEW: &[Measure] = &[Measure::Many];

impl Measure {
    /// What it is called on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Bulk1 => "bulk1",
            Self::Bulk8 => "bulk8",
            Self::One => "one",
            Self::Many => "many",
            Self::New => "new",
            Self::NewFull => "newfull",
        }
    }
}

/// Measures a way.
pub(super) fn measure(way: &Way<'_>, seconds: u64, only: &Only, results: &mut Results) -> Result<()> {
    for measure in way.measures.iter().filter(|measure| only.measure(measure.name())) {
        let one = Round { way, seconds, results: &mut *results };
        one.run(*measure).with_context(|| format!("{measure:?} through {}", way.name))?;
    }
    Ok(())
}

struct Round<'a, 'b> {
    way: &'a Way<'b>,
    seconds: u64,
    results: &'a mut Results,
}

impl Round<'_, '_> {
    fn run(mut self, measure: Measure) -> Result<()> {
        match measure {
            Measure::Bulk1 => self.bulk(1, Figure::Bulk1, Figure::Bulk1Cpu),
            Measure::Bulk8 => self.bulk(8, Figure::Bulk8, Figure::Bulk8Cpu),
            Measure::One => {
                let found = wrk(self.way.client.host(), &self.page(&self.way.web), "1", self.seconds, false)?;
                self.add(Figure::OneP50, found.p50_us);
                self.add(Figure::OneP99, found.p99_us);
                self.add(Figure::Failed, found.failed);
                Ok(())
            }
            Measure::Many => {
                let url = self.page(&self.way.web);
                let found = self.requests(&url, false, Figure::Many, Figure::ManyCpu)?;
                self.add(Figure::ManyP50, found.p50_us);
                self.add(Figure::ManyP99, found.p99_us);
                Ok(())
            }
            Measure::New => {
                let url = self.page(&self.way.web);
                self.requests(&url, true, Figure::New, Figure::NewCpu).map(drop)
            }
            Measure::NewFull => match &self.way.full {
                Some(full) => {
                    let url = self.page(full);
                    self.requests(&url, true, Figure::NewFull, Figure::NewFullCpu).map(drop)
                }
                None => Ok(()),
            },
        }
    }

    fn bulk(&mut self, streams: u32, throughput: Figure, cost: Figure) -> Result<()> {
        let Some(bulk) = &self.way.bulk else { return Ok(()) };
        let (host, port) = bulk.rsplit_once(':').context("an address has a port")?;
        let (machine, proxies) = (cpu::Machine::now()?.busy, cpu::used(&self.way.proxies)?);
        let found = iperf(self.way.client.host(), host, port, streams, self.seconds)?;
        let (machine, proxies) =
            (cpu::Machine::now()?.busy - machine, cpu::used(&self.way.proxies)? - proxies);
        self.add(throughput, found.mb_per_second);
        self.cost(cost, proxies / found.gb);
        if streams == 1 {
            self.add(Figure::BulkMachineCpu, machine / found.gb);
        }
        Ok(())
    }

    /// From 64 clients at once.
    fn requests(
        &mut self,
        url: &str,
        close: bool,
        rate: Figure,
        cost: Figure,
    ) -> Result<super::clients::Wrk> {
        let before = cpu::used(&self.way.proxies)?;
        let found = wrk(self.way.client.host(), url, "64", self.seconds, close)?;
        let spent = cpu::used(&self.way.proxies)? - before;
        self.add(rate, found.per_second);
        self.add(Figure::Failed, found.failed);
        self.cost(cost, spent * 1e6 / found.requests);
        Ok(found)
    }

    /// What is known only of proxies whose processes are.
    fn cost(&mut self, figure: Figure, value: f64) {
        if !self.way.proxies.is_empty() {
            self.add(figure, value);
        }
    }

    fn add(&mut self, figure: Figure, value: f64) {
        self.results.add(figure, &self.way.name, value);
    }

    fn page(&self, address: &str) -> String {
        format!("http://{address}/1k")
    }
}
