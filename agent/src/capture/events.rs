//! The kernel side's ring buffer, as a stream of records.

use std::fmt;
use std::io;

use aya::maps::{MapData, RingBuf};
use ebpf::Event;
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes;

/// Verdicts that the kernel side reached, in order. A full buffer drops the newest.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    #[expect(unsafe_code, reason = "registering a descriptor is a promise about it")]
    pub(super) fn new(ring: RingBuf<MapData>) -> io::Result<Self> {
        // SAFETY: the ring owns its descriptor, returns the same one each time, and closes it only
        // when it is dropped, after the registration.
        let ring = unsafe { AsyncFd::register(ring) }?;
        Ok(Self { ring })
    }

    /// The next record.
    ///
    /// # Errors
    /// When the runtime is shutting down.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            let mut ready = self.ring.readable_mut().await?;
            while let Some(record) = ready.get_inner_mut().next() {
                // A record of another size is none of this contract's.
                if let Ok(event) = Event::read_from_bytes(&record) {
                    return Ok(event);
                }
            }
            ready.clear_ready();
        }
    }
}
