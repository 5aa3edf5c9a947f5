//! Tells the agent of cgroups that were made or entered: a pod's sandbox is about to be there.
//!
//! Only news. Nothing is held up here, and a record lost to a full buffer costs the agent a moment.

use aya_ebpf::helpers::generated::bpf_probe_read_kernel_str;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use ebpf::{Cgroup, PATH_BYTES};

use crate::maps::CGROUPS;

/// `cgroup_mkdir(cgroup, path)`.
#[raw_tracepoint]
pub(crate) fn hauberk_cgroup_made(ctx: RawTracePointContext) -> i32 {
    tell(ctx.arg::<*const u8>(1));
    0
}

/// `cgroup_attach_task(cgroup, path, task, threadgroup)`.
#[raw_tracepoint]
pub(crate) fn hauberk_cgroup_entered(ctx: RawTracePointContext) -> i32 {
    tell(ctx.arg::<*const u8>(1));
    0
}

#[inline(always)]
fn tell(path: *const u8) {
    let Some(mut record) = CGROUPS.reserve(0) else { return };
    let into = record.as_mut_ptr();
    // The rest of the buffer may hold anything: the string ends at its zero.
    // SAFETY: the record has room for so much, and the helper checks the source itself.
    let read =
        unsafe { bpf_probe_read_kernel_str((&raw mut (*into).path).cast(), PATH_BYTES as u32, path.cast()) };
    if read > 0 { record.submit(0) } else { record.discard(0) }
}

const _: () = assert!(size_of::<Cgroup>() == PATH_BYTES);
