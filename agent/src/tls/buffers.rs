//! A thread's spare buffers for records on their way: a connection holds one only while it has bytes
//! in it, so that ten thousand idle connections hold none, and a busy one never waits for an allocation.
//! A thread that has become idle frees them too ([`trim`]).

use std::cell::RefCell;
use std::ops::Range;

use super::record::{MAX_CONTENT_BYTES, OVERHEAD_BYTES};

/// Room for seventeen full records: a whole frame of a bulk stream (sixteen), and what came before it.
const BYTES: usize = 17 * (MAX_CONTENT_BYTES + OVERHEAD_BYTES);
/// Spare buffers that a thread keeps; more are given back to the allocator.
const SPARE: usize = 8;

thread_local! {
    static SPARES: RefCell<Spares> = const { RefCell::new(Spares { buffers: Vec::new(), least: 0, taken: 0 }) };
}

/// A thread's spare buffers.
struct Spares {
    buffers: Vec<Box<[u8]>>,
    /// How many there were when they were fewest, since the last [`Spares::trim`]: nobody needed these.
    least: usize,
    /// How often a buffer was asked for since then.
    taken: usize,
}

impl Spares {
    fn take(&mut self) -> Option<Box<[u8]>> {
        self.taken += 1;
        let spare = self.buffers.pop();
        self.least = self.least.min(self.buffers.len());
        spare
    }

    fn put(&mut self, bytes: Box<[u8]>) {
        if self.buffers.len() < SPARE {
            self.buffers.push(bytes);
        }
    }

    fn trim(&mut self) -> usize {
        self.buffers.truncate(self.buffers.len() - self.least);
        self.least = self.buffers.len();
        std::mem::take(&mut self.taken)
    }
}

/// Frees those of this thread's spare buffers that nobody has needed since the last call. Returns how often
/// a buffer was asked for since then.
pub(super) fn trim() -> usize {
    SPARES.with_borrow_mut(Spares::trim)
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
            SPARES.with_borrow_mut(Spares::take).unwrap_or_else(|| vec![0; BYTES].into_boxed_slice())
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
            if let Ok(mut spares) = spares.try_borrow_mut() {
                spares.put(bytes);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn spare() -> usize {
        SPARES.with_borrow(|spares| spares.buffers.len())
    }

    #[test]
    fn spare_buffers_stay_while_they_are_used_and_go_when_they_are_not() {
        let use_two = || {
            let mut two = [Buffer::default(), Buffer::default()];
            two.iter_mut().for_each(|buffer| buffer.spare().fill(1));
        };
        use_two();
        assert_eq!(trim(), 2);
        assert_eq!(spare(), 2, "both were in use since the last time");
        use_two();
        trim();
        assert_eq!(spare(), 2);
        Buffer::default().spare().fill(1);
        trim();
        assert_eq!(spare(), 1, "one of them was enough");
        trim();
        assert_eq!(spare(), 0);
        assert_eq!(trim(), 0);
        use_two();
        assert_eq!(spare(), 2, "new ones");
    }
}
