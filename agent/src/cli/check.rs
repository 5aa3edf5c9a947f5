//! `hauberk check`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{Output, table};
use crate::check::{self, Outcome};

#[derive(Debug, Args)]
pub(super) struct Check {
    /// Also check this configuration file of an agent, and the files it names.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to print.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

impl Check {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let found = check::run(self.config.as_deref());
        let failed = found.iter().any(|f| f.outcome == Outcome::Fail);
        match self.output {
            Output::Json => {
                let rows: Vec<_> = found
                    .iter()
                    .map(|f| json!({"check": f.name, "outcome": f.outcome.as_str(), "detail": f.detail, "remedy": f.remedy}))
                    .collect();
                println!("{}", serde_json::to_string_pretty(&rows)?);
            }
            Output::Table => {
                let rows: Vec<Vec<String>> = found
                    .iter()
                    .map(|f| {
                        let remedy =
                            if f.remedy.is_empty() { String::new() } else { format!(" -> {}", f.remedy) };
                        vec![f.outcome.as_str().into(), f.name.into(), format!("{}{remedy}", f.detail)]
                    })
                    .collect();
                print!("{}", table(&["", "CHECK", "FOUND"], &rows));
            }
        }
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}
