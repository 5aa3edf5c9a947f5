//! Measures an agent's memory for a pooled connection and for a stream: real ones, over loopback,
//! and what the process's resident memory grows by.
//!
//! The kernel's socket buffers are not in it; idle they are small.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};

use super::CapacityError;
use super::calibrate::{Ends, failed};
use crate::hbone::client::{Ask, Tunnel};
use crate::hbone::{Recv, server};
use crate::tls::handshake;

/// Connections and streams that the growth is divided by: many, as memory is counted in pages.
const TUNNELS: usize = 192;
const STREAMS: usize = 3000;
/// Made first and not counted: they fill what the allocator has lying about.
const WARM_UP: usize = 16;
/// The default of `tunnel.streamWindow`; an idle stream holds nothing of it.
const WINDOW: u32 = 8 << 20;

/// An agent's memory, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// For its end of an idle pooled connection.
    pub tunnel_bytes: f64,
    /// For its end of an idle stream.
    pub stream_bytes: f64,
}

/// Opens connections and streams to itself and measures the growth, on a thread of its own: the
/// caller's may have a runtime already.
pub(super) fn measure(ends: &Ends) -> Result<Memory, CapacityError> {
    std::thread::scope(|scope| scope.spawn(|| run(ends)).join())
        .unwrap_or_else(|_| Err(failed("measuring memory was cut off")))
}

fn run(ends: &Ends) -> Result<Memory, CapacityError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        tokio::spawn(accept(listener, Arc::clone(&ends.server)));
        let mut tunnels = Vec::with_capacity(WARM_UP + TUNNELS);
        let mut before = 0;
        for made in 0..WARM_UP + TUNNELS {
            if made == WARM_UP {
                before = resident()?;
            }
            let tcp = TcpStream::connect(address).await.map_err(failed)?;
            let name = ServerName::IpAddress(address.ip().into());
            let connecting = handshake::connect(Arc::clone(&ends.client), name, tcp);
            let established = connecting.await.map_err(failed)?;
            let (tunnel, driver) = Tunnel::start(established.stream, WINDOW).await.map_err(failed)?;
            tokio::spawn(driver);
            tunnels.push(tunnel);
        }
        // Both ends are in this process.
        let tunnel_bytes = growth(before)? / (2 * TUNNELS) as f64;
        let tunnel = tunnels.first().ok_or_else(|| failed("no connection was made"))?;
        let before = resident()?;
        let mut streams = Vec::with_capacity(STREAMS);
        for _ in 0..STREAMS {
            let stream =
                tunnel.place().open(Ask { authority: address, source: address }, None).map_err(failed)?;
            if let Recv::Pending(response, _) = stream.recv {
                streams.push((stream.send, response.await.map_err(failed)?));
            }
        }
        let stream_bytes = growth(before)? / (2 * STREAMS) as f64;
        Ok(Memory { tunnel_bytes, stream_bytes })
    })
}

/// Accepts everything and holds it open.
async fn accept(listener: TcpListener, config: Arc<ServerConfig>) {
    while let Ok((tcp, _)) = listener.accept().await {
        let config = Arc::clone(&config);
        tokio::spawn(async move {
            let Ok(established) = handshake::accept(config, tcp).await else { return };
            let Ok(mut connection) = server::start(established.stream, WINDOW, 2 * STREAMS as u32).await
            else {
                return;
            };
            let mut open = Vec::new();
            while let Some(Ok((request, respond))) = connection.accept().await {
                if let Ok(send) = server::accept(respond) {
                    open.push((send, request.into_body()));
                }
            }
        });
    }
}

/// Growth since `before`, at least a byte: a process that reuses freed memory grows by nothing.
fn growth(before: u64) -> Result<f64, CapacityError> {
    Ok(resident()?.saturating_sub(before).max(1) as f64)
}

/// This process's resident memory (proc(5), statm).
fn resident() -> Result<u64, CapacityError> {
    let text = std::fs::read_to_string("/proc/self/statm").map_err(failed)?;
    let pages: Option<u64> = text.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).map_err(failed)?;
    match (pages, page.and_then(|page| u64::try_from(page).ok())) {
        (Some(pages), Some(page)) => Ok(pages.saturating_mul(page)),
        _ => Err(failed("/proc/self/statm does not say the resident memory")),
    }
}
