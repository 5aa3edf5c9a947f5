//! A rolling restart: peers that had a tunnel to an agent come back to its successor, all at once.
//!
//! One thread accepts, as one thread of an agent does; another is all the peers, each with an SVID of
//! its own. Handshakes go over loopback TCP with the agent's own TLS code. Measured is the accepting
//! thread: until the last peer is back, and the CPU it used for that.
//!
//! `cargo bench -p hauberk --bench resumption -- [--peers N] [--rounds N] [--json]`; `cargo xtask bench` puts
//! what `--json` prints into its report.
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark may stop at the first surprise")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::issue::keep::tickets;
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls;
use hauberk::tls::client::Dial;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::{Listener, Terms};
use hauberk::tls::ticket::TicketKeys;
use hauberk::tls::verify::Expected;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Handshakes under way at once, as `tunnel.maxHandshakes` bounds them.
const AT_ONCE: usize = 128;

/// What the successor has of what its predecessor knew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    /// Resumption is off: every peer makes a full handshake.
    Off,
    /// The keys were lost: every ticket is refused, and a full handshake follows.
    KeysLost,
    /// The keys were taken up; no chain has been verified yet.
    Restarted,
    /// Not a restart but an interruption: keys and verified chains are still there.
    Interrupted,
}

const CASES: [(Case, &str); 4] = [
    (Case::Off, "restart, resumption off"),
    (Case::KeysLost, "restart, keys lost"),
    (Case::Restarted, "restart, keys taken up"),
    (Case::Interrupted, "no restart, chains known"),
];

/// One round's measure.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    wall: f64,
    server_cpu: f64,
    peers_cpu: f64,
    resumed: usize,
}

struct Bench {
    ca: Ca,
    agent: X509Svid,
    peers: Vec<X509Svid>,
    dir: PathBuf,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (mut peers, mut rounds, mut json) = (1000, 5, false);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--peers" => peers = arguments.next().and_then(|n| n.parse().ok()).expect("--peers N"),
            "--rounds" => rounds = arguments.next().and_then(|n| n.parse().ok()).expect("--rounds N"),
            "--json" => json = true,
            // What cargo passes.
            "--bench" | "--test" => {}
            other => panic!("{other}: not --peers N, --rounds N or --json"),
        }
    }
    let bench = Bench::new(peers);
    let mut costs = vec![Vec::new(); CASES.len()];
    for _ in 0..rounds {
        // The cases take turns, so that what else the machine does meets all of them.
        for (costs, (case, _)) in costs.iter_mut().zip(CASES) {
            costs.push(bench.round(case));
        }
    }
    let _ = std::fs::remove_dir_all(&bench.dir);
    let medians: Vec<Cost> = costs.iter().map(|costs| median(costs)).collect();
    if !json {
        return print(peers, rounds, &medians);
    }
    let rows = CASES.iter().zip(&medians).map(|((_, name), cost)| {
        serde_json::json!({
            "case": name, "peers": peers, "rounds": rounds, "resumed": cost.resumed,
            "recover_seconds": cost.wall, "agent_cpu_seconds": cost.server_cpu,
            "peers_cpu_seconds": cost.peers_cpu,
        })
    });
    println!("{}", serde_json::Value::from_iter(rows));
}

