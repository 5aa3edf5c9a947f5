//! Runs programs, and says which.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The repository's top.
pub(crate) fn root() -> PathBuf {
    // xtask/ lies right below it.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// Where tools are kept that this project needs and the machine lacks.
pub(crate) fn tools() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    Ok(cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("hauberk"))
}

/// Whether standard output is kept for a result that a program reads.
static PROGRESS_ON_STDERR: AtomicBool = AtomicBool::new(false);

/// From now on progress goes to standard error.
pub(crate) fn keep_stdout_for_the_result() {
    PROGRESS_ON_STDERR.store(true, Ordering::Relaxed);
}

/// Says a line of progress.
pub(crate) fn say(line: &str) {
    if PROGRESS_ON_STDERR.load(Ordering::Relaxed) {
        eprintln!("{line}");
    } else {
        println!("{line}");
    }
}

/// Says what comes now.
pub(crate) fn step(what: &str) {
    say(&format!("\n== {what}"));
}

/// A command at the repository's top.
pub(crate) fn command<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root()).stdin(Stdio::null());
    command
}

/// Runs a command and says which; its output goes where ours does.
pub(crate) fn run(mut command: Command) -> Result<()> {
    let shown = shown(&command);
    say(&format!("$ {shown}"));
    if PROGRESS_ON_STDERR.load(Ordering::Relaxed) {
        command.stdout(std::io::stderr());
    }
    let began = Instant::now();
    let status = command.status().with_context(|| format!("cannot run {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    if began.elapsed().as_secs() >= 5 {
        say(&format!("  ({} s)", began.elapsed().as_secs()));
    }
    Ok(())
}

/// Runs a command quietly; what it printed, or an error with what it complained of.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let shown = shown(&command);
    let output = command.output().with_context(|| format!("cannot run {shown}"))?;
    if !output.status.success() {
        bail!("{shown}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(command: &Command) -> String {
    let args = command.get_args().map(|arg| arg.to_string_lossy());
    [command.get_program().to_string_lossy()].into_iter().chain(args).collect::<Vec<_>>().join(" ")
}

/// Whether a program can be found.
pub(crate) fn have(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&paths).chain(more).any(|dir| dir.join(program).is_file())
}

/// Builds binaries; where they are then.
pub(crate) fn build(release: bool) -> Result<PathBuf> {
    let mut args = vec!["build", "--package", "hauberk", "--package", "tests", "--bins"];
    if release {
        args.push("--release");
    }
    run(command("cargo", &args))?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(if release { "release" } else { "debug" }))
}

/// Builds a `[[bench]]` program of the agent's package and puts it beside the binaries, as cargo
/// itself hides it behind a hash.
pub(crate) fn build_beside(bins: &Path, bench: &str, release: bool) -> Result<()> {
    let mut args = vec!["build", "--package", "hauberk", "--bench", bench];
    args.push("--message-format=json-render-diagnostics");
    if release {
        args.push("--release");
    }
    let said = output(command("cargo", &args))?;
    let messages = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let built = messages
        .filter(|message| message["target"]["name"] == bench)
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
        .with_context(|| format!("cargo did not say where it has built {bench}"))?;
    // Renamed into place: another run may be using the file.
    let new = bins.join(format!("{bench}.{}", std::process::id()));
    std::fs::copy(&built, &new).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(std::fs::rename(new, bins.join(bench))?)
}
