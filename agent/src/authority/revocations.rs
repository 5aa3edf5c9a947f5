//! Follows the list of revocations on disk: what an operator's command writes there holds at once.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

use super::clock::Cautious;
use super::counters::Counters;
use crate::ca::store::documents::Document;
use crate::ca::store::{Store, StoreError};
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::Revocations;

/// How often the file is looked at: a tenth of the second in which a revocation has to hold.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often entries are removed that concern no valid certificate any more.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

/// Runs for ever. A list that cannot be read changes nothing, and is said once.
pub(super) async fn follow(
    store: Arc<Store>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    counters: Arc<Counters>,
) {
    counters.revocations(bundle.borrow().revocations());
    // Unknown at first: what changed between the first reading and now is read again.
    let mut seen = None;
    let mut clock = Cautious::new(SystemTime::now(), Instant::now());
    let mut prune = tokio::time::interval(PRUNE_EVERY);
    let mut look = tokio::time::interval(LOOK_EVERY);
    loop {
        tokio::select! {
            _ = prune.tick() => {
                let passed = clock.now(SystemTime::now(), Instant::now());
                let prune = move |store: &Store| store.change_revocations(|list| {
                    list.prune(passed);
                    Ok(list.clone())
                });
                in_background(&store, prune, &bundle, &counters).await;
            }
            _ = look.tick() => {
                clock.now(SystemTime::now(), Instant::now());
                let now = store.version(Document::Revocations);
                if now.is_some() && now != seen {
                    in_background(&store, Store::revocations, &bundle, &counters).await;
                }
                if now.is_none() && seen.is_some() {
                    tracing::error!(file = Document::Revocations.name(), "the list of revocations is gone; what it said stays in force here");
                }
                seen = now;
            }
        }
    }
}

/// Takes a list into use that is read on a thread which may wait for a disk.
async fn in_background(
    store: &Arc<Store>,
    read: impl FnOnce(&Store) -> Result<Revocations, StoreError> + Send + 'static,
    bundle: &watch::Sender<Arc<TrustBundle>>,
    counters: &Counters,
) {
    let store = Arc::clone(store);
    match tokio::task::spawn_blocking(move || read(&store)).await {
        Ok(Ok(list)) => {
            // A file put back from a backup un-revokes nobody; the next change makes it the newer one.
            let changed = bundle.send_if_modified(|held| {
                let newer = list.generation() > held.revocations().generation();
                if newer {
                    let revocations = Arc::new(list);
                    *held = Arc::new(TrustBundle::clone(held).with_revocations(revocations));
                }
                newer
            });
            if changed {
                let held = bundle.borrow();
                counters.revocations(held.revocations());
                tracing::info!(
                    entries = held.revocations().entries().len(),
                    generation = held.revocations().generation(),
                    "revocations read"
                );
            }
        }
        Ok(Err(error)) => tracing::error!(%error, "the revocations stay as they were"),
        Err(error) => tracing::error!(%error, "the revocations could not be read"),
    }
}
