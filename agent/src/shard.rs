//! One thread of the data path: its runtime, its pool, its share of every pod's listeners.
//!
//! A connection stays on the thread that accepted it, and so does the tunnel it uses: no lock is
//! contended and no thread is woken from another. The kernel spreads new connections over the
//! threads by `SO_REUSEPORT`. Only where few connections go to a node, they move to the thread that has a
//! tunnel there, before anything of them is read.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::balance::Balance;
use crate::capture::{Capture, Listeners};
use crate::config::TunnelConfig;
use crate::directory;
use crate::identity::SpiffeId;
use crate::inbound::{Front, Node};
use crate::outbound::{self, Moved};
use crate::pod::{Pod, Pods};
use crate::policy::Policies;
use crate::pool::dial::Dialer;
use crate::pool::{Key, Pool, Seat, Word};
use crate::telemetry::Observe;
use crate::tls;
use crate::tls::memory::Memory;
use crate::trust::Trust;
use crate::verdict::Reason;
use crate::warm::{self, Recent};
use crate::{inbound, relay};

/// What every thread shares.
#[derive(Clone, Debug)]
pub struct Shared {
    /// SVIDs and bundle.
    pub trust: Arc<Trust>,
    /// This node's agent.
    pub node: SpiffeId,
    /// Whether that identity is issued, so that agents can speak to each other as nodes.
    pub node_scope: bool,
    /// Who is where.
    pub directory: Arc<directory::Live>,
    /// This node's enrolled pods.
    pub pods: Arc<Pods>,
    /// Which endpoint of a service is next.
    pub balance: Arc<Balance>,
    /// Who may reach whom.
    pub policies: Arc<Policies>,
    /// The kernel side.
    pub capture: Arc<Capture>,
    /// What TLS remembers.
    pub tls: Arc<Memory>,
    /// Where outcomes are reported.
    pub observe: Observe,
    /// Timeouts and limits.
    pub tunnel: Arc<TunnelConfig>,
    /// What threads tell each other of connections between nodes.
    pub words: broadcast::Sender<Word>,
    /// Where each thread takes connections that another has accepted.
    pub inboxes: Arc<[mpsc::UnboundedSender<Moved>]>,
    /// Permits for TLS handshakes of peers that are not yet authenticated.
    pub handshakes: Arc<Semaphore>,
    /// Cancelled when the agent begins to stop: nothing new is accepted.
    pub drain: CancellationToken,
    /// Over how many milliseconds peers are asked to leave: where a successor accepts already, they need
    /// not all come back at once.
    pub farewell: Arc<AtomicU64>,
    /// Cancelled at the drain's deadline: what is still open is reset.
    pub abort: CancellationToken,
    /// Every task that serves a connection, over all threads.
    pub tasks: TaskTracker,
}

/// How often a thread looks whether it may give memory back.
const TIDY_EVERY: Duration = Duration::from_secs(1);

/// One thread's view: the shared state and its own pool.
#[derive(Clone, Debug)]
pub struct Shard {
    shared: Arc<Shared>,
    /// This thread's connections to peers.
    pub pool: Arc<Pool>,
}

impl std::ops::Deref for Shard {
    type Target = Shared;
    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Shard {
    /// Runs a connection's task on this thread; the drain waits for it.
    pub fn spawn(self, task: impl Future<Output = ()> + Send + 'static) {
        tokio::spawn(self.shared.tasks.track_future(task));
    }

    /// Has another thread go on with a connection. If that has ended the whole agent is at its end, and with it
    /// the connection.
    pub fn send(&self, thread: usize, moved: Moved) {
        if let Some(inbox) = self.inboxes.get(thread) {
            let _ = inbox.send(moved);
        }
    }

    /// Names the connection to a node's agent.
    pub fn between(&self, node: &directory::Node) -> Key {
        let address = SocketAddr::new(node.address, self.tunnel.port);
        Key { source: self.node.clone(), destination: node.id.clone(), address }
    }

    /// Resolves when the agent begins to stop.
    pub async fn draining(&self) {
        self.shared.drain.cancelled().await;
    }

    /// Resolves when a peer is to be asked to leave: as the agent begins to stop, or some time after.
    pub async fn farewell(&self) {
        self.draining().await;
        let spread = self.shared.farewell.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..=spread))).await;
    }

    /// Resolves when a connection has to end: its pod is gone, or the drain's deadline has come.
    pub async fn stop(&self, pod_gone: &CancellationToken) -> Reason {
        tokio::select! {
            () = pod_gone.cancelled() => Reason::Draining,
            () = self.shared.abort.cancelled() => Reason::Draining,
        }
    }

    /// Says that accepting failed, and waits until trying again makes sense; whether it does.
    pub async fn may_accept_again(&self, local: SocketAddr, error: &io::Error) -> bool {
        // A connection that its peer gave up in the backlog is no trouble of ours.
        if error.kind() == io::ErrorKind::ConnectionAborted {
            return true;
        }
        // Somebody has closed the socket by the kernel (`ss --kill`): it will never accept again.
        if error.kind() == io::ErrorKind::InvalidInput {
            tracing::warn!(%local, "a listener of the agent's was closed from outside");
            return false;
        }
        tracing::warn!(%local, %error, "cannot accept a connection; out of file descriptors or memory?");
        tokio::time::sleep(Duration::from_millis(100)).await;
        true
    }
}

