//! Takes connections over: loads the kernel side, attaches it, and keeps its tables.
//!
//! Programs, links and maps are pinned, so they outlive the agent: without it, strict pods are
//! closed, never open. An agent that starts adopts what is pinned and puts its own programs in place
//! with no instant between. Nothing here listens, accepts or moves bytes.

mod diag;
mod events;
mod exclusions;
mod gate;
mod kubelet;
mod listener;
pub mod mount;
mod pods;
mod probe;
mod programs;
mod sys;
mod verify;

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use aya::maps::{MapData, PerCpuArray};
use ebpf::{Addr, Captured, Cgroup, Delivery, Event, OriginalDst, TrueSource, VERDICT_COUNT};

pub use events::Records;
pub use gate::Judgement;
pub use listener::Listeners;

use crate::config::{CaptureConfig, DirectoryConfig, Reachable};
use gate::Gate;
use programs::Programs;
use sys::Table;

/// Why capture does not work. Each message says what to mend.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// No bpffs to keep things in.
    #[error("cannot use {} for pinned programs: {source} (capture.bpffs must be on a bpffs, or where one can be mounted; needs CAP_SYS_ADMIN)", path.display())]
    Bpffs {
        /// The configured directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The configured cgroup is not there.
    #[error("cannot open the pods' cgroup {}: {source} (set capture.cgroup to the cgroup v2 directory above all pods)", path.display())]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The pods are where no program can be.
    #[error(
        "this node's pods are in cgroup v1 only ({}), to which no program can be attached: boot the node with cgroup v2 (kernel argument systemd.unified_cgroup_hierarchy=1)", path.display()
    )]
    OnlyV1 {
        /// The directory above them.
        path: PathBuf,
    },
    /// The kernel does not take the programs.
    #[error(
        "the kernel refuses {what}: {message} (needs Linux 6.1 or later with BTF, and CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN; `hauberk check` says what is missing)"
    )]
    Load {
        /// Which part.
        what: String,
        /// aya's or the kernel's words.
        message: String,
    },
    /// A program cannot be attached.
    #[error("cannot attach {what}: {source}")]
    Attach {
        /// Which program, and to what.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// No egress guard, though it is required.
    #[error(
        "cannot attach the egress guard to {interface}: {source} (needs Linux 6.6; `capture.egressGuard: optional` does without)"
    )]
    Guard {
        /// The pod's interface.
        interface: String,
        /// What the system said.
        source: io::Error,
    },
    /// A table of the kernel side cannot be used.
    #[error("cannot {what}: {source}")]
    Table {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The pod's network namespace cannot be entered.
    #[error("cannot work inside the pod's network namespace: {0}")]
    Netns(#[source] io::Error),
}

/// The kernel side, in use.
pub struct Capture {
    /// Behind a lock, as programs are attached again when something has removed them.
    programs: Mutex<Programs>,
    pods: pods::Pods,
    mesh: Table<Addr, u32>,
    original_dst: Table<Captured, OriginalDst>,
    true_source: Table<Delivery, TrueSource>,
    verdicts: PerCpuArray<MapData, u64>,
    heartbeat: Table<u32, u64>,
    events: Mutex<Option<Records<Event>>>,
    news: Mutex<Option<Records<Cgroup>>>,
    gate: Gate,
    bpffs: PathBuf,
    cgroup: PathBuf,
    by_cgroup: bool,
}

/// How pods are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pods {
    /// By the network namespaces that the directory names: others are left alone.
    Named,
    /// By their cgroups, which the kubelet names after them: one that nobody has judged is held back.
    ByCgroup,
}

impl Pods {
    /// As a source of the directory tells them.
    pub fn told_by(directory: &DirectoryConfig) -> Self {
        match directory {
            DirectoryConfig::File(_) => Self::Named,
            DirectoryConfig::Kubernetes(_) | DirectoryConfig::Authority(_) => Self::ByCgroup,
        }
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("pods", &self.pods).finish_non_exhaustive()
    }
}

