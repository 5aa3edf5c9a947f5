//! The authority: knows who is where, and issues identities to the agents of those nodes.
//!
//! An agent proves which node it is by a join token, once; after that by its node's SVID. It is
//! issued its own identity, and identities that the directory places on its node. Everything else is
//! refused with a reason, logged and counted. So is whoever is revoked; agents are told of revocations
//! as they are made. Signing itself is `ca`'s, and so is what may follow in a rotation of the root; the
//! [`keeper`] has it happen.

mod clock;
pub mod config;
mod counters;
mod directory;
mod federation;
mod istio;
mod keeper;
mod ledger;
mod queue;
mod revocations;
mod serve;
mod service;
pub mod state;
mod status;
pub mod wire;

use std::num::NonZero;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::admin::{self, Page};
use crate::ca::store::Store;
use crate::config::PolicyConfig;
use crate::directory::source;
use crate::fleet;
use crate::policy::{self, Policies};
pub use config::AuthorityConfig;
use counters::Counters;
use keeper::{Keeper, Own};
use ledger::Ledger;
use queue::Queue;
use serve::OWN_LIFETIME;
use service::Service;
use status::Status;

/// How long an authority that stops lets open requests finish.
const FAREWELL: Duration = Duration::from_secs(2);

generated! {
    /// The generated gRPC code of `proto/authority.proto`.
    proto: "hauberk.authority.v1"
}

/// What keeps the statuses of the cluster's policies, if they are a cluster's.
async fn keep_statuses(config: &AuthorityConfig, policies: &Policies) -> Result<source::Following> {
    let (Some(PolicyConfig::Kubernetes(cluster)), Some(standing)) = (&config.policy, policies.standing())
    else {
        return Ok(Box::pin(std::future::pending()));
    };
    let connection = policy::kubernetes::Connection::new(cluster).await?;
    Ok(Box::pin(fleet::status::keep(connection, config.trust_domain.clone(), Arc::clone(standing))))
}

/// Runs the authority until `stop` is cancelled.
///
/// # Errors
/// When it cannot start; one chain of causes that says what to mend.
pub async fn run(config: AuthorityConfig, stop: CancellationToken) -> Result<()> {
    let store = Arc::new(Store::open(&config.state_dir)?);
    let _lock = store.lock()?;
    let now = SystemTime::now();
    let state = state::open(&store, &config, now)?;
    let (policies, following_policies) =
        policy::source::open(config.policy.as_ref(), &config.trust_domain).await?;
    let (directory, following_directory) =
        source::open(&config.directory, &config.trust_domain, None, policies.mesh(), None).await?;
    let statuses = keep_statuses(&config, &policies).await?;
    let counters = Arc::new(Counters::new()?);
    let revoked = Arc::new(store.revocations()?);
    let bundle = watch::Sender::new(Arc::new(state.bundle()?.with_revocations(revoked)));
    let own = watch::Sender::new(Arc::new(Own::new(&state, OWN_LIFETIME, now)?));
    let ledger = Ledger::new(state, config.svid_lifetime)?;
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {} (listen)", config.listen))?;
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let queue = Queue::start(queue::BOUNDS, threads).context("cannot start threads")?;
    let status = Arc::new(Status {
        queue: Arc::clone(&queue),
        ledger: Arc::clone(&ledger),
        counters: Arc::clone(&counters),
        directory: Arc::clone(&directory),
        policies,
        bundle: bundle.subscribe(),
    });
    // They end with this, however this ends.
    let mut tasks = JoinSet::new();
    serve_admin(&config, status, &mut tasks).await?;
    tracing::info!(listen = %config.listen, trust_domain = %config.trust_domain, "the authority serves");
    let (trusted, shown) = (bundle.subscribe(), own.subscribe());
    let keeper = Keeper {
        store: Arc::clone(&store),
        ledger: Arc::clone(&ledger),
        schedule: config.root_rotation,
        own,
        bundle: bundle.clone(),
        counters: Arc::clone(&counters),
    };
    federation::start(&config, &bundle, shown.clone(), &mut tasks).await?;
    tasks.spawn(following_directory);
    tasks.spawn(following_policies);
    tasks.spawn(statuses);
    tasks.spawn(revocations::follow(Arc::clone(&store), bundle.clone(), Arc::clone(&counters)));
    tasks.spawn(keeper.run());
    tasks.spawn(service::tell_of_issued(Arc::clone(&counters)));
    let telling = directory::Telling::new(bundle.subscribe(), Arc::clone(&counters));
    tasks.spawn(Arc::clone(&telling).follow(Arc::clone(&directory)));
    let service = Service {
        domain: config.trust_domain,
        ledger: Arc::clone(&ledger),
        queue,
        store: Arc::clone(&store),
        directory,
        lifetime: config.svid_lifetime,
        counters: Arc::clone(&counters),
        bundle,
    };
    let stopped = stop.clone();
    let served = tokio::select! {
        served = serve::serve(listener, (service, telling), shown, trusted, counters, stop) => served,
        // Agents' streams do not end by themselves.
        () = async { stopped.cancelled().await; tokio::time::sleep(FAREWELL).await } => Ok(()),
    };
    tasks.shutdown().await;
    tokio::task::spawn_blocking(move || keeper::close(&store, &ledger)).await?;
    served
}

/// Metrics and health for everybody; how it stands for whoever may open the socket in the state directory.
async fn serve_admin(config: &AuthorityConfig, status: Arc<Status>, tasks: &mut JoinSet<()>) -> Result<()> {
    let tcp = tokio::net::TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("cannot listen on {} (admin)", config.admin))?;
    let socket = config.socket();
    let unix = admin::bind_unix(&socket).with_context(|| format!("cannot make {}", socket.display()))?;
    let public = Arc::clone(&status);
    let private = move |path: &str| match path {
        "/v1/status" => Some(Page::json(&status.now(SystemTime::now()))),
        _ => None,
    };
    tasks.spawn(admin::serve(tcp, Arc::new(move |path: &str| public.page(path).map(Page::text))));
    tasks.spawn(admin::serve_unix(unix, Arc::new(private)));
    Ok(())
}
