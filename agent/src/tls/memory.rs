//! What TLS remembers from one connection to the next, for all of an agent's threads: roots with the
//! chains verified under them, ticket keys, and dialling sides with their sessions.
//!
//! What it was derived from decides whether it is still used: a change of trust or of an SVID makes
//! new ones, and the old ones go with their last user.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustls::Error;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::UnixTime;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};

use super::bounded::Bounded;
use super::client::Dial;
use super::provider::provider;
use super::roots::{Digest, Roots};
use super::server::{Listener, Terms};
use super::ticket::TicketKeys;
use super::verify::{Expected, Judge, PeerVerifier};
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::X509Svid;
use crate::telemetry::Observe;

/// Most pairs of identities whose dialling side is remembered, some 6 KiB each with their sessions.
const MAX_DIALS: usize = 4_096;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pair {
    source: SpiffeId,
    peer: Expected,
    alpn: Vec<Vec<u8>>,
}

/// A dialling side, and what it was made from.
#[derive(Clone, Debug)]
struct Made {
    svid: u64,
    roots: Arc<Roots>,
    rules: Option<Digest>,
    dial: Arc<Dial>,
}

/// An agent's memory.
#[derive(Debug)]
pub struct Memory {
    keys: Option<Arc<TicketKeys>>,
    provider: Arc<CryptoProvider>,
    clock: Arc<dyn TimeProvider>,
    observe: Observe,
    /// The roots of the current epoch of trust.
    roots: Mutex<Option<(u64, Arc<Roots>)>>,
    dials: Mutex<Bounded<Pair, Made>>,
}

impl Memory {
    /// The keys of session tickets, if sessions are resumed.
    pub fn keys(&self) -> Option<&Arc<TicketKeys>> {
        self.keys.as_ref()
    }

    /// Resumes sessions with these keys; without any, neither side resumes.
    pub fn new(keys: Option<Arc<TicketKeys>>, observe: Observe) -> Arc<Self> {
        Self::with(keys, observe, provider(), Arc::new(DefaultTimeProvider))
    }

    /// The same with listeners of another crypto provider, and another clock, which rustls uses too.
    pub fn with(
        keys: Option<Arc<TicketKeys>>,
        observe: Observe,
        provider: Arc<CryptoProvider>,
        clock: Arc<dyn TimeProvider>,
    ) -> Arc<Self> {
        let dials = Mutex::new(Bounded::new(MAX_DIALS));
        Arc::new(Self { keys, provider, clock, observe, roots: Mutex::default(), dials })
    }

    /// The bundle's roots. An epoch later than any before replaces them, and with them every chain
    /// that they verified.
    ///
    /// # Errors
    /// When a root of the bundle is unusable.
    pub fn roots(&self, bundle: &TrustBundle, epoch: u64) -> Result<Arc<Roots>, Error> {
        let mut current = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        match current.as_ref() {
            Some((of, roots)) if *of == epoch => return Ok(Arc::clone(roots)),
            _ => {}
        }
        let roots = Roots::new(bundle, Some(self.observe.clone()))?;
        // Whoever still holds an older snapshot gets what it asks for, but it is not kept.
        if current.as_ref().is_none_or(|(of, _)| *of < epoch) {
            *current = Some((epoch, Arc::clone(&roots)));
        }
        Ok(roots)
    }

    /// The time by this memory's clock; the epoch, at which nothing is valid, if it has none.
    pub fn now(&self) -> UnixTime {
        self.clock.current_time().unwrap_or_else(|| UnixTime::since_unix_epoch(Duration::ZERO))
    }

    /// A listener on these terms.
    ///
    /// # Errors
    /// When the crypto provider cannot do what we ask of it, which it can.
    pub fn listener(&self, terms: &Terms<'_>) -> Result<Arc<Listener>, Error> {
        let (provider, clock) = (Arc::clone(&self.provider), Arc::clone(&self.clock));
        Listener::new(terms, self.keys.clone(), provider, clock, self.observe.clone())
    }

    /// How `svid` dials `peer`: the same as before, sessions included, as long as SVID, roots and rules
    /// are the same.
    ///
    /// # Errors
    /// When the crypto provider cannot do what we ask of it, which it can.
    pub fn dial(
        &self,
        svid: &X509Svid,
        roots: &Arc<Roots>,
        peer: Expected,
        alpn: &[&[u8]],
        judge: Option<Arc<dyn Judge>>,
    ) -> Result<Arc<Dial>, Error> {
        let pair = Pair {
            source: svid.id().clone(),
            peer,
            alpn: alpn.iter().map(|protocol| protocol.to_vec()).collect(),
        };
        let rules = judge.as_ref().map(|judge| judge.digest());
        if let Some(made) = self.dials().get(&pair)
            && made.svid == svid.generation()
            && Arc::ptr_eq(&made.roots, roots)
            && made.rules == rules
        {
            return Ok(made.dial);
        }
        let verifier = PeerVerifier::under(Arc::clone(roots), pair.peer.clone(), judge);
        let resume = self.keys.is_some();
        let dial = Dial::new(svid, verifier, alpn, resume, Arc::clone(&self.clock), self.observe.clone())?;
        let made = Made { svid: svid.generation(), roots: Arc::clone(roots), rules, dial: Arc::clone(&dial) };
        self.dials().insert(pair, made);
        Ok(dial)
    }

    fn dials(&self) -> MutexGuard<'_, Bounded<Pair, Made>> {
        // Entries are whole at every instant.
        self.dials.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
