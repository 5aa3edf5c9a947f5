//! The kernel boundary: bpf(2) where aya has no call for it.
//!
//! aya loads objects and programs. What it lacks, or offers only behind `&mut`, is here: links that
//! can be pinned, found again and updated in place, and map access shared between threads.

#![expect(unsafe_code, reason = "system calls that no crate of ours wraps; each says why it is sound")]

use std::ffi::CString;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

// `enum bpf_cmd`, include/uapi/linux/bpf.h.
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const MAP_LOOKUP_AND_DELETE_ELEM: libc::c_int = 21;
const LINK_CREATE: libc::c_int = 28;
const LINK_UPDATE: libc::c_int = 29;
const LINK_DETACH: libc::c_int = 34;

/// Where a program is attached: `enum bpf_attach_type`, include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Hook {
    /// Packets that reach a cgroup's sockets.
    Ingress = 0,
    /// TCP events of a cgroup's sockets.
    SockOps = 3,
    /// connect(), IPv4.
    Connect4 = 10,
    /// connect(), IPv6.
    Connect6 = 11,
    /// getpeername() and accept(), IPv4.
    Getpeername4 = 29,
    /// getpeername() and accept(), IPv6.
    Getpeername6 = 30,
    /// Socket lookup of a network namespace.
    SkLookup = 36,
    /// Packets leaving an interface.
    TcxEgress = 47,
}

fn bpf<A>(command: libc::c_int, attributes: &A) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads `size_of::<A>()` bytes of a `repr(C)` value without padding whose
    // pointers outlive the call, and zero-extends what is shorter than its own `union bpf_attr`.
    let outcome =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<A>()) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(outcome) }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    // An open descriptor is never negative.
    fd.as_raw_fd().unsigned_abs()
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens what is pinned at a path.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    owned(bpf(OBJ_GET, &Object { path: path.as_ptr() as u64, fd: 0, flags: 0 })?)
}

/// A program's attachment. It lives as long as this or a pin of it does.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

/// What a link is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target<'a> {
    /// A cgroup directory or a network namespace.
    Fd(BorrowedFd<'a>),
    /// An interface of the calling thread's network namespace.
    Interface(u32),
}

impl Link {
    /// Attaches a program.
    pub(super) fn create(program: BorrowedFd<'_>, target: Target<'_>, hook: Hook) -> io::Result<Self> {
        #[repr(C)]
        struct Create {
            program: u32,
            target: u32,
            hook: u32,
            flags: u32,
        }
        let target = match target {
            Target::Fd(fd) => number(fd),
            Target::Interface(index) => index,
        };
        let attributes = Create { program: number(program), target, hook: hook as u32, flags: 0 };
        Ok(Self(owned(bpf(LINK_CREATE, &attributes)?)?))
    }

    /// Opens a pinned link.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        open(path).map(Self)
    }

    /// Puts another program in place of the attached one, with no instant between.
    pub(super) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        #[repr(C)]
        struct Update {
            link: u32,
            program: u32,
            flags: u32,
            old: u32,
        }
        let attributes = Update { link: number(self.0.as_fd()), program: number(program), flags: 0, old: 0 };
        bpf(LINK_UPDATE, &attributes).map(drop)
    }

    /// Takes the program away at once; the end of the last pin does so some time later.
    pub(super) fn detach(&self) -> io::Result<()> {
        bpf(LINK_DETACH, &number(self.0.as_fd())).map(drop)
    }

    /// What it is attached to now, as the kernel sees it.
    pub(super) fn info(&self) -> io::Result<LinkInfo> {
        info(self.0.as_fd())
    }

    /// Keeps the link alive beyond this process.
    pub(super) fn pin(&self, path: &Path) -> io::Result<()> {
        let path = c_path(path)?;
        let attributes = Object { path: path.as_ptr() as u64, fd: number(self.0.as_fd()), flags: 0 };
        bpf(OBJ_PIN, &attributes).map(drop)
    }
}

