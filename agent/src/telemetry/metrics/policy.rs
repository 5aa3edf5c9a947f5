//! What the access policies came to, one series for each policy, and no more than so many.

use prometheus::{IntCounterVec, IntGauge, Registry};

use super::{counters, register};

/// Most policies that have series of their own. Their names are whoever's who may write policies.
const MAX_POLICIES: usize = 1_000;

/// How the policies stand.
#[derive(Clone, Debug, Default)]
pub struct Standing<'a> {
    /// One for each policy.
    pub counts: Vec<Counts<'a>>,
    /// Whether the newest state of their source is not in use.
    pub stale: bool,
}

/// What a policy came to.
#[derive(Clone, Copy, Debug)]
pub struct Counts<'a> {
    /// `namespace/name`.
    pub policy: &'a str,
    /// Connections refused because of it.
    pub denied: u64,
    /// Connections that it would refuse, were it enforced.
    pub would_deny: u64,
}

/// Repeats what the policies count themselves.
pub(super) struct Policies {
    denied: IntCounterVec,
    would_deny: IntCounterVec,
    stale: IntGauge,
}

impl Policies {
    pub(super) fn new(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            denied: counters(
                registry,
                "hauberk_policy_denied_total",
                "Connections refused, by the access policy that refused them.",
                &["policy"],
            )?,
            would_deny: counters(
                registry,
                "hauberk_policy_would_deny_total",
                "Connections let in that dry-run policies would refuse, by policy.",
                &["policy"],
            )?,
            stale: register(
                registry,
                IntGauge::new(
                    "hauberk_policies_stale",
                    "1 while the policies' source, or one of them, cannot be used and an earlier state is enforced.",
                )?,
            )?,
        })
    }

    /// Takes over the counts; how many policies are left out.
    pub(super) fn set(&self, standing: &Standing<'_>) -> usize {
        self.stale.set(standing.stale.into());
        // Policies that are gone take their series with them.
        self.denied.reset();
        self.would_deny.reset();
        for counts in standing.counts.iter().take(MAX_POLICIES) {
            self.denied.with_label_values(&[counts.policy]).inc_by(counts.denied);
            self.would_deny.with_label_values(&[counts.policy]).inc_by(counts.would_deny);
        }
        standing.counts.len().saturating_sub(MAX_POLICIES)
    }
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn series_are_counted_once_capped_and_go_with_their_policy() {
        let registry = Registry::new();
        let policies = Policies::new(&registry).unwrap();
        let names: Vec<String> = (0..MAX_POLICIES + 5).map(|n| format!("demo/p{n:04}")).collect();
        let counts = names.iter().map(|policy| Counts { policy, denied: 2, would_deny: 3 }).collect();
        let standing = Standing { counts, stale: true };
        assert_eq!(policies.set(&standing), 5);
        assert_eq!(policies.set(&standing), 5, "a second scrape");
        let page = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        assert!(page().contains("hauberk_policy_denied_total{policy=\"demo/p0000\"} 2\n"));
        assert!(page().contains("hauberk_policy_would_deny_total{policy=\"demo/p0999\"} 3\n"));
        assert!(page().contains("hauberk_policies_stale 1\n"));
        assert!(!page().contains("demo/p1000"), "over the cap");
        policies.set(&Standing::default());
        assert!(!page().contains("demo/"), "policies that are gone");
    }
}
