//! One structured line for each finished connection, and for verdicts reached in the kernel.
//!
//! All lines have the target `access`, so that they can be filtered or sent elsewhere.

use std::fmt::Display;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ebpf::Event;

use super::Finished;
use crate::verdict::Verdict;

/// Kernel events written per second; a scan of all ports must not drown the log.
const EVENTS_PER_SECOND: u32 = 20;

/// `-` for what is not known.
fn known<T: Display>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// Writes a connection's line: `info` when it was carried, `warn` when it was not.
pub fn write(record: &Finished<'_>) {
    macro_rules! line {
        ($level:ident) => {
            tracing::$level!(
                target: "access",
                direction = record.direction.as_str(),
                verdict = record.reason.verdict().as_str(),
                reason = record.reason.as_str(),
                // Left out where there is none.
                policy = record.policy,
                encryption = record.encryption.as_str(),
                source_id = known(record.source_id),
                source = known(record.source),
                destination_id = known(record.destination_id),
                destination = known(record.destination),
                sent_bytes = record.sent_bytes,
                received_bytes = record.received_bytes,
                duration_ms = record.duration.as_millis() as u64,
                detail = record.detail,
                "connection"
            )
        };
    }
    match record.reason.verdict() {
        Verdict::Allowed => line!(info),
        Verdict::Denied | Verdict::Failed => line!(warn),
    }
}

/// Writes lines for the kernel side's verdicts, so many a second and no more.
#[derive(Debug)]
pub struct KernelLog {
    window: Instant,
    written: u32,
    suppressed: u64,
}

impl KernelLog {
    /// Nothing written yet.
    pub fn new(now: Instant) -> Self {
        Self { window: now, written: 0, suppressed: 0 }
    }

    /// Writes an event's line, unless there were too many this second.
    pub fn write(&mut self, event: &Event, now: Instant) {
        if now.duration_since(self.window) >= Duration::from_secs(1) {
            if self.suppressed > 0 {
                tracing::warn!(target: "access", suppressed = self.suppressed, "more verdicts of the kernel side were not written; the metrics count them");
            }
            *self = Self::new(now);
        }
        if self.written >= EVENTS_PER_SECOND {
            self.suppressed += 1;
            return;
        }
        self.written += 1;
        let address = |addr, port| format!("{} port {port}", IpAddr::from(addr).to_canonical());
        let (verdict, words) = words(event.verdict);
        tracing::warn!(
            target: "access",
            verdict,
            encryption = "none",
            source = address(event.source, event.source_port),
            destination = address(event.destination, event.destination_port),
            "{words}"
        );
    }
}

/// Label and explanation of an event's verdict.
fn words(verdict: u32) -> (&'static str, &'static str) {
    match verdict {
        ebpf::VERDICT_PLAINTEXT_ACCEPTED => {
            ("plaintext_accepted", "plaintext from outside reached a permissive workload")
        }
        ebpf::VERDICT_PLAINTEXT_REFUSED => {
            ("plaintext_refused", "plaintext to a strict workload was refused")
        }
        ebpf::VERDICT_LISTENER_REFUSED => {
            ("listener_refused", "somebody outside the pod tried the agent's own port")
        }
        ebpf::VERDICT_EGRESS_DROPPED => (
            "egress_dropped",
            "the egress guard dropped plaintext to a mesh member: a process outside the pod's cgroup?",
        ),
        ebpf::VERDICT_CAPTURE_FAILED => (
            "capture_failed",
            "a connection could not be captured and was refused: no address of that family, or no memory",
        ),
        ebpf::VERDICT_HELD => (
            "held",
            "a pod that the agent has not judged yet was kept from the mesh: is it new, or unknown to the directory?",
        ),
        _ => ("other", "a verdict of the kernel side"),
    }
}
