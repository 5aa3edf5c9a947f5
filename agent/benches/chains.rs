//! What remembering verified chains saves: a chain that `Roots` sees for the first time against one that it knows,
//! in turns, one thread, the thread's own CPU time. Chains as the authority issues them, and such with an
//! intermediate between.
//!
//! Prints one JSON object: microseconds for each, and how many times less a known one takes.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use hauberk::ca::{Ca, ProvenKey, create_root, create_successor};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls::roots::{Roots, Usage};
use nix::time::{ClockId, clock_gettime};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};
use serde_json::json;

/// The agent's own.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Chains of each kind; fewer than are remembered.
const CHAINS: usize = 2_000;
/// Chains in a turn.
const TURN: usize = 50;
const LIFETIME: Duration = Duration::from_secs(3600);

type Chain = Vec<CertificateDer<'static>>;

fn main() -> Result<()> {
    let domain = TrustDomain::parse("bench.test")?;
    let now = SystemTime::now();
    let root = Ca::from_pem(domain.clone(), &create_root(&domain, now)?)?;
    let (pem, cross) = create_successor(&domain, Some(&root), now)?;
    let cross = CertificateDer::from_pem_slice(cross.context("a cross certificate")?.as_bytes())?;
    let next = Ca::from_pem(domain, &pem)?;
    let direct = measure(&root, &issue(&root, &[], now)?)?;
    let between = measure(&root, &issue(&next, &[cross], now)?)?;
    println!("{}", json!({"direct": direct, "oneIntermediate": between}));
    Ok(())
}

fn issue(ca: &Ca, above: &[CertificateDer<'static>], now: SystemTime) -> Result<Vec<Chain>> {
    let key = Keypair::generate()?;
    let proven = ProvenKey::from_csr(&key.csr()?)?;
    let chain = |number: usize| {
        let id = SpiffeId::workload(ca.domain(), "bench", &format!("w{number}"))?;
        let mut chain = ca.issue(&proven, &id, LIFETIME, now)?;
        chain.extend(above.iter().cloned());
        Ok(chain)
    };
    (0..CHAINS).map(chain).collect()
}

fn measure(root: &Ca, chains: &[Chain]) -> Result<serde_json::Value> {
    let roots = Roots::new(root.bundle(), None)?;
    let (mut first, mut known) = (Duration::ZERO, Duration::ZERO);
    for turn in chains.chunks(TURN) {
        first += verify(&roots, turn)?;
        known += verify(&roots, turn)?;
    }
    ensure!(known < first, "a known chain was as dear as a new one: is nothing remembered?");
    let each = |all: Duration| all.as_secs_f64() * 1e6 / chains.len() as f64;
    Ok(json!({
        "firstMicroseconds": each(first),
        "knownMicroseconds": each(known),
        "ratio": first.as_secs_f64() / known.as_secs_f64(),
    }))
}

fn verify(roots: &Roots, chains: &[Chain]) -> Result<Duration> {
    let now = UnixTime::now();
    let began = cpu()?;
    for chain in chains {
        roots.verify(&chain[0], &chain[1..], now, Usage::Client)?;
    }
    Ok(cpu()? - began)
}

fn cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
