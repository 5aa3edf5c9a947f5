//! The program that runs in pods: clients and servers with exact socket behaviour.
//!
//! Servers print `ready` once they listen, then one JSON line for each event; clients print one JSON
//! line with what happened. Servers end when their standard input does.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Sends back what it gets, half-closes when its peer does.
    Echo { listen: Vec<SocketAddr> },
    /// Speaks first, then echoes.
    Greet { listen: SocketAddr },
    /// Tells each client the address it sees: by accept() and by getpeername().
    Whoami { listen: Vec<SocketAddr> },
    /// Reads to the end, then answers with count and checksum.
    Sum { listen: SocketAddr },
    /// Says something, ends its side, then reads to the end and prints how much.
    EndFirst { listen: SocketAddr },
    /// Reads one byte, then resets.
    Reset { listen: SocketAddr },
    /// Reads, and prints how the connection ended.
    Watch { listen: SocketAddr },
    /// Accepts and never reads.
    Stall { listen: SocketAddr },
    /// Sends and receives this many bytes at once through an echo server, and compares.
    Bulk { to: SocketAddr, bytes: u64 },
    /// Connects to a whoami server; options as a real program would set them.
    Ask {
        to: SocketAddr,
        #[arg(long)]
        bind: Option<SocketAddr>,
        #[arg(long)]
        reuse: bool,
        #[arg(long)]
        nonblocking: bool,
        #[arg(long)]
        connect_twice: bool,
    },
    /// Sends, ends its side, and reads the answer (of a sum server).
    HalfClose { to: SocketAddr, bytes: u64 },
    /// Reads to the end, then sends this many bytes (to an end-first server).
    SendAfterEnd { to: SocketAddr, bytes: u64 },
    /// Connects, sends one byte, and says how it ended.
    Poke { to: SocketAddr },
    /// Connects, sends one byte, waits for it to come back, and resets.
    Abort { to: SocketAddr },
    /// Connections one after another in parallel lanes, each with one exchange.
    Many { to: SocketAddr, count: u64, lanes: u64 },
    /// Connections all open at once, each with one exchange; held until standard input ends.
    Hold {
        to: SocketAddr,
        count: u64,
        /// Sends so much through each, and reads it back, once all are open.
        #[arg(long, default_value_t = 0)]
        bytes: u64,
    },
    /// One exchange, then stays until the connection ends, and prints how it did.
    Stay { to: SocketAddr },
    /// Writes until the peer pushes back for a second; prints how much, holds until input ends.
    Push {
        to: SocketAddr,
        /// So many connections; the second passes without progress on any.
        #[arg(long, default_value_t = 1)]
        count: u64,
    },
    /// Exchanges on a new connection each, one after another; how many microseconds each took.
    Times {
        /// Where: the first gets all its exchanges before the second.
        to: Vec<SocketAddr>,
        /// So many with each.
        #[arg(long, default_value_t = 1)]
        count: u64,
        /// Some unmeasured ones with this server before, so that the first measured one finds a
        /// client that has run before.
        #[arg(long)]
        warm: Option<SocketAddr>,
    },
    /// One-byte writes without delay, through an echo server.
    Chatty { to: SocketAddr, count: u64 },
    /// Exchanges for this long on one connection at a time; counts what fails.
    Loop { to: SocketAddr, seconds: u64 },
    /// Sends a UDP datagram and waits for it to come back.
    UdpAsk { to: SocketAddr },
    /// Sends UDP datagrams back.
    UdpEcho { listen: SocketAddr },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    // Holding tens of thousands of connections needs as many descriptors.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, 200_000, 200_000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(act(cli.act))
}

async fn act(act: Act) -> Result<()> {
    match act {
        Act::Echo { listen } => serve(&listen, echo).await,
        Act::Greet { listen } => serve(&[listen], greet).await,
        Act::Whoami { listen } => serve(&listen, whoami).await,
        Act::Sum { listen } => serve(&[listen], sum).await,
        Act::EndFirst { listen } => serve(&[listen], end_first).await,
        Act::Reset { listen } => serve(&[listen], reset).await,
        Act::Watch { listen } => serve(&[listen], watch).await,
        Act::Stall { listen } => serve(&[listen], stall).await,
        Act::Bulk { to, bytes } => say(bulk(to, bytes).await?),
        Act::Ask { to, bind, reuse, nonblocking, connect_twice } => {
            say(ask(to, bind, reuse, nonblocking, connect_twice)?)
        }
        Act::HalfClose { to, bytes } => say(half_close(to, bytes).await?),
        Act::SendAfterEnd { to, bytes } => say(send_after_end(to, bytes).await?),
        Act::Poke { to } => say(poke(to).await),
        Act::Abort { to } => say(abort(to).await?),
        Act::Many { to, count, lanes } => say(many(to, count, lanes).await),
        Act::Hold { to, count, bytes } => hold(to, count, bytes).await,
        Act::Push { to, count } => push(to, count).await,
        Act::Times { to, count, warm } => say(times(&to, count, warm).await?),
        Act::Stay { to } => stay(to).await,
        Act::Chatty { to, count } => say(chatty(to, count).await?),
        Act::Loop { to, seconds } => say(exchange_for(to, seconds).await),
        Act::UdpAsk { to } => say(udp_ask(to).await?),
        Act::UdpEcho { listen } => udp_echo(listen).await,
    }
}

