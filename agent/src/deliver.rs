//! Opens a connection to a local application, from inside its pod and from the pod's own address,
//! and makes the application see the true client.
//!
//! The kernel side rewrites what `accept()` and `getpeername()` report (see `capture`); it finds
//! the true client by the source port that is chosen here and announced before `connect()`.

mod ports;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::capture::Capture;
use crate::netns::Netns;
use ports::Ports;

/// An application whose accept queue is full answers late, as it would without us. This bounds it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Sockets made at once: entering the pod's namespace is a good part of a socket's price.
const BATCH: usize = 8;
/// Ports tried before giving up.
const ATTEMPTS: usize = 64;

/// Delivers to one pod.
#[derive(Debug)]
pub struct Deliver {
    netns: Arc<Netns>,
    capture: Arc<Capture>,
    ports: Ports,
    /// Unused sockets, IPv4 and IPv6.
    stash: [Mutex<Vec<Socket>>; 2],
}

/// A connection to an application.
#[derive(Debug)]
pub struct Delivered {
    // Dropped before the socket, so that the port cannot be another connection's by then.
    announced: Announced,
    /// The agent's end.
    pub app: TcpStream,
}

impl Delivered {
    /// Says that the application has answered: the kernel side has used the announcement then, and
    /// nothing is left to take back.
    pub fn answered(&mut self) {
        self.announced.used = true;
    }
}

impl Deliver {
    /// Delivers into this namespace.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn new(netns: Arc<Netns>, capture: Arc<Capture>) -> io::Result<Self> {
        let range = netns.enter(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range"))?;
        Ok(Self {
            netns,
            capture,
            ports: Ports::outside(&range.unwrap_or_default()),
            stash: Default::default(),
        })
    }

    /// Makes the sockets for the first connections to this address beforehand. What cannot be made now is made
    /// when it is needed, or fails then.
    pub fn prepare(&self, ip: IpAddr) {
        if let Ok(socket) = self.socket(ip) {
            self.stash(ip).push(socket);
        }
    }

    /// Connects to the application at `app`, on behalf of `client`.
    ///
    /// # Errors
    /// What `connect()` says: refused, timed out; or no free port.
    pub async fn connect(&self, app: SocketAddr, client: SocketAddr) -> io::Result<Delivered> {
        for attempt in 0..ATTEMPTS {
            let port = self.ports.next(attempt);
            let socket = self.socket(app.ip())?;
            let announced = match self.begin(&socket, port, app, client) {
                Ok(announced) => announced,
                Err(e) if matches!(e.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable) => {
                    continue;
                }
                Err(e) => return Err(e),
            };
            let connected = is_connected(&socket, app)?;
            let stream = TcpStream::from_std(socket.into())?;
            if !connected {
                timeout(CONNECT_TIMEOUT, stream.writable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
                if let Some(error) = stream.take_error()? {
                    return Err(error);
                }
            }
            return Ok(Delivered { announced, app: stream });
        }
        Err(io::Error::new(io::ErrorKind::AddrNotAvailable, "no free source port in the pod"))
    }

    /// Binds, announces and begins to connect.
    fn begin(
        &self,
        socket: &Socket,
        port: u16,
        app: SocketAddr,
        client: SocketAddr,
    ) -> io::Result<Announced> {
        socket.bind(&SockAddr::from(SocketAddr::new(app.ip(), port)))?;
        self.capture
            .announce(app.ip(), port, app.port(), client)
            .map_err(|e| io::Error::other(e.to_string()))?;
        let announced = Announced {
            capture: Arc::clone(&self.capture),
            pod: app.ip(),
            port,
            app_port: app.port(),
            used: false,
        };
        match socket.connect(&SockAddr::from(app)) {
            Err(e) if e.raw_os_error() != Some(nix::libc::EINPROGRESS) => Err(e),
            _ => Ok(announced),
        }
    }

    /// Unused sockets of the address's family.
    fn stash(&self, ip: IpAddr) -> MutexGuard<'_, Vec<Socket>> {
        // A stash holds whole sockets at every instant.
        self.stash[usize::from(ip.is_ipv6())].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A socket made inside the pod.
    fn socket(&self, ip: IpAddr) -> io::Result<Socket> {
        if let Some(socket) = self.stash(ip).pop() {
            return Ok(socket);
        }
        let domain = if ip.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 };
        // Not under the lock: a thread that finds the stash empty too fills it itself rather than wait.
        let batch: io::Result<Vec<Socket>> =
            self.netns.enter(|| (0..BATCH).map(|_| make(domain)).collect())?;
        let mut batch = batch?;
        let socket = batch.pop();
        self.stash(ip).append(&mut batch);
        socket.ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }
}

/// Whether a connect that has begun is done. In a pod's own namespace it usually is when `connect()`
/// returns, as loopback carries the whole handshake within that call; then no timer is armed and no
/// event waited for. Asking is `connect()` once more (connect(2): EALREADY while it goes on).
///
/// # Errors
/// Why it failed.
fn is_connected(socket: &Socket, app: SocketAddr) -> io::Result<bool> {
    match socket.connect(&SockAddr::from(app)) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(nix::libc::EISCONN) => Ok(true),
        Err(e) if e.raw_os_error() == Some(nix::libc::EALREADY) => Ok(false),
        Err(e) => Err(e),
    }
}

fn make(domain: Domain) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    // The port may be one that another connection of ours uses towards another application port.
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A row that tells the kernel side who the client is; taken back when this is dropped.
#[derive(Debug)]
struct Announced {
    capture: Arc<Capture>,
    pod: IpAddr,
    port: u16,
    app_port: u16,
    used: bool,
}

impl Drop for Announced {
    fn drop(&mut self) {
        if self.used {
            return;
        }
        self.capture.retract(self.pod, self.port, self.app_port);
    }
}
