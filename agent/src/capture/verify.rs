//! Whether what the agent has put in place for a pod is still there, looked at from outside: rows, links,
//! and a connection through the capture that the agent itself must answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::programs::verify;
use super::{Capture, addr};
use crate::directory::{Mode, Workload};
use crate::netns::Netns;

/// Where connections of the agent's own go that try the capture: addresses for documentation (RFC 5737,
/// RFC 3849), which are nobody's. They count as members, so every pod's capture takes them.
pub(super) const PROBES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 15)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x15))];

impl Capture {
    /// Whether the programs on the pods' cgroup are all there.
    ///
    /// # Errors
    /// In words, what is missing.
    pub fn verify_all(&self) -> Result<(), String> {
        self.programs().verify_cgroup(&self.cgroup)
    }

    /// Puts the programs on the pods' cgroup again, which may be another one by now.
    ///
    /// # Errors
    /// As [`Capture::start`].
    pub fn attach_again(&self) -> Result<(), super::CaptureError> {
        self.programs().attach_cgroup(&self.cgroup, self.by_cgroup)
    }

    /// Closes a strict pod, by each program that is still there: to members, and to whoever is outside.
    /// [`Capture::enrol`] opens it again.
    ///
    /// # Errors
    /// When its row cannot be written.
    pub fn close(&self, workload: &Workload, netns: &Netns) -> Result<(), super::CaptureError> {
        let row = ebpf::Pod { mode: ebpf::MODE_CLOSED, ..self.pods.row(workload) };
        let write = || {
            workload.addresses.iter().try_for_each(|it| self.pods.by_address.insert(&addr(*it), &row))?;
            self.pods.by_cookie.insert(&netns.cookie(), &row)
        };
        write().map_err(|source| super::CaptureError::Table { what: "close a pod", source })?;
        // Where pods are not told by their cgroups, the program that keeps connections from it is not there.
        self.programs().attach_cgroup(&self.cgroup, true)
    }

    /// Whether a pod's rows and programs are as [`Capture::enrol`] made them.
    ///
    /// # Errors
    /// In words, what is not.
    pub fn verify(&self, workload: &Workload, netns: &Netns) -> Result<(), String> {
        let (row, cookie) = (self.pods.row(workload), netns.cookie());
        let read = |e: std::io::Error| e.to_string();
        let mut rows = vec![("PODS", self.pods.by_cookie.get(&cookie).map_err(read)?)];
        for address in &workload.addresses {
            rows.push(("POD_ADDRS", self.pods.by_address.get(&addr(*address)).map_err(read)?));
        }
        if let Some((table, _)) = rows.iter().find(|(_, found)| *found != Some(row)) {
            return Err(format!("its row in {table} is another, or gone"));
        }
        let programs = self.programs();
        let inode = netns.inode();
        verify(&self.pods.pin(cookie, "lookup"), programs.lookup(workload.mode), |info| {
            u64::from(info.number()) == inode
        })
        .map_err(|why| format!("the inbound program: {why}"))?;
        if workload.mode != Mode::Strict || !self.pods.needs_guard() {
            return Ok(());
        }
        let interfaces = netns.enter(|| self.interfaces()).map_err(read)?.map_err(|e| e.to_string())?;
        for (name, index) in interfaces {
            verify(&self.pods.pin(cookie, &format!("guard-{index}")), programs.guard(), |info| {
                info.number() == index
            })
            .map_err(|why| format!("the egress guard on {name}: {why}"))?;
        }
        Ok(())
    }
}
