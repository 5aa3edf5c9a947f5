//! The node's SPIRE agent: its own Workload API for this agent's identity and the roots, and its Delegated
//! Identity API for the workloads' identities.
//!
//! SPIRE makes the keys, and pushes: one stream is held for each identity, and each message on it is the whole
//! state. The agent must be registered as the node's identity, and listed in SPIRE's `authorized_delegates`.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status, Streaming};

use super::grpc::{self, CALL_TIMEOUT};
use super::{IssueError, Issuer, Obtained};
use crate::config::issuer::SpireConfig;
use crate::identity::bundle::TrustBundle;
use crate::identity::federation::{Admit, Federated, Federation};
use crate::identity::svid::{Leaf, X509Svid, concatenated};
use crate::identity::{SpiffeId, TrustDomain};
use crate::tls::provider::provider;
use crate::verdict::IssuerKind;
use delegated::delegated_identity_client::DelegatedIdentityClient;
use delegated::{Selector, SubscribeToX509sviDsRequest};
use workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use workload::{X509BundlesRequest, X509BundlesResponse, X509svidRequest};

generated! {
    /// The generated gRPC code of `proto/spiffe_workload.proto`.
    workload: "_"
}

generated! {
    /// The generated gRPC code of `proto/spire_delegated_identity.proto`.
    delegated: "spire.api.agent.delegatedidentity.v1"
}

/// One SVID as it was sent.
#[derive(Debug)]
struct Sent {
    chain: Vec<CertificateDer<'static>>,
    key: Vec<u8>,
}

/// The whole state for one identity.
type State = Result<Arc<Vec<Sent>>, IssueError>;

/// A stream that is held for one identity.
#[derive(Debug)]
struct Watch {
    state: watch::Receiver<Option<State>>,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A SPIRE agent.
#[derive(Debug)]
pub struct SpireIssuer {
    config: SpireConfig,
    node: SpiffeId,
    domain: TrustDomain,
    workload: Channel,
    admin: Channel,
    watches: Mutex<HashMap<SpiffeId, Watch>>,
    pushed: Arc<Notify>,
    bundles: tokio::sync::Mutex<Option<Streaming<X509BundlesResponse>>>,
}

impl SpireIssuer {
    /// Asks the SPIRE agent for the identity `node` of this agent, and for those of workloads. Needs to be in
    /// a tokio runtime.
    pub fn new(config: SpireConfig, node: SpiffeId, domain: TrustDomain) -> Self {
        Self {
            workload: channel(config.workload_socket.clone()),
            admin: channel(config.admin_socket.clone()),
            config,
            node,
            domain,
            watches: Mutex::default(),
            pushed: Arc::default(),
            bundles: tokio::sync::Mutex::default(),
        }
    }

    async fn ask(&self, id: &SpiffeId) -> Result<Obtained, IssueError> {
        let mut state = self.watch(id)?;
        let unreachable =
            |detail: &str| IssueError::Unreachable { issuer: self.name(), detail: detail.into() };
        let now = match timeout(CALL_TIMEOUT, state.wait_for(Option::is_some)).await {
            Ok(Ok(now)) => now.clone(),
            Ok(Err(_)) => None,
            Err(_) => Some(Err(unreachable("it does not answer"))),
        };
        match now.unwrap_or_else(|| Err(unreachable("its stream ended"))) {
            Ok(sent) => self.pick(id, &sent),
            Err(error) => {
                // The next try opens a stream anew.
                self.lock().remove(id);
                Err(error)
            }
        }
    }

    /// The one that is asked for, out of all that the selectors match; the one valid longest.
    fn pick(&self, id: &SpiffeId, sent: &[Sent]) -> Result<Obtained, IssueError> {
        let named = |one: &&Sent| one.chain.first().and_then(|leaf| Leaf::from_der(leaf).ok());
        let of_id =
            sent.iter().filter_map(|one| Some((named(&one)?, one))).filter(|(leaf, _)| leaf.id == *id);
        let Some((_, one)) = of_id.max_by_key(|(leaf, _)| leaf.not_after) else {
            let detail = format!("it has no registration entry that gives {id} to {}", self.whom(id));
            return Err(IssueError::Refused { issuer: self.name(), detail, retry_after: None });
        };
        let unusable = |detail: String| IssueError::Unusable { issuer: self.name(), detail };
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(one.key.clone()));
        let key =
            provider().key_provider.load_private_key(key).map_err(|e| unusable(format!("the key: {e}")))?;
        let svid = X509Svid::new(one.chain.clone(), key).map_err(|e| unusable(e.to_string()))?;
        Ok(Obtained { svid, key: None, bundle: None })
    }

