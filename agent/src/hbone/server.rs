//! The accepting end: HTTP/2's limits, and what a CONNECT request says.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::pin;

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use h2::{RecvStream, SendStream};
use http::{HeaderValue, Method, Request, Response, StatusCode};

use super::{
    CONNECTION_WINDOW, DESTINATION_HEADER, FRAME_BYTES, MAX_HEADER_BYTES, PROOF_HEADER, REASON_HEADER,
    SEND_BUFFER_BYTES, SOURCE_HEADER, WANT_HEADER, forwarded, status,
};
use crate::tls::stream::{Flush, TlsStream};
use crate::verdict::Reason;

/// Streams that a peer may open and reset before we have looked at them. More is HTTP/2 rapid reset
/// (CVE-2023-44487) and ends the connection. Applications that connect and abort make a few.
const MAX_PENDING_RESETS: usize = 256;

/// What a peer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// The application's address.
    pub authority: SocketAddr,
    /// The opener's address, as the peer claims it.
    pub source: Option<SocketAddr>,
}

/// Speaks HTTP/2's preface on an authenticated connection.
///
/// # Errors
/// When the peer does not speak HTTP/2, or breaks the connection.
pub async fn start(io: TlsStream, stream_window: u32, max_streams: u32) -> Result<Tunnel, h2::Error> {
    let flush = io.defer_flush();
    let handshake = Builder::new()
        .initial_window_size(stream_window)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME_BYTES)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_concurrent_streams(max_streams)
        .max_pending_accept_reset_streams(MAX_PENDING_RESETS)
        .max_send_buffer_size(SEND_BUFFER_BYTES)
        .handshake(io);
    let mut handshake = pin!(handshake);
    let connection = poll_fn(|cx| {
        let done = handshake.as_mut().poll(cx);
        // A socket that fails shows in the connection's next read.
        let _ = flush.poll(cx);
        done
    });
    Ok(Tunnel { connection: connection.await?, flush })
}

/// A live HTTP/2 connection that a peer opens streams on. It moves bytes only while
/// [`Tunnel::accept`] is waited for.
#[derive(Debug)]
pub struct Tunnel {
    connection: Connection<TlsStream, Bytes>,
    flush: Flush,
}

impl Tunnel {
    /// The next request; `None` when the connection has ended.
    pub async fn accept(&mut self) -> Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>> {
        poll_fn(|cx| {
            let accepted = self.connection.poll_accept(cx);
            if accepted.is_pending() {
                // What all streams had to say in this turn of the thread leaves with one system call.
                let _ = self.flush.poll(cx);
            }
            accepted
        })
        .await
    }

    /// Ends the connection and all its streams, telling the peer why; resolves when that is sent.
    pub async fn abort(&mut self, why: h2::Reason) {
        self.connection.abrupt_shutdown(why);
        poll_fn(|cx| {
            let closed = self.connection.poll_closed(cx);
            let _ = self.flush.poll(cx);
            closed.map(drop)
        })
        .await;
    }

    /// Asks the peer to open no more streams; those that are open go on.
    pub fn graceful_shutdown(&mut self) {
        self.connection.graceful_shutdown();
    }
}

/// Reads a request.
///
/// # Errors
/// [`Reason::BadRequest`] for anything but `CONNECT address:port`.
pub fn parse<B>(request: &Request<B>) -> Result<Asked, Reason> {
    if request.method() != Method::CONNECT || request.extensions().get::<h2::ext::Protocol>().is_some() {
        return Err(Reason::BadRequest);
    }
    let authority = request.uri().authority().ok_or(Reason::BadRequest)?;
    let authority: SocketAddr = authority.as_str().parse().map_err(|_| Reason::BadRequest)?;
    if authority.port() == 0 {
        return Err(Reason::BadRequest);
    }
    let authority = SocketAddr::new(authority.ip().to_canonical(), authority.port());
    let source = request.headers().get(forwarded::NAME).and_then(|v| forwarded::parse(v.as_bytes()));
    Ok(Asked { authority, source })
}

