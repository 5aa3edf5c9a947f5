//! Policies compiled for judging: a few hash lookups for a connection, however many policies there are.
//!
//! Pure: documents in, decisions out. A rule is found by its namespace, then by what selects the
//! workload, then by what names the peer (whole identity, namespace, trust domain, anyone), then by
//! port. What remains to be tried one after another are ranges of addresses under one such key.

use std::collections::HashMap;
use std::net::IpAddr;

use super::document::{AccessPolicy, Action, Peer};
use crate::cidr::Cidr;
use crate::directory::Workload;
use crate::identity::{ParseError, SpiffeId, TrustDomain};

/// What was decided; a policy is called by its place in the list that was compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It may pass: by the allow policy that matches first, or because none is about the workload.
    Allowed(Option<usize>),
    /// A deny policy matches; the first that does.
    Denied(usize),
    /// Allow policies are about the workload, and none matches; the first of them.
    NotAllowed(usize),
    /// No policy is about it, and the peer needs one: it is of another trust domain.
    Outsider,
}

impl Decision {
    /// Whether it may not pass.
    pub fn denies(self) -> bool {
        !matches!(self, Self::Allowed(_))
    }

    /// The policy that decided.
    pub fn policy(self) -> Option<usize> {
        match self {
            Self::Allowed(by) => by,
            Self::Denied(by) | Self::NotAllowed(by) => Some(by),
            Self::Outsider => None,
        }
    }
}

/// What was decided, and what would be if every dry-run policy were enforced as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// By the enforced policies.
    pub enforced: Decision,
    /// By all.
    pub tried: Decision,
}

/// A policy's effect, as a place in arrays: enforced allow and deny, then the same dry.
const EFFECTS: usize = 4;
const ALLOW: usize = 0;
const DENY: usize = 1;
const DRY: usize = 2;

/// The first policy of each effect, by the list's order.
type Firsts = [Option<usize>; EFFECTS];

/// Takes `policy` if it comes before what is there.
fn take(firsts: &mut Firsts, effect: usize, policy: usize) {
    firsts[effect] = Some(firsts[effect].map_or(policy, |first| first.min(policy)));
}

/// A policy with a peer and a port that have matched already.
#[derive(Debug)]
struct Clause {
    policy: usize,
    effect: usize,
    cidr: Option<Cidr>,
}

/// What applies to one kind of peer.
#[derive(Debug, Default)]
struct Clauses {
    any_port: Vec<Clause>,
    by_port: HashMap<u16, Vec<Clause>>,
}

impl Clauses {
    fn add(&mut self, policy: usize, effect: usize, cidr: Option<Cidr>, ports: Option<&[u16]>) {
        let add = |list: &mut Vec<Clause>| {
            // Policies come in order: after one without a range none of its effect can be the first.
            if !list.iter().any(|clause| clause.effect == effect && clause.cidr.is_none()) {
                list.push(Clause { policy, effect, cidr });
            }
        };
        match ports {
            None => add(&mut self.any_port),
            Some(ports) => ports.iter().for_each(|port| add(self.by_port.entry(*port).or_default())),
        }
    }

    fn find(&self, source: IpAddr, port: u16, found: &mut Firsts) {
        for clause in self.any_port.iter().chain(self.by_port.get(&port).into_iter().flatten()) {
            if clause.cidr.is_none_or(|cidr| cidr.contains(source)) {
                take(found, clause.effect, clause.policy);
            }
        }
    }
}

/// What applies to the workloads that one selector names.
#[derive(Debug, Default)]
struct Set {
    /// The policies that are about them, whoever the peer.
    about: Firsts,
    ids: HashMap<SpiffeId, Clauses>,
    /// By trust domain and namespace.
    namespaces: HashMap<Box<str>, HashMap<Box<str>, Clauses>>,
    domains: HashMap<Box<str>, Clauses>,
    anyone: Clauses,
}

impl Set {
    /// Where a peer's clauses are kept.
    fn clauses(&mut self, peer: &Peer, domain: &TrustDomain) -> Result<&mut Clauses, ParseError> {
        let of = peer.trust_domain.as_ref().unwrap_or(domain);
        Ok(match (&peer.spiffe_id, &peer.namespace, &peer.service_account) {
            (Some(id), ..) => self.ids.entry(id.clone()).or_default(),
            (None, Some(namespace), Some(account)) => {
                self.ids.entry(SpiffeId::workload(of, namespace, account)?).or_default()
            }
            (None, Some(namespace), None) => {
                let namespaces = self.namespaces.entry(of.as_str().into()).or_default();
                namespaces.entry(namespace.as_str().into()).or_default()
            }
            (None, None, _) if peer.trust_domain.is_some() => {
                self.domains.entry(of.as_str().into()).or_default()
            }
            (None, None, _) => &mut self.anyone,
        })
    }

    /// All that applies to a peer.
    fn matching(&self, peer: &SpiffeId) -> impl Iterator<Item = &Clauses> {
        let domain = peer.trust_domain();
        let namespaces = self.namespaces.get(domain);
        let namespace = namespaces.and_then(|in_domain| in_domain.get(peer.namespace()?));
        [self.ids.get(peer), namespace, self.domains.get(domain), Some(&self.anyone)].into_iter().flatten()
    }
}

