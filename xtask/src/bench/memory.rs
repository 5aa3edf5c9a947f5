//! Memory: idle, by open connection, by enrolled pod; whether it stays flat over many connections,
//! and bounded when readers stall.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::{Host, Mode, World};

use super::cpu;
use super::field::{self, Field, HAUBERK};
use super::figures::{Figure, Results};
use super::pair::Pair;
use super::programs::{ECHO, echo};
use crate::shell::{say, step};

/// How much each is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amounts {
    /// Connections open at once.
    pub(super) open: u64,
    /// Pods enrolled more.
    pub(super) pods: u64,
    /// Connections opened and closed.
    pub(super) churn: u64,
    /// Readers that stop reading.
    pub(super) stalled: u64,
}

impl Amounts {
    pub(super) const QUICK: Self = Self { open: 300, pods: 4, churn: 3_000, stalled: 5 };
    pub(super) const USUAL: Self = Self { open: 4_000, pods: 100, churn: 50_000, stalled: 100 };
    pub(super) const REPORT: Self = Self { churn: 200_000, stalled: 1_000, ..Self::USUAL };
    pub(super) const FULL: Self = Self { churn: 1_000_000, ..Self::REPORT };
}

/// What has no row of its own in the table.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// Connections so far, and both agents' memory in MB then.
    pub(super) churn: Vec<(u64, f64)>,
    pub(super) stalled: Option<Stalled>,
    /// What could not be measured, and why.
    pub(super) left_out: Vec<String>,
}

/// What readers that stall make both agents hold.
#[derive(Debug)]
pub(super) struct Stalled {
    pub(super) readers: u64,
    pub(super) grown_mb: f64,
    pub(super) bound_mb: f64,
}

/// What README says that a stalled reader can make both agents hold: at the receiver a
/// `tunnel.streamWindow` (8 MiB), at the sender 1 MiB and a read of 256 KiB.
const STALLED_BOUND_MB: f64 = (8.0 + 1.0 + 0.25) * 1.048_576;
/// Left to everybody else while readers stall.
const SPARE_MB: f64 = 2_000.0;
/// Pieces that the churn is measured in; the first one is a warm-up. None is larger than takes a minute
/// or so on a slow machine.
const PIECES: u64 = 10;
const LARGEST_PIECE: u64 = 50_000;
/// When there is no memory for as many readers as were asked for, this share of them is tried.
const FEWER: u64 = 10;
/// Memory that has grown by less is flat: a tenth, and what allocators round to.
const FLAT: (f64, f64) = (0.1, 2.0);
/// What is held for open connections is looked at so long after they became idle: until then a proxy may keep
/// what it used for moving their bytes.
const GIVEN_BACK: Duration = Duration::from_secs(3);
/// What each open connection then moves there and back.
const MOVED_BYTES: &str = "262144";

impl Memory {
    /// What both agents may grow by over the churn and be called flat.
    pub(super) fn may_grow_mb(&self) -> f64 {
        self.churn.first().map_or(0.0, |(_, warm)| warm * FLAT.0 + FLAT.1)
    }

    /// Measures agents and pairs that nobody has used before.
    pub(super) fn measure(field: &mut Field, amounts: Amounts, results: &mut Results) -> Result<Self> {
        step("memory");
        for i in 0..field.pairs.len() {
            let name = field.pairs[i].kind.name();
            say(&format!("  {name}"));
            pair(field, i, amounts, results).with_context(|| format!("memory of {name}"))?;
        }
        say("  hauberk: idle, open connections, after they moved data");
        let mut world = field::world("", true)?;
        world.start()?;
        let mut memory = Self::default();
        agents(&mut world, amounts, results)?;
        let _echo = echo(&world, "server")?;
        say(&format!("  hauberk: {} connections opened and closed", amounts.churn));
        memory.churn = churn(&world, amounts.churn)?;
        say(&format!("  hauberk: {} readers that stall", amounts.stalled));
        fresh(&mut world)?;
        memory.stall(&world, amounts.stalled)?;
        say(&format!("  hauberk: {} pods more", amounts.pods));
        fresh(&mut world)?;
        pods(&mut world, amounts.pods, results)?;
        Ok(memory)
    }

    /// As many readers as were asked for, or fewer if there is not the memory; says so.
    fn stall(&mut self, world: &World, asked: u64) -> Result<()> {
        for readers in [asked, asked / FEWER] {
            let (needed, available) = (needed_mb(readers)?, cpu::available()?);
            if available >= needed {
                self.stalled = Some(stalled(world, readers)?);
                return Ok(());
            }
            self.left_out.push(format!(
                "{readers} stalled readers: they may take {needed:.0} MB, and {available:.0} MB are available"
            ));
        }
        Ok(())
    }
}

/// What so many stalled readers may take of the machine's memory: of the agents, and of the kernel, which
/// has full sockets at both ends of either agent.
fn needed_mb(readers: u64) -> Result<f64> {
    Ok(readers as f64 * STALLED_BOUND_MB + cpu::most_of_sockets()? + SPARE_MB)
}

