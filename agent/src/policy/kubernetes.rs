//! Policies from Kubernetes: AccessPolicy and MeshPolicy objects, as `manifests/crds` defines them.
//!
//! - `kept`: what is in force of each object, also of one that cannot be used
//!
//! The API server refuses what the definitions' schemas and rules refuse. Everything is checked here again:
//! an older server knows no rules (CEL), and a later version's objects may say what this one does not know.

pub mod kept;

use std::sync::Arc;

use futures_util::{StreamExt, stream};
use kube::Client;
use kube::runtime::watcher::Event;
use tokio::time::Instant;

use super::Policies;
use super::document::Documents;
use crate::config::PolicyKubernetesConfig;
use crate::directory::kubernetes::ConnectError;
use crate::directory::kubernetes::objects::{Kind, Policy};
use crate::directory::kubernetes::watch::{self, BATCH, one, until};
use kept::Kept;

/// Where the mesh's own parts are, unless they say otherwise.
const NAMESPACE: &str = "hauberk-system";

/// How to reach the API server.
pub struct Connection {
    /// Its client.
    pub client: Client,
    /// The namespace of the mesh's own objects.
    pub namespace: String,
}

impl Connection {
    /// Reads kubeconfig or service account; connects to nothing yet.
    ///
    /// # Errors
    /// When there is nothing to read, or it cannot be used.
    pub async fn new(config: &PolicyKubernetesConfig) -> Result<Self, ConnectError> {
        let (client, own) = watch::client(config.kubeconfig.as_deref(), "policy.kubernetes").await?;
        let namespace = config.namespace.clone().or(own).unwrap_or_else(|| NAMESPACE.into());
        Ok(Self { client, namespace })
    }
}

/// Asks the API server for one object of each kind.
///
/// # Errors
/// One line for the first that it cannot have.
pub async fn probe(connection: &Connection) -> Result<(), String> {
    one::<Policy>(&connection.client, Kind::ACCESS_POLICIES).await?;
    one::<Policy>(&connection.client, Kind::MESH_POLICIES).await
}

enum Update {
    Access(Event<Policy>),
    Mesh(Event<Policy>),
}

/// Runs for ever: takes the cluster's policies into use as they change.
pub(super) async fn watch(connection: Connection, policies: Arc<Policies>) {
    let Some(standing) = policies.standing().map(Arc::clone) else { return };
    let client = &connection.client;
    let mut updates = stream::select_all([
        watch::updates(client, Kind::ACCESS_POLICIES, &standing, Update::Access),
        watch::updates(client, Kind::MESH_POLICIES, &standing, Update::Mesh),
    ]);
    let mut kept = Kept::new(policies.domain.clone());
    let mut due: Option<Instant> = None;
    loop {
        tokio::select! {
            Some(update) = updates.next() => {
                let changed = match update {
                    Update::Access(event) => kept.access(event),
                    Update::Mesh(event) => kept.mesh(event),
                };
                if due.is_none() && kept.is_read() && (changed || !policies.is_read()) {
                    due = Some(Instant::now() + BATCH);
                }
            }
            () = until(due) => {
                due = None;
                let documents = kept.documents();
                standing.objects(Kind::ACCESS_POLICIES.plural, documents.access.len());
                standing.objects(Kind::MESH_POLICIES.plural, documents.mesh.len());
                policies.take_kept(documents, &kept);
            }
        }
    }
}

impl Policies {
    /// Takes what is in force of the cluster's objects.
    fn take_kept(&self, documents: Documents, kept: &Kept) {
        let count = documents.count();
        match self.take(documents) {
            Ok(changed) => {
                let fault = kept.faults().next().map(|(object, why)| {
                    format!("{object} cannot be used: {why} ({} such objects)", kept.faults().count())
                });
                if changed {
                    let generation = self.generation();
                    tracing::info!(policies = count, generation, "access policies read");
                }
                self.fault.store(fault.map(Arc::new));
                self.digest.store(Some(Arc::new(kept.digest())));
            }
            // Each was compiled alone when it came, so together they compile too.
            Err((object, why)) => {
                tracing::error!(object, why, "the access policies stay as they were");
                self.fault.store(Some(Arc::new(format!("{object}: {why}"))));
            }
        }
    }
}
