//! A peer's CONNECT: authority and Forwarded header.
#![no_main]
use hauberk::hbone::{forwarded, server};
use http::{Method, Request, Uri};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &[u8])| {
    let (authority, header) = input;
    let _ = forwarded::parse(header);
    let Ok(uri) = Uri::builder().authority(authority).build() else { return };
    let mut request = Request::builder().method(Method::CONNECT).uri(uri);
    if let Ok(value) = http::HeaderValue::from_bytes(header) {
        request = request.header(forwarded::NAME, value);
    }
    let Ok(request) = request.body(()) else { return };
    if let Ok(asked) = server::parse(&request) {
        assert_ne!(asked.authority.port(), 0);
        assert_eq!(asked.authority.ip(), asked.authority.ip().to_canonical());
    }
});
