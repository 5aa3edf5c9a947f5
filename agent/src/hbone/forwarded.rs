//! The `Forwarded` header (RFC 7239) as far as agents use it: `for=ADDRESS`, one element.
//!
//! The sending agent says which address its workload has; the receiving agent believes it only when
//! its directory places the authenticated identity at that address.

use std::net::SocketAddr;

use http::HeaderValue;

/// The header's name.
pub const NAME: &str = "forwarded";

/// `for="1.2.3.4:5"`, as RFC 7239 section 6 writes a node with a port.
pub fn format(address: SocketAddr) -> Option<HeaderValue> {
    let value = bytes::Bytes::from(format!("for=\"{address}\""));
    let mut value = HeaderValue::from_maybe_shared(value).ok()?;
    // Another one for each stream: in the compression's table it would only push out what comes again.
    value.set_sensitive(true);
    Some(value)
}

/// Reads what [`format`] writes; anything else is `None`, never an error: a foreign peer may say
/// what it likes here, and is then taken at its own address.
pub fn parse(value: &[u8]) -> Option<SocketAddr> {
    let text = std::str::from_utf8(value).ok()?;
    let node = text.strip_prefix("for=\"")?.strip_suffix('"')?;
    node.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(ip: std::net::IpAddr, port: u16) {
            let address = SocketAddr::new(ip, port);
            let value = format(address).expect("visible ASCII");
            prop_assert_eq!(parse(value.as_bytes()), Some(address));
        }

        #[test]
        fn anything_else_never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
