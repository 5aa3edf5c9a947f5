//! The Prometheus registry and everything in it.
//!
//! Labels come from closed enums, and every child of them is resolved once, at the start: counting
//! on the hot path is an atomic addition, without hashing or a lock. Only certificates and access
//! policies have an open label, and their number is capped.

mod balance;
mod issuance;
mod policy;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ebpf::VERDICT_COUNT;
use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::{Finished, Role};
use crate::trust::Snapshot;
use crate::verdict::{Direction, Encryption, Reason, Unresumed};
use balance::Balance;
use issuance::Issuance;
pub use issuance::Margin;
pub use policy::{Counts as PolicyCounts, Standing as PolicyStanding};

/// Most certificates that have a series of their own.
const MAX_CERTIFICATES: usize = 2_000;

/// The kernel side's verdicts, in the order of `ebpf::VERDICT_*`.
const KERNEL_VERDICTS: [&str; VERDICT_COUNT as usize] = [
    "captured",
    "plaintext_accepted",
    "plaintext_refused",
    "probe_accepted",
    "listener_refused",
    "egress_dropped",
    "bypassed",
    "capture_failed",
    "held",
    "excluded",
];

/// One counter for each combination of the closed labels.
struct Connections {
    /// `[direction][encryption][reason]`.
    ended: Vec<IntCounter>,
    open: [IntGauge; 2],
    sent: [IntCounter; 2],
    received: [IntCounter; 2],
    seconds: [Histogram; 2],
}

/// One counter for each side and outcome.
struct Handshakes {
    /// `[role][kind]`.
    ok: [[IntCounter; 2]; 2],
    /// `[role][reason]`.
    failed: Vec<IntCounter>,
    /// `[role][reason]`.
    unresumed: Vec<IntCounter>,
    /// Known, verified.
    chains: [IntCounter; 2],
    seconds: [Histogram; 2],
}

