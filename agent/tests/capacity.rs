//! What `hauberk capacity` predicts, against what really happens at small scale: real pools and real
//! handshakes over loopback, counted. The errors allowed are stated beside each comparison.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod far;
mod measured;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use far::{Agent, Far, authority, svid, workload};
use hauberk::ca::Ca;
use hauberk::capacity::calibrate::{calibrate, thread_cpu};
use hauberk::capacity::flow::Way;
use hauberk::capacity::scenario::{Ratios, Scenario};
use hauberk::hbone::client::Ask;
use hauberk::identity::SpiffeId;
use hauberk::pool::{Key, Pool, Route};
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls;
use hauberk::tls::client::Dial;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::{Listener, Terms};
use hauberk::tls::verify::Expected;
use measured::{carried, is_within_twice, prediction, tap, within, within_twice};
use rustls::HandshakeKind;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const HOUR: Duration = Duration::from_secs(3600);

/// Services on one node that all talk to all, through one pool, in a time that only counts
/// connections: waiting costs nothing.
struct Cluster {
    ca: Ca,
    agent: Agent,
    pool: Pool,
    far: Far,
    keys: Vec<Key>,
    began: Instant,
    passed: Duration,
    random: fastrand::Rng,
}

impl Cluster {
    async fn new(services: usize, resume: bool) -> Self {
        let ca = authority();
        let ids: Vec<SpiffeId> = (0..services).map(|n| workload("s", n)).collect();
        let [agent, accepting] = [0, 1].map(|_| Agent::new(&ca, ids.iter().cloned(), resume));
        let far = Far::new(accepting, "s");
        let mut keys = Vec::new();
        for destination in &ids {
            let address = far.serve(destination.clone()).await;
            for source in &ids {
                keys.push(Key { source: source.clone(), destination: destination.clone(), address });
            }
        }
        let pool = agent.pool(&tokio::sync::broadcast::Sender::new(1));
        let (began, random) = (Instant::now(), fastrand::Rng::with_seed(7));
        Self { ca, agent, pool, far, keys, began, passed: Duration::ZERO, random }
    }

    /// The same cluster in the model's terms.
    fn scenario(&self, services: u64, rate: f64, idle: Duration, lifetime: Duration) -> Scenario {
        let ratios = Ratios {
            pods: Some(services),
            nodes: Some(1),
            threads: Some(1),
            fan_out: services,
            connections_per_second: rate,
            connection_seconds: 0.0,
            idle_timeout_seconds: idle.as_secs_f64(),
            certificate_lifetime_seconds: lifetime.as_secs_f64(),
            ..Ratios::default()
        };
        let scenario = ratios.scenario(services, 1).unwrap();
        assert_eq!(prediction(&scenario, Way::WorkloadScope).keys.value, self.keys.len() as f64);
        scenario
    }

    /// Lets time pass, and the pool with it.
    fn pass(&mut self, time: Duration, idle: Duration) {
        self.passed += time;
        self.pool.sweep(self.began + self.passed, idle);
    }

    /// One connection between two services, any two alike, and its end.
    async fn connection(&mut self, idle: Duration) {
        let key = self.random.choice(&self.keys).unwrap();
        let ask = Ask { authority: key.address, source: key.address };
        let route = Route { workload: key.clone(), node: None };
        drop(self.pool.open(&route, ask, self.began).await.unwrap());
        // The pool sees now that the connection is idle.
        self.pass(Duration::ZERO, idle);
    }

    /// Until the next connection of the whole cluster comes: they come at random.
    fn gap(&mut self, rate: f64) -> Duration {
        Duration::from_secs_f64(-(1.0 - self.random.f64()).ln() / rate)
    }

    fn counted(&self) -> f64 {
        self.far.seen.lock().unwrap().handshakes as f64
    }

    /// Of these.
    fn full(&self) -> f64 {
        self.counted() - self.far.seen.lock().unwrap().resumed as f64
    }

    /// A new SVID for everyone.
    fn rotate(&self) {
        for destination in self.keys.iter().map(|key| &key.destination).collect::<HashSet<_>>() {
            self.agent.trust.insert(svid(&self.ca, destination));
        }
    }
}

#[tokio::test]
async fn a_warm_pool_makes_one_handshake_for_each_pair_as_predicted() {
    let mut cluster = Cluster::new(3, false).await;
    let idle = Duration::from_secs(300);
    let scenario = cluster.scenario(3, 10.0, idle, 1000 * HOUR);
    for _ in 0..300 {
        let gap = cluster.gap(30.0);
        cluster.pass(gap, idle);
        cluster.connection(idle).await;
    }
    let pooled = prediction(&scenario, Way::WorkloadScope);
    // Exact: 9 pairs, and no further handshake in these ten seconds.
    within("connections of the pool", cluster.counted(), pooled.connections.value.round(), 0.0);
    let more = pooled.handshakes.value * cluster.passed.as_secs_f64();
    assert!(more < 0.5, "predicted {more} more handshakes");
}

