//! The authority over its real listener: whoever asks for what is not theirs, or in a way that is not meant, gets
//! a clear refusal, and is counted; and nobody else notices.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

#[path = "authority/scene.rs"]
mod scene;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hauberk::authority::proto::{Applied, IssueRequest};
use hauberk::authority::state::{Adopted, adopt, start_rotation, supplied};
use hauberk::ca::state::{TrustState, seconds};
use hauberk::ca::{Ca, CaError, create_root};
use hauberk::identity::bundle::TrustBundle;
use hauberk::identity::revocation::NodeName;
use hauberk::identity::svid::{Leaf, is_self_issued};
use hauberk::issue::istio::proto::IstioCertificateRequest;
use hauberk::issue::istio::proto::istio_certificate_service_client::IstioCertificateServiceClient;
use hauberk::issue::{self, Keypair, authority::AuthorityIssuer, pem};
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use scene::{Scene, domain, trust, wait_until, workload};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

fn csr(key: &KeyPair, edit: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    edit(&mut params);
    params.serialize_request(key).unwrap().der().to_vec()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_csr_is_refused_with_its_reason_and_the_next_good_one_is_signed() {
    let scene = Scene::started("").await;
    let node = scene.join("n1").await;
    let web = workload("web");
    let key = KeyPair::generate().unwrap();
    let rsa = KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
    let custom =
        |content: Vec<u8>| CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], content);
    let mut forged = csr(&key, |_| {});
    *forged.last_mut().unwrap() ^= 1;
    let with = |edit: fn(&mut CertificateParams)| csr(&key, edit);
    let bad: Vec<(&str, Vec<u8>)> = vec![
        ("csr_key_kind", csr(&rsa, |_| {})),
        ("csr_signature", forged),
        ("csr_malformed", vec![0x30, 0x80, 0]),
        ("csr_malformed", Vec::new()),
        ("csr_ca", with(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))),
        ("csr_ca", with(|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign])),
        (
            "csr_names",
            csr(&key, |p| p.subject_alt_names = vec![uri(web.as_str()), uri("spiffe://td.test/x")]),
        ),
        ("csr_names", csr(&key, |p| p.subject_alt_names = vec![uri("spiffe://td.test/ns/shop/sa/web\0")])),
        ("csr_trust_domain", with(|p| p.subject_alt_names = vec![uri("spiffe://other/ns/shop/sa/web")])),
        ("csr_control_characters", with(|p| p.distinguished_name.push(DnType::CommonName, "a\r\nb"))),
        ("csr_extension", csr(&key, |p| p.custom_extensions = vec![custom(vec![5, 0])])),
        ("csr_too_large", csr(&key, |p| p.custom_extensions = vec![custom(vec![0; 9000])])),
    ];
    let mut counts: HashMap<&str, f64> = HashMap::new();
    for (reason, csr) in bad {
        let status = scene.ask(&node, web.as_str(), csr).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{reason}: {status:?}");
        assert!(status.message().contains("CSR"), "{reason}: {status:?}");
        *counts.entry(reason).or_default() += 1.0;
        assert_eq!(scene.refused(reason).await, counts[reason], "{reason}");
        assert_eq!(scene.issue(&node, &web).await.unwrap().id(), &web, "after {reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_old_used_unknown_or_anothers_lets_nobody_in() {
    let scene = Scene::started("").await;
    let now = SystemTime::now();
    let key = Keypair::generate().unwrap();
    let csr = || key.csr().unwrap();
    let used = scene.token("n1", now);
    scene.attest("n1", used.clone(), csr()).await.unwrap();
    let others = scene.token("n2", now);
    let cases = [
        ("token_unknown", used),
        ("token_other_node", others.clone()),
        ("token_unknown", others),
        ("token_expired", scene.token("n1", now - Duration::from_secs(3600))),
        ("token_unknown", "../trust.json".to_owned()),
        ("token_unknown", "a\0b\n".to_owned()),
        ("token_unknown", "x".repeat(8000)),
    ];
    let mut counts: HashMap<&str, f64> = HashMap::new();
    let mut words = Vec::new();
    for (reason, token) in cases {
        let status = scene.attest("n1", token, csr()).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{reason}: {status:?}");
        words.push(status.message().to_owned());
        *counts.entry(reason).or_default() += 1.0;
        assert_eq!(scene.refused(reason).await, counts[reason], "{reason}");
    }
    words.dedup();
    assert_eq!(words.len(), 1, "a stranger learns nothing from the words: {words:?}");
    for name in ["", "n1/../n2", "n 1", "n1\0"] {
        let status = scene.attest(name, scene.token("n1", now), csr()).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{name:?}: {status:?}");
    }
    let kept = scene.token("n1", now);
    let status = scene.attest("n1", kept.clone(), vec![1, 2, 3]).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let at_once = futures_util::future::join_all((0..8).map(|_| scene.attest("n1", kept.clone(), csr())));
    let let_in = at_once.await.into_iter().filter(Result::is_ok).count();
    assert_eq!(let_in, 1, "a bad CSR has not used it up, and it works once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_what_runs_on_it_and_nothing_else() {
    let scene = Scene::started("").await;
    let node = scene.join("n1").await;
    let key = Keypair::generate().unwrap();
    let csr = || key.csr().unwrap();
    let refused = [
        ("spiffe://td.test/ns/shop/sa/db", Code::PermissionDenied, "not_placed"),
        ("spiffe://td.test/node/n2", Code::PermissionDenied, "not_placed"),
        ("spiffe://other/ns/shop/sa/web", Code::PermissionDenied, "not_placed"),
        ("spiffe://td.test/hauberk/authority", Code::PermissionDenied, "not_placed"),
        ("spiffe://td.test/ns/shop/sa/web\0", Code::InvalidArgument, "bad_request"),
        ("", Code::InvalidArgument, "bad_request"),
    ];
    for (id, code, reason) in refused {
        let before = scene.refused(reason).await;
        let status = scene.ask(&node, id, csr()).await.unwrap_err();
        assert_eq!(status.code(), code, "{id:?}: {status:?}");
        assert_eq!(scene.refused(reason).await, before + 1.0, "{id:?}");
    }
    let web = scene.issue(&node, &workload("web")).await.unwrap();
    assert_eq!(web.leaf().node.as_deref(), Some("n1"));
    let status = scene.ask(&web, workload("web").as_str(), csr()).await.unwrap_err();
    assert_eq!((status.code(), scene.refused("not_a_node").await), (Code::PermissionDenied, 1.0));
    let request =
        IssueRequest { spiffe_id: workload("web").to_string(), csr: csr(), held_until: 0, generation: 0 };
    let status = scene.client(None).await.issue(request).await.unwrap_err();
    assert_eq!((status.code(), scene.refused("no_client_certificate").await), (Code::Unauthenticated, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn istios_node_proxy_gets_certificates_by_the_same_rules() {
    let scene = Scene::started("").await;
    let node = scene.join("n1").await;
    let channel = scene.channel(Some(&node), &scene.bundle()).await.unwrap();
    let mut client = IstioCertificateServiceClient::new(channel);
    let ask = |id: &str, csr: Vec<u8>, validity_duration| {
        let named = Value { kind: Some(Kind::StringValue(id.to_owned())) };
        let metadata = Struct { fields: [("ImpersonatedIdentity".to_owned(), named)].into() };
        IstioCertificateRequest {
            csr: pem("CERTIFICATE REQUEST", &csr),
            validity_duration,
            metadata: Some(metadata),
        }
    };
    let (web, key) = (workload("web"), Keypair::generate().unwrap());
    let csr = key.csr_for(&web).unwrap();
    let answer = client.create_certificate(ask(web.as_str(), csr.clone(), 600)).await.unwrap().into_inner();
    let (roots, chain) = answer.cert_chain.split_last().unwrap();
    assert_eq!(CertificateDer::from_pem_slice(roots.as_bytes()).unwrap(), scene.bundle().roots()[0]);
    let chain = chain.iter().map(|one| CertificateDer::from_pem_slice(one.as_bytes()).unwrap()).collect();
    let svid = key.with_chain(chain).unwrap();
    let now = SystemTime::now();
    issue::check(&svid, &web, &scene.bundle(), now).unwrap();
    assert!(svid.leaf().not_after <= now + Duration::from_secs(601), "no longer than was asked for");
    let long = client.create_certificate(ask(web.as_str(), csr.clone(), i64::MAX)).await.unwrap();
    let leaf = CertificateDer::from_pem_slice(long.into_inner().cert_chain[0].as_bytes()).unwrap();
    let leaf = Leaf::from_der(&leaf).unwrap();
    assert!(leaf.not_after <= SystemTime::now() + Duration::from_secs(3601), "and than is given");

    let elsewhere =
        client.create_certificate(ask(workload("db").as_str(), csr.clone(), 0)).await.unwrap_err();
    assert_eq!(elsewhere.code(), Code::PermissionDenied, "{elsewhere:?}");
    let other = client.create_certificate(ask(node.id().as_str(), csr, 0)).await.unwrap_err();
    assert!(other.message().contains("may name"), "the CSR names another: {other:?}");
    let mut spoilt = ask(web.as_str(), Vec::new(), 0);
    spoilt.csr = "-----BEGIN NOTHING-----".into();
    assert_eq!(client.create_certificate(spoilt).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(scene.refused("csr_malformed").await, 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_with_an_old_state_is_found_out_at_both_ends() {
    let mut scene = Scene::started("").await;
    let node = scene.join("n1").await;
    let mut client = scene.client(Some(&node)).await;
    let (say, said) = tokio::sync::mpsc::channel(4);
    say.send(Applied { generation: 1 }).await.unwrap();
    let mut bundles = client.watch_bundle(ReceiverStream::new(said)).await.unwrap().into_inner();
    assert_eq!(bundles.message().await.unwrap().unwrap().generation, 1);
    let sample = "hauberk_authority_agent_bundle_generation{node=\"n1\"}";
    wait_until("it has heard", async || scene.metric(sample).await == 1.0).await;
    assert_eq!(scene.metric("hauberk_authority_state_is_old").await, 0.0);

    say.send(Applied { generation: 9 }).await.unwrap();
    wait_until("it is told", async || scene.metric("hauberk_authority_state_is_old").await == 1.0).await;
    let refused = start_rotation(&scene.store(), &scene.config(), SystemTime::now());
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(refused.contains("node n1") && refused.contains("generation 9"), "{refused}");

    // An agent that has applied newer roots does not go back, and says so.
    let extra = Ca::from_pem(domain(), &create_root(&domain(), SystemTime::now()).unwrap()).unwrap();
    let roots = [scene.bundle().roots(), extra.bundle().roots()].concat();
    let held = trust(TrustBundle::new(domain(), roots).unwrap().with_generation(9));
    held.insert(node.clone());
    let address = scene.listen.to_string();
    let issuer = AuthorityIssuer::new(address, None, node.id().clone(), Arc::clone(&held));
    let bundle = issue::Issuer::next_bundle(&issuer).await.unwrap();
    assert_eq!(bundle.generation(), 1);
    assert!(!held.set_bundle(bundle), "older");
    assert_eq!(held.snapshot().bundle.roots().len(), 2);
    scene.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_has_signed_for_as_long_as_it_was_meant_to_is_changed_by_itself() {
    let mut scene = Scene::started("rootRotation: {everyDays: 30}\n").await;
    let first = scene.state().signing;
    let node = scene.join("n1").await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(scene.state().generation, 1, "it is not due");
    scene.stop().await;
    let age = |state: &mut TrustState| {
        state.roots[0].since -= 31 * 24 * 3600;
        Ok::<_, CaError>(())
    };
    scene.store().change_trust(age).unwrap();
    scene.start().await;
    wait_until("a second root is trusted", async || scene.state().roots.len() == 2).await;
    assert_eq!(scene.state().signing, first, "the node holds an SVID and has not applied it");
    let mut client = scene.client(Some(&node)).await;
    let (say, said) = tokio::sync::mpsc::channel(4);
    say.send(Applied { generation: 2 }).await.unwrap();
    let _bundles = client.watch_bundle(ReceiverStream::new(said)).await.unwrap();
    wait_until("the new one signs", async || scene.state().signing != first).await;
    let web = scene.issue(&node, &workload("web")).await.unwrap();
    issue::check(&web, web.id(), &scene.bundle(), SystemTime::now()).unwrap();
}

/// A CA of the operator's: certificate (PEM), key, and what signs below it.
struct Offline {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
}

impl Offline {
    fn new(name: &str, by: Option<&Self>) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate = match by {
            Some(by) => params.signed_by(&key, &Issuer::from_params(&by.params, &by.key)).unwrap(),
            None => params.self_signed(&key).unwrap(),
        };
        Self { pem: certificate.pem(), params, key }
    }

    fn write(&self, root: &Self, scene: &Scene) {
        let write = |name: &str, text: &str| std::fs::write(scene.dir.join(name), text).unwrap();
        write("ca.crt", &self.pem);
        write("ca.key", &self.key.serialize_pem());
        write("root.crt", &root.pem);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_root_is_all_that_is_trusted_and_its_intermediates_come_and_go() {
    let mut scene = Scene::new("");
    let dir = scene.dir.display().to_string();
    let more = format!("issuer: {{certificate: {dir}/ca.crt, key: {dir}/ca.key, root: {dir}/root.crt}}\n");
    let config = std::fs::read_to_string(scene.dir.join("authority.yaml")).unwrap() + &more;
    std::fs::write(scene.dir.join("authority.yaml"), config).unwrap();
    let root = Offline::new("offline root", None);
    let first = Offline::new("first", Some(&root));
    first.write(&root, &scene);
    scene.start().await;
    let node = scene.join("n1").await;
    assert!(is_self_issued(&scene.bundle().roots()[0]) && scene.bundle().roots().len() == 1);
    assert_eq!(node.certified_key().cert.len(), 2, "the intermediate goes out with each SVID");
    issue::check(&node, node.id(), &scene.bundle(), SystemTime::now()).unwrap();

    let second = Offline::new("second", Some(&root));
    second.write(&root, &scene);
    let adopted = supplied(&scene.config(), SystemTime::now()).unwrap().unwrap();
    assert!(matches!(adopt(&scene.store(), &adopted).unwrap(), Adopted::Taken(_)));
    assert_eq!(adopt(&scene.store(), &adopted).unwrap(), Adopted::Unchanged);
    wait_until("the running authority signs with it", async || {
        let web = scene.issue(&node, &workload("web")).await.unwrap();
        issue::check(&web, web.id(), &scene.bundle(), SystemTime::now()).unwrap();
        web.certified_key().cert[1].as_ref()
            == CertificateDer::from_pem_slice(second.pem.as_bytes()).unwrap().as_ref()
    })
    .await;
    assert_eq!(scene.bundle().generation(), 1, "no root has changed");

    // Another root takes a rotation; until then it signs nothing.
    let other = Offline::new("another root", None);
    let third = Offline::new("third", Some(&other));
    third.write(&other, &scene);
    let supplied = supplied(&scene.config(), SystemTime::now()).unwrap().unwrap();
    assert!(matches!(adopt(&scene.store(), &supplied).unwrap(), Adopted::OtherRoot(_)));
    scene.stop().await;
    scene.start().await;
    assert_eq!(scene.bundle().roots().len(), 1);
    start_rotation(&scene.store(), &scene.config(), SystemTime::now()).unwrap().unwrap();
    let mut client = scene.client(Some(&node)).await;
    let (say, said) = tokio::sync::mpsc::channel(4);
    say.send(Applied { generation: 2 }).await.unwrap();
    let _bundles = client.watch_bundle(ReceiverStream::new(said)).await.unwrap();
    wait_until("the new root signs", async || scene.state().rotation.phase() == "retire").await;
    let both = scene.bundle();
    assert_eq!((both.roots().len(), both.domain()), (2, &domain()));
    let web = scene.issue(&node, &workload("web")).await.unwrap();
    issue::check(&web, web.id(), &both, SystemTime::now()).unwrap();
    assert_eq!(scene.state().signing, supplied.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn roots_that_a_node_has_already_are_not_sent_again() {
    let scene = Scene::started("").await;
    let node = scene.join("n1").await;
    let mut client = scene.client(Some(&node)).await;
    let key = Keypair::generate().unwrap();
    // As nobody that says it, as one of an earlier time, as one that is current.
    for (generation, sent) in [(0, true), (7, true), (1, false)] {
        let (spiffe_id, csr) = (workload("web").to_string(), key.csr().unwrap());
        let request = IssueRequest { spiffe_id, csr, held_until: 0, generation };
        let svid = client.issue(request).await.unwrap().into_inner();
        assert_eq!(svid.bundle.is_some(), sent, "generation {generation}");
    }
}

/// Changes to what the configuration says, until the root before is trusted no longer; nobody is waited for.
async fn change_root(scene: &mut Scene) {
    let next = start_rotation(&scene.store(), &scene.config(), SystemTime::now()).unwrap().unwrap();
    wait_until("the new root signs", async || scene.state().signing == next).await;
    scene.stop().await;
    // What the old one signed is valid for an hour.
    let forget = |state: &mut TrustState| {
        state.roots.iter_mut().for_each(|root| root.signed_until = 0);
        Ok::<_, CaError>(())
    };
    scene.store().change_trust(forget).unwrap();
    scene.start().await;
    wait_until("the old one has left", async || scene.state().roots.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_away_finds_the_way_to_a_supplied_root_and_back_to_one_of_our_own() {
    let mut scene = Scene::started("").await;
    let ours = scene.bundle();
    let file = scene.dir.join("authority.yaml");
    let plain = std::fs::read_to_string(&file).unwrap();
    let (root, dir) = (Offline::new("offline root", None), scene.dir.display().to_string());
    Offline::new("online", Some(&root)).write(&root, &scene);
    let issuer = format!("issuer: {{certificate: {dir}/ca.crt, key: {dir}/ca.key, root: {dir}/root.crt}}\n");
    std::fs::write(&file, plain.clone() + &issuer).unwrap();
    change_root(&mut scene).await;
    let supplied = scene.bundle();
    assert_ne!(supplied.roots(), ours.roots());
    scene.channel(None, &supplied).await.unwrap();
    scene.channel(None, &ours).await.expect("whoever knows the root before only");

    std::fs::write(&file, plain).unwrap();
    change_root(&mut scene).await;
    assert_ne!(scene.bundle().roots(), supplied.roots());
    for known in [&scene.bundle(), &supplied, &ours] {
        scene.channel(None, known).await.expect("whoever knows an earlier root only");
    }
    let stranger = Scene::started("").await.bundle();
    let error = scene.channel(None, &stranger).await.unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_that_was_stopped_knows_exactly_how_long_a_node_counts() {
    let mut scene = Scene::started("").await;
    let _svid = scene.join("n1").await;
    let name = NodeName::parse("n1").unwrap();
    let until = |scene: &Scene| scene.state().nodes[&name].until;
    let left = |until: u64| until.saturating_sub(seconds(SystemTime::now()));
    assert!(left(until(&scene)) > 2 * 3500, "while it runs the disk is ahead, for a crash");
    scene.stop_gracefully().await;
    let exact = left(until(&scene));
    assert!((3500..=3662).contains(&exact), "an SVID's life and what clocks may differ by, not {exact} s");
    scene.start().await;
    let _again = scene.join("n1").await;
    // Within the same second the exact time covers the new SVID as well.
    assert!(left(until(&scene)) > 3500, "the disk knows of what was signed");
}
