//! Application to tunnel.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use h2::SendStream;
use tokio::net::tcp::ReadHalf;
use tokio_util::io::poll_read_buf;

use crate::hbone::{self, FRAME_BYTES};
use crate::verdict::Reason;

/// Grown in steps of several frames, so that an allocation serves many reads.
const ARENA_BYTES: usize = 256 * 1024;

thread_local! {
    /// One buffer for all streams of a thread: idle streams hold none, and a small read takes only
    /// the bytes it has. What is read is split off without copying.
    static ARENA: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// Lets go of this thread's buffer; those who read next start a new one.
pub(super) fn trim() {
    ARENA.take();
}

/// One direction of a relay: a reader of the socket, a writer of the stream.
pub(super) struct Up {
    send: SendStream<Bytes>,
    /// Read but not yet granted room in the peer's window.
    waiting: Bytes,
    bytes: u64,
    ended: bool,
}

impl Up {
    pub(super) fn new(send: SendStream<Bytes>) -> Self {
        Self { send, waiting: Bytes::new(), bytes: 0, ended: false }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Tells the peer that this did not end well.
    pub(super) fn reset(&mut self, code: h2::Reason) {
        self.send.send_reset(code);
    }

    /// Moves what can be moved; ready once the application's end was passed on.
    pub(super) fn poll(&mut self, app: &mut ReadHalf<'_>, cx: &mut Context<'_>) -> Poll<Result<(), Reason>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.poll_send(cx))?;
            // An idle application would not notice a reset by its own silence.
            if let Poll::Ready(outcome) = self.send.poll_reset(cx) {
                return Poll::Ready(Err(closed(outcome)));
            }
            match ready!(poll_read(app, cx)) {
                Ok(chunk) if chunk.is_empty() => {
                    self.send.send_data(chunk, true).map_err(|e| hbone::reason(&e))?;
                    self.ended = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(chunk) => {
                    self.bytes += chunk.len() as u64;
                    self.waiting = chunk;
                }
                Err(_) => return Poll::Ready(Err(Reason::AppReset)),
            }
        }
    }

    /// Hands `waiting` to HTTP/2 as far as the peer's window allows.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Reason>> {
        while !self.waiting.is_empty() {
            self.send.reserve_capacity(self.waiting.len());
            let mut room = self.send.capacity();
            if room == 0 {
                room = match ready!(self.send.poll_capacity(cx)) {
                    Some(Ok(room)) => room,
                    Some(Err(e)) => return Poll::Ready(Err(hbone::reason(&e))),
                    None => return Poll::Ready(Err(Reason::PeerReset)),
                };
            }
            let part = self.waiting.split_to(room.min(self.waiting.len()));
            if !part.is_empty() {
                self.send.send_data(part, false).map_err(|e| hbone::reason(&e))?;
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Why the stream was closed under us.
fn closed(outcome: Result<h2::Reason, h2::Error>) -> Reason {
    match outcome {
        Ok(code) => hbone::reset_reason(code),
        Err(e) => hbone::reason(&e),
    }
}

/// Reads what is there, at most one frame. Empty at the end of the stream. A read that does not fill its
/// room has emptied the socket, and tokio then waits for the next event without asking once more.
fn poll_read(app: &mut ReadHalf<'_>, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    ARENA.with_borrow_mut(|arena| {
        let frame = FRAME_BYTES as usize;
        if arena.capacity() < frame {
            // Starts a new allocation when streams still hold parts of the old one.
            *arena = BytesMut::with_capacity(ARENA_BYTES);
        }
        let mut limited = bytes::BufMut::limit(&mut *arena, frame);
        ready!(poll_read_buf(Pin::new(app), cx, &mut limited))?;
        Poll::Ready(Ok(arena.split().freeze()))
    })
}
