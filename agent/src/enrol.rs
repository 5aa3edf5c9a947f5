//! Makes the enrolled pods of this node equal to what the directory says, again and again.
//!
//! A pod that cannot be enrolled is retried, and keeps its reason until it can; the others are
//! served meanwhile. A pod of a cluster is enrolled as soon as its sandbox has a process, before its
//! containers start, and whatever nobody has judged yet is held back by the kernel. Runs on a thread of
//! its own, as it enters the pods' network namespaces.

mod front;
mod pace;
mod place;
mod status;
mod succession;
mod verify;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Display;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::capture::{self, Capture, CaptureError, Judgement, Listeners};
use crate::config::AgentConfig;
use crate::deliver::Deliver;
use crate::directory::{Directory, Mode, NetnsAt, Workload};
use crate::handover::Inherited;
use crate::netns::Netns;
use front::OwnFront;
pub use pace::{LOOK_EVERY, Pace};
use place::{Cgroups, cgroups, is_inhabited, netns_path, still_fits};
pub use status::{Standing, Status};
use succession::handles;
pub use verify::VERIFY_EVERY;

use crate::pod::{Pod, Pods};
use crate::shard::Thread;
use crate::warm::Recent;

/// Of a workload: `namespace/name`.
type FullName = String;

/// Why a workload is not enrolled.
#[derive(Debug)]
enum Not {
    /// There is nothing to enrol yet.
    Yet(String),
    /// It should be possible, and is not.
    Able(String),
}

impl From<Not> for Standing {
    fn from(why: Not) -> Self {
        match why {
            Not::Yet(reason) => Self::Waiting(reason),
            Not::Able(reason) => Self::Failed(reason),
        }
    }
}

/// It cannot be done, for any error's reason.
fn unable(error: impl Display) -> Not {
    Not::Able(error.to_string())
}

struct Enrolled {
    pod: Arc<Pod>,
    workload: Arc<Workload>,
    netns: Arc<Netns>,
    /// What named the namespace.
    path: PathBuf,
    /// What could not be verified of its capture.
    fault: Option<String>,
    /// Its listeners, for a successor.
    listeners: Vec<TcpListener>,
}

/// Enrols and removes pods.
pub struct Enroller {
    config: Arc<AgentConfig>,
    capture: Arc<Capture>,
    /// The enrolled ones, for the data path to find.
    pods: Arc<Pods>,
    threads: Vec<Thread>,
    /// Where other agents reach this one for all its pods, once that is listened at.
    front: Option<OwnFront>,
    enrolled: BTreeMap<FullName, Enrolled>,
    /// Deleted, but something still runs in them: captured until nothing does.
    leaving: Vec<(FullName, Enrolled)>,
    /// What a predecessor has passed on, and is not in use yet.
    inherited: Inherited,
    /// Enrolled, and nobody accepts for them yet.
    unserved: Vec<(Arc<Pod>, Vec<Listeners>)>,
    /// The cookie of the network namespace we are in.
    own_netns: Option<u64>,
    /// A successor serves the pods: what is in the kernel is its own.
    is_retired: bool,
    status: Arc<Status>,
    adopted: bool,
    /// Why the kubelet's probes are not known, if they are not.
    kubelet: Option<String>,
    warmed: bool,
    /// The directory that the kernel side's table of members was last made from.
    meshed: Option<Arc<Directory>>,
}

impl Enroller {
    /// Nothing enrolled yet; what earlier agents left pinned is adopted by the first [`Enroller::apply`].
    pub fn new(
        config: Arc<AgentConfig>,
        capture: Arc<Capture>,
        pods: Arc<Pods>,
        threads: Vec<Thread>,
    ) -> Self {
        Self {
            config,
            capture,
            pods,
            threads,
            front: None,
            enrolled: BTreeMap::new(),
            leaving: Vec::new(),
            inherited: Inherited::default(),
            unserved: Vec::new(),
            own_netns: Netns::open(Path::new("/proc/self/ns/net")).ok().map(|own| own.cookie()),
            is_retired: false,
            status: Arc::default(),
            adopted: false,
            kubelet: None,
            warmed: false,
            meshed: None,
        }
    }

