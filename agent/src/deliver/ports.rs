//! Which source port a delivery leaves from.
//!
//! A bound port is lost to the application's own outgoing connections, so ports outside the range
//! that those are chosen from come first, and that range itself only when they are exhausted.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// Lower ports belong to servers.
const LOWEST: u32 = 16_384;
const END: u32 = 65_536;
/// After this many ports that were taken, the others are tried too.
const PATIENCE: usize = 16;

#[derive(Debug)]
pub(super) struct Ports {
    /// The pod's `net.ipv4.ip_local_port_range`.
    ephemeral: Range<u32>,
    turn: AtomicU32,
}

impl Ports {
    /// Reads the text of `net.ipv4.ip_local_port_range`; the kernel's default if it makes no sense.
    pub(super) fn outside(range: &str) -> Self {
        let mut bounds = range.split_whitespace().map(str::parse::<u32>);
        let ephemeral = match (bounds.next(), bounds.next()) {
            (Some(Ok(low)), Some(Ok(high))) if low <= high && high < END => low..high + 1,
            _ => 32_768..61_000,
        };
        // Two agents after each other should not begin with the same ports.
        Self { ephemeral, turn: AtomicU32::new(fastrand::u32(..END)) }
    }

    /// The port to try in this attempt at a connection.
    pub(super) fn next(&self, attempt: usize) -> u16 {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let low = self.ephemeral.start.clamp(LOWEST, END);
        let high = self.ephemeral.end.clamp(low, END);
        let (below, above) = (low - LOWEST, END - high);
        let port = if attempt >= PATIENCE || below + above == 0 {
            self.ephemeral.start + turn % (self.ephemeral.end - self.ephemeral.start)
        } else {
            let place = turn % (below + above);
            if place < below { LOWEST + place } else { high + (place - below) }
        };
        // All spans lie below 65,536; port 0 would let the kernel choose, which is no harm.
        u16::try_from(port).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_port_outside_the_ephemeral_range_has_its_turn() {
        let ports = Ports::outside("32768\t60999\n");
        let seen: HashSet<u16> = (0..30_000).map(|_| ports.next(0)).collect();
        assert_eq!(seen.len() as u32, (32_768 - LOWEST) + (END - 61_000));
        assert!(seen.iter().all(|p| !(32_768..61_000).contains(p)));
    }

    #[test]
    fn then_the_ephemeral_range_helps_out() {
        let ports = Ports::outside("32768 60999");
        assert!((0..1000).all(|_| (32_768..61_000).contains(&ports.next(PATIENCE))));
    }

    proptest::proptest! {
        #[test]
        fn no_range_leads_to_a_server_port(text in "[0-9 \\t-]{0,16}", attempt in 0usize..64) {
            let port = Ports::outside(&text).next(attempt);
            let low = text.split_whitespace().next().and_then(|t| t.parse::<u16>().ok()).unwrap_or(16_384);
            proptest::prop_assert!(port >= low.min(16_384));
        }
    }
}
