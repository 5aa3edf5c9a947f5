//! What leaves a strict pod: no TCP connection to a mesh member may begin in plaintext.
//!
//! Attached to the pod's interfaces, this sees every packet, whatever cgroup its socket is in and
//! whether an agent runs or not. The agent itself never dials from inside a pod, so every SYN to a
//! mesh member that gets here has gone round the capture, or is excluded from it.

use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes_relative;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf::{Addr, VERDICT_EGRESS_DROPPED};

use crate::ctx::mapped;
use crate::maps::{MESH, leaves_out, report};

/// `enum tcx_action_base`: go on with the next program.
const TCX_NEXT: i32 = -1;
/// `enum tcx_action_base`.
const TCX_DROP: i32 = 2;
const IPPROTO_TCP: u8 = 6;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;
/// IPv6 extension headers walked before a packet to a mesh member is dropped as unreadable.
const MAX_EXTENSIONS: usize = 6;

#[classifier]
pub(crate) fn hauberk_guard(ctx: TcContext) -> i32 {
    match judge(&ctx) {
        Some(()) => TCX_DROP,
        None => TCX_NEXT,
    }
}

/// `Some` when the packet must not leave.
#[inline(always)]
fn judge(ctx: &TcContext) -> Option<()> {
    let first: u8 = load(ctx, 0)?;
    match first >> 4 {
        4 => ipv4(ctx, first),
        6 => ipv6(ctx),
        _ => None,
    }
}

#[inline(always)]
fn ipv4(ctx: &TcContext, first: u8) -> Option<()> {
    let destination = mapped(load(ctx, 16)?);
    if load::<u8>(ctx, 9)? != IPPROTO_TCP || !in_mesh(&destination) {
        return None;
    }
    let fragment: [u8; 2] = load(ctx, 6)?;
    let source = mapped(load(ctx, 12)?);
    match u16::from_be_bytes(fragment) & 0x1fff {
        0 => {}
        // Begins inside the TCP header: nobody but an attacker cuts there (RFC 3128).
        1 => return refuse(&source, 0, &destination, 0),
        // Later fragments have no TCP header; without the first they are no connection.
        _ => return None,
    }
    tcp(ctx, u32::from(first & 0x0f) * 4, &source, &destination)
}

#[inline(always)]
fn ipv6(ctx: &TcContext) -> Option<()> {
    let destination: Addr = load(ctx, 24)?;
    if !in_mesh(&destination) {
        return None;
    }
    let source: Addr = load(ctx, 8)?;
    let mut next: u8 = load(ctx, 6)?;
    let mut offset = 40u32;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            IPPROTO_TCP => return tcp(ctx, offset, &source, &destination),
            // Hop-by-hop, routing, destination options: length in units of 8, less the first.
            0 | 43 | 60 => {
                let header: [u8; 2] = load(ctx, offset)?;
                next = header[0];
                offset += (u32::from(header[1]) + 1) * 8;
            }
            44 => {
                let header: [u8; 4] = load(ctx, offset)?;
                if (u16::from_be_bytes([header[2], header[3]]) & 0xfff8) != 0 {
                    return None;
                }
                next = header[0];
                offset += 8;
            }
            // An authentication header: TCP may be behind it.
            51 => break,
            _ => return None,
        }
    }
    // More extension headers than anyone needs: nobody shall hide a SYN behind them.
    refuse(&source, 0, &destination, 0)
}

#[inline(always)]
fn tcp(ctx: &TcContext, offset: u32, source: &Addr, destination: &Addr) -> Option<()> {
    // A header cut short before its flags is not TCP that anyone needs.
    let Some(flags) = load::<u8>(ctx, offset + 13) else { return refuse(source, 0, destination, 0) };
    if flags & (TCP_SYN | TCP_ACK) != TCP_SYN {
        return None;
    }
    let ports: [u8; 4] = load(ctx, offset)?;
    let (from, to) = (u16::from_be_bytes([ports[0], ports[1]]), u16::from_be_bytes([ports[2], ports[3]]));
    // Counted where it was connected; from another's address nothing can begin, as the answer goes there.
    if leaves_out(source, destination, to) {
        return None;
    }
    refuse(source, from, destination, to)
}

#[inline(always)]
fn refuse(source: &Addr, from: u16, destination: &Addr, to: u16) -> Option<()> {
    report(VERDICT_EGRESS_DROPPED, source, from, destination, to);
    Some(())
}

#[inline(always)]
fn in_mesh(destination: &Addr) -> bool {
    // SAFETY: map values are read, never kept.
    unsafe { MESH.get(destination) }.is_some()
}

/// Reads from the network header on, whatever link layer lies before it.
#[inline(always)]
fn load<T: Copy>(ctx: &TcContext, offset: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper fills the whole value or fails, and any bits make a value of these types.
    let failed = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.skb.skb.cast(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            BPF_HDR_START_NET,
        )
    };
    // SAFETY: filled, as the helper did not fail.
    if failed == 0 { Some(unsafe { value.assume_init() }) } else { None }
}
