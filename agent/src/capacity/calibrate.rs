//! Measures what this machine's cores do: handshakes, records, signatures, certificates.
//!
//! Everything runs in memory on one thread, with the agent's own code on both sides, and is counted in
//! that thread's CPU time: what else the machine does changes little. Each figure is the median of many
//! small batches. Handshakes are with a peer that is known: its chain was verified before. Proofs are of
//! an identity that is not.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::time::{ClockId, clock_gettime};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, HandshakeKind, ServerConfig, ServerConnection, SideData,
};

use super::calibration::{Calibration, Cpu, Handshake};
use super::{CapacityError, memory};
use crate::ca::{self, Ca, ProvenKey};
use crate::identity::svid::X509Svid;
use crate::identity::{SpiffeId, TrustDomain};
use crate::issue::Keypair;
use crate::proof::{Binding, Side, prove, verify};
use crate::telemetry::{Metrics, Observe};
use crate::tls::client::{self, Dial};
use crate::tls::memory::Memory;
use crate::tls::server::{self, Listener, Terms};
use crate::tls::verify::{Expected, PeerVerifier};
use crate::tls::{ALPN_H2, ticket};

/// The largest record's payload (RFC 8446, section 5.1).
pub const RECORD_BYTES: usize = 16 * 1024;
/// A batch is this many handshakes or signatures: long enough for the clock.
const BATCH: usize = 8;
/// However short the time, a median needs this many batches.
const FEWEST_BATCHES: usize = 7;
/// What is measured in turn; the calibration's time is shared between them.
const STAGES: u32 = 5;

/// Measures for about `budget`; `progress` is told what begins.
///
/// # Errors
/// When the machine gives no CPU clock, no randomness, or no loopback sockets.
pub fn calibrate(budget: Duration, progress: &mut dyn FnMut(&str)) -> Result<Calibration, CapacityError> {
    let share = budget / STAGES;
    let ends = Ends::new()?;
    // First, while the process has freed nothing that new connections would fill unseen.
    progress("memory of a connection");
    let memory = memory::measure(&ends)?;
    progress("full handshakes");
    let full = ends.pair(false)?.measure(share, HandshakeKind::Full)?;
    progress("resumed handshakes");
    let resuming = ends.pair(true)?;
    // The agent gives two.
    let ticket_bytes = (resuming.connect()?.2.wire_bytes - full.wire_bytes) / 2.0;
    let resumed = resuming.measure(share, HandshakeKind::Resumed)?;
    progress("records");
    let (seal, open) = ends.records(share)?;
    progress("signatures and verifications");
    let (prove_cpu_seconds, verify_cpu_seconds) = ends.proofs(share)?;
    progress("certificates");
    let (request_cpu_seconds, issue_cpu_seconds) = ends.issuance(share)?;
    let calibration = Calibration {
        cpu: Cpu::here(),
        full,
        resumed,
        seal_bytes_per_second: RECORD_BYTES as f64 / seal,
        open_bytes_per_second: RECORD_BYTES as f64 / open,
        prove_cpu_seconds,
        verify_cpu_seconds,
        request_cpu_seconds,
        issue_cpu_seconds,
        certificate_bytes: ends.client_svid.certified_key().cert.iter().map(|c| c.len()).sum::<usize>()
            as f64,
        key_bytes: ends.key_bytes as f64,
        ticket_bytes,
        tunnel_bytes: memory.tunnel_bytes,
        stream_bytes: memory.stream_bytes,
    };
    calibration.validate()?;
    Ok(calibration)
}

/// Two identities under one authority, and the agent's own configurations of both.
pub(super) struct Ends {
    ca: Ca,
    client_id: SpiffeId,
    client_svid: X509Svid,
    server_svid: X509Svid,
    key_bytes: usize,
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

const LIFETIME: Duration = Duration::from_secs(3600);

impl Ends {
    fn new() -> Result<Self, CapacityError> {
        let domain = TrustDomain::parse("cluster.local").map_err(failed)?;
        let now = SystemTime::now();
        let ca =
            Ca::from_pem(domain.clone(), &ca::create_root(&domain, now).map_err(failed)?).map_err(failed)?;
        let svid = |account: &str| -> Result<_, CapacityError> {
            let id = SpiffeId::workload(&domain, "capacity", account).map_err(failed)?;
            let key = Keypair::generate().map_err(failed)?;
            let proven = ProvenKey::from_csr(&key.csr().map_err(failed)?).map_err(failed)?;
            let chain = ca.issue(&proven, &id, LIFETIME, now).map_err(failed)?;
            Ok((id, key.with_chain(chain).map_err(failed)?))
        };
        let (client_id, client_svid) = svid("client")?;
        let (server_id, server_svid) = svid("server")?;
        let client = client::config(&client_svid, ca.bundle(), server_id).map_err(failed)?;
        let server = server::config(&server_svid, ca.bundle()).map_err(failed)?;
        let key_bytes = rcgen::KeyPair::generate().map_err(failed)?.serialize_der().len();
        Ok(Self { ca, client_id, client_svid, server_svid, key_bytes, client, server })
    }

