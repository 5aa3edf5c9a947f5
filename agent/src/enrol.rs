//! Makes the enrolled pods of this node equal to what the directory says, again and again.
//!
//! A pod that cannot be enrolled is retried, and keeps its reason until it can; the others are
//! served meanwhile. Runs on a thread of its own, as it enters the pods' network namespaces.

use std::cell::LazyCell;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::capture::{Capture, CaptureError, Listeners, mount};
use crate::config::{AgentConfig, CaptureConfig};
use crate::deliver::Deliver;
use crate::directory::{Directory, Mode, NetnsAt, Workload};
use crate::inbound::Node;
use crate::netns::Netns;
use crate::netns::pods::PodCgroups;
use crate::pod::{Pod, Pods};
use crate::shard::Thread;
use crate::warm::Recent;

/// How often pods are looked at without a change in the directory: a namespace may have been made
/// late or anew, and what failed may work now.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// `namespace/name`.
type Name = String;

/// How each local workload stands: `Ok` when enrolled, else the reason why not.
#[derive(Debug, Default)]
pub struct Status(Mutex<BTreeMap<Name, Result<(), String>>>);

impl Status {
    /// The state as of now, by `namespace/name`.
    pub fn now(&self) -> BTreeMap<Name, Result<(), String>> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Name, Result<(), String>>> {
        // Entries are whole at every instant.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Enrolled {
    pod: Arc<Pod>,
    workload: Arc<Workload>,
    netns: Arc<Netns>,
    /// What named the namespace.
    path: PathBuf,
}

/// Enrols and removes pods.
pub struct Enroller {
    config: Arc<AgentConfig>,
    capture: Arc<Capture>,
    /// The enrolled ones, for the data path to find.
    pods: Arc<Pods>,
    threads: Vec<Thread>,
    /// Where other agents reach this one for all its pods, once that is listened at.
    front: Option<(SocketAddr, Arc<Node>)>,
    enrolled: BTreeMap<Name, Enrolled>,
    status: Arc<Status>,
    adopted: bool,
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
            status: Arc::default(),
            adopted: false,
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

    /// Enrols what is wanted and missing, removes what is there and unwanted.
    pub fn apply(&mut self, directory: &Arc<Directory>) {
        // First the destinations: a pod must never be served with a mesh that lacks a member.
        let grown = match self.set_mesh(directory) {
            Ok(grown) => grown,
            Err(error) => {
                tracing::error!(%error, "cannot tell the kernel who is in the mesh; trying again");
                return;
            }
        };
        self.serve_node(directory);
        let node = self.config.node.clone();
        let wanted: BTreeMap<Name, &Arc<Workload>> =
            directory.enrolled_on(&node).map(|workload| (workload.full_name(), workload)).collect();
        let cgroups = cgroups(&self.config.capture);
        let stale: Vec<Name> = self
            .enrolled
            .iter_mut()
            .filter_map(|(name, now)| {
                let fits = wanted.get(name).is_some_and(|workload| still_fits(now, workload, &cgroups));
                (!fits).then(|| name.clone())
            })
            .collect();
        for name in stale {
            self.remove(&name);
        }
        for (name, workload) in &wanted {
            let outcome = self.ensure(name, workload, &cgroups);
            self.note(name, outcome);
        }
        self.status.lock().retain(|name, _| wanted.contains_key(name));
        if grown {
            self.end_plaintext_with_new_members();
        }
        self.adopt();
        self.warm();
    }

    /// After the first round other nodes' agents reach this one, and it reaches out to them.
    fn warm(&mut self) {
        let most = usize::from(self.config.tunnel.warm_nodes);
        if most == 0 || !self.config.issuer().issues_nodes() || std::mem::replace(&mut self.warmed, true) {
            return;
        }
        // One of the threads makes the first connection to each, which the others resume.
        if let Some(thread) = self.threads.first() {
            thread.warm(Recent::take_up(&self.config.runtime_dir, most));
        }
    }

