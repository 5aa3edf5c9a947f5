//! Where a local workload's network namespace is, and whether an enrolled one is still the same.

use std::cell::LazyCell;
use std::path::{Path, PathBuf};

use super::{Enrolled, Not};
use crate::capture::{CaptureError, mount};
use crate::config::CaptureConfig;
use crate::directory::{NetnsAt, Workload};
use crate::netns::Netns;
use crate::netns::pods::PodCgroups;

/// The cgroups of this node's pods, read when somebody asks.
pub(super) type Cgroups =
    LazyCell<Result<PodCgroups, String>, Box<dyn FnOnce() -> Result<PodCgroups, String>>>;

/// Reads the pods' cgroups once, and only if a pod has to be looked for.
pub(super) fn cgroups(config: &CaptureConfig) -> Cgroups {
    let configured = config.cgroup.clone();
    LazyCell::new(Box::new(move || {
        let root = mount::cgroup_dir(&configured).map_err(|e| format!("capture.cgroup: {e}"))?;
        let pods = PodCgroups::read(&root);
        if pods.is_empty()
            && let Some(path) = mount::only_in_v1(&configured)
        {
            return Err(CaptureError::OnlyV1 { path }.to_string());
        }
        Ok(pods)
    }))
}

/// A file that names a workload's network namespace now.
pub(super) fn netns_path(workload: &Workload, cgroups: &Cgroups) -> Result<PathBuf, Not> {
    match &workload.netns {
        Some(NetnsAt::File(path)) => Ok(path.clone()),
        Some(NetnsAt::PodUid(uid)) => {
            let found = (**cgroups).as_ref().map_err(|e| Not::Able(e.clone()))?.netns(uid);
            found.ok_or_else(|| match workload.addresses.is_empty() {
                true => Not::Yet("its sandbox is not there yet".into()),
                false => Not::Able(format!(
                    "no process of pod {uid} below capture.cgroup yet (is that the cgroup above all pods?)"
                )),
            })
        }
        None => Err(Not::Able("the directory names no network namespace (netns) for it".into())),
    }
}

/// Whether a pod may be served on as the directory has it now. The mode may change in place.
pub(super) fn still_fits(now: &mut Enrolled, workload: &Workload, cgroups: &Cgroups) -> bool {
    let same = now.workload.id == workload.id
        && has_addresses(&now.workload, workload)
        && now.workload.netns == workload.netns;
    // A namespace whose file is gone stays enrolled until the directory lets it go: whatever still
    // runs in it stays captured. A file that names another namespace means another pod.
    if !same || matches!(workload.netns, Some(NetnsAt::File(_))) {
        return same && is_named_by(now, &now.path).unwrap_or(true);
    }
    // A process may end, and its number be given to a stranger's, while the pod goes on.
    if is_named_by(now, &now.path).unwrap_or(false) {
        return true;
    }
    let Ok(path) = netns_path(workload, cgroups) else { return true };
    let fits = is_named_by(now, &path).unwrap_or(true);
    now.path = path;
    fits
}

/// Whether something of a pod still runs in its namespace.
pub(super) fn is_inhabited(now: &Enrolled, cgroups: &Cgroups) -> bool {
    let found = netns_path(&now.workload, cgroups).ok();
    found.is_some_and(|path| is_named_by(now, &path).unwrap_or(false))
}

fn is_named_by(enrolled: &Enrolled, path: &Path) -> std::io::Result<bool> {
    Ok(Netns::inode_at(path)? == enrolled.netns.inode())
}

/// Whether an enrolled workload's addresses are those that the directory tells, if it tells them yet.
fn has_addresses(now: &Workload, told: &Workload) -> bool {
    told.addresses.is_empty()
        || (now.addresses.len() == told.addresses.len()
            && told.addresses.iter().all(|address| now.addresses.contains(address)))
}
