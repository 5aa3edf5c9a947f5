//! Hears of every change in the cluster, for as long as the agent lives.
//!
//! Each kind is listed in pages and then watched, with bookmarks; a stream that breaks is taken up where it
//! was, one that is too old is listed anew. While the API server is away the directory stays as it was.
//! What comes within [`BATCH`] becomes one new state.

use std::collections::HashSet;
use std::fmt::Debug;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt};
use http::Uri;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Config, Error, Resource};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, sleep_until};

use super::cluster::{Cluster, Rules, Update};
use super::objects::{Kind, Namespace, Node, Pod, Service, Slice};
use crate::config::KubernetesConfig;
use crate::directory::{Live, Standing};
use crate::identity::TrustDomain;
use crate::mesh_policy::MeshPolicies;

/// How long a change may wait for others. A new pod takes longer than that to start.
pub(crate) const BATCH: Duration = Duration::from_millis(100);
/// How long to wait before the API server is asked again what it serves; half as long again by chance.
const AGAIN: Duration = Duration::from_secs(2);
/// The port of a URL without one.
const HTTPS: u16 = 443;
/// Namespaces with what the mesh itself depends on.
const SYSTEM_NAMESPACE: &str = "kube-system";

/// Why there is no connection to an API server to try.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Not in a pod, and no kubeconfig.
    #[error(
        "{field}: not in a pod ({source}); run it in one with a service account, or set {field}.kubeconfig"
    )]
    NotInPod {
        /// The configuration's field.
        field: &'static str,
        /// What is missing.
        source: kube::config::InClusterError,
    },
    /// The kubeconfig cannot be used.
    #[error("{field}.kubeconfig: cannot use {}: {source}", path.display())]
    Kubeconfig {
        /// The configuration's field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: kube::config::KubeconfigError,
    },
    /// The server that it names cannot be found.
    #[error("directory.kubernetes.kubeconfig: {}: cannot find {server}: {source}", path.display())]
    Server {
        /// The file.
        path: PathBuf,
        /// What it says.
        server: String,
        /// What the system said.
        source: io::Error,
    },
    /// What it says makes no client.
    #[error("{field}: cannot make a client of the API server: {source}")]
    Client {
        /// The configuration's field.
        field: &'static str,
        /// What is wrong.
        source: Error,
    },
}

/// Makes a client of the API server from a kubeconfig, or as a pod does; connects to nothing yet. With it
/// comes the namespace that this process runs in, if it is a pod's. `field` is whose configuration it is.
///
/// # Errors
/// When there is nothing to read, or it cannot be used.
pub(crate) async fn client(
    kubeconfig: Option<&Path>,
    field: &'static str,
) -> Result<(Client, Option<String>), ConnectError> {
    let config = match kubeconfig {
        None => Config::incluster().map_err(|source| ConnectError::NotInPod { field, source })?,
        Some(path) => {
            let named = |source| ConnectError::Kubeconfig { field, path: path.into(), source };
            let read = Kubeconfig::read_from(path).map_err(named)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(named)?
        }
    };
    // A kubeconfig says where commands go, not where this runs.
    let own = kubeconfig.is_none().then(|| config.default_namespace.clone());
    Ok((Client::try_from(config).map_err(|source| ConnectError::Client { field, source })?, own))
}

/// How to reach the API server, and what to make of what it tells.
pub struct Connection {
    client: Client,
    rules: Rules,
}

impl Connection {
    /// Reads kubeconfig or service account; connects to nothing yet. `field` is whose configuration it is,
    /// `node` the node whose pods are enrolled by this process, if any.
    ///
    /// # Errors
    /// When there is nothing to read, or it cannot be used.
    pub async fn new(
        config: &KubernetesConfig,
        field: &'static str,
        domain: &TrustDomain,
        node: Option<&str>,
    ) -> Result<Self, ConnectError> {
        let (client, own) = client(config.kubeconfig.as_deref(), field).await?;
        let excluded: HashSet<String> = match &config.excluded_namespaces {
            Some(listed) => listed.iter().cloned().collect(),
            None => own.into_iter().chain([SYSTEM_NAMESPACE.to_owned()]).collect(),
        };
        let rules = Rules {
            domain: domain.clone(),
            node: node.map(str::to_owned),
            default_mode: config.default_mode,
            excluded,
        };
        Ok(Self { client, rules })
    }

    /// What to make of what is told, and what is told of the node's own pods and their namespaces.
    pub(crate) fn of_own_node(self, standing: &Arc<Standing>) -> (Rules, BoxStream<'static, Update>) {
        let Self { client, rules } = self;
        let here = format!("spec.nodeName={}", rules.node.as_deref().unwrap_or_default());
        let pods = updates_of(&client, Kind::PODS, watcher::Config::default().fields(&here), standing);
        let told = stream::select(
            updates(&client, Kind::NAMESPACES, standing, Update::Namespace),
            pods.map(Update::Pod),
        );
        (rules, told.boxed())
    }
}

