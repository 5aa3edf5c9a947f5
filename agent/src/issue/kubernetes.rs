//! Kubernetes CertificateSigningRequests: one object for each request, which somebody else approves and signs.
//!
//! Whoever approves decides what a node may have: the object says who asks (`spec.username`, which the API server
//! writes), and the request names the identity as its one URI SAN. The object is deleted when it has served. Roots are
//! taken from the configured file alone.

use std::time::Duration;

use futures_util::future::BoxFuture;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestSpec, CertificateSigningRequestStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client};
use tokio::sync::OnceCell;
use tokio::time::{sleep, timeout};

use super::bundle_file::BundleFile;
use super::{IssueError, Issued, Signer, chain_from_pem, pem};
use crate::config::issuer::KubernetesIssuerConfig;
use crate::directory::kubernetes::watch;
use crate::identity::bundle::TrustBundle;
use crate::identity::{SpiffeId, TrustDomain};
use crate::verdict::IssuerKind;

/// What an SVID is used for (X509-SVID, section 4.3), in the API's words.
const USAGES: [&str; 3] = ["digital signature", "client auth", "server auth"];
/// For whoever looks at the object: the identity, which the request itself says as well.
const ID_ANNOTATION: &str = "hauberk.dev/spiffe-id";
/// The API server may be away for a moment while an answer is waited for.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// For one request to the API server.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// The signer of a cluster.
#[derive(Debug)]
pub struct KubernetesIssuer {
    config: KubernetesIssuerConfig,
    bundle: BundleFile,
    client: OnceCell<Kept>,
}

struct Kept(Client);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

/// What has become of a request, once anything has.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Signed(String),
    /// Denied, or failed: the condition's words.
    Refused(String),
}

impl KubernetesIssuer {
    /// Asks the configured signer for identities of `domain`.
    pub fn new(config: KubernetesIssuerConfig, domain: TrustDomain) -> Self {
        let bundle = BundleFile::new(config.trust_bundle.clone(), domain);
        Self { config, bundle, client: OnceCell::new() }
    }

    async fn requests(&self) -> Result<Api<CertificateSigningRequest>, IssueError> {
        let connect = async || {
            let connected = watch::client(self.config.kubeconfig.as_deref(), "issuer.kubernetes").await;
            connected.map(|(client, _)| Kept(client)).map_err(|error| IssueError::Ours(error.to_string()))
        };
        let Kept(client) = self.client.get_or_try_init(connect).await?;
        Ok(Api::all(client.clone()))
    }

    async fn ask(&self, id: &SpiffeId, csr: &[u8]) -> Result<Issued, IssueError> {
        let requests = self.requests().await?;
        let request = self.request(id, csr)?;
        let making = timeout(CALL_TIMEOUT, requests.create(&PostParams::default(), &request)).await;
        let made = making
            .map_err(|_| self.unreachable("the API server does not answer".into()))?
            .map_err(|error| self.failed(&error))?;
        let name = made.metadata.name.unwrap_or_default();
        let verdict = self.verdict(&requests, &name).await;
        // The cluster's own cleaner takes what is left behind, after an hour or a day.
        if let Ok(Err(error)) = timeout(CALL_TIMEOUT, requests.delete(&name, &DeleteParams::default())).await
        {
            tracing::warn!(%error, name, "cannot delete a CertificateSigningRequest that has served");
        }
        match verdict? {
            Verdict::Signed(text) => {
                let unusable = |detail| IssueError::Unusable { issuer: self.name(), detail };
                let chain = chain_from_pem(&text)
                    .map_err(|e| unusable(format!("status.certificate of {name} is not PEM: {e}")))?;
                Ok(Issued { chain, bundle: None })
            }
            Verdict::Refused(words) => {
                let detail = format!("the CertificateSigningRequest {name} {words}");
                Err(IssueError::Refused { issuer: self.name(), detail, retry_after: None })
            }
        }
    }

    fn request(&self, id: &SpiffeId, csr: &[u8]) -> Result<CertificateSigningRequest, IssueError> {
        let seconds = self.config.lifetime.map(|lifetime| i32::try_from(lifetime.as_secs()));
        let seconds = seconds
            .transpose()
            .map_err(|_| IssueError::Ours("issuer.kubernetes.expirationSeconds is too large".into()))?;
        Ok(CertificateSigningRequest {
            metadata: ObjectMeta {
                generate_name: Some("hauberk-".into()),
                annotations: Some([(ID_ANNOTATION.to_owned(), id.to_string())].into()),
                ..ObjectMeta::default()
            },
            spec: CertificateSigningRequestSpec {
                request: ByteString(pem("CERTIFICATE REQUEST", csr).into_bytes()),
                signer_name: self.config.signer_name.clone(),
                usages: Some(USAGES.map(str::to_owned).into()),
                expiration_seconds: seconds,
                ..CertificateSigningRequestSpec::default()
            },
            status: None,
        })
    }

