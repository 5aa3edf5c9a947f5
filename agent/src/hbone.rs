//! HBONE: HTTP/2 CONNECT over mutual TLS (RFC 9113, section 8.5), as Istio ambient speaks it.
//!
//! `client` opens streams, `server` reads requests. Neither knows who is allowed what, and neither
//! moves payload: that is `relay`.

pub mod client;
pub mod forwarded;
pub mod lease;
pub mod server;
pub mod term;
pub mod traffic;

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::StatusCode;

use crate::verdict::Reason;
pub use lease::Lease;
pub use term::Term;
use traffic::Traffic;

/// The response header that says why a CONNECT was refused: one of [`Reason`]'s labels.
pub const REASON_HEADER: &str = "hauberk-reason";
/// The request header that says, in node scope, which workload opens the stream.
pub const SOURCE_HEADER: &str = "hauberk-source";
/// The request header that says, in node scope, whom the stream is for: an address alone may be another's by
/// the time that it arrives.
pub const DESTINATION_HEADER: &str = "hauberk-destination";
/// The header of request and response that proves a workload's identity in node scope.
pub const PROOF_HEADER: &str = "hauberk-proof";
/// The request header by which the response is asked to prove the destination.
pub const WANT_HEADER: &str = "hauberk-want";

/// Largest DATA payload, sent and accepted. With its 9-byte frame header it fills eight TLS records
/// of 16 KiB exactly: one frame is one `write`, and wakes its reader once.
pub const FRAME_BYTES: u32 = 128 * 1024 - 9;

/// HTTP/2's largest window (RFC 9113, section 6.9.1). A connection's window is never the limit, or a
/// stalled stream could starve its neighbours; each stream's own window bounds what it can hold.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Largest header block accepted, in bytes: a CONNECT with the largest identity proof (12 KiB).
pub const MAX_HEADER_BYTES: u32 = 16 * 1024;

/// Most bytes that one stream may have waiting for the connection to send them. Less than a window, so
/// that an application is read while its earlier bytes are on their way; a quarter of this cost a
/// tenth of a bulk stream's throughput.
pub const SEND_BUFFER_BYTES: usize = 1024 * 1024;

/// How long a tunnel that is cut may still send, so that the peer learns why. It need not read it.
pub const LAST_WORDS: Duration = Duration::from_millis(250);

/// Both halves of one tunnelled connection.
#[derive(Debug)]
pub struct Stream {
    /// Towards the peer.
    pub send: SendStream<Bytes>,
    /// From the peer.
    pub recv: Recv,
    /// Its place on a pooled tunnel, which counts them and what they move; `None` on the accepting side.
    pub place: Option<Arc<Traffic>>,
    /// Cut when one of the certificates that it rests on is revoked, or expired long ago. `None` for a stream
    /// that nobody cuts.
    pub lease: Option<Arc<Lease>>,
}

/// The receiving half. A client's comes only with the response, which it does not wait for.
#[derive(Debug)]
pub enum Recv {
    /// The response is on its way; in node scope it tells whether the peer has our proof.
    Pending(h2::client::ResponseFuture, Option<Arc<AtomicBool>>),
    /// Open.
    Open(RecvStream),
}

impl Recv {
    /// The payload, once the peer has accepted the stream.
    ///
    /// # Errors
    /// Why it was refused, or what became of the tunnel meanwhile.
    pub fn poll_accepted(&mut self, cx: &mut Context<'_>) -> Poll<Result<&mut RecvStream, Reason>> {
        if let Self::Pending(response, proof) = self {
            let response = ready!(Pin::new(response).poll(cx)).map_err(|error| reason(&error))?;
            let response = granted(response, proof.as_deref())?;
            *self = Self::Open(response.into_body());
        }
        match self {
            Self::Open(body) => Poll::Ready(Ok(body)),
            Self::Pending(..) => Poll::Pending,
        }
    }

    /// Waits until the peer has accepted the stream.
    ///
    /// # Errors
    /// As [`Recv::poll_accepted`].
    pub async fn accepted(&mut self) -> Result<(), Reason> {
        poll_fn(|cx| self.poll_accepted(cx).map_ok(drop)).await
    }
}

