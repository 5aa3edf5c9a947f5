use std::time::Duration;

use tokio::time::timeout;

use super::*;
use crate::directory::Mode;

fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

/// A policy on the whole namespace `shop`.
fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: {}\nkind: {}\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {{all: true}}, {spec}}}\n",
        document::API_VERSION,
        document::KIND
    )
}

fn take(policies: &Policies, texts: &[String]) -> bool {
    policies.take(document::parse(&(texts.concat() + "---\n")).unwrap()).unwrap()
}

fn attempt(peer: &str) -> Attempt {
    let workload = Workload {
        name: "db-0".into(),
        namespace: "shop".into(),
        id: SpiffeId::workload(&domain(), "shop", "db").unwrap(),
        node: "n".into(),
        addresses: vec![[10, 0, 0, 1].into()],
        mode: Mode::Strict,
        netns: None,
        exclusions: Arc::default(),
        svid_lifetime: None,
    };
    Attempt {
        peer: SpiffeId::workload(&domain(), "shop", peer).unwrap(),
        source: [10, 0, 0, 2].into(),
        workload: Arc::new(workload),
        port: 80,
    }
}

/// Hits, denied, would deny.
fn counts(policies: &Policies, name: &str) -> [u64; 3] {
    let loaded = policies.loaded();
    let (policy, _) = loaded.policies().find(|(policy, _)| &*policy.name == name).unwrap();
    [&policy.counts.hits, &policy.counts.denied, &policy.counts.would_deny]
        .map(|count| count.load(Ordering::Relaxed))
}

#[test]
fn a_denial_names_its_policy_and_is_counted_there() {
    let policies = Policies::none(domain());
    policies.judge(attempt("web")).expect("without policies everything may pass");
    let web = "action: allow, from: [{namespace: shop, serviceAccount: web}]";
    take(&policies, &[policy("web", web), policy("bad", "action: deny, from: [{namespace: bad}]")]);
    policies.judge(attempt("web")).expect("allowed");
    let denial = policies.judge(attempt("other")).unwrap_err();
    assert_eq!(denial.to_string(), "shop/web is about this workload, and no allow policy matches");
    take(&policies, &[policy("web", web), policy("bad", "action: deny, from: [{any: true}]")]);
    assert_eq!(policies.judge(attempt("web")).unwrap_err().policy.as_deref(), Some("shop/bad"), "deny wins");
    assert_eq!(policies.deny_early(&attempt("web")).unwrap_err().policy.as_deref(), Some("shop/bad"));
    assert_eq!(counts(&policies, "shop/web"), [1, 1, 0], "kept over a reload");
    assert_eq!(counts(&policies, "shop/bad"), [1, 2, 0], "the sending side counts denials only");
}

#[test]
fn a_dry_run_denies_nothing_and_counts_what_it_would() {
    let policies = Policies::none(domain());
    let (deny, allow) = (
        "action: deny, dryRun: true, from: [{namespace: shop, serviceAccount: web}]",
        "action: allow, dryRun: true, from: [{namespace: shop, serviceAccount: web}]",
    );
    take(&policies, &[policy("deny", deny)]);
    policies.judge(attempt("web")).expect("only tried");
    policies.judge(attempt("other")).expect("not even that");
    assert_eq!(counts(&policies, "shop/deny"), [1, 0, 1]);
    take(&policies, &[policy("allow", allow)]);
    policies.judge(attempt("web")).expect("would be allowed");
    policies.judge(attempt("other")).expect("only tried");
    policies.deny_early(&attempt("other")).expect("only tried");
    assert_eq!(counts(&policies, "shop/allow"), [1, 0, 1]);
}

#[test]
fn the_generation_grows_only_when_something_changes() {
    let policies = Policies::none(domain());
    let one = [policy("a", "action: allow, from: [{any: true}]")];
    assert!(take(&policies, &one));
    let generation = policies.generation();
    assert!(!take(&policies, &one), "the same documents again");
    assert_eq!(policies.generation(), generation);
    assert!(take(&policies, &[]));
    assert!(policies.generation() > generation);
}

#[tokio::test]
async fn a_change_revokes_what_it_denies_and_nothing_else() {
    let policies = Policies::none(domain());
    let (mut web, mut other) =
        (policies.judge(attempt("web")).unwrap(), policies.judge(attempt("other")).unwrap());
    // Before anyone waits: the change must not be missed.
    take(&policies, &[policy("no-web", "action: deny, from: [{namespace: shop, serviceAccount: web}]")]);
    let denial = timeout(Duration::from_secs(5), web.revoked()).await.expect("revoked");
    assert_eq!(denial.policy.as_deref(), Some("shop/no-web"));
    let mut other = tokio::spawn(async move { other.revoked().await });
    timeout(Duration::from_millis(50), &mut other).await.expect_err("still allowed");
    take(&policies, &[policy("nobody", "action: allow, from: []")]);
    let denial = timeout(Duration::from_secs(5), other).await.expect("revoked while waiting").unwrap();
    assert_eq!(denial.policy.as_deref(), Some("shop/nobody"));
}

