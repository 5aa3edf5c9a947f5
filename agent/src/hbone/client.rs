//! The dialling end: one HTTP/2 connection to a peer, and CONNECT streams on it.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use h2::client::{Builder, Connection, SendRequest};
use http::{HeaderMap, HeaderValue, Method, Request, Uri};

use super::{
    CONNECTION_WINDOW, DESTINATION_HEADER, FRAME_BYTES, Lease, MAX_HEADER_BYTES, PROOF_HEADER, Recv,
    SEND_BUFFER_BYTES, SOURCE_HEADER, Stream, WANT_HEADER, forwarded, traffic::Traffic,
};
use crate::identity::SpiffeId;
use crate::tls::stream::{Flush, TlsStream};

/// Stands for "the peer's SETTINGS have not come": no peer announces this number of streams.
const SETTINGS_PENDING: usize = 0x7fff_fff1;

/// What a CONNECT asks for.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// The application's address.
    pub authority: SocketAddr,
    /// The opener's address.
    pub source: SocketAddr,
}

/// Whose stream it is, in node scope.
#[derive(Clone, Copy, Debug)]
pub struct Identified<'a> {
    /// The workload that opens it.
    pub source: &'a SpiffeId,
    /// The workload that it is for.
    pub destination: &'a SpiffeId,
    /// Its proof, if the peer does not have it yet, and where to note that it has.
    pub proof: Option<&'a str>,
    /// Set when the peer grants the stream, unset when it says that it has no proof.
    pub acknowledged: &'a Arc<AtomicBool>,
    /// Whether the peer is to prove the destination.
    pub want: bool,
}

/// A live HTTP/2 connection. When it is dropped and its last stream is gone, the connection closes.
#[derive(Debug)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    /// Cloned into every stream: its count is the number of streams in use.
    place: Arc<Traffic>,
    lease: Arc<Lease>,
}

/// A place for one stream on a tunnel, taken.
#[derive(Debug)]
pub struct Place(Tunnel);

impl Tunnel {
    /// Speaks HTTP/2's preface on an authenticated connection and waits for the peer's SETTINGS.
    ///
    /// Waiting costs nothing that pooled streams would notice, and tells two things: how many
    /// streams the peer allows, and, as TLS 1.3 lets a client finish before the server has looked
    /// at its certificate, that the peer has accepted us.
    ///
    /// The returned future moves the connection's bytes and must be polled for as long as it lives.
    ///
    /// # Errors
    /// When the connection breaks or the peer refuses us.
    pub async fn start(io: TlsStream, stream_window: u32) -> Result<(Self, Driver), h2::Error> {
        let flush = io.defer_flush();
        let (send, connection): (_, Connection<_, Bytes>) = Builder::new()
            .initial_window_size(stream_window)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME_BYTES)
            .max_header_list_size(MAX_HEADER_BYTES)
            .initial_max_send_streams(SETTINGS_PENDING)
            .max_send_buffer_size(SEND_BUFFER_BYTES)
            .enable_push(false)
            .handshake(io)
            .await?;
        let mut driver = Driver { connection, flush };
        poll_fn(|cx| {
            if let Poll::Ready(ended) = Pin::new(&mut driver).poll(cx) {
                return Poll::Ready(ended.and(Err(h2::Reason::NO_ERROR.into())));
            }
            match driver.connection.max_concurrent_send_streams() {
                SETTINGS_PENDING => Poll::Pending,
                _ => Poll::Ready(Ok(())),
            }
        })
        .await?;
        let place = Arc::new(Traffic::new(Instant::now()));
        Ok((Self { send, place, lease: Arc::default() }, driver))
    }

    /// What all its streams share, outside node scope.
    pub fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    /// Streams in use.
    pub fn streams(&self) -> usize {
        Arc::strong_count(&self.place) - 1
    }

    /// Whether one of its streams is, or was a moment ago, bulk.
    pub fn is_bulk(&self, now: Instant) -> bool {
        self.place.is_bulk(now)
    }

    /// Streams the peer allows at once.
    pub fn allowed(&self) -> usize {
        self.send.current_max_send_streams()
    }

    /// Whether the connection can still take streams.
    pub fn is_open(&mut self, cx: &mut Context<'_>) -> bool {
        self.lease.is_cut().is_none() && !matches!(self.send.poll_ready(cx), Poll::Ready(Err(_)))
    }

    /// Takes a place for a stream.
    pub fn place(&self) -> Place {
        let (send, place, lease) = (self.send.clone(), Arc::clone(&self.place), Arc::clone(&self.lease));
        Place(Self { send, place, lease })
    }
}

