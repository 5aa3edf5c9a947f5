//! Puts the agent together, and takes it apart again.
//!
//! Two kinds of threads: the data path's (see `shard`), and a small runtime for everything that may
//! wait: the authority, the directory, the admin server. Load on one does not delay the other.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::{self, Readiness, State};
use crate::balance::Balance;
use crate::capture::Capture;
use crate::config::{AgentConfig, PolicyConfig};
use crate::crls::Keeper;
use crate::directory::{Live, source};
use crate::enrol::{Enroller, LOOK_EVERY};
use crate::fleet::lease;
use crate::fleet::reach::Reach;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::issue;
use crate::issue::keep::{self, Keep};
use crate::policy::{self, Policies};
use crate::rotate::{self, Rotator};
use crate::shard::{Shared, Thread};
use crate::telemetry::access_log::KernelLog;
use crate::telemetry::{Metrics, Observe};
use crate::tls::ktls;
use crate::tls::memory::Memory;
use crate::trust::Trust;

/// Each connection needs two descriptors, and a pod may well open 28,000.
const WANTED_FILES: u64 = 1 << 20;
/// More data-path threads than this bring more node-to-node connections than speed.
const MAX_DEFAULT_WORKERS: usize = 8;

/// Words about connections between nodes that threads may be behind in hearing of.
const WORDS: usize = 1024;

/// What readiness waits for.
const CONDITIONS: [&str; 5] = ["policies", "directory", "node-svid", "pods-enrolled", "workload-svids"];

/// Runs the agent until it is told to stop (SIGTERM, SIGINT). `give_back` lets the allocator give free
/// memory back.
///
/// # Errors
/// When it cannot start; one chain of causes that says what to mend.
pub fn run(config: AgentConfig, give_back: fn()) -> Result<()> {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start threads")?;
    let outcome = runtime.block_on(serve(Arc::new(config), give_back));
    // A directory on a hung disk must not hold up the exit.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

async fn serve(config: Arc<AgentConfig>, give_back: fn()) -> Result<()> {
    let _lock = lock(&config.runtime_dir)?;
    let domain = &config.trust_domain;
    let node = SpiffeId::node(domain, &config.node).context("node")?;
    let trust = Trust::new(bundle(&config)?);
    let crls = Keeper::load(&config.revocation.crls, Arc::clone(&trust))?;
    let (policies, following_policies) = policy::source::open(config.policy.as_ref(), domain).await?;
    let (directory, following_directory) =
        source::open(&config.directory, domain, Some(&config.node), policies.mesh()).await?;
    let admin_listener = tokio::net::TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("cannot listen on {} (admin)", config.admin))?;
    let tunnel_port = config.tunnel.port;
    let capture = Arc::new(Capture::start(&config.capture, tunnel_port, &config.probes.exempt)?);
    capture.beat();
    // Loading the programs parses the kernel's types: some thirty megabytes that nothing needs any more.
    give_back();

    if config.tunnel.kernel_tls {
        use_kernel_tls();
    }

    let metrics = Arc::new(Metrics::new()?);
    let shared = shared(&config, &node, &trust, &directory, &policies, &capture, &metrics);
    let threads = start_threads(&config, &shared, give_back)?;
    let enroller =
        Enroller::new(Arc::clone(&config), Arc::clone(&capture), Arc::clone(&shared.pods), threads);
    let issuer = issue::configured(config.issuer(), node.clone(), Arc::clone(&trust));
    let keep = Keep::in_dir(&config.runtime_dir);
    let own = config.issuer().issues_nodes().then(|| node.clone());
    let rotator = Rotator::new(
        Arc::clone(&trust),
        Arc::clone(&issuer),
        own.clone(),
        keep,
        config.availability_target,
        shared.observe.clone(),
    );

    let readiness = Arc::new(Readiness::new(&CONDITIONS));
    let state = Arc::new(State {
        node: config.node.clone(),
        metrics,
        trust: Arc::clone(&trust),
        directory: Arc::clone(&directory),
        policies: Arc::clone(&policies),
        capture: Arc::clone(&capture),
        enrolled: enroller.status(),
        rotation: rotator.status(),
        availability_target: config.availability_target,
        readiness: Arc::clone(&readiness),
    });
    serve_admin(&config, admin_listener, &state)?;

    tokio::spawn(following_directory);
    tokio::spawn(crls.follow());
    tokio::spawn(rotate::keep_revocations(Arc::clone(&trust), rotator.keep()));
    tokio::spawn(following_policies);
    tokio::spawn(rotator.run(wanted(&directory, &config.node)));
    tokio::spawn(rotate::follow_bundle(Arc::clone(&trust), issuer));
    tokio::spawn(Arc::clone(&shared.balance).follow(Arc::clone(&directory)));
    tokio::spawn(beat(Arc::clone(&capture)));
    tokio::spawn(log_kernel_events(Arc::clone(&capture)));
    tokio::spawn(judge_readiness(Arc::clone(&state), own));
    if let Some(PolicyConfig::Kubernetes(cluster)) = &config.policy {
        tell_the_cluster(policy::kubernetes::Connection::new(cluster).await?, &config, &state);
    }
    let stop_enrolling = CancellationToken::new();
    let enrolling = enrol_for_ever(enroller, directory, Arc::clone(&policies), stop_enrolling.clone())?;

    tracing::info!(node = config.node, trust_domain = %domain, "the agent runs");
    wait_for_stop().await?;
    drain(&shared, config.drain).await;
    stop_enrolling.cancel();
    let threads = tokio::task::spawn_blocking(move || enrolling.join()).await?;
    shared.abort.cancel();
    for thread in threads.map_err(|_| anyhow!("the enrolling thread panicked"))? {
        tokio::task::spawn_blocking(move || thread.join()).await?;
    }
    Ok(())
}

