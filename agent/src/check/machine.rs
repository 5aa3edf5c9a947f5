//! What the machine offers besides the kernel's features, and whether a configuration fits it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::Found;
use crate::capture::mount;
use crate::config::{AgentConfig, DirectoryConfig, KubernetesConfig, PolicyConfig, PolicyKubernetesConfig};
use crate::directory::{file, kubernetes};
use crate::identity::bundle::TrustBundle;
use crate::mesh_policy::Loaded;
use crate::policy::{self, Policies};
use crate::tls::provider;

/// How long `hauberk check` waits for the API server.
const API_SERVER_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn checks() -> Vec<Found> {
    vec![files(), crypto(), clock()]
}

fn files() -> Found {
    const NAME: &str = "open files";
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= 65_536 => Found::ok(NAME, format!("up to {hard}")),
        Ok((_, hard)) => Found::warn(
            NAME,
            format!("up to {hard}"),
            "each connection needs two: raise LimitNOFILE, or grant CAP_SYS_RESOURCE",
        ),
        Err(error) => Found::warn(NAME, error.to_string(), ""),
    }
}

fn crypto() -> Found {
    const NAME: &str = "crypto acceleration";
    if provider::aes_in_hardware() {
        Found::ok(NAME, "AES and carry-less multiplication; AES-128-GCM is preferred")
    } else {
        Found::warn(
            NAME,
            "no AES instructions; ChaCha20-Poly1305 is preferred",
            "expect a fifth of the throughput",
        )
    }
}

fn clock() -> Found {
    const NAME: &str = "clock";
    // SAFETY: zero is a valid value of every field; mode 0 only reads.
    #[expect(unsafe_code, reason = "adjtimex(2) has no wrapper in our crates")]
    let (state, timex) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut timex), timex)
    };
    let year_2025 = SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_689_600);
    if SystemTime::now() < year_2025 {
        return Found::fail(NAME, "the clock is before 2025", "set it: certificates would not be valid yet");
    }
    if state < 0 || timex.status & libc::STA_UNSYNC != 0 {
        return Found::warn(
            NAME,
            "not synchronised",
            "run chrony or systemd-timesyncd: certificates depend on the time",
        );
    }
    Found::ok(NAME, "synchronised")
}

/// Checks a configuration file and everything it names.
pub(super) fn configuration(path: &Path) -> Vec<Found> {
    let config = match AgentConfig::load(path) {
        Ok(config) => config,
        Err(error) => return vec![Found::fail("configuration", error.to_string(), "correct the file")],
    };
    let mut found = vec![
        Found::ok("configuration", path.display().to_string()),
        directory(&config),
        trust_bundle(&config),
        pods_cgroup(&config),
    ];
    found.extend(policies(&config));
    found
}

fn directory(config: &AgentConfig) -> Found {
    const NAME: &str = "directory";
    let file = match &config.directory {
        DirectoryConfig::File(file) => file,
        DirectoryConfig::Kubernetes(cluster) => return api_server(config, cluster, "directory.kubernetes"),
        DirectoryConfig::Authority(cluster) => return api_server(config, cluster, "directory.authority"),
    };
    // What is wrong with the policies is told beside this.
    let mesh = match &config.policy {
        Some(PolicyConfig::File(file)) => Policies::load(file, config.trust_domain.clone()).ok(),
        _ => None,
    };
    let mesh = mesh.map_or_else(|| Arc::new(Loaded::default()), |policies| policies.mesh().load());
    match file::load(file, &config.trust_domain, &mesh) {
        Ok(directory) => {
            let here = directory.enrolled_on(&config.node).count();
            let all = directory.workloads().count();
            if here == 0 {
                return Found::warn(
                    NAME,
                    format!("{all} workloads, none on node {}", config.node),
                    "is `node` spelt as in the directory?",
                );
            }
            Found::ok(NAME, format!("{all} workloads, {here} on this node"))
        }
        Err(error) => Found::fail(NAME, error.to_string(), "correct the file"),
    }
}

