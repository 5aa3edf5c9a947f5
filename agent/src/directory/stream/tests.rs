//! Whatever an agent is told, by whichever way, comes to the directory that the authority has.

use std::net::IpAddr;

use proptest::prelude::*;

use super::history::History;
use super::proto::Chunk;
use super::*;
use crate::directory::{Endpoint, Mode, NetnsAt, Node, Service, Target, Workload};
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh_policy::Exclusions;
use crate::mesh_policy::document::Exclude;

fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

fn ip(last: u8) -> IpAddr {
    [10, 1, 0, last].into()
}

fn mode(number: u8) -> Mode {
    [Mode::Strict, Mode::Permissive, Mode::Off][usize::from(number) % 3]
}

/// Few names and few addresses, so that they are moved, taken over and made anew.
fn workload(name: u8, node: u8, first: u8, second: Option<u8>, rest: u8) -> Arc<Workload> {
    let mut exclusions = Exclusions::default();
    if rest & 1 == 1 {
        exclusions.add(&Exclude {
            inbound_ports: Some(vec![80, 9090]),
            outbound_ports: Some(vec![u16::from(rest)]),
            outbound_cidrs: Some(vec!["10.8.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()]),
        });
    }
    let v6 = |last: u8| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, u16::from(last)]);
    Arc::new(Workload {
        name: format!("w{name}"),
        namespace: "shop".into(),
        id: SpiffeId::workload(&domain(), "shop", &format!("sa{}", rest % 4)).unwrap(),
        node: format!("n{node}"),
        addresses: [ip(first)].into_iter().chain(second.map(v6)).collect(),
        mode: mode(rest),
        netns: None,
        exclusions: exclusions.into(),
        svid_lifetime: (rest & 2 == 2).then(|| Duration::from_secs(rest.into())),
    })
}

/// What happens to the authority's directory.
#[derive(Clone, Debug)]
enum Step {
    Workload {
        name: u8,
        node: u8,
        first: u8,
        second: Option<u8>,
        rest: u8,
    },
    NoWorkload(u8),
    Service {
        name: u8,
        address: u8,
        second: Option<u8>,
        endpoints: Vec<(u8, u8)>,
        rest: u8,
    },
    NoService(u8),
    Node(u8, Option<u8>),
    NoNode(u8),
    /// A state is there to be told.
    State,
    /// The agent hears so many chunks of what it is told, and connects anew if that is not all.
    Hear(usize),
    /// The authority starts anew.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let small = || 0u8..6;
    prop_oneof![
        4 => (small(), 0u8..3, 1u8..8, prop::option::of(1u8..4), any::<u8>())
            .prop_map(|(name, node, first, second, rest)| Step::Workload { name, node, first, second, rest }),
        2 => small().prop_map(Step::NoWorkload),
        3 => (small(), 100u8..106, prop::option::of(100u8..106),
              prop::collection::vec((1u8..8, any::<u8>()), 0..4), any::<u8>())
            .prop_map(|(name, address, second, endpoints, rest)| {
                Step::Service { name, address, second, endpoints, rest }
            }),
        1 => small().prop_map(Step::NoService),
        1 => (small(), prop::option::of(small())).prop_map(|(name, zone)| Step::Node(name, zone)),
        1 => small().prop_map(Step::NoNode),
        4 => Just(Step::State),
        4 => (0usize..4).prop_map(Step::Hear),
        1 => Just(Step::Restart),
    ]
}

/// The authority, with what its source has made, and an agent.
struct Scene {
    directory: Directory,
    history: History,
    runs: u64,
    mirror: Mirror,
}

impl Scene {
    fn new() -> Self {
        Self {
            directory: Directory::default(),
            history: History::new(1),
            runs: 1,
            mirror: Mirror::new(domain()),
        }
    }

    fn named(&self, name: &str) -> Option<Arc<Workload>> {
        self.directory.workloads().find(|it| it.name == name).cloned()
    }

    fn service(&self, name: &str) -> Option<Arc<Service>> {
        self.directory.services.values().find(|it| it.name == name).cloned()
    }

    fn make_service(&self, name: u8, addresses: Vec<IpAddr>, endpoints: &[(u8, u8)], rest: u8) -> Service {
        let endpoint = |(address, rest): &(u8, u8)| {
            Some(Endpoint {
                workload: Arc::clone(self.directory.workload_at(ip(*address))?),
                address: ip(*address),
                targets: [Target { port: 80, target: 8000 + u16::from(rest % 3) }].into(),
                is_draining: rest & 4 == 4,
                zones: (rest & 8 == 8).then(|| "zone".to_owned()).into_iter().collect(),
            })
        };
        Service {
            name: format!("s{name}"),
            namespace: "shop".into(),
            addresses,
            ports: vec![80, 81],
            endpoints: endpoints.iter().filter_map(endpoint).collect(),
            local_only: rest & 1 == 1,
            affinity: (rest & 2 == 2).then(|| Duration::from_secs(rest.into())),
        }
    }

