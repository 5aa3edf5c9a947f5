//! An authenticated connection as a byte stream: our record layer over TCP.
//!
//! What it must not do: confuse a cut connection with a clean end (a close_notify is the only end),
//! hold a buffer while idle, or make a system call for each small frame. The last is why flushing can
//! be deferred: HTTP/2 flushes after each frame, but its driver flushes once for everything that its
//! streams had ready ([`TlsStream::defer_flush`]).

mod offload;
mod read;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use rustls::client::ClientConnectionData;
use rustls::kernel::KernelConnection;
use rustls::server::ServerConnectionData;
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, ExtractedSecrets, InvalidMessage};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::broken;
use super::buffers::Buffer;
use super::record::{Content, MAX_CONTENT_BYTES, OVERHEAD_BYTES, Opener, Sealer};
use offload::Offload;

/// Sealed bytes that are written without waiting for a flush: a whole frame of a bulk stream.
const WRITE_AT_BYTES: usize = 64 * 1024;
/// A record is not begun with less room than this, unless it is the only one: little records are dear.
const LEAST_ROOM_BYTES: usize = 2048;

const KEY_UPDATE: u8 = 24;
/// `KeyUpdate { update_not_requested }` with its header (RFC 8446, section 4.6.3).
const OUR_KEY_UPDATE: [u8; 5] = [KEY_UPDATE, 0, 0, 1, 0];
const WARNING: u8 = 1;
const FATAL: u8 = 2;

type Secrets = (u64, ConnectionTrafficSecrets);

/// What rustls still does once records are ours: derive keys, keep tickets.
pub(super) trait Session: Send {
    fn next_tx(&mut self) -> Result<Secrets, Error>;
    fn next_rx(&mut self) -> Result<Secrets, Error>;
    fn ticket(&mut self, payload: &[u8]) -> Result<(), Error>;
}

impl Session for KernelConnection<ClientConnectionData> {
    fn next_tx(&mut self) -> Result<Secrets, Error> {
        self.update_tx_secret()
    }
    fn next_rx(&mut self) -> Result<Secrets, Error> {
        self.update_rx_secret()
    }
    fn ticket(&mut self, payload: &[u8]) -> Result<(), Error> {
        self.handle_new_session_ticket(payload)
    }
}

impl Session for KernelConnection<ServerConnectionData> {
    fn next_tx(&mut self) -> Result<Secrets, Error> {
        self.update_tx_secret()
    }
    fn next_rx(&mut self) -> Result<Secrets, Error> {
        self.update_rx_secret()
    }
    fn ticket(&mut self, _: &[u8]) -> Result<(), Error> {
        Err(inappropriate())
    }
}

fn inappropriate() -> Error {
    Error::InvalidMessage(InvalidMessage::UnexpectedMessage("a handshake message after the handshake"))
}

struct Inner {
    tcp: TcpStream,
    session: Box<dyn Session>,
    /// None: the kernel seals.
    sealer: Option<Sealer>,
    /// None: the kernel opens.
    opener: Option<Opener>,
    offload: Option<Box<Offload>>,
    /// Read from TCP, not yet opened.
    incoming: Buffer,
    /// Sealed (unless the kernel does that), not yet written to TCP.
    outgoing: Buffer,
    /// Opened, but with no room at the reader yet.
    plain: Buffer,
    /// Part of a handshake message that goes on in the next record.
    message: Vec<u8>,
    control_records: u32,
    burst: usize,
    peer_closed: bool,
    /// The peer asked for our next key: it comes before our next data.
    owes_key_update: bool,
    said_goodbye: bool,
    deferred: bool,
}

/// An authenticated connection.
pub struct TlsStream {
    inner: Arc<Mutex<Inner>>,
}

/// Writes what a [`TlsStream`] has sealed.
pub struct Flush {
    inner: Arc<Mutex<Inner>>,
}

impl std::fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Flush {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flush").finish_non_exhaustive()
    }
}

impl TlsStream {
    /// Takes over from the handshake. `received` came behind it and is not opened yet; `plain` is.
    pub(super) fn new(
        tcp: TcpStream,
        secrets: ExtractedSecrets,
        suite: rustls::SupportedCipherSuite,
        session: Box<dyn Session>,
        received: &[u8],
        plain: &[u8],
    ) -> Result<Self, Error> {
        let (sealer, opener) = (Sealer::new(&secrets.tx, suite)?, Opener::new(&secrets.rx)?);
        let offload = Offload::begin(&tcp, secrets, suite)?;
        let inner = Inner {
            tcp,
            session,
            // One of the two has the key: a nonce used twice would give it away.
            sealer: offload.is_none().then_some(sealer),
            opener: Some(opener),
            offload,
            incoming: holding(received)?,
            outgoing: Buffer::default(),
            plain: holding(plain)?,
            message: Vec::new(),
            control_records: 0,
            burst: 0,
            peer_closed: false,
            owes_key_update: false,
            said_goodbye: false,
            deferred: false,
        };
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    /// From now on flushing the stream does nothing: whoever polls its owner must poll the returned
    /// [`Flush`] afterwards, each time.
    pub fn defer_flush(&self) -> Flush {
        lock(&self.inner).deferred = true;
        Flush { inner: Arc::clone(&self.inner) }
    }
}

fn holding(bytes: &[u8]) -> Result<Buffer, Error> {
    let mut buffer = Buffer::default();
    if !bytes.is_empty() {
        let room = buffer.spare().get_mut(..bytes.len());
        room.ok_or(Error::InvalidMessage(InvalidMessage::MessageTooLarge))?.copy_from_slice(bytes);
        buffer.fill(bytes.len());
    }
    Ok(buffer)
}

/// Both halves are used by one task, so this never waits.
fn lock(inner: &Mutex<Inner>) -> MutexGuard<'_, Inner> {
    // A panic inside leaves at worst a record half sealed, which the peer refuses.
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Flush {
    /// Writes everything that is sealed, as far as TCP takes it.
    ///
    /// # Errors
    /// What TCP says.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.inner).poll_write_out(cx)
    }
}

