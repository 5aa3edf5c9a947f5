//! Both ends of a hand-over, as an agent's life has them: it may begin by taking over from a running one,
//! and end by leaving its work to the next.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::sync::{mpsc, oneshot, watch};

use crate::admin::Readiness;
use crate::handover::{Inherited, Named, Offer, Predecessor, Successor};
use crate::tls::ticket::TicketKeys;

/// How long a successor may take to get ready; the running agent goes on if it does not.
const PREPARATION: Duration = Duration::from_secs(60);
/// What is not asked of an agent that has not taken the pods over yet.
const AFTERWARDS: &str = "pods-enrolled";

/// An agent's place on its node: one for each runtime directory.
pub(super) struct Place {
    /// Held for as long as the file lives.
    lock: File,
    /// Where the admin server listens.
    pub(super) admin: TcpListener,
    /// Who serves there still.
    pub(super) predecessor: Option<Predecessor>,
}

/// Takes the place, or asks the agent that has it for it.
pub(super) fn take_place(dir: &Path, admin: SocketAddr) -> Result<Place> {
    let named = || format!("cannot use the runtime directory {} (runtimeDir)", dir.display());
    DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(named)?;
    let path = dir.join("agent.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).with_context(named)?;
    match file.try_lock() {
        Ok(()) => {
            let listener =
                TcpListener::bind(admin).with_context(|| format!("cannot listen on {admin} (admin)"))?;
            listener.set_nonblocking(true)?;
            Ok(Place { lock: file, admin: listener, predecessor: None })
        }
        Err(TryLockError::WouldBlock) => {
            let (predecessor, lock, admin) = Predecessor::ask(dir).with_context(|| {
                format!(
                    "another agent uses {} (runtimeDir) and does not hand over; stop it first",
                    dir.display()
                )
            })?;
            Ok(Place { lock, admin, predecessor: Some(predecessor) })
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(named),
    }
}

/// Waits until this agent could serve, and takes the listening sockets then.
pub(super) async fn take_over(
    predecessor: Predecessor,
    readiness: &Readiness,
) -> Result<(Predecessor, Inherited)> {
    let began = Instant::now();
    loop {
        let mut missing = readiness.missing();
        missing.remove(AFTERWARDS);
        let Some((condition, why)) = missing.into_iter().next() else { break };
        if began.elapsed() > PREPARATION {
            bail!(
                "cannot take over: not ready within {} s ({condition}: {why}); the running agent goes on",
                PREPARATION.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let taking = move || predecessor.take().map(|inherited| (predecessor, inherited));
    let taken = tokio::task::spawn_blocking(taking).await?;
    let (predecessor, inherited) = taken.context("cannot take over: the running agent has given up")?;
    tracing::info!(sockets = inherited.len(), "took the listening sockets over");
    Ok((predecessor, inherited))
}

/// What the enrolling thread is told.
pub(super) enum Order {
    /// To lend second handles of all listening sockets.
    Lend(oneshot::Sender<io::Result<Vec<Named>>>),
    /// To leave the pods to a successor.
    Retire,
}

/// How far a hand-over is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nobody asks.
    Alone,
    /// A successor gets ready.
    UnderWay,
    /// It serves.
    Done,
}

/// What a successor is given.
pub(super) struct Estate {
    lock: File,
    admin: TcpListener,
    pub(super) keys: Option<Arc<TicketKeys>>,
    pub(super) enroller: mpsc::UnboundedSender<Order>,
}

impl Place {
    /// Divides the place into what is used here and what a successor is given.
    pub(super) fn divide(
        self,
        keys: Option<Arc<TicketKeys>>,
        enroller: mpsc::UnboundedSender<Order>,
    ) -> Result<(TcpListener, Option<Predecessor>, Estate)> {
        let admin = self.admin.try_clone().context("cannot keep a handle of the admin server's socket")?;
        Ok((self.admin, self.predecessor, Estate { lock: self.lock, admin, keys, enroller }))
    }
}

/// Waits for successors, until one has taken over. On a thread of its own: the waiting has no end.
pub(super) fn wait_for_successor(dir: &Path, estate: Estate) -> Result<watch::Receiver<Phase>> {
    let offer = Offer::new(dir).with_context(|| format!("cannot make handover.sock in {}", dir.display()))?;
    let (phase, hear) = watch::channel(Phase::Alone);
    let waiting = move || {
        loop {
            match offer.next() {
                Ok(successor) => {
                    if hand_over(successor, &estate, &phase) {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "somebody asked to take over, and is no successor");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    };
    std::thread::Builder::new().name("handover".into()).spawn(waiting).context("cannot start a thread")?;
    Ok(hear)
}

/// Hands over to one; whether that came to its end. Until then everything is served here.
fn hand_over(successor: Successor, estate: &Estate, phase: &watch::Sender<Phase>) -> bool {
    tracing::info!(version = successor.version, "a successor gets ready");
    phase.send_replace(Phase::UnderWay);
    if let Some(keys) = &estate.keys {
        keys.freeze();
    }
    let passed = successor
        .prepare(&estate.lock, &estate.admin)
        .and_then(|()| estate.lend())
        .and_then(|sockets| successor.pass(&sockets));
    match &passed {
        Ok(()) => {
            phase.send_replace(Phase::Done);
        }
        Err(error) => {
            tracing::warn!(%error, "the successor came to nothing; going on");
            if let Some(keys) = &estate.keys {
                keys.thaw();
            }
            phase.send_replace(Phase::Alone);
        }
    }
    passed.is_ok()
}

impl Estate {
    fn lend(&self) -> io::Result<Vec<Named>> {
        let (reply, sockets) = oneshot::channel();
        self.enroller.send(Order::Lend(reply)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        sockets.blocking_recv().map_err(|_| io::ErrorKind::BrokenPipe)?
    }
}
