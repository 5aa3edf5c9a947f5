//! Messages between two agents on one node, with open descriptors.
//!
//! Each is one packet of a Unix socket: JSON of at most [`MAX_BYTES`], and at most [`MAX_FDS`] descriptors.

#![expect(unsafe_code, reason = "the kernel hands descriptors over as numbers")]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, listen, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of a message.
pub const MAX_BYTES: usize = 64 << 10;
/// Most descriptors of a message: the kernel takes up to 253.
pub const MAX_FDS: usize = 64;

/// Waits for an agent's successor.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens at a path, in place of whoever did before.
    ///
    /// # Errors
    /// When it cannot.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = seqpacket()?;
        bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&listener, Backlog::new(4)?)?;
        Ok(Self(listener))
    }

    /// The next one; waits for it.
    ///
    /// # Errors
    /// When the system has no descriptor for it.
    pub fn accept(&self) -> io::Result<Passing> {
        let accepted = accept4(self.0.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Ok(Passing(unsafe { OwnedFd::from_raw_fd(accepted) }))
    }
}

/// A connection between two agents.
#[derive(Debug)]
pub struct Passing(OwnedFd);

impl Passing {
    /// Connects to a path.
    ///
    /// # Errors
    /// When nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let own = seqpacket()?;
        connect(own.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(own))
    }

    /// From now on waits no longer than this for a message.
    ///
    /// # Errors
    /// Never on a socket that is open.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        let patience = TimeVal::new(patience.as_secs().try_into().unwrap_or(i64::MAX), 0);
        Ok(setsockopt(&self.0, sockopt::ReceiveTimeout, &patience)?)
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_BYTES || fds.len() > MAX_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        let parts = [IoSlice::new(&bytes)];
        sendmsg::<()>(self.0.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    /// The next message.
    ///
    /// # Errors
    /// When the other side is gone, takes too long, or says what is no such message.
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let mut bytes = vec![0; MAX_BYTES];
        let (length, fds) = receive(self.0.as_fd(), &mut bytes)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((serde_json::from_slice(&bytes[..length])?, fds))
    }
}

/// One message: its length, 0 at the end, and its descriptors.
///
/// # Errors
/// When there is none in time, or it was longer than the room for it.
pub fn receive(from: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut parts = [IoSliceMut::new(bytes)];
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let message =
        recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
            received.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((message.bytes, received))
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    #[test]
    fn a_message_comes_with_its_descriptors_and_its_end_is_told() {
        let path = std::env::temp_dir().join(format!("hauberk-passing-{:x}", fastrand::u64(..)));
        std::fs::write(&path, "in the way").unwrap();
        let listener = Listener::bind(&path).unwrap();
        let ours = Passing::connect(&path).unwrap();
        let theirs = listener.accept().unwrap();
        let file = path.with_extension("txt");
        std::fs::write(&file, "hello").unwrap();
        ours.send(&"one", &[File::open(&file).unwrap().as_fd()]).unwrap();
        ours.send(&2, &[]).unwrap();
        let (text, mut fds) = theirs.receive::<String>().unwrap();
        let mut read = String::new();
        File::from(fds.remove(0)).read_to_string(&mut read).unwrap();
        assert_eq!((&*text, &*read, fds.len()), ("one", "hello", 0));
        theirs.receive::<String>().expect_err("another kind of message");
        drop(ours);
        assert_eq!(theirs.receive::<u8>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        std::fs::remove_file(&file).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
