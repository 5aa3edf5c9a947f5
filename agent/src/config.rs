//! The agent's configuration file: one struct, each default with its reason.
//!
//! Unknown fields are errors, so a misspelt one cannot silently mean its default.

pub mod federation;
pub mod issuer;
pub mod watch;

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::identity::TrustDomain;
use federation::FederationConfig;
use issuer::AuthorityClientConfig;
pub use issuer::IssuerConfig;

/// A larger file is refused before it is parsed: libyaml is not asked to read what nobody wrote.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a configuration is not usable. Each message names the file.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than 1 MiB.
    #[error("{} is larger than 1 MiB, which no configuration is", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not YAML, or not this YAML.
    #[error("{}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The parser's words: field, line, column.
        message: String,
    },
    /// A value that cannot work.
    #[error("{}: {field}: {message}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The field, by its path in the file.
        field: String,
        /// What is wrong and what to write instead.
        message: String,
    },
}

/// Where in a file, and what is wrong there.
pub type Fault = (String, String);

impl ConfigError {
    /// A value that cannot work, in this file.
    pub(crate) fn invalid(path: &Path, (field, message): Fault) -> Self {
        Self::Invalid { path: path.into(), field, message }
    }
}

/// Reads and parses a YAML file, with its size bounded.
///
/// # Errors
/// When the file cannot be read, is too large, or does not parse; the message names it.
pub fn read_yaml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = read_text(path)?;
    serde_yaml::from_str(&text).map_err(|e| ConfigError::Parse { path: path.into(), message: e.to_string() })
}

/// Reads a text file, with its size bounded.
///
/// # Errors
/// When the file cannot be read or is too large; the message names it.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    let read = |source| ConfigError::Read { path: path.into(), source };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
        return Err(ConfigError::TooLarge { path: path.into() });
    }
    std::fs::read_to_string(path).map_err(read)
}

/// `hauberk agent --config FILE`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AgentConfig {
    /// This node's name, as the directory writes it. The environment's `HAUBERK_NODE` comes before it: one file
    /// serves a whole DaemonSet.
    #[serde(default)]
    pub node: String,
    /// The trust domain every local identity is in.
    pub trust_domain: TrustDomain,
    /// Other names of the trust domain: their identities are taken for those of our own.
    #[serde(default)]
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Other trust domains, where the issuer does not say: the authority does.
    pub federation: Option<FederationConfig>,
    /// Where workloads are known from.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub directory: DirectoryConfig,
    /// Where access and mesh policies are read from. Without it there are none: every identity of the trust
    /// domain may reach every workload.
    #[serde(default, deserialize_with = "one")]
    pub policy: Option<PolicyConfig>,
    /// Where SVIDs come from: short for `issuer.authority`.
    authority: Option<AuthorityClientConfig>,
    /// Where SVIDs come from.
    #[serde(default, deserialize_with = "one")]
    issuer: Option<IssuerConfig>,
    /// How long an outage of the issuer the mesh shall outlive: SVIDs are renewed while at least this much
    /// of their life is left.
    #[serde(default, rename = "availabilityTargetSeconds", deserialize_with = "some_seconds")]
    pub availability_target: Option<Duration>,
    /// What other CAs than the authority have revoked.
    #[serde(default)]
    pub revocation: RevocationConfig,
    /// For the admin socket and the node's own SVID. Must be on a tmpfs for the latter: keys never
    /// touch a disk.
    #[serde(default = "default_runtime_dir")]
    pub runtime_dir: PathBuf,
    /// What is captured, and how.
    #[serde(default)]
    pub capture: CaptureConfig,
    /// Timeouts and limits of the tunnel.
    #[serde(default)]
    pub tunnel: TunnelConfig,
    /// Health probes that may stay plaintext in strict mode.
    #[serde(default)]
    pub probes: ProbesConfig,
    /// Where /metrics, /healthz and /readyz are served. The environment's `HAUBERK_ADMIN` comes before it.
    #[serde(default = "default_admin")]
    pub admin: SocketAddr,
    /// Data-path threads. Default: one per core, at most 8; each has its own listeners and pool;
    /// between busy nodes more threads mean more connections.
    pub workers: Option<usize>,
    /// How long a graceful stop waits for open connections. Default 30 s: Kubernetes' own patience.
    #[serde(default = "default_drain", rename = "drainSeconds", deserialize_with = "seconds")]
    pub drain: Duration,
}

