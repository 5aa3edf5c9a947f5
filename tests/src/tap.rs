//! Listens to a wire: every TCP byte that crossed it, and what it was.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::libc;
use nix::net::if_::if_nametoindex;
use socket2::{Domain, SockAddr, SockAddrStorage, Socket, Type};

use crate::host::Host;

/// HBONE's port.
const TUNNEL: u16 = 15008;
/// The authority's port: TLS too, but not the data path's.
const AUTHORITY: u16 = 15012;

/// A packet socket on an interface, read by a thread.
#[derive(Debug)]
pub struct Tap {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Flows>>,
}

/// One direction of a connection.
type Flow = (SocketAddr, SocketAddr);

#[derive(Debug, Default)]
struct Flows {
    /// Payload by position in the stream, relative to the first sequence number seen.
    streams: BTreeMap<Flow, Stream>,
}

#[derive(Debug, Default)]
struct Stream {
    first: Option<u32>,
    bytes: Vec<u8>,
    /// What came ahead of a gap.
    ahead: BTreeMap<u32, Vec<u8>>,
}

/// What crossed the wire.
#[derive(Debug, Default, Clone)]
pub struct Seen {
    /// TLS records on the tunnel's port.
    pub tls_records: u64,
    /// Their bytes, with headers.
    pub tls_bytes: u64,
    /// Server hellos that chose TLS 1.3, and those that did not.
    pub tls13_hellos: u64,
    /// Server hellos that chose anything else.
    pub other_hellos: u64,
    /// Payload bytes on the tunnel's port that are no TLS.
    pub not_tls_bytes: u64,
    /// Payload bytes on any other port, except the authority's.
    pub plaintext_bytes: u64,
    /// Connections that carried such bytes.
    pub plaintext_flows: Vec<String>,
    all: Vec<Vec<u8>>,
}

impl Seen {
    /// Whether these bytes went over the wire as they are.
    pub fn contains(&self, secret: &[u8]) -> bool {
        self.all.iter().any(|stream| stream.windows(secret.len()).any(|window| window == secret))
    }
}

impl Tap {
    pub(crate) fn start(host: &Host, interface: &str) -> Result<Self> {
        let interface = interface.to_owned();
        let socket = host.inside(move || packet_socket(&interface))??;
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || listen(socket, &told));
        Ok(Self { stop, thread })
    }

    /// Stops, and says what was seen.
    ///
    /// # Errors
    /// When packets were lost: then nothing can be said.
    pub fn finish(self) -> Result<Seen> {
        // What was sent just now may still be in a queue.
        std::thread::sleep(Duration::from_millis(100));
        self.stop.store(true, Ordering::Relaxed);
        let flows = self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok(flows.judge())
    }
}

fn packet_socket(interface: &str) -> Result<Socket> {
    let index = if_nametoindex(interface).with_context(|| format!("interface {interface}"))?;
    let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW.cloexec(), Some(protocol.into()))?;
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: sockaddr_ll fits into the storage, and every field that the kernel reads is set.
    let address = unsafe {
        let link = storage.view_as::<libc::sockaddr_ll>();
        link.sll_family = libc::AF_PACKET as u16;
        link.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        link.sll_ifindex = i32::try_from(index)?;
        SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    socket.bind(&address)?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(512 << 20))?;
    socket.set_read_timeout(Some(Duration::from_millis(50)))?;
    Ok(socket)
}

