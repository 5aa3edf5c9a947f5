//! A real kube-apiserver with its etcd, on node 1 of a world, and what a kubelet and the controllers would
//! have written: there are neither, so tests write pods' addresses and EndpointSlices themselves.
//!
//! RBAC is on. Users have tokens: `admin` may everything, `agent` what the manifest's ClusterRole grants,
//! `stranger` nothing.

use std::fs::OpenOptions;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use serde_json::{Value, json};

use crate::host::Host;
use crate::process::Process;

/// Where the API server listens, on node 1.
const SERVER: &str = "192.168.50.1:6443";
/// A user that may everything.
pub const ADMIN: &str = "admin";
/// A user that may read what the directory needs.
pub const AGENT: &str = "agent";
/// A user that may read nothing.
pub const STRANGER: &str = "stranger";

/// The namespace of the mesh's own objects.
pub const NAMESPACE: &str = "hauberk-system";

/// What directory and policies are read from.
const READ: [(&str, &[&str]); 3] = [
    ("", &["pods", "services", "nodes", "namespaces"]),
    ("discovery.k8s.io", &["endpointslices"]),
    ("hauberk.dev", &["accesspolicies", "meshpolicies"]),
];

/// The API server and its etcd.
#[derive(Debug)]
pub struct Kubernetes {
    dir: PathBuf,
    // The server before what it stores in: fields drop in order.
    server: Option<Process>,
    etcd: Option<Process>,
}

