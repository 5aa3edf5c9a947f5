//! The source that is configured.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use super::{Policies, kubernetes};
use crate::config::{ConfigError, PolicyConfig};
use crate::directory::Standing;
use crate::directory::kubernetes::ConnectError;
use crate::identity::TrustDomain;

/// Why the policies cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// The API server cannot be asked.
    #[error(transparent)]
    Kubernetes(#[from] ConnectError),
    /// A mistake in our own metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// What keeps the policies true; runs for ever.
pub type Following = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Opens the source. A file has been read then; a cluster is read by what has to be run. Without a source
/// there are no policies.
///
/// # Errors
/// When it can never work as it is configured; a file also when it cannot be used now.
pub async fn open(
    config: Option<&PolicyConfig>,
    domain: &TrustDomain,
) -> Result<(Arc<Policies>, Following), OpenError> {
    let (policies, following): (_, Following) = match config {
        None => (Policies::none(domain.clone()), Box::pin(std::future::pending())),
        Some(PolicyConfig::File(path)) => {
            let policies = Policies::load(path, domain.clone())?;
            let (access, mesh) = (policies.loaded().policies().count(), policies.mesh().load().count());
            tracing::info!(file = %path.display(), policies = access + mesh, "access policies read");
            let following = Arc::clone(&policies).watch(PathBuf::clone(path));
            (policies, Box::pin(following))
        }
        Some(PolicyConfig::Kubernetes(config)) => {
            let connection = kubernetes::Connection::new(config).await?;
            let policies = Policies::unread(domain.clone(), Standing::new("policies")?);
            let following = kubernetes::watch(connection, Arc::clone(&policies));
            (policies, Box::pin(following))
        }
    };
    Ok((policies, following))
}
