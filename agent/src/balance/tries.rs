//! One connection's tries, and where each of them goes.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::affinity::Affinity;
use super::ejection::{Probe, Standing};
use super::group::Group;
use super::health::Health;
use crate::directory::Destination;
use crate::telemetry::Observe;
use crate::verdict::Reason;

/// How often one connection is tried: a service whose three random endpoints are all gone is down.
pub const MAX_TRIES: u32 = 3;

/// What is left to try.
#[derive(Debug)]
pub(super) enum Left {
    Workload(Option<Destination>),
    Group(Arc<Group>),
}

/// That the connection's client is to meet the same endpoint again.
#[derive(Debug)]
pub(super) struct Sticky<'a> {
    pub(super) affinity: &'a Affinity,
    /// The service's address and port.
    pub(super) service: SocketAddr,
    pub(super) client: IpAddr,
    /// For how long after this connection.
    pub(super) timeout: Duration,
}

/// One connection's tries.
#[derive(Debug)]
pub struct Tries<'a> {
    observe: &'a Observe,
    left: Left,
    sticky: Option<Sticky<'a>>,
    tried: Vec<Arc<Health>>,
    /// No other try begins after this.
    until: Instant,
    patience: Duration,
}

impl<'a> Tries<'a> {
    pub(super) fn new(
        observe: &'a Observe,
        left: Left,
        sticky: Option<Sticky<'a>>,
        now: Instant,
        patience: Duration,
    ) -> Self {
        Self { observe, left, sticky, tried: Vec::new(), until: now + patience, patience }
    }

    /// Goes on after a try that another thread began.
    pub fn after(mut self, pick: &Pick) -> Self {
        match (&self.left, &pick.counted) {
            (Left::Group(_), Some(counted)) => self.tried.push(Arc::clone(&counted.health)),
            _ => self.left = Left::Workload(None),
        }
        self
    }

    /// Where to try next; `None` when there is nothing left to try.
    pub fn next(&mut self, now: Instant) -> Option<Pick> {
        let group = match &mut self.left {
            Left::Workload(destination) => {
                let destination = destination.take()?;
                return Some(Pick { destination, is_wary: false, patience: None, counted: None });
            }
            Left::Group(group) => group,
        };
        let most = group.count().min(MAX_TRIES as usize);
        let made = self.tried.len();
        if made == most || made > 0 && now >= self.until {
            return None;
        }
        let again = self.sticky.as_ref().and_then(|it| it.affinity.last(it.service, it.client, now));
        let choice = group.choose(again, &self.tried, now)?;
        let (member, probe) = (choice.member, choice.probe);
        if let Some(Sticky { affinity, service, client, timeout }) = &self.sticky {
            affinity.note(*service, *client, member.destination.address, now + *timeout);
        }
        member.health.begin();
        self.observe.picked(member.locality, made > 0);
        self.tried.push(Arc::clone(&member.health));
        let health = Arc::clone(&member.health);
        Some(Pick {
            destination: member.destination.clone(),
            is_wary: choice.standing != Standing::Trusted,
            patience: (made + 1 < most).then(|| self.patience / MAX_TRIES),
            counted: Some(Counted { group: Arc::downgrade(group), health, probe }),
        })
    }

    /// A try failed before anything was sent; nothing is left to try when another endpoint would
    /// fail as well.
    pub fn failed(&mut self, mut pick: Pick, reason: Reason, now: Instant) {
        if is_its_fault(reason) {
            pick.blame(reason, now);
        } else if !matches!(reason, Reason::Overload | Reason::Draining) {
            self.left = Left::Workload(None);
        }
    }
}

/// Whether the endpoint, or the agent before it, is why nothing came of an attempt.
fn is_its_fault(reason: Reason) -> bool {
    is_refusal(reason)
        || matches!(
            reason,
            Reason::TunnelLost
                | Reason::HandshakeTimeout
                | Reason::HandshakeFailed
                | Reason::NoClientCertificate
                | Reason::UnknownIssuer
                | Reason::OtherTrustDomain
                | Reason::Expired
                | Reason::Revoked
                | Reason::NoProtocol
                | Reason::Unproven
                | Reason::NotYetValid
                | Reason::WrongIdentity
                | Reason::BadCertificate
                | Reason::TlsVersion
                | Reason::Plaintext
                | Reason::Http2
        )
}

