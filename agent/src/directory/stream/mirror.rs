//! The authority's directory as an agent has been told it. A state is taken over when it is whole.

use super::proto::{Chunk, WatchRequest};
use super::wire::{self, WireError};
use crate::directory::Directory;
use crate::identity::TrustDomain;

/// The authority's directory, as far as it was told.
#[derive(Debug)]
pub struct Mirror {
    domain: TrustDomain,
    /// Of the last whole state.
    has: WatchRequest,
    now: Directory,
    /// The state that is being told, and of which run.
    next: Option<(u64, Directory)>,
}

impl Mirror {
    /// Knows nothing yet.
    pub fn new(domain: TrustDomain) -> Self {
        Self { domain, has: WatchRequest::default(), now: Directory::default(), next: None }
    }

    /// What to ask for on a new connection: to go on from the last whole state.
    pub fn asks(&mut self) -> WatchRequest {
        self.next = None;
        self.has
    }

    /// The last whole state.
    pub fn directory(&self) -> &Directory {
        &self.now
    }

    /// Whether there is a whole state.
    pub fn is_read(&self) -> bool {
        self.has.version > 0
    }

    /// Takes a chunk; whether a state is whole with it.
    ///
    /// # Errors
    /// When it cannot be used, or does not follow from what was told. The last whole state stays.
    pub fn hear(&mut self, chunk: &Chunk) -> Result<bool, WireError> {
        // Only a word.
        if chunk.version == 0 {
            return Ok(false);
        }
        let (run, mut next) = match (chunk.anew, self.next.take()) {
            (true, _) => (chunk.run, Directory::default()),
            (false, Some(next)) => next,
            (false, None) => (self.has.run, self.now.clone()),
        };
        if run != chunk.run || (!chunk.anew && run == self.has.run && chunk.version < self.has.version) {
            return Err(WireError::Order);
        }
        wire::apply(&mut next, &chunk.rows, &self.domain)?;
        if chunk.last {
            (self.has, self.now) = (WatchRequest { run, version: chunk.version }, next);
        } else {
            self.next = Some((run, next));
        }
        Ok(chunk.last)
    }
}
