//! Puts the agent together, and takes it apart again.
//!
//! Two kinds of threads: the data path's (see `shard`), and a small runtime for everything that may
//! wait: the authority, the directory, the admin server. Load on one does not delay the other.

mod enrolling;
mod federated;
mod upgrade;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow};
use futures_util::FutureExt;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, Semaphore, broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::{self, Readiness, State};
use crate::balance::Balance;
use crate::capture::{Capture, Pods};
use crate::config::{AgentConfig, PolicyConfig};
use crate::crls::Keeper;
use crate::directory::{Live, source, stream};
use crate::enrol::{Enroller, Standing};
use crate::fleet::lease;
use crate::fleet::reach::Reach;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::issue;
use crate::issue::keep::crls::CrlKeep;
use crate::issue::keep::{self, Keep};
use crate::policy::{self, Policies};
use crate::rotate::{self, Rotator};
use crate::shard::{Shared, Thread};
use crate::telemetry::access_log::KernelLog;
use crate::telemetry::{Metrics, Observe};
use crate::tls::ktls;
use crate::tls::memory::Memory;
use crate::trust::Trust;
use enrolling::{Told, enrol_for_ever, hear_of_pods};
use federated::{federator, follow_federation, neighbours, tell_policies};
use upgrade::{Order, Phase, take_over, take_place, wait_for_successor};

/// Each connection needs two descriptors, and a pod may well open 28,000.
const WANTED_FILES: u64 = 1 << 20;
/// More data-path threads than this bring more node-to-node connections than speed.
const MAX_DEFAULT_WORKERS: usize = 8;

/// Words about connections between nodes that threads may be behind in hearing of.
const WORDS: usize = 1024;

/// Peers of an agent with a successor are asked to leave over at most this time.
const FAREWELL: Duration = Duration::from_secs(10);

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
    let place = take_place(&config.runtime_dir, config.admin)?;
    let domain = &config.trust_domain;
    let node = SpiffeId::node(domain, &config.node).context("node")?;
    let trust = Trust::new(bundle(&config)?);
    let federator = federator(&config, &trust)?;
    let kept = CrlKeep::in_dir(&config.runtime_dir);
    let crls = Keeper::load(&config.revocation.crls, Arc::clone(&trust), kept)?;
    let (policies, following_policies) = policy::source::open(config.policy.as_ref(), domain).await?;
    // Before anybody is judged: the aliases do not change any more.
    policies.know(neighbours(&trust.snapshot().bundle));
    let (directory, following_directory) = source::open(
        &config.directory,
        domain,
        Some(&config.node),
        policies.mesh(),
        dial(&config, &node, &trust),
    )
    .await?;
    let tunnel_port = config.tunnel.port;
    let told = Pods::told_by(&config.directory);
    let capture = Arc::new(Capture::start(&config.capture, tunnel_port, &config.probes.exempt, told)?);
    capture.beat();
    // Loading the programs parses the kernel's types: some thirty megabytes that nothing needs any more.
    give_back();

    if config.tunnel.kernel_tls {
        use_kernel_tls();
    }

    let metrics = Arc::new(Metrics::new()?);
    let shared = shared(&config, &node, &trust, &directory, &policies, &capture, &metrics);
    let threads = start_threads(&config, &shared, give_back)?;
    let mut enroller =
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
    let (orders, hear_orders) = mpsc::unbounded_channel();
    let (admin_socket, predecessor, estate) =
        place.divide(shared.tls.keys().map(Arc::clone), orders.clone())?;

    tokio::spawn(following_directory);
    tokio::spawn(crls.follow());
    tokio::spawn(tell_policies(Arc::clone(&trust), Arc::clone(&policies)));
    if let Some(federator) = federator {
        tokio::spawn(follow_federation(Arc::clone(&trust), federator.subscribe()));
        tokio::spawn(federator.run());
    }
    tokio::spawn(rotate::keep_bundle(Arc::clone(&trust), rotator.keep()));
    tokio::spawn(following_policies);
    tokio::spawn(rotator.run(wanted(&directory, &config.node)));
    tokio::spawn(rotate::follow_bundle(Arc::clone(&trust), issuer));
    tokio::spawn(Arc::clone(&shared.balance).follow(Arc::clone(&directory)));
    tokio::spawn(beat(Arc::clone(&capture)));
    tokio::spawn(judge_readiness(Arc::clone(&state), own));
    let mut stop = std::pin::pin!(wait_for_stop());
    let predecessor = match predecessor {
        None => None,
        Some(predecessor) => {
            let (predecessor, inherited) = tokio::select! {
                taken = take_over(predecessor, &readiness) => taken?,
                stopped = &mut stop => return stopped,
            };
            enroller.inherit(inherited);
            Some(predecessor)
        }
    };
    let mut ours = serve_admin(&config, admin_socket, &state)?;
    ours.push(tokio::spawn(log_kernel_events(Arc::clone(&capture))));
    let stop_enrolling = CancellationToken::new();
    let news = Arc::new(Notify::new());
    tokio::spawn(hear_of_pods(Arc::clone(&capture), Arc::clone(&news)));
    let (first, enrolled) = oneshot::channel();
    let told = Told { directory, policies, news, orders: hear_orders, stop: stop_enrolling.clone() };
    let enrolling = enrol_for_ever(enroller, told, first)?;
    if let Some(predecessor) = predecessor {
        // Everything is served here by now; who has been asked to stop meanwhile is asked again below.
        enrolled.await.context("the enrolling thread panicked")?;
        tokio::task::spawn_blocking(|| predecessor.serving()).await?.context("cannot take over")?;
    }
    if let Some(PolicyConfig::Kubernetes(cluster)) = &config.policy {
        let connection = policy::kubernetes::Connection::new(cluster).await?;
        ours.extend(tell_the_cluster(connection, &config, &state));
    }
    let handover = wait_for_successor(&config.runtime_dir, estate)?;
    tracing::info!(node = config.node, trust_domain = %domain, "the agent runs");
    let retire = || {
        ours.iter().for_each(JoinHandle::abort);
        // The thread ends only after this one has asked it to.
        let _ = orders.send(Order::Retire);
    };
    serve_and_drain(&config, &shared, stop, handover, retire).await?;
    stop_enrolling.cancel();
    let threads = tokio::task::spawn_blocking(move || enrolling.join()).await?;
    shared.abort.cancel();
    for thread in threads.map_err(|_| anyhow!("the enrolling thread panicked"))? {
        tokio::task::spawn_blocking(move || thread.join()).await?;
    }
    Ok(())
}

