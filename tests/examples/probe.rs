use std::process::Command;
use tests::{Mode, Options, World};
fn cpu(pid: i32) -> f64 {
    let s = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let r = s.rsplit(')').next().unwrap().split_whitespace().map(|x| x.to_owned()).collect::<Vec<_>>();
    (r[11].parse::<f64>().unwrap() + r[12].parse::<f64>().unwrap()) / 100.0
}
fn main() {
    let what = std::env::args().nth(1).unwrap();
    let perf = std::env::args().nth(2);
    let mut world = World::new(Options { log: "warn".into(), ..Options::default() }).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    for p in ["client", "server"] {
        world.get(p).host.sysctl("net/ipv4/tcp_congestion_control", "reno").unwrap();
    }
    for n in ["n1", "n2"] {
        world.host(n).sysctl("net/ipv4/tcp_congestion_control", "reno").unwrap();
    }
    let to = world.get("server").v4(8080);
    let _s = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let _i = world.get("server").host.spawn("iperf3", &["-s", "-p", "5201"]).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    world.get("client").host.actor(&["many", &to, "2000", "64"]).unwrap();
    let pids = ["n1", "n2"].map(|n| world.agent_ref(n).pid().unwrap());
    println!(
        "pids {pids:?} idle rss {:?}",
        ["n1", "n2"].map(|n| world.agent_ref(n).metric("process_resident_memory_bytes", &[]).unwrap() / 1e6)
    );
    let mut rec = perf.map(|f| {
        Command::new("perf")
            .args(["record", "-F", "1999", "-g", "-o", &f, "-p", &format!("{},{}", pids[0], pids[1])])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap()
    });
    for _ in 0..3 {
        let b = pids.map(cpu);
        let t = std::time::Instant::now();
        match what.as_str() {
            "conn" => {
                let n = 40000;
                let r = world.get("client").host.actor(&["many", &to, &n.to_string(), "64"]).unwrap();
                let e = t.elapsed().as_secs_f64();
                let a = pids.map(cpu);
                println!(
                    "{:.0} conn/s, us per conn: n1 {:.1} n2 {:.1} ok {}",
                    n as f64 / e,
                    (a[0] - b[0]) / n as f64 * 1e6,
                    (a[1] - b[1]) / n as f64 * 1e6,
                    r["ok"]
                );
            }
            _ => {
                let streams = what.trim_start_matches("bulk");
                let h = world.get("server").v4.to_string();
                let o = world
                    .get("client")
                    .host
                    .run("iperf3", &["-c", &h, "-p", "5201", "-P", streams, "-t", "3", "-J"])
                    .unwrap();
                let v: serde_json::Value = serde_json::from_str(&o.stdout).unwrap();
                let mb = v["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 8e6;
                let bytes = v["end"]["sum_received"]["bytes"].as_f64().unwrap() / 1e9;
                let a = pids.map(cpu);
                println!(
                    "{mb:.0} MB/s, s/GB n1 {:.3} n2 {:.3}",
                    (a[0] - b[0]) / bytes,
                    (a[1] - b[1]) / bytes
                );
            }
        }
    }
    println!(
        "rss {:?}",
        ["n1", "n2"].map(|n| world.agent_ref(n).metric("process_resident_memory_bytes", &[]).unwrap() / 1e6)
    );
    if let Some(r) = rec.as_mut() {
        Command::new("kill").args(["-INT", &r.id().to_string()]).status().unwrap();
        r.wait().unwrap();
    }
}
