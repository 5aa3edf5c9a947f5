//! Resumption that is no bypass: real handshakes over TCP, each refusal after a success.
//!
//! Every test resumes first, so that what is refused afterwards is the change and nothing else.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod sides;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use hauberk::identity::TrustDomain;
use hauberk::identity::federation::{Admit, Federated, Federation};
use hauberk::issue::keep::tickets;
use hauberk::tls;
use hauberk::tls::server::{Judged, Listener};
use hauberk::tls::ticket::{self, TicketKeys};
use hauberk::tls::verify::Judge;
use hauberk::verdict::{Reason, Unresumed};
use rustls::HandshakeKind;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::CertificateDer;
use sides::{BEGIN, LONG, Rule, bundle, id, intermediate, memory, memory_with, root, svid, world};

#[tokio::test]
async fn sessions_are_resumed_again_and_again_and_both_sides_know_the_peer() {
    let world = world();
    let went = world.resume().await;
    assert_eq!(went.client.unwrap().leaf.id, id("server"));
    assert_eq!(went.server.unwrap().leaf.id, id("client"));
    for _ in 0..10 {
        world.again().await.must_be_resumed();
    }
}

#[tokio::test]
async fn without_resumption_on_either_side_every_handshake_is_full() {
    for (client, server) in [(true, false), (false, true)] {
        let mut world = world();
        let keys = |on: bool| on.then(ticket::fleeting);
        world.client.memory = memory(keys(client), &world.client_clock);
        world.server.memory = memory(keys(server), &world.server_clock);
        for _ in 0..3 {
            let went = world.again().await;
            assert!(went.client.is_ok() && !went.resumed() && went.unresumed.is_none(), "{went:?}");
        }
    }
}

#[tokio::test]
async fn refused_after_the_peers_root_was_removed() {
    let mut world = world();
    world.resume().await;
    (world.server.bundle, world.server.epoch) = (bundle(&[&world.server_root]), 2);
    world.again().await.must_be_refused(Unresumed::TrustChanged, Reason::UnknownIssuer);
}

#[tokio::test]
async fn refused_after_the_bundle_changed() {
    let mut world = world();
    world.resume().await;
    let roots = bundle(&[&world.client_root, &world.server_root, &root("another")]);
    (world.server.bundle, world.server.epoch) = (roots, 2);
    world.again().await.must_be_full(Unresumed::TrustChanged);
    world.again().await.must_be_resumed();
}

#[tokio::test]
async fn refused_after_another_trust_domains_roots_changed() {
    let mut world = world();
    world.resume().await;
    for epoch in 2..4 {
        let mut federation = Federation::default();
        let federated = Federated::new(vec![root("theirs").der().clone()], Admit::default()).unwrap();
        federation.insert(TrustDomain::parse("other.test").unwrap(), federated);
        let roots = bundle(&[&world.client_root, &world.server_root]).with_federation(Arc::new(federation));
        (world.server.bundle, world.server.epoch) = (roots, epoch);
        world.again().await.must_be_full(Unresumed::TrustChanged);
        world.again().await.must_be_resumed();
    }
}

#[tokio::test]
async fn equal_trust_of_another_process_resumes() {
    let mut world = world();
    let keys = ticket::fleeting();
    world.server.memory = memory(Some(Arc::clone(&keys)), &world.server_clock);
    world.resume().await;
    // The same roots in another order, in a process that has counted other epochs.
    world.server.memory = memory(Some(keys), &world.server_clock);
    (world.server.bundle, world.server.epoch) = (bundle(&[&world.server_root, &world.client_root]), 77);
    world.again().await.must_be_resumed();
}

#[tokio::test]
async fn refused_after_the_peers_leaf_expired() {
    let mut world = world();
    world.client.svid = svid(&world.client_root, &[], &id("client"), 600);
    world.resume().await;
    // The client's clock is behind: it still offers its session.
    world.server_clock.advance(600);
    world.again().await.must_be_refused(Unresumed::Expired, Reason::Expired);
}

#[tokio::test]
async fn refused_after_an_intermediate_expired() {
    let mut world = world();
    let between = intermediate(&world.client_root, 600);
    world.client.svid = svid(&between, &[&between], &id("client"), LONG);
    world.resume().await;
    world.server_clock.advance(600);
    world.again().await.must_be_refused(Unresumed::Expired, Reason::Expired);
}

#[tokio::test]
async fn refused_after_the_servers_own_svid_expired() {
    let mut world = world();
    world.server.svid = svid(&world.server_root, &[], &id("server"), 600);
    world.resume().await;
    world.server_clock.advance(600);
    // Renewed, as the same identity; the old one's sessions are over.
    world.server.svid = svid(&world.server_root, &[], &id("server"), LONG);
    world.again().await.must_be_full(Unresumed::Expired);
}

