//! The program that runs in pods: clients and servers with exact socket behaviour.
//!
//! Servers print `ready` once they listen, then one JSON line for each event; clients print one JSON
//! line with what happened. Servers end when their standard input does.

mod clients;
mod load;
mod pattern;
mod servers;

use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use clients::{abort, ask, bulk, chatty, half_close, poke, send_after_end, stay, udp_ask};
use load::{exchange_for, hold, keep, many, push, times};
use serde_json::Value;
use servers::{echo, end_first, greet, reset, stall, sum, udp_echo, watch, whoami};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

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
    /// Connections all open at once; says twice a second how many of them still answer.
    Keep { to: SocketAddr, count: u64 },
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
        Act::Keep { to, count } => keep(to, count).await,
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

/// An IPv4-mapped address as the IPv4 address it means.
fn canonical(address: SocketAddr) -> String {
    SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
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
