//! Moves bytes between an application's socket and a tunnelled stream, both ways, in one task; between
//! two applications' sockets below ([`splice`]).
//!
//! A clean end of one side is a clean end of the other's; anything else is a reset of the other.
//! Never is a failure turned into a clean end. What is held for a stalled side is bounded: one read
//! of [`FRAME_BYTES`] towards the tunnel, one HTTP/2 stream window towards the application.

mod down;
mod pipe;
pub mod splice;
mod up;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::hbone::lease::Cut;
use crate::hbone::traffic::Traffic;
use crate::hbone::{self, Stream};
use crate::verdict::Reason;
use down::Down;
use up::Up;

/// What a relayed connection came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// Bytes read from the application.
    pub from_app: u64,
    /// Bytes written to the application.
    pub to_app: u64,
    /// Why it ended.
    pub reason: Reason,
}

/// Relays until both directions have ended or one has failed, until `stop` resolves or the tunnel is
/// cut.
///
/// On a failure the application's socket is reset and the stream is reset too.
///
/// What this returns is most of what an idle connection costs, and whatever an `async fn` takes it keeps
/// twice. Hence the form; and hence `stop` is only borrowed or boxed ([`Unpin`]).
pub fn relay(
    app: &mut TcpStream,
    stream: Stream,
    mut stop: impl Future<Output = Reason> + Unpin,
) -> impl Future<Output = Relayed> {
    let mut ways = Ways {
        up: Up::new(stream.send),
        down: Down::new(stream.recv),
        cut: stream.lease.map(Cut::of),
        place: stream.place,
    };
    async move {
        let reason = poll_fn(|cx| match Pin::new(&mut stop).poll(cx) {
            Poll::Ready(reason) => Poll::Ready(reason),
            Poll::Pending => ways.poll(app, cx),
        })
        .await;
        if reason != Reason::Done {
            ways.up.reset(hbone::code(reason));
            reset(app);
        }
        Relayed { from_app: ways.up.bytes(), to_app: ways.down.bytes(), reason }
    }
}

/// Both directions of a relay.
struct Ways {
    up: Up,
    down: Down,
    cut: Option<Cut>,
    /// The stream counts as open on its tunnel for as long as this lives.
    place: Option<Arc<Traffic>>,
}

impl Ways {
    /// Moves what can be moved; ready with the reason once the connection is over.
    fn poll(&mut self, app: &mut TcpStream, cx: &mut Context<'_>) -> Poll<Reason> {
        if let Some(Poll::Ready(why)) = self.cut.as_mut().map(|cut| cut.poll(cx)) {
            return Poll::Ready(why);
        }
        let before = self.moved();
        let (mut read, write) = app.split();
        let up = self.up.poll(&mut read, cx);
        // An application that has ended too is told by the close that follows at once.
        let down = self.down.poll(write.as_ref(), up.is_ready(), cx);
        if let Some(place) = &self.place {
            place.moved(self.moved() - before, Instant::now);
        }
        match (up, down) {
            // The tunnel's word outranks the application's: when a peer resets, writing fails as well.
            (_, Poll::Ready(Err(reason))) | (Poll::Ready(Err(reason)), _) => Poll::Ready(reason),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(Reason::Done),
            _ => Poll::Pending,
        }
    }

    /// Bytes in both directions.
    fn moved(&self) -> u64 {
        self.up.bytes() + self.down.bytes()
    }
}

/// Frees what this thread keeps for the next bytes. Call it now and then.
pub fn trim() {
    up::trim();
}

/// Makes the coming close a reset (RST), so that the application sees a failure and not an end.
pub fn reset(app: &TcpStream) {
    // It fails only on a socket that is closed already, and that needs no reset.
    let _ = SockRef::from(app).set_linger(Some(Duration::ZERO));
}

/// Resolves when the application resets the connection, also while nobody reads from it.
pub async fn failed(app: &TcpStream) -> io::Error {
    match app.ready(Interest::ERROR).await {
        Ok(_) => app.take_error().ok().flatten().unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(error) => error,
    }
}
