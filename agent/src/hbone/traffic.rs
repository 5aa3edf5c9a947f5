//! What a tunnel's streams move, so that others can keep off a tunnel that carries bulk: a small request
//! behind a bulk stream's window waits for milliseconds.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Bytes after which a tunnel's rate is judged: often enough to notice a bulk stream within
/// milliseconds, and seldom enough that asking the clock costs nothing.
const SPAN_BYTES: u64 = 4 * 1024 * 1024;
/// A span that took less than this was bulk: 100 MB/s.
const BULK_SPAN: Duration = Duration::from_millis(42);
/// Bulk comes in bursts; a tunnel counts as carrying it for this long after one.
const HOLD: Duration = Duration::from_millis(250);

/// Traffic of one tunnel. Every stream on the tunnel holds it.
#[derive(Debug)]
pub struct Traffic(Mutex<Span>);

#[derive(Debug)]
struct Span {
    began: Instant,
    bytes: u64,
    bulk_until: Option<Instant>,
}

impl Traffic {
    /// A tunnel that has moved nothing yet.
    pub(super) fn new(now: Instant) -> Self {
        Self(Mutex::new(Span { began: now, bytes: 0, bulk_until: None }))
    }

    /// Counts bytes that a stream has moved, in either direction. `now` is asked once in a while.
    pub fn moved(&self, bytes: u64, now: impl FnOnce() -> Instant) {
        // The tunnel's streams are one thread's, so the lock is never waited for; it guards plain figures.
        let mut span = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        span.bytes += bytes;
        if span.bytes < SPAN_BYTES {
            return;
        }
        let now = now();
        if now.duration_since(span.began) < BULK_SPAN {
            span.bulk_until = Some(now + HOLD);
        }
        (span.began, span.bytes) = (now, 0);
    }

    /// Whether bulk has passed a moment ago.
    pub fn is_bulk(&self, now: Instant) -> bool {
        let span = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        span.bulk_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_fast_and_much_is_bulk_and_only_for_a_while() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let traffic = Traffic::new(start);
        traffic.moved(SPAN_BYTES, || at(100));
        assert!(!traffic.is_bulk(at(100)), "4 MiB in 100 ms are 42 MB/s");
        traffic.moved(SPAN_BYTES - 1, || at(101));
        assert!(!traffic.is_bulk(at(101)), "a little less is not judged yet");
        traffic.moved(1, || at(110));
        assert!(traffic.is_bulk(at(110)) && traffic.is_bulk(at(359)), "4 MiB in 10 ms");
        assert!(!traffic.is_bulk(at(361)), "nothing has followed");
    }
}
