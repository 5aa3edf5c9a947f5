//! A certificate revocation list, read before its signature is verified.
#![no_main]
use hauberk::identity::crl::{Crl, verify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|der: &[u8]| {
    if let Ok(crl) = Crl::from_der(der) {
        assert!(!crl.is_older_than(&crl));
    }
    assert!(verify(der, &[], &[], std::time::SystemTime::UNIX_EPOCH).is_err());
});
