//! A PKI engine of Vault or OpenBao, which signs by a role.
//!
//! The role decides what is signed: its `allowed_uri_sans` must admit the identities that this node may have,
//! and no others. Vault does not know which workload runs where. Roots are taken from the configured file
//! alone, never from Vault's answer.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::bundle_file::BundleFile;
use super::grpc::{self, CALL_TIMEOUT};
use super::{IssueError, Issued, Signer, chain_from_pem, pem};
use crate::config::issuer::{VaultAuth, VaultConfig};
use crate::config::read_text;
use crate::identity::bundle::TrustBundle;
use crate::identity::{SpiffeId, TrustDomain};
use crate::verdict::IssuerKind;

/// No answer of Vault's to us is as large.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// A Vault server.
#[derive(Debug)]
pub struct VaultIssuer {
    config: VaultConfig,
    bundle: BundleFile,
    /// A token that Vault gave us, and when to ask for another.
    login: Mutex<Option<(String, Instant)>>,
}

#[derive(Deserialize)]
struct Signed {
    data: Certificates,
}

#[derive(Deserialize)]
struct Certificates {
    certificate: String,
    #[serde(default)]
    ca_chain: Vec<String>,
    #[serde(default)]
    issuing_ca: String,
}

#[derive(Deserialize)]
struct LoggedIn {
    auth: Auth,
}

#[derive(Deserialize)]
struct Auth {
    client_token: String,
    lease_duration: u64,
}

impl VaultIssuer {
    /// Asks Vault for identities of `domain`.
    pub fn new(config: VaultConfig, domain: TrustDomain) -> Self {
        let bundle = BundleFile::new(config.trust_bundle.clone(), domain);
        Self { config, bundle, login: Mutex::new(None) }
    }

    async fn ask(&self, id: &SpiffeId, csr: &[u8]) -> Result<Issued, IssueError> {
        let mut body = json!({
            "csr": pem("CERTIFICATE REQUEST", csr),
            "uri_sans": id.as_str(),
            "format": "pem",
        });
        if let Some(lifetime) = self.config.lifetime {
            body["ttl"] = json!(format!("{}s", lifetime.as_secs()));
        }
        let path = format!("/v1/{}/sign/{}", self.config.mount, self.config.role);
        let token = self.token().await?;
        let answer = self.post(&path, Some(&token), &body).await;
        if matches!(answer, Err(IssueError::Refused { .. })) {
            // A token that was revoked before its time is not used again.
            *self.login.lock().await = None;
        }
        let signed: Signed = self.read(answer?)?;
        let Certificates { certificate, ca_chain, issuing_ca } = signed.data;
        let above = if ca_chain.is_empty() { issuing_ca } else { ca_chain.join("\n") };
        let text = format!("{certificate}\n{above}");
        let chain = chain_from_pem(&text).map_err(|e| self.unusable(format!("the chain is not PEM: {e}")))?;
        Ok(Issued { chain, bundle: None })
    }

    async fn token(&self) -> Result<String, IssueError> {
        let (role, mount, token) = match &self.config.auth {
            VaultAuth::Token { file } => return read_token(file, "issuer.vault.auth.token.file"),
            VaultAuth::Kubernetes { role, mount, token } => (role, mount, token),
        };
        let mut login = self.login.lock().await;
        if let Some((token, until)) = login.as_ref()
            && Instant::now() < *until
        {
            return Ok(token.clone());
        }
        let jwt = read_token(token, "issuer.vault.auth.kubernetes.token")?;
        let began = Instant::now();
        let body = json!({"role": role, "jwt": jwt});
        let answer = self.post(&format!("/v1/auth/{mount}/login"), None, &body).await?;
        let Auth { client_token, lease_duration } = self.read::<LoggedIn>(answer)?.auth;
        let until = began + Duration::from_secs(lease_duration) / 2;
        *login = Some((client_token.clone(), until));
        Ok(client_token)
    }

