//! What agents may ask: who they are is known, whether they may is decided here.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt, stream};
use prometheus::{IntCounterVec, IntGauge, Opts, Registry, TextEncoder};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use super::proto::authority_server::Authority;
use super::proto::{AttestRequest, Bundle, IssueRequest, Svid, WatchBundleRequest};
use super::serve::PeerInfo;
use super::wire;
use crate::ca::store::{Redeemed, Store};
use crate::ca::{BACKDATED, Ca, CaError, ProvenKey};
use crate::directory::Live;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::{Revocations, Revoked};
use crate::identity::svid::Leaf;
use crate::policy::Policies;

/// What the authority counts.
#[derive(Debug)]
pub struct Counters {
    registry: Registry,
    issued: IntCounterVec,
    refused: IntCounterVec,
    revocations: IntGauge,
    generation: IntGauge,
}

impl Counters {
    /// All at zero.
    ///
    /// # Errors
    /// When two counters have one name, which is a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let opts = |name, help| Opts::new(name, help);
        let issued = IntCounterVec::new(
            opts("hauberk_authority_issued_total", "SVIDs issued, by kind of identity."),
            &["kind"],
        )?;
        let refused = IntCounterVec::new(
            opts("hauberk_authority_refused_total", "Requests and handshakes refused, by reason."),
            &["reason"],
        )?;
        let revocations = IntGauge::new("hauberk_authority_revocations", "Revocations in force.")?;
        let generation = IntGauge::new(
            "hauberk_authority_revocations_generation",
            "Generation of the list of revocations.",
        )?;
        registry.register(Box::new(issued.clone()))?;
        registry.register(Box::new(refused.clone()))?;
        registry.register(Box::new(revocations.clone()))?;
        registry.register(Box::new(generation.clone()))?;
        Ok(Self { registry, issued, refused, revocations, generation })
    }

    /// Counts a refusal; `reason` is one of a fixed set.
    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// Tells of the list in force.
    pub(super) fn revocations(&self, list: &Revocations) {
        self.revocations.set(i64::try_from(list.entries().len()).unwrap_or(i64::MAX));
        self.generation.set(i64::try_from(list.generation()).unwrap_or(i64::MAX));
    }

    /// What is served at a path of the admin address.
    pub fn page(&self, path: &str, directory: &Live, policies: &Policies) -> Option<String> {
        match path {
            "/metrics" => {
                let own = TextEncoder::new().encode_to_string(&self.registry.gather()).ok()?;
                let policies = policies.standing().map(|standing| standing.render()).unwrap_or_default();
                Some(own + &directory.standing().render() + &policies)
            }
            "/healthz" | "/readyz" => Some("ok\n".into()),
            _ => None,
        }
    }
}