#[tokio::test]
async fn without_pooling_each_connection_makes_a_handshake_as_predicted() {
    let mut cluster = Cluster::new(2, false).await;
    let scenario = cluster.scenario(2, 10.0, HOUR, HOUR);
    for _ in 0..100 {
        cluster.connection(Duration::ZERO).await;
    }
    // Exact: what came in five seconds at twenty a second.
    let predicted = prediction(&scenario, Way::Unpooled).handshakes.value * 5.0;
    within("handshakes", cluster.counted(), predicted, 0.0);
}

#[tokio::test]
async fn a_pool_that_goes_idle_dials_as_often_as_predicted() {
    let mut cluster = Cluster::new(3, false).await;
    // Each of the nine pairs has a connection a second on average, and is closed after one.
    let (rate, idle) = (9.0, Duration::from_secs(1));
    let scenario = cluster.scenario(3, rate / 3.0, idle, 1000 * HOUR);
    for _ in 0..900 {
        let gap = cluster.gap(rate);
        cluster.pass(gap, idle);
        cluster.connection(idle).await;
    }
    let rate = prediction(&scenario, Way::WorkloadScope).handshakes.value;
    // 15 %: three standard deviations of 900 random connections, a third of which dial.
    within("handshakes", cluster.counted(), rate * cluster.passed.as_secs_f64(), 0.15);
}

#[tokio::test]
async fn rotation_makes_a_pool_dial_as_often_as_predicted() {
    let mut cluster = Cluster::new(3, false).await;
    let idle = Duration::from_secs(10_000);
    // Each pair has a connection a second, and its source a new SVID every thirty.
    let (rate, lifetime) = (9.0, Duration::from_secs(60));
    let scenario = cluster.scenario(3, rate / 3.0, idle, lifetime);
    let mut rotation = lifetime / 2;
    while cluster.passed < 5 * lifetime {
        let gap = cluster.gap(rate);
        cluster.pass(gap, idle);
        if cluster.passed > rotation {
            rotation += lifetime / 2;
            cluster.rotate();
        }
        cluster.connection(idle).await;
    }
    let rate = prediction(&scenario, Way::WorkloadScope).handshakes.value;
    // 10 %: the model lets rotations come at random, here they come in step.
    within("handshakes", cluster.counted(), rate * cluster.passed.as_secs_f64(), 0.10);
}

#[tokio::test]
async fn sessions_are_resumed_until_rotation_as_predicted() {
    let mut cluster = Cluster::new(3, true).await;
    // Each pair has a connection a second and no pool, and its source a new SVID every thirty.
    let (rate, lifetime) = (9.0, Duration::from_secs(60));
    let scenario = cluster.scenario(3, rate / 3.0, HOUR, lifetime);
    let mut rotation = lifetime / 2;
    while cluster.passed < 3 * lifetime {
        let gap = cluster.gap(rate);
        cluster.pass(gap, Duration::ZERO);
        if cluster.passed > rotation {
            rotation += lifetime / 2;
            cluster.rotate();
        }
        cluster.connection(Duration::ZERO).await;
    }
    let resumed = prediction(&scenario, Way::Resumed);
    let seconds = cluster.passed.as_secs_f64();
    // 10 %: how many come in three minutes is left to chance.
    within("handshakes", cluster.counted(), resumed.handshakes.value * seconds, 0.10);
    // 10 %: the model lets rotations come at random, here they come in step.
    within("full handshakes", cluster.full(), resumed.full_handshakes.value * seconds, 0.10);
}

/// Handshakes over real sockets, one after the other on this thread: the CPU time of each, and the bytes
/// of all on the wire, counted by a relay that lives on threads of its own.
struct Handshakes {
    dial: Arc<Dial>,
    listener: Arc<Listener>,
    kind: HandshakeKind,
}

impl Handshakes {
    fn new(kind: HandshakeKind) -> Self {
        let ca = authority();
        let [one, other] = [0, 1].map(|number| svid(&ca, &workload("s", number)));
        let keys = (kind == HandshakeKind::Resumed).then(tls::ticket::fleeting);
        let memory = Memory::new(keys, Observe::new(Arc::new(Metrics::new().unwrap())));
        let roots = memory.roots(ca.bundle(), 1).unwrap();
        let terms = Terms {
            svid: &other,
            roots: &roots,
            peers: Expected::Member,
            judge: None,
            alpn: &[tls::ALPN_H2],
            place: &[b"test"],
            mode: "strict",
        };
        let listener = memory.listener(&terms).unwrap();
        let peer = Expected::Exactly(other.id().clone());
        Self { dial: memory.dial(&one, &roots, peer, &[tls::ALPN_H2], None).unwrap(), listener, kind }
    }

