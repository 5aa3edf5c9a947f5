//! A file that is read again whenever it changes: the directory, the access policies.
//!
//! It looks, rather than being told: inotify sees neither a ConfigMap's swap of symbolic links nor
//! network file systems alike everywhere, and a look costs one system call.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::ConfigError;

/// How often a file is looked at. What it decides must hold within a second.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Tells one state of a file from another. Follows symbolic links, so that a ConfigMap's swap shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    inode: u64,
    length: u64,
    changed: (i64, i64),
}

pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    let meta = std::fs::metadata(path).ok()?;
    Some(Stamp { inode: meta.ino(), length: meta.len(), changed: (meta.mtime(), meta.mtime_nsec()) })
}

/// Runs for ever: loads the file again when it changes, and gives `take` what came of it.
///
/// `take` keeps what it has when it gets an error; each fault is told once. What changed between the
/// first load, which is the caller's, and the start of the watch is loaded again.
pub async fn watch<T: Send + 'static>(
    path: PathBuf,
    load: impl Fn(&Path) -> Result<T, ConfigError> + Clone + Send + 'static,
    mut take: impl FnMut(Result<T, ConfigError>),
) {
    let (mut seen, mut told) = (None, None);
    loop {
        let now = Some(stamp(&path));
        if now != seen {
            seen = now;
            let (load, file) = (load.clone(), path.clone());
            // Reading may wait for a disk.
            match tokio::task::spawn_blocking(move || load(&file)).await {
                Ok(Ok(loaded)) => {
                    told = None;
                    take(Ok(loaded));
                }
                Ok(Err(error)) => {
                    // A file that is there but was not read (no descriptors left, a slow mount) has
                    // changed all the same: it is tried again.
                    if matches!(error, ConfigError::Read { .. }) && now != Some(None) {
                        seen = None;
                    }
                    let words = Some(error.to_string());
                    if told != words {
                        told = words;
                        take(Err(error));
                    }
                }
                Err(error) => tracing::error!(%error, file = %path.display(), "cannot be read again"),
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::config::read_text;

    #[tokio::test]
    async fn every_change_is_loaded_and_every_fault_told_once() {
        let dir = std::env::temp_dir().join(format!("hauberk-watch-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("watched");
        std::fs::write(&file, "one").unwrap();
        let taken = Arc::new(Mutex::new(Vec::new()));
        let to = Arc::clone(&taken);
        let load = |path: &Path| {
            let text = read_text(path)?;
            let message = text.clone();
            if text == "bad" { Err(ConfigError::Parse { path: path.into(), message }) } else { Ok(text) }
        };
        let take = move |loaded: Result<String, ConfigError>| {
            to.lock().unwrap().push(loaded.unwrap_or_else(|error| match error {
                ConfigError::Read { .. } => "gone".into(),
                _ => "fault".into(),
            }))
        };
        let watching = tokio::spawn(watch(file.clone(), load, take));
        let now = || taken.lock().unwrap().clone();
        let mut expected = Vec::new();
        for (written, comes) in [
            (Some("one"), Some("one")),
            (Some("three"), Some("three")),
            (Some("bad"), Some("fault")),
            (Some("bad"), None),
            (Some("better"), Some("better")),
            (None, Some("gone")),
            (Some("again"), Some("again")),
        ] {
            match written {
                Some(text) => std::fs::write(&file, text).unwrap(),
                None => std::fs::remove_file(&file).unwrap(),
            }
            expected.extend(comes);
            let until = std::time::Instant::now() + Duration::from_secs(10);
            while comes.is_some() && now() != expected && std::time::Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            if comes.is_none() {
                tokio::time::sleep(2 * LOOK_EVERY).await;
            }
            assert_eq!(now(), expected, "after {written:?}");
        }
        watching.abort();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
