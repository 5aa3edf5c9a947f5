//! Where tunnels arrive, and what may be asked there: at a pod by its own HBONE peers (workload scope),
//! at the node by other agents of ours, for all of its pods (node scope).

use std::borrow::Cow;
use std::sync::Arc;

use h2::RecvStream;
use http::Request;
use rustls::pki_types::UnixTime;
use tokio_util::sync::CancellationToken;

use crate::directory::Workload;
use crate::hbone::Lease;
use crate::hbone::server::{self, Asked};
use crate::identity::SpiffeId;
use crate::identity::svid::Leaf;
use crate::identity::svid::X509Svid;
use crate::pod::{Listening, Pod};
use crate::policy::Policies;
use crate::proof::Refusal;
use crate::proof::connection::{Proofs, Shown};
use crate::shard::Shard;
use crate::tls;
use crate::tls::roots::Digest;
use crate::tls::server::{Listener, Terms};
use crate::tls::verify::{Expected, Judge, Refused};
use crate::trust::Snapshot;
use crate::verdict::Reason;

/// A place where tunnels arrive.
#[derive(Clone, Debug)]
pub enum Front {
    /// A pod's own address.
    Pod(Arc<Pod>),
    /// The node's address.
    Node(Arc<Node>),
}

/// The node's own front.
#[derive(Debug)]
pub struct Node {
    id: SpiffeId,
    /// Cancelled when the node's address changes.
    pub gone: CancellationToken,
    listening: Listening,
}

impl Node {
    /// The front of this node's agent.
    pub fn new(id: SpiffeId) -> Arc<Self> {
        Arc::new(Self { id, gone: CancellationToken::new(), listening: Listening::default() })
    }

    fn listener(&self, shard: &Shard) -> Result<(Arc<Listener>, Arc<X509Svid>), Reason> {
        const MODE: &str = "node";
        self.listening.get(&self.id, MODE, &shard.trust, &shard.tls, |svid, roots| {
            shard.tls.listener(&Terms {
                svid,
                roots,
                peers: Expected::Node,
                judge: None,
                alpn: &[tls::ALPN_NODE],
                place: &[b"node", self.id.as_str().as_bytes()],
                mode: MODE,
            })
        })
    }
}

/// Lets in, to a pod's own tunnel, workloads that may reach the pod on some port; asked in full handshakes, and again
/// whenever a session is resumed. Each stream is judged for itself.
#[derive(Debug)]
struct MayReach {
    policies: Arc<Policies>,
    workload: Arc<Workload>,
}

impl Judge for MayReach {
    fn judge(&self, peer: &Leaf, _: UnixTime) -> Result<(), Refused> {
        if peer.id.node_name().is_some() {
            let detail = format!("{} is a node's agent; here workloads speak for themselves", peer.id);
            return Err(Refused { reason: Reason::WrongIdentity, detail });
        }
        if self.policies.may_reach(&peer.id, &self.workload) {
            return Ok(());
        }
        let detail = format!("the policies let {} reach {} on no port", peer.id, self.workload.id);
        Err(Refused { reason: Reason::DeniedByPolicy, detail })
    }

    /// The policies of this moment are asked each time, so that a change of them ends no one else's session.
    fn digest(&self) -> Digest {
        [0; 32]
    }
}

/// A stream that may be delivered.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) pod: Arc<Pod>,
    /// Who opens it, as was proven.
    pub(super) source: SpiffeId,
    pub(super) asked: Asked,
    /// Cut when one of the certificates that it rests on is revoked.
    pub(super) lease: Arc<Lease>,
}

/// What admission knows of the tunnel that a stream comes on.
#[derive(Clone, Debug)]
pub(super) enum Tunnel {
    /// The peer's certificate is the workload's.
    Workload { peer: SpiffeId, lease: Arc<Lease> },
    /// The peer's certificate is its node's; its workloads prove themselves.
    Node(Arc<Proofs>),
}

