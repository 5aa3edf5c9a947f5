//! Everything that must hold, in one command; what CI runs.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::bench::{Bench, handshakes, restart};
use crate::demo::Demo;
use crate::fuzz::Fuzz;
use crate::shell::{build, build_beside, command, run, step};
use crate::{check, setup};

#[derive(Debug, Args)]
pub(crate) struct Test {
    /// Seconds for each fuzz target.
    #[arg(long, default_value_t = 10)]
    fuzz_seconds: u64,
}

impl Test {
    pub(crate) fn run(self) -> Result<()> {
        let began = Instant::now();
        setup::ensure()?;
        check::run()?;
        step("building what the end-to-end tests run");
        let bins = build(false)?;
        step("unit, property and end-to-end tests");
        let mut tests = command("cargo", &["test", "--workspace", "--quiet", "--no-fail-fast"]);
        tests.env("HAUBERK_BIN_DIR", &bins);
        run(tests)?;
        step("fuzzing, briefly (cargo xtask fuzz goes on longer)");
        Fuzz::each(self.fuzz_seconds).run()?;
        step("the demo, with the tests' own build");
        Demo::with_bins(bins.clone()).run()?;
        step("whether the benchmark works (cargo xtask bench measures with care)");
        build_beside(&bins, handshakes::PROGRAM, false)?;
        build_beside(&bins, restart::PROGRAM, false)?;
        Bench::quick(bins).run()?;
        step("nothing is left behind");
        let left = tests::sweep::all_remains()?;
        if !left.is_empty() {
            bail!("left behind:\n  {}", left.join("\n  "));
        }
        println!("\nEverything holds ({} minutes).", began.elapsed().as_secs().div_ceil(60));
        Ok(())
    }
}
