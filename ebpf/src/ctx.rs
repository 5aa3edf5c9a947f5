//! Reads and writes of program contexts.
//!
//! The verifier rewrites each context access and accepts only constant offsets. LLVM merges two arms
//! of an `if` into one load with a variable offset, volatile or not; inline assembly it leaves alone.

/// Reads 32 bits of a context at a constant offset.
macro_rules! read32 {
    ($ctx:expr, $offset:expr) => {{
        let value: u64;
        // SAFETY: the offset is a field of the context's type; the verifier checks it again.
        unsafe {
            core::arch::asm!(
                "{value} = *(u32 *)({ctx} + {offset})",
                value = out(reg) value,
                ctx = in(reg) $ctx,
                offset = const $offset,
                options(readonly, nostack, preserves_flags),
            );
        }
        value as u32
    }};
}

/// Reads a pointer out of a context at a constant offset.
macro_rules! read_ptr {
    ($ctx:expr, $offset:expr) => {{
        let value: *mut core::ffi::c_void;
        // SAFETY: as for `read32`.
        unsafe {
            core::arch::asm!(
                "{value} = *(u64 *)({ctx} + {offset})",
                value = out(reg) value,
                ctx = in(reg) $ctx,
                offset = const $offset,
                options(readonly, nostack, preserves_flags),
            );
        }
        value
    }};
}

/// Writes 32 bits of a context at a constant offset.
macro_rules! write32 {
    ($ctx:expr, $offset:expr, $value:expr) => {{
        let value: u64 = u64::from($value);
        // SAFETY: as for `read32`; the field is one that this program type may write.
        unsafe {
            core::arch::asm!(
                "*(u32 *)({ctx} + {offset}) = {value}",
                value = in(reg) value,
                ctx = in(reg) $ctx,
                offset = const $offset,
                options(nostack, preserves_flags),
            );
        }
    }};
}

pub(crate) use {read_ptr, read32, write32};

/// An IPv4 address (as the kernel hands it over, in network order) in mapped form.
#[inline(always)]
pub(crate) fn mapped(v4: u32) -> ebpf::Addr {
    join([0, 0, 0xffff_0000, v4])
}

/// Four words in network order as an address.
#[inline(always)]
pub(crate) fn join(words: [u32; 4]) -> ebpf::Addr {
    // SAFETY: both are 16 bytes without padding.
    unsafe { core::mem::transmute(words) }
}

/// An address as four words in network order.
#[inline(always)]
pub(crate) fn split(addr: &ebpf::Addr) -> [u32; 4] {
    // SAFETY: both are 16 bytes, and `u32` is read unaligned by `read_unaligned`.
    unsafe { core::ptr::from_ref(addr).cast::<[u32; 4]>().read_unaligned() }
}

/// Whether two addresses are equal; word by word, as the verifier knows no `memcmp`.
#[inline(always)]
pub(crate) fn same(a: &ebpf::Addr, b: &ebpf::Addr) -> bool {
    let (a, b) = (split(a), split(b));
    a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
}

/// Whether an address is the zero address, which a pod without that family has in its row.
#[inline(always)]
pub(crate) fn is_zero(addr: &ebpf::Addr) -> bool {
    let words = split(addr);
    words[0] | words[1] | words[2] | words[3] == 0
}
