//! `hauberk check`: can this machine, and this configuration, run an agent? And `cluster`: does the mesh of a
//! whole cluster stand?
//!
//! Kernel features are tried, not guessed from version numbers: distributions carry features back
//! and leave others out.

pub mod cluster;
mod kernel;
mod machine;

use std::path::Path;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// The agent runs, with less.
    Warn,
    /// The agent does not run.
    Fail,
}

impl Outcome {
    /// The word in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// What a check found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The check's name.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found.
    pub detail: String,
    /// What to do about it; empty when nothing is to be done.
    pub remedy: String,
}

impl Found {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Ok, detail: detail.into(), remedy: String::new() }
    }

    fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Warn, detail: detail.into(), remedy: remedy.into() }
    }

    fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Fail, detail: detail.into(), remedy: remedy.into() }
    }
}

/// Runs every check; with a configuration file, also those of that file.
pub fn run(config: Option<&Path>) -> Vec<Found> {
    let mut found = kernel::checks();
    found.extend(machine::checks());
    if let Some(config) = config {
        found.extend(machine::configuration(config));
    }
    found
}
