//! What `hauberk capacity` predicts of node scope, against what really happens at small scale: real pools,
//! real handshakes and real proofs over loopback, counted. The errors allowed are stated beside each
//! comparison.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod far;
mod measured;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use far::{Agent, Far, authority, exchange, node, svid, workload};
use hauberk::ca::Ca;
use hauberk::capacity::calibrate::{calibrate, thread_cpu};
use hauberk::capacity::flow::Way;
use hauberk::capacity::model::Prediction;
use hauberk::capacity::scenario::Ratios;
use hauberk::config::TunnelConfig;
use hauberk::pool::{Key, Pool, Route, Seat};
use measured::{carried, prediction, tap, within, within_twice};
use tokio::sync::broadcast;

const NODES: usize = 2;
const SERVICES: usize = 4;
const THREADS: usize = 2;
/// Longer than any test runs, by the time that it counts.
const EVER: Duration = Duration::from_secs(1_000_000_000);

/// How a cluster is used.
#[derive(Clone, Copy)]
struct Use {
    /// Connections a second.
    rate: f64,
    idle: Duration,
    lifetime: Duration,
}

/// A node: who dials there, and who accepts.
struct Member {
    agent: Agent,
    /// Those of its threads.
    pools: Vec<Pool>,
    far: Far,
    /// Where it is reached.
    address: SocketAddr,
    /// Tells the bytes of each connection when it ends, if they are counted.
    bytes: Option<Receiver<u64>>,
}

/// Nodes that each have a pod of every service, all of which talk to all, in a time that only counts
/// connections: waiting costs nothing. A node that talks to itself is counted too, as in the model.
struct Cluster {
    ca: Ca,
    members: Vec<Member>,
    used: Use,
    began: Instant,
    passed: Duration,
    /// When the nodes' SVIDs are rotated next, and when their workloads' are.
    due: [Duration; 2],
    random: fastrand::Rng,
}

impl Member {
    async fn new(ca: &Ca, number: usize, resume: bool, tapped: bool) -> Self {
        let ids = (0..SERVICES).map(|n| workload("s", n)).chain([name(number)]);
        let agent = Agent::new(ca, ids, resume);
        let words = broadcast::Sender::new(1);
        let pool = |seat| agent.seated(TunnelConfig::default(), &words, seat);
        let pools = Seat::row().take(THREADS).map(pool).collect();
        let far = Far::new(agent.clone(), "s");
        let mut address = far.serve(name(number)).await;
        let bytes = tapped.then(|| {
            let bytes;
            (address, bytes) = tap(address);
            bytes
        });
        Self { agent, pools, far, address, bytes }
    }
}

fn name(number: usize) -> hauberk::identity::SpiffeId {
    node(&format!("n{number}"))
}

impl Cluster {
    async fn new(used: Use, resume: bool, tapped: bool) -> Self {
        let ca = authority();
        let mut members = Vec::new();
        for number in 0..NODES {
            members.push(Member::new(&ca, number, resume, tapped).await);
        }
        // Not in step: half a period apart.
        let due = [used.lifetime / 2, used.lifetime / 4];
        let (began, random) = (Instant::now(), fastrand::Rng::with_seed(7));
        Self { ca, members, used, began, passed: Duration::ZERO, due, random }
    }

    /// The same cluster in the model's terms.
    fn predicted(&self, way: Way) -> Prediction {
        let ratios = Ratios {
            pods: Some((SERVICES * NODES) as u64),
            nodes: Some(NODES as u64),
            threads: Some(THREADS as u64),
            fan_out: SERVICES as u64,
            connections_per_second: self.used.rate / SERVICES as f64,
            bytes_per_second: 0.0,
            connection_seconds: 0.0,
            idle_timeout_seconds: self.used.idle.as_secs_f64(),
            certificate_lifetime_seconds: self.used.lifetime.as_secs_f64(),
            ..Ratios::default()
        };
        prediction(&ratios.scenario(SERVICES as u64, 1).unwrap(), way)
    }

    fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.members.iter().flat_map(|member| &member.pools)
    }

    fn sweep(&self) {
        self.pools().for_each(|pool| pool.sweep(self.began + self.passed, self.used.idle));
    }

    /// Uses the cluster for so long.
    async fn run(&mut self, time: Duration) {
        let until = self.passed + time;
        while self.passed < until {
            // Connections come at random.
            let gap = -(1.0 - self.random.f64()).ln() / self.used.rate;
            self.pass(Duration::from_secs_f64(gap)).await;
            self.connection().await;
        }
    }

    /// Lets time pass, and with it what happens by itself.
    async fn pass(&mut self, time: Duration) {
        let until = self.passed + time;
        while let Some(next) = self.due.iter().copied().min().filter(|due| *due <= until) {
            self.passed = next;
            self.sweep();
            for (due, nodes) in [(0, true), (1, false)] {
                if self.due[due] == next {
                    self.due[due] += self.used.lifetime / 2;
                    self.rotate(nodes);
                }
            }
            self.quiet().await;
            self.sweep();
        }
        self.passed = until;
        self.sweep();
    }

    /// New SVIDs for all nodes, or for all workloads.
    fn rotate(&self, nodes: bool) {
        for (number, member) in self.members.iter().enumerate() {
            if nodes {
                member.agent.trust.insert(svid(&self.ca, &name(number)));
            } else {
                (0..SERVICES).for_each(|n| member.agent.trust.insert(svid(&self.ca, &workload("s", n))));
            }
            member.pools.iter().for_each(|pool| pool.refresh(Duration::ZERO));
        }
    }

    /// One connection between two services, any two on any two nodes alike, and its end.
    async fn connection(&mut self) {
        let [from, to] = [0, 1].map(|_| self.random.usize(..NODES));
        let [source, number] = [0, 1].map(|_| self.random.usize(..SERVICES));
        let pools = &self.members[from].pools;
        let accepted = self.random.usize(..THREADS);
        let (address, destination) = (self.members[to].address, workload("s", number));
        let between = Key { source: name(from), destination: name(to), address };
        let workload = Key { source: workload("s", source), destination, address };
        let route = Route { workload, node: Some(between.clone()) };
        let thread = pools[accepted].home(&between, self.began + self.passed).unwrap_or(accepted);
        exchange(&pools[thread], &route, number, self.began).await;
        // The pool sees now that the connection is idle.
        self.sweep();
    }

    /// Waits until nobody dials.
    async fn quiet(&self) {
        let (mut last, mut same) = (self.begun(), 0);
        while same < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let begun = self.begun();
            same = if begun == last && begun == self.handshakes() { same + 1 } else { 0 };
            last = begun;
        }
    }

    fn begun(&self) -> usize {
        self.members.iter().map(|member| member.far.begun.load(Ordering::Relaxed)).sum()
    }

    fn handshakes(&self) -> usize {
        self.members.iter().map(|member| member.far.seen.lock().unwrap().handshakes).sum()
    }

    fn full(&self) -> usize {
        self.handshakes() - self.members.iter().map(|m| m.far.seen.lock().unwrap().resumed).sum::<usize>()
    }

    /// Signatures of workloads, on both sides.
    fn proofs(&self) -> usize {
        let of = |member: &Member| {
            let seen = member.far.seen.lock().unwrap();
            seen.theirs.len() + seen.ours.len()
        };
        self.members.iter().map(of).sum()
    }

    /// Closes every connection; bytes that went over all there were.
    async fn close(&mut self) -> f64 {
        self.members.iter_mut().for_each(|member| member.pools.clear());
        // What drives the connections runs on this thread.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let all = self.members.iter().filter_map(|member| Some((member.bytes.as_ref()?, &member.far.begun)));
        all.map(|(bytes, begun)| carried(bytes, begun.load(Ordering::Relaxed))).sum()
    }
}

/// Holds a way's counts against the model's for the time that has passed since `since`.
fn compare(cluster: &Cluster, way: Way, since: [usize; 3], time: Duration, error: f64) {
    let (predicted, seconds) = (cluster.predicted(way), time.as_secs_f64());
    let now = counts(cluster);
    let counted = [0, 1, 2].map(|i| (now[i] - since[i]) as f64);
    within("handshakes", counted[0], predicted.handshakes.value * seconds, error);
    within("full handshakes", counted[1], predicted.full_handshakes.value * seconds, error);
    within("proofs", counted[2], predicted.proofs.value * seconds, error);
}

