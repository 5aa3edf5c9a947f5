//! The main job on real programs: two nodes, pods, an authority, two agents; shown as a report.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use tests::process::interrupted;
use tests::{Mode, Options, Process, World};

use crate::setup;
use crate::shell::{build, step};

const PAGE: &str = "a page that nobody on the wire may read\n";
const SECRET: &str = "a value that nobody on the wire may read";

#[derive(Debug, Args, Default)]
pub(crate) struct Demo {
    /// Leave everything running to look around, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// Where the binaries are; built first if this is not given.
    #[arg(skip)]
    bins: Option<PathBuf>,
}

/// One line of the report's first table.
struct Line {
    what: &'static str,
    said: String,
    source: String,
    destination: String,
    server_saw: String,
}

impl Demo {
    /// With binaries that are there already.
    pub(crate) fn with_bins(bins: PathBuf) -> Self {
        Self { keep: false, bins: Some(bins) }
    }

    pub(crate) fn run(self) -> Result<()> {
        if self.bins.is_none() {
            setup::ensure()?;
            step("building (some minutes, once)");
        }
        let bins = match self.bins {
            Some(bins) => bins,
            None => build(true)?,
        };
        // SAFETY: nothing else runs in this process yet.
        unsafe { std::env::set_var("HAUBERK_BIN_DIR", bins) };
        step("two nodes, five pods, an authority, an agent on each node");
        let world = make_world()?;
        let _servers = start_servers(&world)?;
        let tap = world.tap()?;
        step("unmodified programs talk");
        let lines = talk(&world)?;
        let refused = outside_is_refused(&world)?;
        let wire = tap.finish()?;
        report(&lines, &refused, &wire)?;
        ensure!(
            wire.plaintext_bytes + wire.not_tls_bytes == 0,
            "plaintext was on the wire: {:?}",
            wire.plaintext_flows
        );
        ensure!(
            !wire.contains(SECRET.as_bytes()) && !wire.contains(PAGE.trim().as_bytes()),
            "a secret was on the wire"
        );
        ensure!(wire.tls13_hellos > 0 && wire.other_hellos == 0, "not all handshakes were TLS 1.3");
        step("what it costs, against the direct path of two pods outside the mesh");
        measure(&world)?;
        if self.keep {
            look_around(&world);
        }
        step("removing everything");
        let id = world.id().to_owned();
        drop(world);
        let left = tests::sweep::remains(&id)?;
        ensure!(left.is_empty(), "left behind: {}", left.join(", "));
        println!("  nothing is left");
        Ok(())
    }
}

fn make_world() -> Result<World> {
    // No connection is made ahead: the capture shall see the handshake.
    let agent_yaml = "tunnel: {warmNodes: 0}\n".into();
    let mut world = World::new(Options { log: "info".into(), agent_yaml, ..Options::default() })?;
    world.pod("shop", "n1", Mode::Strict)?;
    world.pod("web", "n2", Mode::Strict)?;
    world.pod("cache", "n2", Mode::Strict)?;
    world.pod("plain-client", "n1", Mode::Off)?;
    world.pod("plain-server", "n2", Mode::Off)?;
    world.service("web", "10.96.0.10", 80, 8080, &["web"]);
    world.start()?;
    println!("  ready: every pod is enrolled, every identity issued");
    Ok(world)
}

fn start_servers(world: &World) -> Result<Vec<Process>> {
    let www = world.dir().join("www");
    std::fs::create_dir(&www)?;
    std::fs::write(www.join("index.html"), PAGE)?;
    let mut running = Vec::new();
    for pod in ["web", "plain-server"] {
        let host = &world.get(pod).host;
        let conf = nginx_conf(world, pod, "8080")?;
        running.push(host.spawn("nginx", &["-c", &conf])?);
        host.wait_listening(SocketAddr::from(([127, 0, 0, 1], 8080)))?;
        running.push(host.spawn("iperf3", &["-s", "-p", "5201"])?);
        host.wait_listening(SocketAddr::from(([127, 0, 0, 1], 5201)))?;
    }
    let cache = &world.get("cache").host;
    let redis =
        ["--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--daemonize", "no"];
    running.push(cache.spawn("redis-server", &redis)?);
    cache.wait_listening(SocketAddr::from(([127, 0, 0, 1], 6379)))?;
    let python = ["-m", "http.server", "--directory", &www.to_string_lossy(), "8000"];
    running.push(cache.spawn("python3", &python)?);
    cache.wait_listening(SocketAddr::from(([127, 0, 0, 1], 8000)))?;
    Ok(running)
}

