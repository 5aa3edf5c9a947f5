//! The TCP connection under TLS: reads much at once, and lets others run in between.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A new connection's buffer: enough for a handshake, and for little talk.
const FIRST_BYTES: usize = 16 * 1024;
/// Doubled up to this while reads fill it. rustls asks for 4 KiB at a time; this much is read from the
/// kernel instead, a frame of a bulk stream at once.
const MOST_BYTES: usize = 256 * 1024;
/// After this much the connection's task gives way. Otherwise it would take everything that the
/// windows allow before the streams' tasks see a byte of it: they would write in bursts, give room
/// back in bursts, and the two agents of a bulk transfer would work by turns instead of together.
const BURST_BYTES: usize = MOST_BYTES;

/// A TCP connection with a read buffer.
#[derive(Debug)]
pub struct Transport {
    tcp: TcpStream,
    buffer: Vec<u8>,
    /// What of the buffer has been read from the kernel and not yet taken.
    filled: std::ops::Range<usize>,
    burst: usize,
}

impl Transport {
    /// Buffers reads of this connection.
    pub fn new(tcp: TcpStream) -> Self {
        Self { tcp, buffer: vec![0; FIRST_BYTES], filled: 0..0, burst: 0 }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.burst >= BURST_BYTES {
            self.burst = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // The last read took all the room there was: there is more where it came from.
        if self.filled.end == self.buffer.len() && self.buffer.len() < MOST_BYTES {
            self.buffer = vec![0; 2 * self.buffer.len()];
        }
        let mut buffer = ReadBuf::new(&mut self.buffer);
        if Pin::new(&mut self.tcp).poll_read(cx, &mut buffer)?.is_pending() {
            self.burst = 0;
            return Poll::Pending;
        }
        self.filled = 0..buffer.filled().len();
        self.burst += self.filled.len();
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.filled.is_empty() {
            ready!(this.poll_fill(cx))?;
        }
        let taken = this.filled.len().min(into.remaining());
        into.put_slice(&this.buffer[this.filled.start..this.filled.start + taken]);
        this.filled.start += taken;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
