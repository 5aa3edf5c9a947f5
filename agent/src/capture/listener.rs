//! The agent's listeners inside a pod, at the pod's own addresses.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::directory::Workload;
use crate::netns::Netns;

/// The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// One thread's listeners inside one pod.
#[derive(Debug)]
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

    /// Opens them. Several sets for one pod share the connections (`SO_REUSEPORT`).
    ///
    /// # Errors
    /// When the namespace cannot be entered, lacks one of the addresses, or a port is taken.
    pub fn open(netns: &Netns, workload: &Workload, ports: &[u16], tunnel_port: u16) -> io::Result<Self> {
        netns.enter(|| {
            let mut listeners = Self { outbound: Vec::new(), tunnel: Vec::new() };
            for address in &workload.addresses {
                for port in ports {
                    listeners.outbound.push(listen(*address, *port)?);
                }
                listeners.tunnel.push(listen(*address, tunnel_port)?);
            }
            Ok(listeners)
        })?
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