    /// As a cluster does: services follow who is at their endpoints' addresses.
    fn settle(&mut self) {
        let all: Vec<Arc<Service>> = self.directory.services.values().cloned().collect();
        for service in all {
            let mut now = Service::clone(&service);
            now.endpoints.retain_mut(|endpoint| {
                let there = self.directory.workload_at(endpoint.address);
                there.map(|there| endpoint.workload = Arc::clone(there)).is_some()
            });
            if now != *service {
                let held: Vec<IpAddr> = (self.directory.services.iter())
                    .filter(|(_, it)| Arc::ptr_eq(it, &service))
                    .map(|(address, _)| *address)
                    .collect();
                let now = Arc::new(now);
                held.into_iter().for_each(|at| drop(self.directory.services.insert(at, Arc::clone(&now))));
            }
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Workload { name, node, first, second, rest } => {
                if let Some(old) = self.named(&format!("w{name}")) {
                    self.directory.remove_workload(&old);
                }
                self.directory.insert_workload(workload(name, node, first, second, rest));
            }
            Step::NoWorkload(name) => {
                if let Some(old) = self.named(&format!("w{name}")) {
                    self.directory.remove_workload(&old);
                }
            }
            Step::Service { name, address, second, endpoints, rest } => {
                if let Some(old) = self.service(&format!("s{name}")) {
                    self.directory.remove_service(&old);
                }
                let mut addresses: Vec<IpAddr> = [address].into_iter().chain(second).map(ip).collect();
                addresses.dedup();
                let service = self.make_service(name, addresses, &endpoints, rest);
                self.directory.insert_service(Arc::new(service));
            }
            Step::NoService(name) => {
                if let Some(old) = self.service(&format!("s{name}")) {
                    self.directory.remove_service(&old);
                }
            }
            Step::Node(name, zone) => {
                let name = format!("n{name}");
                let id = SpiffeId::node(&domain(), &name).unwrap();
                let zone = zone.map(|zone| format!("zone-{zone}"));
                self.directory.insert_node(Arc::new(Node { name, id, address: ip(200), zone }));
            }
            Step::NoNode(name) => self.directory.remove_node(&format!("n{name}")),
            Step::State => {
                self.settle();
                self.history.push(Arc::new(self.directory.clone()));
            }
            Step::Hear(count) => self.hear(count),
            Step::Restart => {
                self.runs += 1;
                self.history = History::new(self.runs);
            }
        }
    }

    fn hear(&mut self, count: usize) {
        let chunks = self.history.since(&self.mirror.asks());
        for chunk in chunks.iter().take(count) {
            self.mirror.hear(chunk).unwrap();
        }
    }
}

proptest! {
    #[test]
    fn an_agent_that_hears_all_has_what_the_authority_has(
        steps in prop::collection::vec(step(), 0..80)
    ) {
        let mut scene = Scene::new();
        for step in steps {
            scene.take(step);
        }
        scene.take(Step::State);
        scene.hear(usize::MAX);
        prop_assert_eq!(scene.mirror.directory().all(), scene.directory.all());
        prop_assert_eq!(scene.mirror.asks(), scene.history.newest());
        prop_assert!(scene.history.since(&scene.mirror.asks()).is_empty(), "nothing is left to tell");
    }

    #[test]
    fn no_bytes_make_the_reader_panic_or_change_what_it_had(rows: Vec<u8>, anew: bool, last: bool) {
        let mut scene = Scene::new();
        scene.take(Step::Workload { name: 1, node: 1, first: 1, second: None, rest: 0 });
        scene.take(Step::State);
        scene.hear(usize::MAX);
        let had = scene.mirror.directory().all();
        let chunk = Chunk { run: 1, version: 2, anew, last, rows: rows.into(), fault: String::new() };
        if !matches!(scene.mirror.hear(&chunk), Ok(true)) {
            prop_assert_eq!(scene.mirror.directory().all(), had);
        }
    }
}

/// A history of so many states, each with another workload.
fn history(states: u8) -> (History, Directory) {
    let (mut history, mut directory) = (History::new(7), Directory::default());
    for name in 0..states {
        directory.insert_workload(workload(name, 0, name + 1, None, 0));
        history.push(Arc::new(directory.clone()));
    }
    (history, directory)
}

#[test]
fn who_is_a_little_behind_is_told_what_differs_and_who_is_far_behind_everything() {
    let (mut history, mut directory) = history(100);
    let mut mirror = Mirror::new(domain());
    for chunk in history.since(&mirror.asks()) {
        mirror.hear(&chunk).unwrap();
    }
    // Back and forth: what is as it was is not told.
    for name in 0..10 {
        directory.insert_workload(workload(200 + name, 1, 200 + name, None, 0));
        history.push(Arc::new(directory.clone()));
    }
    for name in 1..10 {
        let it = directory.workload_at(ip(200 + name)).cloned().unwrap();
        directory.remove_workload(&it);
    }
    history.push(Arc::new(directory.clone()));
    let told = history.since(&mirror.asks());
    assert_eq!(told.len(), 1);
    assert!(!told[0].anew && told[0].rows.len() < 120, "one workload, not eleven states: {told:?}");
    mirror.hear(&told[0]).unwrap();
    assert_eq!(mirror.directory().all(), directory.all());
    let far = mirror.asks();
    for _ in 0..64 {
        history.push(Arc::new(directory.clone()));
    }
    let told = history.since(&far);
    assert!(told[0].anew && told.last().unwrap().last);
    // The authority that comes after it knows nothing of its states.
    let (mut other, _) = self::history(3);
    let told = other.since(&proto::WatchRequest { run: 6, version: 2 });
    assert!(told[0].anew);
}

