//! What agents may ask: who they are is known, whether they may is decided here.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt, stream};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status, Streaming};

use super::counters::Counters;
use super::ledger::{Ledger, Presence};
use super::proto::authority_server::Authority;
use super::proto::{Applied, AttestRequest, Bundle, IssueRequest, Svid};
use super::queue::{Busy, Queue, Slot};
use super::serve::PeerInfo;
use super::wire;
use crate::ca::state::seconds;
use crate::ca::store::{Redeemed, Store, StoreError};
use crate::ca::{BACKDATED, CaError, ProvenKey};
use crate::directory::Live;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::{NodeName, Revoked};
use crate::identity::svid::Leaf;
use crate::identity::{SpiffeId, TrustDomain};

/// The authority's gRPC service.
pub(super) struct Service {
    pub(super) domain: TrustDomain,
    pub(super) ledger: Arc<Ledger>,
    pub(super) queue: Arc<Queue>,
    pub(super) store: Arc<Store>,
    pub(super) directory: Arc<Live>,
    pub(super) lifetime: Duration,
    pub(super) counters: Arc<Counters>,
    pub(super) bundle: watch::Sender<Arc<TrustBundle>>,
}

/// Whoever has waited this long is told to come back, well before either side gives the request up.
const LONGEST_WAIT: Duration = Duration::from_secs(7);
/// How often the log says how many SVIDs were issued, if there were any.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// How often a node is listened to.
const LISTEN_EVERY: Duration = Duration::from_millis(100);

/// What is to be signed, and for whom.
pub(super) struct Asked<'a> {
    pub(super) id: &'a SpiffeId,
    pub(super) node: &'a str,
    /// At most the configured one.
    pub(super) lifetime: Duration,
    /// When what the node holds for it ends, by its own word: it can only put its own requests in order.
    pub(super) held_until: u64,
}

/// Leaf first.
pub(super) type Chain = Vec<CertificateDer<'static>>;

