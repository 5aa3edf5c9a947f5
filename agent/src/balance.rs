//! Which endpoint of a service a connection goes to, and what is tried when that fails.
//!
//! One for the whole agent: threads share each endpoint's count of connections and its failures.
//! Reading is by snapshot; a lock is taken when a service is spoken to for the first time, and for
//! endpoints in trouble. What is known of an endpoint goes when the directory drops it.
//!
//! - `group`: the choice: nearest, then least loaded of two
//! - `ejection`: when an endpoint is out of use, for how long, and how it comes back
//! - `health`: both, shared between threads
//! - `affinity`: clients that are to meet the same endpoint again
//! - `tries`: one connection's way through them
//!
//! A connection is tried at most [`MAX_TRIES`] times, and only while nothing of it was sent. An
//! endpoint that failed lately has to accept the stream before its connection's first byte is sent,
//! so only the first to meet a dead application is lost. An application that resets, a policy that
//! refuses and a limit of ours say nothing of the endpoint. A workload's own address is not for us to
//! choose: nothing here applies to it.

mod affinity;
mod ejection;
mod group;
mod health;
mod tries;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::directory::{Destination, Directory, Endpoints, Live, Resolved};
use crate::telemetry::Observe;
use crate::verdict::Locality;
use affinity::Affinity;
use group::{Group, Member};
use health::Health;
use tries::{Left, Sticky};
pub use tries::{MAX_TRIES, Pick, Tries};

/// Services spoken to, by their address and port.
type Groups = HashMap<SocketAddr, Arc<Group>>;
/// What is known of endpoints, with the workload's name: an address may pass to another workload.
type Known = HashMap<SocketAddr, (String, Weak<Health>)>;

/// The agent's balancer.
#[derive(Debug)]
pub struct Balance {
    node: String,
    observe: Observe,
    groups: ArcSwap<Groups>,
    /// Locked while groups are made.
    known: Mutex<Known>,
    affinity: Affinity,
}

impl Balance {
    /// Knows nothing yet; `node` is the node it chooses for.
    pub fn new(node: String, observe: Observe) -> Self {
        Self {
            node,
            observe,
            groups: ArcSwap::default(),
            known: Mutex::default(),
            affinity: Affinity::default(),
        }
    }

