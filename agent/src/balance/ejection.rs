//! When an endpoint is out of use: no I/O, no clock, no chance of its own.
//!
//! ```text
//!              LIMIT failures in a row                  back-off over
//!   ┌────────┐ and the caller allows it  ┌─────────┐ ─────────────────► ┌─────┐
//!   │ in use │ ────────────────────────► │ ejected │                    │ due │
//!   └────────┘                           └─────────┘ ◄───────────────── └─────┘
//!       ▲                                   the probe failed: back-off     │
//!       └───────────────────────────────────  doubled ─────────────────────┘
//!                   a success, of the one probe or of anyone             one probe
//! ```
//!
//! One success is enough to come back: it was a stream that the endpoint's application accepted.
//! A probe that comes to nothing (its client gave up) leaves the endpoint due. Failures of those who
//! were on their way when it was ejected change nothing, or a burst would count as many back-offs.

use std::time::{Duration, Instant};

/// Failures in a row that eject. One may be an accident; each costs its connection a retry.
pub(super) const LIMIT: u32 = 3;
/// The first back-off. Short, as a probe that fails is retried elsewhere and costs its client little.
pub(super) const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// No back-off is longer: a recovered endpoint is not left idle for more than half a minute.
pub(super) const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

/// How an endpoint stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing speaks against it.
    Trusted,
    /// It failed lately, less often than ejects.
    Suspect,
    /// It failed often enough, but too many others are ejected already.
    Failing,
    /// Out of use.
    Ejected,
    /// Its back-off is over, and nobody probes it yet.
    Due,
}

/// Permission to try an ejected endpoint; names the back-off it followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Probe(u64);

/// One endpoint's failures and what follows from them.
#[derive(Clone, Debug, Default)]
pub(super) struct Ejection {
    /// Failures in a row while in use.
    failures: u32,
    out: Option<Out>,
    /// Back-offs in a row: each doubles the next.
    times: u32,
    /// Back-offs ever, so that a probe of an earlier one is known as such.
    backoffs: u64,
    readmitted: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Out {
    until: Instant,
    probed: bool,
}

impl Ejection {
    pub(super) fn standing(&self, now: Instant) -> Standing {
        match &self.out {
            Some(out) if out.probed || now < out.until => Standing::Ejected,
            Some(_) => Standing::Due,
            None if self.failures == 0 => Standing::Trusted,
            None if self.failures < LIMIT => Standing::Suspect,
            None => Standing::Failing,
        }
    }

    pub(super) fn is_out(&self) -> bool {
        self.out.is_some()
    }

    /// Lets one probe through when its time has come.
    pub(super) fn probe(&mut self, now: Instant) -> Option<Probe> {
        let due = self.standing(now) == Standing::Due;
        let out = self.out.as_mut().filter(|_| due)?;
        out.probed = true;
        Some(Probe(self.backoffs))
    }

    /// The probe came to nothing.
    pub(super) fn abandoned(&mut self, probe: Probe) {
        if let Some(out) = self.out.as_mut().filter(|_| probe == Probe(self.backoffs)) {
            out.probed = false;
        }
    }

    /// A stream was accepted; true when that ends an ejection.
    pub(super) fn succeeded(&mut self, now: Instant) -> bool {
        self.failures = 0;
        let was_out = self.out.take().is_some();
        if was_out {
            self.readmitted = Some(now);
        }
        was_out
    }

