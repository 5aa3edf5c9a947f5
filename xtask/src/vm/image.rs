//! Makes the image that a kernel starts with: busybox, modules, tests and their libraries.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::TESTS;
use super::debian::{Kernel, Userland};
use crate::shell::{command, output};

/// What is taken of the kernel's modules.
const MODULES: [&str; 5] = ["crypto", "arch/x86/crypto", "lib", "arch/x86/lib", "net/tls"];
/// What the script and the kernel call.
const APPLETS: [&str; 7] = ["sh", "mount", "ip", "echo", "grep", "poweroff", "modprobe"];

/// Builds it below `work`; `init` is the script that runs there.
pub(super) fn build(
    work: &Path,
    userland: &Userland,
    kernel: &Kernel,
    tests: &[PathBuf],
    init: &str,
) -> Result<PathBuf> {
    let root = work.join("root");
    for dir in ["bin", "sbin", "proc", "sys", "dev", "tmp", "tests"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let busybox = userland.path("usr/bin/busybox");
    copy(&busybox, &root.join("bin/busybox"))?;
    for applet in APPLETS {
        symlink("/bin/busybox", root.join("bin").join(applet))?;
    }
    symlink("/bin/busybox", root.join("sbin/modprobe"))?;
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), Permissions::from_mode(0o755))?;
    for (name, test) in TESTS.iter().zip(tests) {
        // Most of a test's file is for debuggers.
        let stripped = root.join("tests").join(name);
        output(command("strip", &["-o".as_ref(), stripped.as_os_str(), test.as_os_str()]))?;
        libraries(&root, test)?;
    }
    modules(&root, &busybox, kernel)?;
    let image = work.join("initrd");
    let pack = format!("find . | {} cpio -o -H newc > {}", busybox.display(), image.display());
    let mut sh = command("sh", &["-c", &pack]);
    sh.current_dir(&root);
    output(sh)?;
    Ok(image)
}

fn libraries(root: &Path, program: &Path) -> Result<()> {
    let said = output(command("ldd", &[program]))?;
    for library in said.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new) {
        let place = root.join(library.strip_prefix("/")?);
        fs::create_dir_all(place.parent().context("a library is in a directory")?)?;
        copy(library, &place)?;
    }
    Ok(())
}

fn modules(root: &Path, busybox: &Path, kernel: &Kernel) -> Result<()> {
    let place = root.join("lib/modules").join(&kernel.version);
    fs::create_dir_all(&place)?;
    for file in ["modules.builtin", "modules.order"] {
        copy(&kernel.modules.join(file), &place.join(file))?;
    }
    for dir in MODULES {
        let from = kernel.modules.join("kernel").join(dir);
        if from.exists() {
            copy_modules(&from, &place.join("kernel").join(dir))?;
        }
    }
    let args =
        [busybox.as_os_str(), "depmod".as_ref(), "-b".as_ref(), root.as_os_str(), kernel.version.as_ref()];
    output(command(&args[0].to_string_lossy(), &args[1..])).map(drop)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// Copies a directory, uncompressed: busybox' modprobe does not read xz.
fn copy_modules(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        let place = to.join(path.file_name().context("an entry has a name")?);
        if path.is_dir() {
            copy_modules(&path, &place)?;
            continue;
        }
        copy(&path, &place)?;
        if path.extension().is_some_and(|end| end == "xz") {
            output(command("xz", &["-d".as_ref(), place.as_os_str()]))?;
        }
    }
    Ok(())
}