#[test]
fn a_file_that_cannot_be_used_is_an_error_that_names_it() {
    let path = std::env::temp_dir().join(format!("hauberk-policies-{}.yaml", std::process::id()));
    let error = || Policies::load(&path, domain()).unwrap_err().to_string();
    assert!(error().starts_with("cannot read /"), "missing: {}", error());
    for bad in ["", "kind: x", &policy("a", "action: allow")] {
        std::fs::write(&path, bad).unwrap();
        assert!(error().starts_with(&format!("{}: document 1", path.display())), "{bad}: {}", error());
    }
    std::fs::remove_file(&path).unwrap();
}

fn from(peer: &str) -> Attempt {
    Attempt { peer: SpiffeId::parse(peer).unwrap(), ..attempt("web") }
}

#[test]
fn an_identity_of_another_trust_domain_needs_a_policy_that_lets_it_in() {
    let policies = Policies::none(domain());
    let theirs = || from("spiffe://other.test/ns/shop/sa/web");
    let refused = policies.judge(theirs()).unwrap_err();
    assert!(refused.policy.is_none() && refused.to_string().contains("another trust domain"), "{refused}");
    assert!(!policies.may_reach(&theirs().peer, &theirs().workload));
    policies.judge(attempt("web")).expect("our own");
    take(&policies, &[policy("bad", "action: deny, from: [{namespace: bad}]")]);
    assert!(
        policies.judge(theirs()).is_err(),
        "a policy about the workload that does not refuse is no admission"
    );
    take(&policies, &[policy("dry", "action: allow, dryRun: true, from: [{trustDomain: other.test}]")]);
    assert!(policies.judge(theirs()).is_err(), "a dry run lets nobody in");
    take(&policies, &[policy("ours", "action: allow, from: [{namespace: shop}]")]);
    assert!(policies.judge(theirs()).is_err(), "a namespace is our own trust domain's");
    take(&policies, &[policy("theirs", "action: allow, ports: [80], from: [{trustDomain: other.test}]")]);
    policies.judge(theirs()).expect("named");
    assert!(policies.may_reach(&theirs().peer, &theirs().workload));
    policies.judge(from("spiffe://third.test/ns/shop/sa/web")).expect_err("a third trust domain");
}

#[test]
fn a_trust_domain_may_be_admitted_without_policies_and_loses_its_streams_with_that() {
    let policies = Policies::none(domain());
    let theirs = || from("spiffe://other.test/ns/shop/sa/web");
    let admitted = vec![TrustDomain::parse("other.test").unwrap()];
    policies.know(Neighbours { admitted, ..Neighbours::default() });
    let mut open = policies.judge(theirs()).expect("admitted");
    assert!(policies.may_reach(&theirs().peer, &theirs().workload));
    take(&policies, &[policy("bad", "action: deny, from: [{trustDomain: other.test}]")]);
    policies.judge(theirs()).expect_err("policies come before that");
    take(&policies, &[]);
    policies.know(Neighbours::default());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let ended = runtime.block_on(async { timeout(Duration::from_secs(5), open.revoked()).await });
    assert!(ended.expect("the stream is judged again").policy.is_none());
}

#[test]
fn an_alias_is_our_own_trust_domain_in_policies_and_for_peers() {
    let policies = Policies::none(domain());
    let aliases = vec![TrustDomain::parse("old.test").unwrap()];
    policies.know(Neighbours { aliases, ..Neighbours::default() });
    let old = || from("spiffe://old.test/ns/shop/sa/web");
    policies.judge(old()).expect("as one of ours, without policies");
    for from in [
        "{namespace: shop}",
        "{namespace: shop, serviceAccount: web}",
        "{spiffeId: 'spiffe://td.test/ns/shop/sa/web'}",
        "{spiffeId: 'spiffe://old.test/ns/shop/sa/web'}",
        "{trustDomain: old.test}",
        "{trustDomain: td.test}",
    ] {
        take(&policies, &[policy("p", &format!("action: allow, from: [{from}]"))]);
        policies.judge(old()).expect(from);
        policies.judge(attempt("web")).expect(from);
        take(&policies, &[policy("p", &format!("action: deny, from: [{from}]"))]);
        policies.judge(old()).expect_err(from);
        policies.judge(attempt("web")).expect_err(from);
    }
}

#[test]
fn our_policies_say_nothing_of_another_trust_domains_workloads() {
    let policies = Policies::none(domain());
    take(&policies, &[policy("nobody", "action: allow, from: []")]);
    let there = |trust_domain: &str| {
        let id = SpiffeId::parse(&format!("spiffe://{trust_domain}/ns/shop/sa/db")).unwrap();
        let workload = Workload { id, ..Workload::clone(&attempt("web").workload) };
        Attempt { workload: Arc::new(workload), ..attempt("web") }
    };
    policies.deny_early(&there("td.test")).expect_err("ours");
    policies.deny_early(&there("other.test")).expect("its own agent judges");
}