/// The agent's metrics.
pub struct Metrics {
    registry: Registry,
    connections: Connections,
    handshakes: Handshakes,
    pub(super) balance: Balance,
    pub(super) issuance: Issuance,
    pool: IntGauge,
    /// Failed, made.
    ahead: [IntCounter; 2],
    /// `[role]`.
    cut: [IntCounter; 2],
    revocations: IntGauge,
    generation: IntGauge,
    pods: IntGauge,
    expiry: GaugeVec,
    dropped: IntGauge,
    kernel: IntCounterVec,
    policies: policy::Policies,
    process: Process,
    /// What is read only for a page is read for one page at a time.
    rendering: Mutex<()>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

const DIRECTIONS: [Direction; 2] = [Direction::Outbound, Direction::Inbound];
const ROLES: [&str; 2] = ["client", "server"];
const KINDS: [&str; 2] = ["full", "resumed"];

impl Metrics {
    /// Everything at zero.
    ///
    /// # Errors
    /// When two metrics have one name, which is a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let cut = counters(
            &registry,
            "hauberk_revoked_tunnels_total",
            "Tunnels closed because a certificate of theirs was revoked, by our side of them.",
            &["role"],
        )?;
        let ahead = counters(
            &registry,
            "hauberk_pool_made_ahead_total",
            "Connections between nodes that were made before a stream needed one, by outcome.",
            &["outcome"],
        )?;
        Ok(Self {
            ahead: ["failed", "ok"].map(|outcome| ahead.with_label_values(&[outcome])),
            cut: ROLES.map(|role| cut.with_label_values(&[role])),
            revocations: register(&registry, IntGauge::new("hauberk_revocations", "Revocations in force.")?)?,
            generation: register(
                &registry,
                IntGauge::new(
                    "hauberk_revocations_generation",
                    "Generation of the list of revocations; the authority's own says whether it is the newest.",
                )?,
            )?,
            connections: Connections::new(&registry)?,
            handshakes: Handshakes::new(&registry)?,
            balance: Balance::new(&registry)?,
            issuance: Issuance::new(&registry)?,
            pool: register(
                &registry,
                IntGauge::new("hauberk_pool_connections", "Pooled connections to peers.")?,
            )?,
            pods: register(
                &registry,
                IntGauge::new("hauberk_enrolled_pods", "Pods enrolled on this node.")?,
            )?,
            expiry: register(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        "hauberk_certificate_expiry_timestamp_seconds",
                        "When the SVID held for an identity expires.",
                    ),
                    &["spiffe_id"],
                )?,
            )?,
            dropped: register(
                &registry,
                IntGauge::new(
                    "hauberk_dropped_series",
                    "Series left out now because there would be too many.",
                )?,
            )?,
            kernel: counters(
                &registry,
                "hauberk_capture_verdicts_total",
                "Connections judged in the kernel, by verdict. Counts on over restarts of the agent.",
                &["verdict"],
            )?,
            policies: policy::Policies::new(&registry)?,
            process: Process::new(&registry)?,
            rendering: Mutex::new(()),
            registry,
        })
    }

    pub(super) fn opened(&self, direction: Direction) {
        self.connections.open[direction as usize].inc();
    }

    pub(super) fn finished(&self, record: &Finished<'_>, was_open: bool) {
        let place = record.direction as usize;
        let of = &self.connections;
        of.ended[index(record.direction, record.encryption, record.reason)].inc();
        of.sent[place].inc_by(record.sent_bytes);
        of.received[place].inc_by(record.received_bytes);
        if was_open {
            of.open[place].dec();
            of.seconds[place].observe(record.duration.as_secs_f64());
        }
    }

    pub(super) fn handshake(&self, role: Role, took: Duration, resumed: bool) {
        self.handshakes.ok[role as usize][usize::from(resumed)].inc();
        self.handshakes.seconds[role as usize].observe(took.as_secs_f64());
    }

    pub(super) fn handshake_failed(&self, role: Role, took: Duration, why: Reason) {
        self.handshakes.failed[role as usize * Reason::ALL.len() + why as usize].inc();
        self.handshakes.seconds[role as usize].observe(took.as_secs_f64());
    }

    pub(super) fn unresumed(&self, role: Role, why: Unresumed) {
        self.handshakes.unresumed[role as usize * Unresumed::ALL.len() + why as usize].inc();
    }

    pub(super) fn chain(&self, known: bool) {
        self.handshakes.chains[usize::from(!known)].inc();
    }

    pub(super) fn cut(&self, role: Role) {
        self.cut[role as usize].inc();
    }

    pub(super) fn ahead(&self, made: bool) {
        self.ahead[usize::from(made)].inc();
    }

    pub(super) fn pool(&self, change: i64) {
        self.pool.add(change);
    }

    /// The page that Prometheus scrapes, with what is read only now: certificates, the kernel side's
    /// and the policies' counts, the process.
    pub fn render(
        &self,
        trust: &Snapshot,
        kernel: [u64; VERDICT_COUNT as usize],
        policies: &PolicyStanding<'_>,
        margin: Margin,
        pods: usize,
    ) -> String {
        let _one_at_a_time = self.rendering.lock().unwrap_or_else(PoisonError::into_inner);
        self.issuance.set(margin, trust);
        self.pods.set(i64::try_from(pods).unwrap_or(i64::MAX));
        self.expiry.reset();
        for (id, svid) in trust.svids.iter().take(MAX_CERTIFICATES) {
            self.expiry.with_label_values(&[id.as_str()]).set(unix(svid.leaf().not_after));
        }
        let revocations = trust.bundle.revocations();
        self.revocations.set(i64::try_from(revocations.entries().len()).unwrap_or(i64::MAX));
        self.generation.set(i64::try_from(revocations.generation()).unwrap_or(i64::MAX));
        let dropped = trust.svids.len().saturating_sub(MAX_CERTIFICATES) + self.policies.set(policies);
        self.dropped.set(i64::try_from(dropped).unwrap_or(i64::MAX));
        for (verdict, count) in KERNEL_VERDICTS.iter().zip(kernel) {
            // The kernel side counts; this only repeats it.
            let counter = self.kernel.with_label_values(&[verdict]);
            counter.reset();
            counter.inc_by(count);
        }
        self.process.read();
        // Encoding into a String cannot fail with names that were registered.
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

/// The place of a combination in [`Connections::ended`].
fn index(direction: Direction, encryption: Encryption, reason: Reason) -> usize {
    (direction as usize * Encryption::ALL.len() + encryption as usize) * Reason::ALL.len() + reason as usize
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> prometheus::Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

fn counters(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
) -> prometheus::Result<IntCounterVec> {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels)?)
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    label: &str,
    buckets: Vec<f64>,
) -> prometheus::Result<HistogramVec> {
    register(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets), &[label])?)
}

