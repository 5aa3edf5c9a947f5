//! Which other nodes' agents an agent reaches: a few by chance, every minute, by a connection that says nothing.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::directory::Live;

/// How many other nodes are looked for each time: all of a small cluster.
const NODES: usize = 16;
const EVERY: Duration = Duration::from_secs(60);
/// The first look comes soon, when the others have begun to listen.
const FIRST: Duration = Duration::from_secs(5);

/// Nodes that were looked for last, each with the reason why it was not reached, if it was not.
#[derive(Debug, Default)]
pub struct Reach(Mutex<Vec<(String, Option<String>)>>);

impl Reach {
    /// As of the last look.
    pub fn now(&self) -> Vec<(String, Option<String>)> {
        // Replaced whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs for ever: looks for other nodes' agents at their tunnel's port.
    pub async fn look(self: Arc<Self>, directory: Arc<Live>, own: String, port: u16, limit: Duration) {
        directory.read().await;
        sleep(FIRST).await;
        loop {
            let directory = directory.load();
            let mut others: Vec<_> = directory.nodes().filter(|node| node.name != own).cloned().collect();
            fastrand::shuffle(&mut others);
            others.truncate(NODES);
            let looks = others.iter().map(|node| async {
                let connected = timeout(limit, TcpStream::connect((node.address, port))).await;
                let fault = match connected {
                    Ok(Ok(_)) => None,
                    Ok(Err(error)) => Some(error.to_string()),
                    Err(_) => Some("no answer".to_owned()),
                };
                (node.name.clone(), fault)
            });
            let mut found = join_all(looks).await;
            found.sort();
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = found;
            sleep(EVERY.mul_f64(0.8 + 0.4 * fastrand::f64())).await;
        }
    }
}
