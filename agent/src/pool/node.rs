//! A stream in node scope: shows our workload's proof, and sends nothing of an application to a
//! destination that has not proven itself on this connection.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use http::HeaderValue;
use tokio::time::timeout;

use super::dial::Dialer;
use super::{Failure, Key};
use crate::hbone::client::{Ask, Identified, Place};
use crate::hbone::{self, PROOF_HEADER, Recv, Stream};
use crate::identity::svid::X509Svid;
use crate::proof::Refusal;
use crate::proof::connection::Proofs;
use crate::tls::roots::{Roots, Verified};
use crate::trust::Snapshot;
use crate::verdict::Reason;

/// What a stream rests on at this moment.
struct Moment<'a> {
    proofs: &'a Arc<Proofs>,
    parties: &'a Key,
    svid: Arc<X509Svid>,
    trust: Arc<Snapshot>,
    roots: Arc<Roots>,
}

/// Opens a stream for `parties`; `None` when the connection closed this instant.
///
/// # Errors
/// When our identity cannot be proven, or the destination's was not. Nothing was sent then.
pub(super) async fn stream(
    dialer: &Dialer,
    place: Place,
    proofs: &Arc<Proofs>,
    parties: &Key,
    ask: Ask,
) -> Result<Option<Stream>, Failure> {
    begin(dialer, proofs, parties, |who| place.open(ask, Some(who))).await
}

/// Has the two workloads prove themselves before they have a stream; does nothing when the connection closed
/// this instant.
///
/// # Errors
/// When one of them cannot, or the peer does not want to know.
pub(super) async fn introduce(
    dialer: &Dialer,
    place: Place,
    proofs: &Arc<Proofs>,
    parties: &Key,
) -> Result<(), Failure> {
    let asked = begin(dialer, proofs, parties, |who| place.introduce(who)).await?;
    let Some(mut asked) = asked else { return Ok(()) };
    let patience = dialer.proof_timeout();
    let answer = timeout(patience, asked.recv.accepted()).await;
    answer.unwrap_or(Err(Reason::HandshakeTimeout)).map_err(|reason| {
        let detail = format!("{} was not introduced to {}", parties.source, parties.destination);
        Failure { reason, detail: detail.into() }
    })
}

/// Asks for something by which both workloads are proven; resolves when the destination is.
async fn begin(
    dialer: &Dialer,
    proofs: &Arc<Proofs>,
    parties: &Key,
    ask: impl FnOnce(Identified<'_>) -> Result<Stream, h2::Error>,
) -> Result<Option<Stream>, Failure> {
    let (svid, trust) = dialer.svid(&parties.source).await?;
    let roots = dialer.roots(&trust)?;
    let mut moment = Moment { proofs, parties, svid, trust, roots };
    let shown = proofs.show(&moment.svid).map_err(|refusal| moment.failure(refusal))?;
    let known = proofs.knows(&parties.destination, &moment.trust, &moment.roots, dialer.now());
    let who = Identified {
        source: &parties.source,
        destination: &parties.destination,
        proof: (!shown.acknowledged.load(Ordering::Acquire)).then_some(&*shown.header),
        acknowledged: &shown.acknowledged,
        want: known.is_err(),
    };
    let Ok(mut stream) = ask(who) else { return Ok(None) };
    let theirs = match known {
        Ok(theirs) => theirs,
        Err(_) => moment.meet(&mut stream, dialer).await?,
    };
    stream.lease = Some(proofs.lease(&theirs, &moment.svid));
    // The connection's own task may have looked through the leases just before this one was among them.
    let now = dialer.trust();
    if now.bundle_epoch != moment.trust.bundle_epoch {
        proofs.cut_revoked(&now);
    }
    Ok(Some(stream))
}

impl Moment<'_> {
    /// Waits for the destination's proof, and judges it by the trust of the moment at which it is there.
    async fn meet(&mut self, stream: &mut Stream, dialer: &Dialer) -> Result<Arc<Verified>, Failure> {
        let patience = dialer.proof_timeout();
        let proof = timeout(patience, self.proof(stream)).await.unwrap_or_else(|_| {
            let detail = format!("no proof of it came within {patience:?} (tunnel.handshakeTimeoutMs)");
            Err(self.failed(Reason::HandshakeTimeout, &detail))
        })?;
        self.trust = dialer.trust();
        self.roots = dialer.roots(&self.trust)?;
        if let Some(revoked) = self.trust.revoked(self.svid.leaf()) {
            return Err(self.failed(Reason::Revoked, &revoked.to_string()));
        }
        let learnt = self.proofs.learn(proof.as_bytes(), &self.trust, &self.roots, dialer.now());
        let theirs = learnt.map_err(|refusal| self.failure(refusal))?;
        if theirs.id != self.parties.destination {
            let detail = format!("{} has proven itself instead", theirs.leaf.id);
            return Err(self.failed(Reason::WrongIdentity, &detail));
        }
        Ok(theirs)
    }

    /// The destination's proof: ahead of the answer, while its agent connects to the application, or in it.
    async fn proof(&self, stream: &mut Stream) -> Result<HeaderValue, Failure> {
        let Recv::Pending(response, shown) = &mut stream.recv else {
            return Err(self.failed(Reason::Internal, "a stream that was answered before it was asked"));
        };
        if let Some(early) = poll_fn(|cx| early(response, cx)).await {
            return Ok(early);
        }
        let response =
            response.await.map_err(|error| self.failed(hbone::reason(&error), &error.to_string()))?;
        let response = hbone::granted(response, shown.as_deref())
            .map_err(|reason| self.failed(reason, "the peer's agent refused the stream"))?;
        let proof = response.headers().get(PROOF_HEADER).cloned();
        stream.recv = Recv::Open(response.into_body());
        proof.ok_or_else(|| self.failed(Reason::Unproven, "it has not proven itself"))
    }

    fn failure(&self, refusal: Refusal) -> Failure {
        self.failed(refusal.reason, &refusal.detail)
    }

    fn failed(&self, reason: Reason, detail: &str) -> Failure {
        let (destination, node) = (&self.parties.destination, self.proofs.peer());
        Failure { reason, detail: format!("{destination} on {node}: {detail}").into() }
    }
}

/// The proof that comes ahead of the answer; `None` when the answer is there first, or the stream's end.
fn early(response: &mut h2::client::ResponseFuture, cx: &mut Context<'_>) -> Poll<Option<HeaderValue>> {
    while let Some(Ok(informational)) = ready!(response.poll_informational(cx)) {
        if let Some(proof) = informational.headers().get(PROOF_HEADER) {
            return Poll::Ready(Some(proof.clone()));
        }
    }
    Poll::Ready(None)
}
