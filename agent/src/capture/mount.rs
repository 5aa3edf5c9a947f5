//! Finds the cgroup v2 hierarchy and a bpffs; mounts the latter where it is missing. Sees when a node's pods are
//! in cgroup v1 instead.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::netns::pods::PodCgroups;

/// What this process sees mounted.
const MOUNTS: &str = "/proc/self/mountinfo";

/// Where cgroup v2 is mounted, as this process sees it.
pub fn cgroup2() -> io::Result<Option<PathBuf>> {
    let text = fs::read_to_string(MOUNTS)?;
    Ok(mounts(&text, "cgroup2").next())
}

/// proc_pid_mountinfo(5): after the `-` comes the type; the fifth field is the mount point.
fn mounts(text: &str, wanted: &str) -> impl Iterator<Item = PathBuf> {
    text.lines().filter_map(move |line| {
        let (place, kind) = line.split_once(" - ")?;
        (kind.split(' ').next()? == wanted).then(|| place.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Where in cgroup v1 this node's pods are, if none is in cgroup v2: no program can be attached to them then.
/// Some nodes have both (the hybrid layout), and kubelets that know only v1 use that.
pub fn only_in_v1(configured: &Path) -> Option<PathBuf> {
    only_in_v1_of(&fs::read_to_string(MOUNTS).ok()?, configured)
}

fn only_in_v1_of(text: &str, configured: &Path) -> Option<PathBuf> {
    let has_pods = |dir: &PathBuf| !PodCgroups::read(dir).is_empty();
    let v2 = mounts(text, "cgroup2").next();
    let name = match &v2 {
        Some(v2) if configured.is_absolute() => configured.strip_prefix(v2).ok()?,
        _ => configured,
    };
    if v2.map(|v2| v2.join(name)).is_some_and(|dir| has_pods(&dir)) {
        return None;
    }
    mounts(text, "cgroup").map(|v1| v1.join(name)).find(has_pods)
}

/// The configured cgroup's directory: absolute, or below the cgroup v2 mount.
pub fn cgroup_dir(configured: &Path) -> io::Result<PathBuf> {
    if configured.is_absolute() {
        return Ok(configured.into());
    }
    let root = cgroup2()?.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup v2 is mounted; mount one with: mount -t cgroup2 none /sys/fs/cgroup",
        )
    })?;
    Ok(root.join(configured))
}

/// Makes sure that `dir` is a directory on a bpffs; mounts one there if its surroundings are none.
pub fn ensure_bpffs(dir: &Path) -> io::Result<()> {
    let existing = dir.ancestors().find(|a| a.exists()).unwrap_or(Path::new("/"));
    if is_bpffs(existing)? {
        return fs::create_dir_all(dir);
    }
    fs::create_dir_all(dir)?;
    tracing::info!(dir = %dir.display(), "mounting a bpffs");
    mount(Some("bpf"), dir, Some("bpf"), MsFlags::empty(), Some("mode=0700")).map_err(io::Error::from)
}

/// Undoes [`ensure_bpffs`]: removes the directory, and the mount if `dir` is its top.
pub fn remove_bpffs(dir: &Path) -> io::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let parent = dir.parent().unwrap_or(Path::new("/"));
    if is_bpffs(dir)? && fs::metadata(dir)?.dev() != fs::metadata(parent)?.dev() {
        umount2(dir, MntFlags::empty()).map_err(io::Error::from)?;
    }
    fs::remove_dir(dir)
}

fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(statfs(path).map_err(io::Error::from)?.filesystem_type() == BPF_FS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_v2_is_found_beside_v1() {
        let text = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                    32 30 0:28 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        let v2 = |text| mounts(text, "cgroup2").next();
        assert_eq!(v2(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(v2("garbage\n - \n"), None);
    }

    #[test]
    fn pods_that_are_in_cgroup_v1_only_are_seen_there() {
        const UID: &str = "8f1c2d3e-0000-4a5b-9c8d-001122334455";
        let root = std::env::temp_dir().join(format!("hauberk-hybrid-{}", std::process::id()));
        let (memory, unified) = (root.join("memory"), root.join("unified"));
        let text = format!(
            "30 29 0:26 / {0}/cpu rw - cgroup cgroup rw,cpu\n31 29 0:27 / {0}/memory rw - cgroup cgroup rw,memory\n\
             32 29 0:28 / {0}/unified rw - cgroup2 cgroup2 rw\n",
            root.display()
        );
        let (relative, absolute) = (Path::new("kubepods"), unified.join("kubepods"));
        fs::create_dir_all(&absolute).unwrap();
        assert_eq!(only_in_v1_of(&text, relative), None, "no pods yet");
        fs::create_dir_all(memory.join(format!("kubepods/burstable/pod{UID}"))).unwrap();
        for configured in [relative, &absolute] {
            assert_eq!(only_in_v1_of(&text, configured), Some(memory.join("kubepods")), "hybrid");
        }
        let v1_only: String = text.lines().take(2).map(|line| format!("{line}\n")).collect();
        assert_eq!(only_in_v1_of(&v1_only, relative), Some(memory.join("kubepods")));
        let elsewhere = Path::new("/elsewhere/kubepods");
        assert_eq!(only_in_v1_of(&text, elsewhere), None, "not in cgroup v2, so nowhere in v1 either");
        // In both, as systemd has its own slices.
        fs::create_dir_all(absolute.join(format!("burstable/pod{UID}"))).unwrap();
        assert_eq!(only_in_v1_of(&text, relative), None);
        fs::remove_dir_all(&root).unwrap();
    }
}
