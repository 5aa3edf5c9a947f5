//! The relay between two applications' sockets, on loopback: bytes, ends, failures, what is held.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::io::ErrorKind;
use std::time::Duration;

use hauberk::relay::Relayed;
use hauberk::relay::splice::splice;
use hauberk::verdict::Reason;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Both applications' ends of a relayed connection, and the relay itself.
struct Scene {
    client: TcpStream,
    server: TcpStream,
    relay: JoinHandle<Relayed>,
    stop: oneshot::Sender<Reason>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (one, other) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (one, other) = (one.unwrap(), other.unwrap().0);
    one.set_nodelay(true).unwrap();
    other.set_nodelay(true).unwrap();
    (one, other)
}

async fn scene() -> Scene {
    let ((client, from), (server, to)) = (pair().await, pair().await);
    let (stop, stopped) = oneshot::channel();
    let relay = tokio::spawn(async move {
        let stopped = async {
            match stopped.await {
                Ok(reason) => reason,
                Err(_) => std::future::pending().await,
            }
        };
        splice(&from, &to, std::pin::pin!(stopped)).await
    });
    Scene { client, server, relay, stop }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), what).await.expect("it hangs")
}

/// Bytes that never repeat in step with a buffer.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ (at >> 8) ^ (at >> 17)) as u8).collect()
}

fn abort(socket: TcpStream) {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO)).unwrap();
}

/// The error that a socket's owner meets in the end, after whatever it still receives.
async fn ends_with(socket: &mut TcpStream) -> Option<ErrorKind> {
    soon(socket.read_to_end(&mut Vec::new())).await.err().map(|e| e.kind())
}

#[tokio::test]
async fn much_arrives_whole_both_ways_at_once() {
    let Scene { client, server, relay, stop } = scene().await;
    let _stop = stop;
    let (up, down) = (pattern(40_000_001), pattern(30_000_003));
    let exchange = |mut socket: TcpStream, bytes: Vec<u8>| async move {
        let (mut read, mut write) = socket.split();
        let mut received = Vec::new();
        let sending = async {
            write.write_all(&bytes).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(sending, read.read_to_end(&mut received));
        read.unwrap();
        received
    };
    let both = async { tokio::join!(exchange(client, up.clone()), exchange(server, down.clone())) };
    let (at_client, at_server) = soon(both).await;
    assert!(at_client == down && at_server == up, "the same bytes in the same order");
    let outcome = soon(relay).await.unwrap();
    assert_eq!(outcome, Relayed { from_app: 40_000_001, to_app: 30_000_003, reason: Reason::Done });
}

#[test]
fn any_pieces_in_any_order_arrive_as_they_were_sent() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // Sizes about the buffer's, the threshold's and the pipe's; some of the pieces go the other way.
    let size = prop_oneof![1usize..200, 16_000usize..17_000, 65_000usize..66_000, 200_000usize..400_000];
    let pieces = prop::collection::vec((size, any::<bool>()), 1..20);
    let config = ProptestConfig { cases: 64, ..ProptestConfig::default() };
    let mut runner = TestRunner::new(config);
    let outcome = runner.run(&pieces, |pieces| {
        runtime.block_on(async {
            let mut scene = scene().await;
            for (number, (length, back)) in pieces.iter().enumerate() {
                let bytes: Vec<u8> = pattern(*length).iter().map(|b| b.wrapping_add(number as u8)).collect();
                let (mut from, mut to) = (&mut scene.client, &mut scene.server);
                if *back {
                    std::mem::swap(&mut from, &mut to);
                }
                let mut received = vec![0; *length];
                let both = async { tokio::join!(from.write_all(&bytes), to.read_exact(&mut received)) };
                let (written, read) = soon(both).await;
                written.unwrap();
                read.unwrap();
                assert!(received == bytes, "piece {number} of {length} bytes");
            }
        });
        Ok(())
    });
    outcome.unwrap();
}

#[tokio::test]
async fn each_side_may_end_first_and_still_be_answered() {
    for client_first in [true, false] {
        let Scene { mut client, mut server, relay, stop } = scene().await;
        let _stop = stop;
        let (first, second) =
            if client_first { (&mut client, &mut server) } else { (&mut server, &mut client) };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        let mut question = String::new();
        soon(second.read_to_string(&mut question)).await.unwrap();
        assert_eq!(question, "question");
        tokio::time::sleep(Duration::from_millis(50)).await;
        second.write_all(&pattern(1_000_000)).await.unwrap();
        second.shutdown().await.unwrap();
        let mut answer = Vec::new();
        soon(first.read_to_end(&mut answer)).await.unwrap();
        assert!(answer == pattern(1_000_000), "client first: {client_first}");
        assert_eq!(soon(relay).await.unwrap().reason, Reason::Done);
    }
}

#[tokio::test]
async fn a_reset_is_a_reset_on_the_other_side_and_never_an_end() {
    for by_client in [true, false] {
        let Scene { client, server, relay, stop } = scene().await;
        let _stop = stop;
        let (one, mut other) = if by_client { (client, server) } else { (server, client) };
        abort(one);
        assert_eq!(ends_with(&mut other).await, Some(ErrorKind::ConnectionReset), "by client: {by_client}");
        let reason = if by_client { Reason::AppReset } else { Reason::PeerReset };
        assert_eq!(soon(relay).await.unwrap().reason, reason);
    }
}

