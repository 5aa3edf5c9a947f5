//! kube-apiserver, built from Debian's source package: the tests' Kubernetes is a real one.
//!
//! Debian 12 has version 1.20.2 as source only, with everything vendored; bookworm's own Go builds it
//! without any module proxy. Later than that it serves no EndpointSlice v1, which the agent copes with.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::debian::Suite;
use super::file_with;
use crate::shell::{self, command, step, tools};

/// The only version that can be built from packages alone.
const VERSION: &str = "1.20.2";
const SUITE: &str = "bookworm";

/// Programs that the build needs, with the Debian packages that have them.
pub(super) const PROGRAMS: [(&str, &str, &str); 4] = [
    ("go", "golang-go", "kube-apiserver, the tests' Kubernetes, is built with it"),
    ("dpkg-source", "dpkg-dev", "unpacks its source"),
    ("rsync", "rsync", "its makefile uses it"),
    ("jq", "jq", "its makefile uses it"),
];

/// Where it is, once it is built.
pub(super) fn binary() -> Result<PathBuf> {
    Ok(tools()?.join("bin/kube-apiserver"))
}

/// Builds it, unless it is there.
pub(super) fn install() -> Result<()> {
    let binary = binary()?;
    if binary.exists() {
        return Ok(());
    }
    step("kube-apiserver: the tests' Kubernetes is a real one (some minutes, once)");
    let dir = tools()?.join("kubernetes");
    // What a killed run left would be in the way.
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    let suite = Suite::read(&dir, "deb-src", SUITE)?;
    shell::run(suite.apt(&["source", "--download-only", "kubernetes"]))?;
    let description = file_with(&dir, "dsc").context("apt-get source left no .dsc file")?;
    let tree = dir.join("tree");
    let mut unpack = command("dpkg-source", &["-x".as_ref(), description.as_os_str(), tree.as_os_str()]);
    unpack.current_dir(&dir);
    shell::run(unpack)?;
    renew_reflection(&dir, &tree)?;
    build(&tree)?;
    let built = tree.join("_output/bin/kube-apiserver");
    let built = if built.exists() { built } else { tree.join("_output/local/go/bin/kube-apiserver") };
    fs::create_dir_all(tools()?.join("bin"))?;
    // Renamed into place: an interrupted copy must not look complete.
    let new = binary.with_extension("new");
    fs::copy(&built, &new).with_context(|| format!("the build left no {}", built.display()))?;
    fs::rename(&new, &binary)?;
    Ok(fs::remove_dir_all(&dir)?)
}

/// Puts Debian's own version of a vendored library in its place: the vendored one reads maps in the manner of
/// Go before 1.18, and with a later Go corrupts memory.
fn renew_reflection(dir: &Path, tree: &Path) -> Result<()> {
    const PACKAGE: &str = "golang-github-modern-go-reflect2-dev";
    let renewed = dir.join("reflect2");
    fs::create_dir_all(&renewed)?;
    let suite = Suite::read(&renewed, "deb", SUITE)?;
    shell::run(suite.apt(&["download", PACKAGE]))?;
    let package = file_with(&renewed, "deb").context("apt-get download left no package")?;
    shell::run(command("dpkg", &["-x".as_ref(), package.as_os_str(), renewed.as_os_str()]))?;
    let from = renewed.join("usr/share/gocode/src/github.com/modern-go/reflect2");
    let to = tree.join("vendor/github.com/modern-go/reflect2");
    fs::remove_dir_all(&to)?;
    shell::run(command("cp", &["-rL".as_ref(), from.as_os_str(), to.as_os_str()]))
}

fn build(tree: &Path) -> Result<()> {
    // The makefile wants a Go path, and a version that it cannot ask git for.
    let links = tree.join(".go/src/k8s.io");
    fs::create_dir_all(&links)?;
    std::os::unix::fs::symlink("../../..", links.join("kubernetes"))?;
    let version = tree.join("version-of-kubernetes");
    let (major, minor) = ("1", "20");
    fs::write(
        &version,
        format!(
            "KUBE_GIT_COMMIT='archive'\nKUBE_GIT_TREE_STATE='archive'\nKUBE_GIT_VERSION='v{VERSION}'\nKUBE_GIT_MAJOR='{major}'\nKUBE_GIT_MINOR='{minor}'\n"
        ),
    )?;
    let mut make = command("make", &["WHAT=cmd/kube-apiserver", "GOLDFLAGS=-s -w"]);
    make.current_dir(links.join("kubernetes"))
        .env("GOPATH", tree.join(".go"))
        .env("GOCACHE", tree.join(".cache"))
        .env("GO111MODULE", "off")
        .env("GOFLAGS", "")
        .env("CGO_ENABLED", "0")
        .env("KUBE_GIT_VERSION_FILE", version);
    shell::run(make)
}
