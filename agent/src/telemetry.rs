//! Seen from outside: metrics and the access log.
//!
//! Modules on the data's way take an [`Observe`] and report to it; they never touch the registry.

pub mod access_log;
pub mod log;
pub mod metrics;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::identity::SpiffeId;
use crate::identity::revocation::Revoked;
use crate::verdict::{Direction, Encryption, Issuance, IssuerKind, Locality, Reason, Unresumed};
pub use metrics::Metrics;

/// Which side of a TLS handshake the agent was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It dialled.
    Client,
    /// It accepted.
    Server,
}

/// One finished connection of a workload, as the access log tells it.
#[derive(Clone, Debug)]
pub struct Finished<'a> {
    /// Seen from the local workload.
    pub direction: Direction,
    /// How its bytes travelled.
    pub encryption: Encryption,
    /// Why it ended.
    pub reason: Reason,
    /// More about `reason`, for a human; may be empty.
    pub detail: &'a str,
    /// The access policy that denied it (`namespace/name`), if one did.
    pub policy: Option<&'a str>,
    /// Who opened it, if it came so far that this is known.
    pub source_id: Option<&'a SpiffeId>,
    /// The opener's address.
    pub source: Option<SocketAddr>,
    /// Who was asked.
    pub destination_id: Option<&'a SpiffeId>,
    /// Where it went: the application's address.
    pub destination: Option<SocketAddr>,
    /// Bytes from opener to asked.
    pub sent_bytes: u64,
    /// Bytes from asked to opener.
    pub received_bytes: u64,
    /// From capture or CONNECT to the end.
    pub duration: Duration,
}

/// The handle that data-path modules report to. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Observe {
    metrics: Arc<Metrics>,
}

impl Observe {
    /// Reports into these metrics.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics }
    }

    /// A connection began: counts it as open until [`Observe::finished`].
    pub fn opened(&self, direction: Direction) {
        self.metrics.opened(direction);
    }

    /// A connection ended, or was refused. `was_open` says whether [`Observe::opened`] was called.
    pub fn finished(&self, record: &Finished<'_>, was_open: bool) {
        self.metrics.finished(record, was_open);
        access_log::write(record);
    }

    /// A TLS handshake was done; `resumed` says whether it resumed a session.
    pub fn handshake(&self, role: Role, took: Duration, resumed: bool) {
        self.metrics.handshake(role, took, resumed);
    }

    /// A TLS handshake failed.
    pub fn handshake_failed(&self, role: Role, took: Duration, why: Reason) {
        self.metrics.handshake_failed(role, took, why);
    }

    /// A TLS session was there and was not resumed.
    pub fn unresumed(&self, role: Role, why: Unresumed) {
        self.metrics.unresumed(role, why);
    }

    /// A peer's certificates were judged: known from before, or verified now.
    pub fn chain(&self, known: bool) {
        self.metrics.chain(known);
    }

    /// A tunnel was closed because one of its certificates has been revoked.
    pub fn cut(&self, role: Role, revoked: &Revoked) {
        tracing::warn!(%revoked, "closing a tunnel");
        self.metrics.cut(role);
    }

    /// A tunnel was closed because its certificates expired longer ago than streams may outlive them.
    pub fn outlived(&self, peer: &SpiffeId) {
        tracing::info!(%peer, "closing a tunnel whose certificates expired long ago (tunnel.outliveSvidSeconds)");
    }

    /// A pooled connection came (`+1`) or went (`-1`).
    pub fn pool(&self, change: i64) {
        self.metrics.pool(change);
    }

    /// A pooled connection was made before a stream needed it, or could not be.
    pub fn ahead(&self, made: bool) {
        self.metrics.ahead(made);
    }

    /// An issuer was asked for an SVID.
    pub fn asked_issuer(&self, issuer: IssuerKind, outcome: Issuance) {
        self.metrics.issuance.asked(issuer, outcome);
    }

    /// An endpoint of a service was picked; `again` says that another had failed before.
    pub fn picked(&self, locality: Locality, again: bool) {
        self.metrics.balance.picked(locality, again);
    }

    /// An endpoint of a service was ejected.
    pub fn ejected(&self) {
        self.metrics.balance.ejected();
    }

    /// An ejected endpoint was let back, or is gone.
    pub fn readmitted(&self) {
        self.metrics.balance.readmitted();
    }
}
