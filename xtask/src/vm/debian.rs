//! QEMU and kernels, from Debian's packages, unpacked below the tool folder: nothing is installed.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::setup::debian::mirror;
use crate::shell::{command, have, output, run, step};

/// Where the programs come from, whatever this machine is.
const USERLAND_SUITE: &str = "trixie";
const PROGRAMS: [&str; 2] = ["qemu-system-x86", "busybox-static"];

/// Programs with every library they need, the loader included.
pub(super) struct Userland(PathBuf);

impl Userland {
    pub(super) fn path(&self, inside: &str) -> PathBuf {
        self.0.join(inside)
    }

    /// A program of it, with its own libraries.
    pub(super) fn program(&self, inside: &str) -> Command {
        let mut loader = command(
            &self.path("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").to_string_lossy(),
            &[] as &[&str],
        );
        loader.arg("--library-path").arg(self.path("usr/lib/x86_64-linux-gnu")).arg(self.path(inside));
        loader
    }
}

/// An unpacked kernel.
pub(super) struct Kernel {
    pub(super) version: String,
    pub(super) image: PathBuf,
    /// `modules.builtin` and the like, and below `kernel` the modules.
    pub(super) modules: PathBuf,
}

/// Fetches what is missing, each thing once.
pub(super) fn ensure<'a>(
    dir: &Path,
    suites: impl Iterator<Item = &'a str>,
) -> Result<(Userland, Vec<Kernel>)> {
    if !have("apt-get") || !have("dpkg") {
        bail!("this is no Debian: it takes QEMU and the kernels from Debian's packages");
    }
    let apt = Apt { dir };
    let programs = dir.join("programs");
    if !programs.exists() {
        step("QEMU and what it needs (170 MB, once)");
        apt.unpack(&programs, || apt.programs())?;
    }
    let mut kernels = Vec::new();
    for suite in suites {
        let place = dir.join(suite);
        if !place.exists() {
            step(&format!("the kernel of {suite} (some 150 MB, once)"));
            apt.unpack(&place, || apt.kernel(suite))?;
        }
        kernels.push(kernel(&place)?);
    }
    Ok((Userland(programs), kernels))
}

/// Both layouts: with /boot, and with everything below /usr.
fn kernel(place: &Path) -> Result<Kernel> {
    for modules in ["lib/modules", "usr/lib/modules"] {
        let Ok(mut versions) = fs::read_dir(place.join(modules)) else { continue };
        let modules = versions.next().context("a kernel package has modules")??.path();
        let version = modules.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let images = [place.join(format!("boot/vmlinuz-{version}")), modules.join("vmlinuz")];
        let image =
            images.into_iter().find(|image| image.exists()).context("a kernel package has a kernel")?;
        return Ok(Kernel { version, image, modules });
    }
    bail!("{} holds no kernel; remove it", place.display())
}

/// apt with sources, lists and archives of its own; the machine's are not touched.
struct Apt<'a> {
    dir: &'a Path,
}

impl Apt<'_> {
    fn command(&self, tool: &str, args: &[&str]) -> Command {
        let dir = self.dir.display();
        let option = |text: String| ["-o".to_owned(), text];
        let mut command = command(
            tool,
            &[
                option("Dir::Etc::sourcelist=/dev/null".into()),
                option(format!("Dir::Etc::sourceparts={dir}/sources")),
                option(format!("Dir::State::lists={dir}/lists")),
                // As if nothing were installed: every library is fetched.
                option(format!("Dir::State::status={dir}/status")),
                option(format!("Dir::Cache={dir}/cache")),
                option("APT::Sandbox::User=".into()),
                option(format!("APT::Default-Release={USERLAND_SUITE}")),
            ]
            .concat(),
        );
        command.args(args);
        command
    }

    fn update(&self) -> Result<()> {
        for below in ["sources", "lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(self.dir.join(below))?;
        }
        fs::write(self.dir.join("status"), "")?;
        let sources = format!(
            "Types: deb\nURIs: {}\nSuites: bookworm trixie sid\nComponents: main\nArchitectures: amd64\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
            mirror()?
        );
        fs::write(self.dir.join("sources/debian.sources"), sources)?;
        run(self.command("apt-get", &["update", "-qq"]))
    }

    /// Fetches packages and unpacks them to a place that is there whole, or not at all.
    fn unpack(&self, place: &Path, fetch: impl FnOnce() -> Result<()>) -> Result<()> {
        self.update()?;
        let archives = self.dir.join("cache/archives");
        let packages = || -> Result<Vec<PathBuf>> {
            let all = fs::read_dir(&archives)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
            Ok(all.into_iter().filter(|path| path.extension() == Some(OsStr::new("deb"))).collect())
        };
        packages()?.into_iter().try_for_each(fs::remove_file)?;
        fetch()?;
        let new = place.with_extension("new");
        let _ = fs::remove_dir_all(&new);
        for package in packages()? {
            output(command("dpkg", &[OsStr::new("-x"), package.as_os_str(), new.as_os_str()]))?;
            fs::remove_file(package)?;
        }
        Ok(fs::rename(new, place)?)
    }

    fn programs(&self) -> Result<()> {
        let args = ["install", "-qq", "-y", "--no-install-recommends", "--download-only"];
        run(self.command("apt-get", &[&args[..], &PROGRAMS].concat()))
    }

    fn kernel(&self, suite: &str) -> Result<()> {
        let mut wanted = vec![format!("linux-image-cloud-amd64/{suite}")];
        let mut at = 0;
        while let Some(package) = wanted.get(at) {
            let shown = output(self.command("apt-cache", &["show", package]))?;
            for name in parts(&shown) {
                if !wanted.contains(&name) {
                    wanted.push(name);
                }
            }
            at += 1;
        }
        let names: Vec<&str> = wanted.iter().map(String::as_str).collect();
        let mut download = self.command("apt-get", &[&["download", "-qq"], &names[..]].concat());
        download.current_dir(self.dir.join("cache/archives"));
        run(download)
    }
}

/// The packages of one version that a kernel is made of, as a package's description has them.
fn parts(shown: &str) -> Vec<String> {
    let depends = shown.lines().filter_map(|line| line.strip_prefix("Depends:"));
    let names = depends.flat_map(|line| line.split(',')).filter_map(|one| one.split_whitespace().next());
    let kinds = ["linux-image-", "linux-base-", "linux-binary-", "linux-modules-"];
    names.filter(|name| kinds.iter().any(|kind| name.starts_with(kind))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_parts_are_found_and_nothing_else() {
        let shown = "Package: x\nDepends: dracut | initramfs-tools (>= 0.1), linux-base (>= 4), linux-base-7.2 (= 1), linux-binary-7.2-cloud (= 7.2-1), linux-modules-7.2-cloud (= 7.2-1)\n";
        assert_eq!(parts(shown), ["linux-base-7.2", "linux-binary-7.2-cloud", "linux-modules-7.2-cloud"]);
    }
}
