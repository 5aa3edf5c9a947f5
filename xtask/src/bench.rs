//! Measures against the direct path and a pair of HAProxy doing mutual TLS between the same nodes,
//! side by side in one run, round by round. Shares count, not absolute figures: machines differ, and
//! this one may be busy.

mod haproxy;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::{Value, json};
use tests::{Host, Mode, Options, Process, World};

use crate::demo::nginx_conf;
use crate::setup;
use crate::shell::{build, step};

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Rounds; each measures every way once, and the medians are shown.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds for each measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

/// A way from a client to a server.
struct Way {
    name: &'static str,
    client: &'static str,
    /// Where the client finds the web server and the iperf servers.
    web: String,
    iperf: String,
}

/// What is measured, with its unit, and whether more is better.
const FIGURES: [(&str, &str, bool); 10] = [
    ("bulk, 1 stream", "MB/s", true),
    ("bulk, 8 streams", "MB/s", true),
    ("CPU for bulk, whole machine", "s/GB", false),
    ("request p50, 1 connection", "us", false),
    ("request p99, 1 connection", "us", false),
    ("requests, 64 connections", "/s", true),
    ("request p50, 64 connections", "us", false),
    ("request p99, 64 connections", "us", false),
    ("a connection per request, 64 clients", "/s", true),
    ("failed requests", "", false),
];

/// First bars, as shares of the direct path (issue: the way of a connection).
const BARS: [(&str, f64); 3] = [
    ("bulk, 1 stream", 0.30),
    ("requests, 64 connections", 0.33),
    ("a connection per request, 64 clients", 0.38),
];

type Measured = BTreeMap<(&'static str, &'static str), Vec<f64>>;

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        setup::ensure()?;
        step("building with optimisation");
        let bins = build(true)?;
        // SAFETY: nothing else runs in this process yet.
        unsafe { std::env::set_var("HAUBERK_BIN_DIR", bins) };
        step("a world with three ways from node 1 to node 2");
        let world = make_world()?;
        let _running = start(&world)?;
        let ways = ways(&world);
        let mut measured = Measured::new();
        let mut others = Vec::new();
        for round in 1..=self.rounds {
            step(&format!("round {round} of {}", self.rounds));
            others.push(idle_cpu()?);
            for way in &ways {
                println!("  {}", way.name);
                self.measure(&world, way, &mut measured)?;
            }
        }
        let memory = memory(&world)?;
        let result = self.result(&measured, &others, memory)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&result)?);
        }
        Ok(())
    }

    fn measure(&self, world: &World, way: &Way, measured: &mut Measured) -> Result<()> {
        let client = &world.get(way.client).host;
        let mut add =
            |figure: &'static str, value: f64| measured.entry((figure, way.name)).or_default().push(value);
        let (host, port) = way.iperf.rsplit_once(':').context("an address has a port")?;
        let before = busy_seconds()?;
        let one = iperf(client, host, port, 1, self.seconds)?;
        let cpu = busy_seconds()? - before;
        add("bulk, 1 stream", one);
        add("CPU for bulk, whole machine", cpu / (one * self.seconds as f64 / 1000.0));
        add("bulk, 8 streams", iperf(client, host, port, 8, self.seconds)?);
        let url = format!("http://{}/1k", way.web);
        let single = wrk(client, &url, "1", self.seconds, false)?;
        add("request p50, 1 connection", single.p50_us);
        add("request p99, 1 connection", single.p99_us);
        let many = wrk(client, &url, "64", self.seconds, false)?;
        add("requests, 64 connections", many.per_second);
        add("request p50, 64 connections", many.p50_us);
        add("request p99, 64 connections", many.p99_us);
        let new = wrk(client, &url, "64", self.seconds, true)?;
        add("a connection per request, 64 clients", new.per_second);
        add("failed requests", single.failed + many.failed + new.failed);
        Ok(())
    }

    fn result(&self, measured: &Measured, others: &[f64], memory: Memory) -> Result<Value> {
        let names = ["direct", "hauberk", "haproxy"];
        let mut rows = Vec::new();
        if !self.json {
            println!(
                "\n{:<40}{:>12}{:>12}{:>12}{:>16}",
                "median of the rounds", "direct", "hauberk", "haproxy", "hauberk/direct"
            );
        }
        for (figure, unit, more_is_better) in FIGURES {
            let of = |name: &'static str| median(measured.get(&(figure, name)).map_or(&[], Vec::as_slice));
            let values = names.map(of);
            let share = values[1] / values[0];
            if !self.json {
                let label = format!("{figure} {unit}");
                println!("{label:<40}{:>12.1}{:>12.1}{:>12.1}{share:>16.2}", values[0], values[1], values[2]);
            }
            rows.push(json!({
                "figure": figure, "unit": unit, "moreIsBetter": more_is_better,
                "direct": values[0], "hauberk": values[1], "haproxy": values[2],
                "share": if share.is_finite() { json!(share) } else { Value::Null },
                "all": names.map(|n| measured.get(&(figure, n)).cloned().unwrap_or_default()),
            }));
        }
        let share = |figure: &str| {
            rows.iter().find(|r| r["figure"] == figure).and_then(|r| r["share"].as_f64()).unwrap_or(0.0)
        };
        let mut bars = Vec::new();
        for (figure, bar) in BARS {
            bars.push(json!({"figure": figure, "bar": bar, "share": share(figure), "reached": share(figure) >= bar}));
        }
        let per_request = |name: &str| {
            rows.iter().find(|r| r["figure"] == BARS[2].0).and_then(|r| r[name].as_f64()).unwrap_or(0.0)
        };
        let ahead = per_request("hauberk") > per_request("haproxy");
        if !self.json {
            println!(
                "\nagents' memory: {:.1} MB each when idle, {:.1} MB more for 1,000 open connections",
                memory.idle_mb, memory.per_thousand_mb
            );
            println!("CPU used by others before the rounds: {others:.2?} of a core");
            for bar in &bars {
                println!(
                    "bar: {} {} (share {:.2}, bar {})",
                    bar["figure"].as_str().unwrap_or_default(),
                    if bar["reached"] == true { "reached" } else { "NOT reached" },
                    bar["share"].as_f64().unwrap_or(0.0),
                    bar["bar"]
                );
            }
            println!(
                "bar: ahead of the HAProxy pair on a connection per request: {}",
                if ahead { "reached" } else { "NOT reached" }
            );
        }
        Ok(json!({
            "figures": rows, "bars": bars, "aheadOfHaproxy": ahead, "rounds": self.rounds, "seconds": self.seconds,
            "memory": {"idleMb": memory.idle_mb, "perThousandConnectionsMb": memory.per_thousand_mb},
            "cpuUsedByOthers": others, "cores": std::thread::available_parallelism().map_or(0, |n| n.get()),
        }))
    }
}

