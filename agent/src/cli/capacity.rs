//! `hauberk capacity`.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;

use super::{Output, table};
use crate::capacity::calibrate::calibrate;
use crate::capacity::calibration::Calibration;
use crate::capacity::scenario::Ratios;
use crate::capacity::table::{HEADS, blocks, footnotes, machine};
use crate::capacity::{self, SIZES};

#[derive(Debug, Args)]
#[command(after_help = capacity::ERROR)]
pub(super) struct Capacity {
    /// Services; may be given several times [default: 10, 100, 1000 and 10000].
    #[arg(long, value_name = "N")]
    services: Vec<u64>,
    /// Pods of all services [default: 10 for each service].
    #[arg(long, value_name = "N")]
    pods: Option<u64>,
    /// Pods of each service.
    #[arg(long, value_name = "N", conflicts_with = "pods", default_value_t = Ratios::default().pods_per_service)]
    pods_per_service: u64,
    /// Nodes [default: one for 20 pods].
    #[arg(long, value_name = "N")]
    nodes: Option<u64>,
    /// Pods on each node.
    #[arg(long, value_name = "N", conflicts_with = "nodes", default_value_t = Ratios::default().pods_per_node)]
    pods_per_node: u64,
    /// Zones that traffic stays within.
    #[arg(long, value_name = "N", default_value_t = Ratios::default().zones)]
    zones: u64,
    /// New connections that each service opens per second.
    #[arg(long, value_name = "RATE", default_value_t = Ratios::default().connections_per_second)]
    connections_per_second: f64,
    /// Payload bytes per second of the connections that each service opens, both directions together.
    #[arg(long, value_name = "BYTES", default_value_t = Ratios::default().bytes_per_second)]
    bytes_per_second: f64,
    /// Seconds that a connection stays open.
    #[arg(long, value_name = "SECONDS", default_value_t = Ratios::default().connection_seconds)]
    connection_seconds: f64,
    /// How many services each service talks to.
    #[arg(long, value_name = "N", default_value_t = Ratios::default().fan_out)]
    fan_out: u64,
    /// Threads of an agent (`workers`) [default: what an agent starts on the calibrated machine].
    #[arg(long, value_name = "N")]
    threads: Option<u64>,
    /// Seconds after which an unused pooled connection is closed (`tunnel.idleTimeoutSeconds`).
    #[arg(long, value_name = "SECONDS", default_value_t = Ratios::default().idle_timeout_seconds)]
    idle_timeout: f64,
    /// Seconds that an SVID is valid (`svidLifetimeSeconds`).
    #[arg(long, value_name = "SECONDS", default_value_t = Ratios::default().certificate_lifetime_seconds)]
    certificate_lifetime: f64,
    /// Seconds to measure this machine for.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds_of_calibration: f64,
    /// Measure nothing: take the calibration from this earlier output of `-o json`.
    #[arg(long, value_name = "FILE", conflicts_with = "seconds_of_calibration")]
    calibration: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

impl Capacity {
    pub(super) fn run(self) -> Result<()> {
        let ratios = self.ratios();
        let services = if self.services.is_empty() { SIZES.to_vec() } else { self.services.clone() };
        // A number that no cluster has is refused before anything is measured.
        for services in &services {
            ratios.scenario(*services, 1)?;
        }
        let report = capacity::report(self.calibration()?, &services, &ratios)?;
        if self.output == Output::Json {
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        println!("{}", machine(&report));
        for block in blocks(&report) {
            println!("{}\n{}{}\n", block.title, table(&HEADS, &block.rows), block.below);
        }
        print!("{}", footnotes(&report));
        Ok(())
    }

    fn ratios(&self) -> Ratios {
        Ratios {
            pods: self.pods,
            nodes: self.nodes,
            pods_per_service: self.pods_per_service,
            pods_per_node: self.pods_per_node,
            connections_per_second: self.connections_per_second,
            bytes_per_second: self.bytes_per_second,
            connection_seconds: self.connection_seconds,
            fan_out: self.fan_out,
            zones: self.zones,
            threads: self.threads,
            idle_timeout_seconds: self.idle_timeout,
            certificate_lifetime_seconds: self.certificate_lifetime,
        }
    }

    fn calibration(&self) -> Result<Calibration> {
        if let Some(file) = &self.calibration {
            return Ok(capacity::load(file)?);
        }
        if !(0.1..=600.0).contains(&self.seconds_of_calibration) {
            bail!(
                "--seconds-of-calibration is {}: it must be between 0.1 and 600",
                self.seconds_of_calibration
            );
        }
        let (began, patience) = (Instant::now(), Duration::from_secs(1));
        let found = calibrate(Duration::from_secs_f64(self.seconds_of_calibration), &mut |stage| {
            if began.elapsed() > patience {
                eprintln!("hauberk: calibrating: {stage}");
            }
        })?;
        if !found.cpu.aes {
            eprintln!(
                "hauberk: this CPU has no AES instructions: TLS costs several times as much as with them"
            );
        }
        Ok(found)
    }
}
