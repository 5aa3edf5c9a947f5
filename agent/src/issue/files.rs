//! SVIDs that somebody else writes into a directory and renews there.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;

use super::bundle_file::BundleFile;
use super::{IssueError, Issuer, Obtained, chain_from_pem};
use crate::config::issuer::FilesConfig;
use crate::config::read_text;
use crate::config::watch::{LOOK_EVERY, Stamp, stamp};
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::X509Svid;
use crate::identity::{SpiffeId, TrustDomain};
use crate::tls::provider::provider;
use crate::verdict::IssuerKind;

/// Most files looked at: a directory given by mistake shall not be read whole.
const MAX_FILES: usize = 4096;

/// Files and their states.
type Files = Vec<(PathBuf, Option<Stamp>)>;

/// A directory of SVIDs.
#[derive(Debug)]
pub struct FilesIssuer {
    directory: PathBuf,
    bundle: BundleFile,
    /// The files as they were when the rotation was last told.
    seen: Mutex<Option<Files>>,
}

impl FilesIssuer {
    /// Takes SVIDs and roots of `domain` from files.
    pub fn new(config: FilesConfig, domain: TrustDomain) -> Self {
        let bundle = BundleFile::new(config.trust_bundle, domain);
        Self { directory: config.directory, bundle, seen: Mutex::default() }
    }

    async fn find(&self, id: &SpiffeId) -> Result<Obtained, IssueError> {
        let (directory, wanted) = (self.directory.clone(), id.clone());
        let reading = tokio::task::spawn_blocking(move || find(&directory, &wanted));
        let found = reading.await.map_err(|e| IssueError::Ours(e.to_string()))?;
        found.map_err(|detail| IssueError::Refused { issuer: self.name(), detail, retry_after: None })
    }

    async fn changed(&self) {
        loop {
            let now = files(&self.directory).unwrap_or_default();
            let now: Files = now.into_iter().map(|path| (path.clone(), stamp(&path))).collect();
            {
                let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                // What is there at the start is read anyway.
                if seen.replace(now.clone()).is_some_and(|before| before != now) {
                    return;
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl Issuer for FilesIssuer {
    fn kind(&self) -> IssuerKind {
        IssuerKind::Files
    }

    fn name(&self) -> String {
        format!("the directory {} (issuer.files.directory)", self.directory.display())
    }

    fn obtain<'a>(&'a self, id: &'a SpiffeId) -> BoxFuture<'a, Result<Obtained, IssueError>> {
        Box::pin(self.find(id))
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Box::pin(async { self.bundle.next().await.map_err(IssueError::Ours) })
    }

    fn pushed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.changed())
    }
}

/// The SVID of `id` that is valid longest.
fn find(directory: &Path, id: &SpiffeId) -> Result<Obtained, String> {
    let (mut found, mut faults): (Option<X509Svid>, Vec<String>) = (None, Vec::new());
    for path in files(directory)?.iter().filter(|path| is_chain(path)) {
        match read(path) {
            Ok(svid) if svid.id() == id => {
                let is_later = |held: &X509Svid| held.leaf().not_after < svid.leaf().not_after;
                if found.as_ref().is_none_or(is_later) {
                    found = Some(svid);
                }
            }
            Ok(_) => {}
            Err(fault) => faults.push(format!("{}: {fault}", path.display())),
        }
    }
    let svid = found.ok_or_else(|| {
        let more = if faults.is_empty() { String::new() } else { format!(" ({})", faults.join("; ")) };
        format!("no file there has a usable certificate and key of {id}{more}")
    })?;
    Ok(Obtained { svid, key: None, bundle: None })
}

fn is_chain(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "pem" || extension == "crt")
}

fn read(path: &Path) -> Result<X509Svid, String> {
    let text = read_text(path).map_err(|e| e.to_string())?;
    let chain = chain_from_pem(&text).map_err(|e| format!("not PEM: {e}"))?;
    let key = match PrivateKeyDer::from_pem_slice(text.as_bytes()) {
        Ok(key) => key,
        Err(_) => {
            let beside = read_text(&path.with_extension("key")).map_err(|e| e.to_string())?;
            PrivateKeyDer::from_pem_slice(beside.as_bytes()).map_err(|e| {
                format!("no private key there or in {}: {e}", path.with_extension("key").display())
            })?
        }
    };
    let key: Arc<dyn rustls::sign::SigningKey> =
        provider().key_provider.load_private_key(key).map_err(|e| format!("the private key: {e}"))?;
    X509Svid::new(chain, key).map_err(|e| e.to_string())
}

/// Chains and keys in the directory and one level below, in order. Names with two dots in front are how
/// Kubernetes swaps a mounted secret.
fn files(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let list = |directory: &Path| -> Result<Vec<PathBuf>, String> {
        let entries =
            fs::read_dir(directory).map_err(|e| format!("cannot read {}: {e}", directory.display()))?;
        let hidden =
            |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".."));
        Ok(entries.flatten().map(|entry| entry.path()).filter(|path| !hidden(path)).collect())
    };
    let mut found = Vec::new();
    for path in list(directory)? {
        if path.is_dir() {
            found.extend(list(&path)?);
        } else {
            found.push(path);
        }
    }
    found.retain(|path| is_chain(path) || path.extension().is_some_and(|extension| extension == "key"));
    if found.len() > MAX_FILES {
        return Err(format!("more than {MAX_FILES} files; is this the right directory?"));
    }
    found.sort();
    Ok(found)
}
