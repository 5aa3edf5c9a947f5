//! Finds the kubelet, and has its connections to pods told to the pods' side: those are probes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::{Capture, mount};

/// Its name as a process.
const COMM: &str = "kubelet";

impl Capture {
    /// Looks where the kubelet's cgroup is (in the configured place, or by its process) and attaches to it,
    /// anew if it has changed.
    ///
    /// # Errors
    /// In words, why its probes are not known from anybody else's.
    pub fn recognise_kubelet(&self, configured: Option<&Path>) -> Result<(), String> {
        let unreadable = |e: std::io::Error| format!("probes.kubeletCgroup: {e}");
        let cgroup = match configured {
            Some(path) => mount::cgroup_dir(path).map_err(unreadable)?,
            None => {
                let root = mount::cgroup2().map_err(unreadable)?.ok_or("no cgroup v2 is mounted")?;
                let pods = mount::cgroup_dir(&self.cgroup).map_err(unreadable)?;
                find(Path::new("/proc"), &root, &pods)?
            }
        };
        self.programs().attach_kubelet(&cgroup).map_err(|e| e.to_string())
    }
}

/// The cgroup of the process that is called as the kubelet is, runs as root in the network namespace we
/// are in, and in no pod.
fn find(proc: &Path, root: &Path, pods: &Path) -> Result<PathBuf, String> {
    let own = fs::metadata(proc.join("self/ns/net")).map_err(|e| e.to_string())?.ino();
    let entries = fs::read_dir(proc).map_err(|e| e.to_string())?.flatten();
    let found = entries.map(|entry| entry.path()).find_map(|process| {
        let comm = fs::read_to_string(process.join("comm")).ok()?;
        let of_node = fs::metadata(process.join("ns/net")).ok()?.ino() == own;
        if comm.trim_end() != COMM || !of_node || fs::metadata(&process).ok()?.uid() != 0 {
            return None;
        }
        let cgroup = fs::read_to_string(process.join("cgroup")).ok()?;
        let path = root.join(cgroup_v2(&cgroup)?.trim_start_matches('/'));
        (!path.starts_with(pods)).then_some(path)
    });
    let found = found.ok_or("no process of the node is called kubelet; set probes.kubeletCgroup")?;
    if pods.starts_with(&found) {
        return Err(format!(
            "the kubelet's cgroup {} is that of others too; run it in one of its own (systemd does), or use probes.exempt",
            found.display()
        ));
    }
    Ok(found)
}

/// The path of cgroup v2 in a process's `cgroup` file, if it is below our own root.
fn cgroup_v2(text: &str) -> Option<&str> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    (!Path::new(path).components().any(|part| part == Component::ParentDir)).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelet_is_known_by_name_and_not_taken_for_everybody() {
        let text = "9:name=systemd:/x\n0::/system.slice/kubelet.service\n";
        assert_eq!(cgroup_v2(text), Some("/system.slice/kubelet.service"));
        assert_eq!(cgroup_v2("0::/../elsewhere\n"), None, "not visible from here");
        let proc = std::env::temp_dir().join(format!("hauberk-proc-{:x}", fastrand::u64(..)));
        let (root, pods) = (Path::new("/c"), Path::new("/c/kubepods"));
        let process = |pid: &str, comm: &str, cgroup: &str| {
            let dir = proc.join(pid);
            fs::create_dir_all(dir.join("ns")).unwrap();
            std::os::unix::fs::symlink("/proc/self/ns/net", dir.join("ns/net")).unwrap();
            fs::write(dir.join("comm"), comm).unwrap();
            fs::write(dir.join("cgroup"), cgroup).unwrap();
        };
        process("self", "hauberk\n", "0::/\n");
        process("7", "kubelet-like\n", "0::/a\n");
        process("8", "kubelet\n", "0::/kubepods/pod1/c\n");
        find(&proc, root, pods).expect_err("neither a longer name nor one in a pod");
        process("9", "kubelet\n", "0::/\n");
        find(&proc, root, pods).expect_err("everybody's cgroup");
        fs::write(proc.join("9/cgroup"), text).unwrap();
        assert_eq!(find(&proc, root, pods), Ok("/c/system.slice/kubelet.service".into()));
        fs::remove_dir_all(&proc).unwrap();
    }
}
