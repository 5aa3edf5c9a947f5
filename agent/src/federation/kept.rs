//! The last good bundle of a trust domain, over a restart. Bundles are no secret.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::document::Document;
use crate::identity::TrustDomain;
use crate::text::hex;

#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    /// Names the roots that the operator has configured: who changes them means it.
    configured: String,
}

#[derive(Serialize, Deserialize)]
struct File {
    configured: String,
    /// As an endpoint has it.
    bundle: serde_json::Value,
}

impl Kept {
    pub(super) fn new(
        dir: &Path,
        domain: &TrustDomain,
        configured: Option<&Vec<CertificateDer<'static>>>,
    ) -> Self {
        let all: Vec<u8> = configured.into_iter().flatten().flat_map(|root| root.iter().copied()).collect();
        let configured = hex(digest(&SHA256, &all).as_ref());
        // A trust domain's name has no '/', and is not `..` with this ending.
        Self { path: dir.join(format!("{domain}.json")), configured }
    }

    /// What was kept, if it was fetched under the same configuration.
    pub(super) fn load(&self) -> Option<Document> {
        let text = std::fs::read(&self.path).ok()?;
        let read = || {
            let file: File = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
            if file.configured != self.configured {
                return Ok(None);
            }
            Document::parse(file.bundle.to_string().as_bytes()).map(Some).map_err(|error| error.to_string())
        };
        read().unwrap_or_else(|error: String| {
            tracing::warn!(error, file = %self.path.display(), "a bundle from before the restart cannot be read; it is fetched anew");
            None
        })
    }

    pub(super) fn save(&self, document: &Document) -> io::Result<()> {
        let bundle = document.to_json().map_err(io::Error::other)?;
        let file = File { configured: self.configured.clone(), bundle: serde_json::from_str(&bundle)? };
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Renamed into place: a crash leaves the old one whole.
        let new = self.path.with_extension("new");
        let mut written = std::fs::File::create(&new)?;
        written.write_all(&serde_json::to_vec(&file)?)?;
        written.sync_all()?;
        std::fs::rename(new, &self.path)
    }
}