/// Where workloads are known from: exactly one of these.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DirectoryConfig {
    /// A YAML file; reloaded when it changes.
    File(PathBuf),
    /// The API server of the cluster.
    Kubernetes(KubernetesConfig),
    /// The authority, for all but the node's own pods: these come from the API server of the cluster.
    Authority(KubernetesConfig),
}

impl DirectoryConfig {
    /// The cluster whose API server tells at least of the node's own pods, and the field that names it.
    pub fn cluster(&self) -> Option<(&KubernetesConfig, &'static str)> {
        match self {
            Self::File(_) => None,
            Self::Kubernetes(cluster) => Some((cluster, "directory.kubernetes")),
            Self::Authority(cluster) => Some((cluster, "directory.authority")),
        }
    }
}

/// Which cluster, and who in it is in the mesh.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubernetesConfig {
    /// How to reach the API server. Default: as a pod does, with its service account.
    pub kubeconfig: Option<PathBuf>,
    /// The mode of pods without a label, in namespaces without one. Default off: whoever installs this
    /// labels what shall be in the mesh, and cuts nobody off by installing it.
    pub default_mode: Mode,
    /// Namespaces whose pods are never in the mesh. Default: `kube-system`, which the cluster needs to come
    /// up, and the agent's own.
    pub excluded_namespaces: Option<Vec<String>>,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self { kubeconfig: None, default_mode: Mode::Off, excluded_namespaces: None }
    }
}

/// How a workload's plaintext is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Only mutual TLS, in both directions; plaintext is refused.
    #[default]
    Strict,
    /// Mutual TLS with mesh members; plaintext from outside is accepted and counted.
    Permissive,
    /// Not part of the mesh.
    Off,
}

/// Where policies are read from: exactly one of these.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PolicyConfig {
    /// A YAML file of AccessPolicy and MeshPolicy documents; reloaded when it changes.
    File(PathBuf),
    /// The API server of the cluster.
    Kubernetes(PolicyKubernetesConfig),
}

/// Which cluster policies are read from.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PolicyKubernetesConfig {
    /// How to reach the API server. Default: as a pod does, with its service account.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the mesh's own objects, where each agent says in a Lease what it has applied. Default:
    /// the pod's own, or `hauberk-system`.
    pub namespace: Option<String>,
}

/// Reads `field: {KIND: {...}}`.
pub(crate) fn one<'de, D: serde::Deserializer<'de>, T: DeserializeOwned>(
    d: D,
) -> Result<Option<T>, D::Error> {
    serde_yaml::with::singleton_map::deserialize(d).map(Some)
}

/// What other CAs than the authority have revoked.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RevocationConfig {
    /// Certificate revocation lists, one for each issuer.
    pub crls: Vec<CrlConfig>,
}

/// A certificate revocation list.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CrlConfig {
    /// PEM or DER; read again when it changes.
    pub file: PathBuf,
    /// PEM certificate of the CA that issues the list, if that is no root of the trust bundle.
    pub issuer: Option<PathBuf>,
    /// How long after its nextUpdate a list is still answered by. Default 0: whoever configures a list wants to
    /// know what is revoked.
    #[serde(default, rename = "graceSeconds", deserialize_with = "seconds")]
    pub grace: Duration,
}

