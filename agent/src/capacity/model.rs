//! The arithmetic: a cluster and a machine's calibration in, what each way takes out.
//!
//! Pure; every figure carries the formula it was made by, in the letters of [`SYMBOLS`].

use serde::{Serialize, Serializer};

use super::calibrate::RECORD_BYTES;
use super::calibration::Calibration;
use super::flow::{Flow, Load, Way};
use super::scenario::Scenario;
use crate::hbone::FRAME_BYTES;

/// A TLS record's header, content type and tag (RFC 8446, section 5.2).
const RECORD_OVERHEAD_BYTES: f64 = 22.0;
/// An HTTP/2 frame's header (RFC 9113, section 4.1).
const FRAME_OVERHEAD_BYTES: f64 = 9.0;
/// Opening and ending a stream: CONNECT and its response, an end from each side, with their records.
pub const STREAM_WIRE_BYTES: f64 = 200.0;
/// A new connection's HTTP/2 preface, SETTINGS and their acknowledgements, with their records.
pub const PREFACE_WIRE_BYTES: f64 = 250.0;
/// A proof beside its certificate chain: signature and framing.
const PROOF_OVERHEAD_BYTES: f64 = 100.0;
/// What the letters in the formulas mean. Those after `r` come from the calibration.
pub const SYMBOLS: [(&str, &str); 32] = [
    ("S, P, N, Z", "services, pods, nodes, zones"),
    ("F", "services that each service talks to"),
    ("W", "data-path threads of an agent, each with its own pool"),
    ("C", "new connections per second in the cluster: S * connections per second of a service"),
    ("B", "payload bytes per second in the cluster: S * bytes per second of a service"),
    ("d", "seconds that a connection stays open"),
    ("T", "seconds after which an unused pooled connection is closed"),
    ("L", "seconds that an SVID is valid"),
    ("r", "rotations of one SVID per second: 1 / (0.5 * L)"),
    ("x", "connections per second of one key: C / K"),
    ("h(x)", "dials per second of one key: x * (r + x * e^-((x+r)*T)) / (x + r)"),
    ("R", "pairs of nodes that talk: H * D(A/H * F * E)"),
    ("z", "connections per second between two nodes that a thread accepts: C / (R * W)"),
    ("c(x)", "ends of an unused connection between nodes per second: (x + r) / (e^((x+r)*T) - 1)"),
    (
        "o",
        "share of the time that a thread other than the pair's first has a connection of its own: \
         z * f / (z * f + c(z)), f = (1 - e^-z) / (2 - e^-z)",
    ),
    (
        "s",
        "share of the time that the first has one: x / (x + c(x)), x = z + (W - 1) * (1 - o) * z * (1 - f) there",
    ),
    (
        "p(u)",
        "proofs of an identity with y streams per second on a key: y * (u + y * i) / (y + u), \
         i = (x+u) * e / (y + u + (x-y) * e), e = e^-((x+u)*T)",
    ),
    (
        "q(u)",
        "the same where it is not the pair's first thread: w * v / (w + v), v = o * c(z) + u, \
         w = z * (o + (1 - o) * f) * R / G",
    ),
    ("t", "sessions that end per second of a key: max(r, 1 / 3600)"),
    ("A, H", "identities held by agents, over all nodes: min(P, S * N); nodes that hold any: min(N, A)"),
    ("E", "pods of a service that its clients are spread over: max(1, P / (S * Z))"),
    ("D(m)", "nodes that m pods are on: M * (1 - (1 - 1/M)^m), M = N / Z, and no more than m"),
    ("I", "SVIDs issued per second: (A + N) * r"),
    ("f, g", "CPU seconds (both sides) of a full and of a resumed handshake"),
    ("b", "CPU seconds to seal a payload byte and open it"),
    ("k", "CPU seconds to prove an identity and verify the proof"),
    ("a, i", "CPU seconds to ask for an SVID, and to issue it"),
    ("wf, wr", "wire bytes of a full and of a resumed handshake, with 250 bytes of HTTP/2 preface"),
    ("wq", "wire bytes of a proof: certificate + 100"),
    (
        "ws",
        "bytes around a connection's payload p = B/C: 200 + 22 * (ceil(p/16384) + 1) + 9 * (ceil(p/262135) + 1)",
    ),
    ("mt, ms", "memory of one end of a pooled connection, and of a stream"),
    ("cert, key, ticket", "bytes of an SVID's chain, of its key, and of a session ticket"),
];

