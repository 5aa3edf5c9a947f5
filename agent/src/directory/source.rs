//! The source that is configured.

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use super::{Live, Standing, file, kubernetes, stream};
use crate::config::{ConfigError, DirectoryConfig};
use crate::identity::TrustDomain;
use crate::mesh_policy::MeshPolicies;

/// Why the directory cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// The API server cannot be asked.
    #[error(transparent)]
    Kubernetes(#[from] kubernetes::ConnectError),
    /// There is no authority to ask.
    #[error(
        "directory.authority: only an agent whose SVIDs come from the authority (authority.address) can have its directory from there; use directory.kubernetes or directory.file"
    )]
    NoAuthority,
    /// A mistake in our own metrics.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// What keeps the directory true; runs for ever.
pub type Following = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Opens the source; `dial` reaches the authority, if there is one to be asked. A file has been looked at then; a cluster is read by what has to be run. Neither is in
/// use before the mesh policies have been read.
///
/// # Errors
/// When it can never work as it is configured.
pub async fn open(
    config: &DirectoryConfig,
    domain: &TrustDomain,
    node: Option<&str>,
    mesh: &Arc<MeshPolicies>,
    dial: Option<stream::Dial>,
) -> Result<(Arc<Live>, Following), OpenError> {
    let live = Live::new(Standing::new("directory")?);
    let following: Following = match config {
        DirectoryConfig::File(path) => {
            let directory = file::load(path, domain, &mesh.load())?;
            if mesh.is_read() {
                file::take(&live, directory);
            }
            Box::pin(file::watch(PathBuf::clone(path), domain.clone(), Arc::clone(mesh), Arc::clone(&live)))
        }
        DirectoryConfig::Kubernetes(config) => {
            let connection =
                kubernetes::Connection::new(config, "directory.kubernetes", domain, node).await?;
            Box::pin(kubernetes::watch(connection, Arc::clone(mesh), Arc::clone(&live)))
        }
        DirectoryConfig::Authority(config) => {
            let dial = dial.ok_or(OpenError::NoAuthority)?;
            let connection = kubernetes::Connection::new(config, "directory.authority", domain, node).await?;
            Box::pin(stream::follow(connection, dial, Arc::clone(mesh), Arc::clone(&live)))
        }
    };
    Ok((live, following))
}
