//! Holds connections to peers by who speaks to whom: a stream costs no handshake.
//!
//! Two streams share a connection exactly when sharing shows either side the same two SPIFFE IDs,
//! verified against the same trust: the key carries every input of the verification decision, and
//! the slot drops what was verified against an older state. A dropped connection ends by itself
//! when its last stream does, so a rotation closes nothing that is in use.
//!
//! One pool belongs to one thread; its lock is never contended and never held across an await.

pub mod dial;
mod slot;

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::hbone::Stream;
use crate::hbone::client::Ask;
use crate::identity::SpiffeId;
use crate::verdict::Reason;
use dial::Dialer;
use slot::{Next, Slot};

/// What may share a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Whose SVID is presented.
    pub source: SpiffeId,
    /// Who must answer.
    pub destination: SpiffeId,
    /// Where: the tunnel address.
    pub address: SocketAddr,
}

/// Why there is no stream: the label, and what an operator needs to know.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Failure {
    /// For metrics and logs.
    pub reason: Reason,
    /// In words; names the peer.
    pub detail: Arc<str>,
}

/// How often one caller waits for a dial. Others may take every place of a new connection first, but
/// a peer that allows no stream at all must not be dialled for ever.
const MAX_TURNS: usize = 64;

type Slots = HashMap<Key, Slot>;

/// One thread's connections.
#[derive(Clone, Debug)]
pub struct Pool {
    slots: Arc<Mutex<Slots>>,
    dialer: Dialer,
    max_streams: usize,
}

impl Pool {
    /// An empty pool that dials with `dialer`.
    pub fn new(dialer: Dialer, max_streams: u32) -> Self {
        Self { slots: Arc::default(), dialer, max_streams: max_streams as usize }
    }

    /// A stream to `key`'s peer: from a connection that is there, or from a new one.
    ///
    /// # Errors
    /// When no connection can be had. Nothing of the stream was sent then.
    pub async fn open(&self, key: &Key, ask: Ask) -> Result<Stream, Failure> {
        for _ in 0..MAX_TURNS {
            let dialled = match self.next(key, ask).await {
                Next::Open(stream) => return Ok(stream),
                Next::Wait(dialled) => dialled,
            };
            match dialled.await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => return Err(failure),
                // The dialling task died without a word.
                Err(_) => {
                    return Err(Failure { reason: Reason::Internal, detail: "dialling was cut off".into() });
                }
            }
        }
        let detail = format!("{} at {} has no room for another stream", key.destination, key.address);
        Err(Failure { reason: Reason::Overload, detail: detail.into() })
    }

    /// Takes a stream, or a place among those who wait for a dial (and starts one if none runs).
    async fn next(&self, key: &Key, ask: Ask) -> Next {
        let epoch = self.dialer.epoch(&key.source);
        let (next, dial) = poll_fn(|cx| {
            let mut slots = self.lock();
            let slot = slots.entry(key.clone()).or_default();
            slot.discard(epoch, cx);
            Poll::Ready(slot.next(ask, self.max_streams))
        })
        .await;
        if dial {
            self.dial(key.clone());
        }
        next
    }

    /// Dials in a task of its own, so that it goes on when the first to wait gives up.
    fn dial(&self, key: Key) {
        let pool = self.clone();
        tokio::spawn(async move {
            let dialled = pool.dialer.dial(&key).await;
            let waiting = {
                let mut slots = pool.lock();
                let slot = slots.entry(key).or_default();
                slot.dialled(dialled)
            };
            let (waiting, outcome) = waiting;
            for waiter in waiting {
                // Whoever gave up has no more interest.
                let _ = waiter.send(outcome.clone());
            }
        });
    }

    /// Drops connections that have had no stream for `idle`. Call it now and then.
    pub fn sweep(&self, now: Instant, idle: Duration) {
        self.lock().retain(|_, slot| {
            slot.expire(now, idle);
            !slot.is_empty()
        });
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Every change under the lock leaves the slots consistent, also one cut short by a panic.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Waiter = oneshot::Sender<Result<(), Failure>>;
