//! Where SVIDs come from: exactly one issuer, and how to reach it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::{seconds, some_seconds};

/// Where SVIDs come from.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum IssuerConfig {
    /// Hauberk's own authority.
    Authority(AuthorityClientConfig),
    /// A CA that speaks `istio.v1.auth.IstioCertificateService`: istiod, cert-manager's istio-csr.
    Istio(IstioConfig),
    /// A PKI engine of Vault or OpenBao.
    Vault(VaultConfig),
    /// A signer of Kubernetes CertificateSigningRequests.
    Kubernetes(KubernetesIssuerConfig),
    /// Files that somebody else writes and renews.
    Files(FilesConfig),
    /// A SPIRE agent.
    Spire(SpireConfig),
}

/// How to reach the authority.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AuthorityClientConfig {
    /// `host:port` of the authority.
    pub address: String,
    /// PEM roots that the authority itself is verified with, before anything else is trusted.
    pub trust_bundle: PathBuf,
    /// A file with the single-use join token; needed only until the node has its first SVID.
    pub join_token: Option<PathBuf>,
}

/// How to reach an Istio CA.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IstioConfig {
    /// `host:port`, such as `istiod.istio-system.svc:15012`. The server's certificate must be for this host.
    pub address: String,
    /// PEM roots of the mesh; read again when the file changes.
    pub trust_bundle: PathBuf,
    /// PEM roots that the CA's own server is verified with; `trust_bundle` if left out.
    pub server_bundle: Option<PathBuf>,
    /// A projected service-account token of the agent, which the CA must trust as a node's proxy.
    #[serde(default = "istio_token")]
    pub token: PathBuf,
    /// The cluster as the CA knows it.
    #[serde(default = "cluster_id")]
    pub cluster_id: String,
    /// How long SVIDs shall be valid.
    #[serde(default = "day", rename = "lifetimeSeconds", deserialize_with = "seconds")]
    pub lifetime: Duration,
}

/// How to reach Vault.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VaultConfig {
    /// `https://host:port`; `http` only to this machine itself.
    pub address: String,
    /// PEM roots that Vault's own server is verified with.
    pub server_bundle: Option<PathBuf>,
    /// PEM roots of the PKI; read again when the file changes.
    pub trust_bundle: PathBuf,
    /// Where the PKI engine is mounted.
    #[serde(default = "pki")]
    pub mount: String,
    /// The role to sign by; its `allowed_uri_sans` must admit the identities.
    pub role: String,
    /// Vault's namespace, if it has any.
    pub namespace: Option<String>,
    /// How the agent shows who it is.
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub auth: VaultAuth,
    /// How long SVIDs shall be valid; as the role says if left out.
    #[serde(default, rename = "lifetimeSeconds", deserialize_with = "some_seconds")]
    pub lifetime: Option<Duration>,
}

/// How the agent shows Vault who it is.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum VaultAuth {
    /// By a token that somebody else renews; read each time.
    Token {
        /// The token's file.
        file: PathBuf,
    },
    /// By its Kubernetes service account.
    Kubernetes {
        /// Vault's role of that method.
        role: String,
        /// Where the method is mounted.
        #[serde(default = "kubernetes")]
        mount: String,
        /// The service account's token; read each time.
        #[serde(default = "service_account_token")]
        token: PathBuf,
    },
}

/// Which signer of CertificateSigningRequests.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct KubernetesIssuerConfig {
    /// `domain/path`, as the approver and the signer know it.
    pub signer_name: String,
    /// PEM roots that the signer signs under; read again when the file changes.
    pub trust_bundle: PathBuf,
    /// How to reach the API server. Default: as a pod does, with its service account.
    pub kubeconfig: Option<PathBuf>,
    /// How long SVIDs shall be valid; as the signer says if left out. API servers before 1.22 do not know it.
    #[serde(default, rename = "expirationSeconds", deserialize_with = "some_seconds")]
    pub lifetime: Option<Duration>,
    /// How long a request waits to be approved and signed before it is given up, and a new one made later.
    #[serde(default = "minute", rename = "patienceSeconds", deserialize_with = "seconds")]
    pub patience: Duration,
}

