//! The count that node scope exists for: handshakes grow with pairs of nodes, signatures with identities,
//! and neither with pairs of identities. Pool, TLS, HBONE and proofs over loopback.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod kernel;

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::config::TunnelConfig;
use hauberk::hbone::client::Ask;
use hauberk::hbone::{Recv, server};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::pool::dial::Dialer;
use hauberk::pool::{Key, Pool, Route};
use hauberk::proof::connection::Proofs;
use hauberk::proof::{Binding, Side};
use hauberk::telemetry::{Metrics, Observe};
use hauberk::tls;
use hauberk::tls::handshake::Established;
use hauberk::tls::memory::Memory;
use hauberk::tls::server::{Listener, Terms};
use hauberk::tls::verify::Expected;
use hauberk::trust::Trust;
use http::Request;
use tokio::net::{TcpListener, TcpStream};

/// What the accepting node saw, and what it did.
#[derive(Debug, Default)]
struct Seen {
    handshakes: usize,
    /// Proofs of the dialling node's workloads, by their bytes: each is a signature that was made there.
    theirs: HashSet<Vec<u8>>,
    /// Proofs that were answered: each is a signature that was made here.
    ours: HashSet<String>,
    /// Who spoke to whom.
    pairs: HashSet<(String, SocketAddr)>,
}

type Count = Arc<Mutex<Seen>>;

fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

fn node(name: &str) -> SpiffeId {
    SpiffeId::node(&domain(), name).unwrap()
}

fn workload(side: &str, number: usize) -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", &format!("{side}{number}")).unwrap()
}

fn authority() -> Ca {
    kernel::if_asked();
    Ca::from_pem(domain(), &create_root(&domain(), SystemTime::now()).unwrap()).unwrap()
}

fn svid(ca: &Ca, id: &SpiffeId) -> X509Svid {
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    key.with_chain(ca.issue(&proven, id, Duration::from_secs(3600), SystemTime::now()).unwrap()).unwrap()
}

/// What one node holds: the trust of its agent, and its memory of sessions.
fn agent(ca: &Ca, ids: impl Iterator<Item = SpiffeId>) -> (Arc<Trust>, Arc<Memory>, Observe) {
    let trust = Trust::new(ca.bundle().clone());
    ids.for_each(|id| trust.insert(svid(ca, &id)));
    let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
    (trust, Memory::new(Some(tls::ticket::fleeting()), observe.clone()), observe)
}

/// The address of a destination's application, which is also what tells the destinations apart.
fn application(number: usize) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, u16::try_from(number + 1).unwrap()).into()
}

/// The accepting node, as `inbound` is one, without policies and applications.
#[derive(Clone)]
struct Far {
    trust: Arc<Trust>,
    memory: Arc<Memory>,
    seen: Count,
}

impl Far {
    fn new(ca: &Ca, ids: impl Iterator<Item = SpiffeId>) -> Self {
        let (trust, memory, _) = agent(ca, ids);
        Self { trust, memory, seen: Count::default() }
    }

    fn listener(&self, who: &SpiffeId, alpn: &[u8], peers: Expected) -> Arc<Listener> {
        let now = self.trust.snapshot();
        let roots = self.memory.roots(&now.bundle, now.bundle_epoch).unwrap();
        let (svid, place) = (&now.svids[who], [who.as_str().as_bytes()]);
        let (alpn, place) = (&[alpn][..], &place[..]);
        let terms = Terms { svid, roots: &roots, peers, judge: None, alpn, place, mode: "strict" };
        self.memory.listener(&terms).unwrap()
    }

    /// Listens as an identity, a node's or a workload's.
    async fn serve(&self, who: SpiffeId) -> SocketAddr {
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let listener = match who.node_name() {
            Some(_) => self.listener(&who, tls::ALPN_NODE, Expected::Node),
            None => self.listener(&who, tls::ALPN_H2, Expected::Member),
        };
        let far = self.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = socket.accept().await {
                tokio::spawn(far.clone().tunnel(Arc::clone(&listener), who.clone(), tcp));
            }
        });
        address
    }

    async fn tunnel(self, listener: Arc<Listener>, who: SpiffeId, tcp: TcpStream) {
        let (config, judged) = listener.accept();
        let Established { stream, session } = tls::handshake::accept(config, tcp).await.unwrap();
        let peer = judged.settle(Some(session.kind), session.peer_chain()).unwrap().leaf.id;
        self.seen.lock().unwrap().handshakes += 1;
        let between_nodes = who.node_name().is_some();
        let binding = Binding { exporter: session.exporter, client: peer, server: who };
        let proofs = between_nodes.then(|| Proofs::new(binding, Side::Server));
        let mut connection = server::start(stream, 1 << 20, 1000).await.unwrap();
        while let Some(Ok((request, respond))) = connection.accept().await {
            let proof = proofs.as_ref().and_then(|proofs| self.introduce(proofs, &request));
            tokio::spawn(answer(request, respond, proof));
        }
    }

    /// As `inbound::front` does it; what it would refuse stops the test.
    fn introduce(&self, proofs: &Proofs, request: &Request<RecvStream>) -> Option<String> {
        let asked = server::parse(request).unwrap();
        let said = server::identified(request).unwrap();
        let trust = self.trust.snapshot();
        let roots = self.memory.roots(&trust.bundle, trust.bundle_epoch).unwrap();
        let source = SpiffeId::parse(said.source).unwrap();
        let theirs = match said.proof {
            Some(proof) => proofs.learn(proof, &trust, &roots, self.memory.now()),
            None => proofs.knows(&source, &trust, &roots, self.memory.now()),
        };
        assert_eq!(theirs.unwrap().leaf.id, source, "the proof is the source's");
        let destination = workload("b", usize::from(asked.authority.port()) - 1);
        let shown = said.want.then(|| proofs.show(&trust.svids[&destination]).unwrap().header.clone());
        let mut seen = self.seen.lock().unwrap();
        seen.pairs.insert((said.source.to_owned(), asked.authority));
        seen.theirs.extend(said.proof.map(<[u8]>::to_vec));
        seen.ours.extend(shown.clone());
        shown
    }
}