/// What is captured, and how.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CaptureConfig {
    /// The cgroup (v2) above all pods of this node. Relative paths are below the cgroup v2 mount,
    /// wherever that is.
    pub cgroup: PathBuf,
    /// A directory on a bpffs, where programs and maps stay while the agent is away.
    pub bpffs: PathBuf,
    /// Ports of the agent's outbound listeners inside each pod. Two, because all outbound
    /// connections of a pod share a listener's address, and one port has room for 28,000.
    pub ports: Vec<u16>,
    /// What permissive workloads' connections meet while no agent runs. Strict ones are refused.
    pub permissive_when_down: WhenDown,
    /// Whether a pod may be enrolled without the egress guard (which needs Linux 6.6).
    pub egress_guard: Guard,
    /// Where pods may connect to after `hauberk guard`, until an agent knows the mesh: besides the API
    /// server that the directory is read from, and DNS.
    pub reachable: Vec<Reachable>,
}

impl Default for CaptureConfig {
    fn default() -> Self {
        Self {
            cgroup: "kubepods".into(),
            bpffs: "/sys/fs/bpf/hauberk".into(),
            ports: vec![15001, 15002],
            permissive_when_down: WhenDown::Open,
            egress_guard: Guard::Require,
            reachable: Vec::new(),
        }
    }
}

/// `address:port`, an address with every port, or `:port` at every address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Reachable {
    /// The address; every one if none is given.
    pub address: Option<IpAddr>,
    /// The port; every one if none is given.
    pub port: Option<u16>,
}

impl TryFrom<String> for Reachable {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
        let whole = text.parse::<SocketAddr>().ok().filter(|address| address.port() != 0);
        let parsed = match (whole, text.strip_prefix(':')) {
            (Some(address), _) => Some((Some(address.ip().to_canonical()), Some(address.port()))),
            (None, Some(rest)) => port(rest).map(|port| (None, Some(port))),
            (None, None) => text.parse::<IpAddr>().ok().map(|ip| (Some(ip.to_canonical()), None)),
        };
        let (address, port) =
            parsed.ok_or_else(|| format!("{text:?} must be ADDRESS:PORT, ADDRESS or :PORT"))?;
        Ok(Self { address, port })
    }
}

/// What permissive connections meet while no agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenDown {
    /// They go out in plaintext, as from a pod outside the mesh.
    Open,
    /// They are refused.
    Closed,
}

/// Whether the egress guard is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guard {
    /// A strict pod without it is not enrolled (and so not served).
    Require,
    /// Without it, a process that was moved into the pod's cgroup from outside may send plaintext.
    Optional,
}

/// Timeouts and limits of the tunnel.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct TunnelConfig {
    /// HBONE's port.
    pub port: u16,
    /// TCP connect to a peer. Default 3 s: a node that does not answer in three retransmissions is
    /// down, and the application learns it by a reset.
    #[serde(rename = "connectTimeoutMs", deserialize_with = "milliseconds")]
    pub connect_timeout: Duration,
    /// TLS handshake, on both sides; in node scope also a destination's first proof. Default 5 s.
    #[serde(rename = "handshakeTimeoutMs", deserialize_with = "milliseconds")]
    pub handshake_timeout: Duration,
    /// A pooled connection without streams is closed after this. Default 300 s.
    #[serde(rename = "idleTimeoutSeconds", deserialize_with = "seconds")]
    pub idle_timeout: Duration,
    /// How long open streams may outlive the certificates of their connection, from when the first of the two
    /// expires. From then on it takes no new streams; at the end of this time those that are left are cut. Default
    /// a day: what is renewed is made anew long before, and few applications hold a connection for longer.
    #[serde(rename = "outliveSvidSeconds", deserialize_with = "seconds")]
    pub outlive: Duration,
    /// Most streams on one connection before another is dialled.
    pub max_streams: u32,
    /// HTTP/2 window of one stream, in bytes: the most a stalled reader makes the agent hold. Room is
    /// given back by halves of it, so a bulk stream needs several times the bytes in flight.
    pub stream_window: u32,
    /// Handshakes under way at once that an agent accepts; more wait in the kernel's backlog.
    pub max_handshakes: usize,
    /// Nodes that a starting agent connects to before anybody needs them: those it spoke to last, then the
    /// nearest. Default 32; 0 for none.
    pub warm_nodes: u16,
    /// Whether TLS sessions are resumed, on both sides. Default true: a resumed session's peer is
    /// judged as in a full handshake, without the signatures.
    pub resumption: bool,
    /// Whether the kernel seals and opens records, where it can. Default false: not measured to help.
    pub kernel_tls: bool,
}

