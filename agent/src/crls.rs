//! Keeps the configured CRLs: reads their files when they change, verifies them, and marks what no longer holds.
//!
//! The last good list stays in force until its end and the grace after it; then nobody knows what the issuer has
//! revoked since, and its certificates are refused. Reading and parsing happen off the data path.

use std::fmt::Display;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};

use crate::config::watch::{LOOK_EVERY, Stamp, stamp};
use crate::config::{CrlConfig, read_text};
use crate::identity::crl::{self, Crl, Crls, Listed, MAX_CRL_BYTES};
use crate::trust::Trust;

/// A list may come from a CA whose clock is as much ahead of ours.
const TOLERANCE: Duration = Duration::from_secs(60);

/// A CRL's file cannot be used at all: not even whose certificates it is about can be told.
#[derive(Debug, thiserror::Error)]
#[error("the CRL {} (revocation.crls): {detail}", file.display())]
pub struct CrlFileError {
    /// The file.
    pub file: PathBuf,
    /// What is wrong.
    pub detail: String,
}

/// What was there when a file was read last: the list's file, the issuer's, the roots.
type Seen = (Option<Stamp>, Option<Stamp>, u64);

/// One file.
#[derive(Debug)]
struct Source {
    config: CrlConfig,
    name: Arc<str>,
    crl: Arc<Crl>,
    /// Whether that one was verified.
    good: bool,
    fault: Option<Arc<str>>,
    seen: Option<Seen>,
}

/// All files.
#[derive(Debug)]
pub struct Keeper {
    trust: Arc<Trust>,
    sources: Vec<Source>,
}

impl Keeper {
    /// Reads the files, and puts what they say in force. A list that cannot be verified yet makes its issuer's
    /// certificates be refused until it can.
    ///
    /// # Errors
    /// When a file holds no complete CRL.
    pub fn load(configs: &[CrlConfig], trust: Arc<Trust>) -> Result<Self, CrlFileError> {
        let load = |config: &CrlConfig| {
            let crl = read_der(&config.file).and_then(|der| Crl::from_der(&der).map_err(words));
            let crl = crl.map_err(|detail| CrlFileError { file: config.file.clone(), detail })?;
            let name = config.file.display().to_string().into();
            Ok(Source {
                config: config.clone(),
                name,
                crl: Arc::new(crl),
                good: false,
                fault: None,
                seen: None,
            })
        };
        let mut keeper = Self { sources: configs.iter().map(load).collect::<Result<_, _>>()?, trust };
        keeper.look(SystemTime::now());
        Ok(keeper)
    }

    /// Runs for ever.
    pub async fn follow(mut self) {
        if self.sources.is_empty() {
            return;
        }
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            // Reading may wait for a disk, and parsing takes its time.
            let looked = tokio::task::spawn_blocking(move || {
                self.look(SystemTime::now());
                self
            });
            match looked.await {
                Ok(keeper) => self = keeper,
                Err(error) => {
                    // What was in force stays so for ever, which no operator wants: restart.
                    tracing::error!(%error, "the CRLs are no longer followed; restart this agent");
                    return;
                }
            }
        }
    }

    fn look(&mut self, now: SystemTime) {
        let trust = self.trust.snapshot();
        for source in &mut self.sources {
            source.look(trust.bundle.roots(), trust.roots_epoch, now);
        }
        let listed = self.sources.iter().map(|source| source.listed(now)).collect();
        let (before, crls) = (Arc::clone(trust.bundle.crls()), Arc::new(Crls(listed)));
        if before == crls {
            return;
        }
        for listed in &crls.0 {
            let told = before.0.iter().find(|told| told.file == listed.file);
            if let Some(why) = &listed.unknown
                && told.is_none_or(|told| told.unknown.is_none())
            {
                tracing::error!(file = %listed.file, %why, "a CRL cannot be answered by: certificates of its issuer are refused");
            } else if listed.unknown.is_none()
                && told.is_none_or(|told| told.crl != listed.crl || told.unknown.is_some())
            {
                tracing::info!(file = %listed.file, entries = listed.crl.entries(), "a CRL is in force");
            }
        }
        self.trust.set_crls(crls);
    }
}

impl Source {
    /// Reads the file again if anything that decides about it has changed.
    fn look(&mut self, roots: &[CertificateDer<'static>], roots_epoch: u64, now: SystemTime) {
        let seen = (stamp(&self.config.file), self.config.issuer.as_deref().and_then(stamp), roots_epoch);
        // A list from a clock that is ahead becomes good by itself.
        if self.seen == Some(seen) && self.fault.is_none() {
            return;
        }
        self.seen = Some(seen);
        // A reader that panics on what it reads keeps the last good list like any other fault.
        let reading = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.read(roots, now)));
        let read = reading.unwrap_or_else(|_| Err("the parser gave up on it".into()));
        let fault = match read {
            Ok(crl) => {
                (self.crl, self.good) = (Arc::new(crl), true);
                None
            }
            Err(fault) => Some(Arc::from(fault)),
        };
        if let Some(fault) = fault.as_ref().filter(|fault| self.fault.as_ref() != Some(fault)) {
            tracing::warn!(file = %self.name, %fault, kept = self.good, "a CRL's file cannot be used; the last good list stays in force until its end");
        }
        self.fault = fault;
    }

    fn read(&self, roots: &[CertificateDer<'static>], now: SystemTime) -> Result<Crl, String> {
        let der = read_der(&self.config.file)?;
        let read = Crl::from_der(&der).map_err(words)?;
        let others = match &self.config.issuer {
            Some(file) => {
                let text = read_text(file).map_err(words)?;
                let others: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
                others.map_err(|e| format!("{}: not PEM: {e}", file.display()))?
            }
            None => Vec::new(),
        };
        crl::verify(&der, roots, &others, now).map_err(words)?;
        if read.this_update() > now + TOLERANCE {
            return Err("it is from the future (thisUpdate); is this node's clock right?".into());
        }
        if self.good && read.is_older_than(&self.crl) {
            return Err("it is older than the list in force".into());
        }
        Ok(read)
    }

    fn listed(&self, now: SystemTime) -> Listed {
        let unknown = if !self.good {
            Some(self.fault.clone().unwrap_or_else(|| "it was not verified".into()))
        } else if now >= self.crl.next_update() + self.config.grace {
            Some("the next one is overdue (nextUpdate and graceSeconds have passed)".into())
        } else {
            None
        };
        Listed {
            file: Arc::clone(&self.name),
            crl: Arc::clone(&self.crl),
            unknown,
            fault: self.fault.clone(),
        }
    }
}

fn words(error: impl Display) -> String {
    error.to_string()
}

/// A list as DER, or as PEM (RFC 7468, section 7).
fn read_der(path: &Path) -> Result<Vec<u8>, String> {
    let file = std::fs::File::open(path).map_err(|e| format!("cannot read it: {e}"))?;
    let mut bytes = Vec::new();
    file.take(MAX_CRL_BYTES + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot read it: {e}"))?;
    if bytes.len() as u64 > MAX_CRL_BYTES {
        return Err(format!("it is larger than {} MiB", MAX_CRL_BYTES >> 20));
    }
    if bytes.starts_with(b"\x30") {
        return Ok(bytes);
    }
    let list = CertificateRevocationListDer::from_pem_slice(&bytes);
    list.map(|list| list.to_vec()).map_err(|e| format!("it is neither DER nor PEM: {e}"))
}