/// An ordinary nginx that serves the world's page and logs who asked.
pub(crate) fn nginx_conf(world: &World, name: &str, listen: &str) -> Result<String> {
    let dir = world.dir();
    let (www, log) = (dir.join("www"), dir.join(format!("{name}.access")));
    let conf = format!(
        "daemon off; worker_processes 1; pid {0}/{name}.pid; error_log /dev/null;
events {{ worker_connections 8192; }}
http {{ log_format who '$remote_addr'; access_log {1} who; keepalive_requests 100000000; tcp_nodelay on;
server {{ listen {listen} backlog=8192; root {2}; location /1k {{ access_log off; }} }} }}\n",
        dir.display(),
        log.display(),
        www.display()
    );
    let file = dir.join(format!("{name}.conf"));
    std::fs::write(&file, conf)?;
    Ok(file.to_string_lossy().into_owned())
}

fn talk(world: &World) -> Result<Vec<Line>> {
    let (shop, cache) = (&world.get("shop").host, world.get("cache"));
    let shop_v4 = world.get("shop").v4.to_string();
    let mut lines = Vec::new();
    let mut add = |what, said: String, destination: &str, server_saw: String| -> Result<()> {
        ensure!(server_saw == shop_v4, "{what}: the server saw {server_saw}, not the client {shop_v4}");
        let (source, destination) =
            identities(world, destination).with_context(|| format!("{what}: no identities logged"))?;
        lines.push(Line { what, said, source, destination, server_saw });
        Ok(())
    };

    let page = shop.run("curl", &["-sS", "http://10.96.0.10/"])?.ok()?;
    ensure!(page == PAGE, "curl got another page: {page:?}");
    let saw = std::fs::read_to_string(world.dir().join("web.access"))?;
    add(
        "curl -> nginx, by the service's address",
        page,
        "sa/web",
        saw.lines().last().unwrap_or_default().to_owned(),
    )?;

    let at = cache.v4.to_string();
    let cli = |args: &[&str]| shop.run("redis-cli", &[&["-h", &at], args].concat())?.ok();
    let set = cli(&["set", "key", SECRET])?;
    let got = cli(&["get", "key"])?;
    ensure!(got.trim() == SECRET, "redis returned {got:?}");
    let clients = cli(&["client", "list"])?;
    let saw =
        clients.split(" addr=").nth(1).and_then(|rest| rest.split(':').next()).unwrap_or_default().to_owned();
    add("redis-cli -> redis", format!("{} {got}", set.trim()), "sa/cache", saw)?;

    let script =
        format!("import urllib.request as u; print(u.urlopen('http://{at}:8000/').read().decode(), end='')");
    let page = shop.run("python3", &["-c", &script])?.ok()?;
    ensure!(page == PAGE, "python got another page: {page:?}");
    add("python -> python http.server", page, "sa/cache", shop_v4.clone())?;
    Ok(lines)
}

