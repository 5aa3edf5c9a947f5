//! What a large cluster's directory takes of an agent: `cargo bench -p hauberk --bench directory`.
//!
//! 10,000 services of 10 pods each on 5,000 nodes, then 500 changes of pods a second for 20 seconds: half of
//! them say nothing new (as kubelets do), half replace a pod by another at a new address, which rewrites the
//! slice of its service twice. Objects are as large as real ones, come as the API server's watch streams
//! have them, from a process of their own, and go the agent's way from there: parsed, worked into the tables
//! in batches, and what the kernel has to be told computed from each. Not measured is TLS to the API server.
//!
//! Then the same cluster by way of the authority: what it takes there to make each state's chunks, which are the
//! same for every agent, and an agent, in a process of its own, to take them over. Not measured are gRPC and TLS
//! between them, which the authority pays for each agent by the bytes that are told here.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hauberk::config::Mode;
use hauberk::directory::Directory;
use hauberk::directory::kubernetes::cluster::{Cluster, Rules, Update};
use hauberk::directory::stream::history::History;
use hauberk::directory::stream::mirror::Mirror;
use hauberk::directory::stream::proto::{Chunk, WatchRequest};
use hauberk::identity::TrustDomain;
use kube::core::WatchEvent;
use kube::runtime::watcher::Event;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SERVICES: usize = 10_000;
const PODS_EACH: usize = 10;
const NODES: usize = 5_000;
const CHANGES_PER_SECOND: usize = 500;
const SECONDS: usize = 20;
/// As `directory::kubernetes::watch` waits for others.
const BATCH: Duration = Duration::from_millis(100);

fn main() {
    if std::env::args().any(|arg| arg == "feed") {
        return feed();
    }
    if std::env::args().any(|arg| arg == "agent") {
        return agent(BufReader::new(std::io::stdin().lock()));
    }
    // `cargo test --benches` runs this without asking for figures.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let parts: [fn(BufReader<ChildStdout>); 2] = [measure, tell];
    for measure in parts {
        let mut feeder =
            this_program("feed").stdout(Stdio::piped()).spawn().expect("this program can run twice");
        measure(BufReader::new(feeder.stdout.take().expect("it is piped")));
        feeder.wait().expect("it was started");
    }
}

fn this_program(part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program has a file"));
    command.arg(part);
    command
}

fn rules(node: Option<&str>) -> Rules {
    Rules {
        domain: TrustDomain::parse("cluster.local").expect("a good name"),
        node: node.map(str::to_owned),
        default_mode: Mode::Strict,
        excluded: ["kube-system".to_owned()].into(),
    }
}

/// The authority: takes what the feeder tells, tells an agent, and prints what that cost besides.
fn tell(lines: BufReader<ChildStdout>) {
    let mut agent = this_program("agent").stdin(Stdio::piped()).spawn().expect("this program can run twice");
    let mut told = BufWriter::new(agent.stdin.take().expect("it is piped"));
    let (mut cluster, mut history) = (Cluster::new(rules(None)), History::new(1));
    let (mut has, mut due, mut making, mut bytes, mut states) =
        (WatchRequest::default(), None, Duration::ZERO, 0, 0);
    let mut began = Instant::now();
    for line in lines.lines().map(|line| line.expect("the feeder writes lines")) {
        let is_initial = line.starts_with('=');
        if !is_initial {
            cluster.update(parse(&line)).expect("every object is good");
            if has.version == 0 || !cluster.is_changed() {
                continue;
            }
            let at = *due.get_or_insert_with(|| Instant::now() + BATCH);
            if Instant::now() < at {
                continue;
            }
        }
        due = None;
        let next = Arc::new(cluster.directory());
        let batch = thread_cpu();
        history.push(next);
        let chunks = history.since(&has);
        has = history.newest();
        let took = thread_cpu() - batch;
        let sizes: usize = chunks.iter().map(|chunk| chunk.rows.len()).sum();
        match is_initial {
            true => {
                println!(
                    "the authority tells everything: {:.1} MiB, made in {took:?}",
                    sizes as f64 / f64::from(1 << 20)
                );
                began = Instant::now();
            }
            false => (making, bytes, states) = (making + took, bytes + sizes, states + 1),
        }
        for Chunk { version, anew, last, rows, .. } in chunks {
            let head = [version, u64::from(anew), u64::from(last), rows.len() as u64];
            head.iter().for_each(|number| told.write_all(&number.to_le_bytes()).expect("the agent reads"));
            told.write_all(&rows).expect("the agent reads");
        }
        told.flush().expect("the agent reads");
    }
    let elapsed = began.elapsed().as_secs_f64();
    println!(
        "the authority tells changes: {:.0} KiB/s to each agent in {:.1} states a second, making them takes {:.2} % of a core for all agents together, {:.0} MiB at the end",
        bytes as f64 / 1024.0 / elapsed,
        f64::from(states) / elapsed,
        100.0 * making.as_secs_f64() / elapsed,
        status("VmRSS"),
    );
    drop(told);
    agent.wait().expect("it was started");
}

