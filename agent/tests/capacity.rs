//! What `hauberk capacity` predicts, against what really happens at small scale: real pools and real
//! handshakes over loopback, counted. The errors allowed are stated beside each comparison.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::capacity::calibrate::{calibrate, thread_cpu};
use hauberk::capacity::calibration::Calibration;
use hauberk::capacity::flow::Way;
use hauberk::capacity::model::{Prediction, predict};
use hauberk::capacity::scenario::{Ratios, Scenario};
use hauberk::config::TunnelConfig;
use hauberk::hbone::client::Ask;
use hauberk::hbone::server;
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::pool::dial::Dialer;
use hauberk::pool::{Key, Pool, Route};
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls;
use hauberk::tls::memory::Memory;
use hauberk::trust::Trust;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};

const HOUR: Duration = Duration::from_secs(3600);

fn authority() -> Ca {
    let domain = TrustDomain::parse("td.test").unwrap();
    Ca::from_pem(domain.clone(), &create_root(&domain, SystemTime::now()).unwrap()).unwrap()
}

fn id(ca: &Ca, name: &str) -> SpiffeId {
    SpiffeId::workload(ca.domain(), "test", name).unwrap()
}

fn svid(ca: &Ca, id: &SpiffeId) -> X509Svid {
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    key.with_chain(ca.issue(&proven, id, HOUR, SystemTime::now()).unwrap()).unwrap()
}

/// A service with one pod that accepts every stream and holds none; counts its handshakes.
async fn service(ca: &Ca, who: &SpiffeId, handshakes: &Arc<AtomicUsize>) -> SocketAddr {
    let config = tls::server::config(&svid(ca, who), ca.bundle()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let handshakes = Arc::clone(handshakes);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (config, handshakes) = (Arc::clone(&config), Arc::clone(&handshakes));
            tokio::spawn(async move {
                let Ok(established) = tls::handshake::accept(config, tcp).await else { return };
                handshakes.fetch_add(1, Ordering::Relaxed);
                let mut connection = server::start(established.stream, 1 << 16, 1000).await.unwrap();
                while let Some(Ok((_request, respond))) = connection.accept().await {
                    // Whoever asked may have let go already.
                    let _ = server::accept(respond);
                }
            });
        }
    });
    address
}

/// Services on one node that all talk to all, through one pool, in a time that only counts
/// connections: waiting costs nothing.
struct Cluster {
    ca: Ca,
    pool: Pool,
    trust: Arc<Trust>,
    keys: Vec<Key>,
    handshakes: Arc<AtomicUsize>,
    began: Instant,
    passed: Duration,
    random: fastrand::Rng,
}

impl Cluster {
    async fn new(services: usize) -> Self {
        let ca = authority();
        let trust = Trust::new(ca.bundle().clone());
        let handshakes = Arc::new(AtomicUsize::new(0));
        let ids: Vec<SpiffeId> = (0..services).map(|n| id(&ca, &format!("s{n}"))).collect();
        let mut keys = Vec::new();
        for destination in &ids {
            let address = service(&ca, destination, &handshakes).await;
            trust.insert(svid(&ca, destination));
            for source in &ids {
                keys.push(Key { source: source.clone(), destination: destination.clone(), address });
            }
        }
        let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
        // Without sessions: full handshakes are predicted.
        let memory = Memory::new(None, observe.clone());
        let dialer = Dialer::new(Arc::clone(&trust), memory, Arc::new(TunnelConfig::default()), observe);
        let pool = Pool::new(dialer, 1000, tokio::sync::broadcast::Sender::new(1));
        let (began, random) = (Instant::now(), fastrand::Rng::with_seed(7));
        Self { ca, pool, trust, keys, handshakes, began, passed: Duration::ZERO, random }
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
        self.handshakes.load(Ordering::Relaxed) as f64
    }
}

/// The handshakes and connections of a prediction do not depend on the machine.
fn prediction(scenario: &Scenario, way: Way) -> Prediction {
    static CALIBRATION: OnceLock<Calibration> = OnceLock::new();
    let calibration = CALIBRATION.get_or_init(|| calibrate(Duration::ZERO, &mut |_| ()).unwrap());
    predict(scenario, calibration).into_iter().find(|prediction| prediction.way == way).unwrap()
}

fn within(what: &str, counted: f64, predicted: f64, error: f64) {
    println!("{what}: counted {counted}, predicted {predicted:.1}");
    assert!(
        (counted - predicted).abs() <= error * predicted,
        "{what}: counted {counted}, predicted {predicted:.1}, which is off by more than {} %",
        100.0 * error
    );
}