    /// Listens at the node's address for other agents, as long as the directory lists it.
    fn serve_node(&mut self, directory: &Directory) {
        let node = directory.node(&self.config.node).filter(|_| self.config.issuer().issues_nodes());
        let wanted = node.map(|node| SocketAddr::new(node.address, self.config.tunnel.port));
        if wanted == self.front.as_ref().map(|(address, _)| *address) {
            return;
        }
        if let Some((_, front)) = self.front.take() {
            front.gone.cancel();
        }
        let Some((node, address)) = node.zip(wanted) else { return };
        let listeners: io::Result<Vec<_>> = self.threads.iter().map(|_| Listeners::at(address)).collect();
        match listeners {
            Ok(listeners) => {
                let front = Node::new(node.id.clone());
                for (thread, listener) in self.threads.iter().zip(listeners) {
                    thread.serve_node(Arc::clone(&front), listener);
                }
                tracing::info!(%address, "listening for other nodes' agents");
                self.front = Some((address, front));
            }
            Err(error) => {
                tracing::error!(%address, %error, "cannot listen for other nodes' agents; they reach the pods one by one; trying again every second");
            }
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
        let failed = self.status.lock().values().any(Result::is_err);
        if self.adopted || failed {
            return;
        }
        let keep: HashSet<u64> = self.enrolled.values().map(|e| e.netns.cookie()).collect();
        match self.capture.retain(&keep) {
            Ok(()) => self.adopted = true,
            Err(error) => tracing::warn!(%error, "cannot remove what is pinned of pods that are gone"),
        }
    }

    fn ensure(&mut self, name: &str, workload: &Arc<Workload>, cgroups: &Cgroups) -> Result<(), String> {
        let Some(now) = self.enrolled.get_mut(name) else { return self.enrol(name, workload, cgroups) };
        if now.workload.mode != workload.mode || now.workload.exclusions != workload.exclusions {
            self.capture.enrol(workload, &now.netns).map_err(|e| e.to_string())?;
            now.pod.set_mode(workload.mode);
            let exclusions = workload.exclusions.words();
            tracing::info!(workload = name, mode = ?workload.mode, ?exclusions, "mode or exclusions changed");
        }
        now.workload = Arc::clone(workload);
        Ok(())
    }

    fn enrol(&mut self, name: &str, workload: &Arc<Workload>, cgroups: &Cgroups) -> Result<(), String> {
        let path = netns_path(workload, cgroups)?;
        let netns = Arc::new(Netns::open(&path).map_err(|e| e.to_string())?);
        let ports = &self.config.capture.ports;
        let tunnel_port = self.config.tunnel.port;
        let listeners: Vec<Listeners> = self
            .threads
            .iter()
            .map(|_| Listeners::open(&netns, workload, ports, tunnel_port))
            .collect::<Result<_, _>>()
            .map_err(|e| format!("cannot listen inside the pod: {e}"))?;
        let deliver =
            Deliver::new(Arc::clone(&netns), Arc::clone(&self.capture)).map_err(|e| e.to_string())?;
        workload.addresses.iter().for_each(|address| deliver.prepare(*address));
        let own_ports = ports.iter().copied().chain([tunnel_port]).collect();
        let pod = Arc::new(Pod::new(Arc::clone(workload), deliver, own_ports));
        // The listeners are there already: a connection captured from now on finds one.
        self.capture.enrol(workload, &netns).map_err(|e| e.to_string())?;
        for (thread, listeners) in self.threads.iter().zip(listeners) {
            thread.serve(Arc::clone(&pod), listeners);
        }
        self.pods.insert(&pod);
        tracing::info!(workload = name, id = %workload.id, mode = ?workload.mode, "enrolled");
        self.enrolled.insert(name.into(), Enrolled { pod, workload: Arc::clone(workload), netns, path });
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        let Some(gone) = self.enrolled.remove(name) else { return };
        if let Err(error) = self.capture.remove(gone.netns.cookie()) {
            tracing::warn!(workload = name, %error, "cannot remove everything of the pod from the kernel");
        }
        self.pods.remove(&gone.pod);
        // Ends its listeners and streams, whose sockets would keep the namespace alive.
        gone.pod.gone.cancel();
        tracing::info!(workload = name, "removed");
    }

    fn note(&self, name: &str, outcome: Result<(), String>) {
        let before = self.status.lock().insert(name.into(), outcome.clone());
        if let Err(reason) = outcome
            && before.as_ref().and_then(|b| b.as_ref().err()) != Some(&reason)
        {
            tracing::error!(workload = name, %reason, "not enrolled; trying again every second");
        }
    }
}

/// The cgroups of this node's pods, read when somebody asks.
type Cgroups = LazyCell<Result<PodCgroups, String>, Box<dyn FnOnce() -> Result<PodCgroups, String>>>;

/// Reads the pods' cgroups once, and only if a pod has to be looked for.
fn cgroups(config: &CaptureConfig) -> Cgroups {
    let configured = config.cgroup.clone();
    LazyCell::new(Box::new(move || {
        let root = mount::cgroup_dir(&configured).map_err(|e| format!("capture.cgroup: {e}"))?;
        Ok(PodCgroups::read(&root))
    }))
}

fn netns_path(workload: &Workload, cgroups: &Cgroups) -> Result<PathBuf, String> {
    match &workload.netns {
        Some(NetnsAt::File(path)) => Ok(path.clone()),
        Some(NetnsAt::PodUid(uid)) => {
            (**cgroups).as_ref().map_err(Clone::clone)?.netns(uid).ok_or_else(|| {
                format!(
                    "no process of pod {uid} below capture.cgroup yet (is that the cgroup above all pods?)"
                )
            })
        }
        None => Err("the directory names no network namespace (netns) for it".into()),
    }
}

/// Whether a pod may be served on as the directory has it now. The mode may change in place.
fn still_fits(now: &mut Enrolled, workload: &Workload, cgroups: &Cgroups) -> bool {
    let same = now.workload.id == workload.id
        && now.workload.addresses == workload.addresses
        && now.workload.netns == workload.netns;
    // A namespace whose file is gone stays enrolled until the directory lets it go: whatever still
    // runs in it stays captured. A file that names another namespace means another pod.
    let is_ours = |path: &Path| Netns::inode_at(path).map(|found| found == now.netns.inode());
    if !same || matches!(workload.netns, Some(NetnsAt::File(_))) {
        return same && is_ours(&now.path).unwrap_or(true);
    }
    // A process may end, and its number be given to a stranger's, while the pod goes on.
    if is_ours(&now.path).unwrap_or(false) {
        return true;
    }
    let Ok(path) = netns_path(workload, cgroups) else { return true };
    let fits = is_ours(&path).unwrap_or(true);
    now.path = path;
    fits
}
