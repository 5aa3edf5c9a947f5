//! Builds another version and lets it meet this one.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use crate::shell::{build, command, root, run, step, tools};

#[derive(Debug, Args)]
pub(crate) struct Skew {
    /// The other version: anything that git takes for a commit.
    #[arg(long, default_value = "HEAD~1")]
    revision: String,
}

impl Skew {
    pub(crate) fn run(self) -> Result<()> {
        let bins = build(false)?;
        step(&format!("building {}", self.revision));
        let tree = tools()?.join("skew");
        let path = tree.to_str().context("the cache's path is not UTF-8")?;
        run(command("git", &["worktree", "add", "--force", "--detach", path, &self.revision]))?;
        let outcome = meet(&tree, &bins);
        // Whatever came of it, the repository is left as it was.
        run(command("git", &["worktree", "remove", "--force", path]))?;
        outcome
    }
}

fn meet(tree: &Path, bins: &Path) -> Result<()> {
    let target = root().join("target/skew");
    let mut other = command("cargo", &["build", "--package", "hauberk", "--bins"]);
    other.current_dir(tree).env("CARGO_TARGET_DIR", &target);
    run(other)?;
    step("both versions together");
    let mut tests = command("cargo", &["test", "--package", "tests", "--test", "skew", "--", "--ignored"]);
    tests.env("HAUBERK_BIN_DIR", bins).env("HAUBERK_OTHER", target.join("debug/hauberk"));
    run(tests)
}