fn counts(cluster: &Cluster) -> [usize; 3] {
    [cluster.handshakes(), cluster.full(), cluster.proofs()]
}

#[tokio::test]
async fn warm_pools_have_the_connections_that_are_predicted_and_rotation_renews_them() {
    let lifetime = Duration::from_secs(60);
    let mut cluster = Cluster::new(Use { rate: 24.0, idle: EVER, lifetime }, true, false).await;
    cluster.run(Duration::from_secs(29)).await;
    let predicted = cluster.predicted(Way::NodeScopeResumed);
    // Exact: one for each two nodes and thread.
    within("connections", cluster.handshakes() as f64, predicted.connections.value.round(), 0.0);
    let (since, time) = (counts(&cluster), 3 * lifetime);
    cluster.run(time).await;
    // 15 %: the model lets rotations come at random, here they come in step.
    compare(&cluster, Way::NodeScopeResumed, since, time, 0.15);
}

#[tokio::test]
async fn pools_that_go_idle_dial_and_prove_as_often_as_predicted() {
    // Each two nodes and threads have a connection a second on average, and are closed after one.
    let used = Use { rate: 8.0, idle: Duration::from_secs(1), lifetime: EVER };
    let mut cluster = Cluster::new(used, false, false).await;
    cluster.run(Duration::from_secs(10)).await;
    let (since, time) = (counts(&cluster), Duration::from_secs(200));
    cluster.run(time).await;
    // 15 %: half of it is the model's, which has all threads cold at once, half is chance.
    compare(&cluster, Way::NodeScope, since, time, 0.15);
}

#[tokio::test]
async fn idle_and_rotation_together_leave_the_full_handshakes_and_the_bytes_that_are_predicted() {
    let (idle, lifetime) = (Duration::from_secs(1), Duration::from_secs(60));
    let mut cluster = Cluster::new(Use { rate: 8.0, idle, lifetime }, true, true).await;
    let time = 4 * lifetime;
    cluster.run(time).await;
    // 15 %, for the same reasons.
    compare(&cluster, Way::NodeScopeResumed, [0; 3], time, 0.15);
    let predicted = cluster.predicted(Way::NodeScopeResumed).overhead.value * time.as_secs_f64();
    let carried = cluster.close().await;
    // 15 %, as it is a sum of what is above.
    within("bytes on the wire", carried, predicted, 0.15);
}

/// CPU time of this thread, on which both ends are, for `count` identities on each of two nodes that meet
/// for the first time; less what as many streams cost that meet again.
async fn meeting(count: usize) -> f64 {
    let ca = authority();
    let ids = |own: &str| (0..count).map(|n| workload("s", n)).chain([node(own)]).collect::<Vec<_>>();
    let agent = Agent::new(&ca, ids("n0").into_iter(), false);
    let far = Far::new(Agent::new(&ca, ids("n1").into_iter(), false), "s");
    let address = far.serve(node("n1")).await;
    let pool = agent.pool(&broadcast::Sender::new(1));
    let mut spent = [0.0; 2];
    for spent in &mut spent {
        let before = thread_cpu().unwrap();
        for number in 0..count {
            let node = Some(Key { source: node("n0"), destination: node("n1"), address });
            let (source, destination) = (workload("s", number), workload("s", number));
            let workload = Key { source, destination, address };
            exchange(&pool, &Route { workload, node }, number, Instant::now()).await;
        }
        *spent = (thread_cpu().unwrap() - before).as_secs_f64();
    }
    spent[0] - spent[1]
}

#[tokio::test]
async fn meeting_for_the_first_time_costs_the_cpu_that_is_predicted() {
    const EACH: usize = 200;
    // Half before and half after, so that a slow minute of the machine meets both.
    let first = meeting(EACH).await;
    let found = calibrate(Duration::from_secs(1), &mut |_| ()).unwrap();
    let second = meeting(EACH).await;
    let proofs = 2.0 * EACH as f64 * (found.prove_cpu_seconds + found.verify_cpu_seconds);
    let predicted = proofs + found.full.cpu_seconds();
    within_twice("ms of CPU for a handshake and 400 proofs", 1e3 * (first + second) / 2.0, 1e3 * predicted);
}
