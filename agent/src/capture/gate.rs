//! What pods may do that are not judged yet: the kernel side's gate, and who is past it.
//!
//! Where a cluster says which pods there are, a pod is told by its cgroup, and one that nobody has
//! judged reaches no member of the mesh and is reached by nobody. So nothing depends on how soon a new
//! pod is looked at. After a start of the node the members are not known either: `hauberk guard` shuts the
//! gate for every destination until an agent knows them.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use ebpf::{GATE_ALL, GATE_MEMBERS, GATE_OPEN, JUDGED_FREE, JUDGED_STRICT, Place};

use super::sys::Table;
use super::{Capture, CaptureError, addr};
use crate::config::Reachable;
use crate::netns::Netns;

/// How a pod is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Not in the mesh, or free to go round it.
    Free,
    /// Enrolled, and closed to what is not captured.
    Strict,
}

/// The gate's tables.
#[derive(Debug)]
pub(super) struct Gate {
    row: Table<u32, ebpf::Gate>,
    judged: Table<u64, u32>,
    reachable: Table<Place, u32>,
    node: u64,
}

impl Gate {
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let node = Netns::open(Path::new("/proc/self/ns/net"))?.cookie();
        Ok(Self {
            row: Table::open(&dir.join("GATE"))?,
            judged: Table::open(&dir.join("JUDGED"))?,
            reachable: Table::open(&dir.join("REACHABLE"))?,
            node,
        })
    }

    fn state(&self) -> io::Result<u32> {
        Ok(self.row.get(&0)?.map_or(GATE_OPEN, |row| row.state))
    }

    fn set(&self, state: u32) -> io::Result<()> {
        self.row.insert(&0, &ebpf::Gate { node: self.node, state, reserved: 0 })
    }

    /// Keeps the gate as it was left, or opens it for good where pods are not told by their cgroups.
    pub(super) fn take_up(&self, by_cgroup: bool) -> io::Result<()> {
        match by_cgroup {
            true => self.set(self.state()?),
            false => self.set(GATE_OPEN),
        }
    }

    /// Shuts it for every destination, unless an agent has said already who is in the mesh.
    pub(super) fn shut(&self) -> io::Result<()> {
        match self.state()? {
            GATE_MEMBERS => Ok(()),
            _ => self.set(GATE_ALL),
        }
    }

    /// Makes the destinations that stay open equal to `places`, adding before it removes.
    pub(super) fn set_reachable(&self, places: &[Reachable]) -> io::Result<()> {
        let wanted: Vec<Place> = places.iter().map(place).collect();
        wanted.iter().try_for_each(|place| self.reachable.insert(place, &1))?;
        let stale = self.reachable.keys()?.into_iter().filter(|place| !wanted.contains(place));
        stale.into_iter().try_for_each(|place| self.reachable.remove(&place))
    }

    fn judge(&self, pods: &HashMap<u64, Judgement>) -> io::Result<()> {
        for (cgroup, judgement) in pods {
            let value = match judgement {
                Judgement::Free => JUDGED_FREE,
                Judgement::Strict => JUDGED_STRICT,
            };
            if self.judged.get(cgroup)? != Some(value) {
                self.judged.insert(cgroup, &value)?;
            }
        }
        for gone in self.judged.keys()?.iter().filter(|cgroup| !pods.contains_key(cgroup)) {
            self.judged.remove(gone)?;
        }
        Ok(())
    }
}

fn place(reachable: &Reachable) -> Place {
    let address = reachable.address.map_or([0; 16], addr);
    Place { addr: address, port: reachable.port.unwrap_or(0), reserved: 0 }
}

impl From<SocketAddr> for Reachable {
    fn from(address: SocketAddr) -> Self {
        Self { address: Some(address.ip().to_canonical()).filter(not_any), port: Some(address.port()) }
    }
}

fn not_any(ip: &IpAddr) -> bool {
    !ip.is_unspecified()
}

impl Capture {
    /// Says how each pod of this node is judged, by the ID of its cgroup; whoever is not named is held back
    /// from now on, by all that is known of the mesh.
    ///
    /// # Errors
    /// When a table cannot be written.
    pub fn judge(&self, pods: &HashMap<u64, Judgement>) -> Result<(), CaptureError> {
        // The judged first: nobody is held back on the way.
        self.gate
            .judge(pods)
            .and_then(|()| match self.gate.state()? {
                GATE_MEMBERS => Ok(()),
                _ => self.gate.set(GATE_MEMBERS),
            })
            .map_err(|source| CaptureError::Table { what: "tell the kernel which pods are judged", source })
    }
}
