//! Keeps the names of the nodes that were spoken to last, for the agent's successor to connect to first.
//!
//! One file, in memory only: a name on each line, the last one first. No secret is in it, and a file that
//! cannot be read is none.

use std::fs;
use std::path::{Path, PathBuf};

use super::{in_memory, replace};

/// Longest name of a node (RFC 1123, section 2.1, which Kubernetes' names keep to).
const MAX_NAME_BYTES: usize = 255;

/// The nodes that were spoken to last.
#[derive(Debug)]
pub struct Recent {
    /// Where they are kept; `None` for nowhere.
    path: Option<PathBuf>,
    /// The last one first.
    names: Vec<String>,
    most: usize,
    is_changed: bool,
}

impl Recent {
    /// Those that a predecessor kept in `dir`, at `most`.
    pub fn take_up(dir: &Path, most: usize) -> Self {
        let path = in_memory(dir).then(|| dir.join("nodes"));
        let text = path.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let is_name = |line: &&str| (1..=MAX_NAME_BYTES).contains(&line.len());
        let names = text.lines().filter(is_name).take(most).map(str::to_owned).collect();
        Self { path, names, most, is_changed: false }
    }

    /// Their names, the last one first.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// A node was spoken to now.
    pub fn used(&mut self, name: &str) {
        if self.names.first().is_some_and(|first| first == name) {
            return;
        }
        self.names.retain(|known| known != name);
        self.names.insert(0, name.to_owned());
        self.names.truncate(self.most);
        self.is_changed = true;
    }

    /// Whether there is something to save.
    pub fn is_changed(&self) -> bool {
        self.is_changed
    }

    /// Keeps them for a successor.
    pub fn save(&mut self) {
        if !std::mem::take(&mut self.is_changed) {
            return;
        }
        let Some(path) = &self.path else { return };
        let lines: String = self.names.iter().flat_map(|name| [name, "\n"]).collect();
        if let Err(error) = replace(path, lines.as_bytes()) {
            tracing::debug!(%error, "cannot keep which nodes were spoken to; a restarted agent asks the directory alone");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_come_back_last_first_and_no_more_than_are_wanted() {
        let dir = Path::new("/dev/shm").join(format!("hauberk-nodes-{:x}", fastrand::u64(..)));
        let mut recent = Recent::take_up(&dir, 3);
        assert!(recent.names().is_empty());
        for name in ["n1", "n2", "n3", "n1", "n4", "n4"] {
            recent.used(name);
        }
        recent.save();
        let changed = recent.is_changed();
        let names = Recent::take_up(&dir, 3).names().to_vec();
        let fewer = Recent::take_up(&dir, 1).names().to_vec();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(names, ["n4", "n1", "n3"]);
        assert_eq!(fewer, ["n4"]);
        assert!(!changed, "saved once");
    }
}
