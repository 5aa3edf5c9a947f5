//! The trust state on disk: made once, read whole, changed in one step.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use zeroize::Zeroizing;

use super::{Document, Store, StoreError, Wrong};
use crate::ca::state::{Root, TrustState};
use crate::ca::{Ca, CaError};
use crate::identity::TrustDomain;

/// What an authority kept before there was a trust state: certificate and key of its root.
const BEFORE: &str = "ca.pem";

impl Store {
    /// The trust state; `None` if there is none yet.
    ///
    /// # Errors
    /// When it cannot be read, is open to others, or is not what it must be.
    pub fn trust(&self, domain: &TrustDomain) -> Result<Option<TrustState>, StoreError> {
        let Some(state) = self.read::<TrustState>(Document::Trust)? else { return Ok(None) };
        state.check(domain).map_err(|e| self.wrong(Document::Trust, e))?;
        Ok(Some(state))
    }

    /// The trust state. If there is none yet, takes up what an earlier version kept, whose SVIDs lived for
    /// `lifetime`; else begins with the root that `first` makes.
    ///
    /// # Errors
    /// As [`Store::trust`], and when no root can be made.
    pub fn trust_or_new(
        &self,
        domain: &TrustDomain,
        lifetime: Duration,
        now: SystemTime,
        first: impl FnOnce() -> Result<Root, StoreError>,
    ) -> Result<TrustState, StoreError> {
        if let Some(state) = self.trust(domain)? {
            self.put_aside();
            return Ok(state);
        }
        let state = match self.before(now)? {
            Some(root) => TrustState::migrated(domain.clone(), root, lifetime, now),
            None => TrustState::new(domain.clone(), first()?),
        };
        // Whoever comes first makes it; the other reads it.
        let text = self.text(Document::Trust, &state)?;
        self.documents.replace(Document::Trust, None, &text)?;
        self.put_aside();
        let missing = || StoreError::Io {
            path: self.documents.place(Document::Trust),
            source: io::ErrorKind::NotFound.into(),
        };
        self.trust(domain)?.ok_or_else(missing)
    }

    /// Changes the trust state in one step; returns what it is then. Lasting when this returns.
    ///
    /// # Errors
    /// When there is none, it cannot be read or written, or `change` refuses; then it stays as it was.
    pub fn change_trust<T, E: Into<Wrong>>(
        &self,
        change: impl FnMut(&mut TrustState) -> Result<T, E>,
    ) -> Result<(TrustState, T), StoreError> {
        self.change(Document::Trust, None, change)
    }

    /// What signs now; makes a root if there is none yet.
    ///
    /// # Errors
    /// As [`Store::trust_or_new`].
    pub fn ca(&self, domain: &TrustDomain, now: SystemTime) -> Result<Ca, StoreError> {
        let first = || Root::create(domain, now).map_err(|e| self.wrong(Document::Trust, e));
        let state = self.trust_or_new(domain, Duration::ZERO, now, first)?;
        state.signing().and_then(|root| root.ca(domain)).map_err(|e| self.wrong(Document::Trust, e))
    }

    fn before(&self, now: SystemTime) -> Result<Option<Root>, StoreError> {
        let path = self.dir.join(BEFORE);
        let io = |source| StoreError::Io { path: path.clone(), source };
        let pem = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => Zeroizing::new(other.map_err(io)?),
        };
        let mode = fs::metadata(&path).map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(StoreError::Permissions { path, mode });
        }
        let ca = |why: CaError| StoreError::Document { path: path.clone(), why: why.into() };
        Root::from_pem(&pem, now).map(Some).map_err(ca)
    }

    /// An older version must find nothing that it would sign with.
    fn put_aside(&self) {
        let path = self.dir.join(BEFORE);
        match fs::rename(&path, path.with_extension("pem.migrated")) {
            Ok(()) => {
                tracing::info!(file = %path.display(), "taken up into trust.json and renamed: it may be deleted");
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(%error, file = %path.display(), "is in trust.json now; delete it");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Dir;
    use super::*;
    use crate::ca::create_root;
    use crate::ca::rotation::RotationError;
    use crate::ca::state::seconds;

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    #[test]
    fn the_first_root_is_made_once_and_stays() {
        let dir = Dir::new();
        let now = SystemTime::now();
        let bundles: Vec<_> = std::thread::scope(|scope| {
            let open = || Store::open(&dir.0).unwrap().ca(&domain(), now).unwrap().bundle().clone();
            let opened: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
            opened.into_iter().map(|one| one.join().unwrap()).collect()
        });
        assert!(bundles.iter().all(|bundle| *bundle == bundles[0]));
        let other = TrustDomain::parse("other").unwrap();
        let error = Store::open(&dir.0).unwrap().ca(&other, now).unwrap_err().to_string();
        assert!(error.contains("td.test") && error.contains("trust.json"), "{error}");
    }

    #[test]
    fn what_an_earlier_version_kept_is_taken_up_once() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        let now = SystemTime::now();
        let pem = create_root(&domain(), now).unwrap();
        fs::write(dir.0.join(BEFORE), &pem).unwrap();
        assert!(matches!(store.ca(&domain(), now), Err(StoreError::Permissions { .. })));
        fs::set_permissions(dir.0.join(BEFORE), fs::Permissions::from_mode(0o600)).unwrap();
        let hour = Duration::from_secs(3600);
        let never = || panic!("makes no other root");
        let state = store.trust_or_new(&domain(), hour, now, never).unwrap();
        let ca = Ca::from_pem(domain(), &pem).unwrap();
        assert_eq!(state.bundle().unwrap().roots(), ca.bundle().roots());
        assert!(state.strangers_until > seconds(now + hour));
        assert!(!dir.0.join(BEFORE).exists(), "an older version must not sign with it");
        assert_eq!(store.ca(&domain(), now).unwrap().bundle(), ca.bundle());
    }

    #[test]
    fn a_change_is_whole_and_of_several_at_once_none_is_lost() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        store.ca(&domain(), SystemTime::now()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let grow = |state: &mut TrustState| {
                        state.strangers_until += 1;
                        Ok::<_, CaError>(())
                    };
                    store.change_trust(grow).unwrap()
                });
            }
        });
        let state = store.trust(&domain()).unwrap().unwrap();
        assert_eq!(state.strangers_until, 8);
        let refused = store.change_trust(|state| {
            state.strangers_until = 0;
            Err::<(), _>(RotationError::NothingToAbort("idle"))
        });
        assert!(refused.unwrap_err().to_string().contains("no rotation is under way"));
        assert_eq!(store.trust(&domain()).unwrap(), Some(state), "it stays as it was");
    }

    #[test]
    fn a_spoilt_state_is_an_error_that_names_the_file_and_is_not_replaced() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        store.ca(&domain(), SystemTime::now()).unwrap();
        let path = dir.0.join("trust.json");
        let text = fs::read_to_string(&path).unwrap();
        for spoilt in [&text[..text.len() / 2], "", "{}", &text.replace("\"format\":1", "\"format\":9")] {
            fs::write(&path, spoilt).unwrap();
            let error = store.ca(&domain(), SystemTime::now()).unwrap_err().to_string();
            assert!(error.contains("trust.json"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), spoilt);
        }
    }
}
