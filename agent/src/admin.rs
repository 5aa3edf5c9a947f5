//! What the agent answers over HTTP: metrics and health to the cluster, its state to the operator.
//!
//! `/metrics`, `/healthz` and `/readyz` are on a TCP address and tell no secrets; the rest is on a
//! Unix socket that only root can open. Only GET, and nothing here changes anything.

mod report;
mod state;

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;

pub use state::{Readiness, State};

/// A scraper and a few curious people.
const MAX_CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Debug)]
pub struct Page {
    /// HTTP status.
    pub status: StatusCode,
    /// Media type.
    pub kind: &'static str,
    /// Body.
    pub body: String,
}

impl Page {
    /// Plain text with status 200.
    pub fn text(body: impl Into<String>) -> Self {
        Self { status: StatusCode::OK, kind: "text/plain; version=0.0.4; charset=utf-8", body: body.into() }
    }

    /// JSON with status 200.
    pub fn json(value: &impl serde::Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status: StatusCode::OK, kind: "application/json", body },
            Err(error) => Self { status: StatusCode::INTERNAL_SERVER_ERROR, ..Self::text(error.to_string()) },
        }
    }
}

/// What finds the answer to a path; `None` is 404.
pub type Pages = Arc<dyn Fn(&str) -> Option<Page> + Send + Sync>;

/// Serves pages over TCP, for ever.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((tcp, _)) => {
                let pages = Arc::clone(&pages);
                tokio::spawn(async move {
                    connection(tcp, pages).await;
                    drop(permit);
                });
            }
            Err(error) => failed(&error).await,
        }
    }
}

/// Serves pages over a Unix socket, for ever.
pub async fn serve_unix(listener: UnixListener, pages: Pages) {
    loop {
        match listener.accept().await {
            Ok((unix, _)) => drop(tokio::spawn(connection(unix, Arc::clone(&pages)))),
            Err(error) => failed(&error).await,
        }
    }
}

/// Opens the Unix socket, in place of one that an earlier agent left; only its owner may use it.
///
/// # Errors
/// When it cannot be made.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn failed(error: &io::Error) {
    tracing::warn!(%error, "the admin server cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Serves pages on one connection, until its reader ends it.
pub async fn connection(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, pages: Pages) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(&pages, &request);
        async move { Ok::<_, Infallible>(response) }
    });
    // How a reader ends its connection is its own affair.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(io), service)
        .await;
}

fn answer(pages: &Pages, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let page = match *request.method() {
        Method::GET | Method::HEAD => pages(request.uri().path())
            .unwrap_or_else(|| Page { status: StatusCode::NOT_FOUND, ..Page::text("no such page\n") }),
        _ => Page { status: StatusCode::METHOD_NOT_ALLOWED, ..Page::text("only GET\n") },
    };
    let mut response = Response::new(Full::new(Bytes::from(page.body)));
    *response.status_mut() = page.status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(page.kind));
    response
}
