//! `hauberk check --cluster`: does the mesh of a whole cluster stand as it should?
//!
//! What is asked of the API server is gathered here; `judge` says what to make of it. Agents are not asked
//! themselves: each keeps a report in its Lease (see `fleet`).

mod judge;

use std::path::Path;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::watcher::Event;
use kube::{Api, Client, Config};

use super::Found;
use crate::directory::kubernetes::objects::{Kind, Policy};
use crate::fleet::report::Heard;
use crate::fleet::status;
use crate::identity::TrustDomain;
use crate::policy::kubernetes::kept::Kept;

/// How long one question may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Verb, group, resource, and whether it is needed in the mesh's own namespace only.
type Right = (&'static str, &'static str, &'static str, bool);
/// What both parts read of the cluster.
const READING: &[Right] = &[
    ("list", "", "pods", false),
    ("watch", "", "pods", false),
    ("list", "", "services", false),
    ("watch", "", "services", false),
    ("list", "", "nodes", false),
    ("watch", "", "nodes", false),
    ("list", "", "namespaces", false),
    ("watch", "", "namespaces", false),
    ("list", "discovery.k8s.io", "endpointslices", false),
    ("watch", "discovery.k8s.io", "endpointslices", false),
    ("list", "hauberk.dev", "accesspolicies", false),
    ("watch", "hauberk.dev", "accesspolicies", false),
    ("list", "hauberk.dev", "meshpolicies", false),
    ("watch", "hauberk.dev", "meshpolicies", false),
];
/// The parts whose rights are checked, by service account, and what each needs besides [`READING`].
const NEEDED: [(&str, &[Right]); 2] = [
    (
        "hauberk-agent",
        &[
            ("get", "", "nodes", false),
            ("create", "coordination.k8s.io", "leases", true),
            ("patch", "coordination.k8s.io", "leases", true),
        ],
    ),
    (
        AUTHORITY,
        &[
            ("patch", "hauberk.dev", "accesspolicies/status", false),
            ("patch", "hauberk.dev", "meshpolicies/status", false),
            ("list", "coordination.k8s.io", "leases", true),
        ],
    ),
];
/// The authority's Deployment and service account.
const AUTHORITY: &str = "hauberk-authority";

/// What was asked, each with the API server's words where it could not be answered.
#[derive(Debug)]
struct Facts {
    now: SystemTime,
    /// The API server's own version.
    server: String,
    nodes: Result<Vec<String>, String>,
    agents: Result<Vec<Heard>, String>,
    /// Replicas of the authority that are wanted and that are available; none where it is not installed.
    authority: Result<Option<(i32, i32)>, String>,
    policies: Result<Policies, String>,
    /// Rights that are missing, in words.
    rights: Result<Vec<String>, String>,
}

/// The policies of the cluster.
#[derive(Debug, Default)]
struct Policies {
    count: usize,
    /// Each with its object and why it cannot be used.
    faults: Vec<(String, String)>,
    /// Names them together, as agents do.
    digest: String,
}

/// Asks the API server, and judges. Without a kubeconfig, the usual one is taken, or a pod's own.
pub async fn run(kubeconfig: Option<&Path>, namespace: &str) -> Vec<Found> {
    const NAME: &str = "API server";
    let answered = async {
        let client = client(kubeconfig).await?;
        let version = limited(client.apiserver_version()).await?;
        Ok::<_, String>((client, version.git_version))
    };
    match answered.await {
        Ok((client, server)) => judge::all(&gather(&client, namespace, server).await),
        Err(error) => vec![Found::fail(
            NAME,
            error,
            "is the kubeconfig that of this cluster (--kubeconfig), and may you reach it?",
        )],
    }
}

async fn client(kubeconfig: Option<&Path>) -> Result<Client, String> {
    let config = match kubeconfig {
        None => Config::infer().await.map_err(|error| error.to_string())?,
        Some(path) => {
            let named = |error: kube::config::KubeconfigError| format!("{}: {error}", path.display());
            let read = Kubeconfig::read_from(path).map_err(named)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.map_err(named)?
        }
    };
    Client::try_from(config).map_err(|error| error.to_string())
}

async fn limited<T>(asking: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(LIMIT, asking).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {LIMIT:?}")),
    }
}

async fn gather(client: &Client, namespace: &str, server: String) -> Facts {
    let nodes: Api<Node> = Api::all(client.clone());
    let all = ListParams::default();
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    Facts {
        now: SystemTime::now(),
        server,
        nodes: limited(nodes.list(&all))
            .await
            .map(|list| list.into_iter().filter_map(|node| node.metadata.name).collect()),
        agents: limited(status::live(client, namespace)).await,
        authority: limited(deployments.get_opt(AUTHORITY)).await.map(|found| {
            let deployment = found?;
            let wanted = deployment.spec.and_then(|spec| spec.replicas).unwrap_or(1);
            let available = deployment.status.and_then(|status| status.available_replicas).unwrap_or(0);
            Some((wanted, available))
        }),
        policies: policies(client).await,
        rights: rights(client, namespace).await,
    }
}

async fn policies(client: &Client) -> Result<Policies, String> {
    // A trust domain only matters where a policy's names are no identity in any.
    let domain = TrustDomain::parse("cluster.local").map_err(|error| error.to_string())?;
    let mut kept = Kept::new(domain);
    let mut count = 0;
    for kind in [Kind::ACCESS_POLICIES, Kind::MESH_POLICIES] {
        let api: Api<Policy> = Api::all_with(client.clone(), &kind);
        let listed = limited(api.list(&ListParams::default())).await;
        let listed = listed.map_err(|error| format!("{}: {error}", kind.plural))?;
        count += listed.items.len();
        let told = listed.items.into_iter().map(Event::InitApply);
        for event in [Event::Init].into_iter().chain(told).chain([Event::InitDone]) {
            match kind {
                Kind::ACCESS_POLICIES => kept.access(event),
                _ => kept.mesh(event),
            };
        }
    }
    let faults = kept.faults().map(|(object, why)| (object, why.to_owned())).collect();
    Ok(Policies { count, faults, digest: kept.digest() })
}

async fn rights(client: &Client, namespace: &str) -> Result<Vec<String>, String> {
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let mut missing = Vec::new();
    for (account, more) in NEEDED {
        for (verb, group, resource, own) in READING.iter().chain(more) {
            let (resource_name, subresource) =
                resource.split_once('/').map_or((*resource, None), |(a, b)| (a, Some(b)));
            let asked = ResourceAttributes {
                verb: Some((*verb).into()),
                group: Some((*group).into()),
                resource: Some(resource_name.into()),
                subresource: subresource.map(Into::into),
                namespace: own.then(|| namespace.into()),
                ..ResourceAttributes::default()
            };
            let review = SubjectAccessReview {
                spec: SubjectAccessReviewSpec {
                    user: Some(format!("system:serviceaccount:{namespace}:{account}")),
                    resource_attributes: Some(asked),
                    ..SubjectAccessReviewSpec::default()
                },
                ..SubjectAccessReview::default()
            };
            let answer = limited(reviews.create(&PostParams::default(), &review)).await?;
            if !answer.status.is_some_and(|status| status.allowed) {
                missing.push(format!("{account} may not {verb} {resource}"));
            }
        }
    }
    Ok(missing)
}
