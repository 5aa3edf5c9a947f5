//! Pipes that bytes are spliced through from socket to socket, without a copy in user space.
//!
//! A connection has one only while bytes are in it: an idle connection holds none.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::net::TcpStream;

/// What a pipe holds at most: as much as a frame towards a tunnel. The kernel's default, 64 KiB, takes
/// four times as many system calls.
const PIPE_BYTES: usize = 256 * 1024;
/// Unused pipes that a thread keeps. Making one costs as much as moving some tens of KiB.
const SPARE: usize = 16;

thread_local! {
    static SPARES: RefCell<Vec<Pipe>> = const { RefCell::new(Vec::new()) };
}

/// A pipe and how many bytes are in it.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    /// An empty pipe.
    pub(super) fn take() -> io::Result<Self> {
        if let Some(pipe) = SPARES.with_borrow_mut(Vec::pop) {
            return Ok(pipe);
        }
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // Without the privilege to have it larger, its size is no reason to fail.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES as i32));
        Ok(Self { read, write, held: 0 })
    }

    /// Keeps an empty pipe for the next connection. One that holds bytes is closed, and they are gone.
    pub(super) fn give_back(self) {
        SPARES.with_borrow_mut(|spares| {
            if self.held == 0 && spares.len() < SPARE {
                spares.push(self);
            }
        });
    }

    /// Whether nothing is in it.
    pub(super) fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Moves what a socket has received into the pipe.
    pub(super) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        let moved = splice(from, None, &self.write, None, PIPE_BYTES, flags())?;
        self.held += moved;
        Ok(moved)
    }

    /// Moves what is in the pipe to a socket, as much as that takes.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        let moved = splice(&self.read, None, to, None, self.held, flags())?;
        self.held -= moved;
        Ok(moved)
    }
}

fn flags() -> SpliceFFlags {
    SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE
}