    /// Waits until the request is signed or refused.
    async fn verdict(
        &self,
        requests: &Api<CertificateSigningRequest>,
        name: &str,
    ) -> Result<Verdict, IssueError> {
        let mut last: Option<String> = None;
        let mut approved = false;
        let waiting = async {
            loop {
                let decided = |object: Option<&CertificateSigningRequest>| {
                    let status = object.and_then(|object| object.status.as_ref());
                    object.is_none() || status.is_some_and(|status| verdict(status).is_some())
                };
                match await_condition(requests.clone(), name, decided).await {
                    Ok(Some(object)) => {
                        if let Some(verdict) = object.status.as_ref().and_then(verdict) {
                            return Ok(verdict);
                        }
                    }
                    Ok(None) => {
                        let words = format!("somebody deleted the CertificateSigningRequest {name}");
                        return Err(self.unreachable(words));
                    }
                    Err(error) => last = Some(error.to_string()),
                }
                sleep(LOOK_AGAIN).await;
            }
        };
        if let Ok(decided) = timeout(self.config.patience, waiting).await {
            return decided;
        }
        if let Ok(Ok(object)) = timeout(CALL_TIMEOUT, requests.get(name)).await {
            let status = object.status.unwrap_or_default();
            if let Some(verdict) = verdict(&status) {
                return Ok(verdict);
            }
            approved = condition(&status, "Approved").is_some();
        }
        let (seconds, signer) = (self.config.patience.as_secs(), &self.config.signer_name);
        let words = match (last, approved) {
            (Some(error), _) => format!("no answer within {seconds} s: {error}"),
            (None, true) => {
                format!("approved, and not signed within {seconds} s; does the signer {signer} run?")
            }
            (None, false) => {
                format!("not approved within {seconds} s; who approves requests for {signer}?")
            }
        };
        Err(self.unreachable(words))
    }

    fn failed(&self, error: &kube::Error) -> IssueError {
        match error {
            kube::Error::Api(status) if status.code < 500 => {
                let hint = match status.code {
                    401 | 403 => {
                        "; may the agent create, get, list, watch and delete certificatesigningrequests?"
                    }
                    _ => "",
                };
                let detail = format!("{}{hint}", status.message);
                IssueError::Refused { issuer: self.name(), detail, retry_after: None }
            }
            other => self.unreachable(other.to_string()),
        }
    }

    fn unreachable(&self, detail: String) -> IssueError {
        IssueError::Unreachable { issuer: self.name(), detail }
    }
}

fn condition<'a>(status: &'a CertificateSigningRequestStatus, kind: &str) -> Option<(&'a str, &'a str)> {
    let all = status.conditions.iter().flatten();
    let found = all.into_iter().find(|condition| condition.type_ == kind && condition.status != "False")?;
    Some((found.reason.as_deref().unwrap_or_default(), found.message.as_deref().unwrap_or_default()))
}

/// What a status says; refusals come before a certificate, which a confused signer might leave beside them.
fn verdict(status: &CertificateSigningRequestStatus) -> Option<Verdict> {
    for (kind, said) in [("Denied", "was denied"), ("Failed", "was approved, and its signer failed")] {
        if let Some((reason, message)) = condition(status, kind) {
            let words = format!("{said}: {reason}: {message}").replace('\n', " ");
            return Some(Verdict::Refused(words.trim_end_matches([':', ' ']).to_owned()));
        }
    }
    let ByteString(certificate) = status.certificate.as_ref().filter(|text| !text.0.is_empty())?;
    Some(Verdict::Signed(String::from_utf8_lossy(certificate).into_owned()))
}

impl Signer for KubernetesIssuer {
    fn kind(&self) -> IssuerKind {
        IssuerKind::Kubernetes
    }

    fn name(&self) -> String {
        format!("the Kubernetes signer {}", self.config.signer_name)
    }

    fn sign<'a>(&'a self, id: &'a SpiffeId, csr: &'a [u8]) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.ask(id, csr))
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Box::pin(async { self.bundle.next().await.map_err(IssueError::Ours) })
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::certificates::v1::CertificateSigningRequestCondition;

    use super::*;

    fn status(conditions: &[(&str, &str)], certificate: &str) -> CertificateSigningRequestStatus {
        let condition = |(kind, reason): &(&str, &str)| CertificateSigningRequestCondition {
            type_: (*kind).into(),
            status: "True".into(),
            reason: Some((*reason).into()),
            message: Some("one\ntwo".into()),
            ..CertificateSigningRequestCondition::default()
        };
        CertificateSigningRequestStatus {
            certificate: Some(ByteString(certificate.into())),
            conditions: Some(conditions.iter().map(condition).collect()),
        }
    }

    #[test]
    fn a_request_is_open_until_it_is_signed_or_refused_and_a_refusal_comes_first() {
        assert_eq!(verdict(&CertificateSigningRequestStatus::default()), None);
        assert_eq!(verdict(&status(&[("Approved", "a")], "")), None);
        assert_eq!(verdict(&status(&[("Approved", "a")], "pem")), Some(Verdict::Signed("pem".into())));
        let denied = verdict(&status(&[("Approved", "a"), ("Denied", "Policy")], "pem"));
        assert_eq!(denied, Some(Verdict::Refused("was denied: Policy: one two".into())));
        let failed = verdict(&status(&[("Approved", "a"), ("Failed", "Key")], ""));
        assert!(matches!(failed, Some(Verdict::Refused(words)) if words.contains("its signer failed: Key")));
    }
}
