//! `hauberk policy`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::ask::Ask;
use crate::policy::document;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Policy {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    ask: Ask,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check files of AccessPolicy and MeshPolicy documents, without an agent.
    Check {
        /// The files.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
}

impl Policy {
    pub(super) fn run(self) -> Result<()> {
        let Some(Command::Check { files }) = self.command else { return self.ask.run("/v1/policies") };
        for file in files {
            let policies = document::load(&file)?;
            println!("{}: {} good", file.display(), policies.count());
        }
        Ok(())
    }
}
