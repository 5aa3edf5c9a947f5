//! How often each way makes a connection, and how many it keeps: the cluster's share in a prediction.
//!
//! How often a pool dials is the one thing that is not a product. Connections between two ends that
//! share a pooled connection (a *key*) come at random, `x` a second (a Poisson process). One that
//! comes finds it warm when the one before came less than the idle timeout `T` ago and no rotation,
//! at `r` a second, came in between: with probability `x/(x+r) * (1 - e^-(x+r)T)`. All others dial,
//! `h(x)` a second. Streams are taken to be short against `T`, which errs towards more dialling, and an
//! agent to look for unused connections all the time, where it does so four times in `T`. Connections
//! within a node, which make no handshake, are counted as if they were between nodes. [`node`] has what
//! is different in node scope.

mod node;

use serde::Serialize;

use super::scenario::Scenario;

/// SVIDs are renewed at this share of their lifetime; see `rotate`.
const RENEWED_AT: f64 = 0.5;

/// How connections between workloads are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// A full mutual handshake for each.
    Unpooled,
    /// A resumed handshake for each; a full one where no ticket is held.
    Resumed,
    /// A pooled connection for each two identities, destination pod and thread.
    WorkloadScope,
    /// Pooled connections for each two nodes, on which identities are proven.
    NodeScope,
    /// The same, with a resumed handshake where a ticket is held.
    NodeScopeResumed,
}

impl Way {
    /// All, in the order they are shown.
    pub const ALL: [Self; 5] =
        [Self::Unpooled, Self::Resumed, Self::WorkloadScope, Self::NodeScope, Self::NodeScopeResumed];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unpooled => "without pooling",
            Self::Resumed => "with resumption",
            Self::WorkloadScope => "workload scope",
            Self::NodeScope => "node scope",
            Self::NodeScopeResumed => "node, resumed",
        }
    }

    /// Whether streams share connections.
    pub fn pooled(self) -> bool {
        matches!(self, Self::WorkloadScope | Self::NodeScope | Self::NodeScopeResumed)
    }

    /// Whether tickets are given and used.
    pub fn resumes(self) -> bool {
        matches!(self, Self::Resumed | Self::NodeScopeResumed)
    }
}

/// A cluster in the letters of [`super::model::SYMBOLS`].
pub(super) struct Load {
    pub(super) nodes: f64,
    pub(super) connections: f64,
    pub(super) payload: f64,
    fan_out: f64,
    threads: f64,
    pub(super) open_seconds: f64,
    idle: f64,
    pub(super) rotation: f64,
    pub(super) held: f64,
    endpoints: f64,
    reachable_nodes: f64,
}

