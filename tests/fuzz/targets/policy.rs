//! A text of AccessPolicy and MeshPolicy documents.
#![no_main]
use hauberk::identity::TrustDomain;
use hauberk::policy::document::{self, Documents};
use hauberk::policy::rule::Rules;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(documents) = document::parse(text) else { return };
    let domain = TrustDomain::parse("fuzz.test").expect("valid");
    Rules::compile(&documents.access, &domain).expect("checked documents compile");
    for policy in documents.access {
        let json = serde_json::to_string(&policy).expect("documents have only text keys");
        let again = Documents { access: vec![policy], mesh: Vec::new() };
        assert_eq!(document::parse(&json).expect("JSON is YAML"), again);
    }
    for policy in documents.mesh {
        let json = serde_json::to_string(&policy).expect("documents have only text keys");
        let again = Documents { access: Vec::new(), mesh: vec![policy] };
        assert_eq!(document::parse(&json).expect("JSON is YAML"), again);
    }
});
