//! The time, for what cannot be taken back: a root that leaves, a revocation or a node that is forgotten.
//!
//! A clock that jumps ahead makes everything look expired, and may be set right a minute later. So such a jump is
//! believed only once it has lasted; until then time passes as if it had not been. A clock that goes back is followed
//! at once: then all of it happens later.

use std::time::{Duration, Instant, SystemTime};

/// What is no jump: slewing, and a machine that did not get to look for a while.
const SLACK: Duration = Duration::from_secs(60);
/// How long a jump ahead must last.
const BELIEVED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The wall's clock, seen over time.
#[derive(Debug)]
pub(super) struct Cautious {
    /// What was last believed, and when.
    base: (SystemTime, Instant),
    /// Since when the wall's clock is ahead of that.
    doubted: Option<Instant>,
}

impl Cautious {
    /// Believes what the clock says at the start.
    pub(super) fn new(wall: SystemTime, steady: Instant) -> Self {
        Self { base: (wall, steady), doubted: None }
    }

    /// The time that can be relied on; to be asked every few seconds at least.
    pub(super) fn now(&mut self, wall: SystemTime, steady: Instant) -> SystemTime {
        let believed = self.base.0 + steady.saturating_duration_since(self.base.1);
        let ahead = wall.duration_since(believed).unwrap_or_default();
        if ahead <= SLACK {
            if self.doubted.take().is_some() {
                tracing::info!("the clock is where it was before it jumped ahead");
            }
            self.base = (wall, steady);
            return wall;
        }
        let since = *self.doubted.get_or_insert_with(|| {
            tracing::error!(
                seconds = ahead.as_secs(),
                "the clock has jumped ahead: for a day no root is retired and no revocation forgotten because of that; is it right?"
            );
            steady
        });
        if steady.saturating_duration_since(since) < BELIEVED_AFTER {
            return believed;
        }
        tracing::warn!(seconds = ahead.as_secs(), "the clock has been ahead for a day: it is believed now");
        (self.base, self.doubted) = ((wall, steady), None);
        wall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_jump_ahead_is_believed_once_it_has_lasted_and_one_back_at_once() {
        let (wall, steady) = (SystemTime::UNIX_EPOCH + 500_000 * HOUR, Instant::now());
        let mut clock = Cautious::new(wall, steady);
        let mut after =
            |passed: u32, ahead: u32| clock.now(wall + (passed + ahead) * HOUR, steady + passed * HOUR);
        assert_eq!(after(1, 0), wall + HOUR);
        assert_eq!(after(2, 900), wall + 2 * HOUR, "as if it had not jumped");
        assert_eq!(after(25, 900), wall + 25 * HOUR, "for a day");
        assert_eq!(after(26, 900), wall + 926 * HOUR, "which has passed");
        assert_eq!(after(27, 900), wall + 927 * HOUR);
        assert_eq!(after(28, 0), wall + 28 * HOUR, "back");
        assert_eq!(after(29, 900), wall + 29 * HOUR);
        assert_eq!(after(30, 0), wall + 30 * HOUR, "and forgotten");
        assert_eq!(after(53, 900), wall + 53 * HOUR, "the next one counts anew");
        assert_eq!(after(76, 900), wall + 76 * HOUR);
        let late = clock.now(wall + 76 * HOUR + SLACK, steady + 76 * HOUR);
        assert_eq!(late, wall + 76 * HOUR + SLACK, "this is no jump");
    }
}