/// Lets the kernel seal and open records, if it can do so for as long as a connection lives.
fn use_kernel_tls() {
    const INSTEAD: &str = "no kernel TLS (tunnel.kernelTls): the agent encrypts itself";
    match ktls::probe() {
        Ok(ability) if ability.rekeys => {
            ability.switch_on();
            tracing::info!("new connections use kernel TLS");
        }
        Ok(_) => tracing::warn!(reason = "this kernel changes no keys, as Linux 6.14 does", "{INSTEAD}"),
        Err(missing) => tracing::warn!(reason = %missing, "{INSTEAD}"),
    }
}

/// One agent for one runtime directory, for as long as the file lives.
fn lock(dir: &Path) -> Result<File> {
    let named = || format!("cannot use the runtime directory {} (runtimeDir)", dir.display());
    DirBuilder::new().recursive(true).mode(0o700).create(dir).with_context(named)?;
    let path = dir.join("agent.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).with_context(named)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(anyhow!("another agent uses {} (runtimeDir); stop it first", dir.display()))
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(named),
    }
}

fn bundle(config: &AgentConfig) -> Result<TrustBundle> {
    let Some((path, field)) = config.issuer().trust_bundle() else {
        return Ok(TrustBundle::unknown(config.trust_domain.clone()));
    };
    let named = || format!("cannot use the trust bundle {} ({field})", path.display());
    let pem = std::fs::read(path).with_context(named)?;
    TrustBundle::from_pem(config.trust_domain.clone(), &pem).with_context(named)
}