/// An agent: takes chunks over, and computes what the kernel has to be told.
fn agent(mut told: impl Read) {
    let mut mirror = Mirror::new(rules(None).domain);
    let (mut published, mut before, mut began) = (Directory::default(), 0, Instant::now());
    loop {
        let mut head = [[0; 8]; 4];
        if head.iter_mut().try_for_each(|number| told.read_exact(number)).is_err() {
            break;
        }
        let [version, anew, last, length] = head.map(u64::from_le_bytes);
        let mut rows = vec![0; length as usize];
        told.read_exact(&mut rows).expect("the rows follow");
        let (anew, last, rows) = (anew == 1, last == 1, rows.into());
        let chunk = Chunk { run: 1, version, anew, last, rows, fault: String::new() };
        if mirror.hear(&chunk).expect("good chunks") {
            let next = mirror.directory().clone();
            let changes = next.mesh_changes(&published);
            std::hint::black_box((changes, next.enrolled_on("node-7").count()));
            published = next;
            if version == 1 {
                println!(
                    "an agent is told everything: {:.0} MiB at its peak, {:.0} MiB then, {:.0} ms of CPU",
                    status("VmHWM"),
                    status("VmRSS"),
                    cpu_micros() as f64 / 1e3
                );
                (before, began) = (cpu_micros(), Instant::now());
            }
        }
    }
    println!(
        "an agent is told changes: {:.2} % of a core, {:.0} MiB at the end",
        (cpu_micros() - before) as f64 / 1e4 / began.elapsed().as_secs_f64(),
        status("VmRSS"),
    );
}

/// CPU time of this thread.
fn thread_cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("one's own clock").into()
}

/// Takes what the feeder tells, and prints what that cost.
fn measure(lines: BufReader<ChildStdout>) {
    let mut cluster = Cluster::new(rules(Some("node-7")));
    let (mut published, mut due, mut cpu, mut began) = (Directory::default(), None, 0, Instant::now());
    let (mut pods, mut all, mut slowest, mut mesh) = (0, 0, Duration::ZERO, 0);
    for line in lines.lines().map(|line| line.expect("the feeder writes lines")) {
        if line.starts_with('=') {
            let initial = Instant::now();
            published = cluster.directory();
            mesh = published.mesh_addresses().count();
            println!(
                "initial state: {:.0} MiB at its peak, {:.0} MiB then, built in {:?}; {} workloads, {mesh} captured addresses",
                status("VmHWM"),
                status("VmRSS"),
                initial.elapsed(),
                published.workloads().count()
            );
            (cpu, began) = (cpu_micros(), Instant::now());
            continue;
        }
        (pods, all) = (pods + usize::from(line.starts_with('p')), all + 1);
        cluster.update(parse(&line)).expect("every object is good");
        if cluster.is_changed() && mesh > 0 {
            let at = *due.get_or_insert_with(|| Instant::now() + BATCH);
            if Instant::now() >= at {
                due = None;
                let batch = Instant::now();
                let next = cluster.directory();
                let (added, removed) = next.mesh_changes(&published);
                std::hint::black_box((added, removed, next.enrolled_on("node-7").count()));
                published = next;
                slowest = slowest.max(batch.elapsed());
            }
        }
    }
    let (spent, elapsed) = (cpu_micros() - cpu, began.elapsed().as_secs_f64());
    let initial = SERVICES * PODS_EACH;
    println!(
        "changes: {:.0} of pods a second (with slices {:.0}), {:.2} % of a core, {:.0} MiB at the end, slowest batch {slowest:?}",
        (pods - initial) as f64 / elapsed,
        (all - initial - 2 * SERVICES - NODES) as f64 / elapsed,
        spent as f64 / 1e4 / elapsed,
        status("VmRSS"),
    );
}

fn parse(line: &str) -> Update {
    fn event<K: DeserializeOwned>(text: &str) -> Event<K> {
        match serde_json::from_str(text).expect("the feeder writes JSON") {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => Event::Apply(object),
            WatchEvent::Deleted(object) => Event::Delete(object),
            WatchEvent::Bookmark(_) | WatchEvent::Error(_) => unreachable!("the feeder writes neither"),
        }
    }
    let (kind, text) = line.split_at(1);
    match kind {
        "p" => Update::Pod(event(text)),
        "v" => Update::Service(event(text)),
        "s" => Update::Slice(event(text)),
        _ => Update::Node(event(text)),
    }
}

/// Of `/proc/self/status`, in MiB.
fn status(field: &str) -> f64 {
    let text = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("a field of it");
    let kib = line.split_whitespace().nth(1).expect("a number");
    kib.parse::<f64>().expect("a number") / 1024.0
}

fn cpu_micros() -> i64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("one's own usage");
    usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
}

