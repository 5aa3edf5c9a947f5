//! `hauberk capacity`: how many cores, how much memory and wire mutual TLS takes in a cluster of a
//! given size, with and without what Hauberk does against it.
//!
//! A few seconds on one of the cluster's machines say what a handshake, a signature and a byte cost
//! there ([`calibrate`], [`memory`]); the rest is arithmetic over that and the cluster's numbers
//! ([`scenario`], [`flow`], [`model`]), each figure with its formula. What relaying costs besides TLS is not
//! in it: that is the same however connections are made, and `cargo xtask bench` measures it.

pub mod calibrate;
pub mod calibration;
pub mod flow;
pub mod memory;
pub mod model;
pub mod scenario;
pub mod table;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use calibration::Calibration;
use model::Prediction;
use scenario::{Ratios, Scenario};

/// Cluster sizes that are shown when none is asked for, in services.
pub const SIZES: [u64; 4] = [10, 100, 1_000, 10_000];
/// How far measured runs at small scale were from the predictions; agent/tests/capacity*.rs hold it.
pub const ERROR: &str = "\
Held against real pools, handshakes and proofs at small scale: counts where all pools are warm are exact, \
others and bytes on the wire within 15 %, CPU and memory within a factor of two.";
/// A larger file is no report of ours.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// Why there is no prediction.
#[derive(Debug, thiserror::Error)]
pub enum CapacityError {
    /// A number that no cluster has.
    #[error("{field} is {value}: {message}")]
    Invalid {
        /// The flag, or the field of a calibration.
        field: &'static str,
        /// What it was.
        value: String,
        /// What it has to be.
        message: &'static str,
    },
    /// The calibration's file cannot be used.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The machine could not be measured.
    #[error("cannot calibrate: {0}")]
    Calibrate(String),
}

/// One cluster and what each way of making its connections takes.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The cluster.
    pub scenario: Scenario,
    /// One for each way, in the order of [`flow::Way::ALL`].
    pub ways: Vec<Prediction>,
}

/// Everything that was found, as `-o json` prints it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What the machine does. `--calibration` takes it from such a report.
    pub calibration: Calibration,
    /// What the letters in the formulas mean.
    pub symbols: &'static [(&'static str, &'static str)],
    /// The clusters.
    pub scenarios: Vec<Row>,
}

/// Predicts for clusters of these numbers of services.
///
/// # Errors
/// When a number is out of its range; the message names it.
pub fn report(calibration: Calibration, services: &[u64], ratios: &Ratios) -> Result<Report, CapacityError> {
    let mut scenarios = Vec::with_capacity(services.len());
    for services in services {
        let scenario = ratios.scenario(*services, calibration.threads())?;
        let ways = model::predict(&scenario, &calibration);
        scenarios.push(Row { scenario, ways });
    }
    Ok(Report { calibration, symbols: &model::SYMBOLS, scenarios })
}

/// Takes the calibration out of an earlier report.
///
/// # Errors
/// When the file cannot be read, is no such report, or says what no machine does.
pub fn load(path: &Path) -> Result<Calibration, CapacityError> {
    #[derive(Deserialize)]
    struct Earlier {
        calibration: Calibration,
    }
    let unusable = |message: String| CapacityError::File { path: path.into(), message };
    let size = std::fs::metadata(path).map_err(|e| unusable(e.to_string()))?.len();
    if size > MAX_FILE_BYTES {
        return Err(unusable("larger than 16 MiB, which no report is".into()));
    }
    let text = std::fs::read(path).map_err(|e| unusable(e.to_string()))?;
    let earlier: Earlier = serde_json::from_slice(&text).map_err(|e| {
        unusable(format!("not a report of `hauberk capacity -o json` with its `calibration`: {e}"))
    })?;
    earlier.calibration.validate().map_err(|e| unusable(e.to_string()))?;
    Ok(earlier.calibration)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_report_is_taken_as_a_calibration_and_anything_else_refused_by_the_file_s_name() {
        let found = calibrate::calibrate(Duration::ZERO, &mut |_| ()).unwrap();
        let file = std::env::temp_dir().join(format!("hauberk-capacity-{}.json", std::process::id()));
        let write = |report: &Report| std::fs::write(&file, serde_json::to_vec(report).unwrap()).unwrap();
        let mut report = report(found.clone(), &SIZES, &Ratios::default()).unwrap();
        write(&report);
        let back = load(&file).unwrap();
        // JSON may lose a float's last digit.
        assert!(
            (back.full.cpu_seconds() / found.full.cpu_seconds() - 1.0).abs() < 1e-9,
            "{back:?} {found:?}"
        );
        assert_eq!((&back.cpu, back.full.wire_bytes), (&found.cpu, found.full.wire_bytes));

        report.calibration.resumed.server_cpu_seconds = 0.0;
        write(&report);
        let refused = load(&file).unwrap_err().to_string();
        assert!(refused.contains("resumed.server_cpu_seconds is 0"), "{refused}");
        std::fs::write(&file, "{}").unwrap();
        let refused = load(&file).unwrap_err().to_string();
        assert!(refused.starts_with(file.to_str().unwrap()) && refused.contains("calibration"), "{refused}");
        std::fs::remove_file(&file).unwrap();
        assert!(load(&file).is_err(), "a file that is not there");
    }
}