/// A value, its unit, and how it was made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The value.
    #[serde(serialize_with = "rounded")]
    pub value: f64,
    /// What one is.
    pub unit: &'static str,
    /// In the letters of [`SYMBOLS`].
    pub formula: &'static str,
}

/// Six digits: a prediction has no more.
fn rounded<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if *value == 0.0 {
        return serializer.serialize_f64(0.0);
    }
    let unit = 10f64.powi(5 - value.abs().log10().floor() as i32);
    serializer.serialize_f64((value * unit).round() / unit)
}

/// What one way takes, in the whole cluster unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "each figure carries its unit and formula, and its name says the rest")]
pub struct Prediction {
    pub way: Way,
    pub keys: Figure,
    pub handshakes: Figure,
    pub full_handshakes: Figure,
    pub proofs: Figure,
    pub connections: Figure,
    pub handshake_cores: Figure,
    pub payload_cores: Figure,
    pub cores: Figure,
    pub cores_per_node: Figure,
    pub memory: Figure,
    pub memory_per_node: Figure,
    pub overhead: Figure,
    pub overhead_share: Figure,
    pub certificate_storage: Figure,
    pub issuances: Figure,
    pub authority_cores: Figure,
}

/// What each way takes, in the order of [`Way::ALL`].
pub fn predict(scenario: &Scenario, machine: &Calibration) -> Vec<Prediction> {
    let load = Load::new(scenario);
    Way::ALL.map(|way| prediction(&load, way, machine)).into()
}

/// One way's figures.
fn prediction(load: &Load, way: Way, machine: &Calibration) -> Prediction {
    let flow = load.flow(way);
    let cost = Cost::new(load, way, &flow, machine);
    let figure = |value: f64, unit, formula| Figure { value, unit, formula };
    let of = |(value, formula): (f64, &'static str), unit| figure(value, unit, formula);
    let share = if load.payload > 0.0 { cost.overhead / load.payload } else { 0.0 };
    Prediction {
        way,
        keys: of(flow.keys, "keys"),
        handshakes: of(flow.handshakes, "handshakes/s"),
        full_handshakes: of(flow.full, "handshakes/s"),
        proofs: of(flow.proofs, "proofs/s"),
        connections: of(flow.connections, "connections"),
        handshake_cores: figure(
            cost.handshake_cores,
            "cores",
            "full * f + (handshakes - full) * g + proofs * k",
        ),
        payload_cores: figure(cost.payload_cores, "cores", "B * b"),
        cores: figure(cost.cores, "cores", "handshake cores + payload cores + I * a"),
        cores_per_node: figure(cost.cores / load.nodes, "cores", "cores / N"),
        memory: figure(cost.memory, "bytes", memory_formula(way)),
        memory_per_node: figure(cost.memory / load.nodes, "bytes", "memory / N"),
        overhead: figure(cost.overhead, "bytes/s", overhead_formula(way)),
        overhead_share: figure(share, "of the payload", "overhead / B"),
        certificate_storage: figure(cost.storage, "bytes", storage_formula(way)),
        issuances: figure(load.issuances(), "SVIDs/s", "I = (A + N) * r"),
        authority_cores: figure(load.issuances() * machine.issue_cpu_seconds, "cores", "I * i"),
    }
}

/// What a flow costs on a machine.
struct Cost {
    handshake_cores: f64,
    payload_cores: f64,
    cores: f64,
    memory: f64,
    overhead: f64,
    storage: f64,
}

impl Cost {
    fn new(load: &Load, way: Way, flow: &Flow, machine: &Calibration) -> Self {
        let (full, proofs) = (flow.full.0, flow.proofs.0);
        let resumed = flow.handshakes.0 - full;
        let handshake_cores = full * machine.full.cpu_seconds()
            + resumed * machine.resumed.cpu_seconds()
            + proofs * (machine.prove_cpu_seconds + machine.verify_cpu_seconds);
        let payload_cores = load.payload * machine.byte_cpu_seconds();
        let svids = (load.held + load.nodes) * (machine.certificate_bytes + machine.key_bytes);
        let storage = svids
            + flow.tickets * (machine.ticket_bytes + machine.certificate_bytes)
            + flow.proven * machine.certificate_bytes;
        let streams = if way.pooled() { load.connections * load.open_seconds } else { 0.0 };
        let ends = flow.connections.0 * machine.tunnel_bytes + streams * machine.stream_bytes;
        let ticket = if way.resumes() { 2.0 * machine.ticket_bytes } else { 0.0 };
        let overhead = full * (machine.full.wire_bytes + PREFACE_WIRE_BYTES + ticket)
            + resumed * (machine.resumed.wire_bytes + PREFACE_WIRE_BYTES)
            + proofs * (machine.certificate_bytes + PROOF_OVERHEAD_BYTES)
            + framing(load);
        Self {
            handshake_cores,
            payload_cores,
            cores: handshake_cores + payload_cores + load.issuances() * machine.request_cpu_seconds,
            memory: 2.0 * ends + storage,
            overhead,
            storage,
        }
    }
}

/// `C * ws`: bytes around the payload.
fn framing(load: &Load) -> f64 {
    let each = if load.connections > 0.0 { load.payload / load.connections } else { 0.0 };
    let records = (each / RECORD_BYTES as f64).ceil() + 1.0;
    let frames = (each / f64::from(FRAME_BYTES)).ceil() + 1.0;
    load.connections * (STREAM_WIRE_BYTES + RECORD_OVERHEAD_BYTES * records + FRAME_OVERHEAD_BYTES * frames)
}

fn memory_formula(way: Way) -> &'static str {
    match way.pooled() {
        true => "2 * (connections * mt + C * d * ms) + certificate storage",
        false => "2 * connections * mt + certificate storage",
    }
}

