//! Other trust domains at the authority: their bundles go to the agents with our own, and ours is served to them.
//!
//! The bundle endpoint is public: it says which roots there are, which every certificate says as well. It asks
//! nobody who they are, and reads nothing but the request's path.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use rustls::ServerConfig;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::config::{AuthorityConfig, BundleEndpoint};
use super::keeper::Own;
use super::serve::{OWN_LIFETIME, next, svid};
use crate::admin::{self, Page, Pages};
use crate::config::watch::{Stamp, stamp};
use crate::federation::Federator;
use crate::federation::document::Document;
use crate::identity::bundle::TrustBundle;
use crate::identity::federation::Federation;
use crate::tls;

/// Readers at once; each has so long from its first packet to its last.
const MAX_READERS: usize = 64;
const PATIENCE: Duration = Duration::from_secs(15);

/// Follows the other trust domains, and serves this one's bundle, as far as that is configured.
///
/// # Errors
/// When a configured bundle or certificate cannot be used, or the endpoint cannot listen.
pub(super) async fn start(
    config: &AuthorityConfig,
    bundle: &watch::Sender<Arc<TrustBundle>>,
    own: watch::Receiver<Arc<Own>>,
    tasks: &mut JoinSet<()>,
) -> Result<()> {
    let federator = Federator::open(&config.federation.others(), Some(&config.state_dir.join("federation")))?;
    let mut others = federator.subscribe();
    // Also when there are none: an agent that knows of one from before forgets it.
    put(bundle, &others.borrow_and_update());
    let sender = bundle.clone();
    tasks.spawn(async move {
        while others.changed().await.is_ok() {
            put(&sender, &others.borrow_and_update());
        }
    });
    tasks.spawn(federator.run());
    if let Some(endpoint) = &config.federation.bundle_endpoint {
        let listen = endpoint.listen;
        let listener = TcpListener::bind(listen)
            .await
            .with_context(|| format!("cannot listen on {listen} (federation.bundleEndpoint.listen)"))?;
        let mut shown = Shown { endpoint: endpoint.clone(), own, made: None };
        shown.config(SystemTime::now()).context("federation.bundleEndpoint")?;
        tasks.spawn(serve(listener, shown, pages(bundle.subscribe(), endpoint.refresh_hint)));
        tracing::info!(%listen, "the trust bundle is served to other trust domains");
    }
    Ok(())
}

fn put(bundle: &watch::Sender<Arc<TrustBundle>>, others: &Arc<Federation>) {
    bundle.send_if_modified(|held| {
        let changed = held.federation() != Some(others);
        if changed {
            *held = Arc::new(TrustBundle::clone(held).with_federation(Arc::clone(others)));
        }
        changed
    });
}

fn pages(bundle: watch::Receiver<Arc<TrustBundle>>, refresh_hint: Duration) -> Pages {
    Arc::new(move |path: &str| {
        if path != "/" {
            return None;
        }
        let bundle = Arc::clone(&bundle.borrow());
        let document = Document {
            roots: bundle.roots().to_vec(),
            sequence: Some(bundle.generation()),
            refresh_hint: Some(refresh_hint.as_secs()),
        };
        Some(match document.to_json() {
            Ok(body) => Page { kind: "application/json", ..Page::text(body) },
            Err(error) => {
                tracing::error!(error, "the trust bundle cannot be served to other trust domains");
                let status = http::StatusCode::INTERNAL_SERVER_ERROR;
                Page { status, ..Page::text("the bundle cannot be written; see the authority's log\n") }
            }
        })
    })
}

async fn serve(listener: TcpListener, mut shown: Shown, pages: Pages) {
    let readers = Arc::new(Semaphore::new(MAX_READERS));
    while let Some((tcp, reader, permit)) = next(&listener, &readers).await {
        let config = match shown.config(SystemTime::now()) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the bundle endpoint has nothing to show");
                continue;
            }
        };
        let pages = Arc::clone(&pages);
        tokio::spawn(async move {
            let served = async {
                match TlsAcceptor::from(config).accept(tcp).await {
                    Ok(tls) => admin::connection(tls, pages).await,
                    Err(error) => failed(reader, &error),
                }
            };
            if timeout(PATIENCE, served).await.is_err() {
                tracing::debug!(%reader, "a reader of the trust bundle took too long");
            }
            drop(permit);
        });
    }
}

fn failed(reader: SocketAddr, error: &std::io::Error) {
    tracing::debug!(%reader, %error, "TLS handshake failed at the bundle endpoint");
}

/// What the endpoint shows: the authority's own SVID, or the configured certificate.
struct Shown {
    endpoint: BundleEndpoint,
    own: watch::Receiver<Arc<Own>>,
    made: Option<Made>,
}

/// A TLS configuration, when it was made, and what it was made from.
struct Made {
    at: SystemTime,
    own: Arc<Own>,
    files: [Option<Stamp>; 2],
    config: Arc<ServerConfig>,
}

impl Shown {
    fn config(&mut self, now: SystemTime) -> Result<Arc<ServerConfig>> {
        let own = Arc::clone(&self.own.borrow());
        let files = [&self.endpoint.certificate, &self.endpoint.key];
        let files = files.map(|file| file.as_deref().and_then(stamp));
        if let Some(made) = &self.made
            && Arc::ptr_eq(&made.own, &own)
            && made.files == files
            && now.duration_since(made.at).is_ok_and(|age| age < OWN_LIFETIME / 2)
        {
            return Ok(Arc::clone(&made.config));
        }
        let config = match self.make(&own, now) {
            Ok(config) => config,
            // A certificate that is being replaced is half there for a moment; the one before is good for longer.
            Err(error) => match &self.made {
                Some(made) if self.endpoint.certificate.is_some() => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "the bundle endpoint goes on with the certificate it had"
                    );
                    Arc::clone(&made.config)
                }
                _ => return Err(error),
            },
        };
        self.made = Some(Made { at: now, own, files, config: Arc::clone(&config) });
        Ok(config)
    }

    fn make(&self, own: &Own, now: SystemTime) -> Result<Arc<ServerConfig>> {
        let certified = match (&self.endpoint.certificate, &self.endpoint.key) {
            (Some(certificate), Some(key)) => {
                let read = |file: &std::path::Path| {
                    std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))
                };
                tls::server::certified(&read(certificate)?, &read(key)?)
                    .with_context(|| format!("{}, {}", certificate.display(), key.display()))?
            }
            _ => Arc::clone(svid(own, now)?.certified_key()),
        };
        Ok(tls::server::public(certified)?)
    }
}
