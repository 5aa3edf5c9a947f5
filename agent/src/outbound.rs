//! The sending agent's way: accepted from the application, resolved, and on through the pool.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::net::{TcpListener, TcpStream};

use crate::hbone::client::Ask;
use crate::local::Passage;
use crate::pod::Pod;
use crate::pool::{Failure, Key};
use crate::relay::{self, Relayed};
use crate::shard::Shard;
use crate::telemetry::Finished;
use crate::verdict::{Direction, Encryption, Reason};

/// Accepts a pod's captured connections until the pod is gone or the agent drains.
pub async fn serve(shard: Shard, pod: Arc<Pod>, listener: TcpListener) {
    let Ok(local) = listener.local_addr() else { return };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = pod.gone.cancelled() => return,
            () = shard.draining() => return,
        };
        match accepted {
            Ok((app, source)) => {
                let (shard, pod) = (shard.clone(), Arc::clone(&pod));
                shard.clone().spawn(async move { connection(shard, pod, app, source, local.port()).await });
            }
            Err(error) => shard.accept_failed(local, &error).await,
        }
    }
}

/// One captured connection, from its original destination to its log line.
async fn connection(shard: Shard, pod: Arc<Pod>, app: TcpStream, source: SocketAddr, listener_port: u16) {
    let began = Instant::now();
    shard.observe.opened(Direction::Outbound);
    relay::tune(&app);
    let source = SocketAddr::new(source.ip().to_canonical(), source.port());
    let mut way = Way { destination: None, encryption: Encryption::None, key: None };
    let outcome = carry(&shard, &pod, &app, source, listener_port, &mut way).await;
    let (relayed, detail) = match outcome {
        Ok(relayed) => (relayed, "".into()),
        Err(failure) => {
            relay::reset(&app);
            (Relayed { from_app: 0, to_app: 0, reason: failure.reason }, failure.detail)
        }
    };
    // The application learns of the end before the log does.
    drop(app);
    let record = Finished {
        direction: Direction::Outbound,
        encryption: way.encryption,
        reason: relayed.reason,
        detail: &detail,
        source_id: Some(&pod.workload.id),
        source: Some(source),
        destination_id: way.key.as_ref().map(|key| &key.destination),
        destination: way.destination,
        sent_bytes: relayed.from_app,
        received_bytes: relayed.to_app,
        duration: began.elapsed(),
    };
    shard.observe.finished(&record, true);
}

/// How far a connection came, for its log line.
struct Way {
    destination: Option<SocketAddr>,
    encryption: Encryption,
    key: Option<Key>,
}

async fn carry(
    shard: &Shard,
    pod: &Pod,
    app: &TcpStream,
    source: SocketAddr,
    listener_port: u16,
    way: &mut Way,
) -> Result<Relayed, Failure> {
    let original = shard.capture.original_dst(source, listener_port).ok_or_else(|| Failure {
        reason: Reason::NoOriginalDestination,
        detail: "connected to the agent's own listener; it takes captured connections only".into(),
    })?;
    way.destination = Some(original);
    let destination = shard.directory.load().resolve(original, shard.turn()).map_err(|error| Failure {
        reason: match error {
            crate::directory::ResolveError::UnknownAddress => Reason::UnknownDestination,
            _ => Reason::NoEndpoint,
        },
        detail: format!("{original}: {error}").into(),
    })?;
    way.destination = Some(destination.address);
    let key = Key {
        source: pod.workload.id.clone(),
        destination: destination.workload.id.clone(),
        address: SocketAddr::new(destination.address.ip(), shard.tunnel.port),
    };
    let key = way.key.insert(key);
    if let Some(neighbour) = shard.pods.serving(&destination) {
        let passage = Passage { from: pod, to: &neighbour, app, source, destination: destination.address };
        passage.prove(shard).await?;
        way.encryption = Encryption::Local;
        return passage.carry(shard).await;
    }
    let ask = Ask { authority: destination.address, source };
    let stream = tokio::select! {
        opened = shard.pool.open(key, ask) => opened?,
        error = relay::failed(app) => return Err(Failure { reason: Reason::AppReset, detail: error.to_string().into() }),
    };
    way.encryption = Encryption::Mtls;
    Ok(relay::relay(app, stream, shard.stop(&pod.gone)).await)
}
