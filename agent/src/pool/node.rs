//! A stream in node scope: shows our workload's proof, and sends nothing of an application to a
//! destination that has not proven itself on this connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;

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
    let (svid, trust) = dialer.svid(&parties.source).await?;
    let roots = dialer.roots(&trust)?;
    let moment = Moment { proofs, parties, svid, trust, roots };
    let shown = proofs.show(&moment.svid).map_err(|refusal| moment.failure(refusal))?;
    let known = proofs.knows(&parties.destination, &moment.trust, &moment.roots, dialer.now());
    let who = Identified {
        source: &parties.source,
        proof: (!shown.acknowledged.load(Ordering::Acquire)).then_some(&*shown.header),
        acknowledged: &shown.acknowledged,
        want: known.is_err(),
    };
    let Ok(mut stream) = place.open(ask, Some(who)) else { return Ok(None) };
    let theirs = match known {
        Ok(theirs) => theirs,
        Err(_) => moment.meet(&mut stream, dialer).await?,
    };
    stream.lease = Some(proofs.lease(&theirs, &moment.svid));
    Ok(Some(stream))
}

impl Moment<'_> {
    /// Waits for the destination's proof.
    async fn meet(&self, stream: &mut Stream, dialer: &Dialer) -> Result<Arc<Verified>, Failure> {
        let Recv::Pending(response, proof) = &mut stream.recv else {
            return Err(self.failed(Reason::Internal, "a stream that was answered before it was asked"));
        };
        let response =
            response.await.map_err(|error| self.failed(hbone::reason(&error), &error.to_string()))?;
        let response = hbone::granted(response, proof.as_deref())
            .map_err(|reason| self.failed(reason, "the peer's agent refused the stream"))?;
        let proof = response.headers().get(PROOF_HEADER);
        let proof = proof.ok_or_else(|| self.failed(Reason::Unproven, "it has not proven itself"))?;
        let learnt = self.proofs.learn(proof.as_bytes(), &self.trust, &self.roots, dialer.now());
        let theirs = learnt.map_err(|refusal| self.failure(refusal))?;
        if theirs.leaf.id != self.parties.destination {
            let detail = format!("{} has proven itself instead", theirs.leaf.id);
            return Err(self.failed(Reason::WrongIdentity, &detail));
        }
        stream.recv = Recv::Open(response.into_body());
        Ok(theirs)
    }

    fn failure(&self, refusal: Refusal) -> Failure {
        self.failed(refusal.reason, &refusal.detail)
    }

    fn failed(&self, reason: Reason, detail: &str) -> Failure {
        let (destination, node) = (&self.parties.destination, self.proofs.peer());
        Failure { reason, detail: format!("{destination} on {node}: {detail}").into() }
    }
}
