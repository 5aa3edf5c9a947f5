//! Connections to other nodes' agents that are made before anybody needs them: to which, and when.
//!
//! Once, after the start: to the nodes spoken to last, then to nodes with workloads, the nearest first, up to
//! `tunnel.warmNodes`. Agents that restart together come at times of their own and choose different nodes. A
//! node that cannot be reached is tried a few times more, and at once when its agent connects to us; after that
//! a stream has to need it. What nobody uses is closed as idle, as any other connection.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::directory::{Directory, Mode, Node};
use crate::identity::SpiffeId;
pub use crate::issue::keep::nodes::Recent;
use crate::pool::{Failure, Key, Word};
use crate::shard::Shard;

/// How long after each failed try the next one comes; half as long again by chance.
const AGAIN: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(25)];
/// How long what changed may stay unsaved: a busy agent shall not write for each connection.
const SAVE_AFTER: Duration = Duration::from_secs(1);
/// For each node of the fleet, how much longer its agents take over what all of them do at once.
const SPREAD: Duration = Duration::from_millis(2);
const LONGEST_SPREAD: Duration = Duration::from_secs(10);

/// The time over which a fleet of so many nodes spreads what all of them do at once.
pub fn spread(nodes: usize) -> Duration {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    SPREAD.saturating_mul(nodes).min(LONGEST_SPREAD)
}

/// The nodes to connect to, at `most`, the first first: those of `recent` (the last one spoken to first), those
/// of `own` zone, the rest; of these, nodes with workloads in the mesh only. Which of many equals is chosen
/// depends on `own` name, so that a fleet does not meet at a few nodes.
pub fn choose(directory: &Directory, own: &str, recent: &[String], most: usize) -> Vec<Arc<Node>> {
    let members = directory.workloads().filter(|workload| workload.mode != Mode::Off);
    let hosts: HashSet<&str> = members.map(|workload| &*workload.node).collect();
    let recent: HashMap<&str, usize> =
        recent.iter().enumerate().map(|(rank, name)| (&**name, rank)).collect();
    let zone = directory.node(own).and_then(|node| node.zone.as_deref());
    let rank = |node: &Node| {
        let spoken_to = recent.get(&*node.name).copied().unwrap_or(usize::MAX);
        let is_far = zone.is_none() || node.zone.as_deref() != zone;
        (spoken_to, is_far, chance(own, &node.name))
    };
    let others = directory.nodes().filter(|node| node.name != own && hosts.contains(&*node.name));
    let mut ranked: Vec<_> = others.map(|node| (rank(node), node)).collect();
    ranked.sort_unstable_by_key(|(rank, _)| *rank);
    ranked.into_iter().take(most).map(|(_, node)| Arc::clone(node)).collect()
}

/// The same for the same pair of nodes, and evenly spread over all pairs.
fn chance(own: &str, other: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (own, other).hash(&mut hasher);
    hasher.finish()
}

/// A node that could not be reached.
#[derive(Debug)]
struct Missing {
    key: Key,
    /// How often it was tried.
    tries: usize,
    /// When it is tried again; `None` when it has to come to us, or be needed.
    next: Option<Instant>,
}

type Tried = (Key, usize, Result<bool, Failure>);

/// Makes connections ahead on this thread, where the others find them, and remembers who was spoken to.
pub(crate) async fn run(shard: Shard, mut recent: Recent) {
    let mut words = shard.words.subscribe();
    shard.trust.holding(&[&shard.node]).await;
    let directory = shard.directory.load();
    tokio::time::sleep(spread(directory.node_count()).mul_f64(fastrand::f64())).await;
    let own = shard.node.node_name().unwrap_or_default();
    let chosen = choose(&directory, own, recent.names(), shard.tunnel.warm_nodes.into());
    drop(directory);
    tracing::debug!(nodes = chosen.len(), "connecting to other nodes' agents before they are needed");
    let mut tries: JoinSet<Tried> = JoinSet::new();
    let mut missing: HashMap<SpiffeId, Missing> = HashMap::new();
    for node in &chosen {
        tries.spawn(reach(shard.clone(), shard.between(node), 1));
    }
    let mut save_at: Option<Instant> = None;
    loop {
        let next = missing.values().filter_map(|missing| missing.next).chain(save_at).min();
        tokio::select! {
            word = words.recv() => match word {
                Ok(Word::Needed(key)) => {
                    missing.remove(&key.destination);
                    recent.used(key.destination.node_name().unwrap_or_default());
                    if recent.is_changed() {
                        save_at.get_or_insert(Instant::now() + SAVE_AFTER);
                    }
                }
                Ok(Word::Arrived(id)) => {
                    let known = missing.remove(&id).map(|missing| (missing.key, missing.tries));
                    if let Some((key, tries_made)) = known.or_else(|| Some((lost(&shard, &id)?, 0))) {
                        tries.spawn(reach(shard.clone(), key, tries_made + 1));
                    }
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            },
            Some(Ok(tried)) = tries.join_next() => {
                let (key, tries_made, outcome) = tried;
                if let Err(failure) = outcome {
                    tracing::debug!(node = %key.destination, %failure, tries = tries_made, "no connection made ahead");
                    let wait = AGAIN.get(tries_made - 1).map(|wait| wait.mul_f64(1.0 + 0.5 * fastrand::f64()));
                    let next = wait.map(|wait| Instant::now() + wait);
                    missing.insert(key.destination.clone(), Missing { key, tries: tries_made, next });
                }
            }
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                let now = Instant::now();
                if save_at.is_some_and(|at| at <= now) {
                    save_at = None;
                    recent.save();
                }
                for due in missing.extract_if(|_, missing| missing.next.is_some_and(|at| at <= now)) {
                    let Missing { key, tries: tries_made, .. } = due.1;
                    tries.spawn(reach(shard.clone(), key, tries_made + 1));
                }
            }
            () = shard.draining() => return recent.save(),
        }
    }
}

