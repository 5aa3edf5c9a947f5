//! The agent's listeners inside a pod, at the pod's own addresses.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::directory::Workload;
use crate::handover::{Inherited, Name};
use crate::netns::Netns;

/// The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// One thread's listeners inside one pod.
#[derive(Debug, Default)]
pub struct Listeners {
    /// Where captured connections arrive.
    pub outbound: Vec<TcpListener>,
    /// Where tunnels from peers arrive.
    pub tunnel: Vec<TcpListener>,
}

impl Listeners {
    /// Opens one outside any pod, in the namespace of the calling thread.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn at(address: SocketAddr) -> io::Result<TcpListener> {
        listen(address.ip(), address.port())
    }

    /// Makes a set for each of so many threads, which share the connections (`SO_REUSEPORT`): of
    /// inherited sockets, and of new ones where there are too few.
    ///
    /// # Errors
    /// When the namespace cannot be entered, lacks one of the addresses, or a port is taken.
    pub fn open(
        netns: &Netns,
        workload: &Workload,
        (ports, tunnel_port): (&[u16], u16),
        threads: usize,
        inherited: &mut Inherited,
    ) -> io::Result<Vec<Self>> {
        let mut sets: Vec<Self> = (0..threads).map(|_| Self::default()).collect();
        for address in &workload.addresses {
            for port in ports.iter().copied().chain([tunnel_port]) {
                let name = Name { cookie: netns.cookie(), address: SocketAddr::new(*address, port) };
                let mut sockets = inherited.take(name);
                if sockets.len() < threads {
                    let missing = sockets.len()..threads;
                    let new: io::Result<Vec<_>> =
                        netns.enter(|| missing.map(|_| listen(*address, port)).collect())?;
                    sockets.extend(new?);
                }
                // An inherited one that is dropped would take connections with it that wait there.
                for (number, socket) in sockets.into_iter().enumerate() {
                    let set = &mut sets[number % threads];
                    let kind = if port == tunnel_port { &mut set.tunnel } else { &mut set.outbound };
                    kind.push(socket);
                }
            }
        }
        Ok(sets)
    }

    /// Second handles of all its sockets, which a successor can be given.
    ///
    /// # Errors
    /// When the system has no more descriptors.
    pub fn handles(&self) -> io::Result<Vec<TcpListener>> {
        self.outbound.iter().chain(&self.tunnel).map(TcpListener::try_clone).collect()
    }
}

fn listen(ip: IpAddr, port: u16) -> io::Result<TcpListener> {
    let address = SocketAddr::new(ip, port);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{address}: {e}"));
    let domain = if ip.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(domain, kind, Some(Protocol::TCP)).map_err(named)?;
    if ip.is_ipv6() {
        socket.set_only_v6(true).map_err(named)?;
    }
    socket.set_reuse_address(true).map_err(named)?;
    socket.set_reuse_port(true).map_err(named)?;
    // An address whose duplicate detection still runs can be listened at, not used yet.
    socket.set_freebind_v4(true).or_else(|_| socket.set_freebind_v6(true)).map_err(named)?;
    socket.bind(&SockAddr::from(address)).map_err(named)?;
    // Accepted sockets inherit it: one system call less for each connection.
    socket.set_tcp_nodelay(true).map_err(named)?;
    socket.listen(BACKLOG).map_err(named)?;
    Ok(socket.into())
}