fn shared(
    config: &AgentConfig,
    node: &SpiffeId,
    trust: &Arc<Trust>,
    directory: &Arc<Live>,
    policies: &Arc<Policies>,
    capture: &Arc<Capture>,
    metrics: &Arc<Metrics>,
) -> Shared {
    let observe = Observe::new(Arc::clone(metrics));
    let keys =
        config.tunnel.resumption.then(|| keep::tickets::take_up(&config.runtime_dir, SystemTime::now()));
    Shared {
        trust: Arc::clone(trust),
        node: node.clone(),
        node_scope: config.issuer().issues_nodes(),
        directory: Arc::clone(directory),
        pods: Arc::default(),
        balance: Arc::new(Balance::new(config.node.clone(), observe.clone())),
        policies: Arc::clone(policies),
        capture: Arc::clone(capture),
        tls: Memory::new(keys, observe.clone()),
        observe,
        tunnel: Arc::new(config.tunnel.clone()),
        words: broadcast::Sender::new(WORDS),
        handshakes: Arc::new(Semaphore::new(config.tunnel.max_handshakes)),
        drain: CancellationToken::new(),
        abort: CancellationToken::new(),
        tasks: TaskTracker::new(),
    }
}

fn start_threads(config: &AgentConfig, shared: &Shared, give_back: fn()) -> Result<Vec<Thread>> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_DEFAULT_WORKERS);
    (0..config.workers.unwrap_or(cores))
        .map(|number| Thread::start(number, shared.clone(), give_back))
        .collect::<Result<_, _>>()
        .context("cannot start the data path's threads")
}

fn serve_admin(config: &AgentConfig, listener: tokio::net::TcpListener, state: &Arc<State>) -> Result<()> {
    let socket = config.runtime_dir.join("admin.sock");
    let unix = admin::bind_unix(&socket).with_context(|| format!("cannot make {}", socket.display()))?;
    let (public, private) = (Arc::clone(state), Arc::clone(state));
    tokio::spawn(admin::serve(listener, Arc::new(move |path: &str| public.public(path))));
    tokio::spawn(admin::serve_unix(unix, Arc::new(move |path: &str| private.private(path))));
    Ok(())
}

/// The identities of this node's enrolled workloads, as the directory changes.
fn wanted(directory: &Arc<Live>, node: &str) -> watch::Receiver<Vec<SpiffeId>> {
    let (directory, node) = (Arc::clone(directory), node.to_owned());
    let identities = move |directory: &Live| {
        let mut ids: Vec<SpiffeId> = directory.load().enrolled_on(&node).map(|w| w.id.clone()).collect();
        ids.sort();
        ids.dedup();
        ids
    };
    let (sender, receiver) = watch::channel(identities(&directory));
    tokio::spawn(async move {
        let mut changes = directory.subscribe();
        while changes.changed().await.is_ok() {
            let now = identities(&directory);
            sender.send_if_modified(|before| {
                let changed = *before != now;
                *before = now;
                changed
            });
        }
    });
    receiver
}

async fn beat(capture: Arc<Capture>) {
    let mut every = tokio::time::interval(Duration::from_secs(1));
    loop {
        every.tick().await;
        capture.beat();
    }
}

async fn log_kernel_events(capture: Arc<Capture>) {
    let Some(mut events) = capture.events() else { return };
    let mut log = KernelLog::new(Instant::now());
    while let Ok(event) = events.next().await {
        log.write(&event, Instant::now());
    }
}

async fn judge_readiness(state: Arc<State>, node: Option<SpiffeId>) {
    let mut every = tokio::time::interval(Duration::from_millis(200));
    loop {
        every.tick().await;
        let rotation = state.rotation.now();
        let why = |id: &SpiffeId| {
            let error = rotation.get(id).and_then(|standing| standing.last_error.clone());
            format!("{id}: {}", error.unwrap_or_else(|| "not issued yet".into()))
        };
        let node_missing = node.as_ref().filter(|node| state.trust.svid(node).is_none()).map(why);
        let enrolled = state.enrolled.now();
        let directory = state.directory.load();
        let wanted: Vec<_> = directory.enrolled_on(&state.node).collect();
        let pods_missing =
            wanted.iter().map(|workload| workload.full_name()).find_map(|name| match enrolled.get(&name) {
                Some(Ok(())) => None,
                Some(Err(reason)) => Some(format!("{name}: {reason}")),
                None => Some(format!("{name}: not looked at yet")),
            });
        let svid_missing = wanted.iter().find(|w| state.trust.svid(&w.id).is_none()).map(|w| why(&w.id));
        let unread = || state.directory.standing().faults().unwrap_or_else(|| "not read yet".into());
        let directory_missing = (!state.directory.is_read()).then(unread);
        let unread = || state.policies.fault().unwrap_or_else(|| "not read yet".into());
        let policies_missing = (!state.policies.is_read()).then(unread);
        let missing = [policies_missing, directory_missing, node_missing, pods_missing, svid_missing];
        for (condition, missing) in CONDITIONS.into_iter().zip(missing) {
            state.readiness.set(condition, missing);
        }
    }
}

