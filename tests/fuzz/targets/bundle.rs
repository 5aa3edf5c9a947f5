//! A trust bundle in PEM.
#![no_main]
use hauberk::identity::TrustDomain;
use hauberk::identity::bundle::TrustBundle;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|pem: &[u8]| {
    if let Ok(domain) = TrustDomain::parse("td") {
        if let Ok(bundle) = TrustBundle::from_pem(domain, pem) {
            assert!(!bundle.roots().is_empty());
        }
    }
});
