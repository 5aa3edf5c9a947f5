//! The reading half: records opened into the reader's buffer, and what is not application data handled.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::{AlertDescription, Error, InvalidMessage, PeerMisbehaved};
use tokio::io::{AsyncRead, ReadBuf};

use super::super::broken;
use super::super::record::{self, Content, HEADER_BYTES, TAG_BYTES};
use super::{FATAL, Inner, KEY_UPDATE, inappropriate};

/// After reading this much the connection's task gives way. Otherwise it would take everything that the
/// windows allow before the streams' tasks see a byte of it: they would write in bursts, give room
/// back in bursts, and the two agents of a bulk transfer would work by turns instead of together.
const BURST_BYTES: usize = 256 * 1024;
/// Records without data that may come in a row: tickets and key updates are rare, and dear.
const MAX_CONTROL_RECORDS: u32 = 32;
/// Longest handshake message taken after the handshake: a ticket with a client's chain fits ten times.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;
const NEW_SESSION_TICKET: u8 = 4;

impl Inner {
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        loop {
            if let Err(error) = self.open_into(into) {
                self.alert(FATAL, alert_for(&error));
                return Poll::Ready(Err(broken(error)));
            }
            if into.filled().len() > before || into.remaining() == 0 || self.peer_closed {
                return Poll::Ready(Ok(()));
            }
            if self.kernel_opens() {
                ready!(self.poll_receive(cx, into))?;
            } else {
                ready!(self.poll_fill(cx))?;
            }
        }
    }

    /// Pending once after each burst.
    pub(super) fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.burst < BURST_BYTES {
            return Poll::Ready(());
        }
        self.burst = 0;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Reads from TCP, much at once.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_turn(cx));
        self.incoming.compact();
        let room = self.room_before_kernel();
        let spare = self.incoming.spare();
        let room = room.min(spare.len());
        let mut buffer = ReadBuf::new(&mut spare[..room]);
        if Pin::new(&mut self.tcp).poll_read(cx, &mut buffer)?.is_pending() {
            self.burst = 0;
            self.incoming.give_back();
            return Poll::Pending;
        }
        let read = buffer.filled().len();
        if read == 0 {
            // Without a close_notify this may be an attacker's cut (RFC 8446, section 6.1).
            return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        self.incoming.fill(read);
        self.burst += read;
        Poll::Ready(Ok(()))
    }

    /// Opens records into the reader's buffer for as long as they are whole and fit.
    fn open_into(&mut self, into: &mut ReadBuf<'_>) -> Result<(), Error> {
        self.drain_plain(into);
        while !self.peer_closed
            && self.plain.is_empty()
            && let Some(length) = self.whole_record()?
        {
            let room = length - TAG_BYTES;
            if into.remaining() >= room {
                let (content, held) = self.open(length, into.initialize_unfilled_to(room))?;
                if content == Content::Data {
                    into.advance(held);
                } else {
                    let message = into.initialize_unfilled_to(held).to_vec();
                    self.control(content, &message)?;
                }
            } else if into.filled().is_empty() || into.remaining() > 0 {
                self.open_aside(length)?;
                self.drain_plain(into);
            } else {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The payload's length of the record that comes next, if it is there as a whole.
    fn whole_record(&self) -> Result<Option<usize>, Error> {
        let filled = self.incoming.filled();
        let Some(header) = filled.first_chunk() else { return Ok(None) };
        let length = record::payload_length(header)?;
        Ok((filled.len() >= HEADER_BYTES + length).then_some(length))
    }

    /// Opens the next record, which is whole.
    fn open(&mut self, length: usize, into: &mut [u8]) -> Result<(Content, usize), Error> {
        let opened = {
            let filled = self.incoming.filled();
            let (header, rest) = filled.split_first_chunk().ok_or(Error::DecryptError)?;
            let opener = self.opener.as_mut().ok_or(Error::DecryptError)?;
            opener.open(header, &rest[..length], into)?
        };
        self.incoming.consume(HEADER_BYTES + length);
        self.count(opened)?;
        Ok(opened)
    }

    /// Counts what comes in a row without data.
    pub(super) fn count(&mut self, (content, held): (Content, usize)) -> Result<(), Error> {
        match content {
            Content::Data if held > 0 => self.control_records = 0,
            _ => self.control_records += 1,
        }
        if self.control_records > MAX_CONTROL_RECORDS {
            return Err(Error::PeerMisbehaved(PeerMisbehaved::TooManyEmptyFragments));
        }
        Ok(())
    }

    /// Opens the next record into a buffer of our own: the reader's is too small for it.
    fn open_aside(&mut self, length: usize) -> Result<(), Error> {
        let mut aside = std::mem::take(&mut self.plain);
        let opened = self.open(length, &mut aside.spare()[..length - TAG_BYTES]);
        if let Ok((_, held)) = opened {
            aside.fill(held);
        }
        let (content, _) = opened?;
        if content == Content::Data {
            self.plain = aside;
            return Ok(());
        }
        let message = aside.filled().to_vec();
        self.control(content, &message)
    }

    pub(super) fn drain_plain(&mut self, into: &mut ReadBuf<'_>) {
        let length = self.plain.len().min(into.remaining());
        if length > 0 {
            into.put_slice(&self.plain.filled()[..length]);
            self.plain.consume(length);
        }
    }

    pub(super) fn control(&mut self, content: Content, bytes: &[u8]) -> Result<(), Error> {
        if content == Content::Handshake {
            return self.handshake(bytes);
        }
        match bytes.try_into().map(|[_, code]: [u8; 2]| AlertDescription::from(code)) {
            Ok(AlertDescription::CloseNotify) => self.peer_closed = true,
            Ok(AlertDescription::UserCanceled) => {}
            Ok(description) => return Err(Error::AlertReceived(description)),
            Err(_) => return Err(Error::InvalidMessage(InvalidMessage::MissingData("AlertDescription"))),
        }
        Ok(())
    }

    /// Messages after the handshake (RFC 8446, section 4.6).
    fn handshake(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.message.extend_from_slice(bytes);
        let mut messages = std::mem::take(&mut self.message);
        let mut rest = messages.as_slice();
        while let Some((&[kind, a, b, c], behind)) = rest.split_first_chunk() {
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            if length > MAX_MESSAGE_BYTES {
                return Err(Error::InvalidMessage(InvalidMessage::HandshakePayloadTooLarge));
            }
            let Some((body, behind)) = behind.split_at_checked(length) else { break };
            match (kind, body) {
                (NEW_SESSION_TICKET, ticket) => self.session.ticket(ticket)?,
                // A key may change at a record's end only (section 5.1).
                (KEY_UPDATE, [asked @ (0 | 1)]) if behind.is_empty() => {
                    let next = self.session.next_rx()?;
                    self.take_receiving_key(next)?;
                    self.owes_key_update |= *asked == 1;
                }
                (KEY_UPDATE, _) => return Err(Error::InvalidMessage(InvalidMessage::InvalidKeyUpdate)),
                _ => return Err(inappropriate()),
            }
            rest = behind;
        }
        let done = messages.len() - rest.len();
        messages.drain(..done);
        self.message = messages;
        Ok(())
    }
}

pub(super) fn alert_for(error: &Error) -> AlertDescription {
    match error {
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnexpectedMessage(_)) => {
            AlertDescription::UnexpectedMessage
        }
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        _ => AlertDescription::InternalError,
    }
}
