//! The same identities by the same rules for whoever speaks Istio's protocol
//! (`istio.v1.auth.IstioCertificateService`): Istio's node proxy can get its workloads' certificates here.
//!
//! The caller is a node that shows its SVID; the identity is the one it names as `ImpersonatedIdentity`, or its own.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost_types::Struct;
use prost_types::value::Kind;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use tonic::{Request, Response, Status};

use super::service::{Asked, Refusal, Service, kind, peer};
use crate::identity::SpiffeId;
use crate::identity::svid::pem;
use crate::issue::istio::proto::istio_certificate_service_server::IstioCertificateService;
use crate::issue::istio::proto::{IstioCertificateRequest, IstioCertificateResponse};

/// What a caller names another identity by.
const IMPERSONATED: &str = "ImpersonatedIdentity";
/// Whoever asks for less gets this much: nobody renews more often.
const SHORTEST: Duration = Duration::from_secs(10);

/// The service.
pub(super) struct Istio(pub(super) Arc<Service>);

#[tonic::async_trait]
impl IstioCertificateService for Istio {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (peer, now) = (peer(&request)?, SystemTime::now());
        let IstioCertificateRequest { csr, validity_duration, metadata } = request.into_inner();
        let own = peer.id().map(SpiffeId::to_string).unwrap_or_default();
        let asked = impersonated(metadata.as_ref()).unwrap_or(&own);
        let permitted = self.0.permit(&peer, asked, now);
        let kind = permitted.as_ref().map_or("workload", kind);
        let node = peer.id().and_then(SpiffeId::node_name).unwrap_or_default();
        let outcome = match permitted.and_then(|id| Ok((id, der(&csr)?))) {
            Ok((id, csr)) => {
                let lifetime = lifetime(validity_duration);
                let asked = Asked { id: &id, node, lifetime, held_until: 0 };
                self.0.sign(asked, csr, now).await.map(|chain| {
                    let mut cert_chain: Vec<_> = chain.iter().map(|der| pem("CERTIFICATE", der)).collect();
                    // Istio's clients take the last element for the roots, however many they are.
                    let bundle = Arc::clone(&self.0.bundle.borrow());
                    cert_chain.push(bundle.roots().iter().map(|root| pem("CERTIFICATE", root)).collect());
                    IstioCertificateResponse { cert_chain }
                })
            }
            Err(refusal) => Err(refusal),
        };
        self.0.answer(&peer, kind, asked, outcome)
    }
}

fn impersonated(metadata: Option<&Struct>) -> Option<&str> {
    match metadata?.fields.get(IMPERSONATED)?.kind.as_ref()? {
        Kind::StringValue(id) => Some(id),
        _ => None,
    }
}

/// What is asked for in seconds; 0 or less for what the authority gives.
fn lifetime(validity_duration: i64) -> Duration {
    match u64::try_from(validity_duration) {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).max(SHORTEST),
        _ => Duration::MAX,
    }
}

fn der(csr: &str) -> Result<Vec<u8>, Refusal> {
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes()).map_err(|e| {
        Refusal("csr_malformed", Status::invalid_argument(format!("the CSR is not PEM: {e}")))
    })?;
    Ok(der.as_ref().to_vec())
}
