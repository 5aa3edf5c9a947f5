//! `hauberk agent`, `hauberk guard` and `hauberk uninstall`.

use std::path::PathBuf;

use clap::Args;

use crate::capture::Capture;
use crate::config::{AgentConfig, Reachable};
use crate::directory::kubernetes;

#[derive(Debug, Args)]
pub(super) struct Agent {
    /// The agent's configuration file (YAML).
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Agent {
    pub(super) fn run(self, give_back: fn()) -> anyhow::Result<()> {
        crate::run::run(AgentConfig::load(&self.config)?, give_back)
    }
}

#[derive(Debug, Args)]
pub(super) struct Guard {
    /// The configuration file of the agent that will run here.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Guard {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let config = AgentConfig::load(&self.config)?;
        let Some((cluster, _)) = config.directory.cluster() else {
            anyhow::bail!(
                "{}: directory: the guard tells pods by their cgroups, so it needs directory.kubernetes or directory.authority",
                self.config.display()
            );
        };
        let servers = kubernetes::servers(cluster)?;
        let mut reachable = config.capture.reachable.clone();
        reachable.extend(servers.iter().copied().map(Reachable::from));
        Capture::guard(&config.capture, &reachable)?;
        tracing::info!(
            ?servers,
            "until an agent runs, this node's pods reach the API server, DNS and capture.reachable only"
        );
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(super) struct Uninstall {
    /// The configuration file of the agent to remove.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

impl Uninstall {
    pub(super) fn run(self) -> anyhow::Result<()> {
        Ok(Capture::uninstall(&AgentConfig::load(&self.config)?.capture)?)
    }
}