/// Whether no stream is asked for, only that two workloads prove themselves to each other's node (node scope).
pub fn is_introduction<B>(request: &Request<B>) -> bool {
    request.method() == Method::OPTIONS
}

/// Grants an introduction.
pub fn met(mut respond: SendResponse<Bytes>) {
    // The peer may be gone; then there is nobody to tell.
    let _ = respond.send_response(Response::new(()), true);
}

/// Grants a request: the stream is open.
///
/// # Errors
/// When the peer has given it up meanwhile.
pub fn accept(mut respond: SendResponse<Bytes>) -> Result<SendStream<Bytes>, h2::Error> {
    respond.send_response(Response::new(()), false)
}

/// Sends the destination's proof ahead of the answer (RFC 9110, section 15.2), in node scope.
///
/// # Errors
/// When the peer has given the request up meanwhile.
pub fn prove(respond: &mut SendResponse<Bytes>, proof: &str) -> Result<(), h2::Error> {
    let value = HeaderValue::from_str(proof).map_err(|_| h2::Error::from(h2::Reason::INTERNAL_ERROR));
    let mut value = value?;
    value.set_sensitive(true);
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::EARLY_HINTS;
    response.headers_mut().insert(PROOF_HEADER, value);
    respond.send_informational(response)
}

/// What a request says of workloads, in node scope.
#[derive(Clone, Copy, Debug)]
pub struct Identified<'a> {
    /// Whose stream it is.
    pub source: &'a str,
    /// Whom it is for.
    pub destination: &'a str,
    /// The proof of that, if it comes along.
    pub proof: Option<&'a [u8]>,
    /// Whether the destination is to be proven.
    pub want: bool,
}

/// Reads the headers of node scope.
///
/// # Errors
/// [`Reason::Unproven`] when there is no source, [`Reason::BadRequest`] when there is no destination.
pub fn identified<B>(request: &Request<B>) -> Result<Identified<'_>, Reason> {
    let headers = request.headers();
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    Ok(Identified {
        source: text(SOURCE_HEADER).ok_or(Reason::Unproven)?,
        destination: text(DESTINATION_HEADER).ok_or(Reason::BadRequest)?,
        proof: headers.get(PROOF_HEADER).map(HeaderValue::as_bytes),
        want: headers.contains_key(WANT_HEADER),
    })
}

/// Refuses a request, and says why in a status and in our own word.
pub fn refuse(mut respond: SendResponse<Bytes>, body: RecvStream, reason: Reason) {
    let mut response = Response::new(());
    *response.status_mut() = status(reason);
    response.headers_mut().insert(REASON_HEADER, HeaderValue::from_static(reason.as_str()));
    // The peer may be gone; then there is nobody to tell.
    let _ = respond.send_response(response, true);
    drop(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(authority: &str) -> Result<Asked, Reason> {
        let uri = http::Uri::builder().authority(authority).build().map_err(|_| Reason::BadRequest)?;
        parse(&Request::builder().method(Method::CONNECT).uri(uri).body(()).expect("valid"))
    }

    #[test]
    fn only_an_address_with_a_port_is_an_authority() {
        assert_eq!(connect("10.0.0.1:80").expect("valid").authority, "10.0.0.1:80".parse().unwrap());
        assert_eq!(connect("[fd00::1]:80").expect("valid").authority, "[fd00::1]:80".parse().unwrap());
        for bad in ["10.0.0.1", "10.0.0.1:0", "web.shop:80", "10.0.0.1:99999", "u@10.0.0.1:80", "[::1"] {
            assert_eq!(connect(bad), Err(Reason::BadRequest), "{bad}");
        }
    }

    #[test]
    fn a_mapped_address_is_the_address_it_maps() {
        let asked = connect("[::ffff:10.0.0.1]:80").expect("valid");
        assert_eq!(asked.authority, "10.0.0.1:80".parse().unwrap());
    }

    #[test]
    fn other_methods_are_refused() {
        let get = Request::get("http://10.0.0.1:80/").body(()).expect("valid");
        assert_eq!(parse(&get), Err(Reason::BadRequest));
    }
}
