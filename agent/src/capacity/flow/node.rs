//! Node scope's share in a prediction: connections between nodes, and the proofs on them.
//!
//! A thread that needs a connection has the agent's other threads make theirs too, so whichever of the
//! `W` has the next stream, all are warm after it. Unused, a connection is closed after `T`; when the
//! node's SVID is rotated a connection that is there is replaced at once, used or not, and not idle any
//! more. So one ends as idle `c` times a second, and a key has one for a share `s` of the time; streams
//! and rotations are taken to come at random. Taking all threads to be cold at once errs towards more
//! dialling, by an eighth at most.
//!
//! A proof is needed when the connection that the identity was last proven on is gone: replaced, or
//! closed, which other identities' streams put off. The dialling side proves a rotated identity anew
//! besides; the accepting side's proof is good for as long as its certificate, so for longer than the
//! connection.

use super::{Flow, Load};
use crate::tls::ticket::LIFETIME_SECONDS;

/// Sessions that the dialling side keeps for a peer, for all of its threads.
const MAX_SESSIONS: f64 = 4.0;
/// Sessions that a full handshake brings; a resumed one brings one for the one that it used.
const SESSIONS: f64 = 2.0;

/// The connections between nodes.
struct Between {
    /// `K`.
    keys: f64,
    /// `x`.
    streams: f64,
    /// `c`.
    ends: f64,
    /// `s`.
    warm: f64,
}

impl Load {
    fn between(&self) -> Between {
        let hosts = self.nodes.min(self.held);
        let destinations = self.held / hosts * self.fan_out * self.endpoints;
        let keys = hosts * self.spread(destinations) * self.threads;
        let streams = self.connections / keys;
        let ends = self.ends(streams, self.idle);
        Between { keys, streams, ends, warm: self.warm_share(streams, ends) }
    }

    /// `c`: how often a connection that is there ends as idle.
    fn ends(&self, streams: f64, patience: f64) -> f64 {
        let hazard = streams + self.rotation;
        hazard / (hazard * patience).exp_m1()
    }

    /// `s`: the share of the time that a connection is there.
    fn warm_share(&self, streams: f64, ends: f64) -> f64 {
        let wakes = self.threads * streams;
        // Nothing ends that nobody wakes.
        if wakes > 0.0 { wakes / (wakes + ends) } else { 0.0 }
    }

    /// `p(u)`: how often an identity with `y` streams a second on a connection is proven there, when
    /// `u` rotations a second make it forgotten and idleness does.
    fn proven(&self, between: &Between, y: f64, rotations: f64) -> f64 {
        let of_others = (between.streams - y).max(0.0);
        let hazard = y + of_others + rotations;
        let quiet = (-hazard * self.idle).exp();
        let idle_first = hazard * quiet / (y + rotations + of_others * quiet);
        y * (rotations + y * idle_first) / (y + rotations)
    }

    pub(super) fn node_scope(&self) -> Flow {
        let between = self.between();
        let Between { keys, streams, ends, warm } = between;
        // Each identity on each connection of its agent that carries a stream of it, in one direction.
        let proving = self.held * self.spread(self.fan_out * self.endpoints) * self.threads;
        let y = self.connections / proving;
        let each = self.proven(&between, y, 2.0 * self.rotation) + self.proven(&between, y, self.rotation);
        let remembered = if y > 0.0 { (2.0 - each / y).max(0.0) } else { 0.0 };
        let lasting = self.warm_share(streams, self.ends(streams, self.idle + self.open_seconds));
        let handshakes = (keys * warm * (ends + self.rotation), "K * s * (c + r)");
        Flow {
            keys: (keys, "K = H * D(A/H * F * E) * W"),
            handshakes,
            full: handshakes,
            proofs: (proving * each, "G * (p(2*r) + p(r)), G = A * D(F * E) * W, y = C / G"),
            connections: (keys * lasting, "K * s, with T + d for T"),
            tickets: 0.0,
            proven: proving * remembered,
        }
    }