#[test]
fn everything_is_made_once_for_all_who_need_it_while_it_is_remembered() {
    let (mut history, mut directory) = history(100);
    let nobody = proto::WatchRequest::default();
    let first = history.since(&nobody);
    directory.insert_workload(workload(201, 1, 201, None, 0));
    history.push(Arc::new(directory.clone()));
    let second = history.since(&nobody);
    assert_eq!(first[0].rows.as_ptr(), second[0].rows.as_ptr(), "the same bytes");
    let mut mirror = Mirror::new(domain());
    for chunk in &second {
        mirror.hear(chunk).unwrap();
    }
    assert_eq!(mirror.directory().all(), directory.all(), "and what came after");
}

#[test]
fn chunks_that_do_not_follow_are_refused_and_the_last_whole_state_stays() {
    let (mut history, directory) = history(2);
    let mut mirror = Mirror::new(domain());
    for chunk in history.since(&mirror.asks()) {
        mirror.hear(&chunk).unwrap();
    }
    let chunk = |run, version| Chunk { run, version, last: true, ..Chunk::default() };
    assert!(matches!(mirror.hear(&chunk(8, 3)), Err(WireError::Order)), "another run's");
    assert!(matches!(mirror.hear(&chunk(7, 1)), Err(WireError::Order)), "an earlier state");
    // Half of a state, then the connection breaks.
    let half = Chunk { anew: true, last: false, ..chunk(9, 1) };
    assert!(!mirror.hear(&half).unwrap());
    assert_eq!(mirror.directory().all(), directory.all());
    assert_eq!(mirror.asks(), history.newest());
}

#[test]
fn a_node_is_itself_the_one_who_knows_its_own_pods() {
    let (_, cluster) = history(3);
    let mut own = Directory::default();
    // One is as it was, one is gone, one has another's address and is to be found by its namespace.
    let seen = Workload { netns: Some(NetnsAt::PodUid("u".into())), ..(*workload(0, 0, 1, None, 0)).clone() };
    own.insert_workload(seen.into());
    own.insert_workload(workload(9, 0, 2, None, 0));
    let merged = cluster.with_own("n0", &own);
    let mut names: Vec<&str> = merged.on_node("n0").map(|it| it.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["w0", "w9"]);
    assert!(merged.workload_at(ip(1)).unwrap().netns.is_some());
    assert_eq!(merged.workload_at(ip(2)).unwrap().name, "w9");
    assert!(merged.workload_at(ip(3)).is_none());
    let elsewhere = cluster.with_own("n1", &Directory::default());
    assert_eq!(elsewhere.all(), cluster.all());
}

#[test]
fn rows_that_cannot_be_are_refused_with_their_name() {
    let refused = |rows: proto::Rows| {
        let rows = prost::Message::encode_to_vec(&rows).into();
        let chunk = Chunk { run: 1, version: 1, anew: true, last: true, rows, fault: String::new() };
        Mirror::new(domain()).hear(&chunk).unwrap_err().to_string()
    };
    let good = || proto::Workload {
        namespace: "shop".into(),
        name: "web".into(),
        spiffe_id: "spiffe://td.test/ns/shop/sa/web".into(),
        node: "n1".into(),
        addresses: vec![vec![10, 1, 0, 1]],
        ..Default::default()
    };
    let of = |row: proto::Workload| refused(proto::Rows { workloads: vec![row], ..Default::default() });
    for (row, field) in [
        (proto::Workload { spiffe_id: "spiffe://other/ns/shop/sa/web".into(), ..good() }, "spiffe_id"),
        (proto::Workload { spiffe_id: "spiffe://td.test/node/n1".into(), ..good() }, "spiffe_id"),
        (proto::Workload { addresses: vec![vec![1, 2, 3]], ..good() }, "address"),
        (proto::Workload { addresses: vec![vec![127, 0, 0, 1]], ..good() }, "address"),
        (proto::Workload { addresses: vec![vec![10, 1, 0, 1]; 17], ..good() }, "addresses"),
        (proto::Workload { mode: 3, ..good() }, "mode"),
        (proto::Workload { node: String::new(), ..good() }, "node"),
    ] {
        let error = of(row);
        assert!(error.starts_with(&format!("{field} of workload shop/web: ")), "{error}");
    }
    let lonely = proto::Service {
        namespace: "shop".into(),
        name: "web".into(),
        endpoints: vec![proto::Endpoint { address: vec![10, 1, 0, 1], ..Default::default() }],
        ..Default::default()
    };
    let error = refused(proto::Rows { services: vec![lonely], ..Default::default() });
    assert_eq!(error, "endpoints of service shop/web: there is no workload at 10.1.0.1");
}
