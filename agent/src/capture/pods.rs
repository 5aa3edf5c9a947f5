//! Which pods are enrolled: their rows, and the programs on their network namespaces.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ebpf::{Addr, Pod};
use nix::net::if_::if_nameindex;

use super::exclusions::Excluded;
use super::programs::ensure;
use super::sys::{Hook, Link, Table, Target};
use super::{Capture, CaptureError, addr, diag, ip};
use crate::config::{CaptureConfig, Guard, WhenDown};
use crate::directory::{Mode, Workload};
use crate::mesh_policy::Exclusions;
use crate::netns::Netns;

/// The tables of pods.
#[derive(Debug)]
pub(super) struct Pods {
    dir: PathBuf,
    pub(super) by_cookie: Table<u64, Pod>,
    pub(super) by_address: Table<Addr, Pod>,
    excluded: Excluded,
    ports: Vec<u16>,
    tunnel_port: u16,
    when_down: WhenDown,
    guard: Guard,
}

impl Pods {
    pub(super) fn open(dir: &Path, config: &CaptureConfig, tunnel_port: u16) -> io::Result<Self> {
        Ok(Self {
            dir: dir.into(),
            by_cookie: Table::open(&dir.join("PODS"))?,
            by_address: Table::open(&dir.join("POD_ADDRS"))?,
            excluded: Excluded::open(dir)?,
            ports: config.ports.clone(),
            tunnel_port,
            when_down: config.permissive_when_down,
            guard: config.egress_guard,
        })
    }

    pub(super) fn row(&self, workload: &Workload) -> Pod {
        let of =
            |v4: bool| workload.addresses.iter().find(|a| a.is_ipv4() == v4).map_or([0; 16], |a| addr(*a));
        let mut ports = [0; ebpf::MAX_LISTENER_PORTS];
        for (slot, port) in ports.iter_mut().zip(&self.ports) {
            *slot = *port;
        }
        Pod {
            v4: of(true),
            v6: of(false),
            ports,
            port_count: self.ports.len().min(ebpf::MAX_LISTENER_PORTS) as u16,
            tunnel_port: self.tunnel_port,
            mode: match workload.mode {
                Mode::Strict => ebpf::MODE_STRICT,
                Mode::Permissive | Mode::Off => ebpf::MODE_PERMISSIVE,
            },
            when_down: match self.when_down {
                WhenDown::Open => ebpf::DOWN_OPEN,
                WhenDown::Closed => ebpf::DOWN_CLOSED,
            },
        }
    }

    /// Whether a strict pod without the egress guard is not to be served.
    pub(super) fn needs_guard(&self) -> bool {
        self.guard == Guard::Require
    }

    pub(super) fn pin(&self, cookie: u64, what: &str) -> PathBuf {
        self.dir.join(format!("pod-{cookie}-{what}"))
    }

    /// Every pod that has a pin.
    fn pinned(&self) -> io::Result<HashSet<u64>> {
        let mut found = HashSet::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let cookie: Option<u64> = name
                .to_string_lossy()
                .strip_prefix("pod-")
                .and_then(|rest| rest.split('-').next()?.parse().ok());
            found.extend(cookie);
        }
        Ok(found)
    }

    /// The pins of a pod, with the part of their names behind the cookie.
    fn pins(&self, cookie: u64) -> io::Result<Vec<(PathBuf, String)>> {
        let prefix = format!("pod-{cookie}-");
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if let Some(what) = entry.file_name().to_string_lossy().strip_prefix(&prefix) {
                found.push((entry.path(), what.to_owned()));
            }
        }
        Ok(found)
    }
}

impl Capture {
    /// Enrols a pod, or brings an enrolled one up to date (also to another mode). The pod's
    /// listeners must be open already, so that no connection is captured and refused.
    ///
    /// # Errors
    /// When a part of it fails. What was done stays: a half-enrolled pod is closed rather than open.
    pub fn enrol(&self, workload: &Workload, netns: &Netns) -> Result<(), CaptureError> {
        let table = |source| CaptureError::Table { what: "write the pod's row", source };
        let row = self.pods.row(workload);
        let cookie = netns.cookie();
        for address in &workload.addresses {
            self.pods.by_address.insert(&addr(*address), &row).map_err(table)?;
            self.pods.excluded.set(&addr(*address), &workload.exclusions).map_err(|source| {
                CaptureError::Table { what: "tell the kernel what the pod excludes", source }
            })?;
        }
        self.pods.by_cookie.insert(&cookie, &row).map_err(table)?;
        ensure(
            &self.pods.pin(cookie, "lookup"),
            self.programs().lookup(workload.mode),
            Target::Fd(netns.fd()),
            Hook::SkLookup,
        )
        .map_err(|source| CaptureError::Attach { what: "the inbound program to the pod".into(), source })?;
        netns.enter(|| self.inside(workload, cookie)).map_err(CaptureError::Netns)?
    }

