//! Whole documents with versions: what the authority's state is kept in.
//!
//! A document is read whole and replaced whole, by whoever has read what it replaces; so of several who change
//! it, each builds on what the others wrote. Here they are files in a directory, 0600. What can do the same
//! with another store (Kubernetes' Secrets have `resourceVersion`) can take their place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::StoreError;
use crate::identity::revocation::{MAX_ENTRIES, MAX_SUBJECT_BYTES};

/// Which document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Document {
    /// Roots, keys, rotation, what is issued to whom. Secret.
    Trust,
    /// What is revoked.
    Revocations,
}

impl Document {
    /// Its name in a store.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trust => "trust.json",
            Self::Revocations => "revocations.json",
        }
    }

    /// More than it can take; a longer one is not read.
    fn max_bytes(self) -> u64 {
        match self {
            Self::Trust => 64 << 20,
            Self::Revocations => (MAX_SUBJECT_BYTES + 256 * MAX_ENTRIES) as u64,
        }
    }
}

/// Tells one state of a document from any other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(String);

/// A document as it was read.
#[derive(Debug)]
pub struct Held {
    /// Which state.
    pub version: Version,
    /// What it says; it may be secret.
    pub text: Zeroizing<String>,
}

/// Keeps documents.
pub trait Documents: Send + Sync + std::fmt::Debug {
    /// The document; `None` if there never was one.
    ///
    /// # Errors
    /// When there is one that cannot be read.
    fn read(&self, which: Document) -> Result<Option<Held>, StoreError>;

    /// The version alone, as cheaply as can be; `None` also when it cannot be told.
    fn version(&self, which: Document) -> Option<Version>;

    /// Puts a document in place of the version that was read (of none, with `None`). Lasting when this returns
    /// true; false if somebody else was faster.
    ///
    /// # Errors
    /// When it cannot be written. Then it is the old one or the new one, and whole.
    fn replace(&self, which: Document, held: Option<&Version>, text: &str) -> Result<bool, StoreError>;

    /// Where it is, for errors.
    fn place(&self, which: Document) -> PathBuf;
}

/// Documents in a directory.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) dir: PathBuf,
}

impl Documents for Files {
    fn read(&self, which: Document) -> Result<Option<Held>, StoreError> {
        let path = self.place(which);
        let io = |source| StoreError::Io { path: path.clone(), source };
        let file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(io)?,
        };
        let meta = file.metadata().map_err(io)?;
        let mode = meta.mode() & 0o777;
        if which == Document::Trust && mode & 0o077 != 0 {
            return Err(StoreError::Permissions { path, mode });
        }
        if meta.len() > which.max_bytes() {
            return Err(io(io::Error::other(format!("longer than {} bytes", which.max_bytes()))));
        }
        // With room for all of it, no copy of a secret is left behind as it grows.
        let room = usize::try_from(meta.len()).unwrap_or(0) + 1;
        let mut text = Zeroizing::new(String::with_capacity(room));
        file.take(which.max_bytes()).read_to_string(&mut text).map_err(io)?;
        Ok(Some(Held { version: version(&meta), text }))
    }

    fn version(&self, which: Document) -> Option<Version> {
        fs::metadata(self.place(which)).ok().as_ref().map(version)
    }

    fn replace(&self, which: Document, held: Option<&Version>, text: &str) -> Result<bool, StoreError> {
        let lock = self.dir.join(which.name()).with_extension("lock");
        let locked = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock);
        let _held = locked
            .and_then(|file| file.lock().map(|()| file))
            .map_err(|source| StoreError::Io { path: lock, source })?;
        if self.version(which).as_ref() != held {
            return Ok(false);
        }
        let path = self.place(which);
        replace_whole(&path, text.as_bytes(), |_| Ok(()))
            .map_err(|source| StoreError::Io { path, source })?;
        Ok(true)
    }

    fn place(&self, which: Document) -> PathBuf {
        self.dir.join(which.name())
    }
}

/// A replaced file is another file: it has another inode, or was changed at another time.
fn version(meta: &fs::Metadata) -> Version {
    Version(format!("{}-{}-{}.{}", meta.ino(), meta.len(), meta.mtime(), meta.mtime_nsec()))
}

/// What has been done of a replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Created,
    Written,
    Synced,
    Renamed,
}

/// Writes a file in place of an earlier one, complete and on disk before it has its name. Only one may do so at
/// a time. `after` is asked after each step, for tests to fail there.
fn replace_whole(path: &Path, bytes: &[u8], after: impl Fn(Done) -> io::Result<()>) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    // One name, so that whoever dies leaves one file at most, and the next takes its place.
    let temporary = path.with_extension("new");
    match fs::remove_file(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&temporary)?;
    after(Done::Created)?;
    file.write_all(bytes)?;
    after(Done::Written)?;
    file.sync_all()?;
    after(Done::Synced)?;
    fs::rename(&temporary, path)?;
    after(Done::Renamed)?;
    // The name is as lasting as what it names.
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::super::tests::Dir;
    use super::*;

    const STEPS: [Done; 4] = [Done::Created, Done::Written, Done::Synced, Done::Renamed];

    fn files() -> (Dir, Files) {
        let dir = Dir::new();
        fs::create_dir(&dir.0).unwrap();
        let files = Files { dir: dir.0.clone() };
        (dir, files)
    }

    fn read(files: &Files) -> String {
        files.read(Document::Trust).unwrap().unwrap().text.to_string()
    }

    #[test]
    fn whoever_dies_or_fails_at_any_step_leaves_the_old_or_the_new_document_and_hinders_nobody() {
        for died in [false, true] {
            for step in STEPS {
                let (_dir, files) = files();
                assert!(files.replace(Document::Trust, None, "old").unwrap());
                let path = files.place(Document::Trust);
                let fail = |done| match done == step {
                    true if died => panic!("dies after {done:?}"),
                    true => Err(io::Error::other("the disk is full")),
                    false => Ok(()),
                };
                let outcome = catch_unwind(AssertUnwindSafe(|| replace_whole(&path, b"new", fail)));
                assert!(!matches!(outcome, Ok(Ok(()))), "it did not fail after {step:?}");
                let expected = if step == Done::Renamed { "new" } else { "old" };
                assert_eq!(read(&files), expected, "after {step:?}, died: {died}");
                let held = files.version(Document::Trust).unwrap();
                assert!(files.replace(Document::Trust, Some(&held), "next").unwrap());
                assert_eq!(read(&files), "next");
            }
        }
    }

    #[test]
    fn a_document_is_replaced_by_whoever_has_read_it_and_nobody_else() {
        let (_dir, files) = files();
        assert!(files.read(Document::Trust).unwrap().is_none());
        assert!(files.replace(Document::Trust, None, "one").unwrap());
        assert!(!files.replace(Document::Trust, None, "two").unwrap(), "there is one already");
        let first = files.read(Document::Trust).unwrap().unwrap().version;
        assert!(files.replace(Document::Trust, Some(&first), "two").unwrap());
        assert!(!files.replace(Document::Trust, Some(&first), "three").unwrap(), "it was read before");
        assert_eq!(read(&files), "two");
    }

    #[test]
    fn keys_that_others_can_read_are_refused_by_the_files_name() {
        let (_dir, files) = files();
        files.replace(Document::Trust, None, "secret").unwrap();
        let path = files.place(Document::Trust);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = files.read(Document::Trust).unwrap_err().to_string();
        assert!(error.contains("trust.json") && error.contains("0600"), "{error}");
    }
}
