//! One key's connections, and who waits for the next: no I/O, no clock.

use std::sync::Arc;
use std::task::Context;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::dial::Dialled;
use super::{Failure, Waiter};
use crate::hbone::client::{Place, Tunnel};
use crate::proof::connection::Proofs;

/// What the one who asks for a stream gets.
pub(super) enum Next {
    /// A place on a connection; in node scope, with what is proven on it.
    Place(Place, Option<Arc<Proofs>>),
    /// Word of the dial that runs.
    Wait(oneshot::Receiver<Result<(), Failure>>),
}

#[derive(Debug)]
struct Pooled {
    tunnel: Tunnel,
    proofs: Option<Arc<Proofs>>,
    /// The trust it was verified against.
    epoch: Epoch,
    idle_since: Option<Instant>,
}

/// Names a state of trust for one source: its SVID's serial and the roots' epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Epoch {
    /// Distinguishes the SVIDs an identity has had.
    pub svid: u64,
    /// The epoch of the trust bundle's roots.
    pub roots: u64,
}

/// One key's connections.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pooled: Vec<Pooled>,
    waiting: Vec<Waiter>,
    dialling: bool,
}

impl Slot {
    /// Lets go of what is closed, or was verified against another trust than `epoch`.
    pub(super) fn discard(&mut self, epoch: Option<Epoch>, cx: &mut Context<'_>) {
        self.pooled.retain_mut(|p| Some(p.epoch) == epoch && p.tunnel.is_open(cx));
    }

    /// A place on the connection with the fewest streams, or one among those who wait; true asks for a
    /// dial.
    pub(super) fn next(&mut self, max_streams: usize) -> (Next, bool) {
        let room = |p: &Pooled| p.tunnel.streams() < p.tunnel.allowed().min(max_streams);
        let best = self.pooled.iter_mut().filter(|p| room(p)).min_by_key(|p| p.tunnel.streams());
        if let Some(pooled) = best {
            pooled.idle_since = None;
            return (Next::Place(pooled.tunnel.place(), pooled.proofs.clone()), false);
        }
        let (waiter, dialled) = oneshot::channel();
        self.waiting.push(waiter);
        let dial = !std::mem::replace(&mut self.dialling, true);
        (Next::Wait(dialled), dial)
    }

    /// Takes a dial's outcome; returns who waited for it, and what to tell them.
    pub(super) fn dialled(
        &mut self,
        outcome: Result<Dialled, Failure>,
    ) -> (Vec<Waiter>, Result<(), Failure>) {
        self.dialling = false;
        let told = outcome.map(|Dialled { tunnel, proofs, epoch }| {
            self.pooled.push(Pooled { tunnel, proofs, epoch, idle_since: None });
        });
        (std::mem::take(&mut self.waiting), told)
    }

    /// Lets go of what has had no stream for `idle`.
    pub(super) fn expire(&mut self, now: Instant, idle: Duration) {
        self.pooled.retain_mut(|pooled| {
            if pooled.tunnel.streams() > 0 {
                pooled.idle_since = None;
                return true;
            }
            now.duration_since(*pooled.idle_since.get_or_insert(now)) < idle
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pooled.is_empty() && self.waiting.is_empty() && !self.dialling
    }
}
