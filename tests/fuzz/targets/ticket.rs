//! A session ticket, as any client may send one: it opens only if it is one of ours, unchanged.
#![no_main]
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use hauberk::tls::ticket::content::Content;
use hauberk::tls::ticket::{self, Binding, TicketKeys};
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::UnixTime;

const PLAIN: &[u8] = b"a session";

static KEYS: LazyLock<(Arc<TicketKeys>, Binding, Vec<u8>)> = LazyLock::new(|| {
    let keys = ticket::fleeting();
    let binding = Binding::new(&[b"trust"], &[b"place"], &[b"terms"]);
    let sealed = keys.seal(&binding, PLAIN.to_vec(), now()).expect("a small ticket is sealed");
    (keys, binding, sealed)
});

fn now() -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(1_800_000_000))
}

fuzz_target!(|bytes: &[u8]| {
    let (keys, binding, sealed) = &*KEYS;
    // The fuzzer watches comparisons, and so gets to know the good one.
    assert_eq!(keys.open(binding, bytes, now()).is_ok(), bytes == sealed.as_slice());
    // The same bytes as a change of a good ticket: past its header, which names a key they cannot guess.
    let changed: Vec<u8> =
        sealed.iter().enumerate().map(|(at, byte)| byte ^ bytes.get(at).copied().unwrap_or(0)).collect();
    assert_eq!(keys.open(binding, &changed, now()).is_ok(), changed == *sealed);
    let _ = Content::decode(bytes);
});
