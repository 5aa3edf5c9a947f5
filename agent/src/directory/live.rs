//! The directory as it changes.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{Directory, Standing};

/// The newest state, and word of every change.
#[derive(Debug)]
pub struct Live {
    now: ArcSwap<Directory>,
    /// Counts the states; 0 until the source has been read in whole.
    changed: watch::Sender<u64>,
    standing: Arc<Standing>,
}

impl Live {
    /// Knows nobody until the first [`Live::replace`].
    pub fn new(standing: Standing) -> Arc<Self> {
        Arc::new(Self {
            now: ArcSwap::default(),
            changed: watch::Sender::new(0),
            standing: Arc::new(standing),
        })
    }

    /// The state as of now.
    pub fn load(&self) -> Arc<Directory> {
        self.now.load_full()
    }

    /// Takes a new state into use.
    pub fn replace(&self, next: Directory) {
        self.now.store(Arc::new(next));
        self.changed.send_modify(|n| *n += 1);
    }

    /// Notifies of every new state.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether the source has been read in whole. Until then that somebody is missing means nothing.
    pub fn is_read(&self) -> bool {
        *self.changed.borrow() > 0
    }

    /// Resolves when the source has been read in whole.
    pub async fn read(&self) {
        // Cannot fail: the sender is ours.
        let _ = self.changed.subscribe().wait_for(|states| *states > 0).await;
    }

    /// How the source stands.
    pub fn standing(&self) -> &Arc<Standing> {
        &self.standing
    }
}
