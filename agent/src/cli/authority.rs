//! `hauberk authority`.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Output, revocation, rotation};
use crate::authority::config::SuppliedIssuer;
use crate::authority::state::{self, Adopted};
use crate::authority::{self, AuthorityConfig};
use crate::ca::store::Store;
use crate::identity::SpiffeId;

#[derive(Debug, Args)]
pub(super) struct Authority {
    /// The authority's configuration file (YAML).
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    issuer: Issuer,
    #[command(subcommand)]
    command: Option<Command>,
}

/// An intermediate CA in place of the configuration's `issuer`.
#[derive(Debug, Args)]
struct Issuer {
    /// The certificate (PEM) of an intermediate CA that signs, then those between it and the root.
    #[arg(long, global = true, value_name = "FILE", requires_all = ["issuer_key", "issuer_root"])]
    issuer_cert: Option<PathBuf>,
    /// Its private key (PEM).
    #[arg(long, global = true, value_name = "FILE", requires = "issuer_cert")]
    issuer_key: Option<PathBuf>,
    /// Its root (PEM): the only one that is trusted; its key stays where it is.
    #[arg(long, global = true, value_name = "FILE", requires = "issuer_cert")]
    issuer_root: Option<PathBuf>,
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
    /// Have the supplied intermediate CA sign from now on, in place of an earlier one of the same root.
    Adopt,
    /// Change the root, with no moment in which an agent does not know who signs; or go on with that.
    ///
    /// Prints a line whenever something changes, until it is done. It can be left and run again at any time.
    RotateRoot {
        #[command(flatten)]
        how: rotation::How,
    },
    /// How the running authority stands: its roots, its agents and what they have applied, what it issues.
    Status {
        /// How to print.
        #[arg(short, long, value_enum, default_value = "table")]
        output: Output,
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
        let mut config = AuthorityConfig::load(&path)?;
        let Issuer { issuer_cert, issuer_key, issuer_root } = self.issuer;
        if let (Some(certificate), Some(key), Some(root)) = (issuer_cert, issuer_key, issuer_root) {
            config.issuer = Some(SuppliedIssuer { certificate, key, root });
        }
        match self.command {
            None => serve(config),
            Some(Command::Token { node, ttl, out }) => token(&config, &node, ttl, out),
            Some(Command::Bundle) => bundle(&config),
            Some(Command::Revoke { what }) => revocation::revoke(&config, what),
            Some(Command::Unrevoke { what }) => revocation::unrevoke(&config, what),
            Some(Command::Adopt) => adopt(&config),
            Some(Command::RotateRoot { how }) => rotation::rotate(&config, how),
            Some(Command::Status { output }) => rotation::status(&config, output),
            Some(Command::Revocations { output }) => revocation::list(&config, output),
        }
    }
}

/// How long an authority that was told to stop may take.
const LONGEST_END: Duration = Duration::from_secs(10);

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
            // Whatever it waits for, a disk or an API server.
            () = async { stop.cancelled().await; tokio::time::sleep(LONGEST_END).await } => Ok(()),
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
    let state = state::open(&Store::open(&config.state_dir)?, config, SystemTime::now())?;
    for root in &state.roots {
        print!("{}", root.certificate);
    }
    Ok(())
}

fn adopt(config: &AuthorityConfig) -> Result<()> {
    let now = SystemTime::now();
    let Some(root) = state::supplied(config, now)? else {
        bail!(
            "adopt: name the intermediate in the configuration (issuer) or by --issuer-cert, --issuer-key and --issuer-root"
        )
    };
    let store = Store::open(&config.state_dir)?;
    if store.trust(&config.trust_domain)?.is_none() {
        state::open(&store, config, now)?;
        println!("the intermediate signs, under root {}", root.id);
        return Ok(());
    }
    match state::adopt(&store, &root)? {
        Adopted::Unchanged => println!("the intermediate signs already, under root {}", root.id),
        Adopted::Taken(root) => println!("the intermediate signs from now on, under root {root}"),
        Adopted::OtherRoot(root) => {
            bail!(
                "root {root} is not trusted yet: `hauberk authority rotate-root` with the same files changes to it"
            )
        }
    }
    Ok(())
}