impl Default for TunnelConfig {
    fn default() -> Self {
        Self {
            port: 15008,
            connect_timeout: Duration::from_secs(3),
            handshake_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(300),
            outlive: Duration::from_secs(24 * 3600),
            max_streams: 4096,
            stream_window: 8 << 20,
            max_handshakes: 512,
            warm_nodes: 32,
            resumption: true,
            kernel_tls: false,
        }
    }
}

/// Health probes that may stay plaintext in strict mode.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProbesConfig {
    /// Addresses of probes that are not the kubelet's own.
    pub exempt: Vec<IpAddr>,
    /// The kubelet's cgroup (v2), by whose sockets its probes are known. Default, with a directory from
    /// Kubernetes: that of the node's process of this name.
    pub kubelet_cgroup: Option<PathBuf>,
}

impl AgentConfig {
    /// Reads and checks the file.
    ///
    /// # Errors
    /// One line that names file, field and remedy.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read_yaml(path)?;
        if let Some(node) = from_environment("HAUBERK_NODE")? {
            config.node = node;
        }
        if let Some(admin) = from_environment("HAUBERK_ADMIN")? {
            config.admin = admin;
        }
        config
            .settle_issuer()
            .and_then(|()| config.validate())
            .map_err(|(field, message)| ConfigError::invalid(path, (field.into(), message.into())))?;
        let federation = config.federation.as_ref().map_or(Ok(()), |it| it.check(&config.trust_domain));
        federation.map_err(|fault| ConfigError::invalid(path, fault))?;
        Ok(config)
    }

    /// Where SVIDs come from.
    pub fn issuer(&self) -> &IssuerConfig {
        // `load` is the only maker, and refuses a file without one.
        #[expect(clippy::expect_used, reason = "load leaves one there")]
        self.issuer.as_ref().expect("an issuer")
    }

    /// One way to say it from here on.
    fn settle_issuer(&mut self) -> Result<(), (&'static str, &'static str)> {
        const ONE: &str = "give exactly one of authority, istio, vault, kubernetes, files and spire below it";
        self.issuer = match (self.authority.take(), self.issuer.take()) {
            (Some(authority), None) => Some(IssuerConfig::Authority(authority)),
            (None, Some(issuer)) => Some(issuer),
            (Some(_), Some(_)) => {
                return Err(("issuer", "authority: is short for issuer.authority: give one of them"));
            }
            (None, None) => return Err(("issuer", ONE)),
        };
        self.issuer().validate()
    }

    fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        let ports = &self.capture.ports;
        if self.node.is_empty() || self.node.contains('/') {
            return Err(("node", "must be the node's name, without '/'; or set HAUBERK_NODE"));
        }
        if self.trust_domain_aliases.contains(&self.trust_domain) {
            return Err(("trustDomainAliases", "names other than trustDomain's own"));
        }
        if self.federation.is_some()
            && matches!(self.issuer(), IssuerConfig::Authority(_) | IssuerConfig::Spire(_))
        {
            return Err((
                "federation",
                "the authority, or SPIRE, sends other trust domains' bundles; name them there",
            ));
        }
        if ports.is_empty() || ports.len() > ebpf::MAX_LISTENER_PORTS {
            return Err(("capture.ports", "give one to four ports"));
        }
        if ports.iter().any(|p| *p == 0 || *p == self.tunnel.port) {
            return Err(("capture.ports", "must not be 0 or the tunnel's port"));
        }
        if self.workers == Some(0) {
            return Err(("workers", "must be at least 1; leave it out for one per core"));
        }
        if self.tunnel.stream_window < 65_535 || self.tunnel.stream_window > i32::MAX as u32 {
            return Err(("tunnel.streamWindow", "must be between 65535 and 2147483647"));
        }
        if self.tunnel.max_streams == 0 || self.tunnel.max_handshakes == 0 {
            return Err(("tunnel", "maxStreams and maxHandshakes must be at least 1"));
        }
        Ok(())
    }
}

