//! When an SVID is renewed, and when it is tried again: pure, time is an argument.
//!
//! Renewal begins at half of an SVID's life, give or take a tenth so that a fleet does not ask at
//! once, and so always before two thirds; earlier where that keeps the availability target: SVIDs then outlive
//! an outage of the issuer of that length, whenever it begins. After a failure it is tried again, more often the less
//! life is left, but never before the issuer wants to be asked again.
//!
//! Each moment counts on two clocks, and what comes first on either is due: certificates end by the wall's, which may
//! jump, and one that was set back must not put a renewal off by as much.

use std::time::{Duration, Instant, SystemTime};

pub(super) const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(150);
/// The same where nothing is held that is good: somebody waits for it.
const LONGEST_WITHOUT: Duration = Duration::from_secs(30);
/// However long an issuer wants us to wait.
const LONGEST_ASKED: Duration = Duration::from_secs(600);

/// The time on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// As certificates count it.
    pub wall: SystemTime,
    /// As nobody sets it.
    pub steady: Instant,
}

impl Moment {
    /// As of now.
    pub fn now() -> Self {
        Self { wall: SystemTime::now(), steady: Instant::now() }
    }

    fn after(self, wait: Duration) -> Self {
        Self { wall: self.wall + wait, steady: self.steady + wait }
    }

    /// How long until `self`, on the clock that gets there first.
    fn left(self, now: Self) -> Duration {
        let wall = self.wall.duration_since(now.wall).unwrap_or_default();
        wall.min(self.steady.saturating_duration_since(now.steady))
    }
}

/// How one identity's SVID stands.
#[derive(Clone, Debug)]
pub struct Standing {
    /// End of validity of the SVID that is held.
    pub not_after: Option<SystemTime>,
    /// When it is renewed, or tried again.
    next: Moment,
    /// Before this the issuer does not want to be asked.
    asked: Option<Instant>,
    /// Failures in a row.
    pub failures: u32,
    /// Why the last try failed.
    pub last_error: Option<String>,
}

impl Standing {
    /// Of an SVID that is held and good until `not_after`, and renewed after `wait`.
    pub fn held(not_after: Option<SystemTime>, wait: Duration, now: Moment) -> Self {
        Self { not_after, next: now.after(wait), asked: None, failures: 0, last_error: None }
    }

    /// When it is renewed or tried again, by the wall's clock as it stands now.
    pub fn at(&self, now: Moment) -> SystemTime {
        now.wall + self.left(false, now)
    }

    /// For how long the issuer does not want to be asked, if it said so.
    pub fn asked(&self, now: Moment) -> Option<Duration> {
        self.asked.map(|asked| asked.saturating_duration_since(now.steady)).filter(|wait| !wait.is_zero())
    }

    /// How long until it is due; at once if what is held is `useless` and nobody has refused another yet.
    pub(super) fn left(&self, useless: bool, now: Moment) -> Duration {
        let wait = if useless && self.failures == 0 { Duration::ZERO } else { self.next.left(now) };
        wait.max(self.asked(now).unwrap_or_default())
    }

    /// One more failure: `left` of the held SVID's life, and for how long the issuer wants not to be asked.
    pub(super) fn failed(
        &mut self,
        error: String,
        left: Option<Duration>,
        asked: Option<Duration>,
        chance: f64,
        now: Moment,
    ) {
        self.failures += 1;
        let asked = asked.map(|asked| asked.min(LONGEST_ASKED));
        self.asked = asked.map(|asked| now.steady + asked);
        self.next = now.after(backoff(self.failures, left, chance).max(asked.unwrap_or_default()));
        self.last_error = Some(error);
    }

    /// Something has changed that may change the issuer's mind. Counted anew: one more refusal shall not put the
    /// next try off by minutes.
    pub(super) fn again(&mut self, now: Moment) {
        self.failures = 0;
        self.next = now;
    }
}

/// How long after it was obtained an SVID with so much life is renewed; `chance` is between 0 and 1. While `target` is
/// less than nine tenths of its life, as much is left then.
pub(super) fn renewal(life: Duration, target: Option<Duration>, chance: f64) -> Duration {
    let chance = chance.clamp(0.0, 1.0);
    let half = life.mul_f64(0.45 + 0.1 * chance);
    let spare = target.map_or(life, |target| life.saturating_sub(target));
    // However short of life, an SVID is not renewed more often than some ten times in it.
    half.min(spare.max(life / 10).mul_f64(0.8 + 0.2 * chance))
}