/// Writes the cluster, then its changes at their pace.
fn feed() {
    let mut out = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    let mut addresses: Vec<u32> = (0..(SERVICES * PODS_EACH) as u32).collect();
    let mut say = |line: String| writeln!(out, "{line}").expect("somebody reads");
    for node in 0..NODES {
        say(format!(
            r#"n{{"type":"ADDED","object":{{"metadata":{{"name":"node-{node}","resourceVersion":"1","labels":{{"topology.kubernetes.io/zone":"zone-{}"}}}},"status":{{"addresses":[{{"type":"InternalIP","address":"{}"}}]}}}}}}"#,
            node % 3,
            Ipv4Addr::from(0x6440_0000 + node as u32)
        ));
    }
    for (pod, address) in addresses.iter().enumerate() {
        say(self::pod("ADDED", pod, *address, 0));
    }
    for service in 0..SERVICES {
        say(format!(
            r#"v{{"type":"ADDED","object":{{"metadata":{{"name":"service-{service}","namespace":"team-{}","resourceVersion":"1"}},"spec":{{"clusterIP":"{}","ports":[{{"name":"http","port":80,"protocol":"TCP"}},{{"name":"metrics","port":9090,"protocol":"TCP"}}]}}}}}}"#,
            service % 100,
            Ipv4Addr::from(0x0a60_0001 + service as u32)
        ));
        say(slice(service, &addresses));
    }
    say("=".into());
    let began = Instant::now();
    for (next, change) in (addresses.len() as u32..).zip(0..CHANGES_PER_SECOND * SECONDS / 3) {
        let due = began + Duration::from_secs(3).mul_f64(change as f64 / CHANGES_PER_SECOND as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let pod = change * 7919 % addresses.len();
        say(self::pod(
            "MODIFIED",
            (pod + 1) % addresses.len(),
            addresses[(pod + 1) % addresses.len()],
            change,
        ));
        say(self::pod("DELETED", pod, addresses[pod], change));
        say(slice(pod / PODS_EACH, &addresses));
        addresses[pod] = next;
        say(self::pod("ADDED", pod, addresses[pod], change));
        say(slice(pod / PODS_EACH, &addresses));
    }
}

fn ip(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0a80_0001 + number).into()
}

/// As large as a small pod's object, some 4 KiB: most of it is nothing that the agent reads.
fn pod(event: &str, pod: usize, address: u32, version: usize) -> String {
    let (service, node, ip) = (pod / PODS_EACH, pod % NODES, ip(address));
    let managed: Vec<String> =
        (0..20).map(|n| format!(r#""f:field-{n}":{{".":{{}},"f:value":{{}},"f:other":{{}}}}"#)).collect();
    let environment: Vec<String> =
        (0..20).map(|n| format!(r#"{{"name":"VARIABLE_{n}","value":"some value {n}"}}"#)).collect();
    format!(
        r#"p{{"type":"{event}","object":{{"kind":"Pod","apiVersion":"v1","metadata":{{"name":"service-{service}-7d4b9c6f5-{pod:05}","namespace":"team-{}","uid":"8f1c2d3e-0000-4a5b-9c8d-{pod:012}","resourceVersion":"{version}1","creationTimestamp":"2026-11-25T00:00:00Z","labels":{{"app":"service-{service}","pod-template-hash":"7d4b9c6f5"}},"annotations":{{"checksum/config":"0123456789abcdef0123456789abcdef0123456789abcdef"}},"managedFields":[{{"manager":"kubelet","operation":"Update","fieldsType":"FieldsV1","fieldsV1":{{{}}}}}]}},"spec":{{"containers":[{{"name":"app","image":"registry/app:1","env":[{}],"resources":{{"limits":{{"cpu":"1","memory":"1Gi"}}}}}}],"nodeName":"node-{node}","serviceAccountName":"service-{service}","tolerations":[{{"key":"node.kubernetes.io/not-ready","operator":"Exists"}}]}},"status":{{"phase":"Running","conditions":[{{"type":"Ready","status":"True","lastProbeTime":null}}],"podIP":"{ip}","podIPs":[{{"ip":"{ip}"}}],"startTime":"2026-11-25T00:00:00Z"}}}}}}"#,
        service % 100,
        managed.join(","),
        environment.join(","),
    )
}

fn slice(service: usize, addresses: &[u32]) -> String {
    let of_service = &addresses[service * PODS_EACH..][..PODS_EACH];
    let endpoints: Vec<String> = of_service
        .iter()
        .map(|address| format!(r#"{{"addresses":["{}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"nodeName":"node","targetRef":{{"kind":"Pod","name":"some-pod-of-the-service"}},"zone":"zone-1"}}"#, ip(*address)))
        .collect();
    format!(
        r#"s{{"type":"MODIFIED","object":{{"kind":"EndpointSlice","metadata":{{"name":"service-{service}-abcde","namespace":"team-{}","resourceVersion":"1","labels":{{"kubernetes.io/service-name":"service-{service}"}}}},"addressType":"IPv4","endpoints":[{}],"ports":[{{"name":"http","port":8080,"protocol":"TCP"}},{{"name":"metrics","port":9090,"protocol":"TCP"}}]}}}}"#,
        service % 100,
        endpoints.join(","),
    )
}
