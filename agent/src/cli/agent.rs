//! `hauberk agent` and `hauberk uninstall`.

use std::path::PathBuf;

use clap::Args;

use crate::capture::Capture;
use crate::config::AgentConfig;

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
