//! What the authority can issue, and how soon what it says is heard: `cargo bench -p hauberk --bench issuance`.
//!
//! The authority is a process of its own, reached over its real listener; its CPU time and memory are the
//! kernel's account of it. 100 nodes ask for 10,000 identities at once, as after a partition. Then 1,000 agents
//! are connected, and it is measured how long a revocation and a new root take to reach the last of them. Then the
//! authority knows 10,000 services and 100,000 workloads, and issues to some. Beside
//! that stands what the signatures alone cost: verifying a CSR's and making a certificate's, with P-256.
#![allow(missing_docs, clippy::unwrap_used, reason = "a program that prints figures may stop at a surprise")]

#[allow(dead_code, reason = "shared with tests; each uses a part")]
#[path = "../tests/authority/scene.rs"]
mod scene;

use std::fmt::Write as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use hauberk::authority::proto::authority_client::AuthorityClient;
use hauberk::authority::proto::{Applied, Bundle, IssueRequest};
use hauberk::authority::state::start_rotation;
use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::SpiffeId;
use hauberk::identity::revocation::{NodeName, Subject};
use hauberk::issue::Keypair;
use scene::{Scene, domain};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Streaming};

const NODES: usize = 100;
const IDENTITIES: usize = 10_000;
const AGENTS: usize = 1_000;
const SERVICES: usize = 10_000;
const WORKLOADS: usize = 100_000;
/// How often each figure of one thread is taken; the best counts, as the machine has other work.
const ROUNDS: usize = 5;

fn main() {
    // `cargo test --benches` runs this without asking for figures.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let bare = bare();
    let library = library();
    println!("one core, signatures alone (verify and sign, P-256): {bare:.0} issuances/s");
    println!(
        "one core, CSR in, certificate out: {library:.0} issuances/s, {:.0} % of that",
        100.0 * library / bare
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        herd(bare).await;
        news().await;
        large().await;
    });
}

/// How often in a second; the best of some rounds.
fn rate(mut once: impl FnMut()) -> f64 {
    let round = |once: &mut dyn FnMut()| {
        let (began, mut count) = (Instant::now(), 0_u32);
        while began.elapsed() < Duration::from_millis(400) {
            (0..50).for_each(|_| once());
            count += 50;
        }
        f64::from(count) / began.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(|_| round(&mut once)).fold(0.0, f64::max)
}

fn bare() -> f64 {
    let (random, signing) = (SystemRandom::new(), &ECDSA_P256_SHA256_ASN1_SIGNING);
    let key = EcdsaKeyPair::generate(signing).unwrap();
    // What is signed in a CSR and in an SVID is about that long.
    let message = [7; 400];
    let signature = key.sign(&random, &message).unwrap();
    let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.public_key().as_ref());
    rate(|| {
        public.verify(&message, signature.as_ref()).unwrap();
        key.sign(&random, &message).unwrap();
    })
}

fn library() -> f64 {
    let now = SystemTime::now();
    let ca = Ca::from_pem(domain(), &create_root(&domain(), now).unwrap()).unwrap();
    let id = scene::workload("web");
    let csr = Keypair::generate().unwrap().csr_for(&id).unwrap();
    rate(|| {
        let key = ProvenKey::for_id(&csr, &id).unwrap();
        ca.issue_to(&key, &id, Some("n1"), Duration::from_secs(3600), now).unwrap();
    })
}

/// The authority's process; ended with this.
struct Authority(Child);

