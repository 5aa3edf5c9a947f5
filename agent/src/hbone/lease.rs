//! A stream's place on its tunnel: counted, and told when the tunnel is cut.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::verdict::Reason;

/// Shared by a tunnel and its streams.
#[derive(Debug, Default)]
pub struct Lease {
    cut: OnceLock<Reason>,
    token: CancellationToken,
}

impl Lease {
    /// Ends every stream of the tunnel: one of its certificates has been revoked, or expired long ago.
    pub fn cut(&self, why: Reason) {
        // The first reason stands.
        let _ = self.cut.set(why);
        self.token.cancel();
    }

    /// Why [`Lease::cut`] was called, if it was.
    pub fn is_cut(&self) -> Option<Reason> {
        self.cut.get().copied()
    }
}

/// Notices the cut from within a task that has more to poll. A stream asks at every turn, so that
/// asking costs an atomic load; the token's lock is taken only for a new waker.
pub(crate) struct Cut {
    lease: Arc<Lease>,
    cancelled: Pin<Box<WaitForCancellationFutureOwned>>,
    waker: Option<Waker>,
}

impl Cut {
    /// Watches a lease.
    pub(crate) fn of(lease: Arc<Lease>) -> Self {
        let cancelled = Box::pin(lease.token.clone().cancelled_owned());
        Self { lease, cancelled, waker: None }
    }

    /// Ready once the tunnel was cut, with the reason.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Reason> {
        use std::future::Future;
        if let Some(why) = self.lease.is_cut() {
            return Poll::Ready(why);
        }
        if self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.waker = Some(cx.waker().clone());
        // The reason is there before the token says anything.
        self.cancelled.as_mut().poll(cx).map(|()| self.lease.is_cut().unwrap_or(Reason::Internal))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_cut_wakes_whoever_waits_in_whatever_task() {
        let lease = Arc::new(Lease::default());
        let mut cut = Cut::of(Arc::clone(&lease));
        let early = tokio::time::timeout(Duration::from_millis(20), poll_fn(|cx| cut.poll(cx))).await;
        assert!(early.is_err());
        // Another task, another waker.
        let waiting = tokio::spawn(async move { poll_fn(|cx| cut.poll(cx)).await });
        tokio::task::yield_now().await;
        lease.cut(Reason::Expired);
        lease.cut(Reason::Revoked);
        let why = tokio::time::timeout(Duration::from_secs(1), waiting).await.unwrap().unwrap();
        assert_eq!(why, Reason::Expired, "the first reason stands");
    }
}
