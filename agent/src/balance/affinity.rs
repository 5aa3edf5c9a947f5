//! Clients that are to meet the same endpoint again, while they come often enough (Kubernetes'
//! `sessionAffinity: ClientIP`).
//!
//! Clients are this node's pods, so what is remembered is little.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The endpoint last chosen, and until when it is to be chosen again.
type Last = (SocketAddr, Instant);

/// What is remembered, by service address and client.
#[derive(Debug, Default)]
pub(super) struct Affinity(Mutex<HashMap<(SocketAddr, IpAddr), Last>>);

impl Affinity {
    /// The endpoint that a client is to meet again.
    pub(super) fn last(&self, service: SocketAddr, client: IpAddr, now: Instant) -> Option<SocketAddr> {
        let (endpoint, until) = *self.lock().get(&(service, client))?;
        (now < until).then_some(endpoint)
    }

    /// A client was sent to an endpoint, which is to be so `until` then.
    pub(super) fn note(&self, service: SocketAddr, client: IpAddr, endpoint: SocketAddr, until: Instant) {
        self.lock().insert((service, client), (endpoint, until));
    }

    /// Forgets what is over.
    pub(super) fn tidy(&self, now: Instant) {
        self.lock().retain(|_, (_, until)| now < *until);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(SocketAddr, IpAddr), Last>> {
        // Entries are whole at every instant.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
