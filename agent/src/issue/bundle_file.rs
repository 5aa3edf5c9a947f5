//! The mesh's roots from a file, read again whenever it changes.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use crate::config::read_text;
use crate::config::watch::{LOOK_EVERY, Stamp, stamp};
use crate::identity::TrustDomain;
use crate::identity::bundle::TrustBundle;

#[derive(Debug)]
pub(super) struct BundleFile {
    path: PathBuf,
    domain: TrustDomain,
    /// The state of the file that was read last.
    seen: Mutex<Option<Option<Stamp>>>,
}

impl BundleFile {
    pub(super) fn new(path: PathBuf, domain: TrustDomain) -> Self {
        Self { path, domain, seen: Mutex::default() }
    }

    /// What the file says: at the first call at once, then after each change; each fault is told once.
    pub(super) async fn next(&self) -> Result<TrustBundle, String> {
        loop {
            if self.has_changed() {
                let path = self.path.display();
                let text = read_text(&self.path).map_err(|error| error.to_string())?;
                return TrustBundle::from_pem(self.domain.clone(), text.as_bytes())
                    .map_err(|error| format!("the trust bundle {path}: {error}"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn has_changed(&self) -> bool {
        let now = Some(stamp(&self.path));
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *seen, now) != now
    }
}