fn stalled(world: &World, readers: u64) -> Result<Stalled> {
    let (client, server) = (world.get("client"), world.get("server"));
    let _stall = server.host.actor_server(&["stall", "0.0.0.0:9001"])?;
    let before = both(world)?;
    let mut push = client.host.actor_server(&["push", &server.v4(9001), "--count", &readers.to_string()])?;
    push.said()?;
    let grown_mb = both(world)? - before;
    say(&format!("    {grown_mb:.0} MB for {readers}"));
    Ok(Stalled { readers, grown_mb, bound_mb: readers as f64 * STALLED_BOUND_MB })
}

/// Both ends' memory in MB.
fn of(pids: &[i32]) -> Result<f64> {
    pids.iter().map(|pid| cpu::resident(*pid)).sum()
}

/// Agents that hold nothing of what was measured before.
fn fresh(world: &mut World) -> Result<()> {
    for node in ["n1", "n2"] {
        world.agent(node).kill9();
        world.agent(node).restart()?;
    }
    settle();
    Ok(())
}

fn agents_of(world: &World) -> Result<Vec<i32>> {
    ["n1", "n2"].into_iter().map(|node| world.agent_ref(node).pid()).collect()
}

fn both(world: &World) -> Result<f64> {
    of(&agents_of(world)?)
}

/// KiB that a held connection costs each end, through whatever lies between.
fn held(pids: &[i32], client: &Host, to: &str, count: u64, more: &[&str]) -> Result<f64> {
    let before = of(pids)?;
    let mut hold = client.actor_server(&[&["hold", to, &count.to_string()], more].concat())?;
    let said = hold.said()?;
    ensure!(said["alive"] == count, "of {count} connections not all were open and alive: {said}");
    std::thread::sleep(GIVEN_BACK);
    Ok((of(pids)? - before) * 1e6 / 1024.0 / count as f64 / pids.len() as f64)
}

/// Gives allocators the moment in which they return what they will.
fn settle() {
    std::thread::sleep(Duration::from_millis(300));
}

fn agents(world: &mut World, amounts: Amounts, results: &mut Results) -> Result<()> {
    let _echo = echo(world, "server")?;
    results.add(Figure::IdleMb, HAUBERK, both(world)? / 2.0);
    for (figure, more) in [(Figure::OpenKib, &[][..]), (Figure::MovedKib, &["--bytes", MOVED_BYTES])] {
        fresh(world)?;
        let (client, to) = (&world.get("client").host, world.get("server").v4(ECHO));
        let kib = held(&agents_of(world)?, client, &to, amounts.open, more);
        results.add(figure, HAUBERK, kib.context("open connections through Hauberk")?);
    }
    Ok(())
}

fn pair(field: &mut Field, at: usize, amounts: Amounts, results: &mut Results) -> Result<()> {
    for (figure, more) in [(Figure::OpenKib, &[][..]), (Figure::MovedKib, &["--bytes", MOVED_BYTES])] {
        field.pairs[at].restart(&field.node)?;
        let pair: &Pair = &field.pairs[at];
        let (_, to) = field.echo_through(pair);
        if figure == Figure::OpenKib {
            results.add(Figure::IdleMb, pair.kind.name(), of(&pair.pids())? / 2.0);
        }
        let kib = held(&pair.pids(), &field.node.get("plain-client").host, &to, amounts.open, more)?;
        results.add(figure, pair.kind.name(), kib);
    }
    Ok(())
}

/// Opens and closes connections, 64 at a time; both agents' memory after each piece.
fn churn(world: &World, count: u64) -> Result<Vec<(u64, f64)>> {
    let (client, to) = (&world.get("client").host, world.get("server").v4(ECHO));
    let pieces = PIECES.max(count / LARGEST_PIECE);
    let piece = count / pieces;
    let mut seen = Vec::new();
    for number in 1..=pieces {
        let said = client.actor(&["many", &to, &piece.to_string(), "64"])?;
        ensure!(said["ok"] == piece, "of {piece} connections not all went well: {said}");
        settle();
        let (done, mb) = (number * piece, both(world)?);
        let rate = said["seconds"].as_f64().map_or(0.0, |seconds| piece as f64 / seconds);
        say(&format!("    {done} of {count}, {rate:.0} a second, {mb:.1} MB"));
        seen.push((done, mb));
    }
    Ok(seen)
}

/// kB that a pod more costs its agent.
fn pods(world: &mut World, count: u64, results: &mut Results) -> Result<()> {
    let enrolled = world.agent_ref("n1").metric("hauberk_enrolled_pods", &[])?;
    let pid = world.agent_ref("n1").pid()?;
    let before = cpu::resident(pid)?;
    for number in 0..count {
        world.pod(&format!("more-{number}"), "n1", Mode::Strict)?;
    }
    world.write_directory()?;
    world.agent_ref("n1").wait_metric("hauberk_enrolled_pods", &[], enrolled + count as f64)?;
    // Enrolled means that their SVIDs are there too.
    world.agent("n1").wait_ready()?;
    settle();
    results.add(Figure::PodKb, HAUBERK, (cpu::resident(pid)? - before) * 1e3 / count as f64);
    Ok(())
}
