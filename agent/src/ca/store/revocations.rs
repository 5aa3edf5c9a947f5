//! The list of revocations on disk: read by the running authority, changed by the operator's commands.

use super::{Document, Store, StoreError};
use crate::identity::revocation::{RevocationError, Revocations};

impl Store {
    /// What is revoked; nothing, if nothing ever was.
    ///
    /// # Errors
    /// When there is a list that cannot be read.
    pub fn revocations(&self) -> Result<Revocations, StoreError> {
        Ok(self.read(Document::Revocations)?.unwrap_or_default())
    }

    /// Changes the list; of several who change it at once, each sees what the others wrote. On disk
    /// when this returns.
    ///
    /// # Errors
    /// When it cannot be read or written, or `change` refuses; then it stays as it was.
    pub fn change_revocations<T>(
        &self,
        change: impl FnMut(&mut Revocations) -> Result<T, RevocationError>,
    ) -> Result<T, StoreError> {
        let (_, outcome) = self.change(Document::Revocations, Some(Revocations::default()), change)?;
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
        let mode = fs::metadata(dir.0.join("revocations.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn changes_made_at_once_are_all_kept() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        std::thread::scope(|scope| {
            for number in 0..16 {
                let store = &store;
                let now = SystemTime::now();
                let change = move |list: &mut Revocations| list.revoke(serial(number), now);
                scope.spawn(move || store.change_revocations(change).unwrap());
            }
        });
        assert_eq!(store.revocations().unwrap().entries().len(), 16);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_an_error_that_names_it_and_no_empty_list() {
        let dir = Dir::new();
        let store = Store::open(&dir.0).unwrap();
        fs::write(dir.0.join("revocations.json"), "{\"generation\": 3").unwrap();
        let error = store.revocations().unwrap_err().to_string();
        assert!(error.contains("revocations.json"), "{error}");
        let changed = store.change_revocations(|list| list.revoke(serial(1), SystemTime::now()));
        assert!(changed.is_err(), "and it is not overwritten");
    }
}