/// Where SVIDs lie.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FilesConfig {
    /// A directory: in it or one level below, each `NAME.pem` or `NAME.crt` has a chain, and its key there or
    /// in `NAME.key`. Whose they are is read from the certificates. Read again when a file changes.
    pub directory: PathBuf,
    /// PEM roots; read again when the file changes.
    pub trust_bundle: PathBuf,
}

/// How to reach the node's SPIRE agent.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SpireConfig {
    /// The socket of the Workload API: for the agent's own identity, and the roots.
    pub workload_socket: PathBuf,
    /// The agent's admin socket, which serves the Delegated Identity API: for its workloads' identities.
    pub admin_socket: PathBuf,
    /// Which registration entries a workload's are, as `type:value`.
    #[serde(default = "selectors")]
    pub selectors: Vec<String>,
}

impl IssuerConfig {
    /// The file of the mesh's roots, and the field that names it; `None` where the issuer sends them.
    pub fn trust_bundle(&self) -> Option<(&Path, &'static str)> {
        match self {
            Self::Authority(config) => Some((&config.trust_bundle, "authority.trustBundle")),
            Self::Istio(config) => Some((&config.trust_bundle, "issuer.istio.trustBundle")),
            Self::Vault(config) => Some((&config.trust_bundle, "issuer.vault.trustBundle")),
            Self::Kubernetes(config) => Some((&config.trust_bundle, "issuer.kubernetes.trustBundle")),
            Self::Files(config) => Some((&config.trust_bundle, "issuer.files.trustBundle")),
            Self::Spire(_) => None,
        }
    }

    /// Whether it issues identities of nodes. An Istio CA knows service accounts only: its agents have no
    /// identity of their own, and speak workload scope.
    pub fn issues_nodes(&self) -> bool {
        !matches!(self, Self::Istio(_))
    }

