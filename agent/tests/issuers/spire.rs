use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use hauberk::config::issuer::{IssuerConfig, SpireConfig};
use hauberk::identity::SpiffeId;
use hauberk::identity::bundle::TrustBundle;
use hauberk::issue::spire::delegated::delegated_identity_server::{
    DelegatedIdentity, DelegatedIdentityServer,
};
use hauberk::issue::spire::delegated::{
    SubscribeToX509sviDsRequest, SubscribeToX509sviDsResponse, X509svid as Delegated, X509svidWithKey,
};
use hauberk::issue::spire::workload::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use hauberk::issue::spire::workload::{
    X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
};
use hauberk::issue::{Issuer, configured};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tonic::{Request, Response, Status};

use super::mesh::{Dir, Mesh, Rotation, domain, node, obtain, trust, wait_until, web};

/// One certificate and its key.
type Pair = (Vec<u8>, Vec<u8>);

/// What the SPIRE agent has now.
#[derive(Clone, Default)]
struct Entries {
    /// The agent's own.
    own: Vec<Pair>,
    /// By their selectors, joined by commas.
    delegated: HashMap<String, Vec<Pair>>,
    roots: Vec<u8>,
}

/// A SPIRE agent, as far as the two published APIs go.
#[derive(Clone)]
struct Spire(watch::Sender<Entries>);

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Spire {
    fn stream<T: Send + 'static>(&self, of: impl Fn(Entries) -> T + Send + 'static) -> Response<Sent<T>> {
        let states = WatchStream::new(self.0.subscribe());
        Response::new(Box::pin(states.map(move |entries| Ok(of(entries)))))
    }
}

fn secured<T>(request: &Request<T>) -> Result<(), Status> {
    let header = request.metadata().get("workload.spiffe.io").map(|value| value.as_bytes());
    if header == Some(b"true") { Ok(()) } else { Err(Status::invalid_argument("security header missing")) }
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Spire {
    type FetchX509SVIDStream = Sent<X509svidResponse>;
    type FetchX509BundlesStream = Sent<X509BundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        secured(&request)?;
        if self.0.borrow().own.is_empty() {
            return Err(Status::permission_denied("no identity issued"));
        }
        Ok(self.stream(|entries| X509svidResponse {
            svids: entries
                .own
                .into_iter()
                .map(|(chain, key)| X509svid { x509_svid: chain, x509_svid_key: key, ..Default::default() })
                .collect(),
        }))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        secured(&request)?;
        Ok(self.stream(|entries| X509BundlesResponse {
            bundles: [("spiffe://td.test".to_owned(), entries.roots)].into(),
        }))
    }
}

#[tonic::async_trait]
impl DelegatedIdentity for Spire {
    type SubscribeToX509SVIDsStream = Sent<SubscribeToX509sviDsResponse>;

    async fn subscribe_to_x509svi_ds(
        &self,
        request: Request<SubscribeToX509sviDsRequest>,
    ) -> Result<Response<Self::SubscribeToX509SVIDsStream>, Status> {
        let selectors = request.into_inner().selectors;
        let name =
            selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>().join(",");
        Ok(self.stream(move |entries| SubscribeToX509sviDsResponse {
            x509_svids: entries
                .delegated
                .get(&name)
                .into_iter()
                .flatten()
                .map(|(chain, key)| X509svidWithKey {
                    x509_svid: Some(Delegated { cert_chain: vec![chain.clone()] }),
                    x509_svid_key: key.clone(),
                })
                .collect(),
        }))
    }
}

const SELECTORS: &str = "k8s:ns:shop,k8s:sa:web";

/// Serves both APIs on sockets in `dir`, until the runtime ends.
fn serve(dir: &Dir, entries: Entries) -> Spire {
    let spire = Spire(watch::Sender::new(entries));
    let listen = |name: &str| UnixListenerStream::new(UnixListener::bind(dir.0.join(name)).unwrap());
    let workload =
        tonic::transport::Server::builder().add_service(SpiffeWorkloadApiServer::new(spire.clone()));
    let admin = tonic::transport::Server::builder().add_service(DelegatedIdentityServer::new(spire.clone()));
    tokio::spawn(workload.serve_with_incoming(listen("workload.sock")));
    tokio::spawn(admin.serve_with_incoming(listen("admin.sock")));
    spire
}

