//! Nodes for tests that count: an authority, what an agent holds, and an accepting node as `inbound` is
//! one, without policies and applications.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::config::TunnelConfig;
use hauberk::hbone::client::Ask;
use hauberk::hbone::{Recv, Stream, server};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::pool::dial::Dialer;
use hauberk::pool::{Pool, Route, Seat, Word};
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
use tokio::sync::{Semaphore, broadcast};

/// What the accepting node saw, and what it did.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) handshakes: usize,
    /// Of these.
    pub(crate) resumed: usize,
    /// Proofs of the dialling node's workloads, by their bytes: each is a signature that was made there.
    pub(crate) theirs: HashSet<Vec<u8>>,
    /// Proofs that were answered: each is a signature that was made here.
    pub(crate) ours: HashSet<String>,
    /// Who spoke to whom.
    pub(crate) pairs: HashSet<(String, SocketAddr)>,
}

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

pub(crate) fn node(name: &str) -> SpiffeId {
    SpiffeId::node(&domain(), name).unwrap()
}

pub(crate) fn workload(side: &str, number: usize) -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", &format!("{side}{number}")).unwrap()
}

pub(crate) fn authority() -> Ca {
    Ca::from_pem(domain(), &create_root(&domain(), SystemTime::now()).unwrap()).unwrap()
}

pub(crate) fn svid(ca: &Ca, id: &SpiffeId) -> X509Svid {
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    key.with_chain(ca.issue(&proven, id, Duration::from_secs(3600), SystemTime::now()).unwrap()).unwrap()
}

/// What one node holds: the trust of its agent, and its memory of sessions.
#[derive(Clone)]
pub(crate) struct Agent {
    pub(crate) trust: Arc<Trust>,
    memory: Arc<Memory>,
    observe: Observe,
}

impl Agent {
    pub(crate) fn new(ca: &Ca, ids: impl Iterator<Item = SpiffeId>, resume: bool) -> Self {
        let trust = Trust::new(ca.bundle().clone());
        ids.for_each(|id| trust.insert(svid(ca, &id)));
        let observe = Observe::new(Arc::new(Metrics::new().unwrap()));
        Self { trust, memory: Memory::new(resume.then(tls::ticket::fleeting), observe.clone()), observe }
    }

    /// The only thread's pool, which tells `words`.
    pub(crate) fn pool(&self, words: &broadcast::Sender<Word>) -> Pool {
        self.configured(TunnelConfig::default(), words)
    }

    pub(crate) fn configured(&self, config: TunnelConfig, words: &broadcast::Sender<Word>) -> Pool {
        self.seated(config, words, Seat::default())
    }

    /// One of several threads' pools.
    pub(crate) fn seated(&self, config: TunnelConfig, words: &broadcast::Sender<Word>, seat: Seat) -> Pool {
        let config = Arc::new(config);
        let (trust, memory) = (Arc::clone(&self.trust), Arc::clone(&self.memory));
        Pool::new(Dialer::new(trust, memory, config, self.observe.clone()), 100_000, words.clone(), seat)
    }
}

/// The address of a destination's application, which is also what tells the destinations apart.
pub(crate) fn application(number: usize) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, u16::try_from(number + 1).unwrap()).into()
}

/// The accepting node.
#[derive(Clone)]
pub(crate) struct Far {
    agent: Agent,
    /// What the names of its workloads begin with.
    side: &'static str,
    pub(crate) seen: Arc<Mutex<Seen>>,
    /// Connections that were accepted, proven or not.
    pub(crate) begun: Arc<AtomicUsize>,
    /// A permit for each answer.
    pub(crate) answers: Arc<Semaphore>,
}

impl Far {
    pub(crate) fn new(agent: Agent, side: &'static str) -> Self {
        let answers = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
        Self { agent, side, seen: Arc::default(), begun: Arc::default(), answers }
    }

    fn listener(&self, who: &SpiffeId) -> Arc<Listener> {
        let (alpn, peers) = match who.node_name() {
            Some(_) => (tls::ALPN_NODE, Expected::Node),
            None => (tls::ALPN_H2, Expected::Member),
        };
        let now = self.agent.trust.snapshot();
        let roots = self.agent.memory.roots(&now.bundle, now.bundle_epoch).unwrap();
        let (svid, place) = (&now.svids[who], [who.as_str().as_bytes()]);
        let (alpn, place) = (&[alpn][..], &place[..]);
        let terms = Terms { svid, roots: &roots, peers, judge: None, alpn, place, mode: "strict" };
        self.agent.memory.listener(&terms).unwrap()
    }

