//! Ends connections that began before their pod was captured (sock_diag(7), `SOCK_DESTROY`).
//!
//! They would go on in plaintext for as long as they last. Their applications get ECONNABORTED and
//! connect again, captured now.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use socket2::{Domain, Socket, Type};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

// include/uapi/linux/{netlink,sock_diag,inet_diag}.h
const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const IPPROTO_TCP: u8 = 6;
const AF_NETLINK: i32 = 16;
/// Every state in which bytes can still come or go: established, SYN-sent, SYN-received, FIN-wait-1
/// and -2, close-wait, last-ACK, closing.
const LIVE_STATES: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SocketId {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    source: [u8; 16],
    destination: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Request {
    header: Header,
    family: u8,
    protocol: u8,
    extensions: u8,
    padding: u8,
    states: u32,
    id: SocketId,
}

/// The beginning of `struct inet_diag_msg`.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Answer {
    family: u8,
    _state: u8,
    _timer: u8,
    _retransmits: u8,
    id: SocketId,
}

/// One TCP connection of the calling thread's network namespace.
#[derive(Clone, Copy)]
pub(super) struct Connection {
    family: u8,
    id: SocketId,
}

impl Connection {
    pub(super) fn local(&self) -> (IpAddr, u16) {
        (address(self.family, self.id.source), u16::from_be_bytes(self.id.source_port))
    }

    pub(super) fn remote(&self) -> (IpAddr, u16) {
        (address(self.family, self.id.destination), u16::from_be_bytes(self.id.destination_port))
    }
}

fn address(family: u8, bytes: [u8; 16]) -> IpAddr {
    if i32::from(family) == nix::libc::AF_INET {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    } else {
        IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
    }
}

/// Ends the connections of the calling thread's network namespace that `which` picks; says how many.
pub(super) fn destroy(which: impl Fn(&Connection) -> bool) -> io::Result<usize> {
    let socket = Socket::new(Domain::from(AF_NETLINK), Type::RAW.cloexec(), Some(NETLINK_SOCK_DIAG.into()))?;
    // Answers come from the kernel at once; a missing one must not hold up an enrolment.
    socket.set_read_timeout(Some(std::time::Duration::from_secs(2)))?;
    let mut ended = 0;
    let mut failure = None;
    for family in [nix::libc::AF_INET as u8, nix::libc::AF_INET6 as u8] {
        for connection in list(&socket, family)?.iter().filter(|c| which(c)) {
            let request = request(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, connection.family, connection.id);
            socket.send(request.as_bytes())?;
            match acknowledged(&socket) {
                Ok(()) => ended += 1,
                // It ended by itself meanwhile.
                Err(e) if e.raw_os_error() == Some(nix::libc::ENOENT) => {}
                // The others must end all the same.
                Err(e) => failure = Some(e),
            }
        }
    }
    failure.map_or(Ok(ended), Err)
}

fn request(kind: u16, flags: u16, family: u8, id: SocketId) -> Request {
    let length = size_of::<Request>() as u32;
    let header = Header { length, kind, flags, sequence: 1, port: 0 };
    Request { header, family, protocol: IPPROTO_TCP, extensions: 0, padding: 0, states: LIVE_STATES, id }
}

fn list(socket: &Socket, family: u8) -> io::Result<Vec<Connection>> {
    socket.send(
        request(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, SocketId::new_zeroed()).as_bytes(),
    )?;
    let mut found = Vec::new();
    loop {
        let datagram = receive(socket)?;
        let mut rest = datagram.as_slice();
        while let Some((header, body, after)) = message(rest) {
            match header.kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => error(body)?,
                _ => {
                    if let Ok((answer, _)) = Answer::read_from_prefix(body) {
                        found.push(Connection { family: answer.family, id: answer.id });
                    }
                }
            }
            rest = after;
        }
    }
}

fn acknowledged(socket: &Socket) -> io::Result<()> {
    let datagram = receive(socket)?;
    match message(&datagram) {
        Some((header, body, _)) if header.kind == NLMSG_ERROR => error(body),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// An error message's code; 0 acknowledges.
fn error(body: &[u8]) -> io::Result<()> {
    match i32::read_from_prefix(body) {
        Ok((0, _)) => Ok(()),
        Ok((code, _)) => Err(io::Error::from_raw_os_error(-code)),
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn receive(socket: &Socket) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let mut buffer = vec![0; 32 * 1024];
    let mut reader = socket;
    let length = reader.read(&mut buffer)?;
    buffer.truncate(length);
    Ok(buffer)
}

/// Splits the first message off: header, body, what follows.
fn message(bytes: &[u8]) -> Option<(Header, &[u8], &[u8])> {
    let (header, _) = Header::read_from_prefix(bytes).ok()?;
    let length = header.length as usize;
    let body = bytes.get(size_of::<Header>()..length)?;
    let after = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((header, body, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn no_datagram_makes_the_parser_panic_or_run_for_ever(bytes: Vec<u8>) {
            let mut rest = bytes.as_slice();
            while let Some((_, _, after)) = message(rest) {
                assert!(after.len() < rest.len());
                rest = after;
            }
        }
    }
}