/// What applies in one namespace.
#[derive(Debug, Default)]
struct Namespace {
    all: Set,
    by_account: HashMap<SpiffeId, Set>,
    by_name: HashMap<Box<str>, Set>,
}

/// Compiled policies.
#[derive(Debug, Default)]
pub struct Rules {
    namespaces: HashMap<Box<str>, Namespace>,
}

impl Rules {
    /// Compiles checked documents; `domain` is the agent's own trust domain.
    ///
    /// # Errors
    /// When names together are no SPIFFE ID; says which policy's.
    pub fn compile(policies: &[AccessPolicy], domain: &TrustDomain) -> Result<Self, (usize, ParseError)> {
        let mut rules = Self::default();
        for (index, policy) in policies.iter().enumerate() {
            rules.add(index, policy, domain).map_err(|error| (index, error))?;
        }
        Ok(rules)
    }

    fn add(&mut self, index: usize, policy: &AccessPolicy, domain: &TrustDomain) -> Result<(), ParseError> {
        let effect = match policy.spec.action {
            Action::Allow => ALLOW,
            Action::Deny => DENY,
        } + if policy.spec.dry_run { DRY } else { 0 };
        let name = &policy.metadata.namespace;
        let namespace = self.namespaces.entry(name.as_str().into()).or_default();
        let selector = policy.spec.selector.clone().unwrap_or_default();
        let fill = |set: &mut Set| {
            take(&mut set.about, effect, index);
            for peer in policy.peers() {
                let ports = policy.spec.ports.as_deref();
                set.clauses(peer, domain)?.add(index, effect, peer.cidr, ports);
            }
            Ok(())
        };
        if selector.all == Some(true) {
            fill(&mut namespace.all)?;
        }
        for account in selector.service_accounts.iter().flatten() {
            let id = SpiffeId::workload(domain, name, account)?;
            fill(namespace.by_account.entry(id).or_default())?;
        }
        for workload in selector.workloads.iter().flatten() {
            fill(namespace.by_name.entry(workload.as_str().into()).or_default())?;
        }
        Ok(())
    }

    /// The sets that are about a workload.
    fn about(&self, workload: &Workload) -> impl Iterator<Item = &Set> {
        let namespace = self.namespaces.get(workload.namespace.as_str());
        namespace.into_iter().flat_map(|namespace| {
            let account = namespace.by_account.get(&workload.id);
            let name = namespace.by_name.get(workload.name.as_str());
            [Some(&namespace.all), account, name].into_iter().flatten()
        })
    }

    /// May `peer`, from the address `source`, reach `port` of the workload?
    pub fn judge(&self, peer: &SpiffeId, source: IpAddr, workload: &Workload, port: u16) -> Outcome {
        let source = source.to_canonical();
        let (mut about, mut found) = (Firsts::default(), Firsts::default());
        for set in self.about(workload) {
            for (effect, policy) in set.about.iter().enumerate() {
                policy.iter().for_each(|policy| take(&mut about, effect, *policy));
            }
            set.matching(peer).for_each(|clauses| clauses.find(source, port, &mut found));
        }
        // Both kinds, each in the list's order: the first of either.
        let first = |of: &Firsts, effect: usize| match (of[effect], of[effect + DRY]) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        Outcome {
            enforced: decide(found[DENY], found[ALLOW], about[ALLOW]),
            tried: decide(first(&found, DENY), first(&found, ALLOW), first(&about, ALLOW)),
        }
    }

    /// May `peer` reach the workload at all, on some port and from some address?
    ///
    /// `unasked`: whether it may where no policy is about the workload.
    ///
    /// Errs towards yes: a refusal for a range of addresses may not be one for the next connection.
    pub fn may_reach(&self, peer: &SpiffeId, workload: &Workload, unasked: bool) -> bool {
        let matching = || self.about(workload).flat_map(|set| set.matching(peer));
        let denied = |clause: &Clause| clause.effect == DENY && clause.cidr.is_none();
        if matching().any(|clauses| clauses.any_port.iter().any(denied)) {
            return false;
        }
        if unasked && self.about(workload).all(|set| set.about[ALLOW].is_none()) {
            return true;
        }
        let allows = |list: &[Clause]| list.iter().any(|clause| clause.effect == ALLOW);
        let port_denied = |port: &u16| {
            matching().filter_map(|clauses| clauses.by_port.get(port)).any(|list| list.iter().any(denied))
        };
        matching().any(|clauses| {
            let mut ports = clauses.by_port.iter();
            allows(&clauses.any_port) || ports.any(|(port, list)| allows(list) && !port_denied(port))
        })
    }
}

/// Deny wins; then an allow policy that matches; then whether any is about the workload.
fn decide(deny: Option<usize>, allow: Option<usize>, about: Option<usize>) -> Decision {
    match (deny, allow, about) {
        (Some(deny), ..) => Decision::Denied(deny),
        (None, Some(allow), _) => Decision::Allowed(Some(allow)),
        (None, None, Some(about)) => Decision::NotAllowed(about),
        (None, None, None) => Decision::Allowed(None),
    }
}
