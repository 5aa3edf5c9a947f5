//! What is done before a stream needs it, and what a stream waits for: connections made ahead, and the
//! destination's proof. Pool, TLS, HBONE and proofs over loopback.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod far;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use far::{Agent, Far, application, authority, exchange, node, svid, workload};
use hauberk::ca::Ca;
use hauberk::config::TunnelConfig;
use hauberk::hbone::client::Ask;
use hauberk::identity::revocation::{Revocations, Subject};
use hauberk::pool::{Failure, Key, Route, Seat, Word};
use hauberk::trust::Trust;
use hauberk::verdict::Reason;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, broadcast};
use tokio::task::JoinHandle;

fn far(ca: &Ca) -> Far {
    Far::new(Agent::new(ca, [workload("b", 0), node("n2")].into_iter(), true), "b")
}

fn near(ca: &Ca) -> Agent {
    Agent::new(ca, [workload("a", 0), node("n1")].into_iter(), true)
}

fn route(address: SocketAddr, between: Key) -> Route {
    let workload = Key { source: workload("a", 0), destination: workload("b", 0), address };
    Route { workload, node: Some(between) }
}

/// A node that is asked for its first stream, and does not answer before it is told to.
struct Silent {
    far: Far,
    trust: Arc<Trust>,
    opening: JoinHandle<Result<(), Failure>>,
}

impl Silent {
    async fn asked(config: TunnelConfig) -> Self {
        let ca = authority();
        let mut far = far(&ca);
        far.answers = Arc::new(Semaphore::new(0));
        let address = far.serve(node("n2")).await;
        let near = near(&ca);
        let trust = Arc::clone(&near.trust);
        let pool = near.configured(config, &broadcast::Sender::new(1));
        let between = Key { source: node("n1"), destination: node("n2"), address };
        let route = route(address, between);
        let ask = Ask { authority: application(0), source: application(0) };
        let opening = tokio::spawn(async move { pool.open(&route, ask, Instant::now()).await.map(drop) });
        while far.seen.lock().unwrap().pairs.is_empty() && !opening.is_finished() {
            tokio::task::yield_now().await;
        }
        Self { far, trust, opening }
    }
}

#[tokio::test]
async fn who_is_revoked_while_its_proof_is_on_its_way_is_not_believed() {
    let silent = Silent::asked(TunnelConfig::default()).await;
    let mut list = Revocations::default();
    list.revoke(Subject::SpiffeId(workload("b", 0)), SystemTime::now()).unwrap();
    silent.trust.set_revocations(list);
    // The connection's own task has looked for streams to cut by now.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    silent.far.answers.add_permits(1);
    let outcome = silent.opening.await.unwrap();
    assert_eq!(outcome.map_err(|failure| failure.reason), Err(Reason::Revoked));
}

#[tokio::test]
async fn a_node_that_never_proves_the_destination_is_given_up() {
    let config = TunnelConfig { handshake_timeout: Duration::from_millis(200), ..TunnelConfig::default() };
    let silent = Silent::asked(config).await;
    let outcome = tokio::time::timeout(Duration::from_secs(10), silent.opening).await;
    let failure = outcome.expect("it is given up").unwrap().unwrap_err();
    assert_eq!(failure.reason, Reason::HandshakeTimeout);
    assert!(failure.detail.contains("handshakeTimeoutMs"), "{failure}");
}

#[tokio::test]
async fn a_connection_made_ahead_is_the_first_streams_and_is_made_once() {
    let ca = authority();
    let far = far(&ca);
    let address = far.serve(node("n2")).await;
    let near = near(&ca);
    let (words, mut heard) = broadcast::channel(8);
    let pool = near.pool(&words);
    let between = Key { source: node("n1"), destination: node("n2"), address };
    let handshakes = || far.seen.lock().unwrap().handshakes;

    assert!(!pool.holds(&between));
    assert!(pool.ahead(&between).await.unwrap(), "there was none");
    assert!(!pool.ahead(&between).await.unwrap(), "there is one");
    assert!(pool.holds(&between) && heard.is_empty(), "nobody has needed it yet");
    for _ in 0..2 {
        exchange(&pool, &route(address, between.clone()), 0, Instant::now()).await;
    }
    assert_eq!(handshakes(), 1, "the streams waited for none of their own");
    assert!(matches!(heard.try_recv(), Ok(Word::Needed(key)) if key == between), "the first has needed it");
    assert!(heard.is_empty(), "the second is no news");

    // Trust that changed without a word of these roots and this SVID asks for nothing.
    near.trust.insert(svid(&ca, &workload("a", 1)));
    pool.refresh(Duration::ZERO);
    settle().await;
    assert_eq!(handshakes(), 1);
    near.trust.insert(svid(&ca, &node("n1")));
    pool.refresh(Duration::ZERO);
    while handshakes() < 2 {
        tokio::task::yield_now().await;
    }
    pool.refresh(Duration::ZERO);
    exchange(&pool, &route(address, between.clone()), 0, Instant::now()).await;
    assert_eq!(handshakes(), 2, "after a rotation too");
    pool.sweep(Instant::now(), Duration::ZERO);
    assert!(!pool.holds(&between), "what nobody uses goes as any other");
    pool.refresh(Duration::ZERO);
    settle().await;
    assert_eq!(handshakes(), 2, "and is not made again");
}

