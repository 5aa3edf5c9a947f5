//! Keeps the authority's state: its trust, what is revoked, and join tokens that have not been used.
//!
//! What must not be lost or half written are [`documents`], replaced whole. A lock keeps a second authority
//! out, so two never sign with different roots unnoticed.

pub mod documents;
mod revocations;
mod trust;

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{digest, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use super::CaError;
use super::issuer::IssuerError;
use super::rotation::RotationError;
use crate::identity::revocation::RevocationError;
use documents::{Document, Documents, Files, Version};

/// How often a change is tried that somebody else was faster than.
const TRIES: usize = 64;

/// Why the store cannot be used. Each message names the file.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others may read the key.
    #[error("{} can be read by others (mode {mode:o}); make it 0600, and consider the key known", path.display())]
    Permissions {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Another authority runs on the same state.
    #[error("{} is locked: another authority runs on this state directory", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// A document.
    #[error("{}: {why}", path.display())]
    Document {
        /// The document.
        path: PathBuf,
        /// Why it cannot be read or changed.
        why: Wrong,
    },
    /// Somebody else changes it without end.
    #[error("{} is changed by others all the time; try again", path.display())]
    Contended {
        /// The document.
        path: PathBuf,
    },
    /// No randomness for a token.
    #[error("the system gives no randomness")]
    Random,
}

/// What is wrong with a document, or with a change to it.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    /// Not the JSON that was written.
    #[error("it is not what the authority wrote: {0}")]
    Malformed(#[from] serde_json::Error),
    /// The CA in it is not usable.
    #[error(transparent)]
    Ca(#[from] CaError),
    /// A rotation that cannot go that way.
    #[error(transparent)]
    Rotation(#[from] RotationError),
    /// An intermediate CA that cannot be used.
    #[error(transparent)]
    Issuer(#[from] IssuerError),
    /// A revocation that cannot be made.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
}

/// What a join token was made for.
#[derive(Debug, PartialEq, Eq)]
pub enum Redeemed {
    /// It is good, and used up now.
    Accepted,
    /// Never made, used already, or another's.
    Unknown,
    /// Made for another node. It is used up all the same: whoever sent it should not have it.
    OtherNode,
    /// Too old.
    Expired,
}

/// A state directory.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    documents: Box<dyn Documents>,
}

impl Store {
    /// Opens the directory, and makes it if it is not there.
    ///
    /// # Errors
    /// When it cannot be made or used.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        for dir in [dir.to_owned(), dir.join("tokens")] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(|source| StoreError::Io { path: dir, source })?;
        }
        Ok(Self { dir: dir.into(), documents: Box::new(Files { dir: dir.into() }) })
    }

    /// Takes the directory for one running authority, for as long as the file lives.
    ///
    /// # Errors
    /// When another one has it.
    pub fn lock(&self) -> Result<File, StoreError> {
        let path = self.dir.join("lock");
        let io = |source| StoreError::Io { path: path.clone(), source };
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(StoreError::Locked { path }),
            Err(TryLockError::Error(source)) => Err(StoreError::Io { path, source }),
        }
    }

    /// Tells one state of a document from another, cheaply.
    pub fn version(&self, which: Document) -> Option<Version> {
        self.documents.version(which)
    }

    fn read<D: DeserializeOwned>(&self, which: Document) -> Result<Option<D>, StoreError> {
        let Some(held) = self.documents.read(which)? else { return Ok(None) };
        serde_json::from_str(&held.text).map(Some).map_err(|e| self.wrong(which, e))
    }

    /// Changes a document in one step, on top of what others may change meanwhile.
    fn change<D, T, E>(
        &self,
        which: Document,
        first: Option<D>,
        mut change: impl FnMut(&mut D) -> Result<T, E>,
    ) -> Result<(D, T), StoreError>
    where
        D: Serialize + DeserializeOwned + PartialEq + Clone,
        E: Into<Wrong>,
    {
        let path = self.documents.place(which);
        for _ in 0..TRIES {
            let held = self.documents.read(which)?;
            let before = match &held {
                Some(held) => serde_json::from_str(&held.text).map_err(|e| self.wrong(which, e))?,
                None => first.clone().ok_or_else(|| StoreError::Io {
                    path: path.clone(),
                    source: io::ErrorKind::NotFound.into(),
                })?,
            };
            let mut after = before.clone();
            let outcome = change(&mut after).map_err(|e| self.wrong(which, e))?;
            if after == before {
                return Ok((after, outcome));
            }
            let text = self.text(which, &after)?;
            if self.documents.replace(which, held.as_ref().map(|held| &held.version), &text)? {
                return Ok((after, outcome));
            }
        }
        Err(StoreError::Contended { path })
    }

    fn text<D: Serialize>(&self, which: Document, document: &D) -> Result<Zeroizing<String>, StoreError> {
        serde_json::to_string(document).map(Zeroizing::new).map_err(|e| self.wrong(which, e))
    }

    fn wrong(&self, which: Document, why: impl Into<Wrong>) -> StoreError {
        StoreError::Document { path: self.documents.place(which), why: why.into() }
    }

    /// Makes a join token for a node. Only its hash is kept.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new_token(&self, node: &str, valid: Duration, now: SystemTime) -> Result<String, StoreError> {
        let mut secret = [0; 32];
        rand::fill(&mut secret).map_err(|_| StoreError::Random)?;
        let token = URL_SAFE_NO_PAD.encode(secret);
        let path = self.token_path(&token);
        let until = (now + valid).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        create_whole(&path, format!("{until} {node}").as_bytes())
            .map_err(|source| StoreError::Io { path, source })?;
        Ok(token)
    }

    /// What [`Store::redeem`] would say, without using the token up: whoever is then refused for another reason
    /// has it still.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn peek(&self, token: &str, node: &str, now: SystemTime) -> Result<Redeemed, StoreError> {
        // Looked up by its hash: neither timing nor a listing of the directory tells the token.
        let path = self.token_path(token);
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Redeemed::Unknown),
            other => other.map_err(|source| StoreError::Io { path, source })?,
        };
        let Some((until, made_for)) = text.split_once(' ') else { return Ok(Redeemed::Unknown) };
        let until = UNIX_EPOCH + Duration::from_secs(until.parse().unwrap_or(0));
        Ok(match (made_for == node, now <= until) {
            (false, _) => Redeemed::OtherNode,
            (true, false) => Redeemed::Expired,
            (true, true) => Redeemed::Accepted,
        })
    }

    /// Uses a join token up. Of two who present the same one, at most one is accepted: the file's
    /// removal decides, and lasts when this returns.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn redeem(&self, token: &str, node: &str, now: SystemTime) -> Result<Redeemed, StoreError> {
        let said = self.peek(token, node, now)?;
        let path = self.token_path(token);
        let removed = fs::remove_file(&path).and_then(|()| File::open(self.dir.join("tokens"))?.sync_all());
        match removed {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Redeemed::Unknown),
            other => other.map(|()| said).map_err(|source| StoreError::Io { path, source }),
        }
    }

    fn token_path(&self, token: &str) -> PathBuf {
        let hash = digest::digest(&digest::SHA256, token.as_bytes());
        self.dir.join("tokens").join(URL_SAFE_NO_PAD.encode(hash))
    }
}