/// A refusal: its label, and what the agent is told.
pub(super) struct Refusal(pub(super) &'static str, pub(super) Status);

impl Service {
    /// Whom a join token is for. It is used up when its SVID is signed ([`Service::redeem`]), or at once where
    /// somebody has it who should not: whoever is told to come back, or sends a bad CSR, has it still.
    fn admit(&self, request: &AttestRequest, now: SystemTime) -> Result<SpiffeId, Refusal> {
        let id = SpiffeId::node(&self.domain, &request.node)
            .map_err(|e| Refusal("bad_request", Status::invalid_argument(format!("node: {e}"))))?;
        let good = self.store.peek(&request.join_token, &request.node, now);
        let admitted = self.judge(good, request).and_then(|()| self.unbanned(&id, &request.node, now));
        if admitted.is_err() {
            self.redeem(request, now)?;
        }
        admitted.map(|()| id)
    }

    fn redeem(&self, request: &AttestRequest, now: SystemTime) -> Result<(), Refusal> {
        self.judge(self.store.redeem(&request.join_token, &request.node, now), request)
    }

    fn judge(&self, token: Result<Redeemed, StoreError>, request: &AttestRequest) -> Result<(), Refusal> {
        // The same words for every kind of bad token: a stranger learns nothing by trying.
        let denied = || {
            Status::permission_denied(format!(
                "the join token is not valid for node {}; make a new one with `hauberk authority token`",
                request.node
            ))
        };
        match token {
            Ok(Redeemed::Accepted) => Ok(()),
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
    pub(super) fn permit(&self, peer: &PeerInfo, asked: &str, now: SystemTime) -> Result<SpiffeId, Refusal> {
        let Some(leaf) = &peer.leaf else {
            return Err(Refusal("no_client_certificate", Status::unauthenticated("present the node's SVID")));
        };
        // It may have expired or been revoked since it connected.
        if leaf.not_after <= now {
            let words = "the node's SVID has expired; connect with a new one";
            return Err(Refusal("expired", Status::unauthenticated(words)));
        }
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

    /// Signs what has been permitted, when it is its node's turn.
    pub(super) async fn sign(
        &self,
        asked: Asked<'_>,
        csr: Vec<u8>,
        now: SystemTime,
    ) -> Result<Chain, Refusal> {
        let name = NodeName::parse(asked.node)
            .map_err(|e| Refusal("bad_request", Status::invalid_argument(e.to_string())))?;
        let slot = self.queue.admit(&name, csr.len()).map_err(busy)?;
        let signing = self.sign_in(&slot, name, asked, csr, now);
        timeout(LONGEST_WAIT, signing).await.unwrap_or_else(|_| Err(busy(self.queue.busy())))
    }

    async fn sign_in(
        &self,
        slot: &Slot,
        name: NodeName,
        asked: Asked<'_>,
        csr: Vec<u8>,
        now: SystemTime,
    ) -> Result<Chain, Refusal> {
        let ca = self.ledger.begin(&name, now).await.map_err(|error| {
            let words =
                format!("the authority cannot write down what it issues, and so issues nothing: {error}");
            Refusal("store", Status::unavailable(words))
        })?;
        // A policy may shorten a life, never prolong it.
        let most = self.directory.load().svid_lifetime(asked.id, asked.node).unwrap_or(self.lifetime);
        let (id, lifetime) = (asked.id.clone(), asked.lifetime.min(self.lifetime).min(most));
        let urgent = asked.held_until < seconds(now + lifetime / 4);
        let work = move || {
            // The dear part.
            let key = ProvenKey::for_id(&csr, &id)?;
            ca.issue_to(&key, &id, Some(name.as_str()), lifetime, now)
        };
        match slot.run(asked.held_until, urgent, work).await {
            Some(Ok(chain)) => Ok(chain),
            Some(Err(CaError::Csr(error))) => {
                Err(Refusal(error.reason(), Status::invalid_argument(error.to_string())))
            }
            Some(Err(error)) => {
                tracing::error!(%error, "cannot sign");
                Err(Refusal("internal", Status::internal(error.to_string())))
            }
            None => Err(Refusal("internal", Status::internal("the authority failed; see its log"))),
        }
    }

    /// An answer for a node that has roots of a `known` generation.
    fn svid(&self, chain: &[CertificateDer<'_>], known: u64) -> Svid {
        let bundle = self.bundle.borrow();
        Svid {
            chain: chain.iter().map(|c| c.to_vec()).collect(),
            bundle: (known == 0 || known != bundle.generation()).then(|| wire::roots(&bundle)),
        }
    }

    /// Logs and counts what became of a request.
    pub(super) fn answer<T>(
        &self,
        peer: &PeerInfo,
        kind: &str,
        asked: &str,
        outcome: Result<T, Refusal>,
    ) -> Result<Response<T>, Status> {
        match outcome {
            Ok(svid) => {
                self.counters.issued(kind, SystemTime::now());
                // For a fleet these are many: what is told of all of them is [`tell_of_issued`]'s.
                tracing::debug!(peer = %peer.address, node = peer.id().map(tracing::field::display), id = asked, "issued");
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

/// Runs for ever: says now and then how many SVIDs were issued.
pub(super) async fn tell_of_issued(counters: Arc<Counters>) {
    let mut told = 0;
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        let (issued, lately) = counters.issued_so_far(SystemTime::now());
        if issued > told {
            tracing::info!(
                new = issued - told,
                in_last_minute = lately,
                since_start = issued,
                "SVIDs issued"
            );
            told = issued;
        }
    }
}

/// For metrics.
pub(super) fn kind(id: &SpiffeId) -> &'static str {
    if id.node_name().is_some() { "node" } else { "workload" }
}

/// Tells whoever finds no room when to come back.
fn busy(Busy { retry_after }: Busy) -> Refusal {
    let seconds = retry_after.as_secs().max(1);
    let words = format!("too much waits to be signed; ask again in {seconds} s");
    let mut status = Status::resource_exhausted(words);
    status.metadata_mut().insert("retry-after", seconds.into());
    Refusal("busy", status)
}

pub(super) fn peer<T>(request: &Request<T>) -> Result<PeerInfo, Status> {
    request
        .extensions()
        .get::<PeerInfo>()
        .cloned()
        .ok_or_else(|| Status::internal("the connection has no peer"))
}

/// The node that opens a stream, by the certificate that it has shown.
pub(super) fn node<T>(request: &Request<T>, counters: &Counters) -> Result<(Arc<Leaf>, NodeName), Status> {
    let node = peer(request)?.leaf.and_then(|leaf| {
        let name = NodeName::parse(leaf.id.node_name()?).ok()?;
        Some((leaf, name))
    });
    node.ok_or_else(|| {
        counters.refused("no_client_certificate");
        Status::unauthenticated("present the node's SVID")
    })
}

/// For a node that has as many streams as it may.
pub(super) fn too_many_streams(counters: &Counters) -> Status {
    counters.refused("busy");
    Status::resource_exhausted("this node has too many streams open; close some")
}

#[tonic::async_trait]
impl Authority for Service {
    async fn attest(&self, request: Request<AttestRequest>) -> Result<Response<Svid>, Status> {
        let (peer, now) = (peer(&request)?, SystemTime::now());
        let request = request.into_inner();
        // The token first: a stranger must not make the authority compute signatures.
        let signed = match self.admit(&request, now) {
            Ok(id) => {
                let asked = Asked { id: &id, node: &request.node, lifetime: self.lifetime, held_until: 0 };
                let signed = self.sign(asked, request.csr.clone(), now).await;
                // Of two who present one token at once, one is given what was signed.
                signed.and_then(|chain| self.redeem(&request, now).map(|()| self.svid(&chain, 0)))
            }
            Err(refusal) => Err(refusal),
        };
        // What is revoked holds from the node's first connection on.
        let outcome = signed.map(|svid| Svid { bundle: Some(wire::bundle(&self.bundle.borrow())), ..svid });
        self.answer(&peer, "node", &request.node, outcome)
    }

    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<Svid>, Status> {
        let (peer, now) = (peer(&request)?, SystemTime::now());
        let request = request.into_inner();
        let permitted = self.permit(&peer, &request.spiffe_id, now);
        let kind = permitted.as_ref().map_or("workload", kind);
        let node = peer.id().and_then(SpiffeId::node_name).unwrap_or_default();
        let outcome = match permitted {
            Ok(id) => {
                let held_until = request.held_until;
                let asked = Asked { id: &id, node, lifetime: self.lifetime, held_until };
                self.sign(asked, request.csr, now).await.map(|chain| self.svid(&chain, request.generation))
            }
            Err(refusal) => Err(refusal),
        };
        self.answer(&peer, kind, &request.spiffe_id, outcome)
    }

    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<Bundle, Status>> + Send>>;

    async fn watch_bundle(
        &self,
        request: Request<Streaming<Applied>>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        let (leaf, name) = node(&request, &self.counters)?;
        let present = self.ledger.connect(name.clone(), leaf.not_after, SystemTime::now());
        let present = present.ok_or_else(|| too_many_streams(&self.counters))?;
        tokio::spawn(listen(Arc::clone(&self.ledger), name, present, request.into_inner()));
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

/// Hears from a node what it has applied, for as long as it is connected.
async fn listen(ledger: Arc<Ledger>, node: NodeName, present: Presence, mut said: Streaming<Applied>) {
    while let Ok(Some(Applied { generation })) = said.message().await {
        ledger.applied(&node, generation, SystemTime::now());
        // Each word may be a write to the disk.
        tokio::time::sleep(LISTEN_EVERY).await;
    }
    drop(present);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_finds_no_room_is_told_when_to_come_back_in_the_words_that_agents_read() {
        let Refusal(reason, status) = busy(Busy { retry_after: Duration::from_millis(7_900) });
        assert_eq!((reason, status.code()), ("busy", tonic::Code::ResourceExhausted));
        assert_eq!(status.metadata().get("retry-after").unwrap(), "7");
        let Refusal(_, status) = busy(Busy { retry_after: Duration::from_millis(1) });
        assert_eq!(status.metadata().get("retry-after").unwrap(), "1", "never at once");
    }
}
