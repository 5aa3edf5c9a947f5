//! The programs, one module for each hook. Built for `bpfel-unknown-none` only.
//!
//! Every program looks the destination up first, so traffic outside the mesh pays one hash miss.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// Context fields are read by inline assembly: see `ctx`.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod ctx;
#[cfg(target_arch = "bpf")]
mod gate;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod program {
    mod cgroups;
    mod connect;
    mod getpeername;
    mod guard;
    mod inbound;
    mod kubelet;
    mod lookup;
    mod sockops;
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // No program of ours can panic: nothing is indexed, divided or unwrapped without a check.
    loop {}
}

/// The kernel gives several of the helpers used here only to programs under the GPL; the rest of
/// the project is Apache-2.0, and these programs are offered under either.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