    /// The tries of a connection from `client` that goes to `to`. Within `patience` of `now` it may be
    /// tried again.
    pub fn tries(
        &self,
        directory: &Directory,
        client: IpAddr,
        to: Resolved,
        now: Instant,
        patience: Duration,
    ) -> Tries<'_> {
        let (left, sticky) = match to {
            Resolved::Workload(destination) => (Left::Workload(Some(destination)), None),
            Resolved::Service(endpoints) => {
                let sticky = endpoints.service.affinity.map(|timeout| Sticky {
                    affinity: &self.affinity,
                    service: endpoints.address,
                    client,
                    timeout,
                });
                (Left::Group(self.group(directory, &endpoints)), sticky)
            }
        };
        Tries::new(&self.observe, left, sticky, now, patience)
    }

    /// Runs for ever: forgets what the directory has dropped.
    pub async fn follow(self: Arc<Self>, directory: Arc<Live>) {
        let mut changes = directory.subscribe();
        let mut before = Arc::new(Directory::default());
        while changes.changed().await.is_ok() {
            let now = directory.load();
            self.renew(&now, &before);
            self.affinity.tidy(Instant::now());
            before = now;
        }
    }

    fn renew(&self, directory: &Directory, before: &Directory) {
        let mut known = self.lock();
        let mut groups = Groups::new();
        let same_nodes = directory.has_same_nodes(before);
        for (address, group) in self.groups.load().iter() {
            if let Ok(Resolved::Service(endpoints)) = directory.resolve(*address) {
                let group = match same_nodes && Arc::ptr_eq(&group.service, &endpoints.service) {
                    true => Arc::clone(group),
                    false => self.make(&mut known, directory, &endpoints),
                };
                groups.insert(*address, group);
            }
        }
        self.groups.store(Arc::new(groups));
        known.retain(|_, (_, health)| health.strong_count() > 0);
    }

    fn group(&self, directory: &Directory, endpoints: &Endpoints) -> Arc<Group> {
        let made = |groups: &Groups| {
            let group = groups.get(&endpoints.address)?;
            Arc::ptr_eq(&group.service, &endpoints.service).then(|| Arc::clone(group))
        };
        if let Some(group) = made(&self.groups.load()) {
            return group;
        }
        let mut known = self.lock();
        let groups = self.groups.load();
        if let Some(group) = made(&groups) {
            return group;
        }
        let group = self.make(&mut known, directory, endpoints);
        let mut groups = Groups::clone(&groups);
        groups.insert(endpoints.address, Arc::clone(&group));
        self.groups.store(Arc::new(groups));
        group
    }

    fn make(&self, known: &mut Known, directory: &Directory, endpoints: &Endpoints) -> Arc<Group> {
        let zone = |node: &str| directory.node(node).and_then(|node| node.zone.as_deref());
        let ours = zone(&self.node);
        let members = endpoints.for_clients_on(&self.node, ours).into_iter().map(|destination| {
            let node = &destination.workload.node;
            let locality = match zone(node) {
                _ if *node == self.node => Locality::Node,
                Some(theirs) if Some(theirs) == ours => Locality::Zone,
                _ => Locality::Other,
            };
            let health = self.health(known, &destination);
            Member { destination, locality, health }
        });
        Arc::new(Group::new(Arc::clone(&endpoints.service), members.collect()))
    }

    fn health(&self, known: &mut Known, at: &Destination) -> Arc<Health> {
        let name = at.workload.full_name();
        if let Some((of, health)) = known.get(&at.address)
            && *of == name
            && let Some(health) = health.upgrade()
        {
            return health;
        }
        let health = Arc::new(Health::new(self.observe.clone()));
        known.insert(at.address, (name, Arc::downgrade(&health)));
        health
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        // An entry too few or too many changes no answer.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::{Endpoint, Mode, Node, Service, Target, Workload};
    use crate::identity::{SpiffeId, TrustDomain};
    use crate::telemetry::Metrics;

    /// A balancer on node n1, and the directory that it chooses from.
    pub(super) struct Bench {
        pub(super) balance: Balance,
        pub(super) directory: Directory,
        metrics: Arc<Metrics>,
    }

    /// A service at 10.96.0.1:80 with these endpoints, each `name` and `node`; nodes n1 and n2 are in
    /// one zone, n3 is in another. An endpoint's address ends with its place in the list.
    pub(super) fn directory(endpoints: &[(&str, &str)]) -> Directory {
        let domain = TrustDomain::parse("td.test").unwrap();
        let workload = |(index, (name, node)): (usize, &(&str, &str))| Workload {
            name: (*name).into(),
            namespace: "shop".into(),
            id: SpiffeId::workload(&domain, "shop", name).unwrap(),
            node: (*node).into(),
            addresses: vec![format!("10.1.0.{}", index + 1).parse().unwrap()],
            mode: Mode::Strict,
            netns: None,
            exclusions: Arc::default(),
            svid_lifetime: None,
        };
        let workloads: Vec<_> = endpoints.iter().enumerate().map(|e| Arc::new(workload(e))).collect();
        let endpoint = |workload: &Arc<Workload>| Endpoint {
            workload: Arc::clone(workload),
            address: workload.addresses[0],
            targets: [Target { port: 80, target: 8080 }].into(),
            is_draining: false,
            zones: [].into(),
        };
        let service = Service {
            name: "web".into(),
            namespace: "shop".into(),
            addresses: vec!["10.96.0.1".parse().unwrap()],
            ports: vec![80],
            endpoints: workloads.iter().map(endpoint).collect(),
            local_only: false,
            affinity: None,
        };
        let node = |(name, zone): (&str, &str)| {
            let address = format!("10.0.0.{}", &name[1..]).parse().unwrap();
            {
                let id = SpiffeId::parse(&format!("spiffe://td.test/node/{name}")).unwrap();
                Arc::new(Node { name: name.into(), id, address, zone: Some(zone.into()) })
            }
        };
        let nodes = [("n1", "a"), ("n2", "a"), ("n3", "b")].map(node).to_vec();
        Directory::new(workloads, vec![Arc::new(service)], nodes)
    }

    impl Bench {
        /// With affinity of clients.
        pub(super) fn sticky(endpoints: &[(&str, &str)], timeout: Duration) -> Self {
            let mut bench = Self::new(endpoints);
            let Ok(Resolved::Service(to)) = bench.directory.resolve("10.96.0.1:80".parse().unwrap()) else {
                panic!("it is a service's address");
            };
            bench.directory.remove_service(&to.service);
            let service = Service { affinity: Some(timeout), ..(*to.service).clone() };
            bench.directory.insert_service(service.into());
            bench
        }

        pub(super) fn new(endpoints: &[(&str, &str)]) -> Self {
            let metrics = Arc::new(Metrics::new().unwrap());
            let balance = Balance::new("n1".into(), Observe::new(Arc::clone(&metrics)));
            Self { balance, directory: directory(endpoints), metrics }
        }

        pub(super) fn to(&self, address: &str, now: Instant) -> Tries<'_> {
            let to = self.directory.resolve(address.parse().unwrap()).unwrap();
            self.balance.tries(&self.directory, [10, 1, 9, 9].into(), to, now, Duration::from_secs(3))
        }

        pub(super) fn pick(&self, now: Instant) -> Pick {
            self.to("10.96.0.1:80", now).next(now).unwrap()
        }

        /// A metric's value, with its labels.
        pub(super) fn metric(&self, name: &str) -> String {
            let domain = TrustDomain::parse("td.test").unwrap();
            let pem = crate::ca::create_root(&domain, std::time::SystemTime::now()).unwrap();
            let trust =
                crate::trust::Trust::new(crate::ca::Ca::from_pem(domain, &pem).unwrap().bundle().clone());
            let policies = crate::telemetry::metrics::PolicyStanding::default();
            let page =
                self.metrics.render(&trust.snapshot(), Default::default(), &policies, Default::default(), 0);
            let line =
                page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
            line.unwrap_or_else(|| panic!("no {name} in\n{page}"))
        }
    }

    pub(super) fn name(pick: &Pick) -> String {
        pick.destination.workload.name.clone()
    }

    #[test]
    fn an_endpoint_that_leaves_the_directory_takes_what_was_known_of_it_along() {
        let now = Instant::now();
        let mut bench = Bench::new(&[("a", "n3"), ("b", "n3")]);
        let mut held = Vec::new();
        while bench.metric("hauberk_balance_ejected") == "0" || held.is_empty() {
            let mut tries = bench.to("10.96.0.1:80", now);
            let pick = tries.next(now).unwrap();
            match name(&pick).as_str() {
                "a" => tries.failed(pick, crate::verdict::Reason::Refused, now),
                _ => held.push(pick),
            }
        }
        // Others in front of it and behind it, and the service read anew: what is known stays.
        bench.directory = directory(&[("a", "n3"), ("b", "n3"), ("c", "n3")]);
        bench.balance.renew(&bench.directory, &Directory::default());
        assert_eq!(bench.metric("hauberk_balance_ejected"), "1");
        assert!((0..50).all(|_| name(&bench.pick(now)) != "a"), "still ejected");
        assert_eq!(name(&bench.pick(now)), "c", "and the connections to b are still counted");
        // Another workload has the address now.
        bench.directory = directory(&[("new", "n3"), ("b", "n3")]);
        bench.balance.renew(&bench.directory, &Directory::default());
        assert_eq!(bench.metric("hauberk_balance_ejected"), "0");
        assert_eq!(name(&bench.pick(now)), "new");
        drop(held);
        bench.balance.renew(&Directory::default(), &Directory::default());
        assert_eq!((bench.balance.groups.load().len(), bench.balance.lock().len()), (0, 0));
    }

    #[test]
    fn a_changed_service_is_seen_at_once_and_not_when_the_follower_comes_round() {
        let now = Instant::now();
        let mut bench = Bench::new(&[("a", "n3")]);
        assert_eq!(name(&bench.pick(now)), "a");
        bench.directory = directory(&[("other", "n3")]);
        assert_eq!(name(&bench.pick(now)), "other");
    }
}