fn storage_formula(way: Way) -> &'static str {
    match way {
        Way::Unpooled | Way::WorkloadScope => "(A + N) * (cert + key)",
        Way::Resumed => "(A + N) * (cert + key) + 2 * K * x / (x + t) * (ticket + cert)",
        Way::NodeScope => {
            "(A + N) * (cert + key) + (2 * G - proofs / y) * cert, of first threads and of others"
        }
        Way::NodeScopeResumed => {
            "(A + N) * (cert + key) + (2 * G - proofs / y) * cert, of first threads and of others, \
             + R * min(4, 2 * K / R) * C / (C + R * t) * (ticket + cert)"
        }
    }
}

fn overhead_formula(way: Way) -> &'static str {
    match way.resumes() {
        true => "full * (wf + 2 * ticket) + (handshakes - full) * wr + proofs * wq + C * ws",
        false => "handshakes * wf + proofs * wq + C * ws",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capacity::calibration::{Cpu, Handshake};
    use crate::capacity::scenario::Ratios;

    /// Round numbers, so that a prediction can be checked by hand.
    fn machine() -> Calibration {
        let handshake = |seconds: f64, wire_bytes| Handshake {
            client_cpu_seconds: seconds / 2.0,
            server_cpu_seconds: seconds / 2.0,
            wire_bytes,
        };
        Calibration {
            cpu: Cpu { model: "abacus".into(), cores: 2, aes: true, avx: true, vaes: false },
            full: handshake(500e-6, 4000.0),
            resumed: handshake(200e-6, 4200.0),
            seal_bytes_per_second: 2e9,
            open_bytes_per_second: 2e9,
            prove_cpu_seconds: 20e-6,
            verify_cpu_seconds: 80e-6,
            request_cpu_seconds: 40e-6,
            issue_cpu_seconds: 60e-6,
            certificate_bytes: 500.0,
            key_bytes: 100.0,
            ticket_bytes: 800.0,
            tunnel_bytes: 50_000.0,
            stream_bytes: 3_000.0,
        }
    }

    fn predicted(services: u64, ratios: &Ratios) -> [Prediction; 5] {
        predict(&ratios.scenario(services, 2).unwrap(), &machine()).try_into().unwrap()
    }

    #[test]
    fn a_full_handshake_for_each_connection_costs_what_it_costs() {
        let [unpooled, ..] = predicted(10_000, &Ratios::default());
        assert_eq!(unpooled.handshakes.value, 100_000.0);
        // 100,000 handshakes of 500 us are 50 cores; 1 GB/s at 1 ns a byte is one more.
        assert!((unpooled.handshake_cores.value - 50.0).abs() < 1e-9, "{:?}", unpooled.handshake_cores);
        assert!((unpooled.payload_cores.value - 1.0).abs() < 1e-9, "{:?}", unpooled.payload_cores);
        // 105,000 SVIDs are renewed twice an hour, at 40 us for the agents and 60 us for the authority.
        let rate = 105_000.0 / 1800.0;
        assert!((unpooled.cores.value - 51.0 - rate * 40e-6).abs() < 1e-9, "{:?}", unpooled.cores);
        assert!((unpooled.authority_cores.value - rate * 60e-6).abs() < 1e-9);
        // 100,000 connections open, two ends each; 105,000 SVIDs of 600 bytes.
        assert_eq!(unpooled.certificate_storage.value, 63e6);
        assert_eq!(unpooled.memory.value, 2.0 * 100_000.0 * 50_000.0 + 63e6);
        // A payload of 10 kB is a record and a frame, and one each the other way.
        assert_eq!(unpooled.overhead.value, 100_000.0 * (4250.0 + 200.0 + 2.0 * 22.0 + 2.0 * 9.0));
    }

    #[test]
    fn where_a_pool_is_warm_the_load_almost_disappears() {
        let [unpooled, resumed, workload, node, both] = predicted(10, &Ratios::default());
        let cores = |p: &Prediction| p.handshake_cores.value;
        assert!(cores(&resumed) < 0.5 * cores(&unpooled), "{} of {}", cores(&resumed), cores(&unpooled));
        assert!(cores(&workload) < 0.12 * cores(&unpooled), "{} of {}", cores(&workload), cores(&unpooled));
        assert!(cores(&node) < 0.01 * cores(&unpooled), "{} of {}", cores(&node), cores(&unpooled));
        assert!(cores(&both) <= cores(&node), "{} of {}", cores(&both), cores(&node));
    }

    #[test]
    fn no_number_within_its_range_makes_a_figure_that_is_none() {
        let huge = Ratios {
            pods: Some(1_000_000_000),
            nodes: Some(1_000_000_000),
            connections_per_second: 1e9,
            bytes_per_second: 1e9,
            connection_seconds: 1e9,
            fan_out: 1_000_000_000,
            threads: Some(1024),
            idle_timeout_seconds: 1e9,
            certificate_lifetime_seconds: 60.0,
            ..Ratios::default()
        };
        let still = Ratios { connections_per_second: 0.0, bytes_per_second: 0.0, ..Ratios::default() };
        let one = Ratios { pods: Some(1), nodes: Some(1), ..Ratios::default() };
        for (services, ratios) in [(1_000_000, huge), (1_000_000, still), (1, one)] {
            let text = serde_json::to_value(predicted(services, &ratios)).unwrap();
            for prediction in text.as_array().unwrap() {
                for (name, figure) in
                    prediction.as_object().unwrap().iter().filter(|(name, _)| *name != "way")
                {
                    let value = figure["value"].as_f64();
                    assert!(value.is_some_and(|value| value >= 0.0), "{services} services, {name}: {figure}");
                }
            }
        }
    }

    #[test]
    fn figures_are_rounded_to_six_digits_in_json() {
        let json =
            |value| serde_json::to_value(Figure { value, unit: "", formula: "" }).unwrap()["value"].clone();
        assert_eq!(json(1_234_567.8), 1_234_570.0);
        assert_eq!(json(0.0), 0.0);
        assert!((json(1.0 / 3e5).as_f64().unwrap() - 3.333_33e-6).abs() < 1e-12);
    }
}
