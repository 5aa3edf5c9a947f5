//! What pods leave alone, in the kernel side's tables.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ebpf::{Addr, ExcludedPort, ExcludedRange};

use super::addr;
use super::sys::Table;
use crate::mesh_policy::Exclusions;

/// Bits of an address in the tables.
const ADDR_BITS: u32 = 128;

/// The rows of one pod's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Rows {
    ports: HashSet<ExcludedPort>,
    ranges: HashSet<ExcludedRange>,
}

/// The tables, and what is in them.
#[derive(Debug)]
pub(super) struct Excluded {
    ports: Table<ExcludedPort, u32>,
    ranges: Table<ExcludedRange, u32>,
    now: Mutex<HashMap<Addr, Rows>>,
}

impl Excluded {
    /// Opens the tables with what an earlier agent left in them.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let ports: Table<ExcludedPort, u32> = Table::open(&dir.join("EXCLUDED_PORTS"))?;
        let ranges: Table<ExcludedRange, u32> = Table::open(&dir.join("EXCLUDED_RANGES"))?;
        let mut now: HashMap<Addr, Rows> = HashMap::new();
        for row in ports.keys()? {
            now.entry(row.pod).or_default().ports.insert(row);
        }
        for row in ranges.keys()? {
            now.entry(row.pod).or_default().ranges.insert(row);
        }
        Ok(Self { ports, ranges, now: Mutex::new(now) })
    }

    /// Makes what is left alone of a pod's address exactly this.
    pub(super) fn set(&self, pod: &Addr, exclusions: &Exclusions) -> io::Result<()> {
        let wanted = rows(pod, exclusions);
        let mut now = self.lock();
        let have = now.remove(pod).unwrap_or_default();
        // What may be excluded no more goes first: a failure later leaves too little alone, not too much.
        have.ports.difference(&wanted.ports).try_for_each(|row| self.ports.remove(row))?;
        have.ranges.difference(&wanted.ranges).try_for_each(|row| self.ranges.remove(row))?;
        wanted.ports.difference(&have.ports).try_for_each(|row| self.ports.insert(row, &1))?;
        wanted.ranges.difference(&have.ranges).try_for_each(|row| self.ranges.insert(row, &1))?;
        if wanted != Rows::default() {
            now.insert(*pod, wanted);
        }
        Ok(())
    }

    /// Forgets what is left alone of addresses that `keep` does not want.
    pub(super) fn retain(&self, keep: impl Fn(&Addr) -> bool) -> io::Result<()> {
        let gone: Vec<Addr> = self.lock().keys().filter(|pod| !keep(pod)).copied().collect();
        gone.iter().try_for_each(|pod| self.set(pod, &Exclusions::default()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Addr, Rows>> {
        // What a panic left out is in the table only, where it is removed with its pod's next agent.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn rows(pod: &Addr, exclusions: &Exclusions) -> Rows {
    let port = |direction| move |port: &u16| ExcludedPort { pod: *pod, port: *port, direction };
    let inbound = exclusions.inbound_ports().iter().map(port(ebpf::INBOUND));
    let outbound = exclusions.outbound_ports().iter().map(port(ebpf::OUTBOUND));
    let range = |cidr: &crate::cidr::Cidr| {
        let first = cidr.first();
        let behind = match first {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        } - u32::from(cidr.prefix());
        ExcludedRange { prefix: 2 * ADDR_BITS - behind, pod: *pod, destination: addr(first) }
    };
    Rows {
        ports: inbound.chain(outbound).collect(),
        ranges: exclusions.outbound_cidrs().iter().map(range).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh_policy::document::Exclude;

    #[test]
    fn a_range_counts_the_bits_of_pod_and_mapped_prefix() {
        let mut exclusions = Exclusions::default();
        let cidrs = ["10.0.0.0/8", "fd00::/16", "0.0.0.0/0"].map(|text| text.parse().unwrap()).to_vec();
        exclusions.add(&Exclude { outbound_cidrs: Some(cidrs), ..Exclude::default() });
        let rows = rows(&addr([10, 1, 1, 2].into()), &exclusions);
        let mut prefixes: Vec<u32> = rows.ranges.iter().map(|row| row.prefix).collect();
        prefixes.sort_unstable();
        // The pod's 128 bits, then 16; or 96 of the mapping and 0 or 8.
        assert_eq!(prefixes, [144, 224, 232]);
    }
}
