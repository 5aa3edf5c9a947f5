//! The dialling side's sessions: one store for each configuration, so for one source, one
//! destination identity and one state of trust.
//!
//! A session is given out once, and not after the certificates it rests on have expired: the peer's
//! as they were verified, and our own. Which connection it was for is told by the address that stands
//! for the server's name. Nothing here is written down.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::{ServerName, UnixTime};
use rustls::time_provider::TimeProvider;

/// Addresses of one destination identity that are remembered.
const MAX_ADDRESSES: usize = 64;
/// Sessions for one address: what two full handshakes bring.
const MAX_SESSIONS: usize = 4;

#[derive(Default)]
struct Address {
    group: Option<NamedGroup>,
    /// Until when the peer's chain, as it was verified last, is valid.
    until: Option<UnixTime>,
    /// Oldest first.
    sessions: Vec<Tls13ClientSessionValue>,
}

/// One configuration's sessions.
pub(super) struct Sessions {
    clock: Arc<dyn TimeProvider>,
    /// The end of our own certificates.
    own_until: UnixTime,
    addresses: Mutex<HashMap<ServerName<'static>, Address>>,
}

impl Sessions {
    pub(super) fn new(clock: Arc<dyn TimeProvider>, own_until: UnixTime) -> Arc<Self> {
        Arc::new(Self { clock, own_until, addresses: Mutex::default() })
    }

    /// Notes that a peer has proven itself, with certificates that are valid until then.
    pub(super) fn proven(&self, name: &ServerName<'_>, until: UnixTime) {
        let mut addresses = self.lock();
        let address = entry(&mut addresses, name.to_owned());
        if address.until.replace(until) != Some(until) {
            // What it gave before rests on other certificates.
            address.sessions.clear();
        }
    }

    /// Forgets every session.
    pub(super) fn forget(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ServerName<'static>, Address>> {
        // Entries are whole at every instant.
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address's entry. When there is no room for it, the others are forgotten: they cost a handshake.
fn entry<'a>(
    addresses: &'a mut HashMap<ServerName<'static>, Address>,
    name: ServerName<'static>,
) -> &'a mut Address {
    if addresses.len() >= MAX_ADDRESSES && !addresses.contains_key(&name) {
        addresses.clear();
    }
    addresses.entry(name).or_default()
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sessions").field("addresses", &self.lock().len()).finish_non_exhaustive()
    }
}

impl ClientSessionStore for Sessions {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        entry(&mut self.lock(), name).group = Some(group);
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.lock().get(name)?.group
    }

    fn insert_tls13_ticket(&self, name: ServerName<'static>, session: Tls13ClientSessionValue) {
        let mut addresses = self.lock();
        // Without an entry the peer's proof was forgotten meanwhile, and its session is of no use.
        let Some(address) = addresses.get_mut(&name).filter(|a| a.until.is_some()) else { return };
        if address.sessions.len() >= MAX_SESSIONS {
            address.sessions.remove(0);
        }
        address.sessions.push(session);
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut addresses = self.lock();
        let address = addresses.get_mut(name)?;
        let now = self.clock.current_time()?;
        if now > self.own_until || address.until.is_none_or(|until| now > until) {
            address.sessions.clear();
        }
        address.sessions.pop()
    }

    // TLS 1.2 is not spoken.
    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _: &ServerName<'static>) {}
}