    pub(super) fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        match self {
            Self::Istio(config) if config.lifetime.is_zero() => {
                Err(("issuer.istio.lifetimeSeconds", "must be at least 1"))
            }
            Self::Vault(config) => config.validate(),
            Self::Kubernetes(config) => config.validate(),
            Self::Spire(config) => {
                let good = |selector: &String| {
                    selector
                        .split_once(':')
                        .is_some_and(|(kind, value)| !kind.is_empty() && !value.is_empty())
                };
                if config.selectors.is_empty() || !config.selectors.iter().all(good) {
                    return Err(("issuer.spire.selectors", "give at least one, each as type:value"));
                }
                let of = |part: &str| config.selectors.iter().any(|selector| selector.contains(part));
                if !of("{namespace}") || !of("{serviceAccount}") {
                    // Without them every workload would be given every other's SVIDs to choose from.
                    return Err(("issuer.spire.selectors", "must use {namespace} and {serviceAccount}"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl KubernetesIssuerConfig {
    fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        let named = self.signer_name.split_once('/');
        if !named.is_some_and(|(domain, path)| domain.contains('.') && !path.is_empty()) {
            return Err(("issuer.kubernetes.signerName", "must be domain/path, such as example.com/mesh"));
        }
        if self.signer_name.starts_with("kubernetes.io/") {
            let words = "the cluster's own signers sign no SPIFFE IDs; name another one";
            return Err(("issuer.kubernetes.signerName", words));
        }
        // The API server's own bound.
        if self.lifetime.is_some_and(|lifetime| lifetime < Duration::from_secs(600)) {
            return Err(("issuer.kubernetes.expirationSeconds", "must be at least 600"));
        }
        if self.patience.is_zero() {
            return Err(("issuer.kubernetes.patienceSeconds", "must be at least 1"));
        }
        Ok(())
    }
}

impl VaultConfig {
    fn validate(&self) -> Result<(), (&'static str, &'static str)> {
        const ADDRESS: &str = "issuer.vault.address";
        let uri: http::Uri =
            self.address.parse().map_err(|_| (ADDRESS, "must be https://host:port of the Vault server"))?;
        let host = uri.host().unwrap_or_default();
        if host.is_empty() || uri.path() != "/" || uri.query().is_some() {
            return Err((ADDRESS, "must be https://host:port of the Vault server, without a path"));
        }
        let ip: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
        let is_here = ip.map_or(host == "localhost", |ip| ip.is_loopback());
        match uri.scheme_str() {
            Some("https") if self.server_bundle.is_none() => {
                Err(("issuer.vault.serverBundle", "name the PEM roots that Vault's server is verified with"))
            }
            Some("https") => Ok(()),
            Some("http") if is_here => Ok(()),
            _ => Err((ADDRESS, "must be https; http would show the token to whoever listens")),
        }
    }
}

fn minute() -> Duration {
    Duration::from_secs(60)
}

fn istio_token() -> PathBuf {
    "/var/run/secrets/tokens/istio-token".into()
}

fn service_account_token() -> PathBuf {
    "/var/run/secrets/kubernetes.io/serviceaccount/token".into()
}

fn cluster_id() -> String {
    "Kubernetes".into()
}

fn pki() -> String {
    "pki".into()
}

fn kubernetes() -> String {
    "kubernetes".into()
}

/// As Istio's own proxies ask for.
fn day() -> Duration {
    Duration::from_secs(24 * 3600)
}

fn selectors() -> Vec<String> {
    vec!["k8s:ns:{namespace}".into(), "k8s:sa:{serviceAccount}".into()]
}

#[cfg(test)]
mod tests {
    use crate::config::AgentConfig;

    fn load(issuer: &str) -> Result<AgentConfig, String> {
        let file = std::env::temp_dir().join(format!("hauberk-issuer-{:x}.yaml", fastrand::u64(..)));
        let text = format!("node: n1\ntrustDomain: td.test\ndirectory: {{file: d.yaml}}\n{issuer}\n");
        std::fs::write(&file, text).unwrap();
        let loaded = AgentConfig::load(&file);
        std::fs::remove_file(&file).unwrap();
        loaded.map_err(|error| error.to_string())
    }

    #[test]
    fn each_issuer_is_read_and_the_short_form_is_the_authority() {
        let vault = "address: 'https://vault:8200', serverBundle: v.pem, trustBundle: b.pem, role: mesh";
        for (issuer, kind) in [
            ("authority: {address: 'a:1', trustBundle: b.pem}".to_owned(), "Authority"),
            ("issuer: {authority: {address: 'a:1', trustBundle: b.pem}}".into(), "Authority"),
            ("issuer: {istio: {address: 'istiod:15012', trustBundle: b.pem}}".into(), "Istio"),
            (format!("issuer: {{vault: {{{vault}, auth: {{token: {{file: t}}}}}}}}"), "Vault"),
            (format!("issuer: {{vault: {{{vault}, auth: {{kubernetes: {{role: r}}}}}}}}"), "Vault"),
            ("issuer: {files: {directory: /svids, trustBundle: b.pem}}".into(), "Files"),
            ("issuer: {spire: {workloadSocket: /a, adminSocket: /b}}".into(), "Spire"),
        ] {
            let config = load(&issuer).unwrap();
            assert!(format!("{:?}", config.issuer()).starts_with(kind), "{issuer}");
        }
    }

    #[test]
    fn anything_but_one_usable_issuer_is_refused_by_field() {
        let vault = |address: &str, more: &str| {
            format!(
                "issuer: {{vault: {{address: '{address}', trustBundle: b, role: r, auth: {{token: {{file: t}}}}{more}}}}}"
            )
        };
        for (issuer, names) in [
            (String::new(), "issuer: give exactly one"),
            (
                "authority: {address: a, trustBundle: b}\nissuer: {files: {directory: d, trustBundle: b}}"
                    .into(),
                "issuer: authority: is short",
            ),
            (
                "issuer: {files: {directory: d, trustBundle: b}, spire: {workloadSocket: a, adminSocket: b}}"
                    .into(),
                "issuer",
            ),
            ("issuer: {acme: {}}".into(), "acme"),
            ("issuer: {files: {directory: d, trustBundle: b, key: k}}".into(), "key"),
            (vault("http://vault.example:8200", ""), "issuer.vault.address: must be https"),
            (vault("https://vault.example:8200", ""), "issuer.vault.serverBundle"),
            (vault("https://vault.example:8200/v1", ", serverBundle: s"), "without a path"),
            (
                "issuer: {spire: {workloadSocket: a, adminSocket: b, selectors: ['k8s:ns:{namespace}']}}"
                    .into(),
                "{serviceAccount}",
            ),
        ] {
            let error = load(&issuer).unwrap_err();
            assert!(error.contains(names), "{issuer}: {error}");
        }
        assert!(load(&vault("http://127.0.0.1:8200", "")).is_ok(), "to a proxy on this machine");
    }
}
