//! Network namespaces: opened by file, entered by the calling thread for a moment.
//!
//! Entering is synchronous and short: `f` must not wait. A thread that could not come home would
//! silently serve one pod's traffic in another's namespace, so that aborts the process.

pub mod pods;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::libc;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::SockaddrStorage;
use socket2::{Domain, Socket, Type};

/// An open network namespace.
#[derive(Debug)]
pub struct Netns {
    file: File,
    home: File,
    cookie: u64,
    inode: u64,
}

impl Netns {
    /// Opens the namespace that a file names, such as `/run/netns/x` or `/proc/1/ns/net`.
    ///
    /// # Errors
    /// When the file is missing or no network namespace; the message names it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let named =
            |e: io::Error| io::Error::new(e.kind(), format!("network namespace {}: {e}", path.display()));
        let file = File::open(path).map_err(named)?;
        let inode = file.metadata().map_err(named)?.ino();
        let home = File::open("/proc/thread-self/ns/net")?;
        let mut netns = Self { file, home, cookie: 0, inode };
        netns.cookie = netns.enter(cookie_of_this)?.map_err(named)?;
        Ok(netns)
    }

    /// The inode of the namespace that a file names now; compare it with [`Netns::inode`].
    ///
    /// # Errors
    /// When there is no such file.
    pub fn inode_at(path: &Path) -> io::Result<u64> {
        Ok(std::fs::metadata(path)?.ino())
    }

    /// The kernel's number for it (`SO_NETNS_COOKIE`), never used again for another.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// The inode of the file's namespace: tells whether a path still names the same one.
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// The namespace itself.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The addresses that others reach it at: the first of each family that is neither loopback's nor the
    /// link's alone.
    ///
    /// # Errors
    /// When the namespace cannot be entered or read.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        let all = self.enter(nix::ifaddrs::getifaddrs)??;
        let usable = all.filter(|interface| !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK));
        let mut found: Vec<IpAddr> = Vec::new();
        for ip in usable.filter_map(|interface| address(&interface.address?)) {
            if !found.iter().any(|known| known.is_ipv4() == ip.is_ipv4()) {
                found.push(ip);
            }
        }
        Ok(found)
    }

    /// Runs `f` with the calling thread inside. `f` must not wait for anything.
    ///
    /// # Errors
    /// When the namespace cannot be entered (no CAP_SYS_ADMIN, or not a network namespace).
    pub fn enter<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let _home = Home::leave(&self.home, &self.file)?;
        Ok(f())
    }
}

/// An address that is more than the link's.
fn address(storage: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| v4.ip()).filter(|ip| !ip.is_link_local());
    let v6 = || storage.as_sockaddr_in6().map(|v6| v6.ip()).filter(|ip| !ip.is_unicast_link_local());
    v4.map(IpAddr::V4).or_else(|| v6().map(IpAddr::V6))
}

/// Comes home when dropped, also when `f` panics.
struct Home<'a>(&'a File);

impl<'a> Home<'a> {
    fn leave(home: &'a File, to: &File) -> io::Result<Self> {
        setns(to.as_fd(), CloneFlags::CLONE_NEWNET)?;
        Ok(Self(home))
    }
}

impl Drop for Home<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot return to the node's network namespace; stopping at once");
            std::process::abort();
        }
    }
}

fn cookie_of_this() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
    netns_cookie(socket.as_fd())
}

/// `SO_NETNS_COOKIE` of a socket (Linux 5.14).
#[expect(unsafe_code, reason = "a socket option that no crate of ours wraps")]
fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    /// include/uapi/asm-generic/socket.h; libc has it for some targets only.
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: value and length are ours, of the size that is told, and outlive the call.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            std::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_is_named() {
        let error = Netns::open(Path::new("/nonexistent/ns")).expect_err("missing");
        assert!(error.to_string().contains("/nonexistent/ns"), "{error}");
    }

    #[test]
    fn the_own_namespace_can_be_entered_and_has_a_cookie() {
        if !nix::unistd::geteuid().is_root() {
            panic!("this test needs root");
        }
        let own = Netns::open(Path::new("/proc/self/ns/net")).expect("own namespace");
        assert_ne!(own.cookie(), 0);
        assert_eq!(own.enter(|| 7).expect("entered"), 7);
    }
}
