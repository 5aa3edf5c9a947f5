//! Builds what the binary embeds: the eBPF programs, and the gRPC code of `proto/`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    build_ebpf(&out)?;
    build_proto()?;
    Ok(())
}

/// Compiles `ebpf/` for the kernel with the toolchain that builds us, and puts the object into
/// `OUT_DIR/programs.o`.
fn build_ebpf(out: &Path) -> Result<(), Box<dyn Error>> {
    let source = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../ebpf").canonicalize()?;
    println!("cargo::rerun-if-changed={}", source.display());
    println!("cargo::rerun-if-env-changed=PATH");
    let target = out.join("ebpf");
    let mut cargo = Command::new(env::var("CARGO")?);
    // What cargo and clippy set for the build of this package must not reach the inner build.
    for (name, _) in env::vars() {
        let from_cargo = name.starts_with("CARGO_") || name.starts_with("RUSTC") || name == "RUSTFLAGS";
        if from_cargo && name != "CARGO_HOME" {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .current_dir(&source)
        // `-Z build-std` on the pinned stable toolchain: core for BPF has to be built here.
        .env("RUSTC_BOOTSTRAP", "1")
        // bpf-linker does its own whole-program optimisation.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf")
        .env("PATH", path_with_tools()?)
        .args(["build", "--quiet", "--release", "--package", "ebpf", "--bin", "programs"])
        .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core", "--target-dir"])
        .arg(&target)
        .status()?;
    if !status.success() {
        return Err("the eBPF programs did not build; `cargo xtask setup` installs what that needs \
                    (bpf-linker, rust-src)"
            .into());
    }
    fs::copy(target.join("bpfel-unknown-none/release/programs"), out.join("programs.o"))?;
    Ok(())
}

/// `PATH` with the folder in front that `cargo xtask setup` puts bpf-linker into.
fn path_with_tools() -> Result<std::ffi::OsString, Box<dyn Error>> {
    let cache = env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))
        .ok_or("neither XDG_CACHE_HOME nor HOME is set")?;
    let mut paths = vec![cache.join("hauberk/bin")];
    paths.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    Ok(env::join_paths(paths)?)
}

fn build_proto() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    const FILES: [&str; 5] = [
        "authority.proto",
        "directory.proto",
        "istio_ca.proto",
        "spiffe_workload.proto",
        "spire_delegated_identity.proto",
    ];
    let files = protox::compile(FILES, ["proto"])?;
    // Made once, and sent to every agent.
    tonic_prost_build::configure().bytes(".hauberk.directory.v1.Chunk.rows").compile_fds(files)?;
    Ok(())
}
