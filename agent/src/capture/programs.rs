//! The programs: loaded, pinned maps adopted, attached to the pods' cgroup.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, PerCpuArray, RingBuf};
use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};

use super::sys::{Hook, Link, Target};
use super::{CaptureError, mount};
use crate::directory::Mode;

/// Every map of the object; all are pinned, so that a restarted agent finds the same contents.
const MAPS: [&str; 12] = [
    "MESH",
    "PODS",
    "POD_ADDRS",
    "EXEMPT",
    "EXCLUDED_PORTS",
    "EXCLUDED_RANGES",
    "ORIGINAL_DST",
    "TRUE_SOURCE",
    "PEER",
    "VERDICTS",
    "EVENTS",
    "HEARTBEAT",
];

/// Programs of the pods' cgroup, with their hooks.
const CGROUP: [(&str, Hook); 5] = [
    // Those that only report come first: a connection captured by the last would otherwise find no
    // one to publish it.
    ("hauberk_sockops", Hook::SockOps),
    ("hauberk_getpeername4", Hook::Getpeername4),
    ("hauberk_getpeername6", Hook::Getpeername6),
    ("hauberk_connect4", Hook::Connect4),
    ("hauberk_connect6", Hook::Connect6),
];

/// The loaded programs.
#[derive(Debug)]
pub(super) struct Programs {
    object: Ebpf,
    dir: PathBuf,
    lookup: OwnedFd,
    strict: OwnedFd,
    guard: OwnedFd,
}

impl Programs {
    /// Loads every program, on the pinned maps where there are some.
    pub(super) fn load(dir: &Path) -> Result<Self, CaptureError> {
        // aligned for the ELF parser
        let bytes = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));
        let mut loader = EbpfLoader::new();
        for map in MAPS {
            loader.map_pin_path(map, dir.join(map));
        }
        let mut object = loader.load(bytes).map_err(|e| refused("the maps", &e))?;
        for (name, program) in object.programs_mut() {
            load(program).map_err(|e| refused(name, &e))?;
        }
        let lookup = program(&object, "hauberk_lookup")?;
        let strict = program(&object, "hauberk_strict")?;
        let guard = program(&object, "hauberk_guard")?;
        Ok(Self { object, dir: dir.into(), lookup, strict, guard })
    }

    /// The program for new connections that arrive at a pod of this mode.
    pub(super) fn lookup(&self, mode: Mode) -> BorrowedFd<'_> {
        match mode {
            Mode::Strict => self.strict.as_fd(),
            Mode::Permissive | Mode::Off => self.lookup.as_fd(),
        }
    }

    /// The program for packets that leave a strict pod.
    pub(super) fn guard(&self) -> BorrowedFd<'_> {
        self.guard.as_fd()
    }

    /// Attaches to the pods' cgroup, or takes the links over that an earlier agent pinned.
    pub(super) fn attach_cgroup(&mut self, configured: &Path) -> Result<(), CaptureError> {
        let cgroup = |source| CaptureError::Cgroup { path: configured.into(), source };
        let path = mount::cgroup_dir(configured).map_err(cgroup)?;
        let open = || -> io::Result<(File, u64)> {
            let file = File::open(&path)?;
            let inode = file.metadata()?.ino();
            Ok((file, inode))
        };
        let (file, inode) = open().map_err(|source| CaptureError::Cgroup { path: path.clone(), source })?;
        // The inode tells links on this cgroup from those on an earlier one of the same name.
        let prefix = format!("cgroup-{inode}-");
        for (name, hook) in CGROUP {
            let fd = program(&self.object, name)?;
            ensure(&self.dir.join(format!("{prefix}{name}")), fd.as_fd(), Target::Fd(file.as_fd()), hook)
                .map_err(|source| CaptureError::Attach {
                    what: format!("{name} to {}", path.display()),
                    source,
                })?;
        }
        self.forget_other_cgroups(&prefix)
            .map_err(|source| CaptureError::Table { what: "remove links of an earlier cgroup", source })
    }

    fn forget_other_cgroups(&self, prefix: &str) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("cgroup-") && !name.starts_with(prefix) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    pub(super) fn verdicts(&mut self) -> Result<PerCpuArray<MapData, u64>, CaptureError> {
        let map = self.object.take_map("VERDICTS").ok_or_else(|| missing("VERDICTS"))?;
        PerCpuArray::try_from(map).map_err(|e| refused("VERDICTS", &e))
    }

    pub(super) fn events(&mut self) -> Result<RingBuf<MapData>, CaptureError> {
        let map = self.object.take_map("EVENTS").ok_or_else(|| missing("EVENTS"))?;
        RingBuf::try_from(map).map_err(|e| refused("EVENTS", &e))
    }
}

/// Attaches a program and pins the link; or puts it into the link that is pinned already.
pub(super) fn ensure(pin: &Path, program: BorrowedFd<'_>, target: Target<'_>, hook: Hook) -> io::Result<()> {
    if !pin.exists() {
        return Link::create(program, target, hook)?.pin(pin);
    }
    if Link::open(pin).and_then(|link| link.update(program)).is_ok() {
        return Ok(());
    }
    // Whatever is wrong with the old link (most likely its target is gone), it stays until the new
    // one is attached: there is no instant without.
    let link = Link::create(program, target, hook)?;
    fs::remove_file(pin)?;
    link.pin(pin)
}

fn load(program: &mut Program) -> Result<(), aya::programs::ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        // The object has no other kind; a new one would be left unloaded and fail to attach.
        _ => Ok(()),
    }
}

fn program(object: &Ebpf, name: &str) -> Result<OwnedFd, CaptureError> {
    let program = object.program(name).ok_or_else(|| missing(name))?;
    let fd = program.fd().map_err(|e| refused(name, &e))?;
    fd.as_fd().try_clone_to_owned().map_err(|e| refused(name, &e))
}

fn missing(what: &str) -> CaptureError {
    CaptureError::Load { what: what.into(), message: "it is not in the embedded object".into() }
}

/// With every cause: the verifier's words are in the innermost.
fn refused(what: &str, error: &dyn std::error::Error) -> CaptureError {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    CaptureError::Load { what: what.into(), message }
}