fn median(costs: &[Cost]) -> Cost {
    let middle = |of: fn(&Cost) -> f64| {
        let mut all: Vec<f64> = costs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    Cost {
        wall: middle(|c| c.wall),
        server_cpu: middle(|c| c.server_cpu),
        peers_cpu: middle(|c| c.peers_cpu),
        resumed: costs[0].resumed,
    }
}

fn print(peers: usize, rounds: usize, medians: &[Cost]) {
    println!("{peers} peers come back to one thread of an agent; medians of {rounds} rounds\n");
    println!(
        "{:<26} {:>8} {:>11} {:>10} {:>12} {:>12}",
        "", "resumed", "recover ms", "agent ms", "agent µs/hs", "peers µs/hs"
    );
    for ((_, name), cost) in CASES.iter().zip(medians) {
        println!(
            "{name:<26} {:>8} {:>11.0} {:>10.0} {:>12.0} {:>12.0}",
            cost.resumed,
            cost.wall * 1e3,
            cost.server_cpu * 1e3,
            cost.server_cpu * 1e6 / peers as f64,
            cost.peers_cpu * 1e6 / peers as f64
        );
    }
}

impl Bench {
    fn new(peers: usize) -> Self {
        let now = SystemTime::now();
        let domain = TrustDomain::parse("bench.test").unwrap();
        let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now).unwrap()).unwrap();
        let svid = |name: &str| {
            let key = Keypair::generate().unwrap();
            let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
            let id = SpiffeId::node(&domain, name).unwrap();
            key.with_chain(ca.issue(&proven, &id, Duration::from_secs(3600), now).unwrap()).unwrap()
        };
        let agent = svid("agent");
        let peers = (0..peers).map(|n| svid(&format!("peer-{n}"))).collect();
        let dir = Path::new("/dev/shm").join(format!("hauberk-bench-{:x}", fastrand::u64(..)));
        Self { ca, agent, peers, dir }
    }

    fn keys(&self) -> Arc<TicketKeys> {
        tickets::take_up(&self.dir, SystemTime::now())
    }

    fn memory(&self, keys: Option<Arc<TicketKeys>>) -> Arc<Memory> {
        Memory::new(keys, Observe::new(Arc::new(Metrics::new().unwrap())))
    }

    fn listener(&self, memory: &Memory) -> Arc<Listener> {
        let roots = memory.roots(self.ca.bundle(), 1).unwrap();
        let terms = Terms {
            svid: &self.agent,
            roots: &roots,
            peers: Expected::Node,
            judge: None,
            alpn: &[tls::ALPN_H2],
            place: &[b"node"],
            mode: "",
        };
        memory.listener(&terms).unwrap()
    }

    /// Everyone connects to an agent, then to what comes after it, which is measured.
    fn round(&self, case: Case) -> Cost {
        let _ = std::fs::remove_dir_all(&self.dir);
        let on = case != Case::Off;
        let before = self.memory(on.then(|| self.keys()));
        // Peers have agents of their own; one memory for each keeps their sessions apart.
        let dials: Vec<Arc<Dial>> = self
            .peers
            .iter()
            .map(|svid| {
                let memory = self.memory(on.then(tls::ticket::fleeting));
                let roots = memory.roots(self.ca.bundle(), 1).unwrap();
                memory.dial(svid, &roots, Expected::Exactly(self.agent.id().clone()), &[tls::ALPN_H2], None)
            })
            .collect::<Result<_, _>>()
            .unwrap();
        let first = connect_all(&dials, self.listener(&before));
        assert_eq!(first.resumed, 0, "nothing to resume yet");
        let after = match case {
            Case::Off => self.memory(None),
            Case::KeysLost => self.memory(Some(tls::ticket::fleeting())),
            Case::Restarted => self.memory(Some(self.keys())),
            Case::Interrupted => before,
        };
        let cost = connect_all(&dials, self.listener(&after));
        let expected = match case {
            Case::Off | Case::KeysLost => 0,
            Case::Restarted | Case::Interrupted => dials.len(),
        };
        assert_eq!(cost.resumed, expected, "{case:?}");
        cost
    }
}

/// CPU time of the calling thread, in seconds.
fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
    (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Each peer connects once; ends when the last has proven itself.
fn connect_all(dials: &[Arc<Dial>], listener: Arc<Listener>) -> Cost {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap();
    let count = dials.len();
    let server = std::thread::spawn(move || {
        let (began, before) = (Instant::now(), cpu());
        let resumed = runtime().block_on(accept_all(socket, listener, count));
        (began.elapsed(), cpu() - before, resumed)
    });
    let before = cpu();
    runtime().block_on(dial_all(dials, address));
    let peers_cpu = cpu() - before;
    let (wall, server_cpu, resumed) = server.join().unwrap();
    Cost { wall: wall.as_secs_f64(), server_cpu, peers_cpu, resumed }
}

async fn accept_all(socket: std::net::TcpListener, listener: Arc<Listener>, count: usize) -> usize {
    let socket = TcpListener::from_std(socket).unwrap();
    let mut handshakes = JoinSet::new();
    for _ in 0..count {
        let (tcp, _) = socket.accept().await.unwrap();
        let listener = Arc::clone(&listener);
        handshakes.spawn(async move {
            let (config, judged) = listener.accept();
            let mut io = TlsAcceptor::from(config).accept(tcp).await.unwrap();
            let (_, session) = io.get_ref();
            let settled = judged.settle(session.handshake_kind(), session.peer_certificates()).unwrap();
            io.write_all(b"!").await.unwrap();
            io.flush().await.unwrap();
            settled.resumed
        });
    }
    handshakes.join_all().await.into_iter().filter(|resumed| *resumed).count()
}

async fn dial_all(dials: &[Arc<Dial>], address: SocketAddr) {
    let mut under_way = JoinSet::new();
    for dial in dials {
        if under_way.len() >= AT_ONCE {
            under_way.join_next().await.unwrap().unwrap();
        }
        let dial = Arc::clone(dial);
        under_way.spawn(async move {
            let tcp = TcpStream::connect(address).await.unwrap();
            tcp.set_nodelay(true).unwrap();
            let name = ServerName::IpAddress(address.ip().into());
            let mut io = TlsConnector::from(Arc::clone(dial.config())).connect(name, tcp).await.unwrap();
            let (_, session) = io.get_ref();
            dial.settle(session.handshake_kind(), session.peer_certificates()).unwrap();
            // The tickets come before it.
            assert_eq!(io.read_u8().await.unwrap(), b'!');
        });
    }
    while let Some(done) = under_way.join_next().await {
        done.unwrap();
    }
}