#[tokio::test]
async fn a_warm_pool_makes_one_handshake_for_each_pair_as_predicted() {
    let mut cluster = Cluster::new(3).await;
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
    let mut cluster = Cluster::new(2).await;
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
    let mut cluster = Cluster::new(3).await;
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
    let mut cluster = Cluster::new(3).await;
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
            let ids: Vec<SpiffeId> =
                cluster.keys.iter().step_by(3).map(|key| key.destination.clone()).collect();
            for id in ids {
                cluster.trust.insert(svid(&cluster.ca, &id));
            }
        }
        cluster.connection(idle).await;
    }
    let rate = prediction(&scenario, Way::WorkloadScope).handshakes.value;
    // 10 %: the model lets rotations come at random, here they come in step.
    within("handshakes", cluster.counted(), rate * cluster.passed.as_secs_f64(), 0.10);
}

/// Full handshakes over real sockets, one after the other on this thread: the CPU time of each, and the
/// bytes of all on the wire, counted by a relay that lives on threads of its own.
async fn handshakes(count: usize) -> (Vec<Duration>, u64) {
    let ca = authority();
    let (one, other) = (id(&ca, "one"), id(&ca, "other"));
    let client = tls::client::config(&svid(&ca, &one), ca.bundle(), other.clone()).unwrap();
    let server = tls::server::config(&svid(&ca, &other), ca.bundle()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, bytes) = tap(listener.local_addr().unwrap());
    let mut cpu = Vec::with_capacity(count);
    for _ in 0..count {
        let before = thread_cpu().unwrap();
        let name = ServerName::IpAddress(address.ip().into());
        let (near, far) = tokio::join!(
            async {
                let tcp = TcpStream::connect(address).await.unwrap();
                tls::handshake::connect(Arc::clone(&client), name, tcp).await.unwrap()
            },
            async {
                let (tcp, _) = listener.accept().await.unwrap();
                tls::handshake::accept(Arc::clone(&server), tcp).await.unwrap()
            }
        );
        cpu.push(thread_cpu().unwrap() - before);
        // No close_notify: it is no part of a handshake.
        drop((near, far));
    }
    let mut wire = 0;
    for _ in 0..count {
        wire += bytes.recv_timeout(Duration::from_secs(10)).expect("each connection ends and is counted");
    }
    (cpu, wire)
}

/// Relays connections to `to`, and tells of each how many bytes it carried, both ways together.
fn tap(to: SocketAddr) -> (SocketAddr, std::sync::mpsc::Receiver<u64>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), std::net::TcpStream::connect(to).unwrap());
            let pipes = [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)];
            let tell = tell.clone();
            std::thread::spawn(move || {
                let ways = pipes.map(|(mut from, mut into)| {
                    std::thread::spawn(move || {
                        let copied = std::io::copy(&mut from, &mut into).unwrap();
                        let _ = into.shutdown(std::net::Shutdown::Write);
                        copied
                    })
                });
                let carried = ways.map(|way| way.join().unwrap());
                let _ = tell.send(carried[0] + carried[1]);
            });
        }
    });
    (address, told)
}

#[tokio::test]
async fn handshakes_over_sockets_cost_the_cpu_and_the_bytes_that_are_predicted() {
    let count = 200;
    // Half before and half after, so that a slow minute of the machine meets both.
    let first = handshakes(count / 2).await;
    let found = calibrate(Duration::from_secs(1), &mut |_| ()).unwrap();
    let second = handshakes(count / 2).await;
    // The median, as in the calibration: an interrupt is charged to whom it interrupts.
    let mut each = [first.0, second.0].concat();
    each.sort();
    let cpu = 1e6 * each[each.len() / 2].as_secs_f64();
    let predicted = 1e6 * found.full.cpu_seconds();
    println!("CPU time of a handshake: {cpu:.0} us, predicted {predicted:.0} us");
    // A factor of two: sockets and tasks come on top of what is predicted, and machines are noisy.
    assert!(
        cpu > predicted / 2.0 && cpu < predicted * 2.0,
        "a handshake took {cpu:.0} us of CPU time, predicted {predicted:.0} us"
    );
    let wire = (first.1 + second.1) as f64;
    within("bytes on the wire", wire, count as f64 * found.full.wire_bytes, 0.10);
}