    /// What dials again only because it was idle has a session still, if all its threads together have
    /// not more dials than sessions.
    pub(super) fn node_scope_resumed(&self) -> Flow {
        let Between { keys, streams, ends, warm } = self.between();
        let idle_dials = warm * ends;
        // Sessions end with the SVID, which what is there replaces at once, and after an hour.
        let lost = self.rotation * (1.0 - warm) + (self.ticket_ends() - self.rotation);
        let none = if lost > 0.0 { lost / (lost + idle_dials) } else { 0.0 };
        let full_of = |sessions: f64| (self.threads - 1.0 - sessions).max(0.0);
        let share = (none * (1.0 + full_of(SESSIONS)) + (1.0 - none) * full_of(MAX_SESSIONS)) / self.threads;
        let pairs = keys / self.threads;
        let held = pairs * (SESSIONS * self.threads).min(MAX_SESSIONS);
        let wakes = self.threads * streams;
        Flow {
            full: (
                keys * (warm * self.rotation + idle_dials * share),
                "K * s * (r + c * j), j = (n * max(1, W - 2) + (1 - n) * max(0, W - 5)) / W, \
                 n = v / (v + s * c), v = t - r * s",
            ),
            tickets: held * wakes / (wakes + self.ticket_ends()),
            ..self.node_scope()
        }
    }

    /// `t`: how often a session ends: with the SVID that it began under, and an hour after its full
    /// handshake.
    pub(super) fn ticket_ends(&self) -> f64 {
        self.rotation.max(1.0 / LIFETIME_SECONDS as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{load, near};
    use super::super::{Load, Way};
    use crate::capacity::scenario::Ratios;

    /// Two services of one pod each, on two nodes; each talks to both, two connections a second.
    fn small(threads: u64) -> Load {
        let ratios = Ratios {
            pods: Some(2),
            nodes: Some(1),
            threads: Some(threads),
            idle_timeout_seconds: 2.0,
            connections_per_second: 1.0,
            certificate_lifetime_seconds: 200.0,
            ..Ratios::default()
        };
        load(2, &ratios)
    }

    #[test]
    fn a_small_cluster_comes_out_as_by_hand() {
        // One connection: x = 2, r = 1/100. c = 2.01 / (e^4.02 - 1), s = 2 / (2 + c).
        let node = small(1).flow(Way::NodeScope);
        assert_eq!(node.keys.0, 1.0);
        let ends = 2.01 / (55.701_1 - 1.0);
        let warm = 2.0 / (2.0 + ends);
        near(node.handshakes.0, warm * (ends + 0.01));
        // Two identities in each direction: y = 1, and as many of the other's. With e = e^-(2 + u)T:
        // forgotten as idle first: (2 + u) * e / (1 + u + e); in all (u + that) / (1 + u).
        let proven = |u: f64, quiet: f64| (u + (2.0 + u) * quiet / (1.0 + u + quiet)) / (1.0 + u);
        near(node.proofs.0, 2.0 * (proven(0.02, 0.017_597_5) + proven(0.01, 0.017_953)));
    }

    #[test]
    fn a_thread_that_dials_makes_the_others_dial() {
        // So thin that every stream finds nothing.
        let thin = Ratios {
            connections_per_second: 1e-7,
            threads: Some(8),
            certificate_lifetime_seconds: 1e7,
            ..Ratios::default()
        };
        let load = load(10, &thin);
        near(load.flow(Way::NodeScope).handshakes.0, 8.0 * 1e-6);
        near(load.flow(Way::NodeScope).proofs.0, 2.0 * 1e-6);
        // Whoever dialled last has lost its session since; a full handshake brings two sessions for others.
        near(load.flow(Way::NodeScopeResumed).full.0, 6.0 * 1e-6);
    }

    #[test]
    fn a_warm_pool_only_follows_rotation() {
        let busy = Ratios { connections_per_second: 1e6, threads: Some(2), ..Ratios::default() };
        let load = load(10, &busy);
        let (node, resumed) = (load.flow(Way::NodeScope), load.flow(Way::NodeScopeResumed));
        near(node.handshakes.0, node.keys.0 / 1800.0);
        near(resumed.full.0, node.keys.0 / 1800.0);
        assert_eq!(node.connections.0, node.keys.0);
    }
}
