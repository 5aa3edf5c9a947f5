//! Runs the fuzz targets: everything that parses bytes from a peer, and policies.

use anyhow::Result;
use clap::Args;

use crate::shell::{command, root, run, step};

const TARGETS: [&str; 11] = [
    "spiffe_id",
    "svid",
    "connect",
    "bundle",
    "csr",
    "crl",
    "federation",
    "policy",
    "ticket",
    "proof",
    "directory",
];

#[derive(Debug, Args)]
pub(crate) struct Fuzz {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Only this target.
    #[arg(long)]
    target: Option<String>,
}

impl Fuzz {
    /// Every target for so long.
    pub(crate) fn each(seconds: u64) -> Self {
        Self { seconds, target: None }
    }

    pub(crate) fn run(self) -> Result<()> {
        step("fuzzing: building with coverage instrumentation");
        let dir = root().join("tests/fuzz");
        let mut build = command("cargo", &["build", "--release", "--quiet"]);
        // What cargo-fuzz passes, without the sanitizers, which need a nightly compiler; every target
        // is safe Rust, where they would find little.
        build.current_dir(&dir).env("RUSTC_BOOTSTRAP", "1").env(
            "RUSTFLAGS",
            "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Ccodegen-units=1",
        );
        // Keeps the flags from build scripts, which are not linked to libFuzzer.
        build.args(["--target", "x86_64-unknown-linux-gnu"]);
        run(build)?;
        for target in TARGETS.iter().filter(|t| self.target.as_deref().is_none_or(|only| only == **t)) {
            let corpus = dir.join("corpus").join(target);
            std::fs::create_dir_all(&corpus)?;
            let binary = dir.join("target/x86_64-unknown-linux-gnu/release").join(target);
            let time = format!("-max_total_time={}", self.seconds);
            let mut fuzz = command(
                &binary.to_string_lossy(),
                &[&time, "-max_len=4096", "-verbosity=0", "-print_funcs=0", "-print_final_stats=1"],
            );
            fuzz.arg(&corpus).current_dir(&dir);
            run(fuzz)?;
        }
        Ok(())
    }
}
