//! An upgrade without a gap: a running agent passes its work to its successor.
//!
//! ```text
//! successor                                   predecessor
//!   Hello {handover: 1, version} ───────────►   honours no session ticket any more
//!   ◄── Greeting {version} + lock, admin        (goes on serving, all this while)
//!   takes up ticket keys, directory, SVIDs
//!   Take ───────────────────────────────────►
//!   ◄── Sockets [{cookie, address}] + sockets, in several messages
//!   enrols every pod on those sockets
//!   Serving ────────────────────────────────►   accepts nothing more, drains
//! ```
//!
//! Both accept on the same sockets for a moment, so no connection meets a closed one. A successor that
//! goes away before `Serving` changes nothing. The number in `Hello` is the version of these messages; an
//! agent that does not know it refuses.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::passing::{Listener, MAX_FDS, Passing};

/// The version of the messages.
const VERSION: u32 = 1;
/// How long either side waits for what takes no time.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a predecessor waits for its successor to get ready: longer than that waits itself.
const PREPARATION: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    handover: u32,
    version: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    version: String,
    /// Why not, if not.
    refused: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Take {}

#[derive(Debug, Serialize, Deserialize)]
struct Sockets {
    sockets: Vec<Name>,
    is_last: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Serving {}

/// Names a listening socket: the cookie of its network namespace, and where it listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Name {
    /// The network namespace.
    pub cookie: u64,
    /// The address.
    pub address: SocketAddr,
}

/// A listening socket that is passed on.
pub type Named = (Name, TcpListener);

/// Listening sockets that a predecessor has passed on.
#[derive(Debug, Default)]
pub struct Inherited(HashMap<Name, Vec<TcpListener>>);

impl Inherited {
    /// Takes those of one name.
    pub fn take(&mut self, name: Name) -> Vec<TcpListener> {
        self.0.remove(&name).unwrap_or_default()
    }

    /// Adds one.
    pub fn insert(&mut self, (name, socket): Named) {
        self.0.entry(name).or_default().push(socket);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn path(runtime_dir: &Path) -> PathBuf {
    runtime_dir.join("handover.sock")
}

/// The running agent, as its successor sees it.
#[derive(Debug)]
pub struct Predecessor(Passing);

impl Predecessor {
    /// Asks the agent that uses a runtime directory; what it passes at once: the directory's lock, and
    /// where the admin server listens.
    ///
    /// # Errors
    /// When it does not answer, or refuses.
    pub fn ask(runtime_dir: &Path) -> io::Result<(Self, File, TcpListener)> {
        let passing = Passing::connect(&path(runtime_dir))?;
        passing.set_patience(PATIENCE)?;
        passing.send(&Hello { handover: VERSION, version: env!("CARGO_PKG_VERSION").into() }, &[])?;
        let (greeting, fds) = passing.receive::<Greeting>()?;
        if let Some(why) = greeting.refused {
            return Err(io::Error::other(format!("the running agent ({}) refuses: {why}", greeting.version)));
        }
        let [lock, admin]: [OwnedFd; 2] = fds.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
        tracing::info!(version = greeting.version, "taking over from a running agent");
        Ok((Self(passing), lock.into(), admin.into()))
    }

    /// Takes every listening socket.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn take(&self) -> io::Result<Inherited> {
        self.0.send(&Take {}, &[])?;
        let mut inherited = Inherited::default();
        loop {
            let (message, fds) = self.0.receive::<Sockets>()?;
            if message.sockets.len() != fds.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            for (name, fd) in message.sockets.into_iter().zip(fds) {
                inherited.insert((name, fd.into()));
            }
            if message.is_last {
                return Ok(inherited);
            }
        }
    }

    /// Says that everything is served here: the agent stops accepting.
    ///
    /// # Errors
    /// When the agent is gone.
    pub fn serving(self) -> io::Result<()> {
        self.0.send(&Serving {}, &[])
    }
}

/// Where a running agent waits for a successor.
#[derive(Debug)]
pub struct Offer(Listener);

impl Offer {
    /// Waits in a runtime directory from now on.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn new(runtime_dir: &Path) -> io::Result<Self> {
        Listener::bind(&path(runtime_dir)).map(Self)
    }

