//! The authority's configuration file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::config::{ConfigError, DirectoryConfig, PolicyConfig, one, read_yaml, seconds};
use crate::identity::TrustDomain;
use crate::identity::revocation::MAX_SVID_LIFETIME;

/// `hauberk authority --config FILE`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorityConfig {
    /// The trust domain it signs for.
    pub trust_domain: TrustDomain,
    /// Where agents ask.
    #[serde(default = "default_listen")]
    pub listen: SocketAddr,
    /// Where the CA and unused join tokens are kept; made with mode 0700.
    pub state_dir: PathBuf,
    /// Which identity runs on which node.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub directory: DirectoryConfig,
    /// Where mesh policies are read from: they say who is in the mesh, and how long SVIDs are valid.
    #[serde(default, deserialize_with = "one")]
    pub policy: Option<PolicyConfig>,
    /// How long SVIDs are valid. Default one hour: long enough to outlive a short outage of the
    /// authority, short enough that a stolen key is soon worthless. At most 30 days: revocations of what
    /// was issued are kept for that long.
    #[serde(default = "default_lifetime", rename = "svidLifetimeSeconds", deserialize_with = "seconds")]
    pub svid_lifetime: Duration,
    /// Where /metrics, /healthz and /readyz are served.
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
}

impl AuthorityConfig {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// One line that names file, field and remedy.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = read_yaml(path)?;
        if config.svid_lifetime < Duration::from_secs(10) {
            return Err(ConfigError::Invalid {
                path: path.into(),
                field: "svidLifetimeSeconds".into(),
                message: "must be at least 10: agents renew at half of it".into(),
            });
        }
        if config.svid_lifetime > MAX_SVID_LIFETIME {
            return Err(ConfigError::Invalid {
                path: path.into(),
                field: "svidLifetimeSeconds".into(),
                message: format!("must be at most {} (30 days)", MAX_SVID_LIFETIME.as_secs()),
            });
        }
        Ok(config)
    }
}

fn default_listen() -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], 15012))
}

fn default_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15014))
}

fn default_lifetime() -> Duration {
    Duration::from_secs(3600)
}
