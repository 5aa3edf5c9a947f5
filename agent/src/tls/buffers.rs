//! A thread's spare buffers for records on their way: a connection holds one only while it has bytes
//! in it, so that ten thousand idle connections hold none, and a busy one never waits for an allocation.

use std::cell::RefCell;
use std::ops::Range;

use super::record::{MAX_CONTENT_BYTES, OVERHEAD_BYTES};

/// Room for seventeen full records: a whole frame of a bulk stream (sixteen), and what came before it.
const BYTES: usize = 17 * (MAX_CONTENT_BYTES + OVERHEAD_BYTES);
/// Spare buffers that a thread keeps; more are given back to the allocator.
const SPARE: usize = 8;

thread_local! {
    static SPARES: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes between `filled.start` and `filled.end` of a buffer that is there only when needed.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: Option<Box<[u8]>>,
    filled: Range<usize>,
}

impl Buffer {
    pub(super) fn is_empty(&self) -> bool {
        self.filled.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.filled.len()
    }

    /// What is in it.
    pub(super) fn filled(&self) -> &[u8] {
        match &self.bytes {
            Some(bytes) => &bytes[self.filled.clone()],
            None => &[],
        }
    }

    /// The room behind what is in it.
    pub(super) fn spare(&mut self) -> &mut [u8] {
        let bytes = self.bytes.get_or_insert_with(|| {
            SPARES.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; BYTES].into_boxed_slice())
        });
        &mut bytes[self.filled.end..]
    }

    /// Says that `length` bytes were written to the front of [`Buffer::spare`].
    pub(super) fn fill(&mut self, length: usize) {
        self.filled.end += length;
    }

    /// Moves what is in it to the front, so that all the room is behind it.
    pub(super) fn compact(&mut self) {
        if self.filled.start > 0
            && let Some(bytes) = &mut self.bytes
        {
            bytes.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
    }

    /// Drops the first `length` bytes; an empty buffer is given back at once.
    pub(super) fn consume(&mut self, length: usize) {
        self.filled.start += length;
        if self.filled.is_empty() {
            self.give_back();
        }
    }

    /// Gives an empty buffer back: nobody shall wait with one in hand.
    pub(super) fn give_back(&mut self) {
        if !self.filled.is_empty() {
            return;
        }
        self.filled = 0..0;
        let Some(bytes) = self.bytes.take() else { return };
        // A thread that is ending has no spares any more.
        let _ = SPARES.try_with(|spares| {
            if let Ok(mut spares) = spares.try_borrow_mut()
                && spares.len() < SPARE
            {
                spares.push(bytes);
            }
        });
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.filled = 0..0;
        self.give_back();
    }
}
