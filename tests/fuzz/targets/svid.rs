//! A peer's leaf certificate: any bytes must be read or refused, never panic.
#![no_main]
use hauberk::identity::svid::{Leaf, concatenated};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|der: &[u8]| {
    let _ = Leaf::from_der(der);
    if let Ok(certificates) = concatenated(der) {
        let joined: Vec<u8> =
            certificates.iter().flat_map(|certificate| certificate.iter().copied()).collect();
        assert_eq!(joined, der);
    }
});
