//! What must hold of rotations, tried on fleets that do anything at any time.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;
use crate::ca::state::{Lease, Secret};
use crate::identity::TrustDomain;

const LIFETIME: u64 = 100;

/// A root that nobody signs with: the machine looks at names and times only.
fn root(number: usize) -> Root {
    Root {
        id: serde_json::from_value(format!("{number:032x}").into()).unwrap(),
        certificate: String::new(),
        chain: String::new(),
        key: Secret::from(String::new()),
        cross: Some(format!("cross {number}")),
        since: 0,
        not_after: u64::MAX,
        signed_until: 0,
    }
}

fn state() -> TrustState {
    TrustState::new(TrustDomain::parse("td.test").unwrap(), root(0))
}

fn node(number: usize) -> NodeName {
    NodeName::parse(&format!("n{number}")).unwrap()
}

fn nobody(_: &NodeName) -> bool {
    false
}

/// One agent, as it really is.
#[derive(Clone, Debug, Default)]
struct Agent {
    /// The roots that it has applied, and their generation.
    holds: (u64, Vec<RootId>),
    /// What it was issued: the root, and until when.
    svid: Option<(RootId, u64)>,
    /// Whether it was left behind on purpose.
    excluded: bool,
}

/// An authority and its agents.
#[derive(Debug)]
struct Fleet {
    state: TrustState,
    agents: BTreeMap<usize, Agent>,
    now: u64,
    roots: usize,
}

#[derive(Clone, Debug)]
enum Act {
    Wait(u64),
    /// An agent asks for an SVID and takes up the bundle that comes with it.
    Issue(usize),
    /// An agent hears the bundle and applies it.
    Hear(usize),
    /// An agent's word of what it has applied arrives.
    Report(usize),
    /// An agent starts anew, and has nothing but its file with the roots.
    Restart(usize),
    Start,
    Abort,
    Exclude(usize),
    Advance,
    /// The authority starts anew from its document.
    Crash,
}

fn act() -> impl Strategy<Value = Act> {
    let agent = 0..4usize;
    prop_oneof![
        3 => (1u64..60).prop_map(Act::Wait),
        4 => agent.clone().prop_map(Act::Issue),
        4 => agent.clone().prop_map(Act::Hear),
        4 => agent.clone().prop_map(Act::Report),
        1 => agent.clone().prop_map(Act::Restart),
        3 => Just(Act::Start),
        1 => Just(Act::Abort),
        1 => agent.prop_map(Act::Exclude),
        6 => Just(Act::Advance),
        1 => Just(Act::Crash),
    ]
}

impl Fleet {
    fn new() -> Self {
        let state = state();
        let agents = (0..4).map(|number| (number, Agent::default())).collect();
        Self { state, agents, now: 1_000, roots: 1 }
    }

    fn bundle(&self) -> (u64, Vec<RootId>) {
        (self.state.generation, self.state.roots.iter().map(|root| root.id.clone()).collect())
    }

    fn act(&mut self, act: &Act) {
        let (bundle, now) = (self.bundle(), self.now);
        match *act {
            Act::Wait(seconds) => self.now += seconds,
            Act::Issue(number) => {
                let until = now + LIFETIME;
                let signing = self.state.signing.clone();
                let lease = self.state.nodes.entry(node(number)).or_default();
                (lease.seen, lease.until) = (now, lease.until.max(until));
                for root in self.state.roots.iter_mut().filter(|root| root.id == signing) {
                    root.signed_until = root.signed_until.max(until);
                }
                let agent = self.agents.get_mut(&number).unwrap();
                *agent = Agent { holds: bundle, svid: Some((signing, until)), excluded: false };
            }
            Act::Hear(number) => {
                let agent = self.agents.get_mut(&number).unwrap();
                (agent.holds, agent.excluded) = (bundle, false);
            }
            Act::Report(number) => {
                let applied = self.agents[&number].holds.0;
                if applied > 0 {
                    self.state.nodes.entry(node(number)).or_default().applied = applied;
                }
            }
            Act::Restart(number) => {
                // It keeps the roots that it had applied, and the authority hears that.
                let agent = self.agents.get_mut(&number).unwrap();
                agent.svid = None;
            }
            Act::Start => {
                if self.state.start(root(self.roots), now).is_ok() {
                    self.roots += 1;
                }
            }
            Act::Abort => drop(self.state.abort(now)),
            Act::Exclude(number) => {
                if self.state.exclude(node(number)).is_ok() {
                    self.agents.get_mut(&number).unwrap().excluded = true;
                }
            }
            Act::Advance => drop(self.state.advance(now, nobody)),
            Act::Crash => {
                let text = serde_json::to_string(&self.state).unwrap();
                self.state = serde_json::from_str(&text).unwrap();
            }
        }
    }