fn listen(socket: Socket, stop: &AtomicBool) -> Result<Flows> {
    let mut flows = Flows::default();
    let mut packet = vec![0; 256 * 1024];
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        match (&socket).read(&mut packet) {
            Ok(length) => {
                flows.take(&packet[..length]);
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) && stopping => {
                break;
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    let lost = lost(&socket)?;
    ensure!(lost == 0, "the capture lost {lost} packets, so it proves nothing");
    Ok(flows)
}

/// Packets that the socket had no room for.
fn lost(socket: &Socket) -> Result<u32> {
    const PACKET_STATISTICS: libc::c_int = 6;
    let mut statistics = [0u32; 2];
    let mut length = size_of_val(&statistics) as libc::socklen_t;
    // SAFETY: value and length are ours and of the size that is told.
    let outcome = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_STATISTICS,
            statistics.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    ensure!(outcome == 0, "PACKET_STATISTICS: {}", io::Error::last_os_error());
    Ok(statistics[1])
}

impl Flows {
    /// Takes an Ethernet frame; what is not TCP over IP is none of this tap's business.
    fn take(&mut self, frame: &[u8]) -> Option<()> {
        let ip = frame.get(14..)?;
        let (source, destination, tcp) = match ip.first()? >> 4 {
            4 => {
                let header = usize::from(ip[0] & 15) * 4;
                let total = usize::from(u16::from_be_bytes([*ip.get(2)?, *ip.get(3)?]));
                // Segmentation offload leaves 0 for more than 64 KiB.
                let end = if total == 0 { ip.len() } else { total };
                let address = |at: usize| {
                    Some(IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?)))
                };
                (*ip.get(9)? == 6).then_some(())?;
                (address(12)?, address(16)?, ip.get(header..end)?)
            }
            6 => {
                let address = |at: usize| {
                    Some(IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?)))
                };
                let length = usize::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]));
                // A jumbogram has a hop-by-hop header before TCP.
                let (next, at) = if *ip.get(6)? == 0 { (*ip.get(40)?, 48) } else { (*ip.get(6)?, 40) };
                (next == 6).then_some(())?;
                let end = if length == 0 { ip.len() } else { 40 + length };
                (address(8)?, address(24)?, ip.get(at..end)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
        let sequence = u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?);
        let payload = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
        let flow = (SocketAddr::new(source, port(0)?), SocketAddr::new(destination, port(2)?));
        let syn = tcp.get(13)? & 2 != 0;
        self.streams.entry(flow).or_default().add(sequence.wrapping_add(u32::from(syn)), syn, payload);
        Some(())
    }

    fn judge(self) -> Seen {
        let mut seen = Seen::default();
        for ((source, destination), stream) in self.streams {
            let ports = [source.port(), destination.port()];
            let ahead: usize = stream.ahead.values().map(Vec::len).sum();
            if ports.contains(&TUNNEL) {
                seen.records(&stream.bytes);
                seen.not_tls_bytes += ahead as u64;
            } else if !ports.contains(&AUTHORITY) && stream.bytes.len() + ahead > 0 {
                seen.plaintext_bytes += (stream.bytes.len() + ahead) as u64;
                seen.plaintext_flows.push(format!("{source} -> {destination}: {} bytes", stream.bytes.len()));
            }
            seen.all.push(stream.bytes);
        }
        seen
    }
}

impl Stream {
    /// Puts a segment where it belongs; what was there already is a retransmission.
    fn add(&mut self, sequence: u32, syn: bool, payload: &[u8]) {
        if syn {
            // A new connection on the same ports.
            *self = Self { first: Some(sequence), bytes: std::mem::take(&mut self.bytes), ..Self::default() };
            self.first = Some(sequence.wrapping_sub(self.bytes.len() as u32));
        }
        if payload.is_empty() {
            return;
        }
        let first = *self.first.get_or_insert(sequence);
        self.ahead.insert(sequence.wrapping_sub(first), payload.to_vec());
        while let Some((&at, _)) = self.ahead.first_key_value() {
            let have = self.bytes.len() as u32;
            if at.wrapping_sub(have) < 1 << 31 && at != have {
                return;
            }
            if let Some((at, part)) = self.ahead.pop_first() {
                let known = have.wrapping_sub(at) as usize;
                self.bytes.extend_from_slice(part.get(known..).unwrap_or_default());
            }
        }
    }
}

impl Seen {
    /// Cuts a stream into TLS records (RFC 8446, section 5.1).
    fn records(&mut self, mut bytes: &[u8]) {
        while let [kind, 3, minor @ (1 | 3), high, low, rest @ ..] = bytes {
            let length = usize::from(u16::from_be_bytes([*high, *low]));
            if !(20..=23).contains(kind) || length > 16_384 + 256 {
                break;
            }
            let _ = minor;
            // The last record may have been cut off by a reset.
            let body = &rest[..length.min(rest.len())];
            self.tls_records += 1;
            self.tls_bytes += 5 + body.len() as u64;
            if *kind == 22 && body.first() == Some(&2) {
                self.hello(body);
            }
            bytes = &rest[length.min(rest.len())..];
        }
        self.not_tls_bytes += bytes.len() as u64;
    }

    /// A server hello says TLS 1.3 in its supported_versions extension (RFC 8446, section 4.2.1).
    fn hello(&mut self, body: &[u8]) {
        match body.windows(6).any(|window| window == [0, 43, 0, 2, 3, 4]) {
            true => self.tls13_hellos += 1,
            false => self.other_hellos += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_out_of_order_and_twice_make_one_stream() {
        let mut stream = Stream::default();
        stream.add(100, true, b"");
        stream.add(103, false, b"def");
        stream.add(100, false, b"abc");
        stream.add(100, false, b"abc");
        stream.add(105, false, b"fgh");
        assert_eq!(stream.bytes, b"abcdefgh");
    }

    #[test]
    fn plaintext_on_the_tunnels_port_is_not_mistaken_for_tls() {
        let mut seen = Seen::default();
        seen.records(b"\x17\x03\x03\x00\x02xyGET / HTTP/1.1");
        assert_eq!((seen.tls_records, seen.tls_bytes, seen.not_tls_bytes), (1, 7, 14));
    }
}