/// What a thread is told.
#[derive(Debug)]
pub enum Command {
    /// Serve a pod on these listeners.
    Serve(Arc<Pod>, Listeners),
    /// Serve the node's front on this listener.
    ServeNode(Arc<Node>, std::net::TcpListener),
    /// Make connections to other nodes' agents before they are needed.
    Warm(Recent),
}

/// A running thread of the data path.
#[derive(Debug)]
pub struct Thread {
    commands: mpsc::UnboundedSender<Command>,
    join: JoinHandle<()>,
}

impl Thread {
    /// Starts so many threads on what they share. By `give_back` they let the allocator give free memory back.
    ///
    /// # Errors
    /// When the system has no thread or no epoll for one.
    pub fn start(count: usize, mut shared: Shared, give_back: fn()) -> io::Result<Vec<Self>> {
        let (inboxes, moves): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::unbounded_channel()).unzip();
        shared.inboxes = inboxes.into();
        let seats = Seat::row().zip(moves).enumerate();
        seats
            .map(|(number, (seat, moves))| Self::spawn(number, shared.clone(), seat, moves, give_back))
            .collect()
    }

    fn spawn(
        number: usize,
        shared: Shared,
        seat: Seat,
        moves: mpsc::UnboundedReceiver<Moved>,
        give_back: fn(),
    ) -> io::Result<Self> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (commands, orders) = mpsc::unbounded_channel();
        let join = std::thread::Builder::new()
            .name(format!("data-{number}"))
            .spawn(move || runtime.block_on(run(shared, seat, orders, moves, give_back)))?;
        Ok(Self { commands, join })
    }

    /// Gives the thread its share of a pod.
    pub fn serve(&self, pod: Arc<Pod>, listeners: Listeners) {
        // A thread that has ended is stopping with the whole agent.
        let _ = self.commands.send(Command::Serve(pod, listeners));
    }

    /// Gives the thread its share of the node's front.
    pub fn serve_node(&self, front: Arc<Node>, listener: std::net::TcpListener) {
        let _ = self.commands.send(Command::ServeNode(front, listener));
    }

    /// Has the thread make connections before they are needed; the others send it what is for them.
    pub fn warm(&self, recent: Recent) {
        let _ = self.commands.send(Command::Warm(recent));
    }

    /// Waits for the thread's end, which comes when the agent aborts or has drained.
    pub fn join(self) {
        drop(self.commands);
        // A panic in it was reported by the panic hook.
        let _ = self.join.join();
    }
}

async fn run(
    shared: Shared,
    seat: Seat,
    mut orders: mpsc::UnboundedReceiver<Command>,
    mut moves: mpsc::UnboundedReceiver<Moved>,
    give_back: fn(),
) {
    let (trust, memory) = (Arc::clone(&shared.trust), Arc::clone(&shared.tls));
    let dialer = Dialer::new(trust, memory, Arc::clone(&shared.tunnel), shared.observe.clone());
    let pool = Pool::new(dialer, shared.tunnel.max_streams, shared.words.clone(), seat);
    let mut trust = shared.trust.subscribe();
    let idle = shared.tunnel.idle_timeout;
    let shard = Shard { shared: Arc::new(shared), pool: Arc::new(pool) };
    let mut sweep = tokio::time::interval((idle / 4).max(Duration::from_secs(1)));
    let mut tidy = tokio::time::interval(TIDY_EVERY);
    tidy.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Command::Serve(pod, listeners)) => serve(&shard, pod, listeners),
                Some(Command::ServeNode(node, listener)) => accept(&shard, Front::Node(node), listener),
                Some(Command::Warm(recent)) => drop(tokio::spawn(warm::run(shard.clone(), recent))),
                None => break,
            },
            Some(moved) = moves.recv() => moved.serve(shard.clone()),
            Ok(()) = trust.changed() => {
                let nodes = shard.directory.load().node_count();
                shard.pool.refresh(warm::spread(nodes));
            }
            _ = sweep.tick() => shard.pool.sweep(Instant::now(), idle),
            // By itself the allocator gives back only while it is asked for more.
            _ = tidy.tick() => if tls::trim() {
                relay::trim();
                give_back();
            },
        }
    }
    // Every sender is gone: the agent has drained, or gave up doing so.
    shard.shared.abort.cancelled().await;
}

fn serve(shard: &Shard, pod: Arc<Pod>, listeners: Listeners) {
    for listener in listeners.outbound {
        match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => drop(tokio::spawn(outbound::serve(shard.clone(), Arc::clone(&pod), listener))),
            Err(error) => {
                tracing::error!(%error, workload = %pod.workload.id, "cannot serve an outbound listener")
            }
        }
    }
    for listener in listeners.tunnel {
        accept(shard, Front::Pod(Arc::clone(&pod)), listener);
    }
}

fn accept(shard: &Shard, front: Front, listener: std::net::TcpListener) {
    match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => drop(tokio::spawn(inbound::serve(shard.clone(), front, listener))),
        Err(error) => tracing::error!(%error, at = %front.id(), "cannot serve a tunnel listener"),
    }
}
