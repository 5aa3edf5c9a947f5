//! SVIDs are renewed under load and nobody notices; what is held outlives the issuer for as long as was
//! promised, and somebody is told when it would not; agents live from other issuers than the authority.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use serde_json::Value;
use tests::host::bin;
use tests::{Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(30);

const ISSUED: &str = "hauberk_svid_requests_total";

fn world(options: Options) -> World {
    let mut world = World::new(options).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world
}

#[test]
fn ten_rotations_a_minute_under_load_fail_no_request_and_cut_no_stream() {
    let mut world = world(Options { svid_seconds: 12, ..Options::default() });
    world.start().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let mut watch = server.host.actor_server(&["watch", "0.0.0.0:8080"]).unwrap();
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let mut hold = client.host.actor_server(&["hold", &server.v4(8080), "1"]).unwrap();
    assert_eq!(hold.said().unwrap()["alive"], 1);
    let issued = |node: &str| world.agent_ref(node).metric(ISSUED, &["outcome=\"issued\""]).unwrap();
    let before = [issued("n1"), issued("n2")];
    let began = Instant::now();
    let lanes: Vec<Value> = std::thread::scope(|scope| {
        let lane = || client.host.actor(&["loop", &server.v4(8081), "65"]).unwrap();
        let lanes: Vec<_> = (0..3).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().map(|lane| lane.join().unwrap()).collect()
    });
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    for seen in &lanes {
        assert_eq!(seen["ok"], seen["all"], "every exchange during all renewals: {seen}");
    }
    for (node, before) in ["n1", "n2"].into_iter().zip(before) {
        // The node's own identity and its pod's.
        let each = (issued(node) - before) / 2.0;
        assert!(each >= 9.0 * minutes, "{node}: only {each} renewals of each SVID");
        // Made before the old one is left: the one in use, and those that streams still live on, for each thread.
        let tunnels = world.agent_ref(node).metric("hauberk_pool_connections", &[]).unwrap();
        assert!(tunnels <= 20.0, "{node}: old connections are not left: {tunnels} are open");
    }
    // The oldest connection still carries its stream: only now does it end, and cleanly.
    hold.process.close_stdin();
    assert_eq!(watch.said().unwrap()["ended"], "end");
}

/// A connection that stays, and for how long it may.
fn outlives_as_long_as_configured(node_scope: bool) {
    let yaml = "tunnel: {outliveSvidSeconds: 6}\n".into();
    let mut world = world(Options { svid_seconds: 12, agent_yaml: yaml, node_scope, ..Options::default() });
    world.pod("near", "n1", Mode::Strict).unwrap();
    world.start().unwrap();
    let (client, server, near) = (world.get("client"), world.get("server"), world.get("near"));
    let _echoes = [server, near].map(|pod| pod.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap());
    let reaches =
        |pod: &tests::world::Pod| client.host.actor(&["poke", &pod.v4(8081)]).unwrap()["end"] == "data";
    wait_until(SOON, "both are reached", || reaches(server) && reaches(near));
    let began = Instant::now();
    let stays = [server, near].map(|pod| client.host.actor_server(&["stay", &pod.v4(8081)]).unwrap());
    let lane = std::thread::scope(|scope| {
        let lane = scope.spawn(|| client.host.actor(&["loop", &server.v4(8081), "22"]).unwrap());
        for mut stay in stays {
            assert_eq!(stay.said().unwrap()["ended"], "reset");
            let lived = began.elapsed();
            // What is left of an SVID that is about to be renewed, and the whole life of a new one.
            assert!(lived >= Duration::from_secs(10), "cut after {lived:?}, before its time");
            assert!(lived <= Duration::from_secs(12 + 6 + 4), "it lived for {lived:?}");
        }
        lane.join().unwrap()
    });
    assert_eq!(lane["ok"], lane["all"], "what came meanwhile was carried: {lane}");
    let expired = |node: &str, direction| {
        world.agent_ref(node).wait_metric(
            "hauberk_connections_total",
            &[direction, "reason=\"expired\""],
            1.0,
        )
    };
    expired("n1", "outbound").unwrap();
    expired("n2", "inbound").unwrap();

    // Without renewals no stream is opened on what has expired.
    world.stop_authority();
    let (client, server) = (world.get("client"), world.get("server"));
    wait_until(SOON, "nothing is carried under expired SVIDs", || {
        client.host.actor(&["poke", &server.v4(8081)]).unwrap()["end"] != "data"
    });
}

#[test]
fn a_stream_outlives_its_connections_svids_as_long_as_configured_in_node_scope() {
    outlives_as_long_as_configured(true);
}

#[test]
fn a_stream_outlives_its_connections_svids_as_long_as_configured_in_workload_scope() {
    outlives_as_long_as_configured(false);
}

#[test]
fn whoever_asked_to_outlive_an_outage_is_told_when_that_margin_is_gone_and_when_it_is_back() {
    let yaml = "drainSeconds: 5\navailabilityTargetSeconds: 15\n".into();
    let mut world = world(Options { svid_seconds: 20, agent_yaml: yaml, ..Options::default() });
    world.start().unwrap();
    let at_risk = |world: &World| world.agent_ref("n1").metric("hauberk_availability_at_risk", &[]).unwrap();
    let renewals = |world: &World| world.agent_ref("n1").metric(ISSUED, &["outcome=\"issued\""]).unwrap();
    let first = renewals(&world);
    wait_until(SOON, "renewed long before half of their life", || {
        assert_eq!(at_risk(&world), 0.0);
        renewals(&world) >= first + 4.0
    });

    world.stop_authority();
    wait_until(SOON, "the margin is gone", || at_risk(&world) == 1.0);
    let config = world.agent_ref("n1").config().to_string_lossy().into_owned();
    let status =
        world.host("n1").run(&bin("hauberk").unwrap(), &["status", "-o", "json", "--config", &config]);
    let status: Value = serde_json::from_str(&status.unwrap().ok().unwrap()).unwrap();
    assert!(status["warning"].as_str().unwrap().contains("availabilityTargetSeconds"), "{status}");
    assert_eq!(status["availabilityTargetSeconds"], 15, "{status}");
    assert!(status["outageMarginSeconds"].as_u64().unwrap() < 15, "{status}");
    let told =
        |world: &World| world.agent_ref("n1").log().contains("ends sooner than availabilityTargetSeconds");
    wait_until(SOON, "the log says so", || told(&world));
    world.start_authority().unwrap();
    wait_until(SOON, "the margin is back", || at_risk(&world) == 0.0);
}

/// Writes an SVID as somebody else's tool would.
fn write_svid(dir: &Path, name: &str, ca: &Ca, id: &SpiffeId) {
    let key = Keypair::generate().unwrap();
    let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
    let chain = ca.issue(&proven, id, Duration::from_secs(600), SystemTime::now()).unwrap();
    let text = hauberk::issue::pem("CERTIFICATE", &chain[0]) + &key.to_pem();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join(name).with_extension("new"), text).unwrap();
    std::fs::rename(dir.join(name).with_extension("new"), dir.join(name)).unwrap();
}