/// Serves until the agent is told to stop or a successor has taken over, and drains then. `retire` ends
/// what a successor does from now on.
async fn serve_and_drain(
    config: &AgentConfig,
    shared: &Shared,
    mut stop: Pin<&mut impl Future<Output = Result<()>>>,
    mut handover: watch::Receiver<Phase>,
    retire: impl FnOnce(),
) -> Result<()> {
    let mut is_stopped = false;
    tokio::select! {
        stopped = &mut stop => {
            stopped?;
            is_stopped = true;
        }
        _ = handover.wait_for(|phase| *phase == Phase::Done) => {}
    }
    // Who is told to stop while a successor gets ready waits for that.
    let has_successor = match handover.wait_for(|phase| *phase != Phase::UnderWay).await {
        Ok(phase) => *phase == Phase::Done,
        // The thread ends with a hand-over that is done.
        Err(_) => true,
    };
    if has_successor {
        retire();
        let spread = (config.drain / 4).min(FAREWELL);
        shared.farewell.store(spread.as_millis() as u64, Ordering::Relaxed);
    }
    drain(shared, config.drain).await;
    if has_successor && !is_stopped {
        // Whatever started us would take our end for a failure, and start us again.
        tracing::info!("a successor serves this node; waiting to be stopped");
        stop.await?;
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

fn bundle(config: &AgentConfig) -> Result<TrustBundle> {
    let bundle = match config.issuer().trust_bundle() {
        None => TrustBundle::unknown(config.trust_domain.clone()),
        Some((path, field)) => {
            let named = || format!("cannot use the trust bundle {} ({field})", path.display());
            let pem = std::fs::read(path).with_context(named)?;
            TrustBundle::from_pem(config.trust_domain.clone(), &pem).with_context(named)?
        }
    };
    Ok(bundle.with_aliases(config.trust_domain_aliases.as_slice().into()))
}

/// How the directory reaches the authority.
fn dial(config: &AgentConfig, node: &SpiffeId, trust: &Arc<Trust>) -> Option<stream::Dial> {
    let line = issue::line(config.issuer(), node.clone(), Arc::clone(trust))?;
    Some(Arc::new(move || {
        let line = Arc::clone(&line);
        async move { line.attested().await.map_err(|error| error.to_string()) }.boxed()
    }))
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
        inboxes: Arc::new([]),
        handshakes: Arc::new(Semaphore::new(config.tunnel.max_handshakes)),
        drain: CancellationToken::new(),
        farewell: Arc::new(AtomicU64::new(0)),
        abort: CancellationToken::new(),
        tasks: TaskTracker::new(),
    }
}

fn start_threads(config: &AgentConfig, shared: &Shared, give_back: fn()) -> Result<Vec<Thread>> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_DEFAULT_WORKERS);
    Thread::start(config.workers.unwrap_or(cores), shared.clone(), give_back)
        .context("cannot start the data path's threads")
}

fn serve_admin(
    config: &AgentConfig,
    listener: std::net::TcpListener,
    state: &Arc<State>,
) -> Result<Vec<JoinHandle<()>>> {
    let socket = config.runtime_dir.join("admin.sock");
    let unix = admin::bind_unix(&socket).with_context(|| format!("cannot make {}", socket.display()))?;
    let listener = tokio::net::TcpListener::from_std(listener).context("cannot serve the admin address")?;
    let (public, private) = (Arc::clone(state), Arc::clone(state));
    Ok(vec![
        tokio::spawn(admin::serve(listener, Arc::new(move |path: &str| public.public(path)))),
        tokio::spawn(admin::serve_unix(unix, Arc::new(move |path: &str| private.private(path)))),
    ])
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
                // A pod that is still to start owes nothing yet.
                Some(Standing::Enrolled | Standing::Waiting(_)) => None,
                Some(Standing::Failed(reason)) => Some(format!("{name}: {reason}")),
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

/// Says in a Lease how this agent stands, for policies' statuses and `hauberk check --cluster`, until it is aborted.
fn tell_the_cluster(
    connection: policy::kubernetes::Connection,
    config: &AgentConfig,
    state: &Arc<State>,
) -> [JoinHandle<()>; 2] {
    let reach = Arc::new(Reach::default());
    let (directory, node) = (Arc::clone(&state.directory), config.node.clone());
    let tunnel = &config.tunnel;
    let looking =
        tokio::spawn(Arc::clone(&reach).look(directory, node.clone(), tunnel.port, tunnel.connect_timeout));
    let (known, told) = (Arc::clone(&state.directory), Arc::clone(state));
    let nodes = move || known.load().node_count();
    let report = move || told.report(&reach);
    [looking, tokio::spawn(lease::keep(connection, node, nodes, report))]
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