/// The answer to a CONNECT, if it grants the stream; in node scope, notes whether the peer has our `proof`.
///
/// # Errors
/// Why the peer refuses.
pub fn granted(
    response: http::Response<RecvStream>,
    proof: Option<&AtomicBool>,
) -> Result<http::Response<RecvStream>, Reason> {
    let refused = (response.status() != StatusCode::OK).then(|| refusal(&response));
    if let Some(proof) = proof
        && matches!(refused, None | Some(Reason::Unproven))
    {
        proof.store(refused.is_none(), Ordering::Release);
    }
    refused.map_or(Ok(response), Err)
}

/// What a refused CONNECT is answered with (RFC 9110, section 15).
pub fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::BadRequest => StatusCode::BAD_REQUEST,
        Reason::NotLocal
        | Reason::AgentPort
        | Reason::Loop
        | Reason::WrongIdentity
        | Reason::Revoked
        | Reason::NotPlaced
        | Reason::DeniedByPolicy => StatusCode::FORBIDDEN,
        Reason::BadProof | Reason::Unproven | Reason::Expired | Reason::UnknownIssuer => {
            StatusCode::UNAUTHORIZED
        }
        Reason::ConnectTimeout => StatusCode::GATEWAY_TIMEOUT,
        Reason::Refused | Reason::Unreachable => StatusCode::BAD_GATEWAY,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Why a peer refused a CONNECT: its own word if it is an agent of ours, else read off the status.
fn refusal(response: &http::Response<RecvStream>) -> Reason {
    let word = response.headers().get(REASON_HEADER).and_then(|value| value.to_str().ok());
    let known = word.and_then(|word| Reason::ALL.iter().find(|reason| reason.as_str() == word));
    match (known, response.status()) {
        (Some(reason), _) => *reason,
        (None, StatusCode::BAD_REQUEST) => Reason::BadRequest,
        (None, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Reason::NotLocal,
        (None, StatusCode::GATEWAY_TIMEOUT) => Reason::ConnectTimeout,
        _ => Reason::Refused,
    }
}

/// The HTTP/2 error code of a stream that an access policy ended. Not one of RFC 9113's, so any other
/// peer takes it for an internal error (section 7), which ends the stream as well.
const DENIED_BY_POLICY: u32 = 0x6862_6b01;
/// The same for one whose connection's certificates expired long ago.
const EXPIRED: u32 = 0x6862_6b02;

/// The HTTP/2 error code that tells a peer why its stream or tunnel is ended (RFC 9113, section 7).
pub fn code(reason: Reason) -> h2::Reason {
    match reason {
        // Nothing else says it here: below HTTP/2 there is always mutual TLS 1.3.
        Reason::Revoked => h2::Reason::INADEQUATE_SECURITY,
        Reason::DeniedByPolicy => DENIED_BY_POLICY.into(),
        Reason::Expired => EXPIRED.into(),
        _ => h2::Reason::CANCEL,
    }
}

/// What a peer means by a stream's reset.
pub fn reset_reason(code: h2::Reason) -> Reason {
    match code {
        h2::Reason::REFUSED_STREAM => Reason::Overload,
        h2::Reason::INADEQUATE_SECURITY => Reason::Revoked,
        _ if u32::from(code) == DENIED_BY_POLICY => Reason::DeniedByPolicy,
        _ if u32::from(code) == EXPIRED => Reason::Expired,
        _ => Reason::PeerReset,
    }
}

/// Why an HTTP/2 connection or stream ended, from h2's error.
pub fn reason(error: &h2::Error) -> Reason {
    // Also of a whole connection.
    if let Some(why) =
        [Reason::Revoked, Reason::Expired].into_iter().find(|why| error.reason() == Some(code(*why)))
    {
        return why;
    }
    if error.is_reset() && error.is_remote() {
        return error.reason().map_or(Reason::PeerReset, reset_reason);
    }
    if error.is_io() || error.is_go_away() && error.is_remote() {
        return Reason::TunnelLost;
    }
    Reason::Http2
}
