//! The count that node scope exists for: handshakes grow with pairs of nodes, signatures with identities,
//! and neither with pairs of identities. Pool, TLS, HBONE and proofs over loopback.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod far;
mod kernel;

use std::net::SocketAddr;
use std::time::Instant;

use far::{Agent, Far, authority, exchange, node, workload};
use hauberk::identity::SpiffeId;
use hauberk::pool::{Key, Pool, Route};
use tokio::net::TcpListener;

/// A pool that is alone.
fn pool(agent: &Agent) -> Pool {
    kernel::if_asked();
    agent.pool(&tokio::sync::broadcast::Sender::new(1))
}

fn workloads(side: &'static str, count: usize) -> impl Iterator<Item = SpiffeId> {
    (0..count).map(move |number| workload(side, number))
}

/// Every one of `sources` opens a stream to every one of the destinations, one after another; the sources
/// do it at the same time. The destinations' own tunnels are at `addresses`.
async fn all_to_all(pool: &Pool, sources: usize, addresses: &[SocketAddr], between: Option<Key>) {
    let mut tasks = tokio::task::JoinSet::new();
    for source in 0..sources {
        let (pool, addresses, node) = (pool.clone(), addresses.to_vec(), between.clone());
        tasks.spawn(async move {
            for (number, address) in addresses.into_iter().enumerate() {
                let (source, destination) = (workload("a", source), workload("b", number));
                let route = Route { workload: Key { source, destination, address }, node: node.clone() };
                exchange(&pool, &route, number, Instant::now()).await;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
}

#[tokio::test]
async fn forty_thousand_pairs_of_identities_cost_one_handshake_and_four_hundred_signatures() {
    const EACH: usize = 200;
    let ca = authority();
    let far = Far::new(Agent::new(&ca, workloads("b", EACH).chain([node("n2")]), true), "b");
    let address = far.serve(node("n2")).await;
    let pool = pool(&Agent::new(&ca, workloads("a", EACH).chain([node("n1")]), true));
    let between = Key { source: node("n1"), destination: node("n2"), address };
    // Whoever fell back to workload scope would find nobody at this address.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let began = Instant::now();
    all_to_all(&pool, EACH, &[nobody; EACH], Some(between)).await;
    let seen = far.seen.lock().unwrap();
    println!(
        "node scope, {EACH} identities on each of two nodes: {} pairs, {} TLS handshakes, {} + {} identity \
         proofs signed, in {:?}",
        seen.pairs.len(),
        seen.handshakes,
        seen.theirs.len(),
        seen.ours.len(),
        began.elapsed()
    );
    assert_eq!(seen.pairs.len(), EACH * EACH, "everybody spoke to everybody");
    assert_eq!(seen.handshakes, 1, "TLS handshakes grow with pairs of nodes only");
    assert_eq!(seen.theirs.len(), EACH, "each source signed once");
    assert_eq!(seen.ours.len(), EACH, "each destination signed once");
}

#[tokio::test]
async fn in_workload_scope_every_pair_of_identities_costs_a_handshake() {
    const EACH: usize = 20;
    let ca = authority();
    let far = Far::new(Agent::new(&ca, workloads("b", EACH), true), "b");
    let mut addresses = Vec::new();
    for number in 0..EACH {
        addresses.push(far.serve(workload("b", number)).await);
    }
    let pool = pool(&Agent::new(&ca, workloads("a", EACH), true));
    for _ in 0..2 {
        all_to_all(&pool, EACH, &addresses, None).await;
    }
    let handshakes = far.seen.lock().unwrap().handshakes;
    println!(
        "workload scope, {EACH} identities on each of two nodes: {} pairs, {handshakes} TLS handshakes, with \
         two signatures each; 200 identities on each would make {} and {}",
        EACH * EACH,
        200 * 200,
        2 * 200 * 200
    );
    assert_eq!(handshakes, EACH * EACH, "one for each pair, however many streams they have");
}
