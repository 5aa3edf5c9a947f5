//! A clock of its own for one program, which jumps while that runs. The machine's clock is left alone.
//!
//! The program asks libc for the time, as Rust's standard library does; a library that is loaded before libc answers
//! (`clock.c`, built by the machine's C compiler). Timers and durations, on the monotonic clock, are not touched.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A clock that can be set.
#[derive(Debug)]
pub struct Clock {
    file: fs::File,
    program: PathBuf,
}

impl Clock {
    /// Makes a clock called `name`, and in `dir` a program that is `hauberk` by that clock.
    ///
    /// # Errors
    /// When the C compiler is missing or fails.
    pub fn new(dir: &Path, name: &str, hauberk: &str) -> Result<Self> {
        let at = |what: &str| dir.join(format!("clock-{name}{what}"));
        fs::write(at(".c"), include_str!("clock.c"))?;
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(at(".so")).arg(at(".c"));
        let built = compile.output().context("a C compiler (cc) is needed")?;
        ensure!(built.status.success(), "cc: {}", String::from_utf8_lossy(&built.stderr));
        fs::write(at(""), 0i64.to_ne_bytes())?;
        let (library, clock, program) = (at(".so"), at(""), at(".sh"));
        // `exec` keeps the process, and with it what was set up for it.
        let script = format!(
            "#!/bin/sh\nTESTS_CLOCK='{}' LD_PRELOAD='{}' exec '{hauberk}' \"$@\"\n",
            clock.display(),
            library.display()
        );
        fs::write(&program, script)?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let file = fs::OpenOptions::new().write(true).open(clock)?;
        Ok(Self { file, program })
    }

    /// What to run instead of `hauberk`.
    pub fn program(&self) -> String {
        self.program.to_string_lossy().into_owned()
    }

    /// From now on the clock is ahead by so many seconds (or behind, below 0).
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(&self, ahead: i64) -> Result<()> {
        // One aligned word: whoever reads sees the old or the new one.
        Ok(self.file.write_all_at(&ahead.to_ne_bytes(), 0)?)
    }
}
