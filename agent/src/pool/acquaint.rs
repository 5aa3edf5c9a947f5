//! Workloads that prove themselves on a connection between two nodes before they have a stream on it, so that
//! their first stream waits for nothing.
//!
//! Only on connections that were made ahead, and a bounded number of workloads: a proof costs either node about
//! as much as half a handshake, and most of a large mesh never speak to each other.

use std::time::Duration;

use super::slot::Slot;
use super::{Failure, Key, Pool, node};
use crate::identity::SpiffeId;

/// Most workloads of either node.
const MOST: usize = 32;

/// How long after the try before each comes: a node that has just started waits for SVIDs, or for its directory.
const TRIES: [Duration; 3] = [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(5)];

impl Pool {
    /// Has workloads of the two nodes (`ours` first, `theirs` first, of those that matter most) prove themselves
    /// on the newest connection between them. One after the other, as whoever has a stream goes first. Who
    /// cannot has lost nothing: a stream that needs it will say why.
    pub async fn acquaint(&self, node: &Key, ours: Vec<SpiffeId>, theirs: Vec<SpiffeId>) {
        let mut left = pairs(ours, theirs);
        for wait in TRIES {
            tokio::time::sleep(wait).await;
            let mut failed = Vec::new();
            for (source, destination) in left {
                let parties = Key { source, destination, address: node.address };
                if let Err(failure) = self.introduce(node, &parties).await {
                    tracing::debug!(node = %node.destination, %failure, "not proven ahead");
                    failed.push((parties.source, parties.destination));
                }
            }
            left = failed;
            if left.is_empty() {
                return;
            }
        }
    }

    /// Without a connection there is nothing to do.
    async fn introduce(&self, node: &Key, parties: &Key) -> Result<(), Failure> {
        let newest = self.lock().get(node).and_then(Slot::newest);
        match newest {
            Some((place, proofs)) => node::introduce(&self.dialer, place, &proofs, parties).await,
            None => Ok(()),
        }
    }

    /// Who has proven themselves on the connections between two nodes, here and there.
    pub(super) fn met(&self, node: &Key) -> [Vec<SpiffeId>; 2] {
        self.lock().get(node).map(Slot::met).unwrap_or_default()
    }
}

/// Pairs in which everybody is at least once: what one proves to a node it need not prove there again.
fn pairs(mut ours: Vec<SpiffeId>, mut theirs: Vec<SpiffeId>) -> Vec<(SpiffeId, SpiffeId)> {
    for side in [&mut ours, &mut theirs] {
        let mut seen = std::collections::HashSet::new();
        side.retain(|id| seen.insert(id.clone()));
        side.truncate(MOST);
    }
    if ours.is_empty() || theirs.is_empty() {
        return Vec::new();
    }
    let (a, b) = (ours.len(), theirs.len());
    (0..a.max(b)).map(|i| (ours[i % a].clone(), theirs[i % b].clone())).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;
    use crate::identity::TrustDomain;

    fn ids(numbers: &[u8]) -> Vec<SpiffeId> {
        let domain = TrustDomain::parse("td.test").unwrap();
        numbers.iter().map(|n| SpiffeId::workload(&domain, "shop", &format!("w{n}")).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn everybody_is_asked_about_once_or_is_beyond_the_bound(
            ours in prop::collection::vec(any::<u8>(), 0..80),
            theirs in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let met = pairs(ids(&ours), ids(&theirs));
            let distinct = |numbers: &[u8]| numbers.iter().collect::<HashSet<_>>().len().min(MOST);
            let (a, b) = (distinct(&ours), distinct(&theirs));
            let expected = if a == 0 || b == 0 { 0 } else { a.max(b) };
            prop_assert_eq!(met.len(), expected);
            if expected > 0 {
                prop_assert_eq!(met.iter().map(|(ours, _)| ours).collect::<HashSet<_>>().len(), a);
                prop_assert_eq!(met.iter().map(|(_, theirs)| theirs).collect::<HashSet<_>>().len(), b);
            }
        }
    }
}
