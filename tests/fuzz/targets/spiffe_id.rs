//! SPIFFE IDs: what parses must print back the same, and have a valid trust domain.
#![no_main]
use hauberk::identity::{SpiffeId, TrustDomain};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = SpiffeId::parse(text) {
        assert_eq!(id.as_str(), text);
        assert!(TrustDomain::parse(id.trust_domain()).is_ok());
        assert!(id.path().starts_with('/'));
    }
});