fn issuer(dir: &Dir) -> (Arc<dyn Issuer>, Arc<hauberk::trust::Trust>) {
    let config = SpireConfig {
        workload_socket: dir.0.join("workload.sock"),
        admin_socket: dir.0.join("admin.sock"),
        selectors: vec!["k8s:ns:{namespace}".into(), "k8s:sa:{serviceAccount}".into()],
    };
    let trust = trust(TrustBundle::unknown(domain()));
    (configured(&IssuerConfig::Spire(config), node(), Arc::clone(&trust)), trust)
}

fn entries(mesh: &Mesh) -> Entries {
    let other = SpiffeId::workload(&domain(), "shop", "other").unwrap();
    Entries {
        own: vec![mesh.pair(&other, 900), mesh.pair(&node(), 600)],
        delegated: [(SELECTORS.to_owned(), vec![mesh.pair(&other, 900), mesh.pair(&web(), 600)])].into(),
        roots: mesh.ca.bundle().roots()[0].to_vec(),
    }
}

#[tokio::test]
async fn spire_gives_the_agent_its_own_identity_and_its_workloads_theirs_and_pushes_renewals_and_roots() {
    let (dir, mesh) = (Dir::new(), Mesh::new());
    let (issuer, trust) = issuer(&dir);
    let rotation = Rotation::start(&trust, &issuer, Some(node()), &dir.0);
    let said = || rotation.status.now().get(&node()).and_then(|standing| standing.last_error.clone());
    wait_until("its absence is told", || said().is_some_and(|s| s.contains("cannot be reached"))).await;
    let spire = serve(&dir, entries(&mesh));
    wait_until("both are held", || rotation.serial(&node()).is_some() && rotation.serial(&web()).is_some())
        .await;

    let (first, own) = (rotation.serial(&web()), rotation.serial(&node()));
    let renewed = vec![mesh.pair(&web(), 900)];
    spire.0.send_modify(|now| drop(now.delegated.insert(SELECTORS.into(), renewed)));
    wait_until("what is pushed is taken", || rotation.serial(&web()) != first).await;
    assert_eq!(rotation.serial(&node()), own, "and only that");

    let next = Mesh::new();
    let renewed = vec![next.pair(&web(), 900)];
    let second = rotation.serial(&web());
    spire.0.send_modify(|now| now.roots.extend_from_slice(&next.ca.bundle().roots()[0]));
    spire.0.send_modify(|now| drop(now.delegated.insert(SELECTORS.into(), renewed)));
    wait_until("under the new root too", || rotation.serial(&web()) != second).await;
    assert_eq!(trust.snapshot().bundle.roots().len(), 2);

    let third = rotation.serial(&web());
    spire.0.send_modify(|now| drop(now.delegated.remove(SELECTORS)));
    let said = || rotation.status.now().get(&web()).and_then(|standing| standing.last_error.clone());
    wait_until("that the entry is gone is told", || said().is_some()).await;
    assert_eq!(rotation.serial(&web()), third, "what is held is kept until it expires");
    assert!(rotation.asked("spire", "issued") >= 4.0 && rotation.asked("spire", "unreachable") >= 1.0);
}

#[tokio::test]
async fn what_spire_does_not_give_is_refused_in_words_that_name_the_entry_to_make() {
    let (dir, mesh) = (Dir::new(), Mesh::new());
    let (issuer, _) = issuer(&dir);
    let mut wrong = entries(&mesh);
    wrong.own.clear();
    wrong.delegated.clear();
    let spire = serve(&dir, wrong);
    let error = obtain(&issuer, &web(), mesh.ca.bundle()).await.unwrap_err();
    assert!(error.contains("k8s:ns:shop, k8s:sa:web") && error.contains(web().as_str()), "{error}");
    let error = obtain(&issuer, &node(), mesh.ca.bundle()).await.unwrap_err();
    assert!(error.contains("no identity issued") && error.contains("registered"), "{error}");

    let (chain, _) = mesh.pair(&web(), 600);
    let (_, foreign) = mesh.pair(&web(), 600);
    issuer.retain(&[]);
    spire.0.send_modify(|now| drop(now.delegated.insert(SELECTORS.into(), vec![(chain, foreign)])));
    let error = obtain(&issuer, &web(), mesh.ca.bundle()).await.unwrap_err();
    assert!(error.contains("does not belong"), "{error}");
    issuer.retain(&[]);
    spire
        .0
        .send_modify(|now| drop(now.delegated.insert(SELECTORS.into(), vec![Mesh::new().pair(&web(), 600)])));
    let error = obtain(&issuer, &web(), mesh.ca.bundle()).await.unwrap_err();
    assert!(error.contains("leads to none"), "{error}");
}
