//! Other trust domains: fetches their bundles, keeps the last good state of each, and says what holds.
//!
//! A bundle comes from a file, or from a SPIFFE bundle endpoint. What cannot be fetched or used changes nothing: the
//! last good bundle holds, over a restart too, and a state that is older than the one held is never taken.

pub mod document;
mod endpoint;
mod kept;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::federation::{FederatedConfig, FederationConfig};
use crate::config::read_text;
use crate::config::watch::{LOOK_EVERY, Stamp, stamp};
use crate::identity::federation::{Admit, Federated, Federation};
use document::Document;
use endpoint::Endpoint;
use kept::Kept;

/// For an endpoint that does not say how often (SPIFFE Trust Domain and Bundle, section 4.1.2).
const REFRESH: Duration = Duration::from_secs(300);
/// Whatever an endpoint says, it is not asked more often, and its news is not missed for longer.
const REFRESH_BOUNDS: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(3600)];
/// The first wait after a failure; it doubles up to the usual interval.
const RETRY: Duration = Duration::from_secs(2);

/// Why a configured trust domain cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("federation.trustDomains ({domain}): {detail}")]
pub struct FederationError {
    domain: String,
    detail: String,
}

/// The configured trust domains.
#[derive(Debug)]
pub struct Federator {
    sources: Vec<Source>,
    now: Arc<watch::Sender<Arc<Federation>>>,
}

/// One trust domain.
#[derive(Debug)]
struct Source {
    config: FederatedConfig,
    endpoint: Option<Endpoint>,
    kept: Option<Kept>,
    held: Document,
    /// Told once.
    fault: Option<String>,
}

impl Federator {
    /// Reads the configured files, and in `dir` what was fetched before a restart.
    ///
    /// # Errors
    /// When a configured bundle cannot be used.
    pub fn open(config: &FederationConfig, dir: Option<&Path>) -> Result<Self, FederationError> {
        let mut sources = Vec::new();
        let mut first = Federation::default();
        for config in &config.trust_domains {
            let wrong = |detail| FederationError { domain: config.trust_domain.to_string(), detail };
            let source = Source::open(config.clone(), dir).map_err(wrong)?;
            first.insert(config.trust_domain.clone(), source.federated(&source.held).map_err(wrong)?);
            sources.push(source);
        }
        Ok(Self { sources, now: Arc::new(watch::Sender::new(Arc::new(first))) })
    }

    /// What holds now, and from now on.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Federation>> {
        self.now.subscribe()
    }

    /// Runs for ever: follows every source.
    pub async fn run(self) {
        let mut tasks = JoinSet::new();
        for source in self.sources {
            tasks.spawn(source.follow(Arc::clone(&self.now)));
        }
        while tasks.join_next().await.is_some() {}
        std::future::pending().await
    }
}

impl Source {
    fn open(config: FederatedConfig, dir: Option<&Path>) -> Result<Self, String> {
        let configured = match &config.bundle {
            Some(file) => Some(read(file)?),
            None => None,
        };
        let endpoint = Endpoint::new(&config);
        let kept = dir.filter(|_| endpoint.is_some()).map(|dir| {
            Kept::new(dir, &config.trust_domain, configured.as_ref().map(|document| &document.roots))
        });
        let before = kept.as_ref().and_then(Kept::load);
        let held = before.or(configured).unwrap_or_default();
        Ok(Self { config, endpoint, kept, held, fault: None })
    }

    /// A state for whoever verifies. Before anything was fetched it trusts nobody.
    fn federated(&self, document: &Document) -> Result<Federated, String> {
        Federated::new(document.roots.clone(), self.config.admit).map_err(|error| error.to_string())
    }