    /// In the words of an operator who looks for the entry.
    fn whom(&self, id: &SpiffeId) -> String {
        match self.selectors(id) {
            Some(selectors) if *id != self.node => {
                let texts = selectors.iter().map(|s| format!("{}:{}", s.r#type, s.value)).collect::<Vec<_>>();
                format!("the selectors {}", texts.join(", "))
            }
            _ => "this agent's own process".into(),
        }
    }

    fn selectors(&self, id: &SpiffeId) -> Option<Vec<Selector>> {
        let (namespace, account) = (id.namespace()?, id.service_account()?);
        let fill = |text: &String| {
            let text = text.replace("{namespace}", namespace).replace("{serviceAccount}", account);
            let (kind, value) = text.split_once(':')?;
            Some(Selector { r#type: kind.into(), value: value.into() })
        };
        self.config.selectors.iter().map(fill).collect()
    }

    /// The stream for an identity, opened if there is none.
    fn watch(&self, id: &SpiffeId) -> Result<watch::Receiver<Option<State>>, IssueError> {
        let mut watches = self.lock();
        if let Some(watch) = watches.get(id) {
            return Ok(watch.state.clone());
        }
        let opening = if *id == self.node { self.open_own() } else { self.open_delegated(id)? };
        let (sender, state) = watch::channel(None);
        let (pushed, issuer) = (Arc::clone(&self.pushed), self.name());
        let task = tokio::spawn(async move {
            let ended = match opening.await {
                Ok(mut stream) => loop {
                    match stream.next().await {
                        Some(Ok(state)) => {
                            let is_first = sender.borrow().is_none();
                            sender.send_replace(Some(state));
                            if !is_first {
                                pushed.notify_one();
                            }
                        }
                        Some(Err(status)) => break status,
                        None => break Status::unavailable("it ended the stream"),
                    }
                },
                Err(status) => status,
            };
            let hint = "; is this agent registered there, and listed in authorized_delegates?";
            sender.send_replace(Some(Err(grpc::failed(issuer, &ended, hint))));
            pushed.notify_one();
        });
        watches.insert(id.clone(), Watch { state: state.clone(), task: task.abort_handle() });
        Ok(state)
    }

    /// This agent's own identity, by the Workload API.
    fn open_own(&self) -> Opening {
        let mut client = SpiffeWorkloadApiClient::new(self.workload.clone());
        let issuer = self.name();
        Box::pin(async move {
            let stream = client.fetch_x509svid(secured(X509svidRequest {})).await?.into_inner();
            let read = move |answer: Result<workload::X509svidResponse, Status>| {
                Ok(state(
                    &issuer,
                    answer?.svids.into_iter().map(|svid| (concatenated(&svid.x509_svid), svid.x509_svid_key)),
                ))
            };
            Ok(stream.map(read).boxed())
        })
    }

    /// A workload's identity, by the Delegated Identity API.
    fn open_delegated(&self, id: &SpiffeId) -> Result<Opening, IssueError> {
        let selectors = self.selectors(id).ok_or_else(|| {
            IssueError::Ours(format!(
                "{id} is no identity of a service account, which issuer.spire.selectors need"
            ))
        })?;
        let mut client = DelegatedIdentityClient::new(self.admin.clone());
        let issuer = self.name();
        Ok(Box::pin(async move {
            let request = SubscribeToX509sviDsRequest { selectors };
            let stream = client.subscribe_to_x509svi_ds(request).await?.into_inner();
            let read = move |answer: Result<delegated::SubscribeToX509sviDsResponse, Status>| {
                Ok(state(
                    &issuer,
                    answer?.x509_svids.into_iter().map(|svid| {
                        let chain = svid.x509_svid.unwrap_or_default().cert_chain;
                        (Ok(chain.into_iter().map(CertificateDer::from).collect()), svid.x509_svid_key)
                    }),
                ))
            };
            Ok(stream.map(read).boxed())
        }))
    }

    async fn bundle_from_stream(&self) -> Result<TrustBundle, IssueError> {
        let mut held = self.bundles.lock().await;
        let failed = |status: &Status| grpc::failed(self.name(), status, "; is this agent registered there?");
        if held.is_none() {
            let mut client = SpiffeWorkloadApiClient::new(self.workload.clone());
            let opened = client.fetch_x509_bundles(secured(X509BundlesRequest {})).await;
            *held = Some(opened.map_err(|status| failed(&status))?.into_inner());
        }
        let next = match held.as_mut() {
            Some(stream) => stream.message().await,
            None => Ok(None),
        };
        let ended = match next {
            Ok(Some(message)) => return self.read_bundle(message),
            Ok(None) => Status::unavailable("it ended the stream"),
            Err(status) => status,
        };
        *held = None;
        Err(failed(&ended))
    }

    fn read_bundle(&self, message: X509BundlesResponse) -> Result<TrustBundle, IssueError> {
        let unusable = |detail: String| IssueError::Unusable { issuer: self.name(), detail };
        let der = message
            .bundles
            .get(&format!("spiffe://{}", self.domain))
            .ok_or_else(|| unusable(format!("it has no trust bundle of {}", self.domain)))?;
        let roots = concatenated(der).map_err(|e| unusable(format!("the trust bundle: {e}")))?;
        let own = TrustBundle::new(self.domain.clone(), roots)
            .map_err(|e| unusable(format!("the trust bundle: {e}")))?;
        // What its server is federated with, as far as this agent may know.
        let mut federation = Federation::default();
        for (name, der) in &message.bundles {
            match federated(name, der) {
                Ok((domain, _)) if domain == self.domain => {}
                Ok((domain, federated)) => federation.insert(domain, federated),
                // Theirs is no reason to be without our own.
                Err(error) => tracing::warn!(
                    issuer = self.name(),
                    name,
                    error,
                    "a federated trust domain whose bundle cannot be used is not trusted"
                ),
            }
        }
        Ok(own.with_federation(Arc::new(federation)))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SpiffeId, Watch>> {
        // Entries are whole at every instant.
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Issuer for SpireIssuer {
    fn kind(&self) -> IssuerKind {
        IssuerKind::Spire
    }

    fn name(&self) -> String {
        format!("the SPIRE agent at {}", self.config.admin_socket.display())
    }

    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Obtained, IssueError>> {
        Box::pin(self.ask(id))
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Box::pin(self.bundle_from_stream())
    }

    fn pushed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.pushed.notified())
    }

    fn retain(&self, ids: &[SpiffeId]) {
        self.lock().retain(|id, _| ids.contains(id));
    }
}

fn federated(name: &str, der: &[u8]) -> Result<(TrustDomain, Federated), String> {
    let domain =
        TrustDomain::parse(name.strip_prefix("spiffe://").unwrap_or(name)).map_err(|e| e.to_string())?;
    let roots = concatenated(der).map_err(|e| e.to_string())?;
    Ok((domain, Federated::new(roots, Admit::default()).map_err(|e| e.to_string())?))
}

type Opening = BoxFuture<'static, Result<BoxStream<'static, Result<State, Status>>, Status>>;
type Chain = Result<Vec<CertificateDer<'static>>, crate::identity::svid::SvidError>;

fn state(issuer: &str, svids: impl Iterator<Item = (Chain, Vec<u8>)>) -> State {
    let sent: Result<Vec<_>, _> = svids.map(|(chain, key)| Ok(Sent { chain: chain?, key })).collect();
    sent.map(Arc::new).map_err(|error: crate::identity::svid::SvidError| IssueError::Unusable {
        issuer: issuer.into(),
        detail: error.to_string(),
    })
}

/// What the Workload API wants to see, so that nobody is led to ask it by a URL (SPIFFE Workload Endpoint, 6).
fn secured<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    request
}

fn channel(socket: PathBuf) -> Channel {
    let connect = move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    // The URI only fills HTTP's place.
    Endpoint::from_static("http://spire").connect_with_connector_lazy(tower::service_fn(connect))
}