impl Capture {
    /// Loads the programs, adopts or makes the pins, and attaches to the pods' cgroup. Must be
    /// called on a tokio runtime, which the events are then read on.
    ///
    /// # Errors
    /// One line that says what is missing and how to mend it.
    pub fn start(
        config: &CaptureConfig,
        tunnel_port: u16,
        exempt: &[IpAddr],
        pods: Pods,
    ) -> Result<Self, CaptureError> {
        if let Some(path) = mount::only_in_v1(&config.cgroup) {
            return Err(CaptureError::OnlyV1 { path });
        }
        let (dir, mut programs, gate) = Self::load(config)?;
        let by_cgroup = pods == Pods::ByCgroup;
        gate.take_up(by_cgroup).map_err(|source| CaptureError::Table { what: "take up the gate", source })?;
        programs.attach_cgroup(&config.cgroup, by_cgroup)?;
        let news = by_cgroup.then(|| news(&mut programs)).transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "no word of new cgroups: pods are looked for once a second instead");
            None
        });
        let table = |what| move |source| CaptureError::Table { what, source };
        let exempted: Table<Addr, u32> =
            Table::open(&dir.join("EXEMPT")).map_err(table("open the table of exempt probes"))?;
        replace(&exempted, exempt.iter().copied()).map_err(table("fill the table of exempt probes"))?;
        let events = Records::new(programs.ring("EVENTS")?).map_err(table("watch the ring buffer"))?;
        Ok(Self {
            mesh: Table::open(&dir.join("MESH")).map_err(table("open the table of mesh members"))?,
            original_dst: Table::open(&dir.join("ORIGINAL_DST"))
                .map_err(table("open the table of original destinations"))?,
            true_source: Table::open(&dir.join("TRUE_SOURCE"))
                .map_err(table("open the table of true sources"))?,
            pods: pods::Pods::open(&dir, config, tunnel_port).map_err(table("open the tables of pods"))?,
            verdicts: programs.verdicts()?,
            heartbeat: Table::open(&dir.join("HEARTBEAT")).map_err(table("open the heartbeat"))?,
            events: Mutex::new(Some(events)),
            news: Mutex::new(news),
            gate,
            bpffs: config.bpffs.clone(),
            cgroup: config.cgroup.clone(),
            by_cgroup,
            programs: Mutex::new(programs),
        })
    }

    /// Loads the programs on what is pinned.
    fn load(config: &CaptureConfig) -> Result<(PathBuf, Programs, Gate), CaptureError> {
        let dir = pin_dir(config);
        mount::ensure_bpffs(&config.bpffs)
            .and_then(|()| std::fs::create_dir_all(&dir))
            .map_err(|source| CaptureError::Bpffs { path: dir.clone(), source })?;
        let programs = Programs::load(&dir)?;
        let gate =
            Gate::open(&dir).map_err(|source| CaptureError::Table { what: "open the gate", source })?;
        Ok((dir, programs, gate))
    }

    /// Shuts the gate before the node's first pod starts, and before its agent does: pins what holds
    /// pods back that nobody has judged. Nothing stays running. Makes the pods' cgroup if need be.
    ///
    /// # Errors
    /// As [`Capture::start`].
    pub fn guard(config: &CaptureConfig, reachable: &[Reachable]) -> Result<(), CaptureError> {
        let (_, mut programs, gate) = Self::load(config)?;
        let path = mount::cgroup_dir(&config.cgroup)
            .and_then(|path| std::fs::create_dir_all(&path).map(|()| path))
            .map_err(|source| CaptureError::Cgroup { path: config.cgroup.clone(), source })?;
        let table = |source| CaptureError::Table { what: "shut the gate", source };
        gate.set_reachable(reachable).map_err(table)?;
        gate.shut().map_err(table)?;
        programs.attach_cgroup(&path, true)
    }

    fn programs(&self) -> MutexGuard<'_, Programs> {
        // Whole at every instant: what was attached stays pinned.
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the set of captured destinations equal to `addresses`, adding before it removes; says
    /// whether it added any.
    ///
    /// # Errors
    /// When the table is full or cannot be written.
    pub fn set_mesh(&self, addresses: impl Iterator<Item = IpAddr>) -> Result<bool, CaptureError> {
        replace(&self.mesh, addresses.chain(verify::PROBES))
            .and_then(|grown| {
                let mut probes = verify::PROBES.iter();
                probes.try_for_each(|to| self.mesh.insert(&addr(*to), &ebpf::MEMBER_PROBE))?;
                Ok(grown)
            })
            .map_err(|source| CaptureError::Table { what: "tell the kernel who is in the mesh", source })
    }

    /// Adds destinations to the captured ones, then removes others.
    ///
    /// # Errors
    /// When the table is full or cannot be written; it may be changed in part then.
    pub fn change_mesh(
        &self,
        added: &HashSet<IpAddr>,
        removed: &HashSet<IpAddr>,
    ) -> Result<(), CaptureError> {
        let change = || {
            added.iter().try_for_each(|address| self.mesh.insert(&addr(*address), &ebpf::MEMBER))?;
            removed.iter().try_for_each(|address| self.mesh.remove(&addr(*address)))
        };
        change().map_err(|source| CaptureError::Table { what: "tell the kernel who is in the mesh", source })
    }

    /// Takes the original destination of a connection that a listener has accepted from `peer`.
    pub fn original_dst(&self, peer: SocketAddr, listener_port: u16) -> Option<SocketAddr> {
        let key = Captured { pod: addr(peer.ip()), source_port: peer.port(), listener_port };
        let row = self.original_dst.take(&key).ok()??;
        Some(SocketAddr::new(ip(row.addr), row.port))
    }

    /// Whether a captured connection is one of our own that tries the capture: it is answered, and carried nowhere.
    pub fn is_probe(&self, original_dst: SocketAddr) -> bool {
        verify::PROBES.contains(&original_dst.ip())
    }

    /// Says who is behind the connection that is about to be made inside a pod.
    ///
    /// # Errors
    /// When the table is full.
    pub fn announce(
        &self,
        pod: IpAddr,
        source_port: u16,
        app_port: u16,
        client: SocketAddr,
    ) -> Result<(), CaptureError> {
        let key = Delivery { pod: addr(pod), source_port, app_port };
        let value = TrueSource { addr: addr(client.ip()), port: client.port(), reserved: [0; 3] };
        self.true_source
            .insert(&key, &value)
            .map_err(|source| CaptureError::Table { what: "announce a delivered connection", source })
    }

    /// Takes back what [`Capture::announce`] said, if the kernel side has not used it.
    pub fn retract(&self, pod: IpAddr, source_port: u16, app_port: u16) {
        // A row that stays costs a few bytes until the port comes round again.
        let _ = self.true_source.remove(&Delivery { pod: addr(pod), source_port, app_port });
    }

    /// Tells the kernel side that an agent is alive. Call it every second.
    pub fn beat(&self) {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
        let Ok(now) = now.map(|t| std::time::Duration::from(t).as_nanos() as u64) else { return };
        if let Err(error) = self.heartbeat.insert(&0, &now) {
            tracing::warn!(%error, "cannot write the heartbeat");
        }
    }

    /// Counts of the kernel side's verdicts, by `ebpf::VERDICT_*`.
    pub fn verdicts(&self) -> [u64; VERDICT_COUNT as usize] {
        std::array::from_fn(|verdict| {
            let index = u32::try_from(verdict).unwrap_or(0);
            self.verdicts.get(&index, 0).map_or(0, |cpus| cpus.iter().sum())
        })
    }

    /// The kernel side's events; the second caller gets none.
    pub fn events(&self) -> Option<Records<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Cgroups as they are made or entered, if the kernel tells; the second caller gets none.
    pub fn news(&self) -> Option<Records<Cgroup>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Removes everything that is pinned: nothing is captured, and nothing refused, any more.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn uninstall(config: &CaptureConfig) -> Result<(), CaptureError> {
        let remove = || {
            if let Ok(pods) = mount::cgroup_dir(&config.cgroup) {
                // Made by an agent that verified its pods.
                let _ = std::fs::remove_dir(pods.join(probe::CGROUP));
            }
            remove_pins(&config.bpffs, |_| true)?;
            mount::remove_bpffs(&config.bpffs)
        };
        remove().map_err(|source| CaptureError::Bpffs { path: config.bpffs.clone(), source })
    }

    /// Removes what agents of another version have pinned; this one's is in place.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub fn remove_other_versions(&self) -> Result<(), CaptureError> {
        remove_pins(&self.bpffs, |version| version != ebpf::VERSION)
            .map_err(|source| CaptureError::Bpffs { path: self.bpffs.clone(), source })
    }
}