    /// Posts JSON; the answer to a request that Vault granted.
    async fn post(&self, path: &str, token: Option<&str>, body: &Value) -> Result<Bytes, IssueError> {
        let unreachable = |detail: String| IssueError::Unreachable { issuer: self.name(), detail };
        // Checked when the configuration was read.
        let uri: Uri = self
            .config
            .address
            .parse()
            .map_err(|e| IssueError::Ours(format!("issuer.vault.address: {e}")))?;
        let host = uri.authority().map(|authority| authority.as_str()).unwrap_or_default();
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header("host", host)
            // Vault's own protection against being asked by way of somebody's URL.
            .header("x-vault-request", "true")
            .header("content-type", "application/json");
        if let Some(token) = token {
            request = request.header("x-vault-token", token);
        }
        if let Some(namespace) = &self.config.namespace {
            request = request.header("x-vault-namespace", namespace);
        }
        let request = request.body(Full::new(Bytes::from(body.to_string()))).map_err(|e| {
            IssueError::Ours(format!("the token or issuer.vault has characters that HTTP cannot carry: {e}"))
        })?;
        let exchange = async {
            match uri.scheme_str() {
                Some("https") => self.exchange(self.secure(&uri).await?, request).await,
                _ => self.exchange(plain(&uri).await.map_err(|e| unreachable(e.to_string()))?, request).await,
            }
        };
        let answered = timeout(CALL_TIMEOUT, exchange).await;
        let (status, retry_after, answer) =
            answered.unwrap_or_else(|_| Err(unreachable("it does not answer".into())))?;
        if status.is_success() {
            return Ok(answer);
        }
        let said: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let words: Vec<&str> =
            said["errors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let detail = format!("{} for {path}: {}", status.as_u16(), words.join("; ").replace('\n', " "));
        if status.is_server_error() {
            return Err(unreachable(detail));
        }
        let hint = match status {
            StatusCode::FORBIDDEN => "; may the agent's token sign by this role?",
            StatusCode::NOT_FOUND => "; are issuer.vault.mount and role right?",
            _ => {
                "; do the role's allowed_uri_sans, key_type and require_cn admit this identity, a P-256 key and no common name?"
            }
        };
        Err(IssueError::Refused { issuer: self.name(), detail: format!("{detail}{hint}"), retry_after })
    }

    async fn secure(
        &self,
        uri: &Uri,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>, IssueError> {
        // Both were checked when the configuration was read.
        let file = self.config.server_bundle.as_deref().unwrap_or(&self.config.trust_bundle);
        let host = uri.host().unwrap_or_default();
        let (connector, name) = grpc::verifying(host, "issuer.vault.address", file, b"http/1.1")?;
        let connected = grpc::connect(connector, dialled(uri), Some(name)).await;
        connected.map_err(|e| IssueError::Unreachable { issuer: self.name(), detail: e.to_string() })
    }

    async fn exchange<Io: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        io: Io,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, Option<Duration>, Bytes), IssueError> {
        let unreachable = |detail: String| IssueError::Unreachable { issuer: self.name(), detail };
        let (mut send, connection) =
            http1::handshake(TokioIo::new(io)).await.map_err(|e| unreachable(e.to_string()))?;
        // Ends when the answer has been read; its error would be the request's too.
        let connection = tokio::spawn(connection);
        let response = send.send_request(request).await.map_err(|e| unreachable(e.to_string()))?;
        let status = response.status();
        let after = response.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await;
        connection.abort();
        let body = body.map_err(|e| self.unusable(format!("the answer cannot be read: {e}")))?.to_bytes();
        Ok((status, after.map(Duration::from_secs), body))
    }

    fn read<T: serde::de::DeserializeOwned>(&self, answer: Bytes) -> Result<T, IssueError> {
        // The parser's words could repeat a token.
        serde_json::from_slice(&answer).map_err(|_| self.unusable("not the JSON that was asked for".into()))
    }

    fn unusable(&self, detail: String) -> IssueError {
        IssueError::Unusable { issuer: self.name(), detail }
    }
}

impl Signer for VaultIssuer {
    fn kind(&self) -> IssuerKind {
        IssuerKind::Vault
    }

    fn name(&self) -> String {
        format!("Vault at {}", self.config.address)
    }

    fn sign<'a>(&'a self, id: &'a SpiffeId, csr: &'a [u8]) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.ask(id, csr))
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Box::pin(async { self.bundle.next().await.map_err(IssueError::Ours) })
    }
}

fn read_token(file: &Path, field: &str) -> Result<String, IssueError> {
    let text = read_text(file).map_err(|error| IssueError::Ours(format!("the token ({field}): {error}")))?;
    Ok(text.trim().to_owned())
}

async fn plain(uri: &Uri) -> std::io::Result<TcpStream> {
    TcpStream::connect(dialled(uri)).await
}

/// `host:port`; Vault's own port if none is given.
fn dialled(uri: &Uri) -> String {
    format!("{}:{}", uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(8200))
}
