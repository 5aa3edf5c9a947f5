//! A CSR, as the authority gets it from an agent.
#![no_main]
use hauberk::ca::ProvenKey;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|der: &[u8]| {
    let _ = ProvenKey::from_csr(der);
});
