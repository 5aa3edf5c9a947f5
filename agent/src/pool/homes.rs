//! Which thread of the agent has the connection to a node. Where few streams come, that one connection is every
//! thread's: threads shall not multiply handshakes that traffic does not need.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::lock;
use crate::identity::SpiffeId;

/// The threads that nodes' connections are on: of several that have one, the first.
#[derive(Debug, Default)]
struct Homes(Mutex<HashMap<SpiffeId, usize>>);

/// One thread's place among those of its agent.
#[derive(Clone, Debug, Default)]
pub struct Seat {
    homes: Arc<Homes>,
    thread: usize,
}

impl Seat {
    /// The places of an agent's threads, from the first.
    pub fn row() -> impl Iterator<Item = Self> {
        let homes = Arc::<Homes>::default();
        (0..).map(move |thread| Self { homes: Arc::clone(&homes), thread })
    }

    /// The thread that streams to a node may go to instead; `None` if it is this one, as it is from now on when
    /// it was nobody.
    pub(super) fn elsewhere(&self, node: &SpiffeId) -> Option<usize> {
        let home = *lock(&self.homes.0).entry(node.clone()).or_insert(self.thread);
        (home != self.thread).then_some(home)
    }

    /// This thread has no connection to the node any more.
    pub(super) fn leave(&self, node: &SpiffeId) {
        let mut homes = lock(&self.homes.0);
        if homes.get(node) == Some(&self.thread) {
            homes.remove(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    #[test]
    fn the_first_that_asks_has_it_until_it_leaves() {
        let domain = TrustDomain::parse("td.test").unwrap();
        let [n1, n2] = ["n1", "n2"].map(|name| SpiffeId::node(&domain, name).unwrap());
        let seats: Vec<_> = Seat::row().take(3).collect();
        assert_eq!(seats[1].elsewhere(&n1), None);
        assert_eq!(seats[0].elsewhere(&n1), Some(1));
        assert_eq!(seats[0].elsewhere(&n2), None, "another node's is another's");
        seats[0].leave(&n1);
        assert_eq!(seats[2].elsewhere(&n1), Some(1), "it is not for others to say");
        seats[1].leave(&n1);
        assert_eq!(seats[2].elsewhere(&n1), None);
        assert_eq!(seats[1].elsewhere(&n1), Some(2));
    }
}
