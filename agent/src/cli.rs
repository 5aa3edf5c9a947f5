//! The command line.

mod agent;
mod ask;
mod authority;
mod capacity;
mod check;
mod policy;
mod revocation;
mod rotation;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

use crate::telemetry::log;

/// Mutual TLS between workloads that know nothing of it.
///
/// Exit codes: 0 done, 1 failed (one line on standard error says what and how to mend it), 2 wrong usage.
#[derive(Debug, Parser)]
#[command(name = "hauberk", version, max_term_width = 100)]
struct Cli {
    /// How log lines look.
    #[arg(long, global = true, value_enum, default_value = "text")]
    log_format: log::Format,
    /// Which log lines there are, as in RUST_LOG (for example: info, or warn,access=info).
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run this node's agent: capture pods' connections and carry them over mutual TLS.
    Agent(agent::Agent),
    /// Run the authority, or make what an agent needs to join it.
    Authority(authority::Authority),
    /// Hold this node's pods back until its agent knows the mesh: run it at boot, before the kubelet.
    Guard(agent::Guard),
    /// Remove everything an agent has pinned in the kernel: nothing is captured or refused any more.
    Uninstall(agent::Uninstall),
    /// Check whether this machine and this configuration can run an agent.
    Check(check::Check),
    /// Predict what mutual TLS takes in a cluster of a given size, from a measurement of this machine.
    Capacity(capacity::Capacity),
    /// Ask the running agent how it stands.
    Status(ask::Ask),
    /// List workloads as the running agent knows them.
    Workloads(ask::Ask),
    /// List the running agent's certificates.
    Certs(ask::Ask),
    /// List the running agent's access policies and what they came to, or check files of them.
    Policy(policy::Policy),
}

/// How a command prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// A table for people.
    Table,
    /// JSON for programs.
    Json,
}

/// Runs what the command line asks for. `give_back` is the allocator's way to give free memory back.
pub fn run(give_back: fn()) -> ExitCode {
    let cli = Cli::parse_from(as_plugin(std::env::args_os().collect()));
    let started = log::start(cli.log_format, cli.log.as_deref());
    let outcome = started.and_then(|()| {
        match cli.command {
            Command::Agent(agent) => agent.run(give_back),
            Command::Authority(authority) => authority.run(),
            Command::Guard(guard) => guard.run(),
            Command::Uninstall(uninstall) => uninstall.run(),
            Command::Check(check) => return check.run(),
            Command::Capacity(capacity) => capacity.run(),
            Command::Status(ask) => ask.run("/v1/status"),
            Command::Workloads(ask) => ask.run("/v1/workloads"),
            Command::Certs(ask) => ask.run("/v1/certs"),
            Command::Policy(policy) => policy.run(),
        }
        .map(|()| ExitCode::SUCCESS)
    });
    outcome.unwrap_or_else(|error| {
        // One line with every cause, outermost first.
        eprintln!("hauberk: {error:#}");
        ExitCode::FAILURE
    })
}

/// kubectl runs `kubectl hauberk ...` as `kubectl-hauberk ...`, which is a link to this program. There `check`
/// is about the cluster.
fn as_plugin(mut args: Vec<OsString>) -> Vec<OsString> {
    let is_plugin =
        args.first().and_then(|path| Path::new(path).file_name()) == Some("kubectl-hauberk".as_ref());
    let is_about_here = args.iter().any(|arg| arg == "--config" || arg == "--cluster");
    if is_plugin
        && !is_about_here
        && let Some(at) = args.iter().position(|arg| arg == "check")
    {
        args.insert(at + 1, "--cluster".into());
    }
    args
}

/// Aligns rows under their heads.
fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heads.iter().map(|head| head.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(&format!("{cell:width$}  "));
        }
        text.trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut heads.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn as_a_plugin_check_is_about_the_cluster() {
        let args = |words: &str| as_plugin(words.split(' ').map(Into::into).collect());
        let words = |words: &str| words.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(
            args("/bin/kubectl-hauberk check -o json"),
            words("/bin/kubectl-hauberk check --cluster -o json")
        );
        assert_eq!(args("kubectl-hauberk check --config x"), words("kubectl-hauberk check --config x"));
        assert_eq!(args("/bin/hauberk check"), words("/bin/hauberk check"));
    }

    #[test]
    fn columns_align() {
        let text =
            table(&["A", "LONGER"], &[vec!["wide cell".into(), "x".into()], vec!["é".into(), "y".into()]]);
        assert_eq!(text, "A          LONGER\nwide cell  x\né          y\n");
    }
}
