//! The programs: loaded, pinned maps adopted, attached to the pods' cgroup.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, PerCpuArray, RingBuf};
use aya::programs::{Program, RawTracePoint};
use aya::{Ebpf, EbpfLoader};

use super::sys::{Hook, Link, LinkInfo, Target, program_id};
use super::{CaptureError, mount};
use crate::directory::Mode;
use crate::text::with_causes;

/// The maps that are pinned, so that a restarted agent finds the same contents: all but `CGROUPS`, whose
/// news are each agent's own.
const MAPS: [&str; 16] = [
    "GATE",
    "JUDGED",
    "REACHABLE",
    "PROBES",
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

/// Held back: connections to pods that nobody has judged. Attached only where there are such pods.
const INBOUND: (&str, Hook) = ("hauberk_inbound", Hook::Ingress);

/// News of cgroups, with their tracepoints.
const NEWS: [(&str, &str); 2] =
    [("hauberk_cgroup_made", "cgroup_mkdir"), ("hauberk_cgroup_entered", "cgroup_attach_task")];

/// The loaded programs.
#[derive(Debug)]
pub(super) struct Programs {
    object: Ebpf,
    dir: PathBuf,
    lookup: OwnedFd,
    strict: OwnedFd,
    guard: OwnedFd,
    /// Whether connections are kept from pods that nobody has judged.
    inbound: bool,
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
            if !is_optional(name) {
                load(program).map_err(|e| refused(name, &e))?;
            }
        }
        let lookup = program(&object, "hauberk_lookup")?;
        let strict = program(&object, "hauberk_strict")?;
        let guard = program(&object, "hauberk_guard")?;
        Ok(Self { object, dir: dir.into(), lookup, strict, guard, inbound: false })
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

    /// Attaches to the pods' cgroup, or takes the links over that an earlier agent pinned; with `inbound`
    /// also what keeps connections from pods that nobody has judged, if the kernel takes it.
    pub(super) fn attach_cgroup(&mut self, configured: &Path, inbound: bool) -> Result<(), CaptureError> {
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
        self.inbound = inbound && (self.inbound || self.load_optional(INBOUND.0));
        for (name, hook) in self.inbound.then_some(INBOUND).into_iter().chain(CGROUP) {
            let fd = program(&self.object, name)?;
            ensure(&self.dir.join(format!("{prefix}{name}")), fd.as_fd(), Target::Fd(file.as_fd()), hook)
                .map_err(|source| CaptureError::Attach {
                    what: format!("{name} to {}", path.display()),
                    source,
                })?;
        }
        self.forget("cgroup-", &prefix)
            .map_err(|source| CaptureError::Table { what: "remove links of an earlier cgroup", source })
    }

    /// Removes the pins of one kind that do not begin as the present ones do.
    fn forget(&self, kind: &str, present: &str) -> io::Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(kind) && !name.starts_with(present) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    pub(super) fn verdicts(&mut self) -> Result<PerCpuArray<MapData, u64>, CaptureError> {
        let map = self.object.take_map("VERDICTS").ok_or_else(|| missing("VERDICTS"))?;
        PerCpuArray::try_from(map).map_err(|e| refused("VERDICTS", &e))
    }

    /// Whether what is attached to the pods' cgroup is all there, with these very programs.
    ///
    /// # Errors
    /// In words, what is not.
    pub(super) fn verify_cgroup(&self, configured: &Path) -> Result<(), String> {
        let unreadable = |e: io::Error| format!("capture.cgroup: {e}");
        let path = mount::cgroup_dir(configured).map_err(unreadable)?;
        let inode = fs::metadata(&path).map_err(unreadable)?.ino();
        for (name, _) in self.inbound.then_some(INBOUND).into_iter().chain(CGROUP) {
            let program = program(&self.object, name).map_err(|e| e.to_string())?;
            let pin = self.dir.join(format!("cgroup-{inode}-{name}"));
            verify(&pin, program.as_fd(), |info| info.cgroup() == inode)
                .map_err(|why| format!("{name} on {}: {why}", path.display()))?;
        }
        Ok(())
    }

    /// Has connections from a cgroup, that of the kubelet, told to the pods' side.
    pub(super) fn attach_kubelet(&self, cgroup: &Path) -> Result<(), CaptureError> {
        const NAME: &str = "hauberk_kubelet";
        let named = |source| CaptureError::Cgroup { path: cgroup.into(), source };
        let file = File::open(cgroup).map_err(named)?;
        let inode = file.metadata().map_err(named)?.ino();
        let pin = self.dir.join(format!("kubelet-{inode}"));
        let fd = program(&self.object, NAME)?;
        ensure(&pin, fd.as_fd(), Target::Fd(file.as_fd()), Hook::SockOps).map_err(|source| {
            CaptureError::Attach { what: format!("{NAME} to {}", cgroup.display()), source }
        })?;
        self.forget("kubelet-", &format!("kubelet-{inode}"))
            .map_err(|source| CaptureError::Table { what: "remove links of an earlier kubelet", source })
    }

    /// A ring buffer, once.
    pub(super) fn ring(&mut self, name: &str) -> Result<RingBuf<MapData>, CaptureError> {
        let map = self.object.take_map(name).ok_or_else(|| missing(name))?;
        RingBuf::try_from(map).map_err(|e| refused(name, &e))
    }

    /// Watches cgroups come and fill, for as long as this lives.
    pub(super) fn watch_cgroups(&mut self) -> Result<(), CaptureError> {
        for (name, tracepoint) in NEWS {
            let program = self.object.program_mut(name).ok_or_else(|| missing(name))?;
            let program: &mut RawTracePoint = program.try_into().map_err(|e| refused(name, &e))?;
            program.load().and_then(|()| program.attach(tracepoint)).map_err(|e| refused(name, &e))?;
        }
        Ok(())
    }

    /// Loads what the agent does without on kernels that do not take it.
    fn load_optional(&mut self, name: &str) -> bool {
        let Some(program) = self.object.program_mut(name) else { return false };
        let loaded = load(program);
        if let Err(error) = &loaded {
            tracing::warn!(program = name, %error, "the kernel does not take a program that keeps connections from new pods until they are enrolled; it needs Linux 6.15");
        }
        loaded.is_ok()
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

/// Whether a pinned link is there, with this program and what it must be attached to.
pub(super) fn verify(
    pin: &Path,
    program: BorrowedFd<'_>,
    is_there: impl Fn(&LinkInfo) -> bool,
) -> Result<(), String> {
    let info = Link::open(pin).and_then(|link| link.info()).map_err(|e| format!("not attached ({e})"))?;
    if !is_there(&info) {
        return Err("attached to what is gone".into());
    }
    let own = program_id(program).map_err(|e| e.to_string())?;
    if info.program != own {
        return Err(format!("another program ({}) is in its place", info.program));
    }
    Ok(())
}

fn is_optional(name: &str) -> bool {
    name == INBOUND.0 || NEWS.iter().any(|(news, _)| *news == name)
}

fn load(program: &mut Program) -> Result<(), aya::programs::ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::RawTracePoint(program) => program.load(),
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
    CaptureError::Load { what: what.into(), message: with_causes(&error.to_string(), error) }
}