impl Tunnel {
    /// Ends all streams: the tunnel rests on something that was revoked, or expired long ago.
    pub(super) fn cut(&self, why: Reason) {
        match self {
            Self::Workload { lease, .. } => lease.cut(why),
            Self::Node(proofs) => proofs.cut_all(why),
        }
    }
}

impl Front {
    /// Whose front it is.
    pub fn id(&self) -> &SpiffeId {
        match self {
            Self::Pod(pod) => &pod.workload.id,
            Self::Node(node) => &node.id,
        }
    }

    /// Cancelled when tunnels shall no longer arrive here.
    pub fn gone(&self) -> &CancellationToken {
        match self {
            Self::Pod(pod) => &pod.gone,
            Self::Node(node) => &node.gone,
        }
    }

    pub(super) fn alpn(&self) -> &'static [u8] {
        match self {
            Self::Pod(_) => tls::ALPN_H2,
            Self::Node(_) => tls::ALPN_NODE,
        }
    }

    /// How it answers now, and the SVID it presents.
    pub(super) fn listener(&self, shard: &Shard) -> Result<(Arc<Listener>, Arc<X509Svid>), Reason> {
        match self {
            Self::Pod(pod) => pod.listener(&shard.trust, &shard.tls, || {
                Arc::new(MayReach {
                    policies: Arc::clone(&shard.policies),
                    workload: Arc::clone(&pod.workload),
                })
            }),
            Self::Node(node) => node.listener(shard),
        }
    }

    /// The destination's proof, if the peer wants it: sent before anything else is looked at, so that the peer
    /// verifies it while we verify the source's and connect to the application. It gives nothing away that a
    /// TLS server would not send to a client before it knows who that is.
    pub(super) fn proof(
        &self,
        shard: &Shard,
        tunnel: &Tunnel,
        request: &Request<RecvStream>,
    ) -> Option<Arc<Shown>> {
        let (Self::Node(_), Tunnel::Node(proofs)) = (self, tunnel) else { return None };
        let said = server::identified(request).ok().filter(|said| said.want)?;
        let pod = match server::is_introduction(request) {
            true => shard.pods.of(&called(&shard.trust.snapshot(), said.destination))?,
            false => shard.pods.at(server::parse(request).ok()?.authority.ip())?,
        };
        let trust = shard.trust.snapshot();
        let own = trust.svids.get(&pod.workload.id).filter(|svid| trust.revoked(svid.leaf()).is_none())?;
        // Why it cannot be made is said when the request is judged.
        proofs.show(own).ok()
    }

    /// Has the peer's workload prove itself before a stream of its needs that.
    ///
    /// # Errors
    /// When it has not, or a stream of its would not be admitted to that destination.
    pub(super) fn meet(
        &self,
        shard: &Shard,
        tunnel: &Tunnel,
        request: &Request<RecvStream>,
    ) -> Result<(), Refusal> {
        let (Self::Node(_), Tunnel::Node(proofs)) = (self, tunnel) else {
            return Err(refusal(Reason::BadRequest, request));
        };
        let said = server::identified(request).map_err(|reason| refusal(reason, request))?;
        let pod = shard.pods.of(&called(&shard.trust.snapshot(), said.destination));
        let pod = pod.ok_or_else(|| refusal(Reason::NotLocal, request))?;
        introduce(shard, proofs, &pod, request).map(drop)
    }

    /// May this be asked here?
    pub(super) fn admit(
        &self,
        shard: &Shard,
        tunnel: &Tunnel,
        request: &Request<RecvStream>,
    ) -> Result<Admitted, Refusal> {
        let asked = server::parse(request).map_err(|reason| refusal(reason, request))?;
        let (pod, introduced) = match (self, tunnel) {
            // The tunnel's server identity is the pod's, so only the pod's own addresses may be named.
            (Self::Pod(pod), Tunnel::Workload { peer, lease }) if pod.has(asked.authority.ip()) => {
                (Arc::clone(pod), (peer.clone(), Arc::clone(lease)))
            }
            (Self::Node(_), Tunnel::Node(proofs)) => {
                let pod = shard.pods.at(asked.authority.ip());
                let pod = pod.ok_or_else(|| refusal(Reason::NotLocal, request))?;
                let introduced = introduce(shard, proofs, &pod, request)?;
                (pod, introduced)
            }
            _ => return Err(refusal(Reason::NotLocal, request)),
        };
        finish(pod, asked, introduced, request)
    }
}

