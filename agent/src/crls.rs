//! Keeps the configured CRLs: reads their files when they change, verifies them, and marks what no longer holds.
//!
//! The last good list stays in force until its end and the grace after it; then nobody knows what the issuer has
//! revoked since, and its certificates are refused. It is kept over a restart ([`crate::issue::keep::crls`]): until
//! it is verified again its issuer's certificates are refused, and an older one never takes its place. Reading and
//! parsing happen off the data path.

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
use crate::issue::keep::crls::{CrlKeep, KeptCrl};
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
    /// That one as it was kept before a restart, while it is not verified again.
    kept: Option<KeptCrl>,
    fault: Option<Arc<str>>,
    seen: Option<Seen>,
}

/// All files.
#[derive(Debug)]
pub struct Keeper {
    trust: Arc<Trust>,
    keep: CrlKeep,
    sources: Vec<Source>,
}

impl Keeper {
    /// Reads the files and what `keep` has of them, and puts what they say in force. A list that cannot be verified
    /// yet makes its issuer's certificates be refused until it can.
    ///
    /// # Errors
    /// When a file holds no complete CRL and none of it was kept, or what was kept cannot be read.
    pub fn load(configs: &[CrlConfig], trust: Arc<Trust>, keep: CrlKeep) -> Result<Self, CrlFileError> {
        let sources = configs.iter().map(|config| Source::load(config, &keep)).collect::<Result<_, _>>()?;
        let mut keeper = Self { sources, trust, keep };
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
            source.look(trust.bundle.roots(), trust.roots_epoch, now, &self.keep);
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
    fn load(config: &CrlConfig, keep: &CrlKeep) -> Result<Self, CrlFileError> {
        let unusable = |detail: String| CrlFileError { file: config.file.clone(), detail };
        let spoilt = |error: &dyn Display| {
            let kept = keep.path(&config.file);
            unusable(format!(
                "the list kept from before the restart, {}, cannot be read: {error}; remove it if the configured file alone may say what is revoked",
                kept.display()
            ))
        };
        let kept = keep.load(&config.file).map_err(|error| spoilt(&error))?;
        let crl = match &kept {
            Some(kept) => Crl::from_der(&kept.der).map_err(|error| spoilt(&error))?,
            None => {
                read_der(&config.file).and_then(|der| Crl::from_der(&der).map_err(words)).map_err(unusable)?
            }
        };
        let name = config.file.display().to_string().into();
        let (config, crl) = (config.clone(), Arc::new(crl));
        Ok(Self { config, name, crl, good: false, kept, fault: None, seen: None })
    }

    /// Reads the file again if anything that decides about it has changed.
    fn look(&mut self, roots: &[CertificateDer<'static>], roots_epoch: u64, now: SystemTime, keep: &CrlKeep) {
        let seen = (stamp(&self.config.file), self.config.issuer.as_deref().and_then(stamp), roots_epoch);
        // A list from a clock that is ahead becomes good by itself.
        if self.seen == Some(seen) && self.fault.is_none() {
            return;
        }
        self.seen = Some(seen);
        if let Some(kept) =
            self.kept.take_if(|kept| crl::verify(&kept.der, roots, &kept.issuers, now).is_ok())
        {
            tracing::info!(file = %self.name, bytes = kept.der.len(), "took up the CRL from before the restart");
            self.good = true;
        }
        // A reader that panics on what it reads keeps the last good list like any other fault.
        let reading = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.read(roots, now)));
        let read = reading.unwrap_or_else(|_| Err("the parser gave up on it".into()));
        let fault = match read {
            Ok((crl, read)) => {
                self.take(crl, &read, keep);
                None
            }
            Err(fault) => Some(Arc::from(fault)),
        };
        if let Some(fault) = fault.as_ref().filter(|fault| self.fault.as_ref() != Some(fault)) {
            tracing::warn!(file = %self.name, %fault, kept = self.good, "a CRL's file cannot be used; the last good list stays in force until its end");
        }
        self.fault = fault;
    }

