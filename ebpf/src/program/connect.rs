//! `connect()` inside a pod: a mesh destination becomes the agent's listener in the same pod.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_ktime_get_ns,
    bpf_set_retval,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use core::mem::offset_of;
use ebpf::{
    Addr, DOWN_OPEN, Gate, HEARTBEAT_STALE_NS, MODE_CLOSED, MODE_PERMISSIVE, Peer, Pod, VERDICT_BYPASSED,
    VERDICT_CAPTURE_FAILED, VERDICT_CAPTURED, VERDICT_EXCLUDED, VERDICT_HELD,
};

use crate::ctx::{is_zero, join, mapped, read_ptr, read32, same, split, write32};
use crate::gate;
use crate::maps::{HEARTBEAT, MESH, PODS, count, leaves_out, peer_of, report};

type Fields = aya_ebpf::bindings::bpf_sock_addr;
const ALLOW: i32 = 1;
/// The application gets EPERM, or what was set before.
const REFUSE: i32 = 0;
const ECONNREFUSED: i32 = 111;
const IPPROTO_TCP: u32 = 6;
const IP6: usize = offset_of!(Fields, user_ip6);

#[cgroup_sock_addr(connect4)]
pub(crate) fn hauberk_connect4(ctx: SockAddrContext) -> i32 {
    let raw = ctx.as_ptr();
    let wanted = mapped(read32!(raw, offset_of!(Fields, user_ip4)));
    let Some((listener, port)) = (match capture(raw, &wanted) {
        Ok(captured) => captured,
        Err(verdict) => return verdict,
    }) else {
        return ALLOW;
    };
    write32!(raw, offset_of!(Fields, user_ip4), split(&listener)[3]);
    write32!(raw, offset_of!(Fields, user_port), u32::from(port.to_be()));
    ALLOW
}

#[cgroup_sock_addr(connect6)]
pub(crate) fn hauberk_connect6(ctx: SockAddrContext) -> i32 {
    let raw = ctx.as_ptr();
    // An IPv4-mapped destination reads, and is rewritten, in mapped form: no special case.
    let wanted =
        join([read32!(raw, IP6), read32!(raw, IP6 + 4), read32!(raw, IP6 + 8), read32!(raw, IP6 + 12)]);
    let Some((listener, port)) = (match capture(raw, &wanted) {
        Ok(captured) => captured,
        Err(verdict) => return verdict,
    }) else {
        return ALLOW;
    };
    let words = split(&listener);
    write32!(raw, IP6, words[0]);
    write32!(raw, IP6 + 4, words[1]);
    write32!(raw, IP6 + 8, words[2]);
    write32!(raw, IP6 + 12, words[3]);
    write32!(raw, offset_of!(Fields, user_port), u32::from(port.to_be()));
    ALLOW
}

/// Decides on a destination: `None` leaves it alone, `Some` is where to go instead, an error is what
/// the hook returns at once.
#[inline(always)]
fn capture(raw: *mut core::ffi::c_void, wanted: &Addr) -> Result<Option<(Addr, u16)>, i32> {
    // SAFETY: map values are read, never kept.
    if unsafe { MESH.get(wanted) }.is_none() {
        // Who is in the mesh may not be known yet.
        return match gate::for_all() {
            Some(_) if gate::is_reachable(wanted, port(raw)) => Ok(None),
            Some(gate) => pass(raw, gate, wanted),
            None => Ok(None),
        };
    }
    if read32!(raw, offset_of!(Fields, protocol)) != IPPROTO_TCP {
        return Ok(None);
    }
    // SAFETY: the helper takes this program type's context.
    let cookie = unsafe { bpf_get_netns_cookie(raw) };
    // SAFETY: as above.
    let Some(pod) = (unsafe { PODS.get(cookie) }) else {
        return match gate::for_members() {
            Some(gate) => pass(raw, gate, wanted),
            None => Ok(None),
        };
    };
    // A pod's way to itself does not leave it.
    if same(wanted, &pod.v4) || same(wanted, &pod.v6) {
        return Ok(None);
    }
    if pod.mode == MODE_CLOSED {
        report(VERDICT_HELD, &pod.v4, 0, wanted, port(raw));
        // SAFETY: as in `pass`.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return Err(REFUSE);
    }
    let port = port(raw);
    let is_v4 = split(wanted)[0] == 0 && split(wanted)[1] == 0 && split(wanted)[2] == 0xffff_0000;
    let listener = if is_v4 { pod.v4 } else { pod.v6 };
    if leaves_out(&listener, wanted, port) {
        count(VERDICT_EXCLUDED);
        return Ok(None);
    }
    if bypassed(pod) {
        count(VERDICT_BYPASSED);
        return Ok(None);
    }
    let listener_port = listener_port(pod);
    if is_zero(&listener) || listener_port == 0 || !remember(raw, wanted, port, &listener, listener_port) {
        report(VERDICT_CAPTURE_FAILED, &listener, 0, wanted, port);
        return Err(REFUSE);
    }
    count(VERDICT_CAPTURED);
    Ok(Some((listener, listener_port)))
}

