//! Removes what worlds leave: namespaces, cgroups, mounts, files, processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::ip;

/// Where cgroup v2 is mounted.
///
/// # Errors
/// When it is not.
pub fn cgroup_root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let found = mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        (kind.split(' ').next() == Some("cgroup2")).then(|| place.split(' ').nth(4).map(PathBuf::from))?
    });
    found.context("no cgroup v2 is mounted")
}

/// Everything of one world that is still there, by name.
///
/// # Errors
/// When the machine cannot be looked at.
pub fn remains(id: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in list(Path::new("/run/netns")) {
        if entry.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&format!("hbk-{id}-"))) {
            found.push(format!("namespace {}", entry.display()));
        }
    }
    let cgroup = cgroup_root()?.join(format!("hauberk-{id}"));
    let dir = Path::new("/dev/shm").join(format!("hauberk-{id}"));
    for path in [cgroup, dir] {
        if path.exists() {
            found.push(format!("directory {}", path.display()));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    found.extend(
        mounts.lines().filter(|l| l.contains(&format!("hauberk-{id}/"))).map(|l| format!("mount {l}")),
    );
    for process in list(Path::new("/proc")) {
        let command = fs::read(process.join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&command).contains(&format!("hauberk-{id}/")) {
            found.push(format!("process {}", process.display()));
        }
    }
    Ok(found)
}

/// Whatever any world has left that nobody runs any more.
///
/// # Errors
/// When the machine cannot be looked at.
pub fn all_remains() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for id in ids() {
        if !has_maker(&id) {
            found.extend(remains(&id)?);
        }
    }
    Ok(found)
}

/// Removes a world.
///
/// # Errors
/// When something of it resists.
pub fn world(id: &str) -> Result<()> {
    let cgroup = cgroup_root()?.join(format!("hauberk-{id}"));
    kill_all(&cgroup);
    for name in netns_names() {
        if name.starts_with(&format!("hbk-{id}-")) {
            ip(&["netns", "delete", &name])?;
        }
    }
    let dir = Path::new("/dev/shm").join(format!("hauberk-{id}"));
    for node in list(&dir) {
        let bpf = node.join("bpf");
        if bpf.is_dir() {
            // Not mounted when the agent never came so far.
            let _ = umount2(&bpf, MntFlags::MNT_DETACH);
        }
    }
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| dir.display().to_string())?;
    }
    remove_cgroups(&cgroup)
}

/// Removes worlds whose makers are gone.
pub fn stale() {
    for id in ids() {
        if !has_maker(&id)
            && let Err(error) = world(&id)
        {
            eprintln!("cannot remove all of stale world {id}: {error:#}");
        }
    }
}

/// Every world that shows on this machine.
fn ids() -> Vec<String> {
    let namespaces = netns_names().into_iter().filter_map(|name| {
        let mut parts = name.strip_prefix("hbk-")?.splitn(3, '-');
        Some(format!("{}-{}", parts.next()?, parts.next()?))
    });
    let roots = [PathBuf::from("/dev/shm"), cgroup_root().unwrap_or_default()];
    let dirs = roots.iter().flat_map(|root| list(root)).filter_map(|path| {
        let id = path.file_name()?.to_str()?.strip_prefix("hauberk-")?.to_owned();
        // The maker's process ID and a random number.
        id.split_once('-')?.0.parse::<i32>().ok()?;
        Some(id)
    });
    let mut ids: Vec<String> = namespaces.chain(dirs).collect();
    ids.sort();
    ids.dedup();
    ids
}

/// Whether the process that made a world still runs.
fn has_maker(id: &str) -> bool {
    let maker = id.split('-').next().and_then(|pid| pid.parse().ok());
    maker.is_some_and(|pid| kill(Pid::from_raw(pid), None).is_ok())
}

/// Kills whatever is still in a cgroup or below it, and waits for its end.
fn kill_all(cgroup: &Path) {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let pids = pids(cgroup);
        if pids.is_empty() || Instant::now() > until {
            return;
        }
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn pids(cgroup: &Path) -> Vec<i32> {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut pids: Vec<i32> = own.lines().filter_map(|line| line.parse().ok()).collect();
    for child in list(cgroup).iter().filter(|path| path.is_dir()) {
        pids.extend(self::pids(child));
    }
    pids
}

/// Removes a cgroup and those below it; the kernel needs a moment after the last process's end.
fn remove_cgroups(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    for child in list(dir).iter().filter(|path| path.is_dir()) {
        remove_cgroups(child)?;
    }
    let until = Instant::now() + Duration::from_secs(5);
    while let Err(error) = fs::remove_dir(dir) {
        if Instant::now() > until {
            bail!("cgroup {}: {error}", dir.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn netns_names() -> Vec<String> {
    let names = list(Path::new("/run/netns"));
    names.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect()
}

fn list(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}