/// Writes a new file, complete and on disk before it has its name; fails if the name is taken.
fn create_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let temporary = dir.join(format!(".{}-{:x}", std::process::id(), fastrand::u64(..)));
    let written = (|| {
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        // Unlike a rename, a link never replaces what another has just written.
        fs::hard_link(&temporary, path)?;
        File::open(dir)?.sync_all()
    })();
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => written.and(Err(e)),
        _ => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) struct Dir(pub(super) PathBuf);

    impl Dir {
        pub(super) fn new() -> Self {
            Self(std::env::temp_dir().join(format!("hauberk-store-{:x}", fastrand::u64(..))))
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_second_authority_is_kept_out() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        let held = store.lock().unwrap();
        assert!(matches!(Store::open(&dir.0).unwrap().lock(), Err(StoreError::Locked { .. })));
        drop(held);
        store.lock().unwrap();
    }

    #[test]
    fn a_token_works_once_for_its_node_in_its_time() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        let now = SystemTime::now();
        let minute = Duration::from_secs(60);
        let good = store.new_token("n1", minute, now).unwrap();
        assert_eq!(store.redeem(&good, "n1", now).unwrap(), Redeemed::Accepted);
        assert_eq!(store.redeem(&good, "n1", now).unwrap(), Redeemed::Unknown);
        let other = store.new_token("n1", minute, now).unwrap();
        assert_eq!(store.redeem(&other, "n2", now).unwrap(), Redeemed::OtherNode);
        let old = store.new_token("n1", minute, now).unwrap();
        assert_eq!(store.redeem(&old, "n1", now + 2 * minute).unwrap(), Redeemed::Expired);
        assert_eq!(store.redeem("../ca.pem", "n1", now).unwrap(), Redeemed::Unknown);
    }

    #[test]
    fn of_many_who_present_one_token_one_is_accepted() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        let now = SystemTime::now();
        let token = store.new_token("n1", Duration::from_secs(60), now).unwrap();
        let accepted = std::thread::scope(|scope| {
            let tries: Vec<_> =
                (0..8).map(|_| scope.spawn(|| store.redeem(&token, "n1", now).unwrap())).collect();
            tries
                .into_iter()
                .filter(|_| true)
                .map(|t| t.join().unwrap())
                .filter(|r| *r == Redeemed::Accepted)
                .count()
        });
        assert_eq!(accepted, 1);
    }
}
