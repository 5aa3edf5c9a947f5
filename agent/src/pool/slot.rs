//! One key's connections, and who waits for the next: no I/O, no clock.

use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::dial::Dialled;
use super::{Failure, Waiter};
use crate::hbone::Term;
use crate::hbone::client::{Place, Tunnel};
use crate::identity::SpiffeId;
use crate::proof::connection::Proofs;

/// What the one who asks for a stream gets.
pub(super) enum Next {
    /// A place on a connection; in node scope, with what is proven on it.
    Place(Place, Option<Arc<Proofs>>),
    /// Word of the dial that runs. When it fails, a tunnel with bulk on it will do, if there is one.
    Wait(oneshot::Receiver<Result<(), Failure>>, Otherwise),
}

/// What is left when a dial fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Otherwise {
    /// Nothing.
    Fail,
    /// A place beside bulk.
    Crowd,
}

/// A thread that has streams for a node more often than this has a connection to it of its own: handing one over
/// wakes another thread, and streams that were handed over share its core.
const OFTEN: Duration = Duration::from_secs(1);

/// Connections of one key that bulk may spread over.
const MAX_SPREAD: usize = 4;

/// An answer to whoever asks for a stream.
pub(super) struct Turn {
    pub(super) next: Next,
    /// Whoever asked must dial.
    pub(super) dial: bool,
    /// The place is the first on its connection.
    pub(super) first_use: bool,
}

#[derive(Debug)]
struct Pooled {
    tunnel: Tunnel,
    proofs: Option<Arc<Proofs>>,
    /// The trust it was verified against.
    epoch: Epoch,
    term: Term,
    idle_since: Option<Instant>,
    /// Whether it has had a stream.
    used: bool,
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
    /// A connection of a new epoch is going to be made ahead.
    refreshing: bool,
    /// When a stream was last sent to the thread that has a connection.
    sent_away: Option<Instant>,
}

impl Slot {
    /// Lets go of what is closed, has an expired certificate, or was verified against other roots than `epoch`'s.
    /// What was made with an earlier SVID goes too; in node scope only when there is a new connection, as the old one is as
    /// good until then.
    pub(super) fn discard(&mut self, epoch: Option<Epoch>, now: Instant, cx: &mut Context<'_>) {
        let renewed = self.is_fresh(epoch);
        self.pooled.retain_mut(|p| {
            let same_roots = epoch.is_some_and(|epoch| epoch.roots == p.epoch.roots);
            let good = Some(p.epoch) == epoch || !renewed && p.proofs.is_some() && same_roots;
            good && p.term.retire > now && p.tunnel.is_open(cx)
        });
    }

    fn is_fresh(&self, epoch: Option<Epoch>) -> bool {
        self.pooled.iter().any(|p| Some(p.epoch) == epoch)
    }

    /// Whether a connection is to be dialled because there is none of this epoch, and none on its way; who
    /// is told so must dial.
    pub(super) fn begin_dial(&mut self, epoch: Option<Epoch>) -> bool {
        !self.is_fresh(epoch) && !std::mem::replace(&mut self.dialling, true)
    }

    /// The same for whoever has no stream to wait with. Without an SVID there is nothing to dial with.
    pub(super) fn begin_ahead(&mut self, epoch: Option<Epoch>, now: Instant) -> bool {
        self.refreshing = false;
        if epoch.is_none() {
            return false;
        }
        self.discard(epoch, now, &mut Context::from_waker(Waker::noop()));
        self.begin_dial(epoch)
    }

    /// Whether what is connected is of an earlier epoch, and nobody was told to mend that yet; who is told so
    /// must.
    pub(super) fn begin_refresh(&mut self, epoch: Epoch) -> bool {
        let old = self.is_connected() && !self.is_fresh(Some(epoch));
        old && !std::mem::replace(&mut self.refreshing, true)
    }