    /// An attempt failed by the endpoint's fault. Returns the back-off when one begins; `may_eject`
    /// says whether enough others are in use, `chance` (0 to 1) shortens the back-off by up to a
    /// quarter, so that agents do not probe in step.
    pub(super) fn failed(
        &mut self,
        probe: Option<Probe>,
        now: Instant,
        may_eject: bool,
        chance: f64,
    ) -> Option<Duration> {
        let begins = match self.out {
            Some(_) => probe == Some(Probe(self.backoffs)),
            None => {
                self.failures = self.failures.saturating_add(1);
                self.failures >= LIMIT && may_eject
            }
        };
        if !begins {
            return None;
        }
        // Whoever was well for as long as the longest back-off begins anew.
        let relapsed = self.readmitted.is_none_or(|at| now.duration_since(at) < LONGEST_BACKOFF);
        if self.out.is_none() && !relapsed {
            self.times = 0;
        }
        let whole = FIRST_BACKOFF.saturating_mul(1 << self.times.min(16)).min(LONGEST_BACKOFF);
        let backoff = whole.mul_f64(1.0 - chance.clamp(0.0, 1.0) / 4.0);
        self.times = self.times.saturating_add(1);
        self.backoffs += 1;
        self.out = Some(Out { until: now + backoff, probed: false });
        Some(backoff)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ejected(now: Instant) -> Ejection {
        let mut endpoint = Ejection::default();
        for _ in 0..LIMIT {
            endpoint.failed(None, now, true, 0.0);
        }
        assert_eq!(endpoint.standing(now), Standing::Ejected);
        endpoint
    }

    #[test]
    fn failing_probes_double_the_back_off_up_to_its_cap_and_a_lasting_recovery_resets_it() {
        let mut now = Instant::now();
        let mut endpoint = ejected(now);
        let mut backoffs = Vec::new();
        for _ in 0..6 {
            now += LONGEST_BACKOFF;
            let probe = endpoint.probe(now);
            backoffs.push(endpoint.failed(probe, now, true, 0.0).unwrap().as_secs());
        }
        assert_eq!(backoffs, [2, 4, 8, 16, 30, 30]);
        now += LONGEST_BACKOFF;
        assert!(endpoint.succeeded(now));
        let again = |endpoint: &mut Ejection, now| {
            (0..LIMIT).filter_map(|_| endpoint.failed(None, now, true, 0.0)).collect::<Vec<_>>()
        };
        assert_eq!(again(&mut endpoint.clone(), now), [LONGEST_BACKOFF], "it flaps");
        assert_eq!(again(&mut endpoint, now + LONGEST_BACKOFF), [FIRST_BACKOFF], "it was well for long");
    }

    #[test]
    fn an_abandoned_probe_leaves_room_for_the_next_and_an_old_one_has_no_say() {
        let mut now = Instant::now();
        let mut endpoint = ejected(now);
        now += FIRST_BACKOFF;
        let first = endpoint.probe(now).unwrap();
        assert_eq!(endpoint.probe(now), None, "one at a time");
        endpoint.abandoned(first);
        let second = endpoint.probe(now).unwrap();
        assert!(endpoint.failed(Some(second), now, true, 0.0).is_some());
        now += LONGEST_BACKOFF;
        let third = endpoint.probe(now).unwrap();
        endpoint.abandoned(second);
        assert_eq!(endpoint.probe(now), None, "the third is still under way");
        assert_eq!(endpoint.failed(Some(second), now, true, 0.0), None);
        assert!(endpoint.failed(Some(third), now, true, 0.0).is_some());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Wait(u64),
        Fail { may_eject: bool, chance: f64 },
        Succeed,
        Probe,
        EndProbe { failed: bool, chance: f64 },
        Abandon,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0u64..40_000).prop_map(Step::Wait),
            (any::<bool>(), 0.0..=1.0).prop_map(|(may_eject, chance)| Step::Fail { may_eject, chance }),
            Just(Step::Succeed),
            Just(Step::Probe),
            (any::<bool>(), 0.0..=1.0).prop_map(|(failed, chance)| Step::EndProbe { failed, chance }),
            Just(Step::Abandon),
        ]
    }

    proptest! {
        #[test]
        fn whatever_happens_in_whatever_order_its_rules_hold(steps in prop::collection::vec(step(), 0..200)) {
            let mut now = Instant::now();
            let mut endpoint = Ejection::default();
            let mut row = 0;
            let mut until: Option<Instant> = None;
            let mut probe: Option<Probe> = None;
            for step in steps {
                let was_out = endpoint.is_out();
                let began = match step {
                    Step::Wait(ms) => {
                        now += Duration::from_millis(ms);
                        None
                    }
                    Step::Fail { may_eject, chance } => {
                        row += u32::from(!was_out);
                        let began = endpoint.failed(None, now, may_eject, chance);
                        prop_assert_eq!(began.is_some(), !was_out && row >= LIMIT && may_eject);
                        began
                    }
                    Step::Succeed => {
                        prop_assert_eq!(endpoint.succeeded(now), was_out);
                        (row, until, probe) = (0, None, None);
                        prop_assert_eq!(endpoint.standing(now), Standing::Trusted);
                        None
                    }
                    Step::Probe => {
                        let granted = endpoint.probe(now);
                        let due = until.is_some_and(|until| now >= until) && probe.is_none();
                        prop_assert_eq!(granted.is_some(), due, "when due, and one at a time");
                        probe = probe.or(granted);
                        None
                    }
                    Step::EndProbe { failed, chance } => match probe.take() {
                        Some(ended) if failed => {
                            let began = endpoint.failed(Some(ended), now, false, chance);
                            prop_assert!(began.is_some(), "a probe's failure needs no permission");
                            began
                        }
                        Some(_) => {
                            prop_assert!(endpoint.succeeded(now));
                            (row, until) = (0, None);
                            None
                        }
                        None => None,
                    },
                    Step::Abandon => {
                        if let Some(probe) = probe.take() {
                            endpoint.abandoned(probe);
                        }
                        None
                    }
                };
                if let Some(backoff) = began {
                    prop_assert!(backoff >= FIRST_BACKOFF * 3 / 4 && backoff <= LONGEST_BACKOFF);
                    until = Some(now + backoff);
                    row = 0;
                }
                prop_assert_eq!(endpoint.is_out(), until.is_some());
                if let Some(until) = until {
                    let free = now >= until && probe.is_none();
                    prop_assert_eq!(endpoint.standing(now) == Standing::Due, free);
                }
            }
        }
    }
}