fn make_world() -> Result<World> {
    // No access log lines for each connection: neither HAProxy nor nginx writes any here.
    let mut world = World::new(Options { log: "warn".into(), ..Options::default() })?;
    world.pod("client", "n1", Mode::Strict)?;
    world.pod("server", "n2", Mode::Strict)?;
    // The same programs in pods outside the mesh, for the other two ways.
    world.pod("plain-client", "n1", Mode::Off)?;
    world.pod("plain-server", "n2", Mode::Off)?;
    world.start()?;
    Ok(world)
}

fn start(world: &World) -> Result<Vec<Process>> {
    std::fs::create_dir(world.dir().join("www"))?;
    std::fs::write(world.dir().join("www/1k"), vec![b'x'; 1024])?;
    let mut running = Vec::new();
    for pod in ["server", "plain-server"] {
        let host = &world.get(pod).host;
        let conf = nginx_conf(world, pod, "8080")?;
        running.push(host.spawn("nginx", &["-c", &conf])?);
        host.wait_listening(SocketAddr::from(([127, 0, 0, 1], 8080)))?;
        running.push(host.spawn("iperf3", &["-s", "-p", "5201"])?);
        host.wait_listening(SocketAddr::from(([127, 0, 0, 1], 5201)))?;
    }
    running.extend(haproxy::start(world)?);
    Ok(running)
}

fn ways(world: &World) -> [Way; 3] {
    let (server, plain) = (world.get("server"), world.get("plain-server"));
    [
        Way { name: "direct", client: "plain-client", web: plain.v4(8080), iperf: plain.v4(5201) },
        Way { name: "hauberk", client: "client", web: server.v4(8080), iperf: server.v4(5201) },
        // The client's own HAProxy, as a sidecar would have it.
        Way {
            name: "haproxy",
            client: "plain-client",
            web: "127.0.0.1:18080".into(),
            iperf: "127.0.0.1:15201".into(),
        },
    ]
}

