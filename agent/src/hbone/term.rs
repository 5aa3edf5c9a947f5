//! How long a connection may go on, by the two certificates that it rests on.
//!
//! Judged once, when it is made, and counted on the monotonic clock: a clock that jumps later ends nothing.

use std::time::{Duration, Instant, SystemTime};

use crate::identity::svid::Leaf;

/// No connection is looked at further ahead: an [`Instant`] has an end.
const FAR: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// When a connection is left, and when it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Term {
    /// The first of its certificates has expired: it takes no new streams from now on.
    pub retire: Instant,
    /// The streams that it still has are cut.
    pub end: Instant,
}

impl Term {
    /// Of a connection that is made `now`, at `wall` by the clock; streams may outlive its certificates by `outlive`.
    pub fn of(leaves: [&Leaf; 2], outlive: Duration, wall: SystemTime, now: Instant) -> Self {
        let until = leaves[0].not_after.min(leaves[1].not_after);
        let left = until.duration_since(wall).unwrap_or_default().min(FAR);
        let retire = now + left;
        Self { retire, end: retire + outlive.min(FAR) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::identity::SpiffeId;

    #[test]
    fn the_first_certificate_to_expire_counts_and_no_length_is_too_long() {
        let (wall, now) = (SystemTime::now(), Instant::now());
        let leaf = |seconds: u64| Leaf {
            id: SpiffeId::parse("spiffe://td.test/ns/a/sa/web").unwrap(),
            node: None,
            serial: "1".into(),
            not_before: wall - Duration::from_secs(60),
            not_after: wall + Duration::from_secs(seconds),
            chain: Arc::default(),
        };
        let second = Duration::from_secs(1);
        let of = |a, b, outlive| Term::of([&leaf(a), &leaf(b)], outlive, wall, now);
        assert_eq!(of(60, 20, 5 * second), Term { retire: now + 20 * second, end: now + 25 * second });
        assert_eq!(of(20, 60, Duration::ZERO).end, now + 20 * second);
        assert_eq!(Term::of([&leaf(5), &leaf(5)], second, wall + 60 * second, now).retire, now);
        assert!(of(u64::from(u32::MAX), u64::from(u32::MAX), Duration::MAX).end > now + FAR);
    }
}