impl Connections {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let ended = counters(
            registry,
            "hauberk_connections_total",
            "Connections that ended or were refused, by direction, verdict, encryption and reason.",
            &["direction", "verdict", "encryption", "reason"],
        )?;
        let open = register(
            registry,
            IntGaugeVec::new(Opts::new("hauberk_connections_open", "Connections open now."), &["direction"])?,
        )?;
        let bytes = counters(
            registry,
            "hauberk_bytes_total",
            "Payload bytes of ended connections: `sent` from opener to asked, `received` back.",
            &["direction", "flow"],
        )?;
        let seconds = histogram(
            registry,
            "hauberk_connection_duration_seconds",
            "How long connections were open.",
            "direction",
            vec![0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0, 3600.0],
        )?;
        let mut all = Vec::new();
        for direction in DIRECTIONS {
            for encryption in Encryption::ALL {
                for reason in Reason::ALL {
                    all.push(ended.with_label_values(&[
                        direction.as_str(),
                        reason.verdict().as_str(),
                        encryption.as_str(),
                        reason.as_str(),
                    ]));
                }
            }
        }
        let each = |flow: &str| DIRECTIONS.map(|d| bytes.with_label_values(&[d.as_str(), flow]));
        Ok(Self {
            ended: all,
            open: DIRECTIONS.map(|d| open.with_label_values(&[d.as_str()])),
            sent: each("sent"),
            received: each("received"),
            seconds: DIRECTIONS.map(|d| seconds.with_label_values(&[d.as_str()])),
        })
    }
}

impl Handshakes {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let total = counters(
            registry,
            "hauberk_tls_handshakes_total",
            "TLS handshakes with peers, by side, kind, outcome and reason of failure.",
            &["role", "kind", "outcome", "reason"],
        )?;
        let seconds = histogram(
            registry,
            "hauberk_tls_handshake_duration_seconds",
            "How long TLS handshakes took, with the network's part.",
            "role",
            vec![0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.25, 1.0, 5.0],
        )?;
        let refused = counters(
            registry,
            "hauberk_tls_resumption_refused_total",
            "TLS sessions that were there and not resumed, by side and reason.",
            &["role", "reason"],
        )?;
        let chains = counters(
            registry,
            "hauberk_tls_verified_chains_total",
            "Peers' certificates judged, by whether their signatures had been verified before.",
            &["result"],
        )?;
        let failed = ROLES
            .iter()
            .flat_map(|role| Reason::ALL.iter().map(move |reason| (role, reason)))
            .map(|(role, reason)| total.with_label_values(&[*role, "full", "failed", reason.as_str()]))
            .collect();
        Ok(Self {
            ok: ROLES.map(|role| KINDS.map(|kind| total.with_label_values(&[role, kind, "ok", ""]))),
            failed,
            unresumed: ROLES
                .iter()
                .flat_map(|role| Unresumed::ALL.iter().map(move |why| (role, why)))
                .map(|(role, why)| refused.with_label_values(&[*role, why.as_str()]))
                .collect(),
            chains: ["hit", "miss"].map(|result| chains.with_label_values(&[result])),
            seconds: ROLES.map(|role| seconds.with_label_values(&[role])),
        })
    }
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// What Prometheus' own clients say of a process; the crate's version would bring two more crates.
struct Process {
    cpu: Counter,
    resident: IntGauge,
    files: IntGauge,
}

