//! Asks a SPIFFE bundle endpoint (SPIFFE Federation, section 5), by either of its profiles.
//!
//! One GET on a connection of its own, with bounds on time and size. Redirections are not followed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::document::{Document, MAX_DOCUMENT_BYTES};
use crate::config::federation::{FederatedConfig, Profile};
use crate::config::read_text;
use crate::identity::bundle::TrustBundle;
use crate::identity::{SpiffeId, TrustDomain};
use crate::tls;

/// From the first packet to the last.
const PATIENCE: Duration = Duration::from_secs(15);
const ALPN: &[u8] = b"http/1.1";

/// An endpoint, and how its server is verified.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    domain: TrustDomain,
    uri: Uri,
    how: How,
}

#[derive(Clone, Debug)]
enum How {
    /// With these PEM roots, or the machine's.
    Web(Option<PathBuf>),
    Spiffe(SpiffeId),
}

impl Endpoint {
    /// The entry's endpoint, if it has one. The entry was checked.
    pub(super) fn new(config: &FederatedConfig) -> Option<Self> {
        let how = match (config.profile?, &config.spiffe_id) {
            (Profile::HttpsWeb, _) => How::Web(config.roots.clone()),
            (Profile::HttpsSpiffe, id) => How::Spiffe(id.clone()?),
        };
        Some(Self { domain: config.trust_domain.clone(), uri: config.endpoint.as_ref()?.parse().ok()?, how })
    }

    /// What the endpoint says now; `held` are the roots that are held of its trust domain.
    pub(super) async fn fetch(&self, held: &[CertificateDer<'static>]) -> Result<Document, String> {
        let asked = timeout(PATIENCE, self.get(held)).await;
        let text = asked.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")))?;
        Document::parse(&text).map_err(|error| error.to_string())
    }

    async fn get(&self, held: &[CertificateDer<'static>]) -> Result<Bytes, String> {
        let host = self.uri.host().unwrap_or_default();
        let config = self.verifying(held)?;
        let tcp = TcpStream::connect((host.trim_matches(['[', ']']), self.uri.port_u16().unwrap_or(443)))
            .await
            .map_err(|error| error.to_string())?;
        let name = match self.how {
            How::Web(_) => ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
                .map_err(|_| format!("{host} is no name of a host"))?,
            // The SPIFFE ID says who must answer; the address only fills the API's place.
            How::Spiffe(_) => ServerName::IpAddress(tcp.peer_addr().map_err(|e| e.to_string())?.ip().into()),
        };
        let tls = TlsConnector::from(config)
            .connect(name, tcp)
            .await
            .map_err(|error| format!("the TLS handshake failed: {}", tls::explain(&error)))?;
        let (mut send, connection) =
            http1::handshake(TokioIo::new(tls)).await.map_err(|error| error.to_string())?;
        // Ends with the request; its error would be the request's too.
        let connection = tokio::spawn(connection);
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::get(path)
            .header(header::HOST, self.uri.authority().map_or(host, |authority| authority.as_str()))
            .header(header::ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())
            .map_err(|error| error.to_string())?;
        let answered = async {
            let response = send.send_request(request).await.map_err(|error| error.to_string())?;
            if response.status() != http::StatusCode::OK {
                return Err(format!("it answered {}", response.status()));
            }
            let body = Limited::new(response.into_body(), MAX_DOCUMENT_BYTES).collect().await;
            body.map(|body| body.to_bytes()).map_err(|error| format!("its answer cannot be read: {error}"))
        };
        let answer = answered.await;
        connection.abort();
        answer
    }

    fn verifying(&self, held: &[CertificateDer<'static>]) -> Result<Arc<ClientConfig>, String> {
        let config = match &self.how {
            How::Web(roots) => tls::client::web(web_roots(roots.as_deref())?, ALPN),
            How::Spiffe(id) => {
                let bundle = TrustBundle::new(self.domain.clone(), held.to_vec())
                    .map_err(|error| format!("the bundle that is held cannot verify it: {error}"))?;
                tls::client::anonymous(&bundle, id.clone(), ALPN)
            }
        };
        config.map_err(|error| error.to_string())
    }
}

/// Read each time: both are renewed under us, and once in minutes is seldom.
fn web_roots(file: Option<&Path>) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    match file {
        Some(file) => {
            let pem = read_text(file).map_err(|error| error.to_string())?;
            for root in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                root.map_err(|e| e.to_string())
                    .and_then(|root| store.add(root).map_err(|e| e.to_string()))
                    .map_err(|error| format!("{}: {error}", file.display()))?;
            }
        }
        None => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    match store.is_empty() {
        true => {
            Err("there are no roots of the Web PKI to verify it with; name a file of them (roots)".into())
        }
        false => Ok(store),
    }
}