/// How long to wait after `failures` in a row, with `left` of the held SVID's life. Not the same for everybody who
/// has failed at the same instant: `chance` is between 0 and 1.
pub(super) fn backoff(failures: u32, left: Option<Duration>, chance: f64) -> Duration {
    let doubled = FIRST_BACKOFF.saturating_mul(1 << failures.saturating_sub(1).min(10));
    let wait = match left.filter(|left| !left.is_zero()) {
        // Four more tries fit into what is left.
        Some(left) => doubled.min(LONGEST_BACKOFF).min(left / 4).max(FIRST_BACKOFF / 2),
        None => doubled.min(LONGEST_WITHOUT),
    };
    wait.mul_f64(0.75 + 0.25 * chance.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn noon() -> Moment {
        Moment { wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000), steady: Instant::now() }
    }

    /// Some time later by the steady clock, when the wall's has jumped as well.
    fn later(from: Moment, passed: Duration, jump: i64) -> Moment {
        let by = Duration::from_secs(jump.unsigned_abs());
        let wall = from.wall + passed;
        Moment { wall: if jump < 0 { wall - by } else { wall + by }, steady: from.steady + passed }
    }

    proptest! {
        #[test]
        fn renewal_is_around_half_and_always_before_two_thirds(life in 10u64..1_000_000, chance in 0.0f64..=1.0) {
            let life = Duration::from_secs(life);
            let wait = renewal(life, None, chance);
            prop_assert!(wait >= life.mul_f64(0.44) && wait < life.mul_f64(0.56));
        }

        #[test]
        fn as_much_as_the_target_is_left_at_renewal_and_nothing_is_renewed_without_end(
            life in 10u64..1_000_000, target in 0u64..2_000_000, chance in 0.0f64..=1.0
        ) {
            let (life, target) = (Duration::from_secs(life), Duration::from_secs(target));
            let wait = renewal(life, Some(target), chance);
            prop_assert!(wait <= renewal(life, None, chance), "never later than without a target");
            prop_assert!(wait >= life.mul_f64(0.08));
            if target * 10 <= life * 9 {
                prop_assert!(life - wait >= target, "{:?} left of {life:?}, target {target:?}", life - wait);
            }
        }

        #[test]
        fn backoff_grows_to_a_bound_and_never_eats_what_is_left(
            failures in 1u32..10_000, left in 4u64..100_000, chance in 0.0f64..=1.0
        ) {
            let left = Duration::from_secs(left);
            let wait = backoff(failures, Some(left), chance);
            prop_assert!(wait <= (left / 4).max(FIRST_BACKOFF / 2));
            for left in [None, Some(Duration::ZERO)] {
                let wait = backoff(failures, left, chance);
                prop_assert!(wait <= LONGEST_WITHOUT && wait >= FIRST_BACKOFF.mul_f64(0.75));
                prop_assert!(failures < 6 || wait >= LONGEST_WITHOUT.mul_f64(0.75), "what has expired is no reason for haste");
            }
        }

        #[test]
        fn an_issuer_is_never_asked_before_it_wants_to_be(
            failures in 0u32..20, left in proptest::option::of(0u64..100_000), asked in 1u64..600,
            passed in 0u64..1_000_000, jump in -100_000i64..100_000, useless: bool, news: bool
        ) {
            let (start, asked) = (noon(), Duration::from_secs(asked));
            let mut standing = Standing::held(None, HOUR, start);
            standing.failures = failures;
            standing.failed("busy".into(), left.map(Duration::from_secs), Some(asked), 0.5, start);
            let passed = Duration::from_millis(passed);
            let now = later(start, passed, jump);
            if news {
                standing.again(now);
            }
            if passed < asked {
                prop_assert!(standing.left(useless, now) >= asked - passed, "however the clock jumps");
            } else if news {
                prop_assert_eq!(standing.left(useless, now), Duration::ZERO);
            }
        }

        #[test]
        fn no_jump_of_the_clock_puts_a_renewal_off(
            life in 10u64..1_000_000, jump in -10_000_000i64..10_000_000, chance in 0.0f64..=1.0
        ) {
            let (start, life) = (noon(), Duration::from_secs(life));
            let wait = renewal(life, None, chance);
            let standing = Standing::held(Some(start.wall + life), wait, start);
            prop_assert!(standing.left(false, later(start, Duration::ZERO, jump)) <= wait);
            prop_assert_eq!(standing.left(false, later(start, wait, jump)), Duration::ZERO);
            // One that went ahead makes due what has as little life left.
            let ahead = later(start, Duration::ZERO, wait.as_secs() as i64 + 1);
            prop_assert_eq!(standing.left(false, ahead), Duration::ZERO);
        }
    }

    #[test]
    fn what_is_useless_is_renewed_at_once_and_then_in_its_time() {
        let now = noon();
        let mut standing = Standing::held(Some(now.wall + HOUR), HOUR / 2, now);
        assert_eq!(standing.left(false, now), HOUR / 2);
        assert_eq!(standing.left(true, now), Duration::ZERO);
        standing.failed("denied".into(), Some(Duration::ZERO), None, 1.0, now);
        assert_eq!(standing.left(true, now), FIRST_BACKOFF);
        assert_eq!(renewal(Duration::ZERO, None, 0.5), Duration::ZERO);
    }
}
