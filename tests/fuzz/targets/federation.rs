//! The document of a SPIFFE bundle endpoint: what is read can be written, and reads the same again.
#![no_main]
use hauberk::federation::document::Document;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Ok(read) = Document::parse(text)
        // Keys of kinds that no JWK is written for are read all the same.
        && let Ok(written) = read.to_json()
    {
        assert_eq!(Document::parse(written.as_bytes()).expect("what was written"), read);
    }
});