/// Where the API server is: by the kubeconfig, and for a pod also by its service.
///
/// # Errors
/// When the kubeconfig cannot be used, or names a server that cannot be found.
pub fn servers(config: &KubernetesConfig) -> Result<Vec<SocketAddr>, ConnectError> {
    let mut found = Vec::new();
    if let (Ok(host), Ok(port)) =
        (std::env::var("KUBERNETES_SERVICE_HOST"), std::env::var("KUBERNETES_SERVICE_PORT"))
    {
        found.extend(addresses(&host, port.parse().unwrap_or(HTTPS)).unwrap_or_default());
    }
    let Some(path) = &config.kubeconfig else { return Ok(found) };
    let named =
        |source| ConnectError::Kubeconfig { field: "directory.kubernetes", path: path.clone(), source };
    let read = Kubeconfig::read_from(path).map_err(named)?;
    for server in read.clusters.into_iter().filter_map(|named| named.cluster?.server) {
        let unknown = |source| ConnectError::Server { path: path.clone(), server: server.clone(), source };
        let uri: Uri = server.parse().map_err(|_| unknown(io::ErrorKind::InvalidInput.into()))?;
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        found.extend(addresses(host, uri.port_u16().unwrap_or(HTTPS)).map_err(unknown)?);
    }
    Ok(found)
}

fn addresses(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok((host, port).to_socket_addrs()?.collect())
}

/// Asks the API server for one object of each kind that [`watch`] reads.
///
/// # Errors
/// One line for the first that it cannot have.
pub async fn probe(connection: &Connection) -> Result<(), String> {
    let client = &connection.client;
    let slices = slices_kind(client).await.map_err(|e| Fault::new("discover", Kind::SLICES, &e).words)?;
    one::<Node>(client, Kind::NODES).await?;
    one::<Service>(client, Kind::SERVICES).await?;
    one::<Slice>(client, slices).await?;
    probe_pods(connection).await
}

/// Asks for one of the objects that an agent reads whose directory is the authority's.
///
/// # Errors
/// As [`probe`].
pub async fn probe_pods(connection: &Connection) -> Result<(), String> {
    one::<Namespace>(&connection.client, Kind::NAMESPACES).await?;
    one::<Pod>(&connection.client, Kind::PODS).await
}

/// Asks for one object of a kind.
///
/// # Errors
/// One line that says what to mend.
pub(crate) async fn one<K: Resource<DynamicType = Kind> + Clone + Debug + DeserializeOwned>(
    client: &Client,
    kind: Kind,
) -> Result<(), String> {
    let api: Api<K> = Api::all_with(client.clone(), &kind);
    api.list(&ListParams::default().limit(1)).await.map(drop).map_err(|e| Fault::new("list", kind, &e).words)
}

/// Runs for ever: follows the cluster, and what the mesh policies make of it.
pub async fn watch(connection: Connection, mesh: Arc<MeshPolicies>, live: Arc<Live>) {
    let Connection { client, rules } = connection;
    // A directory without them would turn pods out of the mesh.
    mesh.read().await;
    let mut other_policies = mesh.subscribe();
    let slices = loop {
        match slices_kind(&client).await {
            Ok(kind) => break kind,
            Err(error) => Fault::new("discover", Kind::SLICES, &error).tell(Kind::SLICES, live.standing()),
        }
        sleep(AGAIN.mul_f64(1.0 + 0.5 * fastrand::f64())).await;
    };
    let mut updates = stream::select_all([
        updates(&client, Kind::NAMESPACES, live.standing(), Update::Namespace),
        updates(&client, Kind::NODES, live.standing(), Update::Node),
        updates(&client, Kind::SERVICES, live.standing(), Update::Service),
        updates(&client, slices, live.standing(), Update::Slice),
        updates(&client, Kind::PODS, live.standing(), Update::Pod),
    ]);
    let mut cluster = Cluster::new(rules);
    cluster.set_mesh(mesh.load());
    let mut due: Option<Instant> = None;
    loop {
        tokio::select! {
            Some(update) = updates.next() => take(&mut cluster, update, live.standing()),
            Ok(()) = other_policies.changed() => cluster.set_mesh(mesh.load()),
            () = until(due) => {
                due = None;
                if !live.is_read() {
                    tracing::info!(objects = ?cluster.counts().map(|(kind, count)| (kind.plural, count)), "the cluster is read");
                }
                live.replace(cluster.directory());
                for (kind, count) in cluster.counts() {
                    live.standing().objects(kind.plural, count);
                }
            }
        }
        // A directory without what was not told yet would turn pods out of the mesh.
        if due.is_none() && cluster.is_read() && (cluster.is_changed() || !live.is_read()) {
            due = Some(Instant::now() + BATCH);
        }
    }
}

/// Takes what was told of an object; one that cannot be used is said.
pub(crate) fn take(cluster: &mut Cluster, update: Update, standing: &Standing) {
    if let Err(unusable) = cluster.update(update) {
        standing.failed("unusable");
        tracing::error!(
            object = unusable.object,
            why = unusable.why,
            "an object cannot be used; it counts as absent"
        );
    }
}

