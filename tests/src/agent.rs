//! The agent as a process on a node.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::host::{Host, bin};
use crate::process::{Place, Process, command};

/// Where agents serve their metrics, on their node's loopback.
pub const ADMIN: &str = "127.0.0.1:15020";

/// A workload's mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Only mutual TLS.
    Strict,
    /// Plaintext from outside too.
    Permissive,
    /// Not in the mesh.
    Off,
}

impl Mode {
    /// As the directory writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Permissive => "permissive",
            Self::Off => "off",
        }
    }
}

/// What worlds differ in.
#[derive(Debug, Clone)]
pub struct Options {
    /// The agents' issuer, as YAML, instead of the world's authority; `DIR` stands for the node's directory.
    pub issuer: Option<String>,
    /// How long SVIDs are valid, in seconds.
    pub svid_seconds: u64,
    /// More lines for the agents' configuration.
    pub agent_yaml: String,
    /// More lines for the authority's configuration.
    pub authority_yaml: String,
    /// The agents' log filter.
    pub log: String,
    /// Whether the directory lists the nodes, so that agents speak to each other in node scope.
    pub node_scope: bool,
    /// Other builds of `hauberk` than this one, by who runs them: a node's name, or `authority`.
    pub builds: BTreeMap<String, String>,
    /// Access policies that the agents read from [`crate::World::policies_file`]; `None` for no file.
    pub policies: Option<String>,
    /// Whether the authority tells agents the directory of the world's API server.
    pub told_directory: bool,
    /// Whether agents and authority read policies from the world's API server.
    pub cluster_policies: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            issuer: None,
            svid_seconds: 3600,
            agent_yaml: "drainSeconds: 5\n".into(),
            authority_yaml: String::new(),
            log: "info,access=warn".into(),
            node_scope: true,
            builds: BTreeMap::new(),
            policies: None,
            told_directory: false,
            cluster_policies: false,
        }
    }
}

impl Options {
    /// The binary that a node's agent, or the authority, is.
    ///
    /// # Errors
    /// When this build's is not there.
    pub fn hauberk(&self, of: &str) -> Result<String> {
        self.builds.get(of).map_or_else(|| bin("hauberk"), |path| Ok(path.clone()))
    }
}

/// A running agent.
#[derive(Debug)]
pub struct Agent {
    process: Option<Process>,
    netns: PathBuf,
    host: String,
    dir: PathBuf,
    log: String,
    hauberk: String,
}

impl Agent {
    pub(crate) fn configure(
        node: &str,
        host: &Host,
        dir: PathBuf,
        bundle: &Path,
        sources: &str,
        cgroup: &Path,
        options: &Options,
    ) -> Result<Self> {
        let mut config = String::new();
        writeln!(config, "node: {node}\ntrustDomain: {}", crate::world::TRUST_DOMAIN)?;
        config.push_str(sources);
        match &options.issuer {
            Some(issuer) => {
                writeln!(config, "issuer: {}", issuer.replace("DIR", &dir.to_string_lossy()))?;
            }
            None => {
                writeln!(config, "authority:\n  address: {}", crate::world::AUTHORITY)?;
                writeln!(
                    config,
                    "  trustBundle: {}\n  joinToken: {}/token",
                    bundle.display(),
                    dir.display()
                )?;
            }
        }
        writeln!(config, "runtimeDir: {}/run", dir.display())?;
        writeln!(config, "capture:\n  cgroup: {}\n  bpffs: {}/bpf", cgroup.display(), dir.display())?;
        config.push_str(&options.agent_yaml);
        std::fs::write(dir.join("agent.yaml"), config)?;
        Ok(Self {
            process: None,
            netns: host.netns(),
            host: host.name.clone(),
            dir,
            log: options.log.clone(),
            hauberk: options.hauberk(node)?,
        })
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.join("agent.yaml")
    }

    fn spawn(&mut self) -> Result<()> {
        let config = self.config().to_string_lossy().into_owned();
        let place = Place { netns: &self.netns, cgroup: None };
        let args = ["--log", &self.log, "agent", "--config", &config];
        let mut command = command(&place, &self.hauberk, &args)?;
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join("agent.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        self.process = Some(Process::spawn(command)?);
        Ok(())
    }

    /// Waits until `/readyz` says so.
    ///
    /// # Errors
    /// When the agent ends or does not get ready; with the end of its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(30);
        let mut last = String::new();
        while Instant::now() < until {
            if !self.process.as_mut().is_some_and(Process::runs) {
                bail!("the agent has ended:\n{}", self.log_tail(20));
            }
            match self.page("/readyz") {
                Ok((200, _)) => return Ok(()),
                Ok((_, body)) => last = body,
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("the agent did not get ready: {last}\n{}", self.log_tail(20))
    }

    /// Gets a page of the admin server.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn page(&self, path: &str) -> Result<(u16, String)> {
        let host = Host { name: self.host.clone(), cgroup: None };
        let address: SocketAddr = ADMIN.parse()?;
        host.http(address, path)
    }

    /// The sum of a metric's samples whose line contains all of `labels`.
    ///
    /// # Errors
    /// When the metrics cannot be read.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        let (_, page) = self.page("/metrics")?;
        let matching = page.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|r| r.starts_with(['{', ' '])) && labels.iter().all(|label| line.contains(label))
        });
        Ok(matching.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
    }

    /// Waits until a metric has reached a value.
    ///
    /// # Errors
    /// When it has not in time; says what it is.
    pub fn wait_metric(&self, name: &str, labels: &[&str], at_least: f64) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let value = self.metric(name, labels)?;
            if value >= at_least {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("{name}{labels:?} is {value}, not {at_least}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Everything it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    /// The last lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Its process ID.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pid(&self) -> Result<i32> {
        self.process.as_ref().map(Process::pid).context("the agent does not run")
    }

    /// Kills it as the kernel's OOM killer would.
    pub fn kill9(&mut self) {
        // Dropping sends SIGKILL and waits.
        self.process = None;
    }

    /// Stops it gracefully; how long that took.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn stop(&mut self, limit: Duration) -> Result<Duration> {
        let process = self.process.take().context("the agent does not run")?;
        let began = Instant::now();
        process.signal(Signal::SIGTERM);
        let status = process.wait(limit)?;
        anyhow::ensure!(status.success(), "the agent ended with {status}");
        Ok(began.elapsed())
    }

    /// Starts a successor beside it, which takes over; the one that is drained then.
    ///
    /// # Errors
    /// When the successor does not get ready.
    pub fn upgrade(&mut self) -> Result<Process> {
        const DONE: &str = "the agent runs";
        let before = self.log().matches(DONE).count();
        let old = self.process.take().context("the agent does not run")?;
        self.spawn()?;
        let until = Instant::now() + Duration::from_secs(60);
        while self.log().matches(DONE).count() == before {
            let runs = self.process.as_mut().is_some_and(Process::runs);
            if !runs || Instant::now() > until {
                bail!("the successor did not take over:\n{}", self.log_tail(20));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.wait_ready()?;
        Ok(old)
    }

    /// From its next start on it is another build.
    pub fn replace_build(&mut self, hauberk: &str) {
        self.hauberk = hauberk.into();
    }

    /// Starts it again on the same configuration; does not wait for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_again(&mut self) -> Result<()> {
        self.spawn()
    }

    /// Starts it again on the same configuration.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn restart(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_ready()
    }
}
