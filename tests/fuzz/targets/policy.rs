//! A text of AccessPolicy documents.
#![no_main]
use hauberk::identity::TrustDomain;
use hauberk::policy::document;
use hauberk::policy::rule::Rules;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(policies) = document::parse(text) else { return };
    let domain = TrustDomain::parse("fuzz.test").expect("valid");
    Rules::compile(&policies, &domain).expect("checked documents compile");
    for policy in policies {
        let json = serde_json::to_string(&policy).expect("documents have only text keys");
        assert_eq!(document::parse(&json).expect("JSON is YAML"), [policy]);
    }
});