    /// The newest connection between nodes, for what is no stream of an application: no place is counted as
    /// its use.
    pub(super) fn newest(&self) -> Option<(Place, Arc<Proofs>)> {
        let newest = self.pooled.last()?;
        Some((newest.tunnel.place(), Arc::clone(newest.proofs.as_ref()?)))
    }

    /// Who has proven themselves on its connections, to both sides: first ours, then theirs.
    pub(super) fn met(&self) -> [Vec<SpiffeId>; 2] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for proofs in self.pooled.iter().filter_map(|p| p.proofs.as_ref()) {
            let [here, there] = proofs.met();
            ours.extend(here);
            theirs.extend(there);
        }
        [ours, theirs]
    }

    /// Whether there is a connection, or was when somebody looked last.
    pub(super) fn is_connected(&self) -> bool {
        !self.pooled.is_empty()
    }

    /// Whether this thread has a connection, or is making one.
    pub(super) fn has_own(&self) -> bool {
        self.is_connected() || self.dialling
    }

    /// Whether the stream that has come now shall be sent to the thread that has a connection.
    pub(super) fn sends_away(&mut self, now: Instant) -> bool {
        let often = self.has_just_sent(now);
        if !often {
            self.sent_away = Some(now);
        }
        !often
    }

    fn has_just_sent(&self, now: Instant) -> bool {
        self.sent_away.is_some_and(|last| now.saturating_duration_since(last) < OFTEN)
    }

    /// A place on the connection with the fewest streams, those without bulk first; or one among those who
    /// wait. Where all connections carry bulk, another is waited for, up to
    /// [`MAX_SPREAD`] and unless `crowd` says that it could not be had.
    pub(super) fn next(
        &mut self,
        epoch: Option<Epoch>,
        max_streams: usize,
        now: Instant,
        crowd: bool,
    ) -> Turn {
        let spread = !crowd && self.pooled.len() < MAX_SPREAD;
        let room = |p: &Pooled| p.tunnel.streams() < p.tunnel.allowed().min(max_streams);
        let rank = |p: &Pooled| (p.tunnel.is_bulk(now), p.tunnel.streams());
        let best = self.pooled.iter_mut().filter(|p| room(p)).min_by_key(|p| rank(p));
        let otherwise = if best.is_some() { Otherwise::Crowd } else { Otherwise::Fail };
        if let Some(pooled) = best.filter(|p| !(spread && p.tunnel.is_bulk(now))) {
            pooled.idle_since = None;
            let next = Next::Place(pooled.tunnel.place(), pooled.proofs.clone());
            let first_use = !std::mem::replace(&mut pooled.used, true);
            return Turn { next, dial: self.begin_dial(epoch), first_use };
        }
        let (waiter, dialled) = oneshot::channel();
        self.waiting.push(waiter);
        let dial = !std::mem::replace(&mut self.dialling, true);
        Turn { next: Next::Wait(dialled, otherwise), dial, first_use: false }
    }

    /// Takes a dial's outcome; returns who waited for it, and what to tell them.
    pub(super) fn dialled(
        &mut self,
        outcome: Result<Dialled, Failure>,
    ) -> (Vec<Waiter>, Result<(), Failure>) {
        self.dialling = false;
        let told = outcome.map(|Dialled { tunnel, proofs, epoch, term }| {
            self.pooled.push(Pooled { tunnel, proofs, epoch, term, idle_since: None, used: false });
        });
        (std::mem::take(&mut self.waiting), told)
    }

    /// Lets go of what has had no stream for `idle`, and of what may take none any more.
    pub(super) fn expire(&mut self, now: Instant, idle: Duration) {
        self.pooled.retain_mut(|pooled| {
            if pooled.term.retire <= now {
                return false;
            }
            if pooled.tunnel.streams() > 0 {
                pooled.idle_since = None;
                return true;
            }
            now.duration_since(*pooled.idle_since.get_or_insert(now)) < idle
        });
        if !self.has_just_sent(now) {
            self.sent_away = None;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pooled.is_empty() && self.waiting.is_empty() && !self.dialling && self.sent_away.is_none()
    }
}
