//! The other way of the bytes: the kernel has the keys, seals what is written and opens what is read.
//!
//! Sending passes to it with the handshake's end; receiving between two records, so that what came
//! behind the handshake is opened here, and the kernel begins with the right number.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, ExtractedSecrets, SupportedCipherSuite};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

use super::super::record::{self, Content, HEADER_BYTES, MAX_CONTENT_BYTES, Opener};
use super::super::{broken, ktls};
use super::read::alert_for;
use super::{FATAL, Inner, OUR_KEY_UPDATE, Secrets, WARNING};

/// Writes are gathered up to one record: a system call and a record for each small frame are dear.
const GATHERED_BYTES: usize = MAX_CONTENT_BYTES;
/// Asked of the kernel at once: four full records.
const READ_BYTES: usize = 64 * 1024;
/// An alert is never read in pieces.
const ALERT_BYTES: usize = 2;

/// What is kept of a connection whose records the kernel seals.
pub(super) struct Offload {
    /// The socket once more, for its errors. What the kernel cannot make a record of is one, and wakes
    /// no reader: epoll(7) then says EPOLLERR alone.
    errors: AsyncFd<OwnedFd>,
    /// The key to open with, until the kernel takes it.
    receiving: Option<Secrets>,
    /// Records sealed with the current key, about.
    sealed: u64,
    limit: u64,
}

impl Offload {
    /// Hands the sending key over; none if that is not wanted, or the kernel does not take it.
    pub(super) fn begin(
        tcp: &TcpStream,
        secrets: ExtractedSecrets,
        suite: SupportedCipherSuite,
    ) -> Result<Option<Box<Self>>, Error> {
        if !ktls::is_on() {
            return Ok(None);
        }
        // Half of it, as the kernel may cut a write into more records than are counted.
        let limit = record::limit(suite)? / 2;
        let (sealed, key) = &secrets.tx;
        match hand_over(tcp, *sealed, key) {
            Ok(errors) => {
                let receiving = Some(secrets.rx);
                Ok(Some(Box::new(Self { errors, receiving, sealed: *sealed, limit })))
            }
            Err(error) => {
                tracing::debug!(%error, "the kernel does not take a connection's keys");
                Ok(None)
            }
        }
    }

    /// So many bytes have gone to the kernel in one call.
    pub(super) fn count(&mut self, written: usize) {
        self.sealed += (written / MAX_CONTENT_BYTES) as u64 + 1;
    }
}

/// The last step is the one that counts: until then the socket is as it was.
fn hand_over(tcp: &TcpStream, sequence: u64, key: &ConnectionTrafficSecrets) -> io::Result<AsyncFd<OwnedFd>> {
    let again = tcp.as_fd().try_clone_to_owned()?;
    // Errors are told without being asked for; of the rest, the least that can be asked.
    #[expect(unsafe_code, reason = "registering a descriptor is a promise about it")]
    // SAFETY: the descriptor is its own, and is closed when it is dropped, after the registration.
    let errors = unsafe { AsyncFd::register_with_interest(again, Interest::PRIORITY) }?;
    ktls::attach(tcp)?;
    ktls::set_sending_key(tcp, sequence, key)?;
    Ok(errors)
}

impl Inner {
    /// Whether the kernel opens what comes next. It takes over where a record begins.
    pub(super) fn kernel_opens(&mut self) -> bool {
        let Some(offload) = &mut self.offload else { return false };
        let Some(opener) = &self.opener else { return true };
        if !self.incoming.is_empty() {
            return false;
        }
        let Some((_, key)) = offload.receiving.take() else { return false };
        match ktls::set_receiving_key(&self.tcp, opener.sequence(), &key) {
            Ok(()) => self.opener = None,
            Err(error) => tracing::debug!(%error, "the kernel does not take the key to receive with"),
        }
        self.opener.is_none()
    }

    /// How much may be read from TCP: before the kernel takes over, nothing beyond the record begun.
    pub(super) fn room_before_kernel(&self) -> usize {
        if self.offload.as_ref().is_none_or(|offload| offload.receiving.is_none()) {
            return usize::MAX;
        }
        let filled = self.incoming.filled();
        let whole = match filled.first_chunk().map(record::payload_length) {
            // Already refused where records are opened, if it is none.
            Some(length) => HEADER_BYTES + length.unwrap_or(0),
            None => HEADER_BYTES,
        };
        whole.saturating_sub(filled.len()).max(1)
    }

    /// From here on the peer's records are sealed with its next key.
    pub(super) fn take_receiving_key(&mut self, next: Secrets) -> Result<(), Error> {
        if let Some(opener) = &mut self.opener {
            *opener = Opener::new(&next)?;
            if let Some(Offload { receiving: Some(key), .. }) = self.offload.as_deref_mut() {
                *key = next;
            }
            return Ok(());
        }
        ktls::set_receiving_key(&self.tcp, next.0, &next.1).map_err(|error| {
            Error::General(format!("the peer has changed its key, which the kernel did not follow: {error}"))
        })
    }