    /// Both sides as two agents have them.
    fn pair(&self, resume: bool) -> Result<Pair, CapacityError> {
        let observe = Observe::new(Arc::new(Metrics::new().map_err(failed)?));
        let memory = Memory::new(resume.then(ticket::fleeting), observe);
        let roots = memory.roots(self.ca.bundle(), 1).map_err(failed)?;
        let terms = Terms {
            svid: &self.server_svid,
            roots: &roots,
            peers: Expected::Member,
            judge: None,
            alpn: &[ALPN_H2],
            place: &[b"capacity"],
            mode: "strict",
        };
        let listener = memory.listener(&terms).map_err(failed)?;
        let peer = Expected::Exactly(self.server_svid.id().clone());
        let dial = memory.dial(&self.client_svid, &roots, peer, &[ALPN_H2], None).map_err(failed)?;
        Ok(Pair { dial, listener })
    }

    /// Seconds to seal and to open a full record.
    fn records(&self, budget: Duration) -> Result<(f64, f64), CapacityError> {
        let (mut client, mut server, _) = self.pair(false)?.connect()?;
        let payload = vec![7; RECORD_BYTES];
        let mut got = vec![0; RECORD_BYTES];
        let mut wire = Vec::with_capacity(2 * RECORD_BYTES);
        medians(budget, 64 * BATCH, || {
            wire.clear();
            let (sealed, seal) =
                timed(|| client.writer().write_all(&payload).and_then(|()| send(&mut client, &mut wire)));
            sealed.map_err(failed)?;
            let (opened, open) =
                timed(|| receive(&mut server, &wire).and_then(|()| server.reader().read_exact(&mut got)));
            opened.map_err(failed)?;
            Ok([seal?, open?])
        })
        .map(|[seal, open]| (seal, open))
    }

    /// Seconds to prove an identity, and to verify the proof.
    fn proofs(&self, budget: Duration) -> Result<(f64, f64), CapacityError> {
        let node = |name| SpiffeId::node(self.ca.domain(), name).map_err(failed);
        let binding = Binding { exporter: [7; 32], client: node("one")?, server: node("two")? };
        medians(budget, BATCH, || {
            // One that has verified nothing yet.
            let verifier = PeerVerifier::new(self.ca.bundle(), None).map_err(failed)?;
            let (header, proving) = timed(|| prove(&self.client_svid, &binding, Side::Client));
            let header = header.map_err(failed)?;
            let (proven, verifying) =
                timed(|| verify(header.as_bytes(), &binding, Side::Client, &verifier, UnixTime::now()));
            proven.map_err(failed)?;
            Ok([proving?, verifying?])
        })
        .map(|[proving, verifying]| (proving, verifying))
    }

    /// Seconds to ask for an SVID, and to issue it.
    fn issuance(&self, budget: Duration) -> Result<(f64, f64), CapacityError> {
        medians(budget, BATCH, || {
            let (csr, request) = timed(|| Keypair::generate().and_then(|key| key.csr()));
            let csr = csr.map_err(failed)?;
            let (issued, issue) = timed(|| {
                let key = ProvenKey::from_csr(&csr)?;
                self.ca.issue(&key, &self.client_id, LIFETIME, SystemTime::now())
            });
            issued.map_err(failed)?;
            Ok([request?, issue?])
        })
        .map(|[request, issue]| (request, issue))
    }
}

/// Both sides of handshakes in memory.
struct Pair {
    dial: Arc<Dial>,
    listener: Arc<Listener>,
}

impl Pair {
    /// The median handshake; each must be of this kind.
    fn measure(&self, budget: Duration, kind: HandshakeKind) -> Result<Handshake, CapacityError> {
        let mut wire_bytes = 0.0;
        let [client_cpu_seconds, server_cpu_seconds] = medians(budget, BATCH, || {
            let (client, _, cost) = self.connect()?;
            if client.handshake_kind() != Some(kind) {
                return Err(failed(format!("a handshake was {:?}, not {kind:?}", client.handshake_kind())));
            }
            wire_bytes = cost.wire_bytes;
            Ok([cost.client_cpu_seconds, cost.server_cpu_seconds])
        })?;
        Ok(Handshake { client_cpu_seconds, server_cpu_seconds, wire_bytes })
    }