    /// Listens as an identity, a node's or a workload's.
    pub(crate) async fn serve(&self, who: SpiffeId) -> SocketAddr {
        self.serve_at(who, (Ipv4Addr::LOCALHOST, 0).into()).await
    }

    pub(crate) async fn serve_at(&self, who: SpiffeId, at: SocketAddr) -> SocketAddr {
        let socket = TcpListener::bind(at).await.unwrap();
        let address = socket.local_addr().unwrap();
        let listener = self.listener(&who);
        let far = self.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = socket.accept().await {
                far.begun.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(far.clone().tunnel(Arc::clone(&listener), who.clone(), tcp));
            }
        });
        address
    }

    async fn tunnel(self, listener: Arc<Listener>, who: SpiffeId, tcp: TcpStream) {
        tcp.set_nodelay(true).unwrap();
        let (config, judged) = listener.accept();
        let Established { stream, session } = tls::handshake::accept(config, tcp).await.unwrap();
        let settled = judged.settle(Some(session.kind), session.peer_chain()).unwrap();
        let mut connection = server::start(stream, 1 << 20, 100_000).await.unwrap();
        {
            let mut seen = self.seen.lock().unwrap();
            seen.handshakes += 1;
            seen.resumed += usize::from(settled.resumed);
        }
        let between_nodes = who.node_name().is_some();
        let binding = Binding { exporter: session.exporter, client: settled.leaf.id, server: who };
        let proofs = between_nodes.then(|| Proofs::new(binding, Side::Server));
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let proof = proofs.as_ref().and_then(|proofs| self.introduce(proofs, &request));
            if server::is_introduction(&request) {
                if let Some(proof) = proof {
                    server::prove(&mut respond, &proof).unwrap();
                }
                server::met(respond);
                continue;
            }
            let answers = Arc::clone(&self.answers);
            tokio::spawn(async move {
                answers.acquire().await.unwrap().forget();
                answer(request, respond, proof).await;
            });
        }
    }

    /// As `inbound::front` does it; what it would refuse stops the test.
    fn introduce(&self, proofs: &Proofs, request: &Request<RecvStream>) -> Option<String> {
        let said = server::identified(request).unwrap();
        let trust = self.agent.trust.snapshot();
        let roots = self.agent.memory.roots(&trust.bundle, trust.bundle_epoch).unwrap();
        let source = SpiffeId::parse(said.source).unwrap();
        let theirs = match said.proof {
            Some(proof) => proofs.learn(proof, &trust, &roots, self.agent.memory.now()),
            None => proofs.knows(&source, &trust, &roots, self.agent.memory.now()),
        };
        assert_eq!(theirs.unwrap().leaf.id, source, "the proof is the source's");
        let asked = (!server::is_introduction(request)).then(|| server::parse(request).unwrap());
        let destination = match &asked {
            Some(asked) => workload(self.side, usize::from(asked.authority.port()) - 1),
            None => SpiffeId::parse(said.destination).unwrap(),
        };
        let shown = said.want.then(|| proofs.show(&trust.svids[&destination]).unwrap().header.clone());
        let mut seen = self.seen.lock().unwrap();
        seen.pairs.extend(asked.map(|asked| (said.source.to_owned(), asked.authority)));
        seen.theirs.extend(said.proof.map(<[u8]>::to_vec));
        seen.ours.extend(shown.clone());
        shown
    }
}

/// Grants the stream, and ends it when the opener does.
async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>, proof: Option<String>) {
    // Whoever asked may have let go already.
    if let Some(proof) = proof
        && server::prove(&mut respond, &proof).is_err()
    {
        return;
    }
    let Ok(mut send) = server::accept(respond) else { return };
    let mut body = request.into_body();
    while let Some(Ok(_)) = body.data().await {}
    let _ = send.send_data(Bytes::new(), true);
}

/// Opens a stream, which is granted.
pub(crate) async fn open(pool: &Pool, route: &Route, number: usize, now: Instant) -> Stream {
    let ask = Ask { authority: application(number), source: application(0) };
    let mut stream = pool.open(route, ask, now).await.unwrap();
    stream.recv.accepted().await.unwrap();
    stream
}

/// One connection of an application: opens a stream, and ends it.
pub(crate) async fn exchange(pool: &Pool, route: &Route, number: usize, now: Instant) {
    let mut stream = open(pool, route, number, now).await;
    stream.send.send_data(Bytes::new(), true).unwrap();
    let Recv::Open(body) = &mut stream.recv else { unreachable!("it was accepted") };
    while let Some(data) = body.data().await {
        let data = data.expect("the stream ends as its other end has");
        assert!(data.is_empty(), "nobody sends anything: {data:?}");
    }
}
