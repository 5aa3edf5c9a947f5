//! The kernel side for real: programs are loaded, pinned, adopted and removed. What they do to
//! connections is shown by the end-to-end tests.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use hauberk::capture::{Capture, Pods, mount};
use hauberk::config::CaptureConfig;

/// A cgroup and a place for a bpffs; both go with it.
struct Place {
    cgroup: PathBuf,
    config: CaptureConfig,
}

impl Place {
    fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root: it loads programs");
        let name = format!("hauberk-test-{}-{:x}", std::process::id(), fastrand::u64(..));
        let cgroup = mount::cgroup2().unwrap().expect("a cgroup v2 is mounted").join(&name);
        std::fs::create_dir(&cgroup).unwrap();
        let bpffs = std::env::temp_dir().join(&name);
        let config = CaptureConfig { cgroup: name.into(), bpffs, ..CaptureConfig::default() };
        Self { cgroup, config }
    }

    /// What is pinned: names and inodes.
    fn pins(&self) -> BTreeMap<String, u64> {
        let Ok(entries) = std::fs::read_dir(self.config.bpffs.join(ebpf::VERSION)) else {
            return BTreeMap::new();
        };
        let named = entries.map(|entry| entry.unwrap());
        named.map(|e| (e.file_name().into_string().unwrap(), e.metadata().unwrap().ino())).collect()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Capture::uninstall(&self.config);
        let _ = std::fs::remove_dir(&self.cgroup);
    }
}

#[tokio::test]
async fn what_is_pinned_outlives_the_agent_is_adopted_and_can_be_removed() {
    let place = Place::new();
    let first = Capture::start(&place.config, 15008, &["10.0.0.1".parse().unwrap()], Pods::Named).unwrap();
    assert!(first.set_mesh(["10.1.1.1".parse().unwrap()].into_iter()).unwrap(), "a member was added");
    let pins = place.pins();
    let links = pins.keys().filter(|name| name.starts_with("cgroup-")).count();
    assert_eq!((links, pins.len() - links), (5, 16), "five hooks and sixteen maps: {pins:?}");
    drop(first);
    assert_eq!(place.pins(), pins, "nothing goes with the agent");
    let second = Capture::start(&place.config, 15008, &[], Pods::Named).unwrap();
    assert_eq!(place.pins(), pins, "the very same links and maps: nothing is attached twice");
    let same = second.set_mesh(["10.1.1.1".parse().unwrap()].into_iter()).unwrap();
    assert!(!same, "the members are still known");
    drop(second);
    Capture::uninstall(&place.config).unwrap();
    assert!(place.pins().is_empty() && !place.config.bpffs.exists(), "nothing is left");
}

#[tokio::test]
async fn a_cgroup_that_is_not_there_is_named() {
    let mut place = Place::new();
    let cgroup = std::mem::replace(&mut place.config.cgroup, "no/such/cgroup".into());
    let error = Capture::start(&place.config, 15008, &[], Pods::Named).unwrap_err().to_string();
    assert!(error.contains("no/such/cgroup") && error.contains("capture.cgroup"), "{error}");
    place.config.cgroup = cgroup;
}

#[tokio::test]
async fn a_guard_shuts_the_gate_for_an_agent_to_come_and_makes_the_pods_cgroup() {
    let mut place = Place::new();
    std::fs::remove_dir(&place.cgroup).unwrap();
    Capture::guard(&place.config, &["10.96.0.1:443".to_owned().try_into().unwrap()]).unwrap();
    assert!(place.cgroup.is_dir(), "where the kubelet will put pods");
    let pins = place.pins();
    assert_eq!(pins.keys().filter(|name| name.starts_with("cgroup-")).count(), 6, "{pins:?}");
    let agent = Capture::start(&place.config, 15008, &[], Pods::ByCgroup).unwrap();
    assert_eq!(place.pins(), pins, "the agent takes over what the guard has pinned");
    assert!(agent.news().is_some(), "and hears of new cgroups");
    drop(agent);
    // What another version left goes when it is no longer needed.
    let old = place.config.bpffs.join("v0");
    std::fs::create_dir(&old).unwrap();
    let agent = Capture::start(&place.config, 15008, &[], Pods::ByCgroup).unwrap();
    agent.remove_other_versions().unwrap();
    assert!(!old.exists() && place.pins() == pins);
    place.config.cgroup = place.cgroup.clone();
}