/// The source, and what its streams share.
type Introduced = (SpiffeId, Arc<Lease>);

fn finish(
    pod: Arc<Pod>,
    asked: Asked,
    (source, lease): Introduced,
    request: &Request<RecvStream>,
) -> Result<Admitted, Refusal> {
    if pod.own_ports.contains(&asked.authority.port()) {
        return Err(refusal(Reason::AgentPort, request));
    }
    Ok(Admitted { pod, source, asked, lease })
}

/// Node scope: the source has proven itself on this connection and runs on the peer's node, and the stream is
/// for whoever is at its address.
fn introduce(
    shard: &Shard,
    proofs: &Proofs,
    pod: &Pod,
    request: &Request<RecvStream>,
) -> Result<Introduced, Refusal> {
    let said = server::identified(request).map_err(|reason| refusal(reason, request))?;
    let (trust, now) = (shard.trust.snapshot(), shard.tls.now());
    let roots = shard.tls.roots(&trust.bundle, trust.bundle_epoch);
    let roots = roots.map_err(|error| Refusal { reason: Reason::Internal, detail: error.to_string() })?;
    let source = SpiffeId::parse(said.source).map_err(|error| Refusal {
        reason: Reason::BadRequest,
        detail: format!("hauberk-source: {error}"),
    })?;
    let source = roots.canonical(&source).into_owned();
    let theirs = match said.proof {
        Some(proof) => proofs.learn(proof, &trust, &roots, now)?,
        None => proofs.knows(&source, &trust, &roots, now)?,
    };
    if theirs.id != source {
        let detail = format!("the proof is of {}, the stream of {source}", theirs.leaf.id);
        return Err(Refusal { reason: Reason::BadProof, detail });
    }
    let node = proofs.peer().node_name().unwrap_or_default();
    if !shard.directory.load().places(&source, node) {
        let detail = format!("the directory places no enrolled workload with {source} on node {node}");
        return Err(Refusal { reason: Reason::NotPlaced, detail });
    }
    let id = &pod.workload.id;
    // The peer's directory may be behind: what this destination has proven says nothing of another one
    // that has its address now.
    if called(&trust, said.destination) != id.as_str() {
        let detail = format!("the stream is for {}, and at its address is {id}", said.destination);
        return Err(Refusal { reason: Reason::WrongIdentity, detail });
    }
    let own = trust.svids.get(id).filter(|svid| trust.revoked(svid.leaf()).is_none());
    let own = own.ok_or_else(|| Refusal {
        reason: Reason::NoSvid,
        detail: format!("{id} has no SVID that it may present"),
    })?;
    if said.want {
        // It was sent ahead; if it could not be made, this says why.
        proofs.show(own)?;
    }
    Ok((source, proofs.lease(&theirs, own)))
}

/// The identity that a peer means: it may call it by an alias of our trust domain.
fn called<'a>(trust: &Snapshot, said: &'a str) -> Cow<'a, str> {
    // Of every stream, and most meshes have no alias.
    if trust.bundle.aliases().is_empty() {
        return said.into();
    }
    match SpiffeId::parse(said) {
        Ok(id) => trust.bundle.canonical(&id).as_str().to_owned().into(),
        Err(_) => said.into(),
    }
}

fn refusal(reason: Reason, request: &Request<RecvStream>) -> Refusal {
    let authority = request.uri().authority().map_or("no authority", |authority| authority.as_str());
    Refusal { reason, detail: format!("{} {authority}", request.method()) }
}
