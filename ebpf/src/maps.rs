//! Every map. All but `PEER`'s contents are written or read by the agent too; the rows are in `lib`.

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, SkStorage};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::macros::btf_map;
use ebpf::{
    Addr, Captured, Cgroup, Delivery, Event, ExcludedPort, Gate, OUTBOUND, OriginalDst, Peer, Place, Pod,
    Probe, TrueSource, VERDICT_COUNT,
};

/// Tables that are nearly empty most of the time take memory only for what is in them.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

/// Destinations that are captured.
#[btf_map]
pub(crate) static MESH: HashMap<Addr, u32, 262_144, ON_DEMAND> = HashMap::new();
/// Enrolled pods by network namespace cookie.
#[btf_map]
pub(crate) static PODS: HashMap<u64, Pod, 8_192, ON_DEMAND> = HashMap::new();
/// Enrolled pods by each of their addresses.
#[btf_map]
pub(crate) static POD_ADDRS: HashMap<Addr, Pod, 16_384, ON_DEMAND> = HashMap::new();
/// Sources whose plaintext is a health probe.
#[btf_map]
pub(crate) static EXEMPT: HashMap<Addr, u32, 256, ON_DEMAND> = HashMap::new();
/// The kubelet's own connections to pods, from before their SYN until they end.
#[btf_map]
pub(crate) static PROBES: HashMap<Probe, u32, 65_536, ON_DEMAND> = HashMap::new();
/// Ports whose connections pods leave alone.
#[btf_map]
pub(crate) static EXCLUDED_PORTS: HashMap<ExcludedPort, u32, 65_536, ON_DEMAND> = HashMap::new();
/// Ranges of destinations whose connections pods leave alone: a pod's address, then the destination's.
#[btf_map]
pub(crate) static EXCLUDED_RANGES: LpmTrie<[Addr; 2], u32, 65_536> = LpmTrie::new();
/// Where captured connections wanted to go, until the agent has accepted them.
#[btf_map]
pub(crate) static ORIGINAL_DST: HashMap<Captured, OriginalDst, 262_144, ON_DEMAND> = HashMap::new();
/// Who is behind the connections that the agent is about to deliver.
#[btf_map]
pub(crate) static TRUE_SOURCE: HashMap<Delivery, TrueSource, 262_144, ON_DEMAND> = HashMap::new();
/// The true peer, on the socket itself: it cannot be evicted, and goes with the socket.
#[btf_map]
pub(crate) static PEER: SkStorage<Peer> = SkStorage::new();
/// Verdicts reached here, counted.
#[btf_map]
pub(crate) static VERDICTS: PerCpuArray<u64, { VERDICT_COUNT as usize }> = PerCpuArray::new();
/// Verdicts that a human wants to hear of.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, 262_144> = RingBuf::new();
/// What pods may do that are not judged yet.
#[btf_map]
pub(crate) static GATE: Array<Gate, 1> = Array::new();
/// Pods that the agent has judged, by the ID of their cgroup.
#[btf_map]
pub(crate) static JUDGED: HashMap<u64, u32, 8_192, ON_DEMAND> = HashMap::new();
/// Where everybody may connect to while nobody is judged.
#[btf_map]
pub(crate) static REACHABLE: HashMap<Place, u32, 1_024, ON_DEMAND> = HashMap::new();
/// Cgroups that were made or entered.
#[btf_map]
pub(crate) static CGROUPS: RingBuf<Cgroup, 262_144> = RingBuf::new();
/// When the agent was last alive.
#[btf_map]
pub(crate) static HEARTBEAT: Array<u64, 1> = Array::new();

/// Whether a pod, by its address, leaves its connections to a destination alone.
#[inline(always)]
pub(crate) fn leaves_out(pod: &Addr, destination: &Addr, port: u16) -> bool {
    excludes(pod, port, OUTBOUND) || EXCLUDED_RANGES.get(&Key::new(256, [*pod, *destination])).is_some()
}

/// Whether a pod, by its address, leaves connections to a port alone, in one direction.
#[inline(always)]
pub(crate) fn excludes(pod: &Addr, port: u16, direction: u16) -> bool {
    // SAFETY: map values are read, never kept.
    unsafe { EXCLUDED_PORTS.get(ExcludedPort { pod: *pod, port, direction }) }.is_some()
}

/// Counts a verdict.
#[inline(always)]
pub(crate) fn count(verdict: u32) {
    if let Some(counter) = VERDICTS.get_ptr_mut(verdict) {
        // SAFETY: this CPU's own slot; programs on one CPU do not interrupt each other here.
        unsafe { *counter += 1 };
    }
}

/// Counts a verdict and tells the agent of it; a full ring only loses the telling.
#[inline(always)]
pub(crate) fn report(
    verdict: u32,
    source: &Addr,
    source_port: u16,
    destination: &Addr,
    destination_port: u16,
) {
    count(verdict);
    if let Some(mut record) = EVENTS.reserve(0) {
        record.write(Event {
            verdict,
            source_port,
            destination_port,
            source: *source,
            destination: *destination,
            // SAFETY: a helper without arguments.
            at_ns: unsafe { bpf_ktime_get_ns() },
        });
        record.submit(0);
    }
}

/// The row on a socket; with `initial`, makes one if there is none.
///
/// # Safety
/// `socket` must be a socket pointer out of the program's context.
#[inline(always)]
pub(crate) unsafe fn peer_of(
    socket: *mut core::ffi::c_void,
    initial: Option<&mut Peer>,
) -> Option<*mut Peer> {
    if socket.is_null() {
        return None;
    }
    let (value, flags) = match initial {
        Some(value) => (core::ptr::from_mut(value).cast(), u64::from(BPF_SK_STORAGE_GET_F_CREATE)),
        None => (core::ptr::null_mut(), 0),
    };
    let map = core::ptr::addr_of!(PEER).cast_mut().cast();
    // SAFETY: a BTF map's address is its handle; the verifier checks map, socket and value.
    let row = unsafe { bpf_sk_storage_get(map, socket, value, flags) }.cast::<Peer>();
    if row.is_null() { None } else { Some(row) }
}
