//! The endpoints of one service's port, nearest first, and the choice among them.
//!
//! The rule: of two random endpoints of the nearest tier (this node, this zone, the rest), the one
//! with fewer connections of ours. It keeps [`SLACK`] connections to itself; beyond that it has to
//! hold no more than [`WEIGHT`] times what the choice of the next tier holds, or that one is taken.
//! So nearness decides while there is little to do, and load decides when there is much: a lone
//! endpoint on a busy node is no hot spot, and an unhealthy tier, whose rest fills up sooner,
//! overflows the sooner. (Envoy shifts by the share of healthy endpoints alone, Kubernetes'
//! PreferClose not until the zone is empty: neither sees a nearer set drown.)
//!
//! Ejected endpoints are passed over, unless nobody else is left or all are failing: then any may be
//! well again, and all are tried.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::ejection::{Probe, Standing};
use super::health::Health;
use crate::directory::{Destination, Service};
use crate::verdict::Locality;

/// Connections that a nearer endpoint takes before a farther one is thought of.
pub(super) const SLACK: usize = 32;
/// Times as many connections as a farther one that a nearer endpoint takes beyond that.
pub(super) const WEIGHT: usize = 2;
/// Random draws before the tier is searched in order: most endpoints are usable most of the time.
const DRAWS: usize = 4;

/// An endpoint of a group.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) destination: Destination,
    pub(super) locality: Locality,
    pub(super) health: Arc<Health>,
}

/// The endpoints of one service's port.
#[derive(Debug)]
pub(super) struct Group {
    /// What it was made from.
    pub(super) service: Arc<Service>,
    /// By [`Locality`].
    tiers: Vec<Vec<Member>>,
    count: usize,
    /// Held while deciding on an ejection, so that two threads do not eject the last two.
    ejecting: Mutex<()>,
}

/// Which member, and on what terms.
pub(super) struct Choice<'a> {
    pub(super) member: &'a Member,
    pub(super) standing: Standing,
    pub(super) probe: Option<Probe>,
}

impl Group {
    pub(super) fn new(service: Arc<Service>, members: Vec<Member>) -> Self {
        let count = members.len();
        let mut tiers: Vec<Vec<Member>> = Locality::ALL.iter().map(|_| Vec::new()).collect();
        for member in members {
            tiers[member.locality as usize].push(member);
        }
        Self { service, tiers, count, ejecting: Mutex::new(()) }
    }

    /// How many endpoints there are.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn members(&self) -> impl Iterator<Item = &Member> {
        self.tiers.iter().flatten()
    }

    /// Chooses an endpoint that was not `tried`; `None` when all were. The one to meet `again` is chosen
    /// as long as nothing is wrong with it.
    pub(super) fn choose(
        &self,
        again: Option<SocketAddr>,
        tried: &[Arc<Health>],
        now: Instant,
    ) -> Option<Choice<'_>> {
        let fresh = |member: &Member| !tried.iter().any(|t| Arc::ptr_eq(t, &member.health));
        let again = again.and_then(|at| self.members().find(|m| m.destination.address == at && fresh(m)));
        if let Some(member) = again.filter(|member| member.health.standing(now) == Standing::Trusted) {
            return Some(Choice { member, standing: Standing::Trusted, probe: None });
        }
        let usable = |member: &Member| fresh(member) && member.health.standing(now) != Standing::Ejected;
        loop {
            let mut chosen = self.nearest(&usable);
            let fails = |member: &Member| member.health.standing(now) == Standing::Failing;
            if chosen.is_none_or(|member| fails(member) && self.all_fail(now)) {
                chosen = self.nearest(&fresh);
            }
            let member = chosen?;
            let standing = member.health.standing(now);
            if standing != Standing::Due {
                return Some(Choice { member, standing, probe: None });
            }
            // Another thread may have taken the probe this very moment; the endpoint is not due then.
            if let Some(probe) = member.health.probe(now) {
                return Some(Choice { member, standing, probe: Some(probe) });
            }
        }
    }

    /// The rule at the top of this file, among the eligible.
    fn nearest(&self, eligible: &impl Fn(&Member) -> bool) -> Option<&Member> {
        let mut best: Option<&Member> = None;
        for tier in &self.tiers {
            let Some(candidate) = lesser_of_two(tier, eligible) else { continue };
            best = match best {
                Some(near) if !crowded(near, candidate) => return Some(near),
                _ => Some(candidate),
            };
        }
        best
    }

    fn all_fail(&self, now: Instant) -> bool {
        let fails = |m: &Member| matches!(m.health.standing(now), Standing::Ejected | Standing::Failing);
        self.members().all(fails)
    }

    /// How many are ejected.
    pub(super) fn ejected(&self) -> usize {
        self.members().filter(|m| m.health.is_out()).count()
    }

    /// Takes note of a failure by the endpoint's fault. At most half of a group are ejected.
    pub(super) fn failed(&self, health: &Health, probe: Option<Probe>, now: Instant) -> Option<Duration> {
        let _deciding = self.ejecting.lock().unwrap_or_else(PoisonError::into_inner);
        health.failed(probe, now, self.ejected() < self.count / 2)
    }
}