impl Inner {
    /// Writes to TCP what is sealed.
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.is_empty() {
            let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, self.outgoing.filled()))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.consume(written);
            if let Some(offload) = &mut self.offload {
                offload.count(written);
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, parts: [&[u8]; 2]) -> Poll<io::Result<usize>> {
        if self.offload.is_some() {
            return self.poll_write_plain(cx, parts);
        }
        if self.outgoing.len() >= WRITE_AT_BYTES
            && let Poll::Ready(Err(error)) = self.poll_write_out(cx)
        {
            return Poll::Ready(Err(error));
        }
        if self.outgoing.len() >= WRITE_AT_BYTES {
            return Poll::Pending;
        }
        let sealed = self.seal_data(parts).map_err(broken)?;
        if self.outgoing.len() >= WRITE_AT_BYTES
            && let Poll::Ready(Err(error)) = self.poll_write_out(cx)
        {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(sealed))
    }

    /// Seals as much of `parts` as there is room for; how much that was.
    fn seal_data(&mut self, [mut first, mut second]: [&[u8]; 2]) -> Result<usize, Error> {
        self.outgoing.compact();
        if self.owes_key_update || self.sealer.as_ref().is_some_and(Sealer::is_worn) {
            self.renew_sending_key()?;
        }
        let mut total = 0;
        while !(first.is_empty() && second.is_empty()) {
            let room = self.outgoing.spare().len().saturating_sub(OVERHEAD_BYTES).min(MAX_CONTENT_BYTES);
            if room < LEAST_ROOM_BYTES {
                break;
            }
            let (now, later) = first.split_at(first.len().min(room));
            let (also, later_still) = second.split_at(second.len().min(room - now.len()));
            self.seal_record(Content::Data, [now, also])?;
            total += now.len() + also.len();
            (first, second) = (later, later_still);
        }
        Ok(total)
    }

    fn renew_sending_key(&mut self) -> Result<(), Error> {
        self.seal_record(Content::Handshake, [&OUR_KEY_UPDATE, &[]])?;
        self.owes_key_update = false;
        let next = self.session.next_tx()?;
        self.sealer.as_mut().ok_or(Error::EncryptError)?.renew(&next)
    }

    fn seal_record(&mut self, content: Content, parts: [&[u8]; 2]) -> Result<(), Error> {
        let sealer = self.sealer.as_mut().ok_or(Error::EncryptError)?;
        let sealed = sealer.seal(content, parts, self.outgoing.spare())?;
        self.outgoing.fill(sealed);
        Ok(())
    }

    /// Tells the peer why this ends, if there is room and TCP takes it at once.
    fn alert(&mut self, level: u8, description: AlertDescription) {
        if self.offload.is_some() {
            return self.alert_by_kernel(level, description);
        }
        self.outgoing.compact();
        if self.outgoing.spare().len() >= OVERHEAD_BYTES + 2
            && self.seal_record(Content::Alert, [&[level, u8::from(description)], &[]]).is_ok()
            && let Ok(written) = self.tcp.try_write(self.outgoing.filled())
        {
            self.outgoing.consume(written);
        }
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.offload.is_some() {
            ready!(self.poll_goodbye_by_kernel(cx))?;
        } else if !self.said_goodbye {
            self.said_goodbye = true;
            self.alert(WARNING, AlertDescription::CloseNotify);
        }
        ready!(self.poll_write_out(cx))?;
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl AsyncRead for TlsStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        lock(&self.inner).poll_read(cx, into)
    }
}

impl AsyncWrite for TlsStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        lock(&self.inner).poll_write(cx, [bytes, &[]])
    }

    /// Takes the first two slices that are not empty: HTTP/2 has a head and a payload, never more.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = slices.iter().map(|slice| &**slice).filter(|slice| !slice.is_empty());
        let parts = [filled.next().unwrap_or_default(), filled.next().unwrap_or_default()];
        lock(&self.inner).poll_write(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.inner);
        if inner.deferred { Poll::Ready(Ok(())) } else { inner.poll_write_out(cx) }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.inner).poll_shutdown(cx)
    }
}