#[test]
fn agents_live_from_files_and_follow_their_renewal_without_a_failed_request() {
    let issuer = Some("{files: {directory: DIR/svids, trustBundle: DIR/roots.pem}}".into());
    let mut world = world(Options { issuer, ..Options::default() });
    let domain = TrustDomain::parse(tests::world::TRUST_DOMAIN).unwrap();
    let root = create_root(&domain, SystemTime::now()).unwrap();
    let ca = Ca::from_pem(domain.clone(), &root).unwrap();
    let write = |dir: &Path| {
        for (node, pod) in [("n1", "client"), ("n2", "server")] {
            let svids = dir.join(node).join("svids");
            write_svid(&svids, "node.pem", &ca, &SpiffeId::node(&domain, node).unwrap());
            write_svid(&svids, "pod.pem", &ca, &SpiffeId::workload(&domain, "demo", pod).unwrap());
            let root = hauberk::issue::pem("CERTIFICATE", &ca.bundle().roots()[0]);
            std::fs::write(dir.join(node).join("roots.pem"), root).unwrap();
        }
    };
    write(&world.dir());
    world.start().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _echo = server.host.actor_server(&["echo", "0.0.0.0:8081"]).unwrap();
    let seen = std::thread::scope(|scope| {
        let load = scope.spawn(|| client.host.actor(&["loop", &server.v4(8081), "6"]).unwrap());
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(1500));
            write(&world.dir());
        }
        load.join().unwrap()
    });
    assert_eq!(seen["ok"], seen["all"], "{seen}");
    assert!(seen["ok"].as_u64().unwrap() > 0, "{seen}");
    for node in ["n1", "n2"] {
        let issued =
            world.agent_ref(node).metric(ISSUED, &["issuer=\"files\"", "outcome=\"issued\""]).unwrap();
        assert!(issued >= 6.0, "{node}: {issued}");
        let handshakes =
            world.agent_ref(node).metric("hauberk_tls_handshakes_total", &["outcome=\"ok\""]).unwrap();
        assert!(handshakes >= 1.0, "{node}: {handshakes}");
    }
}