/// Resolves at a time, if there is one.
pub(crate) async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The newest version of EndpointSlices that the server has.
async fn slices_kind(client: &Client) -> Result<Kind, Error> {
    match client.list_api_group_resources(&Kind::SLICES.group_version()).await {
        Ok(_) => Ok(Kind::SLICES),
        Err(Error::Api(status)) if status.code == 404 => Ok(Kind::SLICES_BETA),
        Err(error) => Err(error),
    }
}

/// What is told of one kind, for ever; faults are told to `standing` on the way.
pub(crate) fn updates<K, U>(
    client: &Client,
    kind: Kind,
    standing: &Arc<Standing>,
    wrap: fn(watcher::Event<K>) -> U,
) -> BoxStream<'static, U>
where
    K: Resource<DynamicType = Kind> + Clone + Debug + DeserializeOwned + Send + 'static,
    U: 'static,
{
    updates_of(client, kind, watcher::Config::default(), standing).map(wrap).boxed()
}

/// The same of some objects of the kind.
fn updates_of<K>(
    client: &Client,
    kind: Kind,
    which: watcher::Config,
    standing: &Arc<Standing>,
) -> impl Stream<Item = watcher::Event<K>> + Send + use<K>
where
    K: Resource<DynamicType = Kind> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let api: Api<K> = Api::all_with(client.clone(), &kind);
    heard(watcher(api, which).default_backoff(), kind, Arc::clone(standing))
}

fn heard<K>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>>,
    kind: Kind,
    standing: Arc<Standing>,
) -> impl Stream<Item = watcher::Event<K>> {
    events.filter_map(move |event| {
        let heard = match event {
            Ok(event) => {
                // The first event of a list comes before anything was asked.
                if !matches!(event, watcher::Event::Init) {
                    standing.heard(kind.plural, matches!(event, watcher::Event::InitDone));
                }
                Some(event)
            }
            Err(error) => {
                Fault::of_watcher(kind, &error).tell(kind, &standing);
                None
            }
        };
        std::future::ready(heard)
    })
}

/// What came instead of objects.
pub(crate) struct Fault {
    /// One of a fixed set.
    reason: &'static str,
    /// One line: verb, resource, answer, remedy.
    pub(crate) words: String,
}

impl Fault {
    fn of_watcher(kind: Kind, error: &watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(error) => Self::new("list", kind, error),
            watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
                Self::new("watch", kind, error)
            }
            watcher::Error::WatchError(status) => Self::answered("watch", kind, status.code, &status.message),
            watcher::Error::NoResourceVersion => {
                Self { reason: "malformed", words: format!("cannot watch {}: {error}", kind.plural) }
            }
        }
    }

    /// What a call came to.
    pub(crate) fn new(verb: &str, kind: Kind, error: &Error) -> Self {
        let plural = kind.plural;
        match error {
            Error::Api(status) => Self::answered(verb, kind, status.code, &status.message),
            Error::SerdeError(_) | Error::FromUtf8(_) | Error::LinesCodecMaxLineLengthExceeded => {
                Self { reason: "malformed", words: format!("cannot {verb} {plural}: {}", causes(error)) }
            }
            Error::ReadEvents(_) => {
                Self { reason: "broken", words: format!("cannot {verb} {plural}: {}", causes(error)) }
            }
            error => Self {
                reason: "unreachable",
                words: format!("cannot {verb} {plural}: the API server cannot be reached: {}", causes(error)),
            },
        }
    }

    fn answered(verb: &str, kind: Kind, code: u16, message: &str) -> Self {
        let plural = kind.plural;
        let (reason, remedy) = match code {
            401 => ("unauthorized", " (are the credentials those of this cluster?)".to_owned()),
            403 => ("forbidden", format!(" (a ClusterRole must grant list and watch on {plural})")),
            404 if kind.is_ours() => ("server", " (apply manifests/crds, which define it)".to_owned()),
            410 => ("expired", String::new()),
            _ => ("server", String::new()),
        };
        Self {
            reason,
            words: format!("cannot {verb} {plural}: the API server answers {code}: {message}{remedy}"),
        }
    }

    fn tell(self, kind: Kind, standing: &Standing) {
        standing.failed(self.reason);
        // A history that is gone is read again at once.
        if self.reason != "expired" && standing.fault(kind.plural, &self.words) {
            tracing::error!(error = self.words, "nothing new of the {}; trying again", standing.what());
        }
    }
}

/// An error with its causes, which its own words do not tell.
fn causes(error: &Error) -> String {
    let mut words = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        cause = error.source();
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_denial_names_verb_and_resource_and_what_to_grant() {
        let fault = Fault::answered("list", Kind::SLICES, 403, "endpointslices is forbidden");
        assert_eq!(fault.reason, "forbidden");
        assert!(
            fault.words.starts_with("cannot list endpointslices: the API server answers 403"),
            "{}",
            fault.words
        );
        assert!(fault.words.ends_with("(a ClusterRole must grant list and watch on endpointslices)"));
    }
}