impl Place {
    /// Opens a stream. Does not wait for the answer: the application's first bytes travel with the
    /// request, and a refusal arrives as an error of the receiving half.
    ///
    /// # Errors
    /// When the connection is closing or broken; nothing was sent then.
    pub fn open(self, ask: Ask, who: Option<Identified<'_>>) -> Result<Stream, h2::Error> {
        self.ask(request(ask, who)?, who, false)
    }

    /// Has two workloads prove themselves, in node scope, without a stream of theirs.
    ///
    /// # Errors
    /// When the connection is closing or broken.
    pub fn introduce(self, who: Identified<'_>) -> Result<Stream, h2::Error> {
        let mut request = Request::new(());
        *request.method_mut() = Method::OPTIONS;
        // What is asked is this connection's other end itself: the name says nothing.
        *request.uri_mut() = Uri::from_static("https://node/");
        identify(who, request.headers_mut())?;
        self.ask(request, Some(who), true)
    }

    fn ask(
        self,
        request: Request<()>,
        who: Option<Identified<'_>>,
        is_all: bool,
    ) -> Result<Stream, h2::Error> {
        let Tunnel { mut send, place, lease } = self.0;
        let (response, send) = send.send_request(request, is_all)?;
        let acknowledged = who.map(|who| Arc::clone(who.acknowledged));
        let recv = Recv::Pending(response, acknowledged);
        Ok(Stream { send, recv, place: Some(place), lease: Some(lease) })
    }
}

/// Moves a connection's bytes; resolves when it has ended. What all its streams had to say in one turn
/// of the thread leaves with one system call.
#[derive(Debug)]
pub struct Driver {
    connection: Connection<TlsStream, Bytes>,
    flush: Flush,
}

impl Future for Driver {
    type Output = Result<(), h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = Pin::new(&mut self.connection).poll(cx);
        // A socket that fails shows in the connection's next read.
        let _ = self.flush.poll(cx);
        ended
    }
}

fn request(ask: Ask, who: Option<Identified<'_>>) -> Result<Request<()>, h2::Error> {
    let mut headers = HeaderMap::new();
    if let Some(value) = forwarded::format(ask.source) {
        headers.insert(forwarded::NAME, value);
    }
    if let Some(who) = who {
        identify(who, &mut headers)?;
    }
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = http::Version::HTTP_2;
    // A socket address is always a valid authority (RFC 9112, section 3.2.3).
    *request.uri_mut() = Uri::builder()
        .authority(ask.authority.to_string())
        .build()
        .map_err(|_| h2::Error::from(h2::Reason::INTERNAL_ERROR))?;
    *request.headers_mut() = headers;
    Ok(request)
}

fn identify(who: Identified<'_>, headers: &mut HeaderMap) -> Result<(), h2::Error> {
    // SPIFFE IDs and proofs are visible ASCII.
    let value =
        |text: &str| HeaderValue::from_str(text).map_err(|_| h2::Error::from(h2::Reason::INTERNAL_ERROR));
    headers.insert(SOURCE_HEADER, value(who.source.as_str())?);
    headers.insert(DESTINATION_HEADER, value(who.destination.as_str())?);
    if let Some(proof) = who.proof {
        let mut proof = value(proof)?;
        // Sent once or twice: not worth a place in the compression's table.
        proof.set_sensitive(true);
        headers.insert(PROOF_HEADER, proof);
    }
    if who.want {
        headers.insert(WANT_HEADER, HeaderValue::from_static("1"));
    }
    Ok(())
}