    /// One handshake, and what it cost.
    fn connect(&self) -> Result<(ClientConnection, ServerConnection, Handshake), CapacityError> {
        let name = ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
        let (mut client, mut client_cpu_seconds) = timed_ok(|| {
            ClientConnection::new(Arc::clone(self.dial.config()), name).map_err(io::Error::other)
        })?;
        let ((mut server, judged), mut server_cpu_seconds) = timed_ok(|| {
            let (config, judged) = self.listener.accept();
            Ok((ServerConnection::new(config).map_err(io::Error::other)?, judged))
        })?;
        let (mut wire, mut wire_bytes) = (Vec::with_capacity(RECORD_BYTES), 0);
        while client.wants_write() || server.wants_write() {
            wire.clear();
            client_cpu_seconds += timed_ok(|| send(&mut client, &mut wire))?.1;
            wire_bytes += wire.len();
            server_cpu_seconds += timed_ok(|| receive(&mut server, &wire))?.1;
            wire.clear();
            server_cpu_seconds += timed_ok(|| send(&mut server, &mut wire))?.1;
            wire_bytes += wire.len();
            client_cpu_seconds += timed_ok(|| receive(&mut client, &wire))?.1;
        }
        if client.is_handshaking() || server.is_handshaking() {
            return Err(failed("a handshake in memory did not come to its end"));
        }
        let settle = || judged.settle(server.handshake_kind(), server.peer_certificates());
        server_cpu_seconds += timed_ok(|| settle().map_err(io::Error::other))?.1;
        let settle = || self.dial.settle(client.handshake_kind(), client.peer_certificates());
        client_cpu_seconds += timed_ok(|| settle().map_err(io::Error::other))?.1;
        let cost = Handshake { client_cpu_seconds, server_cpu_seconds, wire_bytes: wire_bytes as f64 };
        Ok((client, server, cost))
    }
}

fn send<S: SideData>(from: &mut ConnectionCommon<S>, wire: &mut Vec<u8>) -> io::Result<()> {
    while from.wants_write() {
        from.write_tls(wire)?;
    }
    Ok(())
}

fn receive<S: SideData>(to: &mut ConnectionCommon<S>, mut wire: &[u8]) -> io::Result<()> {
    while !wire.is_empty() {
        to.read_tls(&mut wire)?;
        to.process_new_packets().map_err(io::Error::other)?;
    }
    Ok(())
}

/// Medians over batches of the two times that `once` returns; runs for about `budget`.
fn medians(
    budget: Duration,
    batch: usize,
    mut once: impl FnMut() -> Result<[f64; 2], CapacityError>,
) -> Result<[f64; 2], CapacityError> {
    let began = Instant::now();
    let mut means: [Vec<f64>; 2] = Default::default();
    // The first batch fills caches and is forgotten.
    for round in 0.. {
        if round > FEWEST_BATCHES && began.elapsed() >= budget {
            break;
        }
        let mut sums = [0.0; 2];
        for _ in 0..batch {
            let [a, b] = once()?;
            sums = [sums[0] + a, sums[1] + b];
        }
        if round > 0 {
            means[0].push(sums[0] / batch as f64);
            means[1].push(sums[1] / batch as f64);
        }
    }
    Ok(means.map(|mut of| {
        of.sort_by(f64::total_cmp);
        of[of.len() / 2]
    }))
}

/// What `work` returns, and its seconds of this thread's CPU time.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Result<f64, CapacityError>) {
    let began = thread_cpu();
    let done = work();
    let took = began.and_then(|began| Ok((thread_cpu()? - began).as_secs_f64()));
    (done, took)
}

fn timed_ok<T>(work: impl FnOnce() -> io::Result<T>) -> Result<(T, f64), CapacityError> {
    let (done, took) = timed(work);
    Ok((done.map_err(failed)?, took?))
}

/// The CPU time this thread has used.
///
/// # Errors
/// When the kernel has no such clock.
pub fn thread_cpu() -> Result<Duration, CapacityError> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).map_err(failed)
}

pub(super) fn failed(error: impl std::fmt::Display) -> CapacityError {
    CapacityError::Calibrate(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_handshake_is_cheaper_than_a_full_one() {
        let found = calibrate(Duration::from_millis(400), &mut |_| ()).unwrap();
        assert!(
            found.resumed.cpu_seconds() < found.full.cpu_seconds(),
            "CPU: {:?} resumed, {:?} full",
            found.resumed,
            found.full
        );
        assert!(found.full.wire_bytes > 2.0 * found.certificate_bytes, "both chains travel in a full one");
        assert!(found.verify_cpu_seconds > found.prove_cpu_seconds, "verifying is two verifications");
    }
}