/// What one way makes of the load: everything but the machine's share in it.
pub(super) struct Flow {
    pub(super) keys: (f64, &'static str),
    pub(super) handshakes: (f64, &'static str),
    pub(super) full: (f64, &'static str),
    pub(super) proofs: (f64, &'static str),
    pub(super) connections: (f64, &'static str),
    /// Tickets that clients hold.
    pub(super) tickets: f64,
    /// Chains of proven identities that are remembered.
    pub(super) proven: f64,
}

impl Load {
    pub(super) fn new(s: &Scenario) -> Self {
        let (services, pods, nodes, zones) =
            (s.services as f64, s.pods as f64, s.nodes as f64, s.zones as f64);
        Self {
            nodes,
            connections: services * s.connections_per_second_per_service,
            payload: services * s.bytes_per_second_per_service,
            fan_out: s.fan_out as f64,
            threads: s.threads as f64,
            open_seconds: s.connection_seconds,
            idle: s.idle_timeout_seconds,
            rotation: 1.0 / (RENEWED_AT * s.certificate_lifetime_seconds),
            held: pods.min(services * nodes),
            endpoints: (pods / (services * zones)).max(1.0),
            reachable_nodes: (nodes / zones).max(1.0),
        }
    }

    /// `h(x)`: the rest of `x` that finds nothing warm.
    fn dials(&self, x: f64) -> f64 {
        let hazard = x + self.rotation;
        x * (self.rotation + x * (-hazard * self.idle).exp()) / hazard
    }

    /// `D(m)`: the nodes that so many pods are on, if each is anywhere.
    fn spread(&self, pods: f64) -> f64 {
        let nodes = self.reachable_nodes;
        (nodes * (1.0 - (1.0 - 1.0 / nodes).powf(pods))).min(pods)
    }

    pub(super) fn flow(&self, way: Way) -> Flow {
        match way {
            Way::Unpooled => self.unpooled(),
            Way::Resumed => self.resumed(),
            Way::WorkloadScope => self.workload_scope(),
            Way::NodeScope => self.node_scope(),
            Way::NodeScopeResumed => self.node_scope_resumed(),
        }
    }

    fn unpooled(&self) -> Flow {
        let c = self.connections;
        Flow {
            keys: (c, "C"),
            handshakes: (c, "C"),
            full: (c, "C"),
            proofs: (0.0, "0"),
            connections: (c * self.open_seconds, "C * d"),
            tickets: 0.0,
            proven: 0.0,
        }
    }

    fn resumed(&self) -> Flow {
        let keys = self.held * self.fan_out * self.endpoints;
        let x = self.connections / keys;
        let warm = x / (x + self.ticket_ends());
        Flow {
            keys: (keys, "K = A * F * E"),
            handshakes: (self.connections, "C"),
            full: (
                self.connections * (1.0 - warm),
                "C * t / (x + t): a session lives until the SVID is renewed, and no more than an hour",
            ),
            proofs: (0.0, "0"),
            connections: (self.connections * self.open_seconds, "C * d"),
            // A full handshake brings two.
            tickets: 2.0 * keys * warm,
            proven: 0.0,
        }
    }

    fn workload_scope(&self) -> Flow {
        let keys = self.held * self.fan_out * self.endpoints * self.threads;
        let x = self.connections / keys;
        let dials = keys * self.dials(x);
        Flow {
            keys: (keys, "K = A * F * E * W"),
            handshakes: (dials, "K * h(x)"),
            full: (dials, "K * h(x)"),
            proofs: (0.0, "0"),
            connections: (keys * self.warm(x), "K * (1 - e^-(x*(T+d)))"),
            tickets: 0.0,
            proven: 0.0,
        }
    }

    /// `I`: SVIDs issued per second.
    pub(super) fn issuances(&self) -> f64 {
        (self.held + self.nodes) * self.rotation
    }

    /// The share of time that a key has a connection.
    fn warm(&self, x: f64) -> f64 {
        1.0 - (-x * (self.idle + self.open_seconds)).exp()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::capacity::scenario::Ratios;

    pub(super) fn load(services: u64, ratios: &Ratios) -> Load {
        Load::new(&ratios.scenario(services, 2).unwrap())
    }

    pub(super) fn near(value: f64, by_hand: f64) {
        assert!((value - by_hand).abs() <= 1e-3 * by_hand, "{value}, by hand {by_hand}");
    }

    #[test]
    fn ten_thousand_services_with_ten_connections_each_make_a_hundred_thousand_handshakes() {
        let flow = load(10_000, &Ratios::default()).flow(Way::Unpooled);
        assert_eq!(flow.handshakes.0, 100_000.0);
        assert_eq!(flow.full.0, 100_000.0);
    }

    #[test]
    fn a_small_cluster_comes_out_as_by_hand() {
        // Two services of one pod each, one node, one thread; each talks to both.
        let ratios = Ratios {
            pods: Some(2),
            nodes: Some(1),
            threads: Some(1),
            idle_timeout_seconds: 2.0,
            connections_per_second: 1.0,
            certificate_lifetime_seconds: 200.0,
            ..Ratios::default()
        };
        let load = load(2, &ratios);
        // Four pairs share two connections a second: x = 1/2, and r = 1/100.
        let workload = load.flow(Way::WorkloadScope);
        assert_eq!(workload.keys.0, 4.0);
        // 4 * 0.5 * (0.01 + 0.5 * e^-1.02) / 0.51
        near(workload.handshakes.0, 2.0 * (0.01 + 0.5 * 0.360_594_9) / 0.51);
        let resumed = load.flow(Way::Resumed);
        near(resumed.full.0, 2.0 * 0.01 / 0.51);
        assert_eq!(resumed.handshakes.0, 2.0);
        near(load.issuances(), 3.0 / 100.0);
    }

    #[test]
    fn pods_are_spread_over_at_most_the_nodes_there_are() {
        let load = load(1000, &Ratios::default());
        near(load.spread(1.0), 1.0);
        assert!(load.spread(0.2) <= 0.2);
        near(load.spread(1e9), 500.0);
    }

    fn ratios() -> impl Strategy<Value = (u64, Ratios)> {
        let counts = (1u64..=1_000_000, 1u64..=100, 1u64..=200, 1u64..=1000, 1u64..=64);
        let rates = (0.0..1e6, 0.0..1e9, 0.0..1e4, 1.0..1e5, 60.0..1e7);
        (counts, rates).prop_map(|((services, pods, per_node, fan_out, threads), rates)| {
            let ratios = Ratios {
                pods_per_service: pods,
                pods_per_node: per_node,
                fan_out,
                threads: Some(threads),
                connections_per_second: rates.0,
                bytes_per_second: rates.1,
                connection_seconds: rates.2,
                idle_timeout_seconds: rates.3,
                certificate_lifetime_seconds: rates.4,
                ..Ratios::default()
            };
            (services, ratios)
        })
    }

    /// Rounding may turn equal numbers into a little less.
    const SLACK: f64 = 1.0 + 1e-9;

    proptest! {
        #[test]
        fn no_way_makes_more_handshakes_than_there_is_reason_for((services, ratios) in ratios()) {
            let load = load(services, &ratios);
            let [unpooled, resumed, workload, node, both] = Way::ALL.map(|way| load.flow(way));
            for flow in [&unpooled, &resumed, &workload, &node, &both] {
                prop_assert!(flow.handshakes.0.is_finite() && flow.proofs.0.is_finite());
                prop_assert!(flow.handshakes.0 >= 0.0 && flow.proofs.0 >= 0.0);
                prop_assert!(flow.full.0 >= 0.0 && flow.full.0 <= flow.handshakes.0 * SLACK);
                prop_assert!(flow.proofs.0 <= 2.0 * load.connections * SLACK, "one each way at most");
                prop_assert!(flow.proven.is_finite() && flow.proven >= 0.0);
                prop_assert!(flow.tickets.is_finite() && flow.tickets <= 2.0 * flow.keys.0 * SLACK);
                prop_assert!(flow.connections.0.is_finite());
            }
            for flow in [&unpooled, &resumed, &workload] {
                prop_assert!(flow.handshakes.0 <= load.connections * SLACK);
            }
            // A connection is dialled for at most once, and what is there at every rotation.
            let most = load.connections + node.keys.0 * load.rotation;
            prop_assert!(node.handshakes.0 <= most * SLACK);
            prop_assert!(node.keys.0 <= workload.keys.0 * SLACK, "two nodes have many pairs of identities");
        }

        #[test]
        fn longer_lives_save_handshakes((services, ratios) in ratios()) {
            let doubled = Ratios {
                certificate_lifetime_seconds: ratios.certificate_lifetime_seconds * 2.0,
                ..ratios.clone()
            };
            for way in [Way::WorkloadScope, Way::NodeScope] {
                let [base, doubled] = [&ratios, &doubled].map(|r| load(services, r).flow(way).handshakes.0);
                prop_assert!(doubled <= base * SLACK, "{way:?}");
            }
        }

        #[test]
        fn patience_saves_handshakes_between_workloads_and_threads_cost_them((services, ratios) in ratios()) {
            let handshakes = |r: &Ratios| load(services, r).flow(Way::WorkloadScope).handshakes.0;
            let base = handshakes(&ratios);
            let patient = Ratios { idle_timeout_seconds: ratios.idle_timeout_seconds * 2.0, ..ratios.clone() };
            prop_assert!(handshakes(&patient) <= base * SLACK);
            let divided = Ratios { threads: ratios.threads.map(|threads| threads * 2), ..ratios };
            prop_assert!(handshakes(&divided) >= base / SLACK);
        }

        #[test]
        fn two_nodes_have_between_one_connection_and_one_for_each_thread((services, ratios) in ratios()) {
            let one = Ratios { threads: Some(1), ..ratios.clone() };
            let [one, all] = [&one, &ratios].map(|r| load(services, r).flow(Way::NodeScope).keys.0);
            let threads = ratios.threads.unwrap_or(1) as f64;
            prop_assert!(one <= all * SLACK && all <= threads * one * SLACK, "{one}, {all}");
        }
    }
}
