//! `hauberk authority`.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use base64::Engine;
use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Output, revocation};
use crate::authority::{self, AuthorityConfig};
use crate::ca::store::Store;
use crate::identity::SpiffeId;

#[derive(Debug, Args)]
pub(super) struct Authority {
    /// The authority's configuration file (YAML).
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a join token: a node proves with it once that it is that node.
    Token {
        /// The node's name, as the directory writes it.
        #[arg(long)]
        node: String,
        /// How long it can be used, in seconds.
        #[arg(long, default_value_t = 3600)]
        ttl: u64,
        /// Write it to this new file (mode 0600) instead of standard output.
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Print the trust bundle (PEM) that agents verify the authority with.
    Bundle,
    /// Revoke an identity, a node or a certificate: within a second connected agents refuse it and close
    /// its connections.
    Revoke {
        #[command(flatten)]
        what: revocation::What,
    },
    /// Lift a revocation. What was issued before stays refused, except a serial's certificate.
    Unrevoke {
        #[command(flatten)]
        what: revocation::What,
    },
    /// List what is revoked.
    Revocations {
        /// How to print.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
    },
}

impl Authority {
    pub(super) fn run(self) -> Result<()> {
        let Some(path) = self.config else { bail!("authority: --config FILE is needed") };
        let config = AuthorityConfig::load(&path)?;
        match self.command {
            None => serve(config),
            Some(Command::Token { node, ttl, out }) => token(&config, &node, ttl, out),
            Some(Command::Bundle) => bundle(&config),
            Some(Command::Revoke { what }) => revocation::revoke(&config, what),
            Some(Command::Unrevoke { what }) => revocation::unrevoke(&config, what),
            Some(Command::Revocations { output }) => revocation::list(&config, output),
        }
    }
}

fn serve(config: AuthorityConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let told = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            told.cancel();
        });
        tokio::select! {
            served = authority::run(config, stop.clone()) => served,
            // Streams of bundles never end by themselves.
            () = async { stop.cancelled().await; tokio::time::sleep(Duration::from_secs(2)).await } => Ok(()),
        }
    })
}

fn token(config: &AuthorityConfig, node: &str, ttl: u64, out: Option<PathBuf>) -> Result<()> {
    let store = Store::open(&config.state_dir)?;
    let id = SpiffeId::node(&config.trust_domain, node).context("--node")?;
    if let Some(subject) = store.revocations()?.forbids(&id, node, SystemTime::now()) {
        bail!("{subject} is revoked; `hauberk authority unrevoke` lifts that");
    }
    let token = store.new_token(node, Duration::from_secs(ttl), SystemTime::now())?;
    match out {
        None => println!("{token}"),
        Some(path) => OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| writeln!(file, "{token}"))
            .with_context(|| format!("cannot write {}", path.display()))?,
    }
    Ok(())
}

fn bundle(config: &AuthorityConfig) -> Result<()> {
    let ca = Store::open(&config.state_dir)?.ca(&config.trust_domain, SystemTime::now())?;
    for root in ca.bundle().roots() {
        let body = base64::engine::general_purpose::STANDARD.encode(root);
        println!("-----BEGIN CERTIFICATE-----");
        // PEM lines have 64 characters (RFC 7468, section 2); base64 is ASCII.
        for line in body.as_bytes().chunks(64) {
            println!("{}", String::from_utf8_lossy(line));
        }
        println!("-----END CERTIFICATE-----");
    }
    Ok(())
}