/// Bulk throughput in MB/s, as the receiver counts it.
pub(crate) fn iperf(client: &Host, host: &str, port: &str, streams: u32, seconds: u64) -> Result<f64> {
    let (streams, seconds) = (streams.to_string(), seconds.to_string());
    let args = ["-c", host, "-p", port, "-P", &streams, "-t", &seconds, "-J"];
    let text = client.run("iperf3", &args)?;
    let value: Value =
        serde_json::from_str(&text.stdout).with_context(|| format!("iperf3: {}", text.stderr))?;
    let bits = value["end"]["sum_received"]["bits_per_second"].as_f64();
    Ok(bits.with_context(|| format!("iperf3: {}", value["error"]))? / 8e6)
}

/// What wrk found.
pub(crate) struct Wrk {
    pub(crate) per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) failed: f64,
}

/// Requests for a page of 1 KiB; with `close`, each on a connection of its own.
pub(crate) fn wrk(client: &Host, url: &str, connections: &str, seconds: u64, close: bool) -> Result<Wrk> {
    let duration = format!("{seconds}s");
    let mut args = vec!["-t", "1", "-c", connections, "-d", &duration, "--latency"];
    if close {
        args.extend(["-H", "Connection: close"]);
    }
    args.push(url);
    let text = client.run("wrk", &args)?.ok()?;
    let line = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    let per_second = line("Requests/sec:").and_then(|v| v.parse().ok()).with_context(|| text.clone())?;
    let failed = line("Socket errors:").map_or(0.0, |errors| {
        // With a connection per request wrk counts the server's close as a read error.
        let kinds = errors.split(',').filter(|kind| !(close && kind.contains("read")));
        kinds.filter_map(|kind| kind.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    });
    let failed = failed + line("Non-2xx or 3xx responses:").and_then(|v| v.parse().ok()).unwrap_or(0.0);
    Ok(Wrk { per_second, p50_us: micros(line("50%"))?, p99_us: micros(line("99%"))?, failed })
}

/// wrk's times, such as `1.23ms`.
fn micros(text: Option<&str>) -> Result<f64> {
    let text = text.context("wrk printed no latency")?;
    for (unit, factor) in [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>()? * factor);
        }
    }
    bail!("not a time: {text}")
}

/// Seconds of CPU that the whole machine has used (proc_stat(5)).
fn busy_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let cpu = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<f64> = cpu.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    // user, nice, system, then idle and iowait, then irq, softirq.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|i| ticks.get(*i)).sum();
    Ok(busy / 100.0)
}

/// How much of a core is used while nothing of ours runs.
fn idle_cpu() -> Result<f64> {
    let (before, began) = (busy_seconds()?, Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    Ok((busy_seconds()? - before) / began.elapsed().as_secs_f64())
}

struct Memory {
    idle_mb: f64,
    per_thousand_mb: f64,
}

/// The agents' resident memory: of new ones that nobody has used, and with connections held open.
fn memory(world: &World) -> Result<Memory> {
    step("memory");
    let fresh = {
        let mut fresh = World::new(Options { log: "warn".into(), ..Options::default() })?;
        fresh.pod("client", "n1", Mode::Strict)?;
        fresh.pod("server", "n2", Mode::Strict)?;
        fresh.start()?;
        let idle = resident(&fresh)?;
        let _echo = fresh.get("server").host.actor_server(&["echo", "0.0.0.0:9000"])?;
        let mut hold =
            fresh.get("client").host.actor_server(&["hold", &fresh.get("server").v4(9000), "4000"])?;
        hold.said()?;
        (idle, resident(&fresh)?)
    };
    let _ = world;
    Ok(Memory { idle_mb: fresh.0 / 2.0, per_thousand_mb: (fresh.1 - fresh.0) / 2.0 / 4.0 })
}

/// Both agents' resident memory in MB.
fn resident(world: &World) -> Result<f64> {
    let of = |node: &str| world.agent_ref(node).metric("process_resident_memory_bytes", &[]);
    Ok((of("n1")? + of("n2")?) / 1e6)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
