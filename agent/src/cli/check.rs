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
    #[arg(long, value_name = "FILE", conflicts_with = "cluster")]
    config: Option<PathBuf>,
    /// Check the mesh of a whole cluster instead, by what its API server and the agents' Leases say.
    #[arg(long)]
    cluster: bool,
    /// How to reach the cluster [default: $KUBECONFIG, ~/.kube/config, or a pod's service account].
    #[arg(long, value_name = "FILE", requires = "cluster")]
    kubeconfig: Option<PathBuf>,
    /// The namespace that the mesh is installed in.
    #[arg(long, value_name = "NAME", requires = "cluster", default_value = "hauberk-system")]
    namespace: String,
    /// How to print.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

impl Check {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let found = match self.cluster {
            false => check::run(self.config.as_deref()),
            true => tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?
                .block_on(check::cluster::run(self.kubeconfig.as_deref(), &self.namespace)),
        };
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
