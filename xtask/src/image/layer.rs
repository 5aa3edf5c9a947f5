//! One layer: a tar archive that says nothing of when, where and by whom it was made.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use tar::{Builder, EntryType, Header};

/// What is at a path.
#[derive(Debug)]
enum Node {
    Directory(u32),
    File(u32, Vec<u8>),
    Link(String),
}

/// A layer's entries; sorted, so that a directory comes before what is in it.
#[derive(Debug, Default)]
pub(super) struct Layer(BTreeMap<String, Node>);

impl Layer {
    /// Adds a directory, and those above it.
    pub(super) fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.parents(path)?;
        self.0.insert(format!("{path}/"), Node::Directory(mode));
        Ok(())
    }

    /// Adds a file, and the directories above it.
    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.0.insert(path.into(), Node::File(mode, content.into()));
        Ok(())
    }

    /// Adds a symbolic link, and the directories above it.
    pub(super) fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.parents(path)?;
        self.0.insert(path.into(), Node::Link(to.into()));
        Ok(())
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        let above = Path::new(path).ancestors().skip(1).filter(|path| !path.as_os_str().is_empty());
        for path in above {
            let path = path.to_str().context("a path of the image is text")?;
            self.0.entry(format!("{path}/")).or_insert(Node::Directory(0o755));
        }
        Ok(())
    }

    /// The archive.
    pub(super) fn archive(&self) -> Result<Vec<u8>> {
        let mut builder = Builder::new(Vec::new());
        for (path, node) in &self.0 {
            let mut header = header();
            match node {
                Node::Directory(mode) => {
                    header.set_entry_type(EntryType::Directory);
                    header.set_mode(*mode);
                    builder.append_data(&mut header, path, &[][..])?;
                }
                Node::File(mode, content) => {
                    header.set_mode(*mode);
                    header.set_size(content.len() as u64);
                    builder.append_data(&mut header, path, content.as_slice())?;
                }
                Node::Link(to) => {
                    header.set_entry_type(EntryType::Symlink);
                    header.set_mode(0o777);
                    builder.append_link(&mut header, path, to)?;
                }
            }
        }
        Ok(builder.into_inner()?)
    }
}

/// An entry of nobody's, at the beginning of time.
pub(super) fn header() -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    header
}

/// Compresses; the gzip header carries neither a name nor a time.
pub(super) fn compress(archive: &[u8]) -> Result<Vec<u8>> {
    // 255: an unknown operating system, whichever this is.
    let mut gzip = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::new(6));
    gzip.write_all(archive)?;
    Ok(gzip.finish()?)
}