/// Whether the application was not there, or its agent no longer knows it.
fn is_refusal(reason: Reason) -> bool {
    matches!(reason, Reason::Refused | Reason::Unreachable | Reason::ConnectTimeout | Reason::NotLocal)
}

/// Where a connection is to go. As long as it lives, it counts as one of the endpoint's connections.
#[derive(Debug)]
pub struct Pick {
    /// Who must answer, and where.
    pub destination: Destination,
    /// Whether the stream must be accepted before anything is sent: the endpoint failed lately.
    pub is_wary: bool,
    /// How long to wait for a stream when another endpoint could be tried after that.
    pub patience: Option<Duration>,
    counted: Option<Counted>,
}

/// Nothing of this is there for a workload's own address.
#[derive(Debug)]
struct Counted {
    /// Weak, as a connection may outlive many states of its service by days.
    group: Weak<Group>,
    health: Arc<Health>,
    probe: Option<Probe>,
}

impl Pick {
    /// The endpoint has accepted the stream. Say so when that was waited for.
    pub fn accepted(&mut self, now: Instant) {
        if let Some(counted) = &mut self.counted {
            counted.probe = None;
            if counted.health.succeeded(now) {
                tracing::info!(endpoint = %self.destination.address, id = %self.destination.workload.id, "an ejected endpoint is back");
            }
        }
    }

    /// The connection has ended so.
    pub fn ended(mut self, reason: Reason, now: Instant) {
        // Of the reasons a stream can end with, these come only instead of its acceptance.
        if is_refusal(reason) {
            self.blame(reason, now);
        }
    }

    fn blame(&mut self, reason: Reason, now: Instant) {
        let Some(Counted { group, health, probe }) = &mut self.counted else { return };
        let began = match group.upgrade() {
            Some(group) => group.failed(health, probe.take(), now),
            // The service has changed: who else is in use is for the next failure to see.
            None => health.failed(probe.take(), now, false),
        };
        if let Some(backoff) = began {
            tracing::warn!(
                endpoint = %self.destination.address,
                id = %self.destination.workload.id,
                reason = reason.as_str(),
                backoff_ms = backoff.as_millis() as u64,
                "an endpoint is ejected: it failed again and again"
            );
        }
    }
}

