//! Finds the network namespace of a pod by its UID: the kubelet names the pod's cgroup after it, and the
//! pod's processes are below.
//!
//! | driver | a pod's cgroup below that of all pods |
//! |---|---|
//! | cgroupfs | `burstable/pod8f1c...-...` (`besteffort/...`; guaranteed pods at the top) |
//! | systemd | `kubepods-burstable.slice/kubepods-burstable-pod8f1c..._....slice` |
//!
//! Below that each container has a cgroup of its own, by containerd `cri-containerd-ID.scope` or `ID`, by
//! CRI-O `crio-ID.scope`; so has CRI-O's monitor (`crio-conmon-ID.scope`), which runs in the node's
//! namespace and is passed over for that. The oldest process counts: the pod's sandbox, or its first
//! container. A later one may have entered a namespace of its own.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The cgroup of all pods, one for each class of service, one for each pod.
const DEPTH: usize = 2;

/// The cgroups of the pods on this node, as of one moment.
#[derive(Debug)]
pub struct PodCgroups(HashMap<String, PathBuf>);

impl PodCgroups {
    /// Reads which pods have a cgroup below `root`, that of all pods.
    pub fn read(root: &Path) -> Self {
        let mut found = HashMap::new();
        collect(root, DEPTH, &mut found);
        Self(found)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The kernel's number for the pod's cgroup.
    pub fn id(&self, uid: &str) -> Option<u64> {
        // On 64-bit machines kernfs has one number for both.
        Some(fs::metadata(self.0.get(uid)?).ok()?.ino())
    }

    /// A file that names the pod's network namespace now; `None` while the pod has no process in one.
    pub fn netns(&self, uid: &str) -> Option<PathBuf> {
        let own = fs::metadata("/proc/self/ns/net").ok()?.ino();
        let mut processes = Vec::new();
        processes_in(self.0.get(uid)?, &mut processes);
        let mut apart: Vec<(u64, PathBuf)> = processes
            .into_iter()
            .filter_map(|pid| {
                let process = Path::new("/proc").join(pid);
                let netns = process.join("ns/net");
                let is_apart = fs::metadata(&netns).ok()?.ino() != own;
                is_apart.then_some((start_time(&process)?, netns))
            })
            .collect();
        apart.sort();
        apart.into_iter().next().map(|(_, netns)| netns)
    }
}

/// Whether a cgroup's path, below the root of its hierarchy, is that of a pod or of something in one.
pub fn is_of_pod(path: &str) -> bool {
    path.split('/').any(|name| pod_uid(name).is_some())
}

fn collect(dir: &Path, depth: usize, found: &mut HashMap<String, PathBuf>) {
    for child in children(dir) {
        match child.file_name().and_then(|name| pod_uid(name.to_str()?)) {
            Some(uid) => drop(found.insert(uid, child)),
            None if depth > 1 => collect(&child, depth - 1, found),
            None => {}
        }
    }
}

/// The UID in the name of a pod's cgroup.
fn pod_uid(name: &str) -> Option<String> {
    let uid = match name.strip_suffix(".slice") {
        // systemd nests slices by dashes, so the kubelet writes the UID's as underscores.
        Some(slice) => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        None => name.strip_prefix("pod")?.to_owned(),
    };
    // Static pods have a hash of their file instead: 32 digits without dashes.
    let is_uid = uid.len() >= 32 && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    is_uid.then_some(uid)
}

fn processes_in(dir: &Path, found: &mut Vec<String>) {
    let own = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    // 0 stands for a process that is not visible from here.
    found.extend(own.lines().filter(|pid| *pid != "0").map(str::to_owned));
    children(dir).iter().for_each(|child| processes_in(child, found));
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let dirs = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.map(|entry| entry.path()).collect()
}

/// When a process started, in ticks since boot: field 22 of proc(5)'s `stat`.
fn start_time(process: &Path) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The program's name, field 2, is in brackets and may hold anything.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "8f1c2d3e-0000-4a5b-9c8d-001122334455";

    #[test]
    fn every_driver_and_class_of_service_is_known() {
        let under = UID.replace('-', "_");
        for name in [
            format!("pod{UID}"),
            format!("kubepods-pod{under}.slice"),
            format!("kubepods-burstable-pod{under}.slice"),
            format!("kubepods-besteffort-pod{under}.slice"),
            // kind and others put their own slice around.
            format!("kubelet-kubepods-burstable-pod{under}.slice"),
        ] {
            assert_eq!(pod_uid(&name).as_deref(), Some(UID), "{name}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(pod_uid(&format!("pod{hash}")).as_deref(), Some(hash), "a static pod");
        assert!(is_of_pod(&format!("/kubelet/kubepods/burstable/pod{UID}/crio-1")));
        assert!(!is_of_pod("/system.slice/kubelet.service"));
        let container = format!("cri-containerd-{hash}{hash}.scope");
        for name in [
            "burstable",
            "kubepods-burstable.slice",
            "pod",
            "podman",
            "crio-conmon-1.scope",
            hash,
            &container,
        ] {
            assert_eq!(pod_uid(name), None, "{name}");
        }
    }

    #[test]
    fn the_pods_are_found_by_reading_the_tree() {
        let root = std::env::temp_dir().join(format!("hauberk-kubepods-{}", std::process::id()));
        let under = UID.replace('-', "_");
        let other = UID.replace('8', "9");
        let systemd = root.join(format!("kubepods-burstable.slice/kubepods-burstable-pod{under}.slice"));
        fs::create_dir_all(systemd.join("cri-containerd-1.scope")).unwrap();
        fs::create_dir_all(root.join(format!("pod{other}/crio-2"))).unwrap();
        let pods = PodCgroups::read(&root);
        assert_eq!(pods.0.get(UID), Some(&systemd));
        assert!(pods.0.contains_key(&other) && pods.0.len() == 2);
        // Its only process runs in our own namespace: a monitor, or a pod of the node's network.
        fs::write(systemd.join("cri-containerd-1.scope/cgroup.procs"), std::process::id().to_string())
            .unwrap();
        assert_eq!(pods.netns(UID), None);
        assert_eq!(pods.id(UID), Some(fs::metadata(&systemd).unwrap().ino()));
        assert_eq!((pods.netns("unknown"), pods.id("unknown")), (None, None));
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_process_has_a_start_time() {
        let own = start_time(Path::new("/proc/self")).unwrap();
        assert!(own > start_time(Path::new("/proc/1")).unwrap());
    }
}
