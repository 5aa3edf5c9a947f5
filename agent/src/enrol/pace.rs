//! How soon pods are looked at again.

use std::time::Duration;

/// How often pods are looked at without a change in the directory: a namespace may have been made
/// late or anew, and what failed may work now.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A sandbox's first process follows its cgroup within milliseconds.
const SOON: Duration = Duration::from_millis(5);

/// Looks often after news of a cgroup, then ever less.
#[derive(Debug)]
pub struct Pace(Duration);

impl Default for Pace {
    fn default() -> Self {
        Self(LOOK_EVERY)
    }
}

impl Pace {
    /// Something has begun that a pod may be waiting for.
    pub fn hurry(&mut self) {
        self.0 = SOON;
    }

    /// How long to wait before the next look.
    pub fn next(&mut self, somebody_waits: bool) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(LOOK_EVERY);
        if somebody_waits { now } else { LOOK_EVERY }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_is_followed_closely_and_not_for_ever() {
        let mut pace = Pace::default();
        assert_eq!(pace.next(true), LOOK_EVERY);
        pace.hurry();
        assert_eq!((pace.next(true), pace.next(true)), (SOON, SOON * 2));
        assert_eq!(pace.next(false), LOOK_EVERY, "nobody waits");
        for _ in 0..8 {
            pace.next(true);
        }
        assert_eq!(pace.next(true), LOOK_EVERY);
    }
}