fn say(value: Value) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

/// Returns when standard input ends.
async fn input_ends() {
    let (told, ended) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        let _ = told.send(());
    });
    let _ = ended.await;
}

async fn serve<F>(listen: &[SocketAddr], each: fn(TcpStream, SocketAddr) -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    for address in listen {
        let domain = if address.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(*address)).with_context(|| address.to_string())?;
        socket.listen(4096)?;
        let listener = TcpListener::from_std(socket.into())?;
        tokio::spawn(async move {
            while let Ok((tcp, peer)) = listener.accept().await {
                // A connection's own troubles are its client's to report.
                tokio::spawn(each(tcp, peer));
            }
        });
    }
    println!("ready");
    io::stdout().flush()?;
    input_ends().await;
    Ok(())
}

async fn echo(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    tcp.set_nodelay(true)?;
    let (mut read, mut write) = tcp.split();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let length = read.read(&mut buffer).await?;
        if length == 0 {
            return Ok(write.shutdown().await?);
        }
        write.write_all(&buffer[..length]).await?;
    }
}

async fn greet(mut tcp: TcpStream, peer: SocketAddr) -> Result<()> {
    tcp.write_all(b"220 welcome\r\n").await?;
    echo(tcp, peer).await
}

async fn whoami(mut tcp: TcpStream, accepted: SocketAddr) -> Result<()> {
    let line = json!({"accept": canonical(accepted), "getpeername": canonical(tcp.peer_addr()?), "local": canonical(tcp.local_addr()?)});
    Ok(tcp.write_all(line.to_string().as_bytes()).await?)
}

/// An IPv4-mapped address as the IPv4 address it means.
fn canonical(address: SocketAddr) -> String {
    SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
}

async fn sum(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    let (mut count, mut hash) = (0u64, Hash::default());
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = tcp.read(&mut buffer).await?;
        if length == 0 {
            break;
        }
        count += length as u64;
        hash.add(&buffer[..length]);
    }
    tcp.write_all(format!("{count} {:x}", hash.0).as_bytes()).await?;
    Ok(tcp.shutdown().await?)
}

async fn end_first(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    tcp.write_all(b"the end").await?;
    tcp.shutdown().await?;
    let mut buffer = vec![0; 64 * 1024];
    let mut count = 0u64;
    let ended = loop {
        match tcp.read(&mut buffer).await {
            Ok(0) => break "end",
            Ok(length) => count += length as u64,
            Err(_) => break "reset",
        }
    };
    say(json!({"received": count, "ended": ended}))
}

async fn reset(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    tcp.read_u8().await?;
    SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
    Ok(())
}

async fn watch(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    let mut buffer = vec![0; 4096];
    loop {
        match tcp.read(&mut buffer).await {
            Ok(0) => return say(json!({"ended": "end"})),
            Ok(length) => tcp.write_all(&buffer[..length]).await?,
            Err(e) => return say(json!({"ended": word(&e)})),
        }
    }
}

async fn stall(tcp: TcpStream, _: SocketAddr) -> Result<()> {
    std::future::pending::<()>().await;
    drop(tcp);
    Ok(())
}

/// What a program sees of an error.
fn word(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ConnectionReset => "reset",
        ErrorKind::ConnectionRefused => "refused",
        ErrorKind::TimedOut => "timeout",
        ErrorKind::BrokenPipe => "broken pipe",
        ErrorKind::AddrNotAvailable => "no port",
        ErrorKind::PermissionDenied => "not permitted",
        ErrorKind::ConnectionAborted => "aborted",
        _ => "other",
    }
}

