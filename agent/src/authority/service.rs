//! What agents may ask: who they are is known, whether they may is decided here.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use prometheus::{IntCounterVec, Opts, Registry, TextEncoder};
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use super::proto::authority_server::Authority;
use super::proto::{AttestRequest, Bundle, IssueRequest, Svid, WatchBundleRequest};
use super::serve::PeerInfo;
use crate::ca::store::{Redeemed, Store};
use crate::ca::{Ca, CaError, ProvenKey};
use crate::directory::Live;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;

/// What the authority counts.
#[derive(Debug)]
pub struct Counters {
    registry: Registry,
    issued: IntCounterVec,
    refused: IntCounterVec,
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
        registry.register(Box::new(issued.clone()))?;
        registry.register(Box::new(refused.clone()))?;
        Ok(Self { registry, issued, refused })
    }

    /// Counts a refusal; `reason` is one of a fixed set.
    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// What is served at a path of the admin address.
    pub fn page(&self, path: &str) -> Option<String> {
        match path {
            "/metrics" => TextEncoder::new().encode_to_string(&self.registry.gather()).ok(),
            "/healthz" | "/readyz" => Some("ok\n".into()),
            _ => None,
        }
    }
}

/// The authority's gRPC service.
pub(super) struct Service {
    ca: Arc<Ca>,
    store: Store,
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
        store: Store,
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
            Ok(Redeemed::Accepted) => Ok(id),
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
    fn permit(&self, peer: &PeerInfo, asked: &str) -> Result<SpiffeId, Refusal> {
        let Some(node) = &peer.id else {
            return Err(Refusal("no_client_certificate", Status::unauthenticated("present the node's SVID")));
        };
        let Some(name) = node.node_name() else {
            let words = format!("{node} is not a node's identity");
            return Err(Refusal("not_a_node", Status::permission_denied(words)));
        };
        let id = SpiffeId::parse(asked)
            .map_err(|e| Refusal("bad_request", Status::invalid_argument(format!("spiffe_id: {e}"))))?;
        if id == *node || self.directory.load().places(&id, name) {
            return Ok(id);
        }
        let words = format!("the directory places no enrolled workload with {id} on node {name}");
        Err(Refusal("not_placed", Status::permission_denied(words)))
    }

    fn sign(&self, id: &SpiffeId, csr: &[u8], now: SystemTime) -> Result<Svid, Refusal> {
        let signed = ProvenKey::from_csr(csr).and_then(|key| self.ca.issue(&key, id, self.lifetime, now));
        match signed {
            Ok(chain) => Ok(Svid {
                chain: chain.iter().map(|c| c.to_vec()).collect(),
                bundle: Some(message(&self.bundle.borrow())),
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
                tracing::info!(peer = %peer.address, node = peer.id.as_ref().map(tracing::field::display), id = asked, "issued");
                Ok(Response::new(svid))
            }
            Err(Refusal(reason, status)) => {
                self.counters.refused(reason);
                tracing::warn!(peer = %peer.address, node = peer.id.as_ref().map(tracing::field::display), id = asked, reason, message = status.message(), "refused");
                Err(status)
            }
        }
    }
}

fn message(bundle: &TrustBundle) -> Bundle {
    Bundle {
        trust_domain: bundle.domain().to_string(),
        roots: bundle.roots().iter().map(|root| root.to_vec()).collect(),
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
        let outcome = self.admit(&request, now).and_then(|id| self.sign(&id, &request.csr, now));
        self.answer(&peer, "node", &request.node, outcome)
    }

    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<Svid>, Status> {
        let (peer, now) = (peer(&request)?, SystemTime::now());
        let request = request.into_inner();
        let permitted = self.permit(&peer, &request.spiffe_id);
        let kind =
            if permitted.as_ref().is_ok_and(|id| id.node_name().is_some()) { "node" } else { "workload" };
        let outcome = permitted.and_then(|id| self.sign(&id, &request.csr, now));
        self.answer(&peer, kind, &request.spiffe_id, outcome)
    }

    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<Bundle, Status>> + Send>>;

    async fn watch_bundle(
        &self,
        request: Request<WatchBundleRequest>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let peer = peer(&request)?;
        if peer.id.as_ref().and_then(SpiffeId::node_name).is_none() {
            self.counters.refused("no_client_certificate");
            return Err(Status::unauthenticated("present the node's SVID"));
        }
        let bundles = WatchStream::new(self.bundle.subscribe()).map(|bundle| Ok(message(&bundle)));
        Ok(Response::new(Box::pin(bundles)))
    }
}
