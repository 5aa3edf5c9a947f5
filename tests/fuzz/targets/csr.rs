//! A CSR, as the authority gets it from an agent.
#![no_main]
use hauberk::ca::ProvenKey;
use hauberk::identity::SpiffeId;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|der: &[u8]| {
    let id = SpiffeId::parse("spiffe://td.test/ns/a/sa/b").expect("it is one");
    // Whatever is taken when more is asked of it is taken when less is.
    if ProvenKey::for_id(der, &id).is_ok() {
        assert!(ProvenKey::from_csr(der).is_ok());
    }
});
