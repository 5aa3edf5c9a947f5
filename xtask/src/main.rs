//! The only door to everything that is done with this repository: `cargo xtask --help`.

mod bench;
mod check;
mod demo;
mod fuzz;
mod image;
mod layers;
mod setup;
mod shell;
mod skew;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, demo, tests and benchmarks of Hauberk.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what the build, the demo and the tests need; says what and why.
    Setup,
    /// Show the main job on real programs: two nodes, pods, an authority, two agents.
    Demo(demo::Demo),
    /// Everything that must hold: set-up, checks, unit tests, end-to-end tests, fuzzing, the demo.
    Test(test::Test),
    /// Formatting, lints, dependencies and the layers of the modules.
    Check,
    /// Run each fuzz target for a while.
    Fuzz(fuzz::Fuzz),
    /// Run the tests of kernel TLS on Debian's kernels, in an emulated machine (some minutes).
    Vm(vm::Vm),
    /// Run agents and an authority of another version beside this one's (builds it: some minutes).
    Skew(skew::Skew),
    /// Measure against the direct path and other proxies, side by side; --report keeps it.
    Bench(bench::Bench),
    /// Make the container image, as an OCI layout in one file, without a container engine.
    Image(image::Options),
    /// Remove what killed demos and tests left: namespaces, cgroups, mounts.
    Clean,
}

fn main() -> ExitCode {
    tests::process::catch_interrupts();
    let outcome = match Cli::parse().verb {
        Verb::Setup => setup::run(),
        Verb::Demo(demo) => demo.run(),
        Verb::Test(test) => test.run(),
        Verb::Check => check::run(),
        Verb::Fuzz(fuzz) => fuzz.run(),
        Verb::Vm(vm) => vm.run(),
        Verb::Skew(skew) => skew.run(),
        Verb::Bench(bench) => bench.run(),
        Verb::Image(image) => image.run(),
        Verb::Clean => {
            tests::sweep::stale();
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
