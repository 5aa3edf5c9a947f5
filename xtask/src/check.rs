//! Formatting, lints (the eBPF crate for its own target too), dependencies, layers.

use anyhow::Result;

use crate::shell::{command, step, tools};
use crate::{layers, setup};

/// Runs every check; the first that fails ends it.
pub(crate) fn run() -> Result<()> {
    setup::ensure()?;
    step("formatting");
    crate::shell::run(command("cargo", &["fmt", "--all", "--check"]))?;
    step("layers: each module knows its neighbours only");
    layers::check()?;
    step("lints");
    crate::shell::run(command(
        "cargo",
        &["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"],
    ))?;
    let mut kernel_side = command(
        "cargo",
        &[
            "clippy",
            "--quiet",
            "--release",
            "--package",
            "ebpf",
            "--bin",
            "programs",
            "--target",
            "bpfel-unknown-none",
            "-Z",
            "build-std=core",
            "--target-dir",
            "target/ebpf-lint",
            "--",
            "-D",
            "warnings",
        ],
    );
    kernel_side.env("RUSTC_BOOTSTRAP", "1").env("CARGO_PROFILE_RELEASE_LTO", "off");
    kernel_side.env("PATH", path_with_tools()?);
    crate::shell::run(kernel_side)?;
    step("dependencies");
    let deny = setup::cargo_deny()?.to_string_lossy().into_owned();
    println!(
        "  advisories need a database from the network: `cargo deny check advisories` where there is one"
    );
    let judge =
        command(&deny, &["--workspace", "--log-level", "error", "check", "bans", "licenses", "sources"]);
    crate::shell::run(judge)
}

fn path_with_tools() -> Result<std::ffi::OsString> {
    let mut paths = vec![tools()?.join("bin")];
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    Ok(std::env::join_paths(paths)?)
}