impl Kubernetes {
    /// Starts both on a host, with their files below `dir`, and waits until they are ready.
    ///
    /// # Errors
    /// When one is not installed (`cargo xtask setup`) or does not get ready; with its log.
    pub fn start(host: &Host, dir: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&dir)?;
        certificates(&dir)?;
        let users = [(ADMIN, ",\"system:masters\""), (AGENT, ""), (STRANGER, "")];
        let tokens: String =
            users.iter().map(|(user, group)| format!("{user},{user},{user}{group}\n")).collect();
        std::fs::write(dir.join("tokens.csv"), tokens)?;
        for (user, _) in users {
            std::fs::write(dir.join(format!("{user}.kubeconfig")), kubeconfig(&dir, user))?;
        }
        let mut cluster = Self { dir, server: None, etcd: None };
        cluster.etcd = Some(cluster.spawn(host, "etcd", "etcd", &cluster.etcd_args())?);
        // Not that it asks for it, but a first write that waits for etcd takes seconds.
        host.wait_listening("127.0.0.1:2379".parse()?).with_context(|| cluster.log("etcd"))?;
        cluster.start_server(host)?;
        cluster.create_roles(host)?;
        Ok(cluster)
    }

    fn etcd_args(&self) -> Vec<String> {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        vec![
            format!("--data-dir={}", self.dir.join("etcd").display()),
            format!("--listen-client-urls={}", url(2379)),
            format!("--advertise-client-urls={}", url(2379)),
            format!("--listen-peer-urls={}", url(2380)),
            "--log-level=error".into(),
        ]
    }

    /// Starts the API server on what etcd holds, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not get ready; with its log.
    pub fn start_server(&mut self, host: &Host) -> Result<()> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let address: SocketAddr = SERVER.parse()?;
        let args = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--bind-address={}", address.ip()),
            format!("--advertise-address={}", address.ip()),
            format!("--secure-port={}", address.port()),
            format!("--cert-dir={}", self.dir.display()),
            format!("--tls-cert-file={}", file("server.pem")),
            format!("--tls-private-key-file={}", file("server.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", file("accounts.pub")),
            format!("--service-account-signing-key-file={}", file("server.key")),
            "--service-cluster-ip-range=10.96.0.0/16,fd96::/112".into(),
            "--authorization-mode=RBAC".into(),
            "--anonymous-auth=false".into(),
            format!("--token-auth-file={}", file("tokens.csv")),
            // Without a controller manager there are no service accounts to be admitted with.
            "--disable-admission-plugins=ServiceAccount".into(),
            "--feature-gates=IPv6DualStack=true,EndpointSliceTerminatingCondition=true".into(),
        ];
        self.server = Some(self.spawn(host, "kube-apiserver", &installed()?, &args)?);
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            if !self.server.as_mut().is_some_and(Process::runs) {
                bail!("kube-apiserver has ended:\n{}", self.log("kube-apiserver"));
            }
            if self.curl(host, "GET", "/readyz", "", "").is_ok_and(|body| body == "ok") {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("kube-apiserver did not get ready:\n{}", self.log("kube-apiserver"))
    }

    /// Kills the API server; etcd keeps what it knew.
    pub fn stop_server(&mut self) {
        self.server = None;
    }

    fn spawn<S: AsRef<std::ffi::OsStr>>(
        &self,
        host: &Host,
        name: &str,
        program: &str,
        args: &[S],
    ) -> Result<Process> {
        let mut command = host.command(program, args)?;
        let log = OpenOptions::new().create(true).append(true).open(self.dir.join(format!("{name}.log")))?;
        command.stdout(Stdio::null()).stderr(log).current_dir(&self.dir);
        Process::spawn(command)
    }

    fn log(&self, name: &str) -> String {
        let log = std::fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// A user's kubeconfig.
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.dir.join(format!("{user}.kubeconfig"))
    }

    fn create_roles(&self, host: &Host) -> Result<()> {
        let rules: Vec<Value> = READ
            .iter()
            .map(|(group, resources)| json!({"apiGroups": [group], "resources": resources, "verbs": ["get", "list", "watch"]}))
            .collect();
        let write = json!([
            {"apiGroups": ["hauberk.dev"], "resources": ["accesspolicies/status", "meshpolicies/status"], "verbs": ["patch"]},
            {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["list", "create", "patch"]},
        ]);
        let rules: Vec<Value> =
            rules.into_iter().chain(write.as_array().cloned().unwrap_or_default()).collect();
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.apply(host, &format!("/api/v1/namespaces/{NAMESPACE}"), &namespace)?;
        let path = "/apis/rbac.authorization.k8s.io/v1";
        let api = "rbac.authorization.k8s.io/v1";
        let role = json!({"apiVersion": api, "kind": "ClusterRole", "metadata": {"name": "hauberk"}, "rules": rules});
        self.apply(host, &format!("{path}/clusterroles/hauberk"), &role)?;
        self.grant(host, true)
    }

    /// Grants the agents' user what it needs, or takes it away.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn grant(&self, host: &Host, may_read: bool) -> Result<()> {
        let path = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/hauberk";
        if !may_read {
            return self.delete(host, path);
        }
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": "hauberk"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "hauberk"},
            "subjects": [{"kind": "User", "name": AGENT, "apiGroup": "rbac.authorization.k8s.io"}],
        });
        self.apply(host, path, &binding).map(drop)
    }

    /// Makes an object, or changes the one that is there; what it is then.
    ///
    /// # Errors
    /// With what the API server said.
    pub fn apply(&self, host: &Host, path: &str, object: &Value) -> Result<Value> {
        let (collection, _) = path.rsplit_once('/').context("a path has a collection")?;
        let made = self.ask(host, "POST", collection, "application/json", &object.to_string());
        match made {
            Err(error) if error.to_string().contains("already exists") => self.patch(host, path, object),
            made => made,
        }
    }

    /// Runs kubectl as the administrator; what it printed.
    ///
    /// # Errors
    /// When it is not installed (`cargo xtask setup`), or with what it complained of.
    pub fn kubectl(&self, host: &Host, args: &[&str]) -> Result<String> {
        let kubeconfig = self.kubeconfig(ADMIN).display().to_string();
        let said = host.run(&kubectl()?, &[&["--kubeconfig", &kubeconfig], args].concat())?.ok();
        said.with_context(|| format!("kubectl {}", args.join(" ")))
    }

    /// Defines the kinds of `manifests/crds`, and waits until they are served.
    ///
    /// # Errors
    /// When the API server refuses them.
    pub fn define_policies(&self, host: &Host) -> Result<()> {
        let crds = repository().join("manifests/crds").display().to_string();
        self.kubectl(host, &["apply", "--server-side", "--validate=false", "-k", &crds])?;
        let definitions = ["crd/accesspolicies.hauberk.dev", "crd/meshpolicies.hauberk.dev"];
        let wait = ["wait", "--for=condition=Established", "--timeout=60s"];
        self.kubectl(host, &[&wait[..], &definitions].concat()).map(drop)
    }

    /// Reads an object.
    ///
    /// # Errors
    /// With what the API server said.
    pub fn get(&self, host: &Host, path: &str) -> Result<Value> {
        self.ask(host, "GET", path, "application/json", "")
    }

    /// Changes fields of an object, or with `/status` after its path of its status.
    ///
    /// # Errors
    /// With what the API server said.
    pub fn patch(&self, host: &Host, path: &str, change: &Value) -> Result<Value> {
        self.ask(host, "PATCH", path, "application/merge-patch+json", &change.to_string())
    }

    /// Deletes an object at once.
    ///
    /// # Errors
    /// With what the API server said.
    pub fn delete(&self, host: &Host, path: &str) -> Result<()> {
        self.ask(host, "DELETE", &format!("{path}?gracePeriodSeconds=0"), "application/json", "").map(drop)
    }

    /// Asks the API server as the administrator.
    ///
    /// # Errors
    /// With what it said.
    pub fn ask(&self, host: &Host, method: &str, path: &str, kind: &str, body: &str) -> Result<Value> {
        let text = self.curl(host, method, path, kind, body)?;
        let answer: Value =
            serde_json::from_str(&text).with_context(|| format!("{method} {path}: {text}"))?;
        if answer["kind"] == "Status" && answer["status"] == "Failure" {
            bail!("{method} {path}: {}", answer["message"]);
        }
        Ok(answer)
    }

    fn curl(&self, host: &Host, method: &str, path: &str, kind: &str, body: &str) -> Result<String> {
        let (authorization, url) =
            (format!("Authorization: Bearer {ADMIN}"), format!("https://{SERVER}{path}"));
        let (ca, kind) = (self.dir.join("server.pem").display().to_string(), format!("Content-Type: {kind}"));
        let args =
            ["-sS", "--cacert", &ca, "-H", &authorization, "-H", &kind, "-X", method, "-d", body, &url];
        let said = host.run("curl", &args)?.ok();
        said.with_context(|| format!("{method} {path}\n{}", self.log("kube-apiserver")))
    }
}