#[tokio::test]
async fn refused_after_the_peers_leaf_was_revoked() {
    let mut world = world();
    let rule = Rule::new(Reason::Revoked, 1);
    world.server.judge = Some(Arc::clone(&rule) as Arc<dyn Judge>);
    world.resume().await;
    // Nothing but the peer's standing changes: the ticket opens, and its peer is judged.
    rule.on.store(true, Ordering::Relaxed);
    world.again().await.must_be_refused(Unresumed::Revoked, Reason::Revoked);
}

#[tokio::test]
async fn refused_after_a_policy_came_to_deny_the_peer() {
    let mut world = world();
    let rule = Rule::new(Reason::DeniedByPolicy, 1);
    world.server.judge = Some(Arc::clone(&rule) as Arc<dyn Judge>);
    world.resume().await;
    rule.on.store(true, Ordering::Relaxed);
    world.again().await.must_be_refused(Unresumed::Policy, Reason::DeniedByPolicy);
}

#[tokio::test]
async fn refused_after_the_rules_changed_though_they_still_allow_the_peer() {
    let mut world = world();
    world.server.judge = Some(Rule::new(Reason::DeniedByPolicy, 1));
    world.resume().await;
    world.server.judge = Some(Rule::new(Reason::DeniedByPolicy, 2));
    world.again().await.must_be_full(Unresumed::TrustChanged);
}

#[tokio::test]
async fn refused_after_the_listeners_identity_changed() {
    let mut world = world();
    world.resume().await;
    world.server.svid = svid(&world.server_root, &[], &id("other"), LONG);
    let went = world.again().await;
    went.must_be_full(Unresumed::OtherListener);
    assert_eq!(went.client.unwrap().leaf.id, id("other"), "the client knows who answers now");
}

#[tokio::test]
async fn resumed_after_the_servers_svid_was_renewed_as_the_same_identity() {
    let mut world = world();
    world.resume().await;
    world.server.svid = svid(&world.server_root, &[], &id("server"), LONG);
    world.again().await.must_be_resumed();
}

#[tokio::test]
async fn refused_on_another_workloads_listener() {
    let mut world = world();
    world.resume().await;
    world.server.place = vec![b"workload", b"test", b"server-1"];
    world.again().await.must_be_full(Unresumed::OtherListener);
}

#[tokio::test]
async fn refused_in_another_scope() {
    let mut world = world();
    world.resume().await;
    world.server.place = vec![b"node", b"test", b"server-0"];
    world.again().await.must_be_full(Unresumed::OtherListener);
}

#[tokio::test]
async fn refused_after_the_mode_went_from_permissive_to_strict() {
    let mut world = world();
    world.server.mode = "permissive";
    world.resume().await;
    world.server.mode = "strict";
    world.again().await.must_be_full(Unresumed::TermsChanged);
}

#[tokio::test]
async fn refused_after_the_application_protocols_changed() {
    let mut world = world();
    world.server.alpn = vec![b"h2", b"http/1.1"];
    world.resume().await;
    world.server.alpn = vec![b"h2"];
    world.again().await.must_be_full(Unresumed::TermsChanged);
}

#[tokio::test]
async fn refused_after_the_cipher_suites_changed() {
    let mut world = world();
    let keys = ticket::fleeting();
    world.server.memory = memory(Some(Arc::clone(&keys)), &world.server_clock);
    world.resume().await;
    // The suite of the session is still the first: it is the policy that has changed.
    let mut fewer = CryptoProvider::clone(&tls::provider::provider());
    fewer.cipher_suites.pop();
    world.server.memory = memory_with(Some(keys), &world.server_clock, Arc::new(fewer));
    world.again().await.must_be_full(Unresumed::TermsChanged);
}

#[tokio::test]
async fn refused_after_a_restart_with_new_keys() {
    let mut world = world();
    world.resume().await;
    world.server.memory = memory(Some(ticket::fleeting()), &world.server_clock);
    world.again().await.must_be_full(Unresumed::UnknownTicket);
    world.again().await.must_be_resumed();
}

/// Sends recorded bytes to a listener: how it would go on, and why not as a resumed session.
fn replay(listener: &Arc<Listener>, recorded: &[u8]) -> (Option<HandshakeKind>, Judged) {
    let (config, judged) = listener.accept();
    let mut session = rustls::ServerConnection::new(config).unwrap();
    let mut rest = recorded;
    while !rest.is_empty() && session.read_tls(&mut rest.by_ref()).unwrap() > 0 {
        // What comes after the hello cannot fit: the replayer has no keys.
        if session.process_new_packets().is_err() {
            break;
        }
    }
    (session.handshake_kind(), judged)
}

#[tokio::test]
async fn refused_when_the_ticket_was_used_before() {
    let world = world();
    let went = world.resume().await;
    let (kind, judged) = replay(&world.server.listener(), &went.sent);
    assert_eq!(judged.unresumed(), Some(Unresumed::Reused));
    assert_eq!(kind, Some(HandshakeKind::Full), "the replayed hello began a full handshake");
    world.again().await.must_be_resumed();
}

