//! Tunnel to application.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use h2::RecvStream;
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::hbone::{self, Recv};
use crate::verdict::Reason;

/// Chunks below this that have to wait are copied together. Each one costs bookkeeping of its own and
/// keeps the whole buffer alive that it was read into, so a million one-byte frames for a stalled
/// reader would cost many times their bytes.
const SMALL_BYTES: usize = 16 * 1024;
/// A gathered chunk grows no larger than this.
const GATHER_BYTES: usize = 64 * 1024;
/// Chunks written in one system call.
const MAX_SLICES: usize = 16;

/// One direction of a relay: a reader of the stream, a writer of the socket.
pub(super) struct Down {
    recv: Recv,
    /// Received, not yet written. Bounded by the stream's window: its room is given back to the
    /// peer only when the application has taken the bytes.
    queue: VecDeque<Bytes>,
    /// Small chunks gathered behind the queue.
    tail: BytesMut,
    bytes: u64,
    received_all: bool,
    ended: bool,
}

impl Down {
    pub(super) fn new(recv: Recv) -> Self {
        Self {
            recv,
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            bytes: 0,
            received_all: false,
            ended: false,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Moves what can be moved; ready once the peer's end was passed on.
    pub(super) fn poll(
        &mut self,
        app: &TcpStream,
        app_ended: bool,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(), Reason>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        loop {
            self.receive(cx)?;
            if self.queue.is_empty() && !self.tail.is_empty() {
                self.queue.push_back(self.tail.split().freeze());
            }
            if self.queue.is_empty() {
                if !self.received_all {
                    // An idle stream holds no buffer, however much has passed through it.
                    self.tail = BytesMut::new();
                    self.queue = VecDeque::new();
                    return Poll::Pending;
                }
                if !app_ended {
                    // The application may have closed already; then it does not need to be told.
                    let _ = SockRef::from(app).shutdown(std::net::Shutdown::Write);
                }
                self.ended = true;
                return Poll::Ready(Ok(()));
            }
            ready!(app.poll_write_ready(cx)).map_err(|_| Reason::AppReset)?;
            self.write(app)?;
        }
    }

    /// Takes everything that has arrived.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<(), Reason> {
        while !self.received_all {
            match self.poll_data(cx) {
                Poll::Ready(Some(Ok(chunk))) => self.push(chunk),
                Poll::Ready(Some(Err(reason))) => return Err(reason),
                Poll::Ready(None) => self.received_all = true,
                Poll::Pending => break,
            }
        }
        Ok(())
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Reason>>> {
        let body = match ready!(self.recv.poll_accepted(cx)) {
            Ok(body) => body,
            Err(reason) => return Poll::Ready(Some(Err(reason))),
        };
        let data = ready!(body.poll_data(cx));
        Poll::Ready(data.map(|chunk| chunk.map_err(|e| hbone::reason(&e))))
    }

    fn push(&mut self, chunk: Bytes) {
        // The end of a stream often comes as a frame without data: not worth a system call.
        if chunk.is_empty() {
            return;
        }
        if chunk.len() < SMALL_BYTES && !(self.queue.is_empty() && self.tail.is_empty()) {
            self.tail.extend_from_slice(&chunk);
            if self.tail.len() >= GATHER_BYTES {
                self.queue.push_back(self.tail.split().freeze());
            }
            return;
        }
        if !self.tail.is_empty() {
            self.queue.push_back(self.tail.split().freeze());
        }
        self.queue.push_back(chunk);
    }

    /// Writes once, as much as the socket takes, and gives that room back to the peer.
    fn write(&mut self, app: &TcpStream) -> Result<(), Reason> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut used = 0;
        for (slice, chunk) in slices.iter_mut().zip(&self.queue) {
            *slice = IoSlice::new(chunk);
            used += 1;
        }
        let written = match app.try_write_vectored(&slices[..used]) {
            Ok(written) => written,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(_) => return Err(Reason::AppReset),
        };
        self.bytes += written as u64;
        self.advance(written);
        match &mut self.recv {
            Recv::Open(body) => release(body, written),
            Recv::Pending(..) => Ok(()),
        }
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(first) = self.queue.front_mut() {
            if first.len() > written {
                first.advance(written);
                return;
            }
            written -= first.len();
            self.queue.pop_front();
        }
    }
}

fn release(body: &mut RecvStream, bytes: usize) -> Result<(), Reason> {
    body.flow_control().release_capacity(bytes).map_err(|e| hbone::reason(&e))
}
