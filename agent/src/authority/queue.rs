//! What waits to be signed: bounded, fair between nodes, what is nearest its end first.
//!
//! Signing has threads of its own, so that a crowd of requests keeps nobody from being heard, and is told at
//! once when to come back once there is no room. Of the nodes that wait each has its turn, whatever the others
//! ask for; four turns in five are for SVIDs that are missing or soon end, where there are such. Within a node
//! the one that ends first is the first.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::identity::revocation::NodeName;

/// How much may wait. An agent asks for eight at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Of all nodes together.
    pub(super) requests: usize,
    /// Of one.
    pub(super) of_a_node: usize,
    /// Bytes of all CSRs.
    pub(super) bytes: usize,
}

/// Room for 10,000 identities at once, and then some.
pub(super) const BOUNDS: Bounds = Bounds { requests: 16_384, of_a_node: 256, bytes: 16 << 20 };
/// Nobody is told to come back later than this.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Turns for what is urgent, for one of what is not.
const URGENT_TURNS: u32 = 4;

/// How soon something has to be signed: the end of what is held, in Unix seconds; 0 for what is missing.
pub(super) type Ends = u64;

type Work = Box<dyn FnOnce() + Send>;

/// The queue.
#[derive(Debug)]
pub(super) struct Queue {
    bounds: Bounds,
    inner: Mutex<Inner>,
    work: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    urgent: Lane,
    early: Lane,
    urgent_turns: u32,
    /// Let in and not done, also where they do not wait for a signature yet.
    admitted: HashMap<NodeName, usize>,
    requests: usize,
    bytes: usize,
    number: u64,
    /// How long one takes, as of late.
    each: Option<Duration>,
}

/// Nodes in the order of their turns, and what each waits for.
#[derive(Debug, Default)]
struct Lane {
    turns: VecDeque<NodeName>,
    jobs: HashMap<NodeName, BinaryHeap<Reverse<Job>>>,
}

/// Ordered by its end, then by when it came.
struct Job {
    order: (Ends, u64),
    work: Work,
}

/// No room: when to ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Busy {
    pub(super) retry_after: Duration,
}

/// Room for one request, for as long as this lives.
#[derive(Debug)]
pub(super) struct Slot {
    queue: Arc<Queue>,
    node: NodeName,
    bytes: usize,
}

impl Queue {
    /// With so many threads that sign. They end with the last handle to the queue that was returned.
    pub(super) fn start(bounds: Bounds, threads: usize) -> std::io::Result<Arc<Self>> {
        let queue = Arc::new(Self { bounds, inner: Mutex::default(), work: Condvar::new() });
        for number in 0..threads {
            let queue = Arc::downgrade(&queue);
            let sign = move || {
                while let Some(queue) = queue.upgrade() {
                    queue.turn();
                }
            };
            std::thread::Builder::new().name(format!("sign-{number}")).spawn(sign)?;
        }
        Ok(queue)
    }

    /// Lets a request of a node in, with a CSR of so many bytes.
    ///
    /// # Errors
    /// When there is no room, for it or for its node.
    pub(super) fn admit(self: &Arc<Self>, node: &NodeName, bytes: usize) -> Result<Slot, Busy> {
        let mut inner = self.lock();
        let of_node = inner.admitted.get(node).copied().unwrap_or_default();
        let full = inner.requests >= self.bounds.requests || inner.bytes + bytes > self.bounds.bytes;
        if full || of_node >= self.bounds.of_a_node {
            return Err(Busy { retry_after: inner.retry_after() });
        }
        inner.requests += 1;
        inner.bytes += bytes;
        *inner.admitted.entry(node.clone()).or_default() += 1;
        drop(inner);
        Ok(Slot { queue: Arc::clone(self), node: node.clone(), bytes })
    }

    /// When to ask again.
    pub(super) fn busy(&self) -> Busy {
        Busy { retry_after: self.lock().retry_after() }
    }

    /// How many are let in and not done, and of how many nodes.
    pub(super) fn depth(&self) -> (usize, usize) {
        let inner = self.lock();
        (inner.requests, inner.admitted.len())
    }

    /// Does what is next, or waits for it a little.
    fn turn(&self) {
        let inner = self.lock();
        let empty = |inner: &mut Inner| inner.urgent.turns.is_empty() && inner.early.turns.is_empty();
        // Woken now and then, to see whether the queue is still wanted.
        let waited = self.work.wait_timeout_while(inner, Duration::from_secs(1), empty);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let Some(job) = inner.next() else { return };
        drop(inner);
        let began = Instant::now();
        // A panic was reported by the panic hook, and costs one request its answer.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job.work));
        let took = began.elapsed();
        let mut inner = self.lock();
        inner.each = Some(inner.each.map_or(took, |each| (each * 15 + took) / 16));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Counts and jobs change together, and nothing between can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn next(&mut self) -> Option<Job> {
        let urgent = self.urgent_turns < URGENT_TURNS || self.early.turns.is_empty();
        self.urgent_turns = if urgent { self.urgent_turns + 1 } else { 0 };
        let (first, second) =
            if urgent { (&mut self.urgent, &mut self.early) } else { (&mut self.early, &mut self.urgent) };
        first.next().or_else(|| second.next())
    }

    /// When about half of what waits now is done, give or take: whoever is sent away together shall not come
    /// back together.
    fn retry_after(&self) -> Duration {
        let each = self.each.unwrap_or(Duration::from_micros(200));
        let requests = u32::try_from(self.requests).unwrap_or(u32::MAX);
        let all = (each * requests).clamp(Duration::from_secs(1), LONGEST_WAIT);
        all.mul_f64(0.5 + fastrand::f64())
    }
}

impl Lane {
    fn push(&mut self, node: &NodeName, job: Job) {
        let jobs = self.jobs.entry(node.clone()).or_default();
        if jobs.is_empty() {
            self.turns.push_back(node.clone());
        }
        jobs.push(Reverse(job));
    }

