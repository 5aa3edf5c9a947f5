//! A program that runs in a namespace, and what it said.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigHandler, Signal, kill};
use nix::unistd::Pid;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM make whatever waits here fail, so that worlds are removed.
pub fn catch_interrupts() {
    extern "C" fn note(_: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler only stores to an atomic, which a signal handler may do.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::Handler(note)) };
    }
}

/// Whether the user has asked to stop.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Where a program is to run.
#[derive(Debug)]
pub struct Place<'a> {
    /// Its network namespace.
    pub netns: &'a Path,
    /// Its cgroup's directory, if not the maker's own.
    pub cgroup: Option<&'a Path>,
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

/// What a program said before it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// Standard output, if it ended well.
    ///
    /// # Errors
    /// With everything it said, if it did not.
    pub fn ok(self) -> Result<String> {
        if !self.status.success() {
            bail!("{}\nstdout: {}\nstderr: {}", self.status, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }

    /// Standard output's last line as JSON.
    ///
    /// # Errors
    /// When it did not end well, or the line is no JSON.
    pub fn json(self) -> Result<serde_json::Value> {
        let text = self.ok()?;
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("not JSON: {line:?}"))
    }
}

/// A command that will run in a place. Dies with its maker, so a killed test leaves no program.
pub fn command<S: AsRef<OsStr>>(place: &Place<'_>, program: &str, args: &[S]) -> Result<Command> {
    let netns = File::open(place.netns).with_context(|| format!("namespace {}", place.netns.display()))?;
    let procs = match place.cgroup {
        Some(dir) => Some(OpenOptions::new().write(true).open(dir.join("cgroup.procs"))?),
        None => None,
    };
    let maker = nix::unistd::getpid();
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    // SAFETY: only system calls that are safe between fork and exec, on descriptors opened before.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != maker {
                return Err(io::ErrorKind::Interrupted.into());
            }
            // The namespace first: an agent looks at whoever is in a pod's cgroup.
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            if let Some(procs) = &procs {
                nix::unistd::write(procs, b"0")?;
            }
            Ok(())
        });
    }
    Ok(command)
}

impl Process {
    /// Starts a command.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name })
    }

    /// Its process ID.
    pub fn pid(&self) -> i32 {
        // Linux' process IDs are far below i32::MAX.
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        // It may have ended; then it needs no signal.
        let _ = kill(Pid::from_raw(self.pid()), signal);
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended by then; it is killed.
    pub fn wait(mut self, limit: Duration) -> Result<ExitStatus> {
        self.wait_for(limit)
    }

    fn wait_for(&mut self, limit: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > until {
                bail!("{} did not end within {limit:?}", self.name);
            }
            if interrupted() {
                bail!("interrupted");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Standard output, when it was piped.
    pub fn stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }

    /// Closes its standard input, which ends programs that wait for that.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot be started, or has not ended within the limit.
pub fn run(mut command: Command, limit: Duration) -> Result<Output> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(command)?;
    let stdout = process.child.stdout.take().map(reader);
    let stderr = process.child.stderr.take().map(reader);
    let text = |reader: Option<std::thread::JoinHandle<String>>| {
        reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
    };
    let status = match process.wait_for(limit) {
        Ok(status) => status,
        Err(error) => {
            let _ = process.child.kill();
            bail!("{error}; it said: {} {}", text(stdout), text(stderr));
        }
    };
    Ok(Output { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Reads a pipe on a thread of its own, so that no pipe fills up.
fn reader(mut pipe: impl Read + Send + AsRawFd + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
