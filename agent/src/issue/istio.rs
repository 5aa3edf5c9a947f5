//! A CA that speaks Istio's protocol (`istio.v1.auth.IstioCertificateService`): istiod, istio-csr.
//!
//! The agent shows its own service-account token and names the workload's identity, as Istio's node proxies do;
//! the CA decides whether such a workload runs on the token's node. It issues identities of service accounts
//! only. Roots are taken from the configured file alone, never from the CA's answer.

use std::path::Path;

use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::sync::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

use super::bundle_file::BundleFile;
use super::grpc::{self, CALL_TIMEOUT};
use super::{IssueError, Issued, Signer, chain_from_pem, pem};
use crate::config::issuer::IstioConfig;
use crate::config::read_text;
use crate::config::watch::{Stamp, stamp};
use crate::identity::bundle::TrustBundle;
use crate::identity::{SpiffeId, TrustDomain};
use crate::tls;
use crate::verdict::IssuerKind;
use proto::IstioCertificateRequest;
use proto::istio_certificate_service_client::IstioCertificateServiceClient;

generated! {
    /// The generated gRPC code of `proto/istio_ca.proto`.
    proto: "istio.v1.auth"
}

/// An Istio CA, as one node's agent asks it.
#[derive(Debug)]
pub struct IstioIssuer {
    config: IstioConfig,
    bundle: BundleFile,
    /// One connection; made anew when the roots that it was verified with have changed.
    channel: Mutex<Option<(Option<Stamp>, Channel)>>,
}

impl IstioIssuer {
    /// Asks the CA for identities of `domain`.
    pub fn new(config: IstioConfig, domain: TrustDomain) -> Self {
        let bundle = BundleFile::new(config.trust_bundle.clone(), domain);
        Self { config, bundle, channel: Mutex::new(None) }
    }

    async fn channel(&self) -> Result<Channel, IssueError> {
        let file = self.config.server_bundle.as_ref().unwrap_or(&self.config.trust_bundle);
        let seen = stamp(file);
        let mut held = self.channel.lock().await;
        if let Some((made_with, channel)) = held.as_ref()
            && *made_with == seen
        {
            return Ok(channel.clone());
        }
        let channel = self.make_channel(file)?;
        *held = Some((seen, channel.clone()));
        Ok(channel)
    }

    fn make_channel(&self, roots: &Path) -> Result<Channel, IssueError> {
        let address = self.config.address.clone();
        let host = address.rsplit_once(':').map_or(&*address, |(host, _)| host);
        let (connector, name) = grpc::verifying(host, "issuer.istio.address", roots, tls::ALPN_H2)?;
        let connect = move |_: Uri| {
            let (connector, address, name) = (connector.clone(), address.clone(), name.clone());
            async move { grpc::connect(connector, address, Some(name)).await.map(TokioIo::new) }
        };
        // The URI only fills HTTP's place; the connector dials the configured address.
        let endpoint = Endpoint::from_static("http://istio-ca").timeout(CALL_TIMEOUT);
        Ok(endpoint.connect_with_connector_lazy(tower::service_fn(connect)))
    }

    async fn ask(&self, id: &SpiffeId, csr: &[u8]) -> Result<Issued, IssueError> {
        let mut request = Request::new(IstioCertificateRequest {
            csr: pem("CERTIFICATE REQUEST", csr),
            validity_duration: i64::try_from(self.config.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(id)),
        });
        let header = |text: &str| {
            MetadataValue::<Ascii>::try_from(text).map_err(|_| {
                IssueError::Ours("the token or clusterId has characters that no header may have".into())
            })
        };
        let token = read_text(&self.config.token).map_err(|error| {
            IssueError::Ours(format!("the service account's token (issuer.istio.token): {error}"))
        })?;
        request.metadata_mut().insert("authorization", header(&format!("Bearer {}", token.trim()))?);
        request.metadata_mut().insert("clusterid", header(&self.config.cluster_id)?);
        let answer =
            IstioCertificateServiceClient::new(self.channel().await?).create_certificate(request).await;
        let answer = answer.map_err(|status| self.failed(&status))?.into_inner();
        let text = answer.cert_chain.join("\n");
        let chain = chain_from_pem(&text).map_err(|e| self.unusable(format!("the chain is not PEM: {e}")))?;
        Ok(Issued { chain, bundle: None })
    }

    fn failed(&self, status: &Status) -> IssueError {
        let hint = match status.code() {
            Code::Unauthenticated => {
                "; is the token's audience the CA's (istio-ca), and is clusterId this cluster's name there?"
            }
            Code::PermissionDenied => {
                "; does the CA trust the agent's service account as a node's proxy (CA_TRUSTED_NODE_ACCOUNTS), and does such a workload run on this node?"
            }
            _ => "",
        };
        grpc::failed(self.name(), status, hint)
    }

    fn unusable(&self, detail: String) -> IssueError {
        IssueError::Unusable { issuer: self.name(), detail }
    }
}

impl Signer for IstioIssuer {
    fn kind(&self) -> IssuerKind {
        IssuerKind::Istio
    }

    fn name(&self) -> String {
        format!("the Istio CA at {}", self.config.address)
    }

    fn sign<'a>(&'a self, id: &'a SpiffeId, csr: &'a [u8]) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.ask(id, csr))
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Box::pin(async { self.bundle.next().await.map_err(IssueError::Ours) })
    }
}

fn impersonating(id: &SpiffeId) -> prost_types::Struct {
    let whom = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(id.to_string())) };
    prost_types::Struct { fields: [("ImpersonatedIdentity".to_owned(), whom)].into() }
}