/// Grants the stream, and ends it when the opener does.
async fn answer(request: Request<RecvStream>, respond: SendResponse<Bytes>, proof: Option<String>) {
    let mut send = server::accept(respond, proof.as_deref()).unwrap();
    let mut body = request.into_body();
    while let Some(Ok(_)) = body.data().await {}
    send.send_data(Bytes::new(), true).unwrap();
}

fn pool((trust, memory, observe): (Arc<Trust>, Arc<Memory>, Observe)) -> Pool {
    let dialer = Dialer::new(trust, memory, Arc::new(TunnelConfig::default()), observe);
    Pool::new(dialer, 1000, tokio::sync::broadcast::Sender::new(1))
}

/// Every one of `sources` opens a stream to every one of the destinations, one after another; the sources
/// do it at the same time. The destinations' own tunnels are at `addresses`.
async fn all_to_all(pool: &Pool, sources: usize, addresses: &[SocketAddr], between: Option<Key>) {
    let mut tasks = tokio::task::JoinSet::new();
    for source in 0..sources {
        let (pool, addresses, node) = (pool.clone(), addresses.to_vec(), between.clone());
        tasks.spawn(async move {
            for (number, address) in addresses.into_iter().enumerate() {
                let (source, destination) = (workload("a", source), workload("b", number));
                let route = Route { workload: Key { source, destination, address }, node: node.clone() };
                let ask = Ask { authority: application(number), source: application(0) };
                let mut stream = pool.open(&route, ask, Instant::now()).await.unwrap();
                stream.send.send_data(Bytes::new(), true).unwrap();
                stream.recv.accepted().await.unwrap();
                let Recv::Open(body) = &mut stream.recv else { unreachable!("it was accepted") };
                while let Some(data) = body.data().await {
                    let data = data.expect("the stream ends as its other end has");
                    assert!(data.is_empty(), "nobody sends anything: {data:?}");
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test]
async fn forty_thousand_pairs_of_identities_cost_one_handshake_and_four_hundred_signatures() {
    const EACH: usize = 200;
    let ca = authority();
    let far = Far::new(&ca, (0..EACH).map(|n| workload("b", n)).chain([node("n2")]));
    let address = far.serve(node("n2")).await;
    let pool = pool(agent(&ca, (0..EACH).map(|n| workload("a", n)).chain([node("n1")])));
    let between = Key { source: node("n1"), destination: node("n2"), address };
    // Whoever fell back to workload scope would find nobody at this address.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let began = Instant::now();
    all_to_all(&pool, EACH, &[nobody; EACH], Some(between)).await;
    let seen = far.seen.lock().unwrap();
    println!(
        "node scope, {EACH} identities on each of two nodes: {} pairs, {} TLS handshakes, {} + {} identity \
         proofs signed, in {:?}",
        seen.pairs.len(),
        seen.handshakes,
        seen.theirs.len(),
        seen.ours.len(),
        began.elapsed()
    );
    assert_eq!(seen.pairs.len(), EACH * EACH, "everybody spoke to everybody");
    assert_eq!(seen.handshakes, 1, "TLS handshakes grow with pairs of nodes only");
    assert_eq!(seen.theirs.len(), EACH, "each source signed once");
    assert_eq!(seen.ours.len(), EACH, "each destination signed once");
}

#[tokio::test]
async fn in_workload_scope_every_pair_of_identities_costs_a_handshake() {
    const EACH: usize = 20;
    let ca = authority();
    let far = Far::new(&ca, (0..EACH).map(|n| workload("b", n)));
    let mut addresses = Vec::new();
    for number in 0..EACH {
        addresses.push(far.serve(workload("b", number)).await);
    }
    let pool = pool(agent(&ca, (0..EACH).map(|n| workload("a", n))));
    for _ in 0..2 {
        all_to_all(&pool, EACH, &addresses, None).await;
    }
    let handshakes = far.seen.lock().unwrap().handshakes;
    println!(
        "workload scope, {EACH} identities on each of two nodes: {} pairs, {handshakes} TLS handshakes, with \
         two signatures each; 200 identities on each would make {} and {}",
        EACH * EACH,
        200 * 200,
        2 * 200 * 200
    );
    assert_eq!(handshakes, EACH * EACH, "one for each pair, however many streams they have");
}