/// What the environment says instead of a file, if it says anything.
fn from_environment<T: FromStr<Err: Display>>(name: &str) -> Result<Option<T>, ConfigError> {
    let Ok(text) = std::env::var(name) else { return Ok(None) };
    let invalid = |error: T::Err| ConfigError::Invalid {
        path: "the environment".into(),
        field: name.into(),
        message: format!("{text:?}: {error}"),
    };
    text.parse().map(Some).map_err(invalid)
}

fn default_runtime_dir() -> PathBuf {
    "/run/hauberk".into()
}

fn default_admin() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15020))
}

fn default_drain() -> Duration {
    Duration::from_secs(30)
}

/// Deserialises whole seconds.
pub(crate) fn seconds<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    u64::deserialize(d).map(Duration::from_secs)
}

/// Deserialises whole seconds, if any are given.
pub(crate) fn some_seconds<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Duration>, D::Error> {
    seconds(d).map(Some)
}

/// Deserialises whole milliseconds.
pub(crate) fn milliseconds<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    u64::deserialize(d).map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Holder {
        #[serde(with = "serde_yaml::with::singleton_map")]
        directory: DirectoryConfig,
    }

    fn parse(text: &str) -> Result<DirectoryConfig, String> {
        serde_yaml::from_str::<Holder>(text).map(|it| it.directory).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_reachable_is_an_address_a_port_or_both() {
        let parse = |text: &str| Reachable::try_from(text.to_owned());
        let ip = |text: &str| Some(text.parse().unwrap());
        let of = |address, port| Ok(Reachable { address, port });
        assert_eq!(parse("10.96.0.1:443"), of(ip("10.96.0.1"), Some(443)));
        assert_eq!(parse("[fd00::1]:443"), of(ip("fd00::1"), Some(443)));
        assert_eq!(parse(":15012"), of(None, Some(15012)));
        assert_eq!(parse("fd00::1"), of(ip("fd00::1"), None));
        for bad in ["", ":", ":0", "10.0.0.1:0", "api.example:443", ":99999"] {
            parse(bad).expect_err(bad);
        }
    }

    #[test]
    fn the_directory_is_a_file_or_a_cluster_and_not_both_or_neither() {
        assert!(matches!(parse("directory: {file: /d.yaml}"), Ok(DirectoryConfig::File(_))));
        let defaults = parse("directory: {kubernetes: {}}").unwrap();
        let DirectoryConfig::Kubernetes(cluster) = defaults else { panic!("{defaults:?}") };
        assert_eq!((cluster.default_mode, cluster.kubeconfig), (Mode::Off, None));
        let told = parse("directory: {authority: {defaultMode: strict}}").unwrap();
        let DirectoryConfig::Authority(cluster) = told else { panic!("{told:?}") };
        assert_eq!(cluster.default_mode, Mode::Strict);
        for bad in [
            "directory: {file: /d.yaml, kubernetes: {}}",
            "directory: {}",
            "directory: {authority: {}, kubernetes: {}}",
            "directory: {kubernetes: {defaultMode: Strict}}",
            "directory: {kubernetes: {kubeconfi: x}}",
        ] {
            parse(bad).expect_err(bad);
        }
    }
}
