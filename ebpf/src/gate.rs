//! Pods that the agent has not judged yet: what they may do meanwhile.
//!
//! A new pod's cgroup is in no table, and nor is any after the node has started anew: whoever is not
//! known is held back, without anybody having to be quick. Who is judged, enrolled, or of the node's
//! own network never is.

use ebpf::{Addr, GATE_ALL, GATE_MEMBERS, Gate, JUDGED_FREE, Place};

use crate::ctx::split;
use crate::maps::{GATE, JUDGED, REACHABLE};

/// A pod's cgroup lies no deeper below the root than this.
const MAX_DEPTH: i32 = 8;
const DNS: u16 = 53;
const ANY: Addr = [0; 16];

/// The gate, if it is shut for destinations in the mesh.
#[inline(always)]
pub(crate) fn for_members() -> Option<&'static Gate> {
    GATE.get(0).filter(|gate| gate.state == GATE_MEMBERS || gate.state == GATE_ALL)
}

/// The gate, if it is shut for every destination.
#[inline(always)]
pub(crate) fn for_all() -> Option<&'static Gate> {
    GATE.get(0).filter(|gate| gate.state == GATE_ALL)
}

/// How the agent has judged the pod whose cgroup, or one below it, is meant; `id_at` says the ID of
/// the cgroup's ancestor at a depth, 0 where there is none.
#[inline(always)]
pub(crate) fn judgement(id_at: impl Fn(i32) -> u64) -> Option<u32> {
    for depth in 1..=MAX_DEPTH {
        let id = id_at(depth);
        if id == 0 {
            return None;
        }
        // SAFETY: map values are read, never kept.
        if let Some(judged) = unsafe { JUDGED.get(id) } {
            return Some(*judged);
        }
    }
    None
}

/// Whether the judgement lets connections go round the capture.
#[inline(always)]
pub(crate) fn is_free(judged: Option<u32>) -> bool {
    judged == Some(JUDGED_FREE)
}

/// Whether a destination is open to everybody while nobody is judged: the pod itself by loopback, DNS,
/// and what the node's start cannot do without.
#[inline(always)]
pub(crate) fn is_reachable(addr: &Addr, port: u16) -> bool {
    if port == DNS || is_loopback(addr) {
        return true;
    }
    // SAFETY: map values are read, never kept.
    unsafe {
        REACHABLE.get(Place { addr: *addr, port, reserved: 0 }).is_some()
            || REACHABLE.get(Place { addr: *addr, port: 0, reserved: 0 }).is_some()
            || REACHABLE.get(Place { addr: ANY, port, reserved: 0 }).is_some()
    }
}

/// Whether connections to a port are answered while nobody is judged.
#[inline(always)]
pub(crate) fn is_answered(port: u16) -> bool {
    // SAFETY: map values are read, never kept.
    port == DNS || unsafe { REACHABLE.get(Place { addr: ANY, port, reserved: 0 }) }.is_some()
}

/// 127.0.0.0/8, ::1, or the unspecified address of either family, which means the same to `connect()`.
#[inline(always)]
pub(crate) fn is_loopback(addr: &Addr) -> bool {
    let words = split(addr);
    if words[0] | words[1] != 0 {
        return false;
    }
    let v4 = words[2] == 0xffff_0000 && (words[3] & 0xff == 127 || words[3] == 0);
    let v6 = words[2] == 0 && (words[3] == 1u32.to_be() || words[3] == 0);
    v4 || v6
}
