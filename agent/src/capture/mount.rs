//! Finds the cgroup v2 hierarchy and a bpffs; mounts the latter where it is missing.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

/// Where cgroup v2 is mounted, as this process sees it.
pub fn cgroup2() -> io::Result<Option<PathBuf>> {
    Ok(parse_mountinfo(&fs::read_to_string("/proc/self/mountinfo")?))
}

/// proc_pid_mountinfo(5): after the `-` comes the type; the fifth field is the mount point.
fn parse_mountinfo(text: &str) -> Option<PathBuf> {
    text.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        (kind.split(' ').next()? == "cgroup2").then(|| place.split(' ').nth(4).map(PathBuf::from))?
    })
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
        assert_eq!(parse_mountinfo(text), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(parse_mountinfo("garbage\n - \n"), None);
    }
}
