//! Access policies against a model: a reading of the documents one after another, as slow as it is
//! plain, must come to the same decisions as the compiled rules.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hauberk::cidr::Cidr;
use hauberk::directory::{Mode, Workload};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::policy::document::{self, AccessPolicy, Action, Metadata, Peer, Selector, Spec};
use hauberk::policy::rule::{Decision, Outcome, Rules};
use hauberk::policy::{Attempt, Policies};
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::select;

fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

fn workload(namespace: &str, account: &str, name: &str) -> Workload {
    Workload {
        name: name.into(),
        namespace: namespace.into(),
        id: SpiffeId::workload(&domain(), namespace, account).unwrap(),
        node: "n".into(),
        addresses: vec![[10, 0, 0, 1].into()],
        mode: Mode::Strict,
        netns: None,
        exclusions: Arc::default(),
        svid_lifetime: None,
    }
}

/// Few values, so that policies and connections meet often.
fn namespaces() -> impl Strategy<Value = String> {
    select(vec!["shop", "bank"]).prop_map(Into::into)
}

fn accounts() -> impl Strategy<Value = String> {
    select(vec!["web", "db", "w.b"]).prop_map(Into::into)
}

fn names() -> impl Strategy<Value = String> {
    select(vec!["web-0", "web-1", "db-0"]).prop_map(Into::into)
}

fn ids() -> impl Strategy<Value = SpiffeId> {
    let odd =
        ["spiffe://td.test/node/n1", "spiffe://td.test/ns/shop", "spiffe://other.test/ns/shop/sa/web/x"];
    let workload = (select(vec!["td.test", "other.test"]), namespaces(), accounts())
        .prop_map(|(td, ns, sa)| SpiffeId::parse(&format!("spiffe://{td}/ns/{ns}/sa/{sa}")).unwrap());
    prop_oneof![8 => workload, 1 => select(odd.map(|id| SpiffeId::parse(id).unwrap()).to_vec())]
}

fn ports() -> impl Strategy<Value = u16> {
    select(vec![80, 443, 8080])
}

fn peers() -> impl Strategy<Value = Peer> {
    let cidr = || of(select(vec!["10.1.0.0/16", "10.1.2.3/32", "fd00::/16", "::ffff:10.0.0.0/104"]));
    let whole = (of(ids()), cidr()).prop_map(|(spiffe_id, cidr)| (spiffe_id, None, None, None, cidr));
    let parts = (of(namespaces()), of(accounts()), of(select(vec!["td.test", "other.test"])), cidr())
        .prop_map(|(ns, sa, td, cidr)| (None, ns.clone(), sa.filter(|_| ns.is_some()), td, cidr));
    prop_oneof![1 => whole, 3 => parts].prop_map(|(spiffe_id, namespace, service_account, td, cidr)| {
        let peer = Peer {
            any: None,
            spiffe_id,
            namespace,
            service_account,
            trust_domain: td.map(|td| TrustDomain::parse(td).unwrap()),
            cidr: cidr.map(|cidr| Cidr::parse(cidr).unwrap()),
        };
        if peer == Peer::default() { Peer { any: Some(true), ..peer } } else { peer }
    })
}

fn selectors() -> impl Strategy<Value = Selector> {
    let list = |of: BoxedStrategy<String>| prop::collection::vec(of, 0..3);
    prop_oneof![
        Just(Selector { all: Some(true), ..Selector::default() }),
        list(accounts().boxed()).prop_map(|l| Selector { service_accounts: Some(l), ..Selector::default() }),
        list(names().boxed()).prop_map(|l| Selector { workloads: Some(l), ..Selector::default() }),
    ]
}

fn policy() -> impl Strategy<Value = AccessPolicy> {
    let action = select(vec![Action::Allow, Action::Deny]);
    let from = prop::collection::vec(peers(), 0..4);
    (
        namespaces(),
        selectors(),
        action,
        from,
        of(prop::collection::vec(ports(), 0..3)),
        prop::bool::weighted(0.3),
    )
        .prop_map(|(namespace, selector, action, from, ports, dry_run)| AccessPolicy {
            api_version: document::API_VERSION.into(),
            kind: document::KIND.into(),
            metadata: Metadata { name: "unnamed".into(), namespace },
            spec: Spec { selector: Some(selector), action, from: Some(from), ports, dry_run },
        })
}

fn policies() -> impl Strategy<Value = Vec<AccessPolicy>> {
    prop::collection::vec(policy(), 0..8).prop_map(|mut all| {
        for (index, policy) in all.iter_mut().enumerate() {
            policy.metadata.name = format!("p{index}");
        }
        all
    })
}