    async fn follow(mut self, now: Arc<watch::Sender<Arc<Federation>>>) {
        let mut failures = 0;
        let mut seen = self.config.bundle.as_deref().map(stamp);
        loop {
            let outcome = match &self.endpoint {
                Some(endpoint) => endpoint.fetch(&self.held.roots).await,
                None => self.next_of_file(&mut seen).await,
            };
            match outcome.and_then(|document| self.take(document, &now)) {
                Ok(()) => {
                    failures = 0;
                    if self.fault.take().is_some() {
                        tracing::info!(trust_domain = %self.config.trust_domain, "its bundle can be had again");
                    }
                }
                Err(error) => {
                    failures += 1;
                    self.tell(error);
                }
            }
            if self.endpoint.is_some() {
                tokio::time::sleep(wait(self.held.refresh_hint, failures)).await;
            }
        }
    }

    /// The file's content, once it has changed.
    async fn next_of_file(&self, seen: &mut Option<Option<Stamp>>) -> Result<Document, String> {
        // An entry without an endpoint has a file: both were checked when the configuration was read.
        let Some(file) = self.config.bundle.as_deref() else { return std::future::pending().await };
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let now = Some(stamp(file));
            if std::mem::replace(seen, now) != now {
                return read(file);
            }
        }
    }

    /// Takes a newer state into use.
    fn take(&mut self, document: Document, now: &watch::Sender<Arc<Federation>>) -> Result<(), String> {
        if let (Some(offered), Some(held)) = (document.sequence, self.held.sequence)
            && offered < held
        {
            return Err(format!("its bundle is older (sequence {offered}) than the one held ({held})"));
        }
        let (domain, next) = (&self.config.trust_domain, self.federated(&document)?);
        let changed = document != self.held;
        self.held = document;
        let news = now.send_if_modified(|federation| {
            if federation.get(domain) == Some(&next) {
                return false;
            }
            let mut all = Federation::clone(federation);
            all.insert(domain.clone(), next);
            *federation = Arc::new(all);
            true
        });
        if news {
            let (roots, sequence) = (self.held.roots.len(), self.held.sequence);
            tracing::info!(trust_domain = %domain, roots, sequence, "the bundle of a federated trust domain changed");
        }
        if let Some(kept) = self.kept.as_ref().filter(|_| changed)
            && let Err(error) = kept.save(&self.held)
        {
            tracing::warn!(trust_domain = %domain, %error, "cannot keep its bundle; after a restart it has to be fetched first");
        }
        Ok(())
    }

    fn tell(&mut self, error: String) {
        if self.fault.as_ref() != Some(&error) {
            let endpoint = self.config.endpoint.as_deref();
            tracing::warn!(trust_domain = %self.config.trust_domain, endpoint, error, "no bundle of a federated trust domain; the last good one holds");
            self.fault = Some(error);
        }
    }
}

/// How long until an endpoint is asked again.
fn wait(hint: Option<u64>, failures: u32) -> Duration {
    let [least, most] = REFRESH_BOUNDS;
    let usual = hint.map_or(REFRESH, Duration::from_secs).clamp(least, most);
    let wait = match failures {
        0 => usual,
        failures => RETRY.saturating_mul(1 << failures.min(16).saturating_sub(1)).min(usual),
    };
    // Those who were started together do not ask together.
    wait.mul_f64(0.9 + 0.2 * fastrand::f64())
}

/// A file with a bundle: a JWK set, or PEM roots.
fn read(file: &Path) -> Result<Document, String> {
    let text = read_text(file).map_err(|error| error.to_string())?;
    let named = |error: String| format!("{}: {error}", file.display());
    if text.trim_start().starts_with('{') {
        return Document::parse(text.as_bytes()).map_err(|error| named(error.to_string()));
    }
    let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let roots = roots.map_err(|error| named(format!("neither a SPIFFE bundle nor PEM: {error}")))?;
    if roots.is_empty() {
        return Err(named("neither a SPIFFE bundle nor PEM: there is no certificate in it".into()));
    }
    Federated::new(roots.clone(), Admit::default()).map_err(|error| named(error.to_string()))?;
    Ok(Document { roots, ..Document::default() })
}