impl Drop for Pick {
    fn drop(&mut self) {
        if let Some(Counted { health, probe, .. }) = &mut self.counted {
            if let Some(probe) = probe.take() {
                health.abandoned(probe);
            }
            health.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ejection::{FIRST_BACKOFF, LIMIT, LONGEST_BACKOFF};
    use super::super::tests::{Bench, name};
    use super::*;

    const SERVICE: &str = "10.96.0.1:80";

    /// One connection while the endpoints for which `dead` holds refuse; where it ended up.
    fn connect(bench: &Bench, now: Instant, dead: &impl Fn(&str) -> bool) -> Option<String> {
        let mut tries = bench.to(SERVICE, now);
        while let Some(mut pick) = tries.next(now) {
            let name = name(&pick);
            if !dead(&name) {
                if pick.is_wary {
                    pick.accepted(now);
                }
                return Some(name);
            }
            tries.failed(pick, Reason::Refused, now);
        }
        None
    }

    fn group(pick: &Pick) -> Arc<Group> {
        pick.counted.as_ref().unwrap().group.upgrade().unwrap()
    }

    #[test]
    fn a_dead_endpoint_costs_no_connection_is_ejected_and_comes_back() {
        let mut now = Instant::now();
        let bench = Bench::new(&[("dead", "n1"), ("far", "n3")]);
        let dead = |name: &str| name == "dead";
        for _ in 0..LIMIT {
            assert_eq!(connect(&bench, now, &dead).as_deref(), Some("far"), "tried again elsewhere");
        }
        let counts = |bench: &Bench| {
            ["ejections_total", "ejected", "retries_total"]
                .map(|name| bench.metric(&format!("hauberk_balance_{name}")))
        };
        assert_eq!(counts(&bench), ["1", "1", &LIMIT.to_string()]);
        for _ in 0..100 {
            assert_eq!(connect(&bench, now, &dead).as_deref(), Some("far"));
        }
        assert_eq!(counts(&bench), ["1", "1", &LIMIT.to_string()], "nobody was sent there");
        now += FIRST_BACKOFF;
        let probe = bench.pick(now);
        assert!(name(&probe) == "dead" && probe.is_wary, "its time has come");
        for _ in 0..100 {
            assert_eq!(connect(&bench, now, &dead).as_deref(), Some("far"), "one probe at a time");
        }
        drop(probe);
        assert_eq!(connect(&bench, now, &|_| false).as_deref(), Some("dead"), "the probe is well");
        assert_eq!(counts(&bench)[1], "0");
        let pick = bench.pick(now);
        assert!(name(&pick) == "dead" && !pick.is_wary, "and trusted again");
    }

    #[test]
    fn when_all_fail_all_are_tried_and_the_first_that_is_well_serves() {
        let now = Instant::now();
        let bench = Bench::new(&[("a", "n1"), ("b", "n3")]);
        for _ in 0..20 {
            assert_eq!(connect(&bench, now, &|_| true), None);
        }
        assert_eq!(bench.metric("hauberk_balance_ejected"), "1", "never both");
        assert_eq!(connect(&bench, now, &|name| name == "b").as_deref(), Some("a"));
        let bench = Bench::new(&[("a", "n1"), ("b", "n3")]);
        for _ in 0..20 {
            assert_eq!(connect(&bench, now, &|_| true), None);
        }
        assert_eq!(connect(&bench, now, &|name| name == "a").as_deref(), Some("b"));
    }

    #[test]
    fn only_the_endpoints_own_faults_are_held_against_it() {
        let now = Instant::now();
        let bench = Bench::new(&[("near", "n1"), ("far", "n3")]);
        for reason in Reason::ALL.iter().filter(|reason| !is_its_fault(**reason)) {
            for _ in 0..LIMIT {
                let mut tries = bench.to(SERVICE, now);
                let pick = tries.next(now).unwrap();
                assert!(!pick.is_wary, "{reason:?}");
                tries.failed(pick, *reason, now);
                let again = tries.next(now).is_some();
                assert_eq!(again, matches!(reason, Reason::Overload | Reason::Draining), "{reason:?}");
            }
        }
        // Of reasons to end, only a refusal is: a broken tunnel shows when the next one is dialled.
        for reason in Reason::ALL {
            bench.pick(now).ended(*reason, now);
            let next = bench.pick(now);
            assert_eq!(next.is_wary, is_refusal(*reason), "{reason:?}");
            let mut next = next;
            next.accepted(now);
        }
    }

    #[test]
    fn tries_are_few_and_end_with_the_patience() {
        let now = Instant::now();
        let bench = Bench::new(&[("a", "n3"), ("b", "n3"), ("c", "n3"), ("d", "n3")]);
        let mut tries = bench.to(SERVICE, now);
        let mut seen = Vec::new();
        while let Some(pick) = tries.next(now) {
            assert_eq!(pick.patience, (seen.len() < 2).then_some(Duration::from_secs(1)), "{seen:?}");
            seen.push(name(&pick));
            tries.failed(pick, Reason::ConnectTimeout, now);
        }
        assert_eq!(seen.len(), MAX_TRIES as usize);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), MAX_TRIES as usize, "each at another endpoint: {seen:?}");
        let mut tries = bench.to(SERVICE, now);
        let pick = tries.next(now).unwrap();
        tries.failed(pick, Reason::ConnectTimeout, now);
        assert!(tries.next(now + Duration::from_secs(3)).is_none(), "too late");
    }

    #[test]
    fn a_workloads_own_address_is_neither_balanced_nor_ejected() {
        let now = Instant::now();
        let bench = Bench::new(&[("a", "n1"), ("b", "n1")]);
        for _ in 0..20 {
            let mut tries = bench.to("10.1.0.2:9", now);
            let pick = tries.next(now).unwrap();
            assert_eq!(pick.destination.address, "10.1.0.2:9".parse().unwrap());
            assert!(!pick.is_wary && pick.patience.is_none());
            tries.failed(pick, Reason::Refused, now);
            assert!(tries.next(now).is_none(), "nobody else will do");
        }
        assert_eq!(bench.metric("hauberk_balance_ejections_total"), "0");
    }

