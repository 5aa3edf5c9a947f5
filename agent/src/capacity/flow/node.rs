//! Node scope's share in a prediction: connections between nodes, and the proofs on them.
//!
//! Of a pair's `W` threads that accept streams, one has the connection that the others use while few come. A
//! thread that gets a second one within a second makes one of its own, and keeps it while it is used
//! ([`crate::pool::Pool::home`]); that is the case for a share `o` of the time. Unused, a connection is closed after
//! `T`; when the node's SVID is rotated a connection that is there is replaced at once, used or not, and not idle
//! any more. So one ends as idle `c` times a second, and the first thread has one for a share `s` of the time;
//! streams and rotations are taken to come at random.
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

/// Connections between nodes that are used alike.
struct Between {
    /// How many each pair of nodes has at most.
    count: f64,
    /// Streams a second on each while it is there.
    streams: f64,
    /// The same over all of the time.
    carried: f64,
    /// `c`.
    ends: f64,
    /// The share of the time that one is there.
    warm: f64,
    /// The same when it is kept for as long as a stream is open, too.
    lasting: f64,
}

impl Load {
    /// `R`: pairs of nodes that talk.
    fn pairs(&self) -> f64 {
        let hosts = self.nodes.min(self.held);
        hosts * self.spread(self.held / hosts * self.fan_out * self.endpoints)
    }

    /// The connections of pairs' first threads, and of their other threads.
    fn between(&self) -> [Between; 2] {
        let others = self.threads - 1.0;
        // `z`: what each thread accepts.
        let each = self.connections / (self.pairs() * self.threads);
        // `f`: of what comes where there is none, the first goes to the first thread, as does each that comes
        // more than a second after the last.
        let often = -(-each).exp_m1();
        let makes_own = often / (1.0 + often);
        let kept = self.idle + self.open_seconds;
        let own = |patience| share(each * makes_own, self.ends(each, patience));
        let is_own = own(self.idle);
        let streams = each + others * (1.0 - is_own) * each * (1.0 - makes_own);
        let ends = self.ends(streams, self.idle);
        let first = Between {
            count: 1.0,
            streams,
            carried: streams,
            ends,
            warm: share(streams, ends),
            lasting: share(streams, self.ends(streams, kept)),
        };
        let other = Between {
            count: others,
            streams: each,
            carried: each * (is_own + (1.0 - is_own) * makes_own),
            ends: self.ends(each, self.idle),
            warm: is_own,
            lasting: own(kept),
        };
        [first, other]
    }

    /// `c`: how often a connection that is there ends as idle.
    fn ends(&self, streams: f64, patience: f64) -> f64 {
        let hazard = streams + self.rotation;
        hazard / (hazard * patience).exp_m1()
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

    /// `q(u)`: the same on the connections of a pair's other threads, where streams of the identity come `y` times
    /// a second. Between two of them the first thread may have carried any number, so they forget each other.
    fn proven_elsewhere(&self, between: &Between, y: f64, rotations: f64) -> f64 {
        let forgotten = between.warm * between.ends + rotations;
        if y > 0.0 { y * forgotten / (y + forgotten) } else { 0.0 }
    }

    pub(super) fn node_scope(&self) -> Flow {
        let (pairs, both) = (self.pairs(), self.between());
        let [first, other] = &both;
        let over = |of: &dyn Fn(&Between) -> f64| pairs * both.iter().map(|b| b.count * of(b)).sum::<f64>();
        // Each identity on each connection of its agent that carries a stream of it, in one direction.
        let proving = self.held * self.spread(self.fan_out * self.endpoints);
        let rotations = [2.0 * self.rotation, self.rotation];
        let [y, other_y] = [first, other].map(|b| b.carried * pairs / proving);
        let by_first: f64 = rotations.iter().map(|u| self.proven(first, y, *u)).sum();
        let by_other: f64 = rotations.iter().map(|u| self.proven_elsewhere(other, other_y, *u)).sum();
        let known = |y: f64, each: f64| if y > 0.0 { (2.0 - each / y).max(0.0) } else { 0.0 };
        let proven = known(y, by_first) + other.count * other.warm * known(other_y, by_other);
        let handshakes =
            (over(&|b| b.warm * (b.ends + self.rotation)), "R * (s * (c(x) + r) + (W - 1) * o * (c(z) + r))");
        Flow {
            keys: (pairs * (1.0 + other.count * other.warm), "R * (1 + (W - 1) * o)"),
            handshakes,
            full: handshakes,
            proofs: (
                proving * (by_first + other.count * by_other),
                "G * (p(2*r) + p(r) + (W - 1) * (q(2*r) + q(r))), G = A * D(F * E), y = x * R / G",
            ),
            connections: (over(&|b| b.lasting), "R * (s + (W - 1) * o), with T + d for T"),
            tickets: 0.0,
            proven: proving * proven,
        }
    }

    /// What dials again only because it was idle has a session still, if one of the pair is left.
    pub(super) fn node_scope_resumed(&self) -> Flow {
        let (pairs, [first, other]) = (self.pairs(), self.between());
        let idle_dials = first.warm * first.ends + other.count * other.warm * other.ends;
        // Sessions end with the SVID, which what is there replaces at once, and after an hour.
        let lost = self.rotation * (1.0 - first.warm) + (self.ticket_ends() - self.rotation);
        let replaced = (first.warm + other.count * other.warm) * self.rotation;
        let held = pairs * (SESSIONS * (1.0 + other.count * other.warm)).min(MAX_SESSIONS);
        Flow {
            full: (
                pairs * (replaced + idle_dials * share(lost, idle_dials)),
                "R * ((s + (W - 1) * o) * r + e * v / (v + e)), e = s * c(x) + (W - 1) * o * c(z), v = t - r * s",
            ),
            tickets: held * share(self.connections / pairs, self.ticket_ends()),
            ..self.node_scope()
        }
    }

    /// `t`: how often a session ends: with the SVID that it began under, and an hour after its full
    /// handshake.
    pub(super) fn ticket_ends(&self) -> f64 {
        self.rotation.max(1.0 / LIFETIME_SECONDS as f64)
    }
}

/// The share of the time that something is there which begins and ends so often; what never begins never is.
fn share(begins: f64, ends: f64) -> f64 {
    if begins > 0.0 { begins / (begins + ends) } else { 0.0 }
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
    fn where_few_streams_come_threads_share_one_connection() {
        // So thin that every stream finds nothing.
        let thin = Ratios {
            connections_per_second: 1e-7,
            threads: Some(8),
            certificate_lifetime_seconds: 1e7,
            ..Ratios::default()
        };
        let load = load(10, &thin);
        near(load.flow(Way::NodeScope).handshakes.0, 1e-6);
        near(load.flow(Way::NodeScope).proofs.0, 2.0 * 1e-6);
        near(load.flow(Way::NodeScopeResumed).full.0, 1e-6);
    }

    #[test]
    fn threads_cost_as_much_as_by_hand() {
        // Two threads accept a stream a second each: z = 1, r = 1/100, c(z) = 1.01 / (e^2.02 - 1).
        let node = small(2).flow(Way::NodeScope);
        let makes_own = 0.632_120_6 / 1.632_120_6;
        let own = makes_own / (makes_own + 1.01 / (7.538_325 - 1.0));
        near(node.keys.0, 1.0 + own);
        let first = 1.0 + (1.0 - own) * (1.0 - makes_own);
        let ends = (first + 0.01) / (2.0 * (first + 0.01)).exp_m1();
        let by_first = first / (first + ends) * (ends + 0.01);
        near(node.handshakes.0, by_first + own * (1.01 / 6.538_325 + 0.01));
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
