//! `getpeername()` and `accept()`: captured and delivered sockets report their true peer.

use aya_ebpf::EbpfContext;
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use core::mem::offset_of;
use ebpf::{Addr, Peer};

use crate::ctx::{join, mapped, read_ptr, read32, same, split, write32};
use crate::maps::peer_of;

type Fields = aya_ebpf::bindings::bpf_sock_addr;
/// The only value these hooks may return.
const ALLOW: i32 = 1;
const IP6: usize = offset_of!(Fields, user_ip6);

#[cgroup_sock_addr(getpeername4)]
pub(crate) fn hauberk_getpeername4(ctx: SockAddrContext) -> i32 {
    let raw = ctx.as_ptr();
    let Some(peer) = row(raw) else { return ALLOW };
    let now = mapped(read32!(raw, offset_of!(Fields, user_ip4)));
    let port = (read32!(raw, offset_of!(Fields, user_port)) as u16).to_be();
    // An IPv6 peer has no form that an IPv4 socket could report.
    if is_current(&peer, &now, port) && split(&peer.addr)[2] == 0xffff_0000 {
        write32!(raw, offset_of!(Fields, user_ip4), split(&peer.addr)[3]);
        write32!(raw, offset_of!(Fields, user_port), u32::from(peer.port.to_be()));
    }
    ALLOW
}

#[cgroup_sock_addr(getpeername6)]
pub(crate) fn hauberk_getpeername6(ctx: SockAddrContext) -> i32 {
    let raw = ctx.as_ptr();
    let Some(peer) = row(raw) else { return ALLOW };
    let now = join([read32!(raw, IP6), read32!(raw, IP6 + 4), read32!(raw, IP6 + 8), read32!(raw, IP6 + 12)]);
    let port = (read32!(raw, offset_of!(Fields, user_port)) as u16).to_be();
    if is_current(&peer, &now, port) {
        let words = split(&peer.addr);
        write32!(raw, IP6, words[0]);
        write32!(raw, IP6 + 4, words[1]);
        write32!(raw, IP6 + 8, words[2]);
        write32!(raw, IP6 + 12, words[3]);
        write32!(raw, offset_of!(Fields, user_port), u32::from(peer.port.to_be()));
    }
    ALLOW
}

#[inline(always)]
fn row(raw: *mut core::ffi::c_void) -> Option<Peer> {
    let socket = read_ptr!(raw, offset_of!(Fields, __bindgen_anon_1));
    // SAFETY: the socket comes from the context, and the kernel returns a whole row.
    unsafe { peer_of(socket, None).map(|row| *row) }
}

/// A socket that failed and was connected anew, elsewhere, still has its old row.
#[inline(always)]
fn is_current(peer: &Peer, now: &Addr, port: u16) -> bool {
    peer.real_port == port && same(&peer.real, now)
}
