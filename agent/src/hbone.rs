//! HBONE: HTTP/2 CONNECT over mutual TLS (RFC 9113, section 8.5), as Istio ambient speaks it.
//!
//! `client` opens streams, `server` reads requests. Neither knows who is allowed what, and neither
//! moves payload: that is `relay`.

pub mod client;
pub mod forwarded;
pub mod server;
pub mod transport;

use std::sync::Arc;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::StatusCode;

use crate::verdict::Reason;
pub use transport::Transport;

/// The response header that says why a CONNECT was refused: one of [`Reason`]'s labels.
pub const REASON_HEADER: &str = "hauberk-reason";

/// What rustls may hold encrypted before it is written, in bytes.
pub const TLS_BUFFER_BYTES: usize = 256 * 1024;

/// Largest DATA payload, sent and accepted. With its 9-byte frame header it fills sixteen TLS records
/// of 16 KiB exactly, and [`TLS_BUFFER_BYTES`] once: one frame is one `writev`, and wakes its reader
/// once.
pub const FRAME_BYTES: u32 = TLS_BUFFER_BYTES as u32 - 9;

/// HTTP/2's largest window (RFC 9113, section 6.9.1). A connection's window is never the limit, or a
/// stalled stream could starve its neighbours; each stream's own window bounds what it can hold.
pub const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Largest header block accepted, in bytes: a CONNECT with its few headers needs a tenth.
pub const MAX_HEADER_BYTES: u32 = 8 * 1024;

/// Most bytes that one stream may have waiting for the connection to send them. Less than a window, so
/// that an application is read while its earlier bytes are on their way; a quarter of this cost a
/// tenth of a bulk stream's throughput.
pub const SEND_BUFFER_BYTES: usize = 1024 * 1024;

/// Both halves of one tunnelled connection.
#[derive(Debug)]
pub struct Stream {
    /// Towards the peer.
    pub send: SendStream<Bytes>,
    /// From the peer.
    pub recv: Recv,
    /// Holds a place on a pooled connection; `None` on the accepting side.
    pub lease: Option<Arc<()>>,
}

/// The receiving half. A client's comes only with the response, which it does not wait for.
#[derive(Debug)]
pub enum Recv {
    /// The response is on its way.
    Pending(h2::client::ResponseFuture),
    /// Open.
    Open(RecvStream),
}

/// What a refused CONNECT is answered with (RFC 9110, section 15).
pub fn status(reason: Reason) -> StatusCode {
    match reason {
        Reason::BadRequest => StatusCode::BAD_REQUEST,
        Reason::NotLocal
        | Reason::AgentPort
        | Reason::Loop
        | Reason::WrongIdentity
        | Reason::DeniedByPolicy => StatusCode::FORBIDDEN,
        Reason::ConnectTimeout => StatusCode::GATEWAY_TIMEOUT,
        Reason::Refused | Reason::Unreachable => StatusCode::BAD_GATEWAY,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Why a peer refused a CONNECT: its own word if it is an agent of ours, else read off the status.
pub fn refusal(response: &http::Response<RecvStream>) -> Reason {
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

/// What a stream is reset with.
pub fn reset_code(reason: Reason) -> h2::Reason {
    match reason {
        Reason::DeniedByPolicy => DENIED_BY_POLICY.into(),
        _ => h2::Reason::CANCEL,
    }
}

/// What a peer means by a stream's reset.
pub fn reset_reason(code: h2::Reason) -> Reason {
    match code {
        h2::Reason::REFUSED_STREAM => Reason::Overload,
        _ if u32::from(code) == DENIED_BY_POLICY => Reason::DeniedByPolicy,
        _ => Reason::PeerReset,
    }
}

/// Why an HTTP/2 connection or stream ended, from h2's error.
pub fn reason(error: &h2::Error) -> Reason {
    if error.is_reset() && error.is_remote() {
        return error.reason().map_or(Reason::PeerReset, reset_reason);
    }
    if error.is_io() || error.is_go_away() && error.is_remote() {
        return Reason::TunnelLost;
    }
    Reason::Http2
}
