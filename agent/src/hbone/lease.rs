//! A stream's place on its tunnel: counted, and told when the tunnel is cut.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};

use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// Shared by a tunnel and its streams.
#[derive(Debug, Default)]
pub struct Lease {
    cut: AtomicBool,
    token: CancellationToken,
}

impl Lease {
    /// Ends every stream of the tunnel: one of its certificates has been revoked.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
        self.token.cancel();
    }

    /// Whether [`Lease::cut`] was called.
    pub fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
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

    /// Ready once the tunnel was cut.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        use std::future::Future;
        if self.lease.is_cut() {
            return Poll::Ready(());
        }
        if self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            return Poll::Pending;
        }
        self.waker = Some(cx.waker().clone());
        self.cancelled.as_mut().poll(cx)
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
        lease.cut();
        tokio::time::timeout(Duration::from_secs(1), waiting).await.unwrap().unwrap();
    }
}