    fn next(&mut self) -> Option<Job> {
        let node = self.turns.pop_front()?;
        let jobs = self.jobs.get_mut(&node)?;
        let job = jobs.pop().map(|Reverse(job)| job);
        if jobs.is_empty() {
            self.jobs.remove(&node);
        } else {
            self.turns.push_back(node);
        }
        job
    }
}

impl Slot {
    /// Does the work when it is its turn. `None` if that panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        ends: Ends,
        urgent: bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (done, outcome) = oneshot::channel();
        let work = Box::new(move || {
            // Who asked may have gone: then nobody needs it.
            if !done.is_closed() {
                let _ = done.send(work());
            }
        });
        {
            let mut inner = self.queue.lock();
            inner.number += 1;
            let order = (ends, inner.number);
            let lane = if urgent { &mut inner.urgent } else { &mut inner.early };
            lane.push(&self.node, Job { order, work });
        }
        self.queue.work.notify_one();
        outcome.await.ok()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut inner = self.queue.lock();
        inner.requests -= 1;
        inner.bytes -= self.bytes;
        if let Some(count) = inner.admitted.get_mut(&self.node) {
            *count -= 1;
            if *count == 0 {
                inner.admitted.remove(&self.node);
            }
        }
    }
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("order", &self.order).finish_non_exhaustive()
    }
}

impl PartialEq for Job {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Job {}

impl PartialOrd for Job {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Job {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order.cmp(&other.order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Bounds = Bounds { requests: 6, of_a_node: 4, bytes: 1000 };

    fn node(name: &str) -> NodeName {
        NodeName::parse(name).unwrap()
    }

    /// Puts work of these nodes into a queue that nobody works on yet; then in which order it is done.
    async fn order(asked: &[(&str, Ends, bool)]) -> Vec<String> {
        let bounds = Bounds { requests: 1000, of_a_node: 1000, ..BOUNDS };
        let queue = Queue::start(bounds, 0).unwrap();
        let done: Arc<Mutex<Vec<String>>> = Arc::default();
        let mut waiting = tokio::task::JoinSet::new();
        for (name, ends, urgent) in asked.iter().copied() {
            let slot = queue.admit(&node(name), 1).unwrap();
            let (done, said) = (Arc::clone(&done), format!("{name}:{ends}"));
            waiting
                .spawn(async move { slot.run(ends, urgent, move || done.lock().unwrap().push(said)).await });
            tokio::task::yield_now().await;
        }
        for _ in asked {
            queue.turn();
        }
        while waiting.join_next().await.is_some() {}
        assert_eq!(queue.depth(), (0, 0));
        std::mem::take(&mut *done.lock().unwrap())
    }

    #[tokio::test]
    async fn each_node_has_its_turn_and_within_one_the_nearest_end_is_first() {
        let asked = [
            ("a", 30, true),
            ("a", 10, true),
            ("a", 20, true),
            ("a", 0, true),
            ("b", 50, true),
            ("c", 40, true),
        ];
        assert_eq!(order(&asked).await, ["a:0", "b:50", "c:40", "a:10", "a:20", "a:30"]);
    }

    #[tokio::test]
    async fn what_is_urgent_goes_first_and_starves_nobody() {
        let mut asked = vec![("a", 900, false), ("a", 901, false)];
        asked.extend((0..6).map(|n| ("b", n, true)));
        let done = order(&asked).await;
        assert_eq!(done[..4], ["b:0", "b:1", "b:2", "b:3"]);
        assert_eq!(done[4], "a:900");
    }

    #[tokio::test]
    async fn whoever_finds_no_room_is_told_when_to_come_back_and_others_are_let_in() {
        let queue = Queue::start(SMALL, 0).unwrap();
        let mut slots: Vec<Slot> = (0..4).map(|_| queue.admit(&node("greedy"), 10).unwrap()).collect();
        let busy = queue.admit(&node("greedy"), 10).unwrap_err();
        assert!(busy.retry_after >= Duration::from_millis(500) && busy.retry_after <= LONGEST_WAIT * 2);
        slots.push(queue.admit(&node("modest"), 10).unwrap());
        assert!(queue.admit(&node("large"), 1000).is_err(), "bytes are bounded too");
        slots.push(queue.admit(&node("other"), 10).unwrap());
        assert!(queue.admit(&node("late"), 10).is_err());
        assert_eq!(queue.depth(), (6, 3));
        drop(slots);
        assert_eq!(queue.depth(), (0, 0));
        queue.admit(&node("late"), 10).unwrap();
    }

    #[tokio::test]
    async fn threads_do_the_work_survive_a_panic_in_it_and_skip_what_nobody_waits_for() {
        let queue = Queue::start(SMALL, 2).unwrap();
        let slot = queue.admit(&node("a"), 10).unwrap();
        assert_eq!(slot.run(0, true, || 7).await, Some(7));
        for _ in 0..3 {
            assert_eq!(slot.run(0, true, || -> u8 { panic!("as a test may") }).await, None);
        }
        assert_eq!(slot.run(0, true, || 8).await, Some(8));
    }
}