    /// The next successor, once it has said hello.
    ///
    /// # Errors
    /// When that is none, or none of ours.
    pub fn next(&self) -> io::Result<Successor> {
        let passing = self.0.accept()?;
        passing.set_patience(PATIENCE)?;
        let (hello, _) = passing.receive::<Hello>()?;
        let successor = Successor { passing, version: hello.version };
        if hello.handover != VERSION {
            let why = format!("it speaks version {} of the hand-over, not {VERSION}", hello.handover);
            successor.greet(Some(why.clone()), &[])?;
            return Err(io::Error::other(why));
        }
        Ok(successor)
    }
}

/// An agent that takes over, as the running one sees it.
#[derive(Debug)]
pub struct Successor {
    passing: Passing,
    /// Its version.
    pub version: String,
}

impl Successor {
    fn greet(&self, refused: Option<String>, fds: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        self.passing.send(&Greeting { version: env!("CARGO_PKG_VERSION").into(), refused }, fds)
    }

    /// Passes the runtime directory's lock and the admin server's socket, then waits until the successor
    /// is ready for everything else.
    ///
    /// # Errors
    /// When it gives up, or takes too long.
    pub fn prepare(&self, lock: &File, admin: &impl AsFd) -> io::Result<()> {
        self.greet(None, &[lock.as_fd(), admin.as_fd()])?;
        self.passing.set_patience(PREPARATION)?;
        self.passing.receive::<Take>().map(drop)
    }

    /// Passes the listening sockets, then waits until the successor serves on them.
    ///
    /// # Errors
    /// When it gives up, or takes too long.
    pub fn pass(self, sockets: &[Named]) -> io::Result<()> {
        let mut batches = sockets.chunks(MAX_FDS).peekable();
        loop {
            let batch = batches.next().unwrap_or_default();
            let is_last = batches.peek().is_none();
            let fds: Vec<_> = batch.iter().map(|(_, socket)| socket.as_fd()).collect();
            let names = batch.iter().map(|(name, _)| *name).collect();
            self.passing.send(&Sockets { sockets: names, is_last }, &fds)?;
            if is_last {
                break;
            }
        }
        self.passing.receive::<Serving>().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_socket_comes_over_by_name_and_a_successor_that_gives_up_is_noticed() {
        let dir = std::env::temp_dir().join(format!("hauberk-handover-{:x}", fastrand::u64(..)));
        std::fs::create_dir(&dir).unwrap();
        Predecessor::ask(&dir).expect_err("nobody is there");
        let offer = Offer::new(&dir).unwrap();
        let lock = File::create(dir.join("agent.lock")).unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").unwrap();
        let own: Vec<Named> = (0..150)
            .map(|number| {
                let socket = TcpListener::bind("127.0.0.1:0").unwrap();
                (Name { cookie: number / 3, address: socket.local_addr().unwrap() }, socket)
            })
            .collect();
        std::thread::scope(|scope| {
            let running = scope.spawn(|| {
                let first = offer.next().unwrap();
                first.prepare(&lock, &admin).expect_err("it went away");
                let second = offer.next().unwrap();
                second.prepare(&lock, &admin).unwrap();
                second.pass(&own).unwrap();
            });
            drop(Predecessor::ask(&dir).unwrap());
            let (predecessor, _, passed) = Predecessor::ask(&dir).unwrap();
            assert_eq!(passed.local_addr().unwrap(), admin.local_addr().unwrap());
            let mut inherited = predecessor.take().unwrap();
            assert_eq!(inherited.len(), 150);
            for (name, socket) in &own {
                let same = inherited.take(*name);
                assert_eq!(same.len(), 1, "{name:?}");
                assert_eq!(same[0].local_addr().unwrap(), socket.local_addr().unwrap());
            }
            assert!(inherited.is_empty());
            predecessor.serving().unwrap();
            running.join().unwrap();
        });
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
