//! A network namespace, and running programs in it.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::process::{self, Output, Place, Process};

/// How long a program may take that does not say otherwise.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A namespace with a name, and maybe a cgroup.
#[derive(Clone, Debug)]
pub struct Host {
    /// The namespace's name, as `ip netns` knows it.
    pub name: String,
    /// Its cgroup, if it has one.
    pub cgroup: Option<PathBuf>,
}

impl Host {
    /// Makes the namespace, with loopback up and the same TCP settings as every other.
    ///
    /// # Errors
    /// When `ip` fails: not root?
    pub fn new(name: String, cgroup: Option<PathBuf>) -> Result<Self> {
        ip(&["netns", "add", &name])?;
        if let Some(cgroup) = &cgroup {
            std::fs::create_dir_all(cgroup).with_context(|| format!("cgroup {}", cgroup.display()))?;
        }
        let host = Self { name, cgroup };
        host.ip(&["link", "set", "lo", "up"])?;
        // bbr, inherited on some machines, halves bulk figures between namespaces.
        host.sysctl("net/ipv4/tcp_congestion_control", "reno")?;
        Ok(host)
    }

    /// The file that names the namespace.
    pub fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Runs `ip` in the namespace.
    ///
    /// # Errors
    /// With what `ip` said.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.name], args].concat())
    }

    /// Sets a sysctl of the namespace (path below /proc/sys).
    ///
    /// # Errors
    /// When there is no such sysctl.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        let (file, text) = (Path::new("/proc/sys").join(path), value.to_owned());
        self.inside(move || std::fs::write(&file, text).with_context(|| file.display().to_string()))?
    }

    /// Runs a function on a thread inside the namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn inside<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        let netns = std::fs::File::open(self.netns())?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&netns, CloneFlags::CLONE_NEWNET)?;
                Ok(f())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run here.
    ///
    /// # Errors
    /// When the namespace or the cgroup is gone.
    pub fn command<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> Result<Command> {
        let netns = self.netns();
        process::command(&Place { netns: &netns, cgroup: self.cgroup.as_deref() }, program, args)
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it cannot be started or takes longer than [`LIMIT`].
    pub fn run<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> Result<Output> {
        self.run_for(program, args, LIMIT)
    }

    /// Runs a program to its end, with a limit of its own.
    ///
    /// # Errors
    /// When it cannot be started or takes longer.
    pub fn run_for<S: AsRef<OsStr>>(&self, program: &str, args: &[S], limit: Duration) -> Result<Output> {
        process::run(self.command(program, args)?, limit)
    }

    /// Starts a program that goes on; its output is dropped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn<S: AsRef<OsStr>>(&self, program: &str, args: &[S]) -> Result<Process> {
        let mut command = self.command(program, args)?;
        command.stdout(Stdio::null()).stderr(Stdio::null());
        Process::spawn(command)
    }

    /// Runs the actor to its end.
    ///
    /// # Errors
    /// As [`Host::run`].
    pub fn actor(&self, args: &[&str]) -> Result<serde_json::Value> {
        self.run_for(&bin("actor")?, args, Duration::from_secs(180))?.json().with_context(|| args.join(" "))
    }

    /// Starts the actor, with a pipe to its input and from its output; waits until it has said
    /// `ready`.
    ///
    /// # Errors
    /// When it cannot be started or does not get ready.
    pub fn actor_server(&self, args: &[&str]) -> Result<Actor> {
        let mut command = self.command(&bin("actor")?, args)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Process::spawn(command)?;
        let stdout = process.stdout().context("a piped child has an output")?;
        let mut lines = std::io::BufReader::new(stdout);
        let mut first = String::new();
        std::io::BufRead::read_line(&mut lines, &mut first)?;
        if first.trim() != "ready" {
            bail!("the actor {args:?} did not get ready: {first:?}");
        }
        Ok(Actor { process, lines })
    }

    /// Waits until something listens on an address here.
    ///
    /// # Errors
    /// When nothing does in time.
    pub fn wait_listening(&self, address: SocketAddr) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if self.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())? {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("nothing listens on {address} in {}", self.name)
    }

    /// Gets a page over plain HTTP; status and body.
    ///
    /// # Errors
    /// When the server cannot be reached or answers nonsense.
    pub fn http(&self, address: SocketAddr, path: &str) -> Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let text = self.inside(move || -> Result<String> {
            let mut tcp = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
            tcp.set_read_timeout(Some(Duration::from_secs(5)))?;
            tcp.write_all(request.as_bytes())?;
            let mut text = String::new();
            tcp.read_to_string(&mut text)?;
            Ok(text)
        })??;
        let status = text.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no HTTP status")?;
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        Ok((status, body))
    }
}

/// The actor as a server: its lines can be read while it runs.
#[derive(Debug)]
pub struct Actor {
    /// The process.
    pub process: Process,
    lines: std::io::BufReader<std::process::ChildStdout>,
}

impl Actor {
    /// Its next line, as JSON.
    ///
    /// # Errors
    /// When it has ended, or the line is no JSON.
    pub fn said(&mut self) -> Result<serde_json::Value> {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut self.lines, &mut line)?;
        serde_json::from_str(&line).with_context(|| format!("not JSON: {line:?}"))
    }
}

/// Holds what the actor's `poke` has seen to be a failure as programs shall see one: a reset, at once.
///
/// # Panics
/// When it is none.
pub fn assert_reset(seen: &serde_json::Value, what: &str) {
    // connect() itself succeeds, as the agent answers before the server can; the reset may be so
    // quick that connect() already reports it.
    let end = if seen["connect"] == "ok" { &seen["end"] } else { &seen["connect"] };
    assert!(matches!(end.as_str(), Some("reset" | "broken pipe")), "{what} must be a reset: {seen}");
    assert!(seen["ms"].as_u64().is_some_and(|ms| ms < 4500), "{what} must not hang: {seen}");
}

/// Runs `ip`.
///
/// # Errors
/// With what it said.
pub fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run ip (package iproute2)")?;
    if !output.status.success() {
        bail!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// A binary of this workspace: beside the running one, or where `HAUBERK_BIN_DIR` says.
///
/// # Errors
/// When it has not been built.
pub fn bin(name: &str) -> Result<String> {
    let mut dirs: Vec<PathBuf> = std::env::var_os("HAUBERK_BIN_DIR").map(PathBuf::from).into_iter().collect();
    let exe = std::env::current_exe()?;
    dirs.extend(exe.ancestors().skip(1).take(2).map(Path::to_owned));
    let found = dirs.iter().map(|dir| dir.join(name)).find(|path| path.is_file());
    let found = found.with_context(|| {
        format!("the binary {name} is not built; run `cargo build --package hauberk --package tests --bins`")
    })?;
    Ok(found.to_string_lossy().into_owned())
}