impl Process {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let started = Gauge::new("process_start_time_seconds", "When the process started.")?;
        started.set(unix(SystemTime::now()));
        register(registry, started)?;
        let build = Opts::new("hauberk_build_info", "The running version.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        register(registry, IntGauge::with_opts(build)?)?.set(1);
        if let Ok((_, most)) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE) {
            let files = IntGauge::new("process_max_fds", "Most open file descriptors.")?;
            files.set(i64::try_from(most).unwrap_or(i64::MAX));
            register(registry, files)?;
        }
        Ok(Self {
            cpu: register(
                registry,
                Counter::new("process_cpu_seconds_total", "CPU time used, user and system.")?,
            )?,
            resident: register(
                registry,
                IntGauge::new("process_resident_memory_bytes", "Resident memory.")?,
            )?,
            files: register(registry, IntGauge::new("process_open_fds", "Open file descriptors.")?)?,
        })
    }

    /// Reads /proc/self; what cannot be read keeps its last value.
    fn read(&self) {
        use nix::sys::resource::{UsageWho, getrusage};
        use nix::sys::time::TimeValLike;
        if let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) {
            let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
            self.cpu.reset();
            self.cpu.inc_by(micros as f64 / 1e6);
        }
        if let Ok(statm) = std::fs::read_to_string("/proc/self/statm")
            && let Some(Ok(pages)) = statm.split(' ').nth(1).map(str::parse::<i64>)
        {
            let page =
                nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(4096);
            self.resident.set(pages * page);
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            self.files.set(i64::try_from(files.count()).unwrap_or(i64::MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    fn snapshot() -> std::sync::Arc<Snapshot> {
        let now = SystemTime::now();
        let domain = TrustDomain::parse("td.test").unwrap();
        let pem = crate::ca::create_root(&domain, now).unwrap();
        let ca = crate::ca::Ca::from_pem(domain, &pem).unwrap();
        crate::trust::Trust::new(ca.bundle().clone()).snapshot()
    }

    #[test]
    fn the_first_end_of_each_class_and_the_roots_are_told() {
        let now = SystemTime::now();
        let domain = TrustDomain::parse("td.test").unwrap();
        let pem = crate::ca::create_root(&domain, now).unwrap();
        let ca = crate::ca::Ca::from_pem(domain.clone(), &pem).unwrap();
        let trust = crate::trust::Trust::new(ca.bundle().clone().with_generation(5));
        for (name, hours) in [("a", 3), ("b", 2)] {
            let key = crate::issue::Keypair::generate().unwrap();
            let proven = crate::ca::ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
            let id = crate::identity::SpiffeId::workload(&domain, "ns", name).unwrap();
            let chain = ca.issue(&proven, &id, Duration::from_secs(hours * 3600), now).unwrap();
            trust.insert(key.with_chain(chain).unwrap());
        }
        let kernel = [0; VERDICT_COUNT as usize];
        let policies = PolicyStanding::default();
        let page = Metrics::new().unwrap().render(&trust.snapshot(), kernel, &policies, Margin::default(), 0);
        let end = unix(now + Duration::from_secs(2 * 3600)).floor();
        let first = format!("hauberk_svid_first_expiry_timestamp_seconds{{class=\"workload\"}} {end}");
        assert!(page.lines().any(|line| line == first), "{page}");
        assert!(!page.contains("class=\"node\""), "none is held");
        assert!(page.contains("hauberk_bundle_generation 5"), "{page}");
    }

    #[test]
    fn each_outcome_is_counted_under_its_own_labels() {
        let metrics = Metrics::new().unwrap();
        for reason in Reason::ALL {
            let record = Finished {
                direction: Direction::Inbound,
                encryption: Encryption::None,
                reason: *reason,
                detail: "",
                policy: None,
                source_id: None,
                source: None,
                destination_id: None,
                destination: None,
                sent_bytes: 1,
                received_bytes: 2,
                duration: Duration::ZERO,
            };
            metrics.finished(&record, false);
            metrics.handshake_failed(Role::Server, Duration::ZERO, *reason);
        }
        let page = metrics.render(
            &snapshot(),
            [0; VERDICT_COUNT as usize],
            &PolicyStanding::default(),
            Margin::default(),
            3,
        );
        for reason in Reason::ALL {
            let line = format!(
                "hauberk_connections_total{{direction=\"inbound\",encryption=\"none\",reason=\"{}\",verdict=\"{}\"}} 1",
                reason.as_str(),
                reason.verdict().as_str()
            );
            assert!(page.contains(&line), "{line}\n{page}");
            let line = format!(
                "hauberk_tls_handshakes_total{{kind=\"full\",outcome=\"failed\",reason=\"{}\",role=\"server\"}} 1",
                reason.as_str()
            );
            assert!(page.contains(&line), "{line}");
        }
        assert!(page.contains("hauberk_enrolled_pods 3"));
    }

    #[test]
    fn full_and_resumed_handshakes_and_each_refusal_are_told_apart() {
        let metrics = Metrics::new().unwrap();
        metrics.handshake(Role::Client, Duration::ZERO, false);
        metrics.handshake(Role::Client, Duration::ZERO, true);
        metrics.handshake(Role::Client, Duration::ZERO, true);
        for why in Unresumed::ALL {
            metrics.unresumed(Role::Server, *why);
        }
        metrics.chain(true);
        let page = metrics.render(
            &snapshot(),
            [0; VERDICT_COUNT as usize],
            &PolicyStanding::default(),
            Margin::default(),
            0,
        );
        let count = "hauberk_tls_handshakes_total{kind=";
        for (kind, times) in [("full", 1), ("resumed", 2)] {
            let line = format!("{count}\"{kind}\",outcome=\"ok\",reason=\"\",role=\"client\"}} {times}");
            assert!(page.contains(&line), "{line}\n{page}");
        }
        for why in Unresumed::ALL {
            let line = format!(
                "hauberk_tls_resumption_refused_total{{reason=\"{}\",role=\"server\"}} 1",
                why.as_str()
            );
            assert!(page.contains(&line), "{line}\n{page}");
        }
        assert!(page.contains("hauberk_tls_verified_chains_total{result=\"hit\"} 1"), "{page}");
    }
}
