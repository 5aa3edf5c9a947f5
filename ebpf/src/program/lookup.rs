//! New connections that arrive at a pod: plaintext passes, is counted or is refused, by mode.
//!
//! Linked to each pod's network namespace. Runs once for each new connection, never for
//! established ones, and for connections over loopback too.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use core::mem::offset_of;
use ebpf::{
    Addr, INBOUND, MODE_CLOSED, MODE_PERMISSIVE, Pod, Probe, VERDICT_EXCLUDED, VERDICT_LISTENER_REFUSED,
    VERDICT_PLAINTEXT_ACCEPTED, VERDICT_PLAINTEXT_REFUSED, VERDICT_PROBE_ACCEPTED,
};

use crate::ctx::{join, mapped, read32, same};
use crate::gate::is_loopback;
use crate::maps::{EXEMPT, POD_ADDRS, PROBES, count, excludes, report};

type Fields = aya_ebpf::bindings::bpf_sk_lookup;
const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const REMOTE_IP6: usize = offset_of!(Fields, remote_ip6);
const LOCAL_IP6: usize = offset_of!(Fields, local_ip6);

/// Linked to permissive pods.
#[sk_lookup]
pub(crate) fn hauberk_lookup(ctx: SkLookupContext) -> u32 {
    lookup(&ctx, false)
}

/// Linked to strict pods: what is at an address that the directory does not list is closed too.
#[sk_lookup]
pub(crate) fn hauberk_strict(ctx: SkLookupContext) -> u32 {
    lookup(&ctx, true)
}

#[inline(always)]
fn lookup(ctx: &SkLookupContext, strict: bool) -> u32 {
    let raw = ctx.as_ptr();
    if read32!(raw, offset_of!(Fields, protocol)) != IPPROTO_TCP {
        return SK_PASS;
    }
    let v4 = read32!(raw, offset_of!(Fields, family)) == AF_INET;
    let (local, remote) = if v4 {
        (
            mapped(read32!(raw, offset_of!(Fields, local_ip4))),
            mapped(read32!(raw, offset_of!(Fields, remote_ip4))),
        )
    } else {
        (
            join([
                read32!(raw, LOCAL_IP6),
                read32!(raw, LOCAL_IP6 + 4),
                read32!(raw, LOCAL_IP6 + 8),
                read32!(raw, LOCAL_IP6 + 12),
            ]),
            join([
                read32!(raw, REMOTE_IP6),
                read32!(raw, REMOTE_IP6 + 4),
                read32!(raw, REMOTE_IP6 + 8),
                read32!(raw, REMOTE_IP6 + 12),
            ]),
        )
    };
    // From the pod itself: the agent delivers so, and captured connections reach the agent so. The
    // kernel drops packets from outside that claim to come from here.
    if same(&local, &remote) {
        return SK_PASS;
    }
    // SAFETY: map values are read, never kept.
    let Some(pod) = (unsafe { POD_ADDRS.get(local) }) else {
        // Loopback, or an address of the pod's that the directory does not list.
        if !strict || is_loopback(&local) {
            return SK_PASS;
        }
        report(VERDICT_PLAINTEXT_REFUSED, &remote, 0, &local, 0);
        return SK_DROP;
    };
    let port = read32!(raw, offset_of!(Fields, local_port)) as u16;
    let source_port = (read32!(raw, offset_of!(Fields, remote_port)) as u16).to_be();
    judge(pod, &remote, source_port, &local, port)
}

#[inline(always)]
fn judge(pod: &Pod, remote: &Addr, source_port: u16, local: &Addr, port: u16) -> u32 {
    if port == pod.tunnel_port {
        return SK_PASS;
    }
    if port != 0
        && (port == pod.ports[0] || port == pod.ports[1] || port == pod.ports[2] || port == pod.ports[3])
    {
        report(VERDICT_LISTENER_REFUSED, remote, source_port, local, port);
        return SK_DROP;
    }
    if pod.mode != MODE_CLOSED && excludes(local, port, INBOUND) {
        count(VERDICT_EXCLUDED);
        return SK_PASS;
    }
    if pod.mode == MODE_PERMISSIVE {
        report(VERDICT_PLAINTEXT_ACCEPTED, remote, source_port, local, port);
        return SK_PASS;
    }
    let probe = Probe { pod: *local, from: *remote, port, from_port: source_port };
    // SAFETY: map values are read, never kept.
    if pod.mode != MODE_CLOSED && unsafe { PROBES.get(probe).is_some() || EXEMPT.get(remote).is_some() } {
        count(VERDICT_PROBE_ACCEPTED);
        return SK_PASS;
    }
    report(VERDICT_PLAINTEXT_REFUSED, remote, source_port, local, port);
    SK_DROP
}
