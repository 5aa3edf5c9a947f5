//! Moves bytes between two applications' sockets, both ways, in one task.
//!
//! Little is copied through a buffer of the thread's, in two system calls; much is spliced through a
//! pipe. An idle connection holds neither. What is held for a stalled reader is bounded for each
//! direction: one read, or one pipe. Ends and failures are passed on as in [`super::relay`].

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use nix::errno::Errno;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::pipe::Pipe;
use super::{Relayed, failed, reset};
use crate::verdict::Reason;

/// What one read copies at most.
const BUFFER_BYTES: usize = 64 * 1024;
/// A read of this much makes the next one a splice; up to here copying is the cheaper of the two.
const BULK_BYTES: usize = 16 * 1024;

thread_local! {
    /// One buffer for all connections of a thread: nothing stays in it between two reads.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into());
    /// Whether this kernel splices between such sockets; copying does it as well.
    static SPLICES: Cell<bool> = const { Cell::new(true) };
}

/// Relays until both directions have ended or one has failed, or until `stop` resolves.
///
/// On a failure both sockets are reset. The outcome is told as the client's agent sees it:
/// [`Reason::AppReset`] is the client's doing, [`Reason::PeerReset`] the server's.
pub async fn splice(
    client: &TcpStream,
    server: &TcpStream,
    mut stop: impl Future<Output = Reason> + Unpin,
) -> Relayed {
    let client = End { socket: client, reset: Reason::AppReset };
    let server = End { socket: server, reset: Reason::PeerReset };
    let (mut up, mut down) = (Half::default(), Half::default());
    let (mut client_failed, mut server_failed) = (pin!(failed(client.socket)), pin!(failed(server.socket)));
    let reason = poll_fn(|cx| {
        if let Poll::Ready(reason) = Pin::new(&mut stop).poll(cx) {
            return Poll::Ready(reason);
        }
        match (up.poll(client, server, cx), down.poll(server, client, cx)) {
            (Poll::Ready(Err(reason)), _) | (_, Poll::Ready(Err(reason))) => return Poll::Ready(reason),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Reason::Done),
            _ => {}
        }
        // Reading tells of a reset. Where nothing is read, because all was or because the other side
        // takes nothing, one has to look.
        if !up.reads() && client_failed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(client.reset);
        }
        if !down.reads() && server_failed.as_mut().poll(cx).is_ready() {
            return Poll::Ready(server.reset);
        }
        Poll::Pending
    })
    .await;
    if reason != Reason::Done {
        reset(client.socket);
        reset(server.socket);
    }
    Relayed { from_app: up.moved, to_app: down.moved, reason }
}

/// One application's socket, and what it means when that is reset.
#[derive(Clone, Copy)]
struct End<'a> {
    socket: &'a TcpStream,
    reset: Reason,
}

/// One direction.
#[derive(Default)]
struct Half {
    held: Held,
    /// Bytes that the receiving socket has taken.
    moved: u64,
    /// The last read brought much.
    bulk: bool,
    ended: bool,
}

/// What was read and not yet written.
#[derive(Default)]
enum Held {
    #[default]
    Nothing,
    Copied(Bytes),
    Piped(Pipe),
}

impl Half {
    /// Whether a reset of the sending side would show by itself.
    fn reads(&self) -> bool {
        !self.ended && matches!(self.held, Held::Nothing)
    }

    /// Moves what can be moved; ready once the sender's end was passed on.
    fn poll(&mut self, from: End<'_>, to: End<'_>, cx: &mut Context<'_>) -> Poll<Result<(), Reason>> {
        while !self.ended {
            ready!(self.poll_write(to, cx))?;
            ready!(from.socket.poll_read_ready(cx)).map_err(|_| from.reset)?;
            if self.bulk {
                self.fill(from)?;
            } else {
                self.copy(from, to)?;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what is held.
    fn poll_write(&mut self, to: End<'_>, cx: &mut Context<'_>) -> Poll<Result<(), Reason>> {
        loop {
            let written = match &mut self.held {
                Held::Nothing => return Poll::Ready(Ok(())),
                Held::Copied(bytes) => to.socket.try_write(bytes).inspect(|written| bytes.advance(*written)),
                Held::Piped(pipe) => to.socket.try_io(Interest::WRITABLE, || pipe.drain(to.socket)),
            };
            match written {
                Ok(written) => self.moved += written as u64,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    ready!(to.socket.poll_write_ready(cx)).map_err(|_| to.reset)?;
                }
                Err(_) => return Poll::Ready(Err(to.reset)),
            }
            self.held = match std::mem::take(&mut self.held) {
                Held::Copied(bytes) if bytes.is_empty() => Held::Nothing,
                Held::Piped(pipe) if pipe.is_empty() => {
                    pipe.give_back();
                    Held::Nothing
                }
                more => more,
            };
        }
    }

    /// Reads into a pipe. Only [`Half::copy`] is believed when nothing is there, or the end: a splice
    /// stops at urgent data (RFC 6093) for good, and says the same.
    fn fill(&mut self, from: End<'_>) -> Result<(), Reason> {
        self.bulk = false;
        // Out of descriptors? Copying needs none.
        let Ok(mut pipe) = Pipe::take() else { return Ok(()) };
        match pipe.fill(from.socket) {
            Ok(0) => pipe.give_back(),
            Ok(read) => {
                self.bulk = read >= BULK_BYTES;
                self.held = Held::Piped(pipe);
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => pipe.give_back(),
            Err(e) if e.raw_os_error() == Some(Errno::EINVAL as i32) => SPLICES.set(false),
            Err(_) => return Err(from.reset),
        }
        Ok(())
    }

    /// Reads through the thread's buffer and writes at once; at the end, passes that on.
    fn copy(&mut self, from: End<'_>, to: End<'_>) -> Result<(), Reason> {
        BUFFER.with_borrow_mut(|buffer| {
            let read = match from.socket.try_read(buffer) {
                Ok(0) => return self.end(to),
                Ok(read) => read,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(from.reset),
            };
            self.bulk = read >= BULK_BYTES && SPLICES.get();
            let written = match to.socket.try_write(&buffer[..read]) {
                Ok(written) => written,
                Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
                Err(_) => return Err(to.reset),
            };
            self.moved += written as u64;
            if written < read {
                self.held = Held::Copied(Bytes::copy_from_slice(&buffer[written..read]));
            }
            Ok(())
        })
    }

    fn end(&mut self, to: End<'_>) -> Result<(), Reason> {
        let shut: io::Result<()> = SockRef::from(to.socket).shutdown(Shutdown::Write);
        // It fails on a socket that has been reset, and then not all has arrived.
        shut.map_err(|_| to.reset)?;
        self.ended = true;
        Ok(())
    }
}