#[tokio::test]
async fn what_came_before_a_reset_is_still_delivered() {
    let mut scene = scene().await;
    scene.client.write_all(b"last words").await.unwrap();
    abort(scene.client);
    let mut words = [0; 10];
    soon(scene.server.read_exact(&mut words)).await.unwrap();
    assert_eq!(&words, b"last words");
    assert_eq!(ends_with(&mut scene.server).await, Some(ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_reset_after_a_half_close_is_noticed_while_nothing_moves() {
    for by_client in [true, false] {
        let Scene { client, server, relay, stop } = scene().await;
        let _stop = stop;
        let (mut one, mut other) = if by_client { (client, server) } else { (server, client) };
        one.shutdown().await.unwrap();
        assert_eq!(soon(other.read(&mut [0])).await.unwrap(), 0, "the end arrives");
        abort(one);
        let reason = if by_client { Reason::AppReset } else { Reason::PeerReset };
        assert_eq!(soon(relay).await.unwrap().reason, reason, "by client: {by_client}");
        let failed = soon(async {
            loop {
                match other.write_all(&[0; 1000]).await {
                    Ok(()) => tokio::time::sleep(Duration::from_millis(5)).await,
                    Err(error) => return error.kind(),
                }
            }
        });
        assert!(matches!(failed.await, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe));
    }
}

/// Writes until nothing is taken any more.
async fn push(socket: &TcpStream) -> usize {
    let block = vec![7; 256 * 1024];
    let mut written = 0;
    while timeout(Duration::from_millis(500), socket.writable()).await.is_ok() {
        written += socket.try_write(&block).unwrap_or(0);
    }
    written
}

#[tokio::test]
async fn a_stalled_reader_pushes_back_and_a_reset_behind_it_is_noticed() {
    let Scene { client, mut server, relay, stop } = scene().await;
    let _stop = stop;
    // The sockets' own buffers are the kernel's to size; without them it is a pipe.
    let written = push(&client).await;
    assert!(written < 64 << 20, "the writer was pushed back after {written} bytes");
    // The other way is open meanwhile.
    let mut answer = [0; 6];
    server.write_all(b"answer").await.unwrap();
    let (mut read, write) = client.into_split();
    soon(read.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"answer");
    abort(read.reunite(write).unwrap());
    assert_eq!(soon(relay).await.unwrap().reason, Reason::AppReset);
    let end = soon(server.read_to_end(&mut Vec::new())).await;
    assert_eq!(end.unwrap_err().kind(), ErrorKind::ConnectionReset, "not all arrived, so it is no end");
}

#[tokio::test]
async fn a_stalled_reader_that_reads_on_gets_everything() {
    let Scene { client, mut server, relay, stop } = scene().await;
    let _stop = stop;
    let written = push(&client).await;
    drop(client);
    let mut all = Vec::new();
    soon(server.read_to_end(&mut all)).await.unwrap();
    assert_eq!(all.len(), written);
    drop(server);
    assert_eq!(soon(relay).await.unwrap().from_app, written as u64);
}

#[tokio::test]
async fn being_stopped_resets_both_sides() {
    let mut scene = scene().await;
    scene.client.write_all(b"x").await.unwrap();
    soon(scene.server.read_u8()).await.unwrap();
    scene.stop.send(Reason::Draining).unwrap();
    assert_eq!(ends_with(&mut scene.client).await, Some(ErrorKind::ConnectionReset));
    assert_eq!(ends_with(&mut scene.server).await, Some(ErrorKind::ConnectionReset));
    assert_eq!(soon(scene.relay).await.unwrap().reason, Reason::Draining);
}

#[tokio::test]
async fn urgent_data_in_the_midst_of_bulk_loses_nothing_else() {
    let Scene { client, mut server, relay, stop } = scene().await;
    let _stop = stop;
    let part = pattern(300_000);
    let sending = tokio::task::spawn_blocking(move || {
        let client = client.into_std().unwrap();
        client.set_nonblocking(false).unwrap();
        for round in 0..20 {
            std::io::Write::write_all(&mut &client, &part).unwrap();
            if round == 9 {
                SockRef::from(&client).send_out_of_band(b"!").unwrap();
            }
        }
    });
    let mut all = Vec::new();
    soon(server.read_to_end(&mut all)).await.unwrap();
    sending.await.unwrap();
    drop(server);
    // The urgent byte itself is outside the stream, as for any reader that does not ask for it.
    assert_eq!(all.len(), 20 * 300_000);
    assert!(all.chunks(300_000).all(|part| part == pattern(300_000)));
    assert_eq!(soon(relay).await.unwrap().reason, Reason::Done);
}

#[tokio::test]
async fn idle_connections_hold_no_descriptor_of_a_pipe() {
    let mut scenes = Vec::new();
    for _ in 0..50 {
        let mut scene = scene().await;
        let mut received = vec![0; 1 << 20];
        let block = pattern(1 << 20);
        let both =
            async { tokio::join!(scene.client.write_all(&block), scene.server.read_exact(&mut received)) };
        soon(both).await.0.unwrap();
        scenes.push(scene);
    }
    // Other tests of this process have descriptors of their own: only this thread's pipes are counted,
    // by what they are.
    let pipes = || {
        let all = std::fs::read_dir("/proc/self/fd").unwrap();
        all.filter(|fd| {
            let target = std::fs::read_link(fd.as_ref().unwrap().path());
            target.is_ok_and(|target| target.to_string_lossy().starts_with("pipe:"))
        })
        .count()
    };
    let open = pipes();
    assert!(open < 50, "{open} ends of pipes are open for 50 idle connections that have moved 1 MiB");
    for scene in scenes {
        let Scene { client, server, relay, stop } = scene;
        drop((client, server));
        soon(relay).await.unwrap();
        drop(stop);
    }
}