    /// How the local workloads stand.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status)
    }

    /// Gives the data-path threads back, to be joined.
    pub fn into_threads(self) -> Vec<Thread> {
        self.threads
    }

    /// Whether a pod waits for its sandbox.
    pub fn somebody_waits(&self) -> bool {
        self.status.any(|standing| matches!(standing, Standing::Waiting(_)))
    }

    /// Enrols what is wanted and missing, removes what is there and unwanted.
    pub fn apply(&mut self, directory: &Arc<Directory>) {
        if self.is_retired {
            return self.let_go(directory);
        }
        // First the destinations: a pod must never be served with a mesh that lacks a member.
        let grown = match self.set_mesh(directory) {
            Ok(grown) => grown,
            Err(error) => {
                tracing::error!(%error, "cannot tell the kernel who is in the mesh; trying again");
                return;
            }
        };
        // Whoever takes over serves nobody before it knows everybody: a connection that it accepts may be to
        // any of the pods, and until then the predecessor serves them all.
        let takes_over = !self.inherited.is_empty();
        if !takes_over {
            self.serve_node(directory);
        }
        let node = self.config.node.clone();
        let wanted: BTreeMap<FullName, &Arc<Workload>> =
            directory.enrolled_on(&node).map(|workload| (workload.full_name(), workload)).collect();
        let cgroups = cgroups(&self.config.capture);
        let stale: Vec<FullName> = self
            .enrolled
            .iter_mut()
            .filter_map(|(name, now)| {
                let fits = wanted.get(name).is_some_and(|workload| still_fits(now, workload, &cgroups));
                (!fits).then(|| name.clone())
            })
            .collect();
        for name in stale {
            self.dismiss(name, directory, &cgroups);
        }
        self.see_off(&cgroups);
        for (name, workload) in &wanted {
            let outcome = self.ensure(name, workload, &cgroups);
            self.note(name, outcome);
            if !takes_over {
                self.serve();
            }
        }
        self.serve();
        if takes_over {
            self.serve_node(directory);
        }
        self.status.retain(|name| wanted.contains_key(name));
        self.judge(directory, &cgroups);
        if grown {
            self.end_plaintext_with_new_members();
        }
        // A predecessor's that nobody wants.
        self.inherited = Inherited::default();
        self.adopt();
        self.warm();
    }

    /// After the first round other nodes' agents reach this one, and it reaches out to them.
    fn warm(&mut self) {
        let most = usize::from(self.config.tunnel.warm_nodes);
        if most == 0 || !self.config.issuer().issues_nodes() || std::mem::replace(&mut self.warmed, true) {
            return;
        }
        // One of the threads makes a connection to each, which serves the others while they need no more.
        if let Some(thread) = self.threads.first() {
            thread.warm(Recent::take_up(&self.config.runtime_dir, most));
        }
    }

    /// Tells the kernel side who is in the mesh, if that may have changed; says whether members were
    /// added.
    fn set_mesh(&mut self, directory: &Arc<Directory>) -> Result<bool, CaptureError> {
        if self.meshed.as_ref().is_some_and(|meshed| Arc::ptr_eq(meshed, directory)) {
            return Ok(false);
        }
        let grown = match &self.meshed {
            None => self.capture.set_mesh(directory.mesh_addresses())?,
            Some(before) => {
                let (added, removed) = directory.mesh_changes(before);
                self.capture.change_mesh(&added, &removed)?;
                !added.is_empty()
            }
        };
        self.meshed = Some(Arc::clone(directory));
        Ok(grown)
    }

    /// A pod may have had a connection with a destination before that became a member.
    fn end_plaintext_with_new_members(&self) {
        for (name, enrolled) in self.enrolled.iter().filter(|(_, e)| e.workload.mode == Mode::Strict) {
            if let Err(error) = self.capture.end_plaintext_of(&enrolled.workload, &enrolled.netns) {
                tracing::warn!(workload = name, %error, "cannot end plaintext connections with new members");
            }
        }
    }

    /// After the first round, what is pinned and was not enrolled again belongs to pods that are gone.
    fn adopt(&mut self) {
        // A pod that failed may be one of them: what is pinned keeps it closed, so it stays.
        let failed = self.status.any(|standing| standing.fault().is_some());
        if self.adopted || failed {
            return;
        }
        let leaving = self.leaving.iter().map(|(_, leaving)| leaving);
        let keep: HashSet<u64> = self.enrolled.values().chain(leaving).map(|e| e.netns.cookie()).collect();
        match self.capture.retain(&keep).and_then(|()| self.capture.remove_other_versions()) {
            Ok(()) => self.adopted = true,
            Err(error) => tracing::warn!(%error, "cannot remove what is pinned of pods that are gone"),
        }
    }

    /// Tells the kernel which pods are past the gate: those that are enrolled, and those that need not be.
    fn judge(&self, directory: &Directory, cgroups: &Cgroups) {
        if !self.is_by_cgroup() {
            return;
        }
        let Ok(cgroups) = &**cgroups else { return };
        let mut judged = HashMap::new();
        let leaving = self.leaving.iter().map(|(_, leaving)| &leaving.workload);
        for workload in directory.on_node(&self.config.node).chain(leaving) {
            let Some(NetnsAt::PodUid(uid)) = &workload.netns else { continue };
            let Some(cgroup) = cgroups.id(uid) else { continue };
            let name = workload.full_name();
            let judgement = match (workload.mode, self.enrolled.contains_key(&name)) {
                (Mode::Off, _) | (Mode::Permissive, true) => Judgement::Free,
                // Open rather than closed: it may send plaintext anyway.
                (Mode::Permissive, false) if self.status.has_failed(&name) => Judgement::Free,
                (Mode::Strict, true) => Judgement::Strict,
                _ => continue,
            };
            judged.insert(cgroup, judgement);
        }
        if let Err(error) = self.capture.judge(&judged) {
            tracing::error!(%error, "pods that are not judged cannot reach the mesh; trying again every second");
        }
    }

    fn is_by_cgroup(&self) -> bool {
        capture::Pods::told_by(&self.config.directory) == capture::Pods::ByCgroup
    }

    /// Has the threads accept for those that were enrolled.
    fn serve(&mut self) {
        for (pod, listeners) in self.unserved.drain(..) {
            for (thread, listeners) in self.threads.iter().zip(listeners) {
                thread.serve(Arc::clone(&pod), listeners);
            }
        }
    }

    fn ensure(&mut self, name: &str, workload: &Arc<Workload>, cgroups: &Cgroups) -> Result<(), Not> {
        let Some(now) = self.enrolled.get_mut(name) else { return self.enrol(name, workload, cgroups) };
        let workload = with_addresses(workload, &now.workload.addresses);
        if now.workload.mode != workload.mode || now.workload.exclusions != workload.exclusions {
            self.capture.enrol(&workload, &now.netns).map_err(unable)?;
            now.pod.set_mode(workload.mode);
            let exclusions = workload.exclusions.words();
            tracing::info!(workload = name, mode = ?workload.mode, ?exclusions, "mode or exclusions changed");
        }
        now.workload = workload;
        now.fault.clone().map_or(Ok(()), |fault| Err(Not::Able(fault)))
    }

    fn enrol(&mut self, name: &str, workload: &Arc<Workload>, cgroups: &Cgroups) -> Result<(), Not> {
        let path = netns_path(workload, cgroups)?;
        let netns = Arc::new(Netns::open(&path).map_err(unable)?);
        // A kubelet tells a pod's addresses after its containers have started.
        let found =
            if workload.addresses.is_empty() { netns.addresses().map_err(unable)? } else { Vec::new() };
        let workload = &with_addresses(workload, &found);
        if workload.addresses.is_empty() {
            return Err(Not::Yet("its network namespace has no address yet".into()));
        }
        let ports = &self.config.capture.ports;
        let tunnel_port = self.config.tunnel.port;
        let threads = self.threads.len();
        let listeners = Listeners::open(&netns, workload, (ports, tunnel_port), threads, &mut self.inherited)
            .map_err(|e| Not::Able(format!("cannot listen inside the pod: {e}")))?;
        let handles = handles(&listeners).map_err(unable)?;
        let deliver = Deliver::new(Arc::clone(&netns), Arc::clone(&self.capture)).map_err(unable)?;
        workload.addresses.iter().for_each(|address| deliver.prepare(*address));
        let own_ports = ports.iter().copied().chain([tunnel_port]).collect();
        let pod = Arc::new(Pod::new(Arc::clone(workload), deliver, own_ports));
        // The listeners are there already: a connection captured from now on finds one.
        self.capture.enrol(workload, &netns).map_err(unable)?;
        self.pods.insert(&pod);
        self.unserved.push((Arc::clone(&pod), listeners));
        tracing::info!(workload = name, id = %workload.id, mode = ?workload.mode, "enrolled");
        let workload = Arc::clone(workload);
        let enrolled = Enrolled { pod, workload, netns, path, fault: None, listeners: handles };
        self.enrolled.insert(name.into(), enrolled);
        Ok(())
    }

    /// Lets an enrolled pod go that the directory has no more, or has as another one. A pod that was
    /// deleted while something still runs in it stays captured.
    pub(super) fn dismiss(&mut self, name: FullName, directory: &Directory, cgroups: &Cgroups) {
        let Some(gone) = self.enrolled.remove(&name) else { return };
        let is_listed =
            directory.on_node(&self.config.node).any(|workload| workload.netns == gone.workload.netns);
        let is_pod = matches!(gone.workload.netns, Some(NetnsAt::PodUid(_)));
        if is_pod && !is_listed && is_inhabited(&gone, cgroups) {
            tracing::info!(workload = name, "deleted, and captured until nothing runs in it");
            self.leaving.push((name, gone));
        } else {
            self.remove(&name, &gone);
        }
    }

    /// Removes deleted pods that have come to their end.
    pub(super) fn see_off(&mut self, cgroups: &Cgroups) {
        let all = std::mem::take(&mut self.leaving).into_iter();
        let (inhabited, left): (Vec<_>, Vec<_>) = all.partition(|(_, pod)| is_inhabited(pod, cgroups));
        self.leaving = inhabited;
        left.iter().for_each(|(name, gone)| self.remove(name, gone));
    }

    fn remove(&self, name: &str, gone: &Enrolled) {
        if let Err(error) = self.capture.remove(gone.netns.cookie()) {
            tracing::warn!(workload = name, %error, "cannot remove everything of the pod from the kernel");
        }
        self.pods.remove(&gone.pod);
        // Ends its listeners and streams, whose sockets would keep the namespace alive.
        gone.pod.gone.cancel();
        tracing::info!(workload = name, "removed");
    }

    fn note(&self, name: &str, outcome: Result<(), Not>) {
        let standing = outcome.map_or_else(Standing::from, |()| Standing::Enrolled);
        let before = self.status.note(name, standing.clone());
        if let Some(reason) = standing.fault()
            && before.as_ref().and_then(Standing::fault) != Some(reason)
        {
            tracing::error!(workload = name, %reason, "not enrolled, or not verified; trying again");
        }
    }
}

/// The workload with these addresses, where the directory does not tell them yet.
fn with_addresses(workload: &Arc<Workload>, known: &[IpAddr]) -> Arc<Workload> {
    match workload.addresses.is_empty() {
        true => Arc::new(Workload { addresses: known.to_vec(), ..(**workload).clone() }),
        false => Arc::clone(workload),
    }
}
