//! Clients of one connection each, with exact socket behaviour.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;
use tokio::time::timeout;

use super::load::ping;
use super::pattern::{Hash, pattern};
use super::{canonical, say, word};

/// Sends so much of the pattern, in pieces, and then the end; its hash.
async fn send(write: &mut WriteHalf<'_>, bytes: u64, piece: usize) -> io::Result<u64> {
    let mut hash = Hash::default();
    let mut buffer = vec![0; piece];
    let mut at = 0;
    while at < bytes {
        let length = buffer.len().min((bytes - at) as usize);
        pattern(at, &mut buffer[..length]);
        hash.add(&buffer[..length]);
        write.write_all(&buffer[..length]).await?;
        at += length as u64;
    }
    write.shutdown().await?;
    Ok(hash.0)
}

pub(super) async fn bulk(to: SocketAddr, bytes: u64) -> Result<Value> {
    let began = Instant::now();
    let mut tcp = TcpStream::connect(to).await?;
    let (mut read, mut write) = tcp.split();
    let sending = async { send(&mut write, bytes, 256 * 1024).await };
    let receiving = async {
        let mut hash = Hash::default();
        let mut buffer = vec![0; 256 * 1024];
        let mut count = 0;
        loop {
            let length = read.read(&mut buffer).await?;
            if length == 0 {
                return Ok::<_, io::Error>((count, hash.0));
            }
            hash.add(&buffer[..length]);
            count += length as u64;
        }
    };
    let (sent, (received, hash)) = tokio::try_join!(sending, receiving)?;
    Ok(
        json!({"received": received, "same": sent == hash && received == bytes, "seconds": began.elapsed().as_secs_f64()}),
    )
}

pub(super) fn ask(
    to: SocketAddr,
    bind: Option<SocketAddr>,
    reuse: bool,
    nonblocking: bool,
    connect_twice: bool,
) -> Result<Value> {
    use std::io::Read;
    let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(reuse)?;
    if let Some(bind) = bind {
        socket.bind(&SockAddr::from(bind))?;
    }
    if nonblocking {
        socket.set_nonblocking(true)?;
    }
    let mut first = "connected";
    if let Err(e) = socket.connect(&SockAddr::from(to)) {
        if !nonblocking || e.raw_os_error() != Some(nix::libc::EINPROGRESS) {
            bail!("connect: {e}");
        }
        first = "in progress";
    }
    if connect_twice {
        // A program may ask again instead of polling: EALREADY, EISCONN or success.
        let again = socket.connect(&SockAddr::from(to));
        let code = again.err().and_then(|e| e.raw_os_error()).unwrap_or(0);
        if ![0, nix::libc::EALREADY, nix::libc::EISCONN].contains(&code) {
            bail!("the second connect: {code}");
        }
    }
    if nonblocking {
        let mut polled =
            [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&socket), nix::poll::PollFlags::POLLOUT)];
        nix::poll::poll(&mut polled, 5000u16)?;
        if let Some(error) = socket.take_error()? {
            bail!("connect: {error}");
        }
        socket.set_nonblocking(false)?;
    }
    let (peer, local) = (socket.peer_addr()?.as_socket(), socket.local_addr()?.as_socket());
    let mut text = String::new();
    (&socket).read_to_string(&mut text)?;
    let seen: Value = serde_json::from_str(&text).with_context(|| format!("the server said {text:?}"))?;
    Ok(json!({"connect": first, "peer": peer.map(canonical), "local": local.map(canonical), "server": seen}))
}

pub(super) async fn half_close(to: SocketAddr, bytes: u64) -> Result<Value> {
    let mut tcp = TcpStream::connect(to).await?;
    let (mut read, mut write) = tcp.split();
    let sent = send(&mut write, bytes, 64 * 1024).await?;
    let mut answer = String::new();
    read.read_to_string(&mut answer).await?;
    Ok(json!({"same": answer == format!("{bytes} {sent:x}"), "answer": answer}))
}

pub(super) async fn send_after_end(to: SocketAddr, bytes: u64) -> Result<Value> {
    let mut tcp = TcpStream::connect(to).await?;
    let mut text = String::new();
    let (mut read, mut write) = tcp.split();
    read.read_to_string(&mut text).await?;
    let buffer = vec![7; 64 * 1024];
    let mut left = bytes as usize;
    while left > 0 {
        let length = left.min(buffer.len());
        write.write_all(&buffer[..length]).await?;
        left -= length;
    }
    write.shutdown().await?;
    Ok(json!({"read": text, "sent": bytes}))
}

pub(super) async fn poke(to: SocketAddr) -> Value {
    let began = Instant::now();
    let told = |connect: &str, end: &str| json!({"connect": connect, "end": end, "ms": began.elapsed().as_millis() as u64});
    let mut tcp = match timeout(Duration::from_secs(10), TcpStream::connect(to)).await {
        Err(_) => return told("timeout", ""),
        Ok(Err(e)) => return told(word(&e), ""),
        Ok(Ok(tcp)) => tcp,
    };
    if let Err(e) = tcp.write_all(b"x").await {
        return told("ok", word(&e));
    }
    let mut byte = [0];
    match timeout(Duration::from_secs(20), tcp.read(&mut byte)).await {
        Err(_) => told("ok", "hang"),
        Ok(Err(e)) => told("ok", word(&e)),
        Ok(Ok(0)) => told("ok", "end"),
        Ok(Ok(_)) => told("ok", "data"),
    }
}

pub(super) async fn abort(to: SocketAddr) -> Result<Value> {
    let mut tcp = TcpStream::connect(to).await?;
    tcp.write_all(b"x").await?;
    tcp.read_u8().await?;
    SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
    drop(tcp);
    Ok(json!({"aborted": true}))
}

pub(super) async fn stay(to: SocketAddr) -> Result<()> {
    let mut tcp = TcpStream::connect(to).await?;
    ping(&mut tcp, 1).await?;
    println!("ready");
    let ended = match tcp.read_u8().await {
        Ok(_) => "data",
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => "end",
        Err(e) => word(&e),
    };
    say(json!({"ended": ended}))
}

pub(super) async fn chatty(to: SocketAddr, count: u64) -> Result<Value> {
    let mut tcp = TcpStream::connect(to).await?;
    tcp.set_nodelay(true)?;
    let (mut read, mut write) = tcp.split();
    let writing = async {
        for number in 0..count {
            write.write_all(&[number as u8]).await?;
            // Lets each byte leave in a packet of its own.
            if number % 8 == 0 {
                tokio::task::yield_now().await;
            }
        }
        write.shutdown().await
    };
    let reading = async {
        let mut answer = Vec::new();
        read.read_to_end(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let ((), answer) = tokio::try_join!(writing, reading)?;
    let same = answer.len() as u64 == count && answer.iter().enumerate().all(|(i, b)| *b == i as u8);
    Ok(json!({"received": answer.len(), "same": same}))
}

pub(super) async fn udp_ask(to: SocketAddr) -> Result<Value> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = tokio::net::UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    socket.send(b"ping").await?;
    let mut answer = [0; 16];
    let length = timeout(Duration::from_secs(2), socket.recv(&mut answer)).await??;
    Ok(json!({"answer": String::from_utf8_lossy(&answer[..length]), "peer": socket.peer_addr()?.to_string()}))
}
