//! The kernel side's ring buffers, as streams of records.

use std::fmt;
use std::io;
use std::marker::PhantomData;

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes;

/// Records of a ring buffer, in order. A full buffer drops the newest.
pub struct Records<T> {
    ring: AsyncFd<RingBuf<MapData>>,
    rows: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for Records<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Records").finish_non_exhaustive()
    }
}

impl<T: FromBytes> Records<T> {
    #[expect(unsafe_code, reason = "registering a descriptor is a promise about it")]
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its descriptor, returns the same one each time, and closes it only
        // when it is dropped, after the registration.
        let ring = unsafe { AsyncFd::register(ring) }?;
        Ok(Self { ring, rows: PhantomData })
    }

    /// The next record.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn next(&mut self) -> io::Result<T> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            while let Some(record) = ready.get_inner_mut().next() {
                // A record of another size is none of this contract's.
                if let Ok(row) = T::read_from_bytes(&record) {
                    return Ok(row);
                }
            }
            ready.clear_ready();
        }
    }
}
