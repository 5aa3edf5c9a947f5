//! What `hauberk capacity` predicts of memory, against what this process grows by: alone in it, so that
//! nothing else does.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

mod far;

use std::time::{Duration, Instant};

use far::{Agent, Far, authority, node, open, workload};
use hauberk::capacity::calibrate::calibrate;
use hauberk::pool::{Key, Route};
use tokio::sync::broadcast;

/// Nodes that are dialled, and streams held to each.
const NODES: usize = 200;
const STREAMS: usize = 20;
/// Made first and not counted, as in the calibration.
const WARM_UP: usize = 16;

fn resident() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: f64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096.0
}

/// What both ends of connections between nodes take, with `STREAMS` held on each by two
/// identities.
#[tokio::test]
async fn connections_and_streams_between_nodes_take_the_memory_that_is_predicted() {
    let found = calibrate(Duration::ZERO, &mut |_| ()).unwrap();
    let ca = authority();
    let ids = |own: &str| [workload("s", 0), workload("s", 1), node(own)].into_iter();
    let (agent, far) = (Agent::new(&ca, ids("n0"), false), Far::new(Agent::new(&ca, ids("n1"), false), "s"));
    let pool = agent.pool(&broadcast::Sender::new(1));
    let mut held = Vec::new();
    let mut before = 0.0;
    for made in 0..WARM_UP + NODES {
        if made == WARM_UP {
            before = resident();
        }
        // The same node at another address each time: a connection for each.
        let address = far.serve(node("n1")).await;
        let between = Key { source: node("n0"), destination: node("n1"), address };
        for stream in 0..STREAMS {
            let (source, destination) = (workload("s", stream % 2), workload("s", 0));
            let route = Route { workload: Key { source, destination, address }, node: Some(between.clone()) };
            held.push(open(&pool, &route, 0, Instant::now()).await);
        }
    }
    let grown = resident() - before;
    let streams = (NODES * STREAMS) as f64;
    // Two ends of each; two identities proven one way, one the other.
    let predicted = 2.0 * (NODES as f64 * found.tunnel_bytes + streams * found.stream_bytes)
        + 3.0 * NODES as f64 * found.certificate_bytes;
    println!("memory: grown by {grown:.0}, predicted {predicted:.0}");
    assert_eq!(far.seen.lock().unwrap().handshakes, WARM_UP + NODES);
    // A factor of two: this test's own tasks and listeners are in it, and what proofs are held in.
    assert!(grown < 2.0 * predicted && grown > predicted / 2.0, "grown by {grown:.0}, not {predicted:.0}");
}
