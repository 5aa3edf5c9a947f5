//! The authority's configuration file.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::config::federation::{FederatedConfig, FederationConfig};
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
    /// An intermediate CA that signs in place of a root made here, and its root, the only one that is trusted.
    pub issuer: Option<SuppliedIssuer>,
    /// When the root is changed without being asked to. Default: never.
    pub root_rotation: Option<RootRotation>,
    /// Other trust domains, and where they find this one's bundle.
    #[serde(default)]
    pub federation: AuthorityFederation,
    /// Where /metrics, /healthz and /readyz are served.
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
}

/// Other trust domains, and where they find this one's bundle.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AuthorityFederation {
    trust_domains: Vec<FederatedConfig>,
    /// Where this trust domain's own bundle is served. Default: nowhere.
    pub bundle_endpoint: Option<BundleEndpoint>,
}

impl AuthorityFederation {
    /// The other trust domains.
    pub fn others(&self) -> FederationConfig {
        FederationConfig { trust_domains: self.trust_domains.clone() }
    }
}

/// A SPIFFE bundle endpoint: by the profile `https_spiffe` as the authority itself, or by `https_web` with a
/// certificate of the Web PKI.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct BundleEndpoint {
    /// Where it listens.
    pub listen: SocketAddr,
    /// With `https_web`: the certificate and those above it (PEM); read again when it changes.
    pub certificate: Option<PathBuf>,
    /// Its key (PEM).
    pub key: Option<PathBuf>,
    /// How often others are told to look again. Default five minutes, as the specification has it.
    #[serde(default = "default_refresh", rename = "refreshHintSeconds", deserialize_with = "seconds")]
    pub refresh_hint: Duration,
}

/// The files (PEM) of an intermediate CA.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SuppliedIssuer {
    /// Its certificate, then those between it and the root.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The root.
    pub root: PathBuf,
}

/// When the root is changed; whichever is first.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RootRotation {
    /// When it has signed for so many days.
    pub every_days: Option<u64>,
    /// When it has so few days left.
    #[serde(default = "default_days_left")]
    pub days_left: u64,
}

impl RootRotation {
    /// Whether a root that signs since then, until then, is due. All in Unix seconds.
    pub fn is_due(&self, since: u64, until: u64, now: u64) -> bool {
        const DAY: u64 = 24 * 3600;
        let old = self.every_days.is_some_and(|days| since + days * DAY <= now);
        old || until <= now + self.days_left * DAY
    }
}

impl AuthorityConfig {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// One line that names file, field and remedy.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = read_yaml(path)?;
        let invalid = |field: &str, message: String| {
            Err(ConfigError::Invalid { path: path.into(), field: field.into(), message })
        };
        if config.svid_lifetime < Duration::from_secs(10) {
            return invalid("svidLifetimeSeconds", "must be at least 10: agents renew at half of it".into());
        }
        if config.svid_lifetime > MAX_SVID_LIFETIME {
            let most = MAX_SVID_LIFETIME.as_secs();
            return invalid("svidLifetimeSeconds", format!("must be at most {most} (30 days)"));
        }
        let checked = config.federation.others().check(&config.trust_domain);
        checked.map_err(|fault| ConfigError::invalid(path, fault))?;
        if let Some(endpoint) = &config.federation.bundle_endpoint {
            if endpoint.certificate.is_some() != endpoint.key.is_some() {
                let words = "give certificate and key (https_web), or neither (https_spiffe)";
                return invalid("federation.bundleEndpoint", words.into());
            }
            if endpoint.refresh_hint.is_zero() {
                return invalid("federation.bundleEndpoint.refreshHintSeconds", "must be at least 1".into());
            }
        }
        if let Some(schedule) = &config.root_rotation {
            if config.issuer.is_some() {
                let words = "cannot be with `issuer`: the authority makes no root then; supply the next one and run `hauberk authority rotate-root`";
                return invalid("rootRotation", words.into());
            }
            if schedule.every_days.is_some_and(|days| !(1..=3650).contains(&days)) {
                return invalid("rootRotation.everyDays", "must be 1 to 3650".into());
            }
            // Roots made here live for ten years.
            if schedule.days_left > 1825 {
                return invalid("rootRotation.daysLeft", "must be at most 1825".into());
            }
        }
        Ok(config)
    }

    /// Where a running authority answers the operator's commands.
    pub fn socket(&self) -> PathBuf {
        self.state_dir.join("admin.sock")
    }
}

fn default_days_left() -> u64 {
    365
}

fn default_refresh() -> Duration {
    Duration::from_secs(300)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn load(more: &str) -> Result<AuthorityConfig, String> {
        let path = std::env::temp_dir().join(format!("hauberk-authority-{:x}.yaml", fastrand::u64(..)));
        let text = format!("trustDomain: td.test\nstateDir: /s\ndirectory: {{file: /d}}\n{more}");
        std::fs::write(&path, text).unwrap();
        let loaded = AuthorityConfig::load(&path).map_err(|e| e.to_string());
        std::fs::remove_file(&path).unwrap();
        loaded
    }

    #[test]
    fn a_schedule_is_for_roots_that_are_made_here() {
        assert!(load("").unwrap().root_rotation.is_none());
        let schedule = load("rootRotation: {everyDays: 90}").unwrap().root_rotation.unwrap();
        let (day, far) = (24 * 3600, u64::MAX / 2);
        assert!(!schedule.is_due(0, far, 89 * day) && schedule.is_due(0, far, 90 * day));
        assert!(!schedule.is_due(0, 366 * day, 0) && schedule.is_due(0, 365 * day, 0));
        let both = "issuer: {certificate: /c, key: /k, root: /r}\nrootRotation: {}";
        assert!(load(both).unwrap_err().contains("rootRotation"));
        assert!(load("rootRotation: {everyDays: 0}").unwrap_err().contains("rootRotation.everyDays"));
        assert!(load("rootRotation: {often: 1}").is_err());
        assert!(load("issuer: {certificate: /c, key: /k}").unwrap_err().contains("root"));
    }

    #[test]
    fn a_bundle_endpoint_has_a_whole_certificate_or_the_authority_s_own() {
        let load =
            |more: &str| load(&format!("federation: {{bundleEndpoint: {{listen: '127.0.0.1:8443'{more}}}}}"));
        let endpoint = load("").unwrap().federation.bundle_endpoint.unwrap();
        assert_eq!(endpoint.refresh_hint, Duration::from_secs(300));
        load(", certificate: /c, key: /k").unwrap();
        assert!(load(", certificate: /c").unwrap_err().contains("federation.bundleEndpoint"));
        assert!(load(", refreshHintSeconds: 0").unwrap_err().contains("refreshHintSeconds"));
    }
}
