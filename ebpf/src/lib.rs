//! The contract between the kernel side and the agent: every row that crosses a BPF map, named
//! after the map it belongs to. Nothing else lives here.
//!
//! Addresses are always 16 bytes, IPv4 as IPv4-mapped IPv6 (RFC 4291, section 2.5.5.2), so there is
//! one shape of row and one code path for both families. Ports are in host byte order. Rows have no
//! padding: `IntoBytes` refuses it, and the verifier would too.
//!
//! Maps are pinned and outlive the agent. A change of a row's shape changes [`VERSION`], which is
//! part of every pin's path, so two shapes never meet.

#![cfg_attr(target_arch = "bpf", no_std)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Version of this contract: the name of the directory that maps and links are pinned in.
pub const VERSION: &str = "v2";

/// Most outbound listener ports in one pod.
pub const MAX_LISTENER_PORTS: usize = 4;

/// An IPv6 address, or an IPv4 one in mapped form. Network byte order.
pub type Addr = [u8; 16];

macro_rules! row {
    ($(#[$meta:meta])* $name:ident, $size:literal, { $($(#[$field_meta:meta])* $field:ident : $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name { $($(#[$field_meta])* pub $field: $type),* }
        const _: () = assert!(size_of::<$name>() == $size);
        // SAFETY: `IntoBytes` proves there is no padding, `FromBytes` that every bit pattern is a
        // value, and the type is `Copy`.
        #[cfg(not(target_arch = "bpf"))]
        unsafe impl aya::Pod for $name {}
    };
}

row! {
    /// Value of `PODS` (key: network namespace cookie, `u64`) and of `POD_ADDRS` (key: [`Addr`]).
    ///
    /// One row for each enrolled pod: what the capture and the inbound programs need to know.
    Pod, 48, {
        /// The pod's IPv4 address in mapped form; zero when it has none.
        v4: Addr,
        /// The pod's IPv6 address; zero when it has none.
        v6: Addr,
        /// Outbound listener ports; unused ones are zero and come last.
        ports: [u16; MAX_LISTENER_PORTS],
        /// How many of `ports` are used; at least 1.
        port_count: u16,
        /// HBONE's port.
        tunnel_port: u16,
        /// One of the `MODE_` constants.
        mode: u16,
        /// One of the `DOWN_` constants: what a permissive pod's connections meet without an agent.
        when_down: u16,
    }
}

/// [`Pod::mode`]: plaintext with mesh members is refused.
pub const MODE_STRICT: u16 = 1;
/// [`Pod::mode`]: plaintext from outside passes and is counted.
pub const MODE_PERMISSIVE: u16 = 2;
/// [`Pod::mode`]: strict, and its capture could not be verified: nothing with members, and nothing from outside.
pub const MODE_CLOSED: u16 = 3;

/// [`Pod::when_down`]: let permissive connections out in plaintext.
pub const DOWN_OPEN: u16 = 1;
/// [`Pod::when_down`]: rewrite them all the same, so that they are refused.
pub const DOWN_CLOSED: u16 = 2;

row! {
    /// Key of `EXCLUDED_PORTS`: a pod's connections that are left alone, by port.
    ExcludedPort, 20, {
        /// The pod's own address, of the connection's family.
        pod: Addr,
        /// The destination's port.
        port: u16,
        /// [`INBOUND`] or [`OUTBOUND`].
        direction: u16,
    }
}

/// [`ExcludedPort::direction`]: to the pod.
pub const INBOUND: u16 = 1;
/// [`ExcludedPort::direction`]: from the pod.
pub const OUTBOUND: u16 = 2;

row! {
    /// Key of `EXCLUDED_RANGES` (longest-prefix match): where a pod's connections are left alone.
    ExcludedRange, 36, {
        /// How many bits of what follows count: 128 for the pod, then those of the range.
        prefix: u32,
        /// The pod's own address, of the connection's family.
        pod: Addr,
        /// The first address of the range.
        destination: Addr,
    }
}

row! {
    /// Key of `ORIGINAL_DST`: a captured connection as the agent's listener sees it.
    Captured, 20, {
        /// The pod's own address: source and destination of the connection alike.
        pod: Addr,
        /// The application's port.
        source_port: u16,
        /// The listener's port.
        listener_port: u16,
    }
}

row! {
    /// Value of `ORIGINAL_DST`: where the application wanted to go.
    OriginalDst, 24, {
        /// Destination address.
        addr: Addr,
        /// Destination port.
        port: u16,
        /// Always zero.
        reserved: [u16; 3],
    }
}

row! {
    /// Key of `TRUE_SOURCE`: a connection that the agent is about to open to a local application.
    ///
    /// The agent writes it before `connect()`; the kernel side consumes it when the application's
    /// socket is established, and the agent removes it when the connect failed.
    Delivery, 20, {
        /// The pod's own address: source and destination of the connection alike.
        pod: Addr,
        /// The agent's port.
        source_port: u16,
        /// The application's port.
        app_port: u16,
    }
}

row! {
    /// Value of `TRUE_SOURCE`: who the application shall see.
    TrueSource, 24, {
        /// The client's address.
        addr: Addr,
        /// The client's port.
        port: u16,
        /// Always zero.
        reserved: [u16; 3],
    }
}

row! {
    /// Value of `PEER` (socket storage): the true peer of a captured or delivered socket.
    Peer, 40, {
        /// The address that `getpeername()` shall report.
        addr: Addr,
        /// The address the socket is really connected to; another one means the row is stale.
        real: Addr,
        /// Port to report.
        port: u16,
        /// Port really connected to.
        real_port: u16,
        /// Always zero.
        reserved: u32,
    }
}

row! {
    /// A record of `EVENTS` (ring buffer): a verdict the kernel side reached without the agent.
    Event, 48, {
        /// One of the `VERDICT_` constants.
        verdict: u32,
        /// Source port.
        source_port: u16,
        /// Destination port.
        destination_port: u16,
        /// Source address.
        source: Addr,
        /// Destination address.
        destination: Addr,
        /// Nanoseconds since boot (`CLOCK_MONOTONIC`).
        at_ns: u64,
    }
}

row! {
    /// Key of `PROBES`: a connection of the kubelet's to a pod of its node, as the pod sees it.
    Probe, 36, {
        /// The pod's address.
        pod: Addr,
        /// The kubelet's address.
        from: Addr,
        /// The pod's port.
        port: u16,
        /// The kubelet's port.
        from_port: u16,
    }
}

row! {
    /// Value of `GATE` (array of one): what pods may do that the agent has not judged yet.
    Gate, 16, {
        /// The node's own network namespace, by cookie: what runs in it is never held back.
        node: u64,
        /// One of the `GATE_` constants.
        state: u32,
        /// Always zero.
        reserved: u32,
    }
}

/// [`Gate::state`]: nobody is held back; pods are not told apart by their cgroups.
pub const GATE_OPEN: u32 = 0;
/// [`Gate::state`]: who is not judged reaches no member, and nobody reaches it.
pub const GATE_MEMBERS: u32 = 1;
/// [`Gate::state`]: the members are not known yet, so who is not judged reaches only `REACHABLE`.
pub const GATE_ALL: u32 = 2;

/// Value of `JUDGED` (key: a pod's cgroup ID, `u64`): not in the mesh, or free to go round it.
pub const JUDGED_FREE: u32 = 1;
/// Value of `JUDGED`: enrolled, and closed to whatever is not captured.
pub const JUDGED_STRICT: u32 = 2;

row! {
    /// Key of `REACHABLE`: where pods may connect to before it is known who is in the mesh.
    Place, 20, {
        /// The address; zero stands for every one.
        addr: Addr,
        /// The port; zero stands for every one.
        port: u16,
        /// Always zero.
        reserved: u16,
    }
}

/// Most bytes of a cgroup's path that are told.
pub const PATH_BYTES: usize = 256;

row! {
    /// A record of `CGROUPS` (ring buffer): a cgroup was made, or a process was moved into it.
    Cgroup, 256, {
        /// Its path below the root of its hierarchy, ended by a zero.
        path: [u8; PATH_BYTES],
    }
}

/// Index of `VERDICTS` (per-CPU array of `u64` counts) and value of [`Event::verdict`].
///
/// A connection was rewritten to the agent.
pub const VERDICT_CAPTURED: u32 = 0;
/// Plaintext from outside reached a permissive pod.
pub const VERDICT_PLAINTEXT_ACCEPTED: u32 = 1;
/// Plaintext from outside was refused at a strict pod.
pub const VERDICT_PLAINTEXT_REFUSED: u32 = 2;
/// A health probe, of the kubelet itself or from an exempt address, reached a strict pod.
pub const VERDICT_PROBE_ACCEPTED: u32 = 3;
/// Someone outside the pod tried the agent's own listener ports.
pub const VERDICT_LISTENER_REFUSED: u32 = 4;
/// The egress guard dropped a plaintext SYN to a mesh member.
pub const VERDICT_EGRESS_DROPPED: u32 = 5;
/// A permissive pod's connection went out in plaintext while no agent ran.
pub const VERDICT_BYPASSED: u32 = 6;
/// A connection could not be captured (no room, no address of that family) and was refused.
pub const VERDICT_CAPTURE_FAILED: u32 = 7;
/// A connection of or to a pod that the agent has not judged yet was refused.
pub const VERDICT_HELD: u32 = 8;
/// A connection was left alone because its pod excludes it; of those from the pod, only those to members.
pub const VERDICT_EXCLUDED: u32 = 9;
/// How many verdicts there are.
pub const VERDICT_COUNT: u32 = 10;

/// The agent writes `HEARTBEAT[0]` (nanoseconds, `CLOCK_MONOTONIC`) every second; an older one than
/// this means that no agent runs.
pub const HEARTBEAT_STALE_NS: u64 = 3_000_000_000;