/// The authority's gRPC service.
pub(super) struct Service {
    ca: Arc<Ca>,
    store: Arc<Store>,
    directory: Arc<Live>,
    lifetime: Duration,
    counters: Arc<Counters>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

/// A refusal: its label, and what the agent is told.
struct Refusal(&'static str, Status);

impl Service {
    pub(super) fn new(
        ca: Arc<Ca>,
        store: Arc<Store>,
        directory: Arc<Live>,
        lifetime: Duration,
        counters: Arc<Counters>,
        bundle: watch::Sender<Arc<TrustBundle>>,
    ) -> Self {
        Self { ca, store, directory, lifetime, counters, bundle }
    }

    fn admit(&self, request: &AttestRequest, now: SystemTime) -> Result<SpiffeId, Refusal> {
        let id = SpiffeId::node(self.ca.domain(), &request.node)
            .map_err(|e| Refusal("bad_request", Status::invalid_argument(format!("node: {e}"))))?;
        // The same words for every kind of bad token: a stranger learns nothing by trying.
        let denied = || {
            Status::permission_denied(format!(
                "the join token is not valid for node {}; make a new one with `hauberk authority token`",
                request.node
            ))
        };
        match self.store.redeem(&request.join_token, &request.node, now) {
            // A revoked node's token is used up like any other.
            Ok(Redeemed::Accepted) => self.unbanned(&id, &request.node, now).map(|()| id),
            Ok(Redeemed::Unknown) => Err(Refusal("token_unknown", denied())),
            Ok(Redeemed::OtherNode) => Err(Refusal("token_other_node", denied())),
            Ok(Redeemed::Expired) => Err(Refusal("token_expired", denied())),
            Err(error) => {
                tracing::error!(%error, "cannot look the join token up");
                Err(Refusal("internal", Status::internal("the authority's store fails; see its log")))
            }
        }
    }

    /// The identity that a node may have, out of what it asks for.
    fn permit(&self, peer: &PeerInfo, asked: &str, now: SystemTime) -> Result<SpiffeId, Refusal> {
        let Some(leaf) = &peer.leaf else {
            return Err(Refusal("no_client_certificate", Status::unauthenticated("present the node's SVID")));
        };
        // It may have been revoked since it connected.
        if let Some(revoked) = self.revoked(leaf) {
            return Err(Refusal("revoked", Status::permission_denied(revoked.to_string())));
        }
        let node = &leaf.id;
        let Some(name) = node.node_name() else {
            let words = format!("{node} is not a node's identity");
            return Err(Refusal("not_a_node", Status::permission_denied(words)));
        };
        let id = SpiffeId::parse(asked)
            .map_err(|e| Refusal("bad_request", Status::invalid_argument(format!("spiffe_id: {e}"))))?;
        if id != *node && !self.directory.is_read() {
            let words = "the authority has not read the directory yet; ask again";
            return Err(Refusal("directory_unread", Status::unavailable(words)));
        }
        if id == *node || self.directory.load().places(&id, name) {
            self.unbanned(&id, name, now)?;
            return Ok(id);
        }
        let words = format!("the directory places no enrolled workload with {id} on node {name}");
        Err(Refusal("not_placed", Status::permission_denied(words)))
    }

    /// Whether an identity may have an SVID on a node now: none of the two is revoked.
    fn unbanned(&self, id: &SpiffeId, node: &str, now: SystemTime) -> Result<(), Refusal> {
        match self.bundle.borrow().revocations().forbids(id, node, now - BACKDATED) {
            None => Ok(()),
            Some(subject) => {
                let words = format!("{subject} is revoked; `hauberk authority unrevoke` lifts that");
                Err(Refusal("revoked", Status::permission_denied(words)))
            }
        }
    }

    fn revoked(&self, leaf: &Leaf) -> Option<Revoked> {
        self.bundle.borrow().revocations().judge(leaf)
    }

    fn sign(&self, id: &SpiffeId, node: &str, csr: &[u8], now: SystemTime) -> Result<Svid, Refusal> {
        // A policy may shorten a life, never prolong it.
        let wanted = self.directory.load().svid_lifetime(id, node);
        let lifetime = wanted.map_or(self.lifetime, |wanted| wanted.min(self.lifetime));
        let signed =
            ProvenKey::from_csr(csr).and_then(|key| self.ca.issue_to(&key, id, Some(node), lifetime, now));
        match signed {
            Ok(chain) => Ok(Svid {
                chain: chain.iter().map(|c| c.to_vec()).collect(),
                bundle: Some(wire::roots(&self.bundle.borrow())),
            }),
            Err(error @ (CaError::Csr(_) | CaError::KeyKind | CaError::TrustDomain { .. })) => {
                Err(Refusal("bad_csr", Status::invalid_argument(error.to_string())))
            }
            Err(error) => {
                tracing::error!(%error, "cannot sign");
                Err(Refusal("internal", Status::internal(error.to_string())))
            }
        }
    }

    /// Logs and counts what became of a request.
    fn answer(
        &self,
        peer: &PeerInfo,
        kind: &str,
        asked: &str,
        outcome: Result<Svid, Refusal>,
    ) -> Result<Response<Svid>, Status> {
        match outcome {
            Ok(svid) => {
                self.counters.issued.with_label_values(&[kind]).inc();
                tracing::info!(peer = %peer.address, node = peer.id().map(tracing::field::display), id = asked, "issued");
                Ok(Response::new(svid))
            }
            Err(Refusal(reason, status)) => {
                self.counters.refused(reason);
                tracing::warn!(peer = %peer.address, node = peer.id().map(tracing::field::display), id = asked, reason, message = status.message(), "refused");
                Err(status)
            }
        }
    }
}

fn peer<T>(request: &Request<T>) -> Result<PeerInfo, Status> {
    request
        .extensions()
        .get::<PeerInfo>()
        .cloned()
        .ok_or_else(|| Status::internal("the connection has no peer"))
}

#[tonic::async_trait]
impl Authority for Service {
    async fn attest(&self, request: Request<AttestRequest>) -> Result<Response<Svid>, Status> {
        let (peer, now) = (peer(&request)?, SystemTime::now());
        let request = request.into_inner();
        // The token first: a stranger must not make the authority compute signatures.
        let signed =
            self.admit(&request, now).and_then(|id| self.sign(&id, &request.node, &request.csr, now));
        // What is revoked holds from the node's first connection on.
        let outcome = signed.map(|svid| Svid { bundle: Some(wire::bundle(&self.bundle.borrow())), ..svid });
        self.answer(&peer, "node", &request.node, outcome)
    }

    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<Svid>, Status> {
        let (peer, now) = (peer(&request)?, SystemTime::now());
        let request = request.into_inner();
        let permitted = self.permit(&peer, &request.spiffe_id, now);
        let kind =
            if permitted.as_ref().is_ok_and(|id| id.node_name().is_some()) { "node" } else { "workload" };
        let node = peer.id().and_then(SpiffeId::node_name).unwrap_or_default();
        let outcome = permitted.and_then(|id| self.sign(&id, node, &request.csr, now));
        self.answer(&peer, kind, &request.spiffe_id, outcome)
    }

    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<Bundle, Status>> + Send>>;

    async fn watch_bundle(
        &self,
        request: Request<WatchBundleRequest>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let peer = peer(&request)?;
        let Some(leaf) = peer.leaf.filter(|leaf| leaf.id.node_name().is_some()) else {
            self.counters.refused("no_client_certificate");
            return Err(Status::unauthenticated("present the node's SVID"));
        };
        let counters = Arc::clone(&self.counters);
        let bundles = WatchStream::new(self.bundle.subscribe()).flat_map(move |bundle| {
            // A node that is revoked meanwhile is told so, with everything else, for the last time.
            let end = bundle.revocations().judge(&leaf).map(|revoked| {
                counters.refused("revoked");
                Err(Status::permission_denied(revoked.to_string()))
            });
            stream::iter([Ok(wire::bundle(&bundle))].into_iter().chain(end))
        });
        Ok(Response::new(Box::pin(bundles)))
    }
}