fn news(programs: &mut Programs) -> Result<Records<Cgroup>, CaptureError> {
    let records = Records::new(programs.ring("CGROUPS")?);
    let records = records.map_err(|source| CaptureError::Table { what: "watch the ring buffer", source })?;
    programs.watch_cgroups()?;
    Ok(records)
}

/// What is pinned carries the contract's version in its path, so two versions never meet.
fn pin_dir(config: &CaptureConfig) -> PathBuf {
    Path::new(&config.bpffs).join(ebpf::VERSION)
}

/// Removes the pins of some versions.
fn remove_pins(bpffs: &Path, of: impl Fn(&str) -> bool) -> io::Result<()> {
    if !bpffs.exists() {
        return Ok(());
    }
    for version in std::fs::read_dir(bpffs)? {
        let version = version?;
        let name = version.file_name();
        if name.to_str().is_some_and(|name| name.starts_with('v') && of(name)) {
            for pin in std::fs::read_dir(version.path())? {
                std::fs::remove_file(pin?.path())?;
            }
            std::fs::remove_dir(version.path())?;
        }
    }
    Ok(())
}

/// An address as the kernel side's rows have it.
fn addr(ip: IpAddr) -> Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn ip(addr: Addr) -> IpAddr {
    IpAddr::from(addr).to_canonical()
}

/// Makes a set equal to `addresses`, adding before it removes; says whether it added any.
fn replace(set: &Table<Addr, u32>, addresses: impl Iterator<Item = IpAddr>) -> io::Result<bool> {
    let wanted: HashSet<Addr> = addresses.map(addr).collect();
    let have: HashSet<Addr> = set.keys()?.into_iter().collect();
    for new in wanted.difference(&have) {
        set.insert(new, &1)?;
    }
    for old in have.difference(&wanted) {
        set.remove(old)?;
    }
    Ok(wanted.difference(&have).next().is_some())
}
