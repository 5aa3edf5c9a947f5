//! What one machine does: the figures that [`super::calibrate`] measures and a report keeps.

use serde::{Deserialize, Serialize};

use super::CapacityError;
use crate::tls::provider::aes_in_hardware;

/// What a handshake costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Handshake {
    /// CPU time of the dialling side.
    pub client_cpu_seconds: f64,
    /// CPU time of the accepting side.
    pub server_cpu_seconds: f64,
    /// TLS bytes of both sides, tickets included, TCP and IP headers not.
    pub wire_bytes: f64,
}

impl Handshake {
    /// CPU time of both sides.
    pub fn cpu_seconds(&self) -> f64 {
        self.client_cpu_seconds + self.server_cpu_seconds
    }
}

/// What the CPU offers to AES.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// As the kernel calls it.
    pub model: String,
    /// Cores, hyper-threads counted.
    pub cores: u64,
    /// AES instructions, without which TLS costs several times as much.
    pub aes: bool,
    /// AVX2; never on other architectures than x86-64.
    pub avx: bool,
    /// AES on wide vectors (VAES); never on other architectures than x86-64.
    pub vaes: bool,
}

impl Cpu {
    /// This machine's.
    pub(super) fn here() -> Self {
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let model = model.map_or("unknown", |(_, name)| name.trim()).to_owned();
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        #[cfg(target_arch = "x86_64")]
        let (avx, vaes) =
            (std::arch::is_x86_feature_detected!("avx2"), std::arch::is_x86_feature_detected!("vaes"));
        #[cfg(not(target_arch = "x86_64"))]
        let (avx, vaes) = (false, false);
        Self { model, cores, aes: aes_in_hardware(), avx, vaes }
    }
}

/// What one machine does, measured. Seconds are CPU time on one core.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// The machine.
    pub cpu: Cpu,
    /// A full mutual handshake with P-256 SVIDs.
    pub full: Handshake,
    /// A resumed one (RFC 8446, section 2.2) that takes and gives a ticket.
    pub resumed: Handshake,
    /// Payload that a core seals into TLS records in a second.
    pub seal_bytes_per_second: f64,
    /// Payload that a core opens from TLS records in a second.
    pub open_bytes_per_second: f64,
    /// Proving an identity: one signature.
    pub prove_cpu_seconds: f64,
    /// Verifying such a proof: the chain and the signature.
    pub verify_cpu_seconds: f64,
    /// Asking for an SVID: a new key, a signed request.
    pub request_cpu_seconds: f64,
    /// Issuing it: the request's signature, a new certificate.
    pub issue_cpu_seconds: f64,
    /// An SVID's chain, DER.
    pub certificate_bytes: f64,
    /// Its private key, PKCS#8 DER.
    pub key_bytes: f64,
    /// A session ticket on the wire; a full handshake that may be resumed has two.
    pub ticket_bytes: f64,
    /// An agent's memory for its end of an idle pooled connection.
    pub tunnel_bytes: f64,
    /// An agent's memory for its end of an idle stream.
    pub stream_bytes: f64,
}

impl Calibration {
    /// The threads that an agent starts on this machine.
    pub fn threads(&self) -> u64 {
        self.cpu.cores.clamp(1, 8)
    }

    /// CPU time to seal a byte at one end and open it at the other.
    pub fn byte_cpu_seconds(&self) -> f64 {
        self.seal_bytes_per_second.recip() + self.open_bytes_per_second.recip()
    }

    /// Refuses what no machine does.
    ///
    /// # Errors
    /// When a figure is not a positive number.
    pub fn validate(&self) -> Result<(), CapacityError> {
        let figures = [
            ("full.client_cpu_seconds", self.full.client_cpu_seconds),
            ("full.server_cpu_seconds", self.full.server_cpu_seconds),
            ("full.wire_bytes", self.full.wire_bytes),
            ("resumed.client_cpu_seconds", self.resumed.client_cpu_seconds),
            ("resumed.server_cpu_seconds", self.resumed.server_cpu_seconds),
            ("resumed.wire_bytes", self.resumed.wire_bytes),
            ("seal_bytes_per_second", self.seal_bytes_per_second),
            ("open_bytes_per_second", self.open_bytes_per_second),
            ("prove_cpu_seconds", self.prove_cpu_seconds),
            ("verify_cpu_seconds", self.verify_cpu_seconds),
            ("request_cpu_seconds", self.request_cpu_seconds),
            ("issue_cpu_seconds", self.issue_cpu_seconds),
            ("certificate_bytes", self.certificate_bytes),
            ("key_bytes", self.key_bytes),
            ("ticket_bytes", self.ticket_bytes),
            ("tunnel_bytes", self.tunnel_bytes),
            ("stream_bytes", self.stream_bytes),
        ];
        for (field, value) in figures {
            if !(1e-15..=1e15).contains(&value) {
                let message = "a calibration holds positive numbers; calibrate again";
                return Err(CapacityError::Invalid { field, value: value.to_string(), message });
            }
        }
        Ok(())
    }
}
