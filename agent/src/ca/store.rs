//! Keeps the authority's state in a directory: the CA, join tokens that have not been used, and what
//! is revoked.
//!
//! Files are written whole or not at all, readable by their owner only. A lock keeps a second
//! authority out, so two never sign with different roots unnoticed.

mod revocations;

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{digest, rand};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::{Ca, CaError, create_root};
use crate::identity::TrustDomain;
pub use revocations::RevocationsError;

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
    /// The CA in it is not usable.
    #[error("{}: {source}", path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CaError,
    },
    /// The list of revocations.
    #[error("{}: {source}", path.display())]
    Revocations {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read or changed.
        source: RevocationsError,
    },
    /// No randomness for a token.
    #[error("the system gives no randomness")]
    Random,
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
        Ok(Self { dir: dir.into() })
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

    /// The CA; makes one if there is none yet.
    ///
    /// # Errors
    /// When it cannot be read, is open to others, or is not usable.
    pub fn ca(&self, domain: &TrustDomain, now: SystemTime) -> Result<Ca, StoreError> {
        let path = self.dir.join("ca.pem");
        let ca = |source| StoreError::Ca { path: path.clone(), source };
        let io = |source| StoreError::Io { path: path.clone(), source };
        if !path.exists() {
            let pem = create_root(domain, now).map_err(ca)?;
            // Whoever comes first makes it; the other reads it.
            match create_whole(&path, pem.as_bytes()) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io(e)),
                _ => {}
            }
        }
        let mode = fs::metadata(&path).map_err(io)?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(StoreError::Permissions { path, mode });
        }
        Ca::from_pem(domain.clone(), &fs::read_to_string(&path).map_err(io)?).map_err(ca)
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

    /// Uses a join token up. Of two who present the same one, at most one is accepted: the file's
    /// removal decides.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub fn redeem(&self, token: &str, node: &str, now: SystemTime) -> Result<Redeemed, StoreError> {
        // Looked up by its hash: neither timing nor a listing of the directory tells the token.
        let path = self.token_path(token);
        let io = |source| StoreError::Io { path: path.clone(), source };
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Redeemed::Unknown),
            other => other.map_err(io)?,
        };
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Redeemed::Unknown),
            other => other.map_err(io)?,
        }
        let Some((until, made_for)) = text.split_once(' ') else { return Ok(Redeemed::Unknown) };
        let until = UNIX_EPOCH + Duration::from_secs(until.parse().unwrap_or(0));
        Ok(match (made_for == node, now <= until) {
            (false, _) => Redeemed::OtherNode,
            (true, false) => Redeemed::Expired,
            (true, true) => Redeemed::Accepted,
        })
    }

    fn token_path(&self, token: &str) -> PathBuf {
        let hash = digest::digest(&digest::SHA256, token.as_bytes());
        self.dir.join("tokens").join(URL_SAFE_NO_PAD.encode(hash))
    }
}

/// Writes a new file, complete and on disk before it has its name; fails if the name is taken.
fn create_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Unlike a rename, a link never replaces what another has just written.
    write_whole(path, bytes, |temporary| fs::hard_link(temporary, path))
}

/// Writes a file in place of an earlier one, complete and on disk before it has its name.
fn replace_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_whole(path, bytes, |temporary| fs::rename(temporary, path))
}

fn write_whole(path: &Path, bytes: &[u8], name: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let temporary = dir.join(format!(".{}-{:x}", std::process::id(), fastrand::u64(..)));
    let written = (|| {
        let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        name(&temporary)?;
        File::open(dir)?.sync_all()
    })();
    // A rename has taken it away already.
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

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    #[test]
    fn the_ca_is_made_once_and_stays() {
        let dir = Dir::new();
        let now = SystemTime::now();
        let first = Store::open(&dir.0).unwrap().ca(&domain(), now).unwrap();
        let second = Store::open(&dir.0).unwrap().ca(&domain(), now).unwrap();
        assert_eq!(first.bundle(), second.bundle());
    }

    #[test]
    fn a_key_that_others_can_read_is_refused_by_name() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        store.ca(&domain(), SystemTime::now()).unwrap();
        fs::set_permissions(dir.0.join("ca.pem"), fs::Permissions::from_mode(0o644)).unwrap();
        let error = store.ca(&domain(), SystemTime::now()).unwrap_err().to_string();
        assert!(error.contains("ca.pem") && error.contains("0600"), "{error}");
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
