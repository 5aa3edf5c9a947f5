//! The authority's listener: TLS with a deadline, the peer's identity, then gRPC.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::counters::Counters;
use super::directory::{self, Telling};
use super::istio::Istio;
use super::keeper::Own;
use super::proto::authority_server::AuthorityServer;
use super::service::Service;
use crate::ca::{MAX_CSR_BYTES, ProvenKey};
use crate::directory::stream::proto::directory_server::DirectoryServer;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::{Leaf, X509Svid};
use crate::issue::Keypair;
use crate::issue::istio::proto::istio_certificate_service_server::IstioCertificateServiceServer;
use crate::tls;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Peers in a handshake at once: what an unauthenticated crowd can make the authority compute.
const MAX_HANDSHAKES: usize = 64;
/// Requests of one connection at once; how many there are of all is the queue's to bound.
const MAX_STREAMS: u32 = 256;
/// The longest request for the directory: two numbers, and room for what later versions say.
const MAX_ASKED_BYTES: usize = 1024;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The authority's own SVID; it signs it itself, so it can be short.
pub(super) const OWN_LIFETIME: Duration = Duration::from_secs(3600);

/// Serves until `stop`, then lets open requests finish.
pub(super) async fn serve(
    listener: TcpListener,
    (service, telling): (Service, Arc<Telling>),
    own: watch::Receiver<Arc<Own>>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    counters: Arc<Counters>,
    stop: CancellationToken,
) -> Result<()> {
    let (accepted, incoming) = mpsc::channel::<io::Result<Authenticated>>(16);
    let own = Arc::new(OwnIdentity::new(own, bundle)?);
    // Ends with this, however this ends.
    let mut accepting = JoinSet::new();
    accepting.spawn(accept(listener, own, accepted, counters));
    let service = Arc::new(service);
    let istio = IstioCertificateServiceServer::new(Istio(Arc::clone(&service)));
    let service = AuthorityServer::from_arc(service).max_decoding_message_size(2 * MAX_CSR_BYTES);
    let served = Server::builder()
        .timeout(REQUEST_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(8 * 1024)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(service)
        .add_service(
            DirectoryServer::new(directory::Server(telling)).max_decoding_message_size(MAX_ASKED_BYTES),
        )
        .add_service(istio.max_decoding_message_size(2 * MAX_CSR_BYTES))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop.cancelled_owned())
        .await;
    Ok(served?)
}

async fn accept(
    listener: TcpListener,
    own: Arc<OwnIdentity>,
    accepted: mpsc::Sender<io::Result<Authenticated>>,
    counters: Arc<Counters>,
) {
    let permits = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some((tcp, address, permit)) = next(&listener, &permits).await {
        let (own, accepted, counters) = (Arc::clone(&own), accepted.clone(), Arc::clone(&counters));
        tokio::spawn(async move {
            let shaken = timeout(HANDSHAKE_TIMEOUT, authenticate(&own, tcp, address)).await;
            drop(permit);
            match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                // The receiver is gone only when the authority is stopping.
                Ok(authenticated) => drop(accepted.send(Ok(authenticated)).await),
                Err(error) => {
                    let reason = tls::reason(&error);
                    counters.refused(reason.as_str());
                    tracing::warn!(peer = %address, reason = reason.as_str(), %error, "TLS handshake failed");
                }
            }
        });
    }
}

/// The next connection, when there is room for one more; the room is its own until the permit is dropped.
pub(super) async fn next(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    // Never closed, so this always gives one in the end.
    let permit = Arc::clone(permits).acquire_owned().await.ok()?;
    loop {
        match listener.accept().await {
            Ok((tcp, address)) => return Some((tcp, address, permit)),
            Err(error) => {
                tracing::warn!(%error, at = listener.local_addr().ok().map(tracing::field::display), "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn authenticate(own: &OwnIdentity, tcp: TcpStream, address: SocketAddr) -> io::Result<Authenticated> {
    tcp.set_nodelay(true)?;
    let config = own.config(SystemTime::now()).map_err(io::Error::other)?;
    let io = TlsAcceptor::from(config).accept(tcp).await?;
    let leaf = io.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let leaf = match leaf {
        Some(leaf) => Some(Arc::new(Leaf::from_der(leaf).map_err(io::Error::other)?)),
        None => None,
    };
    Ok(Authenticated { io, peer: PeerInfo { leaf, address } })
}

/// The authority's own SVID, made anew at half of its life, and whom it accepts now.
struct OwnIdentity {
    own: watch::Receiver<Arc<Own>>,
    bundle: watch::Receiver<Arc<TrustBundle>>,
    now: Mutex<Option<Made>>,
}

/// A TLS configuration, when it was made, and what it was made from.
struct Made {
    at: SystemTime,
    own: Arc<Own>,
    bundle: Arc<TrustBundle>,
    config: Arc<ServerConfig>,
}

impl OwnIdentity {
    fn new(own: watch::Receiver<Arc<Own>>, bundle: watch::Receiver<Arc<TrustBundle>>) -> Result<Self> {
        let own = Self { own, bundle, now: Mutex::new(None) };
        own.config(SystemTime::now())?;
        Ok(own)
    }

    fn config(&self, now: SystemTime) -> Result<Arc<ServerConfig>> {
        // Replaced whole, so a panic elsewhere leaves a good one.
        let mut held = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let (own, bundle) = (Arc::clone(&self.own.borrow()), Arc::clone(&self.bundle.borrow()));
        if let Some(made) = held.as_ref()
            && Arc::ptr_eq(&made.bundle, &bundle)
            && Arc::ptr_eq(&made.own, &own)
            && now.duration_since(made.at).is_ok_and(|age| age < OWN_LIFETIME / 2)
        {
            return Ok(Arc::clone(&made.config));
        }
        let config = tls::server::config_with_anonymous_clients(&svid(&own, now)?, &bundle)?;
        *held = Some(Made { at: now, own, bundle, config: Arc::clone(&config) });
        Ok(config)
    }
}

pub(super) fn svid(own: &Own, now: SystemTime) -> Result<X509Svid> {
    let key = Keypair::generate()?;
    let proven = ProvenKey::from_csr(&key.csr()?)?;
    let id = SpiffeId::authority(own.ca.domain());
    let mut chain = own.ca.issue(&proven, &id, OWN_LIFETIME, now)?;
    chain.extend(own.crosses.iter().cloned());
    Ok(key.with_chain(chain)?)
}

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub(super) struct PeerInfo {
    /// The verified certificate, if one was presented.
    pub(super) leaf: Option<Arc<Leaf>>,
    pub(super) address: SocketAddr,
}

impl PeerInfo {
    /// The verified identity, if a certificate was presented.
    pub(super) fn id(&self) -> Option<&SpiffeId> {
        self.leaf.as_ref().map(|leaf| &leaf.id)
    }
}

/// A connection whose peer is known, or known to be nobody.
struct Authenticated {
    io: TlsStream<TcpStream>,
    peer: PeerInfo,
}

impl Connected for Authenticated {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

impl AsyncRead for Authenticated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Authenticated {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
