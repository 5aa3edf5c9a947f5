//! The authority: knows who is where, and issues identities to the agents of those nodes.
//!
//! An agent proves which node it is by a join token, once; after that by its node's SVID. It is
//! issued its own identity, and identities that the directory places on its node. Everything else is
//! refused with a reason, logged and counted. So is whoever is revoked; agents are told of revocations
//! as they are made. Signing itself is `ca`'s.

pub mod config;
mod revocations;
mod serve;
mod service;
pub mod wire;

use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::ca::store::Store;
use crate::config::PolicyConfig;
use crate::directory::source;
use crate::fleet::status;
use crate::policy::{self, Policies};
pub use config::AuthorityConfig;
pub use service::Counters;
use service::Service;

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
    Ok(Box::pin(status::keep(connection, config.trust_domain.clone(), Arc::clone(standing))))
}

/// Runs the authority until `stop` is cancelled.
///
/// # Errors
/// When it cannot start; one chain of causes that says what to mend.
pub async fn run(config: AuthorityConfig, stop: CancellationToken) -> Result<()> {
    let store = Arc::new(Store::open(&config.state_dir)?);
    let _lock = store.lock()?;
    let ca = Arc::new(store.ca(&config.trust_domain, SystemTime::now())?);
    let (policies, following_policies) =
        policy::source::open(config.policy.as_ref(), &config.trust_domain).await?;
    let (directory, following_directory) =
        source::open(&config.directory, &config.trust_domain, None, policies.mesh()).await?;
    let statuses = keep_statuses(&config, &policies).await?;
    let watching =
        tokio::spawn(async move { tokio::join!(following_directory, following_policies, statuses) });
    let counters = Arc::new(Counters::new()?);
    let revoked = Arc::new(store.revocations()?);
    let bundle = watch::Sender::new(Arc::new(ca.bundle().clone().with_revocations(revoked)));
    let following =
        tokio::spawn(revocations::follow(Arc::clone(&store), bundle.clone(), Arc::clone(&counters)));
    let listener = tokio::net::TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {} (listen)", config.listen))?;
    let admin = tokio::net::TcpListener::bind(config.admin)
        .await
        .with_context(|| format!("cannot listen on {} (admin)", config.admin))?;
    let (page, known, policies) = (Arc::clone(&counters), Arc::clone(&directory), Arc::clone(&policies));
    let admin = tokio::spawn(crate::admin::serve(
        admin,
        Arc::new(move |path: &str| page.page(path, &known, &policies).map(crate::admin::Page::text)),
    ));
    tracing::info!(listen = %config.listen, trust_domain = %config.trust_domain, "the authority serves");
    let trusted = bundle.subscribe();
    let service =
        Service::new(Arc::clone(&ca), store, directory, config.svid_lifetime, Arc::clone(&counters), bundle);
    let outcome = serve::serve(listener, service, ca, trusted, counters, stop).await;
    watching.abort();
    following.abort();
    admin.abort();
    outcome
}