/// Lets a connection go its own way if the gate may let it through; else it is refused as if nobody
/// listened, which programs try again.
#[inline(always)]
fn pass(raw: *mut core::ffi::c_void, gate: &Gate, wanted: &Addr) -> Result<Option<(Addr, u16)>, i32> {
    if read32!(raw, offset_of!(Fields, protocol)) != IPPROTO_TCP {
        return Ok(None);
    }
    // SAFETY: the helper takes this program type's context.
    let cookie = unsafe { bpf_get_netns_cookie(raw) };
    // SAFETY: map values are read, never kept.
    if cookie == gate.node || unsafe { PODS.get(cookie) }.is_some() {
        return Ok(None);
    }
    // SAFETY: a helper that takes a number.
    if gate::is_free(gate::judgement(|depth| unsafe { bpf_get_current_ancestor_cgroup_id(depth) })) {
        return Ok(None);
    }
    report(VERDICT_HELD, &[0; 16], 0, wanted, port(raw));
    // SAFETY: the helper takes a number. Where the kernel takes no other word, the application gets EPERM.
    unsafe { bpf_set_retval(-ECONNREFUSED) };
    Err(REFUSE)
}

/// The destination's port.
#[inline(always)]
fn port(raw: *mut core::ffi::c_void) -> u16 {
    (read32!(raw, offset_of!(Fields, user_port)) as u16).to_be()
}

/// Whether a permissive pod goes its own way because no agent runs.
#[inline(always)]
fn bypassed(pod: &Pod) -> bool {
    if pod.mode != MODE_PERMISSIVE || pod.when_down != DOWN_OPEN {
        return false;
    }
    let beat = HEARTBEAT.get(0).copied().unwrap_or(0);
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    now.saturating_sub(beat) > HEARTBEAT_STALE_NS
}

/// One of the pod's listener ports, by chance: each has room for 28,000 connections.
#[inline(always)]
fn listener_port(pod: &Pod) -> u16 {
    // SAFETY: a helper without arguments.
    let chance = unsafe { bpf_get_prandom_u32() };
    // The agent writes 1 to 4; masking keeps the verifier content whatever it reads.
    let place = (chance % u32::from(pod.port_count.max(1))) & 3;
    match place {
        0 => pod.ports[0],
        1 => pod.ports[1],
        2 => pod.ports[2],
        _ => pod.ports[3],
    }
}

/// Keeps the true destination on the socket.
#[inline(always)]
fn remember(raw: *mut core::ffi::c_void, addr: &Addr, port: u16, real: &Addr, real_port: u16) -> bool {
    let socket = read_ptr!(raw, offset_of!(Fields, __bindgen_anon_1));
    let mut peer = Peer { addr: *addr, real: *real, port, real_port, reserved: 0 };
    // SAFETY: the socket comes from the context.
    match unsafe { peer_of(socket, Some(&mut peer)) } {
        Some(row) => {
            // The socket may have been connected before and hold an older row.
            // SAFETY: the kernel returned a whole row.
            unsafe { *row = peer };
            true
        }
        None => false,
    }
}