    #[test]
    fn a_sticky_service_sends_a_client_to_the_same_endpoint_while_that_is_well_and_the_client_comes() {
        let mut now = Instant::now();
        let endpoints: Vec<_> = ["a", "b", "c", "d", "e"].into_iter().map(|name| (name, "n3")).collect();
        let bench = Bench::sticky(&endpoints, Duration::from_secs(60));
        let first = name(&bench.pick(now));
        for _ in 0..50 {
            now += Duration::from_secs(59);
            assert_eq!(name(&bench.pick(now)), first, "each connection begins the time anew");
        }
        // Another one for whoever comes too late: the same by chance at most.
        let mut met: Vec<_> = (0..50)
            .map(|_| {
                now += Duration::from_secs(60);
                name(&bench.pick(now))
            })
            .collect();
        met.sort();
        met.dedup();
        assert!(met.len() > 1, "{met:?}");
        // One that fails is left, and the client stays where it came to.
        let stuck = name(&bench.pick(now));
        let moved = connect(&bench, now, &|name| name == stuck).unwrap();
        assert_ne!(moved, stuck);
        assert_eq!(connect(&bench, now, &|_| false), Some(moved));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Open,
        Wait(u64),
        End { which: usize, outcome: Outcome },
    }

    #[derive(Clone, Copy, Debug)]
    enum Outcome {
        Fails,
        Serves,
        GivenUp,
    }

    fn step() -> impl Strategy<Value = Step> {
        let outcome = prop_oneof![
            4 => Just(Outcome::Fails), 2 => Just(Outcome::Serves), 1 => Just(Outcome::GivenUp)
        ];
        prop_oneof![
            3 => Just(Step::Open),
            1 => (0u64..3_000).prop_map(Step::Wait),
            3 => (any::<usize>(), outcome).prop_map(|(which, outcome)| Step::End { which, outcome }),
        ]
    }

    proptest! {
        #[test]
        fn however_connections_go_at_most_half_are_ejected_and_there_is_always_a_pick(
            count in 1usize..7,
            steps in prop::collection::vec(step(), 0..300),
        ) {
            let endpoints: Vec<_> =
                [("a", "n1"), ("b", "n1"), ("c", "n2"), ("d", "n2"), ("e", "n3"), ("f", "n3")][..count].to_vec();
            let bench = Bench::new(&endpoints);
            let mut now = Instant::now();
            let mut open: Vec<(Tries<'_>, Pick)> = Vec::new();
            for step in steps {
                match step {
                    Step::Open => {
                        let mut tries = bench.to(SERVICE, now);
                        let pick = tries.next(now);
                        prop_assert!(pick.is_some());
                        open.extend(pick.map(|pick| (tries, pick)));
                    }
                    Step::Wait(ms) => now += Duration::from_millis(ms),
                    Step::End { .. } if open.is_empty() => {}
                    Step::End { which, outcome } => {
                        let (mut tries, mut pick) = open.swap_remove(which % open.len());
                        match outcome {
                            Outcome::Fails => tries.failed(pick, Reason::ConnectTimeout, now),
                            Outcome::Serves if pick.is_wary => pick.accepted(now),
                            Outcome::Serves => pick.ended(Reason::Done, now),
                            Outcome::GivenUp => drop(pick),
                        }
                    }
                }
                let mut tries = bench.to(SERVICE, now);
                let probe = tries.next(now).unwrap();
                prop_assert!(group(&probe).ejected() <= endpoints.len() / 2);
            }
            drop(open);
            // Left alone for long enough, everybody gets another chance, and nothing is counted twice.
            now += LONGEST_BACKOFF;
            let pick = bench.pick(now);
            prop_assert_eq!(group(&pick).members().map(|m| m.health.outstanding()).sum::<usize>(), 1);
        }
    }
}
