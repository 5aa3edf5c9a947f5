//! Rows of the directory, as the authority tells them: after some that are good, and alone.
#![no_main]
use hauberk::directory::stream::mirror::Mirror;
use hauberk::directory::stream::proto::Chunk;
use hauberk::identity::TrustDomain;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|chunks: Vec<(bool, bool, Vec<u8>)>| {
    let mut mirror = Mirror::new(TrustDomain::parse("fuzz.test").expect("valid"));
    for (version, (anew, last, rows)) in (1..).zip(chunks) {
        let chunk = Chunk { run: 1, version, anew, last, rows: rows.into(), fault: String::new() };
        let before = mirror.directory().nodes().count();
        match mirror.hear(&chunk) {
            Ok(true) => assert!(mirror.is_read()),
            Ok(false) | Err(_) => assert_eq!(mirror.directory().nodes().count(), before),
        }
    }
});