fn addresses() -> impl Strategy<Value = IpAddr> {
    select(vec!["10.1.2.3", "10.1.9.9", "10.2.0.1", "::ffff:10.1.2.3", "fd00::7", "fe80::1"])
        .prop_map(|address| address.parse().unwrap())
}

/// The model: what the documents say, read plainly.
fn model(policies: &[&AccessPolicy], of: &[usize], attempt: &Attempt) -> Decision {
    let about = |p: &AccessPolicy| {
        let selector = p.spec.selector.as_ref().unwrap();
        let account = attempt.workload.id.path().rsplit('/').next().unwrap().to_owned();
        p.metadata.namespace == attempt.workload.namespace
            && (selector.all == Some(true)
                || selector.service_accounts.iter().flatten().any(|a| *a == account)
                || selector.workloads.iter().flatten().any(|w| *w == attempt.workload.name))
    };
    let is_peer = |peer: &Peer| {
        let parts: Vec<&str> = attempt.peer.path().split('/').collect();
        let form = parts.len() > 4 && parts[1] == "ns" && parts[3] == "sa";
        let domain_owed = match (&peer.trust_domain, &peer.namespace) {
            (Some(td), _) => Some(td.as_str()),
            (None, Some(_)) => Some("td.test"),
            (None, None) => None,
        };
        peer.spiffe_id.as_ref().is_none_or(|id| *id == attempt.peer)
            && domain_owed.is_none_or(|td| td == attempt.peer.trust_domain())
            && peer.namespace.as_ref().is_none_or(|ns| form && parts[2] == ns)
            && peer.service_account.as_ref().is_none_or(|sa| form && parts.len() == 5 && parts[4] == sa)
            && peer.cidr.is_none_or(|cidr| cidr.contains(attempt.source))
    };
    let matches = |p: &AccessPolicy| {
        about(p)
            && p.spec.from.iter().flatten().any(is_peer)
            && p.spec.ports.as_ref().is_none_or(|ports| ports.contains(&attempt.port))
    };
    let first = |action, test: &dyn Fn(&AccessPolicy) -> bool| {
        policies.iter().zip(of).find(|(p, _)| p.spec.action == action && test(p)).map(|(_, index)| *index)
    };
    if let Some(deny) = first(Action::Deny, &matches) {
        return Decision::Denied(deny);
    }
    match (first(Action::Allow, &matches), first(Action::Allow, &about)) {
        (Some(allow), _) => Decision::Allowed(Some(allow)),
        (None, Some(about)) => Decision::NotAllowed(about),
        (None, None) => Decision::Allowed(None),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn compiled_rules_decide_as_the_documents_read(
        all in policies(), peer in ids(), source in addresses(), ns in namespaces(), sa in accounts(),
        name in names(), port in ports(),
    ) {
        let attempt = Attempt { peer, source, workload: Arc::new(workload(&ns, &sa, &name)), port };
        let rules = Rules::compile(&all, &domain()).unwrap();
        let outcome = rules.judge(&attempt.peer, source, &attempt.workload, port);
        let enforced: Vec<usize> = (0..all.len()).filter(|i| !all[*i].spec.dry_run).collect();
        let every: Vec<usize> = (0..all.len()).collect();
        let read = |of: &[usize]| model(&of.iter().map(|i| &all[*i]).collect::<Vec<_>>(), of, &attempt);
        prop_assert_eq!(outcome, Outcome { enforced: read(&enforced), tried: read(&every) });
        // What resumption asks never refuses what a stream would be granted.
        if !outcome.enforced.denies() {
            prop_assert!(rules.may_reach(&attempt.peer, &attempt.workload, true));
        }
        if matches!(outcome.enforced, Decision::Allowed(Some(_))) {
            prop_assert!(rules.may_reach(&attempt.peer, &attempt.workload, false));
        }
    }

    #[test]
    fn every_policy_survives_being_written_and_read(all in policies()) {
        let text = all.iter().map(|p| format!("---\n{}", serde_yaml::to_string(p).unwrap())).collect::<String>();
        let text = if all.is_empty() { "---\n".to_owned() } else { text };
        prop_assert_eq!(document::parse(&text).unwrap().access, all.clone());
        for policy in all {
            let json = serde_json::to_string(&policy).unwrap();
            prop_assert_eq!(serde_json::from_str::<AccessPolicy>(&json).unwrap(), policy);
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(
        keys in prop::collection::vec(select(vec![
            "apiVersion: hauberk.dev/v1alpha1", "kind: AccessPolicy", "kind: MeshPolicy", "kind: 1", "metadata:", "  name: a", "  namespace: b",
            "spec:", "  selector: {all: true}", "  action: deny", "  from:", "  from: []", "  - any: true",
            "  - cidr: 10.0.0.1/8", "  mode: strict", "  exclude: {inboundPorts: [1]}", "  - spiffeId: x", "  ports: [0]", "  ports: [99999]", "---", "&a", "*a", "\u{0}",
        ]), 0..14),
        tail in "\\PC{0,40}",
    ) {
        let _ = document::parse(&(keys.join("\n") + &tail));
    }
}

#[test]
fn the_readmes_example_is_a_good_policy() {
    let readme = include_str!("../../README.md");
    let (_, section) = readme.split_once("### Access policies").unwrap();
    let example = section.split("```").nth(1).unwrap().trim_start_matches("yaml");
    assert_eq!(document::parse(example).unwrap().access[0].name(), "shop/db-clients");
}

#[test]
fn an_empty_list_matches_nothing_and_stays_an_empty_list() {
    let read = |spec: &str| {
        let head =
            "apiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: p, namespace: shop}\n";
        document::parse(&format!("{head}spec: {spec}")).unwrap().access
    };
    let peer = SpiffeId::workload(&domain(), "shop", "web").unwrap();
    let judge = |all: &[AccessPolicy]| {
        let rules = Rules::compile(all, &domain()).unwrap();
        rules.judge(&peer, [10, 1, 2, 3].into(), &workload("shop", "db", "db-0"), 80).enforced
    };
    let (nobody, anybody) = (Decision::NotAllowed(0), Decision::Allowed(Some(0)));
    for (spec, decision) in [
        ("{selector: {all: true}, action: allow, from: []}", nobody),
        ("{selector: {all: true}, action: allow, from: [{any: true}]}", anybody),
        ("{selector: {all: true}, action: allow, from: [{any: true}], ports: []}", nobody),
        ("{selector: {all: true}, action: deny, from: []}", Decision::Allowed(None)),
        ("{selector: {all: true}, action: deny, from: [{any: true}]}", Decision::Denied(0)),
        ("{selector: {all: true}, action: deny, from: [{any: true}], ports: []}", Decision::Allowed(None)),
        ("{selector: {serviceAccounts: []}, action: deny, from: [{any: true}]}", Decision::Allowed(None)),
        ("{selector: {workloads: []}, action: allow, from: []}", Decision::Allowed(None)),
    ] {
        let policies = read(spec);
        assert_eq!(judge(&policies), decision, "{spec}");
        let again = document::parse(&serde_yaml::to_string(&policies[0]).unwrap()).unwrap().access;
        assert_eq!(again, policies, "written and read again: {spec}");
        assert_eq!(judge(&again), decision, "after a round trip: {spec}");
    }
}

/// The shortest time that a decision took among policies of these numbers, p1001's among them.
fn decision_among(numbers: std::ops::Range<usize>) -> Duration {
    let documents: String = numbers
        .map(|n| {
            let (ns, action) = (n % 8, if n % 16 == 8 { "deny" } else { "allow" });
            format!(
                "---\napiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: p{n}, namespace: ns{ns}}}\nspec:\n  selector: {{all: true}}\n  action: {action}\n  from: [{{namespace: ns{ns}, serviceAccount: sa{n}}}, {{namespace: team{n}}}]\n  ports: [{}]\n",
                1000 + n
            )
        })
        .collect();
    let policies = Policies::none(domain());
    policies.take(document::parse(&documents).unwrap()).unwrap();
    let attempt = Attempt {
        peer: SpiffeId::workload(&domain(), "ns1", "sa1001").unwrap(),
        source: [10, 1, 2, 3].into(),
        workload: Arc::new(workload("ns1", "db", "db-0")),
        port: 2001,
    };
    policies.judge(attempt.clone()).unwrap();
    let rounds = 2_000;
    let time = |_| {
        let began = Instant::now();
        for _ in 0..rounds {
            std::hint::black_box(policies.deny_early(std::hint::black_box(&attempt))).unwrap();
        }
        began.elapsed() / rounds
    };
    (0..20).map(time).min().unwrap()
}

#[test]
fn a_decision_among_four_thousand_policies_scans_none_of_them() {
    let few = decision_among(1000..1016);
    let many = decision_among(0..document::MAX_POLICIES);
    // A scan of the namespace's five hundred takes over ten times as long.
    assert!(many < few * 5, "one decision took {many:?}, among sixteen policies {few:?}");
}
