//! What is sent, and how both ends see that it is what arrived.

/// FNV-1a, eight bytes at a time where there are eight; the same for the same bytes in any pieces.
#[derive(Clone, Copy)]
pub(super) struct Hash(pub(super) u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    pub(super) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// Bytes that never repeat in step with any buffer.
pub(super) fn pattern(at: u64, buffer: &mut [u8]) {
    for (offset, byte) in buffer.iter_mut().enumerate() {
        let position = at + offset as u64;
        *byte = (position ^ (position >> 8) ^ (position >> 19)) as u8;
    }
}