    /// Reads what the kernel has opened.
    pub(super) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_turn(cx));
        let before = into.filled().len();
        let mut small = [0; ALERT_BYTES];
        let is_small = into.remaining() < small.len();
        let received = loop {
            let failed = self.poll_failed(cx).is_ready();
            if !failed && self.tcp.poll_read_ready(cx)?.is_pending() {
                self.burst = 0;
                return Poll::Pending;
            }
            let length = into.remaining().min(READ_BYTES);
            let room = if is_small { &mut small[..] } else { into.initialize_unfilled_to(length) };
            let mut receive = || ktls::receive(self.tcp.as_fd(), room);
            match if failed { receive() } else { self.tcp.try_io(Interest::READABLE, receive) } {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if failed {
                        // A write was told the error.
                        return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
                    }
                }
                received => break received,
            }
        };
        let handled = match received {
            Ok(Some((content, held))) if is_small => {
                self.received(content, &small[..held]).map(|()| self.drain_plain(into))
            }
            Ok(Some((Content::Data, held))) => {
                into.advance(held);
                self.count((Content::Data, held))
            }
            Ok(Some((content, held))) => {
                let message = into.initialize_unfilled_to(held);
                self.received(content, message)
            }
            // Without a close_notify this may be an attacker's cut (RFC 8446, section 6.1).
            Ok(None) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(ktls::bad_record(&error).ok_or(error)?),
        };
        self.burst += into.filled().len() - before;
        Poll::Ready(handled.map_err(|error| {
            self.alert(FATAL, alert_for(&error));
            broken(error)
        }))
    }

    /// Ready when the socket has an error.
    fn poll_failed(&self, cx: &mut Context<'_>) -> Poll<()> {
        match &self.offload {
            Some(offload) => offload.errors.poll_write_ready(cx).map(drop),
            None => Poll::Pending,
        }
    }

    /// Takes what is not data, or not in the reader's buffer.
    fn received(&mut self, content: Content, bytes: &[u8]) -> Result<(), Error> {
        // A message that comes in pieces, as the reader has little room, counts once.
        if content != Content::Handshake || self.message.is_empty() {
            self.count((content, bytes.len()))?;
        }
        if content != Content::Data {
            return self.control(content, bytes);
        }
        if !bytes.is_empty() {
            self.plain.spare()[..bytes.len()].copy_from_slice(bytes);
            self.plain.fill(bytes.len());
        }
        Ok(())
    }

    /// Gathers small writes, for a flush; what is more goes to the kernel from where it lies.
    pub(super) fn poll_write_plain(
        &mut self,
        cx: &mut Context<'_>,
        [first, second]: [&[u8]; 2],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_renew(cx))?;
        let length = first.len() + second.len();
        if self.outgoing.len() + length <= GATHERED_BYTES {
            self.outgoing.compact();
            let room = self.outgoing.spare();
            room[..first.len()].copy_from_slice(first);
            room[first.len()..length].copy_from_slice(second);
            self.outgoing.fill(length);
            return Poll::Ready(Ok(length));
        }
        loop {
            let slices = [self.outgoing.filled(), first, second].map(IoSlice::new);
            let written = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, &slices))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if let Some(offload) = &mut self.offload {
                offload.count(written);
            }
            let gathered = written.min(self.outgoing.len());
            self.outgoing.consume(gathered);
            if written > gathered {
                return Poll::Ready(Ok(written - gathered));
            }
        }
    }

    /// Changes the sending key when it is time, or when the peer has asked for it.
    fn poll_renew(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(offload) = &self.offload else { return Poll::Ready(Ok(())) };
        if !self.owes_key_update && offload.sealed < offload.limit {
            return Poll::Ready(Ok(()));
        }
        // Until all of it is done this is due: nothing is sent with a key that the peer has put away.
        self.owes_key_update = true;
        ready!(self.poll_write_out(cx))?;
        ready!(self.poll_send_record(cx, Content::Handshake, &OUR_KEY_UPDATE))?;
        let (sequence, key) = self.session.next_tx().map_err(broken)?;
        ktls::set_sending_key(&self.tcp, sequence, &key)
            .map_err(|error| io::Error::new(error.kind(), format!("the kernel changes no keys: {error}")))?;
        self.owes_key_update = false;
        if let Some(offload) = &mut self.offload {
            offload.sealed = sequence;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send_record(
        &mut self,
        cx: &mut Context<'_>,
        content: Content,
        bytes: &[u8],
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.tcp.poll_write_ready(cx))?;
            let send = || ktls::send_record(self.tcp.as_fd(), content, bytes);
            match self.tcp.try_io(Interest::WRITABLE, send) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    /// As [`Inner::alert`], through the kernel.
    pub(super) fn alert_by_kernel(&mut self, level: u8, description: AlertDescription) {
        // A bad record is the socket's error, too, and would be this alert's.
        let _ = self.tcp.take_error();
        if !self.outgoing.is_empty()
            && let Ok(written) = self.tcp.try_write(self.outgoing.filled())
        {
            self.outgoing.consume(written);
        }
        if self.outgoing.is_empty() {
            let alert = [level, u8::from(description)];
            let _ = ktls::send_record(self.tcp.as_fd(), Content::Alert, &alert);
        }
    }

    /// Writes everything out, and a close_notify behind it.
    pub(super) fn poll_goodbye_by_kernel(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.said_goodbye {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_write_out(cx))?;
        ktls::make_room(&self.tcp);
        let alert = [WARNING, u8::from(AlertDescription::CloseNotify)];
        ready!(self.poll_send_record(cx, Content::Alert, &alert))?;
        self.said_goodbye = true;
        Poll::Ready(Ok(()))
    }
}