/// The connection to a node whose agent had one from us until it went, and is back now.
fn lost(shard: &Shard, id: &SpiffeId) -> Option<Key> {
    let key = shard.between(shard.directory.load().node(id.node_name()?)?);
    shard.pool.holds(&key).then_some(key)
}

/// Makes a connection, and has workloads of both nodes prove themselves on it.
async fn reach(shard: Shard, key: Key, tries: usize) -> Tried {
    let outcome = shard.pool.ahead(&key).await;
    if matches!(outcome, Ok(true)) {
        let directory = shard.directory.load();
        let [ours, theirs] = [&shard.node, &key.destination].map(|node| {
            let enrolled = directory.enrolled_on(node.node_name().unwrap_or_default());
            enrolled.map(|workload| workload.id.clone()).collect()
        });
        drop(directory);
        shard.pool.acquaint(&key, ours, theirs).await;
    }
    (key, tries, outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::Workload;
    use crate::identity::TrustDomain;

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    fn workload(node: &str, mode: Mode) -> Arc<Workload> {
        let id = SpiffeId::workload(&domain(), "shop", "web").unwrap();
        let (name, namespace, node) = (format!("web-{node}"), "shop".into(), node.to_owned());
        Arc::new(Workload {
            name,
            namespace,
            id,
            node,
            addresses: Vec::new(),
            mode,
            netns: None,
            exclusions: Arc::default(),
            svid_lifetime: None,
        })
    }

    /// Nodes in their zones, each with a workload in the mesh but those in zone "idle" and zone "off".
    fn directory(nodes: &[(&str, Option<&str>)]) -> Directory {
        let workloads = nodes.iter().filter_map(|(name, zone)| match zone {
            Some("idle") => None,
            Some("off") => Some(workload(name, Mode::Off)),
            _ => Some(workload(name, Mode::Strict)),
        });
        let node = |(name, zone): &(&str, Option<&str>)| {
            Arc::new(Node {
                name: (*name).into(),
                id: SpiffeId::node(&domain(), name).unwrap(),
                address: [127, 0, 0, 1].into(),
                zone: zone.map(str::to_owned),
            })
        };
        Directory::new(workloads.collect(), Vec::new(), nodes.iter().map(node).collect())
    }

    fn names(chosen: &[Arc<Node>]) -> Vec<&str> {
        chosen.iter().map(|node| &*node.name).collect()
    }

    #[test]
    fn who_was_spoken_to_comes_first_then_who_is_near_and_nobody_without_workloads() {
        let directory = directory(&[
            ("own", Some("a")),
            ("near", Some("a")),
            ("far", Some("b")),
            ("nowhere", None),
            ("old", Some("b")),
            ("last", None),
            ("empty", Some("idle")),
            ("outside", Some("off")),
        ]);
        let recent = ["last", "own", "gone", "empty", "old"].map(str::to_owned);
        let chosen = choose(&directory, "own", &recent, 10);
        assert_eq!(names(&chosen)[..3], ["last", "old", "near"]);
        let mut rest = names(&chosen)[3..].to_vec();
        rest.sort_unstable();
        assert_eq!(rest, ["far", "nowhere"]);
        assert_eq!(names(&choose(&directory, "own", &recent, 3)), ["last", "old", "near"]);
        assert!(choose(&directory, "own", &recent, 0).is_empty());
        assert_eq!(names(&choose(&directory, "unlisted", &recent, 1)), ["last"], "without a zone too");
    }

    #[test]
    fn a_fleet_does_not_meet_at_a_few_nodes() {
        const NODES: usize = 300;
        const MOST: usize = 8;
        let all: Vec<String> = (0..NODES).map(|n| format!("n{n}")).collect();
        let nodes: Vec<_> = all.iter().map(|name| (&**name, Some("a"))).collect();
        let directory = directory(&nodes);
        let mut met: HashMap<String, usize> = HashMap::new();
        for own in &all {
            let chosen = choose(&directory, own, &[], MOST);
            assert_eq!(names(&chosen), names(&choose(&directory, own, &[], MOST)), "the same each time");
            assert_eq!(chosen.len(), MOST);
            chosen.iter().for_each(|node| *met.entry(node.name.clone()).or_default() += 1);
        }
        // Poisson with a mean of 8: none of 300 comes near this.
        assert!(met.values().all(|times| *times < 4 * MOST), "{met:?}");
    }

    #[test]
    fn a_small_fleet_does_not_wait_and_a_large_one_not_for_ever() {
        assert!(spread(2) < Duration::from_millis(10));
        assert_eq!(spread(100_000), LONGEST_SPREAD);
        assert_eq!(spread(usize::MAX), LONGEST_SPREAD);
    }
}
