//! Clients of many connections: one after another, or all at once.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{input_ends, say, word};

/// One exchange of 16 bytes on a new connection.
async fn exchange(to: SocketAddr, number: u64) -> io::Result<()> {
    let mut tcp = TcpStream::connect(to).await?;
    ping(&mut tcp, number).await
}

pub(super) async fn ping(tcp: &mut TcpStream, number: u64) -> io::Result<()> {
    let message = u128::from(number).to_be_bytes();
    tcp.write_all(&message).await?;
    let mut answer = [0; 16];
    tcp.read_exact(&mut answer).await?;
    if answer == message { Ok(()) } else { Err(ErrorKind::InvalidData.into()) }
}

pub(super) async fn many(to: SocketAddr, count: u64, lanes: u64) -> Value {
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

/// Opens connections all at once, with one exchange on each.
async fn open(to: SocketAddr, count: u64) -> (Vec<TcpStream>, BTreeMap<&'static str, u64>) {
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
    (open, outcomes)
}

/// How many of these still answer; the others are left out from now on.
async fn alive(open: &mut Vec<TcpStream>) -> usize {
    let mut number = 0;
    let mut left = Vec::new();
    for mut tcp in open.drain(..) {
        number += 1;
        if timeout(Duration::from_secs(10), ping(&mut tcp, number)).await.is_ok_and(|r| r.is_ok()) {
            left.push(tcp);
        }
    }
    *open = left;
    open.len()
}

pub(super) async fn keep(to: SocketAddr, count: u64) -> Result<()> {
    let (mut open, _) = open(to, count).await;
    println!("ready");
    let mut every = tokio::time::interval(Duration::from_millis(500));
    let mut end = std::pin::pin!(input_ends());
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = &mut end => return Ok(()),
        }
        let alive = alive(&mut open).await;
        say(json!({"alive": alive}))?;
        if alive == 0 {
            return Ok(());
        }
    }
}

pub(super) async fn hold(to: SocketAddr, count: u64, bytes: u64) -> Result<()> {
    let (mut open, outcomes) = open(to, count).await;
    if bytes > 0 {
        open = move_through(open, bytes).await?;
    }
    // Every one must still be usable while all are open.
    let alive = alive(&mut open).await;
    println!("ready");
    say(json!({"outcomes": outcomes, "ok": outcomes.get("ok").copied().unwrap_or(0), "alive": alive}))?;
    input_ends().await;
    Ok(())
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

pub(super) async fn push(to: SocketAddr, count: u64) -> Result<()> {
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

pub(super) async fn times(to: &[SocketAddr], count: u64, warm: Option<SocketAddr>) -> Result<Value> {
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

pub(super) async fn exchange_for(to: SocketAddr, seconds: u64) -> Value {
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