fn crowded(near: &Member, far: &Member) -> bool {
    near.health.outstanding() > SLACK + WEIGHT * far.health.outstanding()
}

/// Of two random eligible members the one with fewer connections.
fn lesser_of_two<'a>(tier: &'a [Member], eligible: &impl Fn(&Member) -> bool) -> Option<&'a Member> {
    let one = draw(tier, eligible)?;
    let other = draw(tier, &|m: &Member| eligible(m) && !Arc::ptr_eq(&m.health, &one.health));
    match other {
        Some(other) if other.health.outstanding() < one.health.outstanding() => Some(other),
        _ => Some(one),
    }
}

/// A random eligible member.
fn draw<'a>(tier: &'a [Member], eligible: &impl Fn(&Member) -> bool) -> Option<&'a Member> {
    if tier.is_empty() {
        return None;
    }
    for _ in 0..DRAWS {
        let member = &tier[fastrand::usize(..tier.len())];
        if eligible(member) {
            return Some(member);
        }
    }
    let (before, after) = tier.split_at(fastrand::usize(..tier.len()));
    after.iter().chain(before).find(|m| eligible(m))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, name};
    use super::*;

    /// Makes this many picks that all stay; how many each endpoint got.
    fn spread(bench: &Bench, picks: usize) -> std::collections::BTreeMap<String, usize> {
        let now = Instant::now();
        let held: Vec<_> = (0..picks).map(|_| bench.pick(now)).collect();
        let mut each = std::collections::BTreeMap::new();
        for pick in &held {
            *each.entry(name(pick)).or_default() += 1;
        }
        each
    }

    #[test]
    fn the_nearest_is_taken_until_it_holds_its_slack_and_then_load_decides() {
        let bench = Bench::new(&[("node", "n1"), ("zone", "n2"), ("far", "n3")]);
        let now = Instant::now();
        for _ in 0..100 {
            assert_eq!(name(&bench.pick(now)), "node", "nothing is outstanding");
        }
        assert_eq!(spread(&bench, SLACK + 1)["node"], SLACK + 1);
        let each = spread(&bench, 1000);
        // node = SLACK + 2 zone, zone = SLACK + 2 far.
        assert!(each["node"].abs_diff(SLACK + WEIGHT * each["zone"]) <= 3, "{each:?}");
        assert!(each["zone"].abs_diff(SLACK + WEIGHT * each["far"]) <= 3, "{each:?}");
        for (label, least) in [("node", 1000), ("zone", 200), ("other", 50)] {
            let picks = bench.metric(&format!("hauberk_balance_picks_total{{locality=\"{label}\"}}"));
            assert!(picks.parse::<usize>().unwrap() >= least / 2, "{label}: {picks}");
        }
        assert_eq!(name(&bench.pick(now)), "node", "what has ended counts no more");
    }

    #[test]
    fn within_a_tier_the_lesser_of_two_keeps_endpoints_even() {
        let endpoints: Vec<_> = ["a", "b", "c", "d", "e"].into_iter().map(|name| (name, "n3")).collect();
        let each = spread(&Bench::new(&endpoints), 500);
        // At random a standard deviation would be 9; two choices keep within a few.
        assert!(each.values().all(|n| n.abs_diff(100) <= 8), "{each:?}");
    }

    #[test]
    fn one_that_holds_many_connections_gets_no_more_until_the_other_has_as_many() {
        let bench = Bench::new(&[("a", "n3"), ("b", "n3")]);
        let now = Instant::now();
        let mut held: Vec<_> = (0..40).map(|_| bench.pick(now)).collect();
        held.retain(|pick| name(pick) == "a");
        assert_eq!(held.len(), 20);
        let next: Vec<_> = (0..20).map(|_| bench.pick(now)).collect();
        assert!(next.iter().all(|pick| name(pick) == "b"));
    }
}
