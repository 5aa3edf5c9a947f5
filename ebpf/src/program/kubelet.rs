//! The kubelet's connections to pods of its node: told to the pods' side before their SYN leaves, so that a
//! probe is known by the socket it comes from and not by an address, which anybody on the node can use.
//!
//! Attached to the kubelet's own cgroup.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use core::mem::offset_of;
use ebpf::Probe;

use super::sockops::{NEW_STATE, TCP_CLOSE, local, local_port, remote};
use crate::ctx::read32;
use crate::maps::{POD_ADDRS, PROBES};

type Fields = aya_ebpf::bindings::bpf_sock_ops;

#[sock_ops]
pub(crate) fn hauberk_kubelet(ctx: SockOpsContext) -> u32 {
    let raw = ctx.as_ptr();
    match read32!(raw, offset_of!(Fields, op)) {
        BPF_SOCK_OPS_TCP_CONNECT_CB => announce(&ctx, raw),
        BPF_SOCK_OPS_STATE_CB if read32!(raw, NEW_STATE) == TCP_CLOSE => {
            let _ = PROBES.remove(probe(raw));
        }
        _ => {}
    }
    1
}

#[inline(always)]
fn announce(ctx: &SockOpsContext, raw: *mut core::ffi::c_void) {
    let probe = probe(raw);
    // SAFETY: map values are read, never kept.
    if unsafe { POD_ADDRS.get(probe.pod) }.is_none() {
        return;
    }
    // No room: the probe is refused, and the next one may have more luck.
    let _ = PROBES.insert(probe, 1, 0);
    let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG;
    let _ = ctx.set_cb_flags(flags as i32);
}

#[inline(always)]
fn probe(raw: *mut core::ffi::c_void) -> Probe {
    let (pod, port) = remote(raw);
    Probe { pod, from: local(raw), port, from_port: local_port(raw) }
}
