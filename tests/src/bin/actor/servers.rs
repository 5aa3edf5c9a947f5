//! Servers: what each does with a connection.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::pattern::Hash;
use super::{canonical, input_ends, say, word};

pub(super) async fn echo(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
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

pub(super) async fn greet(mut tcp: TcpStream, peer: SocketAddr) -> Result<()> {
    tcp.write_all(b"220 welcome\r\n").await?;
    echo(tcp, peer).await
}

pub(super) async fn whoami(mut tcp: TcpStream, accepted: SocketAddr) -> Result<()> {
    let line = json!({"accept": canonical(accepted), "getpeername": canonical(tcp.peer_addr()?), "local": canonical(tcp.local_addr()?)});
    Ok(tcp.write_all(line.to_string().as_bytes()).await?)
}

pub(super) async fn sum(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
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

pub(super) async fn end_first(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
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

pub(super) async fn reset(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    tcp.read_u8().await?;
    SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
    Ok(())
}

pub(super) async fn watch(mut tcp: TcpStream, _: SocketAddr) -> Result<()> {
    let mut buffer = vec![0; 4096];
    loop {
        match tcp.read(&mut buffer).await {
            Ok(0) => return say(json!({"ended": "end"})),
            Ok(length) => tcp.write_all(&buffer[..length]).await?,
            Err(e) => return say(json!({"ended": word(&e)})),
        }
    }
}

pub(super) async fn stall(tcp: TcpStream, _: SocketAddr) -> Result<()> {
    std::future::pending::<()>().await;
    drop(tcp);
    Ok(())
}

pub(super) async fn udp_echo(listen: SocketAddr) -> Result<()> {
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
