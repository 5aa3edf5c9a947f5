//! Connections of the agent's own through the capture of each pod.
//!
//! A connection is captured by the cgroup its socket was made in, and the agent is in none of a pod. So a
//! child of ours makes the sockets: it enters a cgroup of ours below that of all pods, then each pod's
//! network namespace, passes the sockets back, and ends without ever running a program.

#![expect(unsafe_code, reason = "code between fork and exec; it says why each step is sound")]

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};
use socket2::{SockAddr, Socket};

use super::verify::PROBES;
use super::{Capture, mount};
use crate::directory::Workload;
use crate::netns::Netns;
use crate::passing::{MAX_FDS, receive};

/// Our cgroup, below that of all pods.
pub(super) const CGROUP: &str = "hauberk-probe";
/// Sockets in one message.
const BATCH: usize = MAX_FDS;
/// How long the agent may take to answer itself.
const PATIENCE: Duration = Duration::from_secs(2);

impl Capture {
    /// Connects through the capture of each of these pods; for each in turn, what came of it.
    ///
    /// # Errors
    /// When it cannot be tried at all.
    pub fn probe(&self, pods: &[(&Workload, &Netns)]) -> io::Result<Vec<Result<(), String>>> {
        if pods.is_empty() {
            return Ok(Vec::new());
        }
        let cgroup = mount::cgroup_dir(&self.cgroup)?.join(CGROUP);
        fs::create_dir_all(&cgroup)?;
        let targets: Vec<SocketAddr> = pods.iter().map(|(workload, _)| target(workload)).collect();
        let places = pods.iter().zip(&targets).map(|((_, netns), to)| (netns.fd().as_raw_fd(), domain(to)));
        let sockets = sockets(&cgroup, places.collect())?;
        if sockets.len() != pods.len() {
            return Err(io::Error::other("the child that makes sockets has failed"));
        }
        let begun = sockets.into_iter().zip(&targets).map(|(socket, to)| begin(socket, *to)).collect();
        Ok(answers(begun))
    }
}

/// An address that the capture takes, of a family that the pod has.
fn target(workload: &Workload) -> SocketAddr {
    let has_v4 = workload.addresses.iter().any(IpAddr::is_ipv4);
    SocketAddr::new(PROBES[usize::from(!has_v4)], 1)
}

fn domain(to: &SocketAddr) -> i32 {
    if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// A socket in each network namespace, by the child.
fn sockets(cgroup: &Path, places: Vec<(RawFd, i32)>) -> io::Result<Vec<OwnedFd>> {
    let procs = OpenOptions::new().write(true).open(cgroup.join("cgroup.procs"))?;
    let (ours, theirs) = UnixStream::pair()?;
    let count = places.len();
    let mut child = Command::new("/");
    let (into, back) = (procs.as_raw_fd(), theirs.as_raw_fd());
    // SAFETY: the closure makes system calls only, on descriptors that stay open until `spawn` returns and on
    // memory that was allocated before: nothing that another thread of ours could have locked.
    unsafe {
        child.pre_exec(move || {
            if libc::write(into, b"0".as_ptr().cast(), 1) != 1 {
                return Err(io::Error::last_os_error());
            }
            for batch in places.chunks(BATCH) {
                let mut made = [0; BATCH];
                for (place, (netns, domain)) in made.iter_mut().zip(batch) {
                    if libc::setns(*netns, libc::CLONE_NEWNET) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                    *place = libc::socket(*domain, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0);
                    if *place < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                pass(back, &made[..batch.len()])?;
            }
            // There is nothing to run: this ends the child.
            Err(io::Error::from_raw_os_error(libc::ECANCELED))
        });
    }
    match child.spawn() {
        Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => {}
        Err(error) => return Err(error),
        Ok(_) => return Err(io::Error::other("the child that makes sockets ran something")),
    }
    drop(theirs);
    let mut received = Vec::with_capacity(count);
    while received.len() < count {
        let (_, batch) = receive(ours.as_fd(), &mut [0])?;
        if batch.is_empty() {
            break;
        }
        received.extend(batch);
    }
    Ok(received)
}

/// Sends descriptors; allocates nothing.
fn pass(to: RawFd, sockets: &[RawFd]) -> io::Result<()> {
    /// `CMSG_SPACE` of a full batch, rounded up, with the alignment of its header.
    #[repr(C, align(8))]
    struct Control([u8; 16 + 4 * BATCH]);
    let mut control = Control([0; 16 + 4 * BATCH]);
    let mut byte = [1u8];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let bytes = u32::try_from(size_of_val(sockets)).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: a zeroed `msghdr` is an empty one; the header and the descriptors fit into the buffer, which
    // is as long as they are told to be and outlives the call.
    let sent = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(bytes) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(bytes) as _;
        std::ptr::copy_nonoverlapping(
            sockets.as_ptr().cast::<u8>(),
            libc::CMSG_DATA(header),
            size_of_val(sockets),
        );
        libc::sendmsg(to, &raw const message, libc::MSG_NOSIGNAL)
    };
    if sent == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Begins to connect; what is wrong with that, if it fails at once.
fn begin(socket: OwnedFd, to: SocketAddr) -> Result<TcpStream, String> {
    let socket = Socket::from(socket);
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
            Err(format!("a connection through its capture fails: {error}"))
        }
        _ => Ok(socket.into()),
    }
}

/// Waits until each has been answered, at most for [`PATIENCE`] in all.
fn answers(begun: Vec<Result<TcpStream, String>>) -> Vec<Result<(), String>> {
    let until = Instant::now() + PATIENCE;
    let silent = || "a connection through its capture is not answered".to_owned();
    let mut outcomes: Vec<Result<(), String>> =
        begun.iter().map(|one| Err(one.as_ref().err().cloned().unwrap_or_else(silent))).collect();
    let mut open: Vec<(usize, TcpStream)> =
        begun.into_iter().enumerate().filter_map(|(place, one)| Some((place, one.ok()?))).collect();
    while !open.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        let mut polled: Vec<PollFd<'_>> =
            open.iter().map(|(_, tcp)| PollFd::new(tcp.as_fd(), PollFlags::POLLIN)).collect();
        let milliseconds = u16::try_from(left.as_millis()).unwrap_or(u16::MAX);
        if left.is_zero() || poll(&mut polled, milliseconds).is_err() {
            break;
        }
        let ready: Vec<bool> =
            polled.iter().map(|one| one.revents().is_some_and(|events| !events.is_empty())).collect();
        let mut ready = ready.into_iter();
        open.retain_mut(|(place, tcp)| {
            if !ready.next().unwrap_or(false) {
                return true;
            }
            outcomes[*place] = match tcp.read(&mut [0]) {
                Ok(1) => Ok(()),
                Ok(_) => Err("a connection through its capture is closed".into()),
                Err(error) => Err(format!("a connection through its capture fails: {error}")),
            };
            false
        });
    }
    outcomes
}