    /// One, after which the server says a byte: the tickets come before it.
    async fn connect(&self, to: SocketAddr, socket: &TcpListener) -> (HandshakeKind, Duration) {
        let before = thread_cpu().unwrap();
        let name = ServerName::IpAddress(to.ip().into());
        let (near, far) = tokio::join!(
            async {
                let tcp = TcpStream::connect(to).await.unwrap();
                tcp.set_nodelay(true).unwrap();
                let config = Arc::clone(self.dial.config());
                let mut made = tls::handshake::connect(config, name, tcp).await.unwrap();
                self.dial.settle(Some(made.session.kind), made.session.peer_chain()).unwrap();
                assert_eq!(made.stream.read_u8().await.unwrap(), b'!');
                made
            },
            async {
                let (tcp, _) = socket.accept().await.unwrap();
                tcp.set_nodelay(true).unwrap();
                let (config, judged) = self.listener.accept();
                let mut made = tls::handshake::accept(config, tcp).await.unwrap();
                judged.settle(Some(made.session.kind), made.session.peer_chain()).unwrap();
                made.stream.write_all(b"!").await.unwrap();
                made.stream.flush().await.unwrap();
                made
            }
        );
        let took = thread_cpu().unwrap() - before;
        // No close_notify: it is no part of a handshake.
        drop(far);
        (near.session.kind, took)
    }

    async fn make(&self, count: usize) -> (Vec<Duration>, f64) {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // Nothing is remembered yet.
        self.connect(socket.local_addr().unwrap(), &socket).await;
        let (address, bytes) = tap(socket.local_addr().unwrap());
        let mut cpu = Vec::with_capacity(count);
        for _ in 0..count {
            let (kind, took) = self.connect(address, &socket).await;
            assert_eq!(kind, self.kind);
            cpu.push(took);
        }
        (cpu, carried(&bytes, count))
    }
}

/// CPU time of a connection without TLS: what comes on top of what is predicted.
async fn plain() -> Duration {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut each = Vec::new();
    for _ in 0..100 {
        let before = thread_cpu().unwrap();
        let near = TcpStream::connect(socket.local_addr().unwrap()).await.unwrap();
        let (far, _) = socket.accept().await.unwrap();
        let (mut near, mut far) = (near, far);
        // As many flights as a handshake has, and the byte.
        for _ in 0..2 {
            near.write_all(b"!").await.unwrap();
            far.read_u8().await.unwrap();
            far.write_all(b"!").await.unwrap();
            near.read_u8().await.unwrap();
        }
        each.push(thread_cpu().unwrap() - before);
    }
    median(each)
}

fn median(mut each: Vec<Duration>) -> Duration {
    each.sort();
    each[each.len() / 2]
}

#[tokio::test]
async fn handshakes_over_sockets_cost_the_cpu_and_the_bytes_that_are_predicted() {
    // A busy machine spoils what CPU time says of a handshake: it has three chances.
    for last in [false, false, true] {
        let measured = measure_handshakes(200).await;
        let good = |h: &Measured| is_within_twice(h.cpu_us, h.predicted.0);
        if !last && !measured.iter().all(good) {
            continue;
        }
        for Measured { kind, cpu_us, wire, predicted } in measured {
            within_twice(&format!("us of CPU for a {kind} handshake"), cpu_us, predicted.0);
            within(&format!("bytes of a {kind} handshake on the wire"), wire, predicted.1, 0.10);
        }
        return;
    }
}

/// What handshakes of a kind took.
struct Measured {
    kind: &'static str,
    cpu_us: f64,
    wire: f64,
    /// The same two.
    predicted: (f64, f64),
}

/// Full and resumed handshakes, and what the calibration makes of them.
async fn measure_handshakes(count: usize) -> Vec<Measured> {
    let both = [HandshakeKind::Full, HandshakeKind::Resumed].map(Handshakes::new);
    // Half before and half after, so that a slow minute of the machine meets both.
    let first = [both[0].make(count / 2).await, both[1].make(count / 2).await];
    let found = calibrate(Duration::from_secs(1), &mut |_| ()).unwrap();
    let second = [both[0].make(count / 2).await, both[1].make(count / 2).await];
    let plain = plain().await;
    let mut measured = Vec::new();
    for (((first, second), predicted), kind) in
        first.into_iter().zip(second).zip([found.full, found.resumed]).zip(["full", "resumed"])
    {
        // The median, as in the calibration: an interrupt is charged to whom it interrupts.
        let cpu_us = 1e6 * median([first.0, second.0].concat()).saturating_sub(plain).as_secs_f64();
        let wire = (first.1 + second.1) / count as f64;
        let predicted = (1e6 * predicted.cpu_seconds(), predicted.wire_bytes);
        measured.push(Measured { kind, cpu_us, wire, predicted });
    }
    measured
}