/// The beginning of `struct bpf_link_info`, for links of cgroups, network namespaces and interfaces.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct LinkInfo {
    kind: u32,
    id: u32,
    /// The attached program.
    pub(super) program: u32,
    padding: u32,
    /// The cgroup's ID (64 bits), the namespace's inode or the interface's index (32 bits, the rest is the
    /// hook): 0 when that is gone.
    target: [u32; 2],
}

impl LinkInfo {
    /// The cgroup's ID.
    pub(super) fn cgroup(&self) -> u64 {
        u64::from(self.target[1]) << 32 | u64::from(self.target[0])
    }

    /// The namespace's inode, or the interface's index.
    pub(super) fn number(&self) -> u32 {
        self.target[0]
    }
}

/// The kernel's number for a loaded program.
pub(super) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // The beginning of `struct bpf_prog_info`: type, ID.
    info::<[u32; 2]>(program).map(|[_, id]| id)
}

fn info<T: FromBytes + IntoBytes + Immutable>(fd: BorrowedFd<'_>) -> io::Result<T> {
    #[repr(C)]
    struct Ask {
        fd: u32,
        length: u32,
        info: u64,
    }
    let mut answer = T::new_zeroed();
    let length = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // The kernel writes at most so many bytes through this pointer.
    let ask = Ask { fd: number(fd), length, info: std::ptr::from_mut(&mut answer) as u64 };
    bpf(OBJ_GET_INFO_BY_FD, &ask)?;
    Ok(answer)
}

/// A hash map shared between threads; every call is one system call and atomic.
#[derive(Debug)]
pub(super) struct Table<K, V> {
    fd: OwnedFd,
    rows: PhantomData<fn(K, V)>,
}

#[repr(C)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

impl<K, V> Table<K, V>
where
    K: IntoBytes + FromBytes + Immutable + Copy,
    V: IntoBytes + FromBytes + Immutable + Copy,
{
    /// Opens the pinned map at a path. Its rows must be `K` and `V`: the pin's directory carries the
    /// contract's version.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { fd: open(path)?, rows: PhantomData })
    }

    fn element(&self, key: *const K, value: *const V) -> Element {
        Element { map: number(self.fd.as_fd()), padding: 0, key: key as u64, value: value as u64, flags: 0 }
    }

    /// Inserts or replaces a row.
    pub(super) fn insert(&self, key: &K, value: &V) -> io::Result<()> {
        bpf(MAP_UPDATE_ELEM, &self.element(key, value)).map(drop)
    }

    /// Removes a row; it is no error when there is none.
    pub(super) fn remove(&self, key: &K) -> io::Result<()> {
        match bpf(MAP_DELETE_ELEM, &self.element(key, std::ptr::null())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// Reads a row.
    pub(super) fn get(&self, key: &K) -> io::Result<Option<V>> {
        self.read(MAP_LOOKUP_ELEM, key)
    }

    /// Takes a row out.
    pub(super) fn take(&self, key: &K) -> io::Result<Option<V>> {
        self.read(MAP_LOOKUP_AND_DELETE_ELEM, key)
    }

    fn read(&self, command: libc::c_int, key: &K) -> io::Result<Option<V>> {
        let mut value = V::new_zeroed();
        // The kernel writes the value through this pointer.
        let attributes = self.element(key, std::ptr::from_mut(&mut value));
        match bpf(command, &attributes) {
            Ok(_) => Ok(Some(value)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Every key, as far as other writers leave the table alone meanwhile.
    pub(super) fn keys(&self) -> io::Result<Vec<K>> {
        let mut keys: Vec<K> = Vec::new();
        loop {
            let mut next = K::new_zeroed();
            let last = keys.last().map_or(std::ptr::null(), std::ptr::from_ref);
            let attributes = Element {
                map: number(self.fd.as_fd()),
                padding: 0,
                key: last as u64,
                value: std::ptr::from_mut(&mut next) as u64,
                flags: 0,
            };
            match bpf(MAP_GET_NEXT_KEY, &attributes) {
                Ok(_) => keys.push(next),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(keys),
                Err(e) => return Err(e),
            }
        }
    }
}