/// Who the agents say was at both ends of the latest connection to an identity.
fn identities(world: &World, destination: &str) -> Result<(String, String)> {
    for _ in 0..100 {
        let log = world.agent_ref("n2").log();
        let found = log.lines().rev().find(|line| {
            line.contains("access: connection")
                && line.contains("encryption=\"mtls\"")
                && line.contains(destination)
        });
        if let Some(line) = found {
            let field = |name: &str| {
                let at = line.split(&format!("{name}=\"")).nth(1)?;
                at.split('"').next().map(str::to_owned)
            };
            return field("source_id").zip(field("destination_id")).context("the line has no identities");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("no connection to {destination} in the access log")
}

fn outside_is_refused(world: &World) -> Result<String> {
    let url = format!("http://{}/", world.get("web").v4(8080));
    let output = world.host("out").run("curl", &["-sS", "--max-time", "3", &url])?;
    ensure!(!output.status.success(), "plaintext from outside reached a strict pod");
    Ok(output.stderr.trim().to_owned())
}

fn report(lines: &[Line], refused: &str, wire: &tests::Seen) -> Result<()> {
    for line in lines {
        println!("\n  {}", line.what);
        println!("    the application got   {:?}", line.said.trim());
        println!("    from                  {}", line.source);
        println!("    to                    {}", line.destination);
        println!("    the server saw        {}", line.server_saw);
    }
    println!("\n  curl from outside the mesh, in plaintext");
    println!("    refused               {refused:?}");
    println!("\n  the wire between the nodes saw");
    println!(
        "    TLS records           {} ({} bytes), {} handshakes, all TLS 1.3",
        wire.tls_records, wire.tls_bytes, wire.tls13_hellos
    );
    println!("    plaintext payload     {} bytes", wire.plaintext_bytes + wire.not_tls_bytes);
    Ok(())
}

fn measure(world: &World) -> Result<()> {
    std::fs::write(world.dir().join("www/1k"), vec![b'x'; 1024])?;
    println!("  {:<28}{:>14}{:>14}{:>9}", "", "direct", "hauberk", "share");
    let both = |f: &dyn Fn(&str, &str) -> Result<f64>| -> Result<(f64, f64)> {
        Ok((f("plain-client", "plain-server")?, f("shop", "web")?))
    };
    let row = |name: &str, unit: &str, (direct, hauberk): (f64, f64)| {
        println!("  {name:<28}{direct:>10.1} {unit:<4}{hauberk:>9.1} {unit:<4}{:>8.2}", hauberk / direct);
    };
    row("one stream, bulk", "MB/s", both(&|from, to| bulk(world, from, to))?);
    let url = |to: &str| format!("http://{}/1k", world.get(to).v4(8080));
    let wrk = |from: &str, to: &str, connections: &str| {
        crate::bench::wrk(&world.get(from).host, &url(to), connections, 2, false)
    };
    row("a request, 1 connection", "us", both(&|from, to| Ok(wrk(from, to, "1")?.p50_us))?);
    row("requests/s, 64 connections", "/s", both(&|from, to| Ok(wrk(from, to, "64")?.per_second))?);
    println!("  (a first impression: `cargo xtask bench` measures with care)");
    Ok(())
}

fn bulk(world: &World, from: &str, to: &str) -> Result<f64> {
    let at = world.get(to).v4.to_string();
    Ok(crate::bench::iperf(&world.get(from).host, &at, "5201", 1, 2)?.mb_per_second)
}

fn look_around(world: &World) {
    println!("\n== everything stays until Ctrl-C; in another terminal:");
    for pod in ["shop", "web", "cache"] {
        println!(
            "  {:<44}# a shell's command in pod {pod}",
            format!("nsenter --net={} curl ...", world.get(pod).host.netns().display())
        );
    }
    println!(
        "  (only processes in the pod's cgroup are captured: echo $$ > {}/shop/cgroup.procs first)",
        world.pods_cgroup("n1").unwrap_or_default().display()
    );
    let config = world.dir().join("n1/agent.yaml");
    for ask in ["status", "workloads", "certs"] {
        println!("  hauberk {ask} --config {}", config.display());
    }
    println!("  nsenter --net={} curl -s http://127.0.0.1:15020/metrics", world.host("n1").netns().display());
    println!("  nsenter --net={} tcpdump -ni wire tcp port 15008", world.host("n1").netns().display());
    println!("  tail -f {}", world.dir().join("n1/agent.log").display());
    while !interrupted() {
        std::thread::sleep(Duration::from_millis(100));
    }
}