    fn check(&self) -> Result<(), TestCaseError> {
        let trusted = self.bundle().1;
        prop_assert!(trusted.contains(&self.state.signing), "the root that signs is trusted");
        prop_assert!(trusted.len() <= 2 && !trusted.is_empty());
        let live = |agent: &Agent| agent.svid.clone().filter(|(_, until)| *until > self.now);
        for (number, agent) in &self.agents {
            let Some((root, _)) = live(agent) else { continue };
            prop_assert!(trusted.contains(&root), "the root of n{number}'s SVID has left");
            for (other, peer) in self.agents.iter().filter(|(_, peer)| live(peer).is_some() && !peer.excluded)
            {
                prop_assert!(peer.holds.1.contains(&root), "n{other} does not know the root of n{number}");
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_agent_ever_meets_an_svid_whose_root_it_does_not_know(
        acts in proptest::collection::vec(act(), 1..80)
    ) {
        let mut fleet = Fleet::new();
        for act in &acts {
            let generation = fleet.state.generation;
            let trusted = fleet.bundle().1;
            fleet.act(act);
            fleet.check()?;
            prop_assert!(fleet.state.generation >= generation);
            prop_assert_eq!(fleet.bundle().1 != trusted, fleet.state.generation != generation);
        }
        // Whatever happened: once everybody hears and time passes, every rotation ends.
        for _ in 0..2 {
            for number in 0..4 {
                fleet.act(&Act::Hear(number));
                fleet.act(&Act::Report(number));
            }
            fleet.act(&Act::Advance);
            fleet.act(&Act::Wait(2 * LIFETIME));
            fleet.act(&Act::Advance);
            fleet.check()?;
        }
        prop_assert_eq!(&fleet.state.rotation, &Rotation::Idle);
        prop_assert_eq!(fleet.state.roots.len(), 1);
    }
}

#[test]
fn a_node_that_has_not_applied_the_roots_is_waited_for_by_name_until_it_is_excluded() {
    let mut state = state();
    for number in 0..2 {
        state.nodes.insert(node(number), Lease { seen: 1, until: 500, applied: 1 });
    }
    state.start(root(1), 10).unwrap();
    state.nodes.get_mut(&node(0)).unwrap().applied = 2;
    let waiting = vec![Blocker::Node { name: node(1), applied: 1, until: 500 }];
    assert_eq!(state.blockers(499, nobody), waiting);
    assert_eq!(state.advance(499, nobody), None);
    assert_eq!(state.blockers(500, nobody), [], "what it held has expired");
    assert_eq!(state.blockers(499, |name| *name == node(1)), [], "it is revoked");
    assert!(state.exclude(node(1)).unwrap());
    assert_eq!(state.advance(20, nobody), Some(Step::Activated(root(1).id)));
    assert!(matches!(state.exclude(node(0)), Err(RotationError::NothingToExclude("retire"))));
}

#[test]
fn a_root_leaves_when_nothing_that_it_signed_is_valid() {
    let mut state = state();
    state.start(root(1), 10).unwrap();
    assert!(matches!(state.start(root(2), 11), Err(RotationError::UnderWay("prepare"))));
    state.roots[0].signed_until = 300;
    assert!(state.advance(12, nobody).is_some());
    assert_eq!(state.blockers(299, nobody), [Blocker::Signed { until: 300 }]);
    assert_eq!(state.advance(300, nobody), Some(Step::Retired(root(0).id)));
    assert_eq!((state.generation, state.roots.len()), (3, 1));
    assert_eq!(state.crosses, ["cross 1"], "whoever knows the old root is shown the way");
}

#[test]
fn an_aborted_rotation_goes_back_to_the_root_before() {
    let mut prepared = state();
    prepared.start(root(1), 10).unwrap();
    let mut activated = prepared.clone();
    prepared.abort(20).unwrap();
    assert_eq!((&prepared.rotation, prepared.roots.len(), prepared.generation), (&Rotation::Idle, 1, 3));
    assert!(matches!(prepared.abort(21), Err(RotationError::NothingToAbort("idle"))));

    activated.advance(20, nobody).unwrap();
    activated.roots[1].signed_until = 400;
    activated.abort(30).unwrap();
    assert_eq!(activated.signing, root(0).id);
    assert!(matches!(activated.abort(31), Err(RotationError::NothingToAbort("abort"))));
    assert_eq!(activated.advance(399, nobody), None);
    assert_eq!(activated.advance(400, nobody), Some(Step::Retired(root(1).id)));
    assert!(activated.crosses.is_empty());
}

#[test]
fn a_state_that_is_older_than_a_nodes_changes_no_root() {
    let mut state = state();
    state.nodes.insert(node(0), Lease { seen: 1, until: 500, applied: 7 });
    let error = state.start(root(1), 10).unwrap_err().to_string();
    assert!(error.contains("n0") && error.contains("7"), "{error}");
    let mut later = TrustState::new(TrustDomain::parse("td.test").unwrap(), root(0));
    later.start(root(1), 10).unwrap();
    later.nodes.insert(node(0), Lease { seen: 1, until: 500, applied: 7 });
    assert_eq!(later.blockers(20, nobody), [Blocker::Behind { name: node(0), applied: 7 }]);
}

#[test]
fn what_an_authority_did_not_count_is_waited_for() {
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let mut state = TrustState::migrated(TrustDomain::parse("td.test").unwrap(), root(0), hour, now);
    let now = crate::ca::state::seconds(now);
    state.start(root(1), now).unwrap();
    assert!(matches!(state.blockers(now, nobody)[..], [Blocker::Strangers { until }] if until > now + 3600));
    assert!(state.advance(now + 4000, nobody).is_some());
    let leaves = state.root(&root(0).id).unwrap().signed_until;
    assert!(leaves > now + 29 * 24 * 3600, "any SVID that it could have signed has expired by then");
}