/// Says in a Lease how this agent stands, for policies' statuses and `hauberk check --cluster`.
fn tell_the_cluster(connection: policy::kubernetes::Connection, config: &AgentConfig, state: &Arc<State>) {
    let reach = Arc::new(Reach::default());
    let (directory, node) = (Arc::clone(&state.directory), config.node.clone());
    let tunnel = &config.tunnel;
    tokio::spawn(Arc::clone(&reach).look(directory, node.clone(), tunnel.port, tunnel.connect_timeout));
    let (known, told) = (Arc::clone(&state.directory), Arc::clone(state));
    let nodes = move || known.load().node_count();
    let report = move || told.report(&reach);
    tokio::spawn(lease::keep(connection, node, nodes, report));
}

/// Enrols on a thread of its own, as that enters other namespaces; gives the data path back at the end.
fn enrol_for_ever(
    mut enroller: Enroller,
    directory: Arc<Live>,
    policies: Arc<Policies>,
    stop: CancellationToken,
) -> Result<std::thread::JoinHandle<Vec<Thread>>> {
    let handle = tokio::runtime::Handle::current();
    let mut changes = directory.subscribe();
    let work = move || {
        // Nobody is known yet, which must not be taken for nobody being there: what is pinned stays. And without
        // the policies nobody may be let in.
        let known = async || {
            policies.read().await;
            directory.read().await;
        };
        let is_stopped = handle.block_on(async {
            tokio::select! {
                () = known() => false,
                () = stop.cancelled() => true,
            }
        });
        if is_stopped {
            return enroller.into_threads();
        }
        loop {
            enroller.apply(&directory.load());
            let stopped = handle.block_on(async {
                tokio::select! {
                    () = stop.cancelled() => true,
                    _ = changes.changed() => false,
                    () = tokio::time::sleep(LOOK_EVERY) => false,
                }
            });
            if stopped {
                return enroller.into_threads();
            }
        }
    };
    std::thread::Builder::new().name("enrol".into()).spawn(work).context("cannot start a thread")
}

async fn wait_for_stop() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Takes nothing new, asks peers to leave, and waits for what is open until the deadline.
async fn drain(shared: &Shared, deadline: Duration) {
    tracing::info!(
        seconds = deadline.as_secs(),
        open = shared.tasks.len(),
        "stopping: draining open connections"
    );
    shared.drain.cancel();
    shared.tasks.close();
    if tokio::time::timeout(deadline, shared.tasks.wait()).await.is_err() {
        tracing::warn!(open = shared.tasks.len(), "the deadline has come: resetting what is still open");
        shared.abort.cancel();
        // Their resets and log lines take a moment, and only that.
        let _ = tokio::time::timeout(Duration::from_secs(2), shared.tasks.wait()).await;
    }
}

/// Raises the limit of open files as far as we may; says so when that is little.
fn raise_file_limit() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    let wanted = WANTED_FILES.max(hard);
    let raised = setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted)
        .or_else(|_| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    let now = if raised.is_ok() { getrlimit(Resource::RLIMIT_NOFILE).map_or(soft, |l| l.0) } else { soft };
    if now < 65_536 {
        tracing::warn!(
            limit = now,
            "few files may be open at once; each connection needs two (raise LimitNOFILE)"
        );
    }
}