#[tokio::test]
async fn who_has_proven_themselves_ahead_waits_for_nothing_and_does_so_again_after_a_rotation() {
    let ca = authority();
    let mut far = far(&ca);
    far.answers = Arc::new(Semaphore::new(0));
    let address = far.serve(node("n2")).await;
    let near = near(&ca);
    let pool = near.pool(&broadcast::Sender::new(1));
    let between = Key { source: node("n1"), destination: node("n2"), address };
    let signatures = || {
        let seen = far.seen.lock().unwrap();
        (seen.theirs.len(), seen.ours.len())
    };
    pool.ahead(&between).await.unwrap();
    pool.acquaint(&between, vec![workload("a", 0)], vec![workload("b", 0)]).await;
    assert_eq!(signatures(), (1, 1), "one of each side");
    assert!(far.seen.lock().unwrap().pairs.is_empty(), "and nobody was asked for a stream");

    let route = route(address, between);
    let ask = Ask { authority: application(0), source: application(0) };
    let _stream = pool.open(&route, ask, Instant::now()).await.unwrap();
    assert_eq!(signatures(), (1, 1), "the stream is open though nothing has been answered");

    near.trust.insert(svid(&ca, &node("n1")));
    pool.refresh(Duration::ZERO);
    while signatures() != (2, 2) {
        tokio::task::yield_now().await;
    }
    assert_eq!(far.seen.lock().unwrap().handshakes, 2);
}

#[tokio::test]
async fn a_thread_makes_a_connection_of_its_own_when_streams_come_often() {
    const SECOND: Duration = Duration::from_secs(1);
    let ca = authority();
    let far = far(&ca);
    let address = far.serve(node("n2")).await;
    let near = near(&ca);
    let pools: Vec<_> = Seat::row()
        .take(2)
        .map(|seat| near.seated(TunnelConfig::default(), &broadcast::Sender::new(8), seat))
        .collect();
    let between = Key { source: node("n1"), destination: node("n2"), address };
    let route = route(address, between.clone());
    let handshakes = || far.seen.lock().unwrap().handshakes;
    let now = Instant::now();
    pools[0].ahead(&between).await.unwrap();
    for later in [0, 1, 2] {
        assert_eq!(pools[1].home(&between, now + SECOND * later), Some(0), "after {later} s");
        exchange(&pools[0], &route, 0, now).await;
    }
    assert_eq!(pools[0].home(&between, now), None, "it has one");
    assert_eq!(handshakes(), 1);
    let often = now + SECOND * 5 / 2;
    assert_eq!(pools[1].home(&between, often), None, "two within a second");
    exchange(&pools[1], &route, 0, now).await;
    assert_eq!(pools[1].home(&between, often + SECOND), None, "it has its own now");
    assert_eq!(handshakes(), 2);
    // Where nothing is left, whoever needs a connection is the one who has it.
    pools.iter().for_each(|pool| pool.sweep(often + SECOND, Duration::ZERO));
    assert_eq!(pools[1].home(&between, often + SECOND), None);
    assert_eq!(pools[0].home(&between, often + SECOND), Some(1));
}

#[tokio::test]
async fn a_node_that_is_not_there_is_asked_once_and_held_against_nobody() {
    let ca = authority();
    let near = near(&ca);
    let pool = near.pool(&broadcast::Sender::new(1));
    let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let between = Key { source: node("n1"), destination: node("n2"), address };
    assert_eq!(pool.ahead(&between).await.unwrap_err().reason, Reason::NoNodeScope);
    let far = far(&ca);
    let address = far.serve_at(node("n2"), address).await;
    // A change of trust is no reason to try again.
    near.trust.insert(svid(&ca, &node("n1")));
    pool.refresh(Duration::ZERO);
    settle().await;
    assert_eq!(far.seen.lock().unwrap().handshakes, 0);
    exchange(&pool, &route(address, between), 0, Instant::now()).await;
    assert_eq!(far.seen.lock().unwrap().handshakes, 1, "a stream tries at once, and in node scope");
}

/// Lets whatever was begun go on.
async fn settle() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}
