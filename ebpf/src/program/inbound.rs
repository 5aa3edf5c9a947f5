//! Connections that arrive at a pod nobody has judged yet, or whose capture cannot be verified, are dropped:
//! what would be answered goes out in plaintext.
//!
//! Attached to the pods' cgroup, this sees every packet that reaches a socket in it; all but those to a
//! listener are out after one comparison. A pod that is enrolled has its own program on its network
//! namespace, see `lookup`.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_skb_ancestor_cgroup_id};
use aya_ebpf::macros::cgroup_skb;
use aya_ebpf::programs::SkBuffContext;
use core::mem::offset_of;
use ebpf::{MODE_CLOSED, VERDICT_HELD};

use crate::ctx::{read_ptr, read32};
use crate::gate;
use crate::maps::{PODS, count};

type Fields = aya_ebpf::bindings::__sk_buff;
type Sock = aya_ebpf::bindings::bpf_sock;
const PASS: i32 = 1;
const DROP: i32 = 0;
const TCP_LISTEN: u32 = 10;
/// Every network namespace's first interface.
const LOOPBACK: u32 = 1;

#[cgroup_skb(ingress)]
pub(crate) fn hauberk_inbound(ctx: SkBuffContext) -> i32 {
    let raw = ctx.as_ptr();
    let socket = read_ptr!(raw, offset_of!(Fields, __bindgen_anon_2));
    if socket.is_null() || read32!(socket, offset_of!(Sock, state)) != TCP_LISTEN {
        return PASS;
    }
    if read32!(raw, offset_of!(Fields, ifindex)) == LOOPBACK {
        return PASS;
    }
    // SAFETY: the helper takes this program type's context.
    let cookie = unsafe { bpf_get_netns_cookie(raw) };
    // SAFETY: map values are read, never kept.
    if let Some(pod) = unsafe { PODS.get(cookie) } {
        return if pod.mode == MODE_CLOSED { DROP } else { PASS };
    }
    let Some(gate) = gate::for_members() else { return PASS };
    let port = read32!(socket, offset_of!(Sock, src_port)) as u16;
    if cookie == gate.node || gate::is_answered(port) {
        return PASS;
    }
    // SAFETY: the helper takes this program type's context.
    if gate::judgement(|depth| unsafe { bpf_skb_ancestor_cgroup_id(raw.cast(), depth) }).is_some() {
        return PASS;
    }
    count(VERDICT_HELD);
    DROP
}
