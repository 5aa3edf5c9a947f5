//! Makes the container image without a container engine: an OCI layout in one tar archive.
//!
//! There is nothing in it but the program, the shared libraries that it is linked with, and who root and nobody
//! are: no shell, no package manager. The same source and toolchain make the same bytes: times are zero, owners
//! root, entries sorted, and the program is compiled without a word of where.

mod layer;
mod layout;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::setup;
use crate::shell::{self, command, output, root, step};
use layer::Layer;
use layout::{Image, NAME};

/// Where the program is in the image; `kubectl hauberk` finds the link beside it.
const PROGRAM: &str = "usr/bin/hauberk";

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where to put the archive.
    #[arg(long, value_name = "DIR", default_value = "target/image")]
    out: PathBuf,
    /// Take this program instead of building one.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        let program = match self.program {
            Some(program) => program,
            None => build()?,
        };
        step("image");
        let image = make(&program)?;
        let out = root().join(self.out);
        fs::create_dir_all(&out)?;
        let file = out.join(format!("{NAME}-{}.tar", env!("CARGO_PKG_VERSION")));
        image.write(&file).with_context(|| format!("cannot write {}", file.display()))?;
        println!("{}", file.display());
        println!("  {} KiB, digest {}", fs::metadata(&file)?.len() / 1024, image.digest());
        println!(
            "  load it: ctr -n k8s.io images import FILE, podman load -i FILE, docker load -i FILE (25 or later),"
        );
        println!("  or push it: skopeo copy oci-archive:FILE docker://REGISTRY/hauberk");
        Ok(())
    }
}

/// Builds the program, so that neither this tree's place nor the caches' are in it.
fn build() -> Result<PathBuf> {
    setup::ensure()?;
    step("program");
    let target = root().join("target/image/build");
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let cargo_home = cargo_home.or_else(home).context("neither CARGO_HOME nor HOME is set")?;
    let maps = [(root(), "/hauberk"), (cargo_home, "/cargo")];
    let rust: Vec<_> =
        maps.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())).collect();
    let c: Vec<_> =
        maps.iter().map(|(from, to)| format!("-ffile-prefix-map={}={to}", from.display())).collect();
    let mut cargo =
        command("cargo", &["build", "--release", "--locked", "--package", "hauberk", "--bin", "hauberk"]);
    cargo
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", rust.join(" "))
        .env("CFLAGS", c.join(" "))
        .env("CXXFLAGS", c.join(" "))
        // Names of functions stay, for backtraces.
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .env("SOURCE_DATE_EPOCH", "0");
    shell::run(cargo)?;
    Ok(target.join("release/hauberk"))
}

/// The image of a program.
fn make(program: &Path) -> Result<Image> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    // What changes seldom first: its layer is shared by versions.
    let mut base = Layer::default();
    base.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/:/nologin\nhauberk:x:65532:65532:hauberk:/:/nologin\n",
    )?;
    base.file("etc/group", 0o644, b"root:x:0:\nhauberk:x:65532:\n")?;
    base.file("etc/nsswitch.conf", 0o644, b"hosts: files dns\n")?;
    base.directory("run", 0o755)?;
    base.directory("tmp", 0o1777)?;
    for library in libraries(program)? {
        let place = library.strip_prefix("/").unwrap_or(&library);
        base.file(&place.to_string_lossy(), 0o755, &read(&library)?)?;
    }
    let mut own = Layer::default();
    own.file(PROGRAM, 0o755, &read(program)?)?;
    own.link("usr/bin/kubectl-hauberk", "hauberk")?;
    Image::new([base, own])
}

/// The shared libraries that a program is linked with, the loader among them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let said = output(command("ldd", &[program]))?;
    let mut paths: Vec<PathBuf> =
        said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect();
    paths.sort();
    paths.dedup();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn program() -> PathBuf {
        ::tests::host::bin("hauberk").unwrap().into()
    }

    #[test]
    fn the_same_program_makes_the_same_image_and_another_makes_another() {
        let dir = std::env::temp_dir().join(format!("hauberk-image-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (one, two) = (dir.join("one"), dir.join("two"));
        let image = make(&program()).unwrap();
        image.write(&one).unwrap();
        // Another file at another place and time.
        let copy = dir.join("copy");
        fs::copy(program(), &copy).unwrap();
        let again = make(&copy).unwrap();
        again.write(&two).unwrap();
        assert_eq!(image.digest(), again.digest());
        assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap(), "every byte of the archive");
        assert_ne!(make(Path::new("/bin/true")).unwrap().digest(), image.digest());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_is_unpacked_runs_alone_and_has_no_shell() {
        let dir = std::env::temp_dir().join(format!("hauberk-rootfs-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        make(&program()).unwrap().unpack(&dir).unwrap();
        for program in ["/usr/bin/hauberk", "/usr/bin/kubectl-hauberk"] {
            let said = Command::new("chroot")
                .args(["--userspec=65532:65532", dir.to_str().unwrap(), program, "--version"])
                .output()
                .unwrap();
            let version = format!("hauberk {}\n", env!("CARGO_PKG_VERSION"));
            assert_eq!(String::from_utf8_lossy(&said.stdout), version, "{said:?}");
        }
        let mut names = Vec::new();
        let mut dirs = vec![dir.clone()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => dirs.push(entry.path()),
                    false => names.push(entry.file_name().to_string_lossy().into_owned()),
                }
            }
        }
        names.retain(|name| !name.contains(".so"));
        names.sort();
        assert_eq!(names, ["group", "hauberk", "kubectl-hauberk", "nsswitch.conf", "passwd"]);
        fs::remove_dir_all(&dir).unwrap();
    }
}
