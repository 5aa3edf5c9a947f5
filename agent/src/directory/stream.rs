//! The cluster's directory from the authority, so that not every node watches the API server for all of it.
//!
//! The authority tells a whole state first, then what differs; after a broken connection an agent goes on from
//! the state that it has. Only the node's own pods, and the namespaces that say their modes, come from the
//! API server: what is enrolled here is known first-hand, and as soon as anybody can know it. Of these the
//! authority's word counts nothing. While either is away the directory stays as it was.
//!
//! - `wire`: rows as messages, and back
//! - `history`: the authority's side, which remembers its last states
//! - `mirror`: the agent's side, which takes over whole states

pub mod history;
pub mod mirror;
#[cfg(test)]
mod tests;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::kubernetes::Connection;
use super::kubernetes::cluster::Cluster;
use super::kubernetes::watch::{BATCH, take, until};
use super::{Directory, Live, Standing};
use crate::mesh_policy::MeshPolicies;
use crate::text::with_causes;
use mirror::Mirror;
use proto::directory_client::DirectoryClient;
pub use wire::{MAX_CHUNK_BYTES, WireError};

generated! {
    /// The generated gRPC code of `proto/directory.proto`.
    proto: "hauberk.directory.v1"
}

/// A channel to the authority, once the node can show who it is; or in one line why there is none.
pub type Dial = Arc<dyn Fn() -> BoxFuture<'static, Result<Channel, String>> + Send + Sync>;

/// What faults and metrics call it.
const SOURCE: &str = "authority";
/// How long to wait before the authority is asked again, at first and at most; half as long again by chance.
const AGAIN: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(15)];

/// Runs for ever: follows the authority's directory, and this node's own pods.
pub async fn follow(connection: Connection, dial: Dial, mesh: Arc<MeshPolicies>, live: Arc<Live>) {
    // A directory without them would turn pods out of the mesh.
    mesh.read().await;
    let mut other_policies = mesh.subscribe();
    let (rules, mut updates) = connection.of_own_node(live.standing());
    let node = rules.node.clone().unwrap_or_default();
    let (tell, mut told) = watch::channel(None);
    // Ends with this.
    let mut tasks = JoinSet::new();
    tasks.spawn(listen(dial, Mirror::new(rules.domain.clone()), Arc::clone(live.standing()), tell));
    let mut own = Cluster::new(rules);
    own.set_mesh(mesh.load());
    let (mut due, mut is_told) = (None, false);
    loop {
        tokio::select! {
            Some(update) = updates.next() => take(&mut own, update, live.standing()),
            Ok(()) = other_policies.changed() => own.set_mesh(mesh.load()),
            Ok(()) = told.changed() => is_told = true,
            () = until(due) => {
                (due, is_told) = (None, false);
                let cluster: Option<Directory> = told.borrow().clone();
                if let Some(cluster) = cluster {
                    live.replace(cluster.with_own(&node, &own.directory()));
                }
            }
        }
        // Without either, pods would be turned out of the mesh.
        let is_read = own.has_read_pods() && told.borrow().is_some();
        if due.is_none() && is_read && (is_told || own.is_changed() || !live.is_read()) {
            due = Some(Instant::now() + BATCH);
        }
    }
}

/// Why the authority is not heard any more.
struct Lost {
    /// One of a fixed set.
    reason: &'static str,
    /// One line.
    words: String,
}

impl Lost {
    fn by_status(status: &Status) -> Self {
        let (reason, remedy) = match status.code() {
            Code::Unimplemented => {
                ("unimplemented", " (it is of an older version: upgrade it before the agents)")
            }
            Code::PermissionDenied | Code::Unauthenticated => ("forbidden", ""),
            Code::ResourceExhausted => ("busy", ""),
            _ => ("unreachable", ""),
        };
        let why = with_causes(status.message(), status);
        Self { reason, words: format!("the authority does not tell the directory: {why}{remedy}") }
    }
}

/// Runs for ever: tells each whole state that the authority tells.
async fn listen(
    dial: Dial,
    mut mirror: Mirror,
    standing: Arc<Standing>,
    tell: watch::Sender<Option<Directory>>,
) {
    let mut wait = AGAIN[0];
    loop {
        let has = mirror.asks();
        let Lost { reason, words } = session(&dial, &mut mirror, &standing, &tell).await;
        standing.failed(reason);
        if standing.fault(SOURCE, &words) {
            tracing::error!(error = words, "nothing new of the directory; trying again");
        }
        // Whoever was told something shall not wait long for more.
        wait = if mirror.asks() == has { (wait * 2).min(AGAIN[1]) } else { AGAIN[0] };
        sleep(wait.mul_f64(1.0 + 0.5 * fastrand::f64())).await;
    }
}

/// One connection, to its end.
async fn session(
    dial: &Dial,
    mirror: &mut Mirror,
    standing: &Standing,
    tell: &watch::Sender<Option<Directory>>,
) -> Lost {
    let channel = match dial().await {
        Ok(channel) => channel,
        Err(words) => return Lost { reason: "unreachable", words },
    };
    let mut client = DirectoryClient::new(channel).max_decoding_message_size(MAX_CHUNK_BYTES);
    let mut chunks = match client.watch(mirror.asks()).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return Lost::by_status(&status),
    };
    let mut anew = false;
    loop {
        let chunk = match chunks.message().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return Lost::by_status(&Status::unavailable("it ended the stream")),
            Err(status) => return Lost::by_status(&status),
        };
        anew |= chunk.anew;
        let is_whole = match mirror.hear(&chunk) {
            Ok(is_whole) => is_whole,
            Err(error) => {
                let words = format!("the authority tells what is no directory: {error}");
                return Lost { reason: "malformed", words };
            }
        };
        if is_whole {
            count(mirror.directory(), standing);
            tell.send_replace(Some(mirror.directory().clone()));
        }
        match chunk.fault.is_empty() {
            true => standing.heard(SOURCE, is_whole && std::mem::take(&mut anew)),
            false => hear_of_fault(standing, &chunk.fault),
        }
    }
}

fn hear_of_fault(standing: &Standing, fault: &str) {
    // As much of it as fits on a line.
    let fault: String = fault.chars().take(500).filter(|c| !c.is_control()).collect();
    let words = format!("the authority hears nothing new itself: {fault}");
    if standing.fault(SOURCE, &words) {
        tracing::warn!(error = words, "the directory may be stale");
    }
}

fn count(directory: &Directory, standing: &Standing) {
    let kinds = ["workload-addresses", "service-addresses", "nodes"];
    kinds.into_iter().zip(directory.sizes()).for_each(|(kind, count)| standing.objects(kind, count));
}