    /// What is done with the calling thread inside the pod's namespace.
    fn inside(&self, workload: &Workload, cookie: u64) -> Result<(), CaptureError> {
        // Ports of finished connections to our listeners may be used again at once. Absent before 4.x.
        let _ = fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1");
        if workload.mode != Mode::Strict {
            return self.unguard(cookie, |_| false);
        }
        let interfaces = self.interfaces()?;
        for (name, index) in &interfaces {
            let pin = self.pods.pin(cookie, &format!("guard-{index}"));
            let attached = ensure(&pin, self.programs().guard(), Target::Interface(*index), Hook::TcxEgress);
            match (attached, self.pods.guard) {
                (Ok(()), _) => {}
                (Err(source), Guard::Require) => {
                    return Err(CaptureError::Guard { interface: name.clone(), source });
                }
                (Err(error), Guard::Optional) => {
                    tracing::warn!(workload = %workload.name, interface = %name, %error, "no egress guard: a process moved into the pod's cgroup from outside may send plaintext");
                }
            }
        }
        self.unguard(cookie, |index| interfaces.values().any(|i| *i == index))?;
        self.end_plaintext(workload);
        Ok(())
    }

    /// The interfaces through which a pod's packets leave, by name.
    pub(super) fn interfaces(&self) -> Result<HashMap<String, u32>, CaptureError> {
        let all = if_nameindex().map_err(|e| CaptureError::Netns(e.into()))?;
        let named = all.iter().map(|i| (i.name().to_string_lossy().into_owned(), i.index()));
        Ok(named.filter(|(name, _)| name != "lo").collect())
    }

    /// Takes guards away from interfaces that `keep` does not want.
    fn unguard(&self, cookie: u64, keep: impl Fn(u32) -> bool) -> Result<(), CaptureError> {
        let remove = || -> io::Result<()> {
            for (path, what) in self.pods.pins(cookie)? {
                let index = what.strip_prefix("guard-").and_then(|index| index.parse().ok());
                if index.is_some_and(|index| !keep(index)) {
                    fs::remove_file(path)?;
                }
            }
            Ok(())
        };
        remove().map_err(|source| CaptureError::Table { what: "remove an egress guard", source })
    }

    /// Ends a strict pod's connections with members that began before both were in the mesh.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn end_plaintext_of(&self, workload: &Workload, netns: &Netns) -> Result<(), CaptureError> {
        netns.enter(|| self.end_plaintext(workload)).map_err(CaptureError::Netns)
    }

    fn end_plaintext(&self, workload: &Workload) {
        let Ok(mesh) = self.mesh.keys() else { return };
        let mesh: HashSet<IpAddr> = mesh.into_iter().map(ip).collect();
        let tunnel = self.pods.tunnel_port;
        let outcome = diag::destroy(|connection| {
            let (local, port) = connection.local();
            let (remote, remote_port) = connection.remote();
            let excluded =
                workload.exclusions.leaves_out(remote, remote_port) || workload.exclusions.lets_in(port);
            // To itself: captured already, or delivered. On the tunnel's port: ours.
            remote != local && port != tunnel && mesh.contains(&remote) && !excluded
        });
        match outcome {
            Ok(0) => {}
            Ok(ended) => {
                tracing::info!(workload = %workload.name, ended, "ended plaintext connections from before the enrolment");
            }
            Err(error) => {
                tracing::warn!(workload = %workload.name, %error, "cannot end plaintext connections from before the enrolment (needs CONFIG_INET_DIAG_DESTROY); restart the pod to be sure");
            }
        }
    }

    /// Lets a pod go: nothing of it is captured or refused any more.
    ///
    /// # Errors
    /// When something of it cannot be removed.
    pub fn remove(&self, cookie: u64) -> Result<(), CaptureError> {
        let remove = || -> io::Result<()> {
            // The row first: from now on connections go their own way, and nothing waits for them.
            if let Some(row) = self.pods.by_cookie.take(&cookie)? {
                for address in [row.v4, row.v6] {
                    // Another pod may have the address by now.
                    match self.pods.by_address.take(&address)? {
                        Some(other) if other != row => self.restore(&address)?,
                        _ => self.pods.excluded.set(&address, &Exclusions::default())?,
                    }
                }
            }
            for (path, _) in self.pods.pins(cookie)? {
                // Of a namespace that is gone it is detached already.
                let _ = Link::open(&path).and_then(|link| link.detach());
                fs::remove_file(path)?;
            }
            Ok(())
        };
        remove().map_err(|source| CaptureError::Table { what: "remove a pod", source })
    }

    /// Puts back the row of the pod that has an address now.
    fn restore(&self, address: &Addr) -> io::Result<()> {
        for cookie in self.pods.by_cookie.keys()? {
            if let Some(row) = self.pods.by_cookie.get(&cookie)?
                && (row.v4 == *address || row.v6 == *address)
            {
                self.pods.by_address.insert(address, &row)?;
            }
        }
        Ok(())
    }

    /// Removes pods that are pinned from before and not in `keep`.
    ///
    /// # Errors
    /// When one cannot be removed.
    pub fn retain(&self, keep: &HashSet<u64>) -> Result<(), CaptureError> {
        let table = |source| CaptureError::Table { what: "read the table of pods", source };
        let rows = self.pods.by_cookie.keys().map_err(table)?;
        // Pins without a row are left when an agent dies between the two.
        let pins = self.pods.pinned().map_err(table)?;
        for cookie in rows.into_iter().chain(pins).filter(|cookie| !keep.contains(cookie)) {
            self.remove(cookie)?;
        }
        let addresses: HashSet<Addr> = self.pods.by_address.keys().map_err(table)?.into_iter().collect();
        self.pods.excluded.retain(|address| addresses.contains(address)).map_err(table)
    }
}
