//! TCP's own events: publishes where a captured connection wanted to go before its SYN leaves, and
//! ties a delivered connection to its true client before the application can accept it.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB,
};
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use core::mem::offset_of;
use ebpf::{Addr, Captured, Delivery, OriginalDst, Peer};

use crate::ctx::{join, mapped, read_ptr, read32, same};
use crate::maps::{ORIGINAL_DST, PODS, TRUE_SOURCE, peer_of};

type Fields = aya_ebpf::bindings::bpf_sock_ops;
const AF_INET: u32 = 2;
pub(super) const TCP_CLOSE: u32 = 7;
const REMOTE_IP6: usize = offset_of!(Fields, remote_ip6);
const LOCAL_IP6: usize = offset_of!(Fields, local_ip6);
/// `args[1]`: the new state in a state callback.
pub(super) const NEW_STATE: usize = offset_of!(Fields, __bindgen_anon_1) + 4;

#[sock_ops]
pub(crate) fn hauberk_sockops(ctx: SockOpsContext) -> u32 {
    let raw = ctx.as_ptr();
    // Most calls are none of ours: out as early as possible.
    match read32!(raw, offset_of!(Fields, op)) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => publish(&ctx, raw),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => attribute(raw),
        BPF_SOCK_OPS_STATE_CB if read32!(raw, NEW_STATE) == TCP_CLOSE => withdraw(raw),
        _ => {}
    }
    1
}

/// The source port is chosen, the SYN not yet sent: whoever accepts it will find the row.
#[inline(always)]
fn publish(ctx: &SockOpsContext, raw: *mut core::ffi::c_void) {
    let socket = read_ptr!(raw, offset_of!(Fields, __bindgen_anon_2));
    // SAFETY: the socket comes from the context, and the kernel returns a whole row.
    let Some(peer) = (unsafe { peer_of(socket, None).map(|row| *row) }) else { return };
    let (remote, port) = remote(raw);
    if port != peer.real_port || !same(&remote, &peer.real) {
        return;
    }
    // From another source address (bound to loopback, say) the row's key would be another's.
    if !same(&local(raw), &remote) {
        return;
    }
    let key = Captured { pod: remote, source_port: local_port(raw), listener_port: port };
    let value = OriginalDst { addr: peer.addr, port: peer.port, reserved: [0; 3] };
    // No room: the agent finds nothing and resets the connection.
    let _ = ORIGINAL_DST.insert(key, value, 0);
    // Should the connection fail before the agent takes the row, its end removes it.
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    let _ = ctx.set_cb_flags(flags as i32);
}

/// A connection to a local application is complete: if it is the agent's, it has a true client.
#[inline(always)]
fn attribute(raw: *mut core::ffi::c_void) {
    let (remote, source_port) = remote(raw);
    let local = local(raw);
    // The agent delivers from the pod's own address; every other connection is out here.
    if !same(&remote, &local) {
        return;
    }
    // The address must be this very pod's: one that a pod gave itself is not.
    // SAFETY: the helper takes this program type's context; map values are read, never kept.
    let Some(pod) = (unsafe { PODS.get(bpf_get_netns_cookie(raw)) }) else { return };
    if !same(&local, &pod.v4) && !same(&local, &pod.v6) {
        return;
    }
    let key = Delivery { pod: local, source_port, app_port: local_port(raw) };
    // SAFETY: map values are read, never kept.
    let Some(source) = (unsafe { TRUE_SOURCE.get(key) }) else { return };
    let mut peer =
        Peer { addr: source.addr, real: remote, port: source.port, real_port: source_port, reserved: 0 };
    let socket = read_ptr!(raw, offset_of!(Fields, __bindgen_anon_2));
    // SAFETY: the socket comes from the context.
    let _ = unsafe { peer_of(socket, Some(&mut peer)) };
    let _ = TRUE_SOURCE.remove(key);
}

/// Removes what the agent did not take.
#[inline(always)]
fn withdraw(raw: *mut core::ffi::c_void) {
    let (remote, listener_port) = remote(raw);
    let _ = ORIGINAL_DST.remove(Captured { pod: remote, source_port: local_port(raw), listener_port });
}

#[inline(always)]
pub(super) fn remote(raw: *mut core::ffi::c_void) -> (Addr, u16) {
    let addr = if read32!(raw, offset_of!(Fields, family)) == AF_INET {
        mapped(read32!(raw, offset_of!(Fields, remote_ip4)))
    } else {
        join([
            read32!(raw, REMOTE_IP6),
            read32!(raw, REMOTE_IP6 + 4),
            read32!(raw, REMOTE_IP6 + 8),
            read32!(raw, REMOTE_IP6 + 12),
        ])
    };
    // Network order, in the upper half of the word on little-endian machines.
    (addr, u32::from_be(read32!(raw, offset_of!(Fields, remote_port))) as u16)
}

#[inline(always)]
pub(super) fn local(raw: *mut core::ffi::c_void) -> Addr {
    if read32!(raw, offset_of!(Fields, family)) == AF_INET {
        mapped(read32!(raw, offset_of!(Fields, local_ip4)))
    } else {
        join([
            read32!(raw, LOCAL_IP6),
            read32!(raw, LOCAL_IP6 + 4),
            read32!(raw, LOCAL_IP6 + 8),
            read32!(raw, LOCAL_IP6 + 12),
        ])
    }
}

/// Host order, unlike the remote port.
#[inline(always)]
pub(super) fn local_port(raw: *mut core::ffi::c_void) -> u16 {
    read32!(raw, offset_of!(Fields, local_port)) as u16
}
