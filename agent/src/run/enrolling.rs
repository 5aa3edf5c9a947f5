//! The thread that enrols: what it acts on, and how often it looks.

use std::ffi::CStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::upgrade::Order;
use crate::capture::Capture;
use crate::directory::Live;
use crate::enrol::{Enroller, Pace, VERIFY_EVERY};
use crate::netns::pods;
use crate::policy::Policies;
use crate::shard::Thread;

/// Says when something happens in a pod's cgroup.
pub(super) async fn hear_of_pods(capture: Arc<Capture>, news: Arc<Notify>) {
    let Some(mut cgroups) = capture.news() else { return };
    while let Ok(cgroup) = cgroups.next().await {
        let path = CStr::from_bytes_until_nul(&cgroup.path).map(CStr::to_string_lossy);
        if path.is_ok_and(|path| pods::is_of_pod(&path)) {
            news.notify_one();
        }
    }
}

/// What the enrolling thread acts on.
pub(super) struct Told {
    pub(super) directory: Arc<Live>,
    pub(super) policies: Arc<Policies>,
    pub(super) news: Arc<Notify>,
    pub(super) orders: mpsc::UnboundedReceiver<Order>,
    pub(super) stop: CancellationToken,
}

/// Why it looks at its pods again.
enum Call {
    Stop,
    Look,
    Hurry,
    Obey(Order),
}

impl Told {
    /// Waits until the directory is read: nobody is known before, which must not be taken for nobody being
    /// there. What is pinned stays. And without the policies nobody may be let in.
    async fn begin(&mut self) -> Call {
        let known = async {
            self.policies.read().await;
            self.directory.read().await;
        };
        tokio::select! {
            () = known => Call::Look,
            () = self.stop.cancelled() => Call::Stop,
        }
    }

    async fn next(&mut self, changes: &mut watch::Receiver<u64>, wait: Duration) -> Call {
        tokio::select! {
            () = self.stop.cancelled() => Call::Stop,
            Some(order) = self.orders.recv() => Call::Obey(order),
            _ = changes.changed() => Call::Look,
            () = self.news.notified() => Call::Hurry,
            () = tokio::time::sleep(wait) => Call::Look,
        }
    }
}

/// Enrols on a thread of its own, as that enters other namespaces; says when all pods were looked at
/// once, and gives the data path back at the end.
pub(super) fn enrol_for_ever(
    mut enroller: Enroller,
    mut told: Told,
    first: oneshot::Sender<()>,
) -> Result<std::thread::JoinHandle<Vec<Thread>>> {
    let handle = tokio::runtime::Handle::current();
    let mut changes = told.directory.subscribe();
    let work = move || {
        if matches!(handle.block_on(told.begin()), Call::Stop) {
            return enroller.into_threads();
        }
        let (mut pace, mut verified, mut first) = (Pace::default(), None::<Instant>, Some(first));
        loop {
            enroller.apply(&told.directory.load());
            if let Some(first) = first.take() {
                // Only an agent that takes over waits for it.
                let _ = first.send(());
            }
            if verified.is_none_or(|at| at.elapsed() >= VERIFY_EVERY) {
                enroller.verify();
                verified = Some(Instant::now());
            }
            match handle.block_on(told.next(&mut changes, pace.next(enroller.somebody_waits()))) {
                Call::Stop => return enroller.into_threads(),
                Call::Look => {}
                Call::Hurry => pace.hurry(),
                Call::Obey(Order::Retire) => enroller.retire(),
                // Whoever asked may have given up.
                Call::Obey(Order::Lend(reply)) => drop(reply.send(enroller.sockets())),
            }
        }
    };
    std::thread::Builder::new().name("enrol".into()).spawn(work).context("cannot start a thread")
}