impl Authority {
    fn start(scene: &Scene) -> Self {
        let config = scene.dir.join("authority.yaml");
        let mut command = Command::new(env!("CARGO_BIN_EXE_hauberk"));
        command.args(["--log", "info", "authority", "--config"]).arg(config);
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    async fn serving(&self, scene: &Scene) {
        scene::wait_until("the authority serves", async || {
            tokio::net::TcpStream::connect(scene.listen).await.is_ok()
        })
        .await;
    }

    /// CPU time so far, in seconds.
    fn cpu(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        // proc(5): fields 14 and 15, in ticks of 10 ms; the second field ends with the last parenthesis.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks: u32 = fields[11..13].iter().map(|field| field.parse::<u32>().unwrap()).sum();
        f64::from(ticks) / 100.0
    }

    /// The most memory that it ever had, in MiB.
    fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// What `/proc/PID/status` says in MiB.
    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn identity(number: usize) -> SpiffeId {
    SpiffeId::workload(&domain(), "s", &format!("w{number}")).unwrap()
}

fn node(number: usize) -> String {
    format!("n{}", number % NODES)
}

fn address(number: usize) -> String {
    format!("10.{}.{}.{}", number >> 16, (number >> 8) & 255, number & 255)
}

/// A directory of so many workloads.
fn workloads(count: usize) -> String {
    let mut directory = String::from("workloads:\n");
    for number in 0..count {
        let (address, node) = (address(number), node(number));
        writeln!(
            directory,
            "- {{name: w{number}, namespace: s, serviceAccount: w{number}, node: {node}, addresses: [{address}]}}"
        )
        .unwrap();
    }
    directory
}

/// A connection of each node.
async fn nodes(scene: &Scene) -> Vec<AuthorityClient<Channel>> {
    let mut nodes = Vec::new();
    for number in 0..NODES {
        let svid = scene.join(&node(number)).await;
        nodes.push(scene.client(Some(&svid)).await);
    }
    nodes
}

async fn herd(bare: f64) {
    let scene = Scene::new("");
    std::fs::write(scene.dir.join("directory.yaml"), workloads(IDENTITIES)).unwrap();
    let authority = Authority::start(&scene);
    authority.serving(&scene).await;
    let nodes = nodes(&scene).await;
    // One key is as good as many: the authority has to verify each CSR anew.
    let csr = Keypair::generate().unwrap().csr().unwrap();
    // Connections are warm, and the nodes known to the disk.
    ask_all(&nodes, &csr, NODES).await;
    for _ in 0..3 {
        let (cpu, began) = (authority.cpu(), Instant::now());
        let sent_away = ask_all(&nodes, &csr, IDENTITIES).await;
        let (cpu, took) = (authority.cpu() - cpu, began.elapsed().as_secs_f64());
        let each = IDENTITIES as f64 / cpu;
        println!(
            "{IDENTITIES} identities at once from {NODES} nodes: {took:.2} s, no error, {sent_away} times told to come back; {each:.0} issuances per core second over gRPC and TLS, {:.0} % of the signatures alone; at most {} MiB",
            100.0 * each / bare,
            authority.peak()
        );
    }
}

/// Asks for so many identities at once; how often somebody was told to come back.
async fn ask_all(nodes: &[AuthorityClient<Channel>], csr: &[u8], count: usize) -> u64 {
    let mut asking = JoinSet::new();
    for number in 0..count {
        let request = IssueRequest {
            spiffe_id: identity(number).to_string(),
            csr: csr.to_vec(),
            held_until: 0,
            generation: 1,
        };
        asking.spawn(ask(nodes[number % NODES].clone(), request));
    }
    asking.join_all().await.into_iter().sum()
}

async fn ask(mut client: AuthorityClient<Channel>, request: IssueRequest) -> u64 {
    let mut sent_away = 0;
    loop {
        match client.issue(request.clone()).await {
            Ok(_) => return sent_away,
            Err(status) if status.code() == Code::ResourceExhausted => {
                sent_away += 1;
                let seconds = status.metadata().get("retry-after").unwrap().to_str().unwrap();
                tokio::time::sleep(Duration::from_secs(seconds.parse().unwrap())).await;
            }
            Err(status) => panic!("an error: {status:?}"),
        }
    }
}

/// An agent's stream of bundles.
struct Watching {
    bundles: Streaming<Bundle>,
    _saying: mpsc::Sender<Applied>,
}

async fn news() {
    let scene = Scene::new("");
    let authority = Authority::start(&scene);
    authority.serving(&scene).await;
    let mut agents = Vec::new();
    for number in 0..AGENTS {
        let svid = scene.join(&format!("a{number}")).await;
        let mut client = scene.client(Some(&svid)).await;
        let (saying, said) = mpsc::channel(1);
        saying.send(Applied { generation: 1 }).await.unwrap();
        let mut bundles = client.watch_bundle(ReceiverStream::new(said)).await.unwrap().into_inner();
        bundles.message().await.unwrap().unwrap();
        agents.push(Watching { bundles, _saying: saying });
    }
    println!("{AGENTS} agents connected: at most {} MiB", authority.peak());
    let store = Arc::new(scene.store());
    for round in 0..3 {
        let revoke = Arc::clone(&store);
        let subject = Subject::Node(NodeName::parse(&format!("gone{round}")).unwrap());
        let took = reach(&mut agents, move || {
            revoke.change_revocations(|list| list.revoke(subject.clone(), SystemTime::now())).unwrap();
        });
        println!("a revocation reaches the last of {AGENTS} agents after {:.0} ms", 1e3 * took.await);
    }
    let config = scene.config();
    let took = reach(&mut agents, move || {
        start_rotation(&store, &config, SystemTime::now()).unwrap().unwrap();
    });
    println!("a new root reaches the last of {AGENTS} agents after {:.0} ms", 1e3 * took.await);
    println!("afterwards: at most {} MiB", authority.peak());
}

/// What the directory of a large cluster makes the authority hold.
async fn large() {
    let scene = Scene::new("");
    let mut directory = workloads(WORKLOADS);
    directory.push_str("services:\n");
    for number in 0..SERVICES {
        let (each, high, low) = (WORKLOADS / SERVICES, number >> 8, number & 255);
        let endpoints: Vec<_> = (0..each).map(|at| format!("s/w{}", number * each + at)).collect();
        writeln!(
            directory,
            "- {{name: s{number}, namespace: s, addresses: [11.0.{high}.{low}], ports: [{{port: 80, targetPort: 8080}}], endpoints: [{}]}}",
            endpoints.join(", ")
        )
        .unwrap();
    }
    std::fs::write(scene.dir.join("directory.yaml"), directory).unwrap();
    let authority = Authority::start(&scene);
    authority.serving(&scene).await;
    let idle = authority.memory("VmRSS:");
    let nodes = nodes(&scene).await;
    let csr = Keypair::generate().unwrap().csr().unwrap();
    ask_all(&nodes, &csr, IDENTITIES).await;
    println!(
        "{SERVICES} services and {WORKLOADS} workloads: {idle} MiB, {} MiB after {IDENTITIES} issuances at once; at most {} MiB, reading the directory's file included",
        authority.memory("VmRSS:"),
        authority.peak()
    );
}

/// How long it takes from an operator's command until all have heard, in seconds.
async fn reach(agents: &mut [Watching], command: impl FnOnce()) -> f64 {
    let began = Instant::now();
    command();
    let heard = agents.iter_mut().map(|agent| agent.bundles.message());
    for bundle in futures_util::future::join_all(heard).await {
        bundle.unwrap().unwrap();
    }
    began.elapsed().as_secs_f64()
}