/// The server's certificate, and the key of service accounts' tokens, which nobody uses.
fn certificates(dir: &Path) -> Result<()> {
    let address: SocketAddr = SERVER.parse()?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = CertificateParams::new(vec![address.ip().to_string()])?.self_signed(&key)?;
    std::fs::write(dir.join("server.pem"), certificate.pem())?;
    std::fs::write(dir.join("server.key"), key.serialize_pem())?;
    Ok(std::fs::write(dir.join("accounts.pub"), key.public_key_pem())?)
}

fn kubeconfig(dir: &Path, user: &str) -> String {
    let ca = dir.join("server.pem");
    format!(
        "apiVersion: v1
kind: Config
current-context: test
clusters: [{{name: test, cluster: {{server: 'https://{SERVER}', certificate-authority: {}}}}}]
users: [{{name: {user}, user: {{token: {user}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {user}}}}}]
",
        ca.display()
    )
}

/// The repository's top.
pub fn repository() -> PathBuf {
    // tests/ lies right below it.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// kubectl, where `cargo xtask setup` puts it.
///
/// # Errors
/// When it is not there.
pub fn kubectl() -> Result<String> {
    tool("kubectl")
}

fn installed() -> Result<String> {
    tool("kube-apiserver")
}

/// Where `cargo xtask setup` puts a program.
fn tool(name: &str) -> Result<String> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")));
    let path = cache.context("neither XDG_CACHE_HOME nor HOME is set")?.join("hauberk/bin").join(name);
    anyhow::ensure!(path.is_file(), "{} is not there; run `cargo xtask setup`", path.display());
    Ok(path.to_string_lossy().into_owned())
}