fn api_server(config: &AgentConfig, cluster: &KubernetesConfig, field: &'static str) -> Found {
    const NAME: &str = "API server";
    let asked = ask(async {
        let node = Some(&*config.node);
        let connection = kubernetes::Connection::new(cluster, field, &config.trust_domain, node).await;
        let connection = connection.map_err(|error| error.to_string())?;
        match &config.directory {
            DirectoryConfig::Authority(_) => kubernetes::probe_pods(&connection).await,
            _ => kubernetes::probe(&connection).await,
        }
    });
    match asked {
        Ok(()) => Found::ok(NAME, "answers, and lets this agent read what it needs"),
        Err(error) => Found::fail(NAME, error, format!("correct {field}, or grant what is missing")),
    }
}

fn cluster_policies(config: &PolicyKubernetesConfig) -> Result<String, String> {
    ask(async {
        let connection =
            policy::kubernetes::Connection::new(config).await.map_err(|error| error.to_string())?;
        policy::kubernetes::probe(&connection).await
    })
    .map(|()| "the API server lets this agent read them".into())
}

/// Asks an API server something, and does not wait for ever.
fn ask(what: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| error.to_string())?.block_on(async {
        let asking = tokio::time::timeout(API_SERVER_LIMIT, what);
        asking.await.unwrap_or_else(|_| Err(format!("no answer within {API_SERVER_LIMIT:?}")))
    })
}

fn policies(config: &AgentConfig) -> Option<Found> {
    const NAME: &str = "policies";
    let (found, mend) = match config.policy.as_ref()? {
        PolicyConfig::File(file) => {
            let loaded =
                policy::document::load(file).map(|documents| format!("{} policies", documents.count()));
            (loaded.map_err(|error| error.to_string()), "correct the file")
        }
        PolicyConfig::Kubernetes(config) => {
            (cluster_policies(config), "correct policy.kubernetes, or grant what is missing")
        }
    };
    Some(match found {
        Ok(detail) => Found::ok(NAME, detail),
        Err(error) => Found::fail(NAME, error, mend),
    })
}

fn trust_bundle(config: &AgentConfig) -> Found {
    const NAME: &str = "trust bundle";
    let Some((path, _)) = config.issuer().trust_bundle() else {
        return Found::ok(NAME, "comes from the issuer");
    };
    let read = std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()));
    let bundle = read.and_then(|pem| {
        TrustBundle::from_pem(config.trust_domain.clone(), &pem)
            .map_err(|e| format!("{}: {e}", path.display()))
    });
    let bundle = match bundle {
        Ok(bundle) => bundle,
        Err(error) => {
            return Found::fail(NAME, error, "an authority's is written by `hauberk authority bundle`");
        }
    };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let days = bundle
        .roots()
        .iter()
        .filter_map(|root| X509Certificate::from_der(root).ok())
        .map(|(_, root)| (root.validity().not_after.timestamp() - now as i64) / 86_400)
        .min()
        .unwrap_or(0);
    match days {
        ..=0 => Found::fail(NAME, "a root has expired", "distribute a new bundle"),
        1..60 => Found::warn(NAME, format!("a root expires in {days} days"), "replace it soon"),
        _ => Found::ok(NAME, format!("{} root(s), valid for {days} days", bundle.roots().len())),
    }
}

fn pods_cgroup(config: &AgentConfig) -> Found {
    const NAME: &str = "pods' cgroup";
    if let Some(path) = mount::only_in_v1(&config.capture.cgroup) {
        return Found::fail(
            NAME,
            format!("pods are in cgroup v1 only ({})", path.display()),
            "boot the node with cgroup v2 (kernel argument systemd.unified_cgroup_hierarchy=1)",
        );
    }
    match mount::cgroup_dir(&config.capture.cgroup) {
        Ok(path) if path.join("cgroup.procs").exists() => Found::ok(NAME, path.display().to_string()),
        Ok(path) => Found::fail(
            NAME,
            format!("{} is no cgroup v2", path.display()),
            "set capture.cgroup to the cgroup above all pods",
        ),
        Err(error) => Found::fail(NAME, error.to_string(), "set capture.cgroup"),
    }
}