    fn take(&mut self, crl: Crl, read: &KeptCrl, keep: &CrlKeep) {
        if !crl.has_issuer_of(&self.crl) {
            let (now, before) = (crl.issuer_name(), self.crl.issuer_name());
            tracing::warn!(file = %self.name, now, before, "a CRL's file has another issuer's list; none answers for certificates of the one before any more");
        }
        let is_new = !self.good || *self.crl != crl;
        (self.crl, self.good, self.kept) = (Arc::new(crl), true, None);
        if is_new && let Err(error) = keep.save(&self.config.file, read) {
            tracing::error!(file = %self.name, %error, "cannot keep a CRL; after a restart this agent knows only what its file says then");
        }
    }

    fn read(&self, roots: &[CertificateDer<'static>], now: SystemTime) -> Result<(Crl, KeptCrl), String> {
        let der = read_der(&self.config.file)?;
        let read = Crl::from_der(&der).map_err(words)?;
        let issuers = match &self.config.issuer {
            Some(file) => {
                let text = read_text(file).map_err(words)?;
                let issuers: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
                issuers.map_err(|e| format!("{}: not PEM: {e}", file.display()))?
            }
            None => Vec::new(),
        };
        crl::verify(&der, roots, &issuers, now).map_err(words)?;
        if read.this_update() > now + TOLERANCE {
            return Err("it is from the future (thisUpdate); is this node's clock right?".into());
        }
        let known = self.good || self.kept.is_some();
        if known && read.has_issuer_of(&self.crl) && read.is_older_than(&self.crl) {
            return Err("it is older than the list in force".into());
        }
        Ok((read, KeptCrl { der, issuers }))
    }

    fn listed(&self, now: SystemTime) -> Listed {
        let unknown = if !self.good {
            Some(self.fault.clone().unwrap_or_else(|| "it was not verified".into()))
        } else if now.duration_since(self.crl.next_update()).is_ok_and(|late| late >= self.config.grace) {
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::identity::TrustDomain;
    use crate::identity::bundle::TrustBundle;
    use crate::identity::crl::tests::{Authority, authority, leaf, list};
    use crate::identity::svid::Leaf;

    /// One configured list, and the place where an agent keeps it.
    struct Scene {
        dir: PathBuf,
        ours: Authority,
        trust: Arc<Trust>,
        config: CrlConfig,
    }

    impl Scene {
        fn new() -> Self {
            let dir = std::env::temp_dir().join(format!("hauberk-crls-{:x}", fastrand::u64(..)));
            fs::create_dir_all(&dir).unwrap();
            let ours = authority();
            let trust = Trust::new(ours.ca.bundle().clone());
            let config = CrlConfig { file: dir.join("a.crl"), issuer: None, grace: Duration::ZERO };
            Self { dir, ours, trust, config }
        }

        fn write(&self, number: u64, revoked: &[&Leaf]) {
            let serials: Vec<&str> = revoked.iter().map(|leaf| leaf.serial.as_str()).collect();
            fs::write(&self.config.file, list(&self.ours, number, &serials, None)).unwrap();
        }

        /// Starts an agent, which knows of nothing but its files.
        fn start(&mut self) -> Result<Keeper, CrlFileError> {
            self.trust = Trust::new(self.ours.ca.bundle().clone());
            self.load()
        }

        fn load(&self) -> Result<Keeper, CrlFileError> {
            let keep = CrlKeep::in_dir(&self.dir);
            Keeper::load(std::slice::from_ref(&self.config), Arc::clone(&self.trust), keep)
        }

        fn refused(&self, leaf: &Leaf) -> Option<bool> {
            self.trust.snapshot().revoked(leaf).map(|revoked| revoked.unknown)
        }

        fn fault(&self) -> String {
            let now = self.trust.snapshot();
            let listed = &now.bundle.crls().0[0];
            listed.fault.as_deref().unwrap_or_default().to_owned()
        }
    }

    impl Drop for Scene {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }

    #[test]
    fn a_restarted_agent_remembers_who_is_revoked_whatever_became_of_the_file() {
        let mut scene = Scene::new();
        let (bad, good) = (leaf(&scene.ours), leaf(&scene.ours));
        scene.write(5, &[&bad]);
        scene.start().unwrap();
        assert_eq!((scene.refused(&bad), scene.refused(&good)), (Some(false), None));

        type Spoil<'a> = &'a dyn Fn(&Scene);
        let gone: Spoil<'_> = &|scene| fs::remove_file(&scene.config.file).unwrap();
        let older: Spoil<'_> = &|scene| scene.write(4, &[]);
        let spoilt: Spoil<'_> = &|scene| fs::write(&scene.config.file, "no list").unwrap();
        let forged: Spoil<'_> =
            &|scene| fs::write(&scene.config.file, list(&authority(), 9, &[], None)).unwrap();
        for (spoil, says) in [(gone, "cannot read"), (older, "older"), (spoilt, "PEM"), (forged, "signature")]
        {
            spoil(&scene);
            scene.start().unwrap();
            assert!(scene.fault().contains(says), "{says}: {}", scene.fault());
            assert_eq!((scene.refused(&bad), scene.refused(&good)), (Some(false), None), "{says}");
        }

        // A newer one is taken, and is what is remembered from then on.
        scene.write(6, &[&good]);
        scene.start().unwrap();
        assert_eq!((scene.refused(&bad), scene.refused(&good)), (None, Some(false)));
        gone(&scene);
        scene.start().unwrap();
        assert_eq!((scene.refused(&bad), scene.refused(&good)), (None, Some(false)));
    }

    #[test]
    fn what_was_kept_judges_nobody_until_its_issuer_is_known_again_and_refuses_its_certificates_till_then() {
        let mut scene = Scene::new();
        let (bad, good) = (leaf(&scene.ours), leaf(&scene.ours));
        scene.write(5, &[&bad]);
        scene.start().unwrap();
        fs::remove_file(&scene.config.file).unwrap();
        // The issuer of SVIDs sends the roots later.
        scene.trust = Trust::new(TrustBundle::unknown(TrustDomain::parse("td.test").unwrap()));
        let mut keeper = scene.load().unwrap();
        assert_eq!((scene.refused(&bad), scene.refused(&good)), (Some(true), Some(true)));
        // Older lists are refused meanwhile too.
        scene.write(4, &[]);
        assert!(scene.trust.set_bundle(scene.ours.ca.bundle().clone()));
        keeper.look(SystemTime::now());
        assert_eq!((scene.refused(&bad), scene.refused(&good)), (Some(false), None));
        assert!(scene.fault().contains("older"), "{}", scene.fault());
    }

    #[test]
    fn an_agent_whose_memory_is_spoilt_does_not_start_and_says_what_to_do() {
        let mut scene = Scene::new();
        scene.write(5, &[]);
        scene.start().unwrap();
        let kept = CrlKeep::in_dir(&scene.dir).path(&scene.config.file);
        fs::write(&kept, "no list").unwrap();
        let error = scene.start().unwrap_err().to_string();
        assert!(error.contains(&*kept.to_string_lossy()) && error.contains("remove it"), "{error}");
        fs::remove_file(&kept).unwrap();
        scene.start().unwrap();
        fs::remove_file(&scene.config.file).unwrap();
        fs::remove_file(&kept).unwrap();
        let error = scene.start().unwrap_err().to_string();
        assert!(error.contains("a.crl") && error.contains("cannot read it"), "{error}");
    }

    #[test]
    fn another_issuers_list_in_the_file_is_taken_though_its_count_is_lower() {
        let mut scene = Scene::new();
        scene.write(5, &[]);
        scene.start().unwrap();
        let theirs = authority();
        let roots = [scene.ours.ca.bundle().roots(), theirs.ca.bundle().roots()].concat();
        scene.trust = Trust::new(TrustBundle::new(TrustDomain::parse("td.test").unwrap(), roots).unwrap());
        let bad = leaf(&theirs);
        fs::write(&scene.config.file, list(&theirs, 1, &[&bad.serial], None)).unwrap();
        scene.load().unwrap();
        assert_eq!(scene.refused(&bad), Some(false));
    }
}