/// FNV-1a, eight bytes at a time where there are eight; the same for the same bytes in any pieces.
#[derive(Clone, Copy)]
struct Hash(u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// Bytes that never repeat in step with any buffer.
fn pattern(at: u64, buffer: &mut [u8]) {
    for (offset, byte) in buffer.iter_mut().enumerate() {
        let position = at + offset as u64;
        *byte = (position ^ (position >> 8) ^ (position >> 19)) as u8;
    }
}

async fn bulk(to: SocketAddr, bytes: u64) -> Result<Value> {
    let began = Instant::now();
    let mut tcp = TcpStream::connect(to).await?;
    let (mut read, mut write) = tcp.split();
    let sending = async {
        let mut hash = Hash::default();
        let mut buffer = vec![0; 256 * 1024];
        let mut at = 0;
        while at < bytes {
            let length = buffer.len().min((bytes - at) as usize);
            pattern(at, &mut buffer[..length]);
            hash.add(&buffer[..length]);
            write.write_all(&buffer[..length]).await?;
            at += length as u64;
        }
        write.shutdown().await?;
        Ok::<_, io::Error>(hash.0)
    };
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

fn ask(
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

async fn half_close(to: SocketAddr, bytes: u64) -> Result<Value> {
    let mut tcp = TcpStream::connect(to).await?;
    let (mut read, mut write) = tcp.split();
    let mut hash = Hash::default();
    let mut buffer = vec![0; 64 * 1024];
    let mut at = 0;
    while at < bytes {
        let length = buffer.len().min((bytes - at) as usize);
        pattern(at, &mut buffer[..length]);
        hash.add(&buffer[..length]);
        write.write_all(&buffer[..length]).await?;
        at += length as u64;
    }
    write.shutdown().await?;
    let mut answer = String::new();
    read.read_to_string(&mut answer).await?;
    Ok(json!({"same": answer == format!("{bytes} {:x}", hash.0), "answer": answer}))
}

async fn send_after_end(to: SocketAddr, bytes: u64) -> Result<Value> {
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

async fn poke(to: SocketAddr) -> Value {
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

async fn abort(to: SocketAddr) -> Result<Value> {
    let mut tcp = TcpStream::connect(to).await?;
    tcp.write_all(b"x").await?;
    tcp.read_u8().await?;
    SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
    drop(tcp);
    Ok(json!({"aborted": true}))
}

/// One exchange of 16 bytes on a new connection.
async fn exchange(to: SocketAddr, number: u64) -> io::Result<()> {
    let mut tcp = TcpStream::connect(to).await?;
    ping(&mut tcp, number).await
}

async fn ping(tcp: &mut TcpStream, number: u64) -> io::Result<()> {
    let message = u128::from(number).to_be_bytes();
    tcp.write_all(&message).await?;
    let mut answer = [0; 16];
    tcp.read_exact(&mut answer).await?;
    if answer == message { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
}

async fn many(to: SocketAddr, count: u64, lanes: u64) -> Value {
    let began = Instant::now();
    let next = Arc::new(AtomicU64::new(0));
    let mut running = Vec::new();
    for _ in 0..lanes {
        let next = Arc::clone(&next);
        running.push(tokio::spawn(async move {
            let mut outcomes: BTreeMap<&'static str, u64> = BTreeMap::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return outcomes;
                }
                let outcome = timeout(Duration::from_secs(30), exchange(to, number)).await;
                let name = match outcome {
                    Ok(Ok(())) => "ok",
                    Ok(Err(e)) => word(&e),
                    Err(_) => "hang",
                };
                *outcomes.entry(name).or_default() += 1;
            }
        }));
    }
    let mut all: BTreeMap<&'static str, u64> = BTreeMap::new();
    for lane in running {
        for (name, number) in lane.await.unwrap_or_default() {
            *all.entry(name).or_default() += number;
        }
    }
    json!({"outcomes": all, "ok": all.get("ok").copied().unwrap_or(0), "seconds": began.elapsed().as_secs_f64()})
}

async fn hold(to: SocketAddr, count: u64, bytes: u64) -> Result<()> {
    let mut open = Vec::new();
    let mut outcomes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut batch = tokio::task::JoinSet::new();
    for number in 0..count {
        batch.spawn(async move {
            let connected = async {
                let mut tcp = TcpStream::connect(to).await?;
                ping(&mut tcp, number).await?;
                Ok::<_, io::Error>(tcp)
            };
            timeout(Duration::from_secs(60), connected)
                .await
                .unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
        });
        // As many at once as a backlog has room for.
        while batch.len() >= 2000 || (number + 1 == count && !batch.is_empty()) {
            match batch.join_next().await {
                Some(Ok(Ok(tcp))) => {
                    *outcomes.entry("ok").or_default() += 1;
                    open.push(tcp);
                }
                Some(Ok(Err(e))) => *outcomes.entry(word(&e)).or_default() += 1,
                Some(Err(_)) | None => {}
            }
        }
    }
    if bytes > 0 {
        open = move_through(open, bytes).await?;
    }
    // Every one must still be usable while all are open.
    let mut alive = 0;
    for (number, tcp) in open.iter_mut().enumerate() {
        if timeout(Duration::from_secs(10), ping(tcp, number as u64)).await.is_ok_and(|r| r.is_ok()) {
            alive += 1;
        }
    }
    println!("ready");
    say(json!({"outcomes": outcomes, "ok": outcomes.get("ok").copied().unwrap_or(0), "alive": alive}))?;
    input_ends().await;
    Ok(())
}

async fn stay(to: SocketAddr) -> Result<()> {
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

/// Moves bytes through every connection and back, on some at a time; an echo server answers.
async fn move_through(open: Vec<TcpStream>, bytes: u64) -> Result<Vec<TcpStream>> {
    let mut waiting = open.into_iter();
    let mut moved = Vec::new();
    let mut batch = tokio::task::JoinSet::new();
    loop {
        while batch.len() < 64 {
            let Some(mut tcp) = waiting.next() else { break };
            batch.spawn(async move {
                let (mut read, mut write) = tcp.split();
                let chunk = vec![3; bytes as usize];
                let mut back = vec![0; bytes as usize];
                tokio::try_join!(write.write_all(&chunk), read.read_exact(&mut back))?;
                Ok::<_, io::Error>(tcp)
            });
        }
        match batch.join_next().await {
            Some(done) => moved.push(done??),
            None => return Ok(moved),
        }
    }
}

async fn push(to: SocketAddr, count: u64) -> Result<()> {
    let written = Arc::new(AtomicU64::new(0));
    let (enough, stopped) = tokio::sync::watch::channel(false);
    let mut pushing = tokio::task::JoinSet::new();
    for _ in 0..count {
        let mut tcp = TcpStream::connect(to).await?;
        let (written, mut stopped) = (Arc::clone(&written), stopped.clone());
        pushing.spawn(async move {
            let chunk = vec![1; 64 * 1024];
            loop {
                tokio::select! {
                    length = tcp.write(&chunk) => written.fetch_add(length? as u64, Ordering::Relaxed),
                    _ = stopped.changed() => return Ok::<_, io::Error>(tcp),
                };
            }
        });
    }
    // Nobody pushes back who takes more than all that a machine has room for.
    let most = (4 << 30) + count * (16 << 20);
    let (mut before, mut progress) = (0, Instant::now());
    while progress.elapsed() < Duration::from_secs(1) && before < most {
        // None may end: a connection that was closed is not one that pushes back.
        if let Ok(Some(ended)) = timeout(Duration::from_millis(20), pushing.join_next()).await {
            drop(ended??);
        }
        let now = written.load(Ordering::Relaxed);
        if now != before {
            (before, progress) = (now, Instant::now());
        }
    }
    enough.send(true)?;
    let mut open = Vec::new();
    while let Some(pushed) = pushing.join_next().await {
        open.push(pushed??);
    }
    println!("ready");
    say(json!({"written": written.load(Ordering::Relaxed)}))?;
    input_ends().await;
    Ok(())
}

async fn times(to: &[SocketAddr], count: u64, warm: Option<SocketAddr>) -> Result<Value> {
    if let Some(warm) = warm {
        for number in 0..20 {
            exchange(warm, number).await.with_context(|| warm.to_string())?;
        }
    }
    let mut all = Vec::new();
    for to in to {
        let mut micros = Vec::new();
        for number in 0..count {
            let began = Instant::now();
            exchange(*to, number).await.with_context(|| to.to_string())?;
            micros.push(began.elapsed().as_nanos() as f64 / 1e3);
        }
        all.push(micros);
    }
    Ok(json!({"us": all}))
}

async fn chatty(to: SocketAddr, count: u64) -> Result<Value> {
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

async fn exchange_for(to: SocketAddr, seconds: u64) -> Value {
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut outcomes: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut number = 0;
    while Instant::now() < until {
        number += 1;
        let name = match timeout(Duration::from_secs(5), exchange(to, number)).await {
            Ok(Ok(())) => "ok",
            Ok(Err(e)) => word(&e),
            Err(_) => "hang",
        };
        *outcomes.entry(name).or_default() += 1;
        if name != "ok" {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    json!({"outcomes": outcomes, "ok": outcomes.get("ok").copied().unwrap_or(0), "all": number})
}

async fn udp_ask(to: SocketAddr) -> Result<Value> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = tokio::net::UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    socket.send(b"ping").await?;
    let mut answer = [0; 16];
    let length = timeout(Duration::from_secs(2), socket.recv(&mut answer)).await??;
    Ok(json!({"answer": String::from_utf8_lossy(&answer[..length]), "peer": socket.peer_addr()?.to_string()}))
}

async fn udp_echo(listen: SocketAddr) -> Result<()> {
    let socket = tokio::net::UdpSocket::bind(listen).await?;
    println!("ready");
    io::stdout().flush()?;
    let echoing = async {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let _ = socket.send_to(&buffer[..length], from).await;
        }
    };
    tokio::select! {
        () = echoing => {}
        () = input_ends() => {}
    }
    Ok(())
}
