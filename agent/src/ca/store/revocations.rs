//! The list of revocations on disk: read by the running authority, changed by the operator's commands.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::{Store, StoreError, replace_whole};
use crate::identity::revocation::{MAX_ENTRIES, MAX_SUBJECT_BYTES, RevocationError, Revocations};

/// More than a full list takes; a larger file is not read.
const MAX_FILE_BYTES: u64 = (MAX_SUBJECT_BYTES + 256 * MAX_ENTRIES) as u64;

/// What is wrong with the list.
#[derive(Debug, thiserror::Error)]
pub enum RevocationsError {
    /// Not the JSON that was written.
    #[error("not a list of revocations: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A change that cannot be made.
    #[error(transparent)]
    Refused(#[from] RevocationError),
}

impl Store {
    /// Where the list is.
    pub fn revocations_path(&self) -> PathBuf {
        self.dir.join("revocations.json")
    }

    /// What is revoked; nothing, if nothing ever was.
    ///
    /// # Errors
    /// When there is a list that cannot be read.
    pub fn revocations(&self) -> Result<Revocations, StoreError> {
        let path = self.revocations_path();
        let io = |source| StoreError::Io { path: path.clone(), source };
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Revocations::default()),
            other => other.map_err(io)?,
        };
        let mut text = String::new();
        file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(io)?;
        serde_json::from_str(&text)
            .map_err(|e| StoreError::Revocations { path: path.clone(), source: e.into() })
    }

    /// Changes the list; of several who change it at once, each sees what the others wrote. On disk
    /// when this returns.
    ///
    /// # Errors
    /// When it cannot be read or written, or `change` refuses; then it stays as it was.
    pub fn change_revocations<T>(
        &self,
        change: impl FnOnce(&mut Revocations) -> Result<T, RevocationError>,
    ) -> Result<T, StoreError> {
        let lock = self.dir.join("revocations.lock");
        let locked = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock);
        let _held = locked
            .and_then(|file| file.lock().map(|()| file))
            .map_err(|source| StoreError::Io { path: lock, source })?;
        let path = self.revocations_path();
        let wrong = |source| StoreError::Revocations { path: path.clone(), source };
        let mut list = self.revocations()?;
        let before = list.generation();
        let outcome = change(&mut list).map_err(|e| wrong(e.into()))?;
        if list.generation() != before {
            let text = serde_json::to_vec(&list).map_err(|e| wrong(e.into()))?;
            replace_whole(&path, &text).map_err(|source| StoreError::Io { path: path.clone(), source })?;
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    use super::super::tests::Dir;
    use super::*;
    use crate::identity::revocation::{Serial, Subject};

    fn serial(number: usize) -> Subject {
        Subject::Serial(Serial::parse(&format!("{number:x}")).unwrap())
    }

    #[test]
    fn what_is_revoked_survives_and_only_its_owner_may_write_it() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        assert_eq!(store.revocations().unwrap(), Revocations::default());
        let now = SystemTime::now();
        assert!(store.change_revocations(|list| list.revoke(serial(7), now)).unwrap());
        let again = Store::open(&dir.0).unwrap().revocations().unwrap();
        assert_eq!(again.entries().map(|entry| &entry.subject).collect::<Vec<_>>(), [&serial(7)]);
        let mode = fs::metadata(store.revocations_path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn changes_made_at_once_are_all_kept() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        std::thread::scope(|scope| {
            for number in 0..16 {
                let store = &store;
                let change = move |list: &mut Revocations| list.revoke(serial(number), SystemTime::now());
                scope.spawn(move || store.change_revocations(change).unwrap());
            }
        });
        assert_eq!(store.revocations().unwrap().entries().len(), 16);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_an_error_that_names_it_and_no_empty_list() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        fs::write(store.revocations_path(), "{\"generation\": 3").unwrap();
        let error = store.revocations().unwrap_err().to_string();
        assert!(error.contains("revocations.json"), "{error}");
        let changed = store.change_revocations(|list| list.revoke(serial(1), SystemTime::now()));
        assert!(changed.is_err(), "and it is not overwritten");
    }
}
