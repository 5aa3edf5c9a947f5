//! Proves on Debian's kernels, in a virtual machine, what this machine's own kernel may lack: that
//! connections do over kernel TLS what they do without. Correctness only: the processor is emulated.

mod debian;
mod image;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tests::Process;

use crate::shell::{command, output, say, step, tools};
use debian::{Kernel, Userland};

/// The kernels: the Debian suite, and whether kernel TLS can change keys there (Linux 6.14).
const SUITES: [(&str, bool); 3] = [("bookworm", false), ("trixie", false), ("sid", true)];
/// The agent's integration tests that run: those of kernel TLS, and those that can use it.
const TESTS: [&str; 4] = ["ktls", "records", "tunnel", "node_scope"];
/// What cannot hold where keys are not changed.
const NEEDS_CHANGES: [&str; 2] =
    ["a_new_key_of_the_peers_is_taken_up", "a_key_is_changed_before_it_has_sealed_too_much"];
/// A machine that has not turned itself off by then is.
const LIMIT: Duration = Duration::from_secs(300);

#[derive(Debug, Args)]
pub(crate) struct Vm {
    /// Only the kernel of this Debian suite: bookworm, trixie or sid.
    #[arg(long)]
    suite: Option<String>,
}

impl Vm {
    pub(crate) fn run(self) -> Result<()> {
        let wanted = |suite: &str| self.suite.as_deref().is_none_or(|only| only == suite);
        let suites: Vec<_> = SUITES.into_iter().filter(|(suite, _)| wanted(suite)).collect();
        ensure!(!suites.is_empty(), "--suite: bookworm, trixie or sid");
        let dir = tools()?.join("vm");
        let (userland, kernels) = debian::ensure(&dir, suites.iter().map(|(suite, _)| *suite))?;
        step("building the tests");
        let tests = TESTS.into_iter().map(build).collect::<Result<Vec<_>>>()?;
        let mut failed = Vec::new();
        for ((_, changes_keys), kernel) in suites.iter().zip(&kernels) {
            step(&format!("Linux {}", kernel.version));
            let began = Instant::now();
            let passed = boot(&dir, &userland, kernel, &tests, *changes_keys)?;
            say(&format!("  {} ({} s)", if passed { "passed" } else { "FAILED" }, began.elapsed().as_secs()));
            if !passed {
                failed.push(kernel.version.clone());
            }
        }
        ensure!(failed.is_empty(), "failed on Linux {}", failed.join(", "));
        Ok(())
    }
}

/// Builds one of the agent's integration tests; where it is.
fn build(test: &str) -> Result<PathBuf> {
    let args = ["test", "-p", "hauberk", "--no-run", "--test", test];
    let mut cargo = command("cargo", &args);
    cargo.arg("--message-format=json-render-diagnostics");
    let said = output(cargo)?;
    let messages = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    messages
        .filter(|message| message["target"]["name"] == test)
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .with_context(|| format!("cargo did not say where it has built {test}"))
}

/// Runs the tests on a kernel; whether all of them have passed.
fn boot(
    dir: &Path,
    userland: &Userland,
    kernel: &Kernel,
    tests: &[PathBuf],
    changes_keys: bool,
) -> Result<bool> {
    // Of this run's own: another may be under way.
    let work = dir.join(format!("run.{}", std::process::id()));
    let _removed = Removed(work.clone());
    let initrd = image::build(&work, userland, kernel, tests, &init(changes_keys))?;
    let log = work.join("log");
    let mut qemu = userland.program("usr/bin/qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        // Stock kernels do not run under every machine's /dev/kvm.
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536"])
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .arg("-L")
        .arg(userland.path("usr/share/seabios"))
        .arg("-L")
        .arg(userland.path("usr/share/qemu"))
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initrd)
        .arg("-serial")
        .arg(format!("file:{}", log.display()));
    let ended = Process::spawn(qemu)?.wait(LIMIT);
    let said = fs::read(&log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said).replace('\r', "");
    say(&said);
    if !ended?.success() {
        bail!("qemu failed");
    }
    let passed =
        said.lines().filter(|line| line.starts_with("test result: ok.") && !line.contains(" 0 passed"));
    Ok(passed.count() == tests.len() && said.contains("\nvm: done\n"))
}

/// The machine's first and only process.
fn init(changes_keys: bool) -> String {
    let mut script = "#!/bin/busybox sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
ip link set lo up
ulimit -n 65536
export HAUBERK_KERNEL_TLS=1
"
    .to_owned();
    for test in TESTS {
        let skip =
            if changes_keys { String::new() } else { NEEDS_CHANGES.map(|t| format!(" --skip {t}")).concat() };
        script.push_str(&format!("echo 'vm: {test}{skip}'\n/tests/{test} --include-ignored{skip}\n"));
    }
    script.push_str("grep . /proc/net/tls_stat\necho 'vm: done'\npoweroff -f\n");
    script
}

/// A directory that goes with its owner.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
