//! First requests: what a client waits for when nothing is connected yet.
//!
//! A request here is 16 bytes there and back on a new connection. The client program has run before
//! (against a server outside the mesh), so that its own first steps are not counted.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tests::{Host, World};

use super::field::{DIRECT, Field, HAUBERK, NOT_RESUMING, RESUMING};
use super::figures::{Figure, Results, median};
use super::programs::ECHO;
use crate::shell::say;

/// Exchanges after the first: their median is a warm one.
const WARM: usize = 20;

/// Measures every way once.
pub(super) fn measure(field: &mut Field, results: &mut Results) -> Result<()> {
    fresh_agents(&mut field.resuming, results).context("first requests through Hauberk")?;
    redial(&field.resuming, RESUMING, results)?;
    if let Some(world) = &field.not_resuming {
        redial(world, NOT_RESUMING, results)?;
    }
    let client = &field.node.get("plain-client").host;
    let direct = field.node.get("plain-server").v4(ECHO);
    let [warm] = times(client, &direct, [&direct])?;
    record(results, DIRECT, &warm);
    for i in 0..field.pairs.len() {
        field.pairs[i].restart(&field.node)?;
        let pair = &field.pairs[i];
        let (outside, through) = field.echo_through(pair);
        let client = &field.node.get("plain-client").host;
        let [all] = times(client, &outside, [&through])
            .with_context(|| format!("first requests through {}", pair.kind.name()))?;
        record(results, pair.kind.name(), &all);
    }
    Ok(())
}

fn record(results: &mut Results, way: &str, times: &Times) {
    results.add(Figure::FirstCold, way, times.first_ms);
    results.add(Figure::Warm, way, times.warm_ms);
}

/// Both agents anew: the first request to a pod, then the first to another pod of the same node.
fn fresh_agents(world: &mut World, results: &mut Results) -> Result<()> {
    for node in ["n1", "n2"] {
        world.agent(node).kill9();
    }
    for node in ["n1", "n2"] {
        world.agent(node).restart()?;
    }
    // What an agent does after it is ready is done by the time that its first pod speaks.
    std::thread::sleep(Duration::from_millis(500));
    let to = ["server", "second"].map(|pod| world.get(pod).v4(ECHO));
    let outside = world.get("outside").v4(ECHO);
    let [one, other] = times(&world.get("client").host, &outside, [&to[0], &to[1]])?;
    record(results, HAUBERK, &one);
    results.add(Figure::FirstConnected, HAUBERK, other.first_ms);
    Ok(())
}

/// A request after the tunnel was closed as idle: a new handshake, full or resumed.
fn redial(world: &World, way: &str, results: &mut Results) -> Result<()> {
    let (client, outside, to) =
        (&world.get("client").host, world.get("outside").v4(ECHO), world.get("server").v4(ECHO));
    // The sender knows the receiver from now on.
    times(client, &outside, [&to]).with_context(|| way.to_owned())?;
    if !no_tunnels(world)? {
        say(&format!("  ({way}: tunnels stay open though idle: no request after that)"));
        return Ok(());
    }
    let [again] = times(client, &outside, [&to]).with_context(|| way.to_owned())?;
    results.add(Figure::Redial, way, again.first_ms);
    Ok(())
}

/// Waits until node 1 has closed its tunnels; whether it did.
fn no_tunnels(world: &World) -> Result<bool> {
    let until = Instant::now() + Duration::from_secs(10);
    while world.agent_ref("n1").metric("hauberk_pool_connections", &[])? > 0.0 {
        if Instant::now() > until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(true)
}

struct Times {
    first_ms: f64,
    /// The median of those that followed.
    warm_ms: f64,
}

/// Exchanges with each server in turn, after some with `warm`.
fn times<const N: usize>(client: &Host, warm: &str, to: [&str; N]) -> Result<[Times; N]> {
    let count = (WARM + 1).to_string();
    let said = client.actor(&[&["times", "--count", &count, "--warm", warm], &to[..]].concat())?;
    let mut all = Vec::new();
    for server in 0..N {
        let micros: Vec<f64> =
            said["us"][server].as_array().into_iter().flatten().filter_map(|v| v.as_f64()).collect();
        let (first, later) = micros.split_first().context("the actor measured nothing")?;
        let warm = median(later).context("the actor measured one exchange only")?;
        all.push(Times { first_ms: first / 1e3, warm_ms: warm / 1e3 });
    }
    all.try_into().ok().context("the actor left out a server")
}