/// A directory on a tmpfs.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        Self(Path::new("/dev/shm").join(format!("hauberk-resumption-{:x}", fastrand::u64(..))))
    }

    fn keys(&self) -> Arc<TicketKeys> {
        tickets::take_up(&self.0, SystemTime::UNIX_EPOCH + Duration::from_secs(BEGIN + 60))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn resumed_by_a_successor_that_took_the_keys_up_which_also_knows_what_was_used() {
    let mut world = world();
    let dir = Dir::new();
    world.server.memory = memory(Some(dir.keys()), &world.server_clock);
    let went = world.resume().await;
    world.server.memory = memory(Some(dir.keys()), &world.server_clock);
    world.again().await.must_be_resumed();
    let (_, judged) = replay(&world.server.listener(), &went.sent);
    assert_eq!(judged.unresumed(), Some(Unresumed::Reused), "used before the restart");
}

#[tokio::test]
async fn a_peer_that_only_resumes_proves_its_key_again_within_the_hour() {
    let world = world();
    world.resume().await;
    for resumed in 0..12 {
        world.server_clock.advance(500);
        let went = world.again().await;
        assert!(went.client.is_ok(), "{went:?}");
        if !went.resumed() {
            assert_eq!(went.unresumed, Some(Unresumed::Expired));
            assert_eq!(resumed, 7, "3,500 of 3,600 seconds");
            return;
        }
    }
    panic!("never a full handshake in 6,000 seconds");
}

#[tokio::test]
async fn a_hello_full_of_tickets_costs_one_decryption() {
    let world = world();
    let listener = world.server.listener();
    let (config, judged) = listener.accept();
    // The first is looked at, and refused; the second is not looked at: it would be good.
    let went = world.resume().await;
    assert!(went.resumed());
    assert_eq!(config.ticketer.decrypt(&[0; 64]), None);
    assert_eq!(judged.unresumed(), Some(Unresumed::UnknownTicket));
    assert_eq!(config.ticketer.decrypt(&[]), None);
    assert_eq!(judged.unresumed(), Some(Unresumed::UnknownTicket), "not looked at");
    assert_eq!(config.max_early_data_size, 0);
}

#[tokio::test]
async fn the_client_judges_the_server_of_a_resumed_session_before_a_byte_is_sent() {
    let mut world = world();
    let rule = Rule::new(Reason::Revoked, 1);
    world.client.judge = Some(Arc::clone(&rule) as Arc<dyn Judge>);
    world.resume().await;
    rule.on.store(true, Ordering::Relaxed);
    let went = world.again().await;
    assert!(went.server.as_ref().is_ok_and(|s| s.resumed), "the server resumed: {went:?}");
    assert_eq!(went.client.map(drop), Err(Reason::Revoked));
    // Sessions are forgotten, and a full handshake fares no better.
    let went = world.again().await;
    assert_eq!((went.client.map(drop), went.unresumed), (Err(Reason::Revoked), None));
    rule.on.store(false, Ordering::Relaxed);
    let went = world.again().await;
    assert!(went.client.is_ok_and(|s| !s.resumed) && went.unresumed.is_none());
}

#[tokio::test]
async fn the_client_offers_no_session_after_trust_or_its_own_svid_changed() {
    let mut world = world();
    world.resume().await;
    (world.client.bundle, world.client.epoch) = (bundle(&[&world.client_root, &world.server_root]), 2);
    let went = world.again().await;
    assert!(went.client.is_ok() && !went.resumed() && went.unresumed.is_none(), "trust: {went:?}");
    world.again().await.must_be_resumed();
    world.client.svid = svid(&world.client_root, &[], &id("client"), LONG);
    let went = world.again().await;
    assert!(went.client.is_ok() && !went.resumed() && went.unresumed.is_none(), "SVID: {went:?}");
}

#[tokio::test]
async fn the_client_offers_no_session_of_a_server_whose_certificate_expired() {
    let mut world = world();
    world.server.svid = svid(&world.server_root, &[], &id("server"), 600);
    world.resume().await;
    world.client_clock.advance(600);
    let went = world.again().await;
    assert_eq!((went.client.map(drop), went.unresumed), (Err(Reason::Expired), None));
}

#[tokio::test]
async fn the_client_offers_no_session_after_its_own_certificate_expired() {
    let mut world = world();
    world.client.svid = svid(&world.client_root, &[], &id("client"), 600);
    world.resume().await;
    world.client_clock.advance(600);
    let went = world.again().await;
    assert!(!went.resumed() && went.unresumed.is_none(), "{went:?}");
}

#[tokio::test]
async fn certificates_other_than_the_judged_ones_are_refused() {
    let world = world();
    let listener = world.server.listener();
    let (_, judged) = listener.accept();
    let chain: Vec<CertificateDer<'static>> = world.client.svid.certified_key().cert.clone();
    assert!(judged.settle(Some(HandshakeKind::Full), Some(&chain)).is_err(), "never judged");
    assert!(judged.settle(Some(HandshakeKind::Resumed), Some(&chain)).is_err(), "never opened");
    assert!(judged.settle(Some(HandshakeKind::Full), None).is_err(), "nobody");
}
