//! Session tickets: sealed here, opened here, kept by whoever was given them (RFC 8446, 4.6.1).
//!
//! A ticket is sealed with a key derived for one [`Binding`], so one that is presented anywhere else,
//! or after a change of what it rests on, does not open. Keys live two hours at most, and each ticket
//! opens once. That a ticket opens says nothing about whether its session may be resumed: the peer is
//! judged anew by whoever opens it. No clock is read here, and no early data is ever allowed.

pub mod content;

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk};
use aws_lc_rs::rand;
use rustls::pki_types::UnixTime;
use zeroize::Zeroizing;

use super::roots::{Digest, digest};
use crate::verdict::Unresumed;

/// How long a key seals, and how long a ticket lives. A key opens for twice as long, so every ticket
/// can be opened as long as it lives. An hour: a peer that only ever resumes signs 24 times a day.
pub const LIFETIME_SECONDS: u64 = 3600;
/// A clock that was set back by more than this makes the age of keys unknown: they are replaced.
const CLOCK_SLACK_SECONDS: u64 = 60;
/// Most tickets remembered as used, for each key: 2 MiB. Then nothing more is resumed with that key.
const MAX_SPENT: usize = 1 << 17;
/// A longer ticket is neither made nor opened: a chain of three P-384 certificates fits twice.
pub const MAX_TICKET_BYTES: usize = 8 * 1024;

const VERSION: u8 = 1;
const NAME_BYTES: usize = 8;
const MARK_BYTES: usize = 4;
const NONCE_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
/// Version, name of the key, three marks.
const HEADER_BYTES: usize = 1 + NAME_BYTES + 3 * MARK_BYTES;

/// Names a generation of keys.
pub type Name = [u8; NAME_BYTES];
/// Names a ticket under its generation: drawn at random by whoever sealed it.
pub type Serial = [u8; NONCE_BYTES];

/// What a ticket is good for. Digests of content: equal in every agent that is configured equally,
/// and after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    trust: Digest,
    place: Digest,
    terms: Digest,
}

impl Binding {
    /// `trust`: bundle, revocations, policies. `place`: identity, listener, workload. `terms`: mode,
    /// application protocols, cipher suites.
    pub fn new(trust: &[&[u8]], place: &[&[u8]], terms: &[&[u8]]) -> Self {
        Self { trust: digest(trust), place: digest(place), terms: digest(terms) }
    }

    fn parts(&self) -> [&Digest; 3] {
        [&self.trust, &self.place, &self.terms]
    }
}

/// One generation of keys, as a successor takes it up.
#[derive(Clone)]
pub struct Generation {
    /// Its name, which tickets carry.
    pub name: Name,
    /// What its keys are derived from.
    pub secret: Zeroizing<[u8; 32]>,
    /// When it began, in seconds since 1970.
    pub born: u64,
    /// The tickets that were used.
    pub spent: HashSet<Serial>,
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation")
            .field("name", &self.name)
            .field("born", &self.born)
            .finish_non_exhaustive()
    }
}

/// Where keys wait for a successor. What it is told was done before the call that told it returns.
pub trait Journal: Send + Sync + std::fmt::Debug {
    /// These generations are in use now, and no others.
    ///
    /// # Errors
    /// When this cannot be noted. Nothing is handed over then.
    fn rotated(&self, generations: &[Generation]) -> io::Result<()>;

    /// A ticket is used. When this fails it counts as used, and is not honoured.
    ///
    /// # Errors
    /// When a successor would not learn of it.
    fn spent(&self, generation: &Name, serial: &Serial) -> io::Result<()>;
}

/// For an agent that has nowhere to keep its keys: they end with it.
#[derive(Debug)]
pub struct Forgetful;

impl Journal for Forgetful {
    fn rotated(&self, _: &[Generation]) -> io::Result<()> {
        Ok(())
    }

    fn spent(&self, _: &Name, _: &Serial) -> io::Result<()> {
        Ok(())
    }
}

/// The keys of all of an agent's listeners.
#[derive(Debug)]
pub struct TicketKeys {
    /// Newest first; at most two.
    generations: Mutex<Vec<Generation>>,
    journal: Box<dyn Journal>,
    /// A successor honours tickets from now on; changed under the lock.
    is_frozen: AtomicBool,
}

/// An opened ticket, not yet used.
#[derive(Debug)]
pub struct Opened {
    /// What was sealed.
    pub plain: Vec<u8>,
    name: Name,
    serial: Serial,
}

impl TicketKeys {
    /// Begins with new keys, noted in `journal`.
    pub fn new(journal: Box<dyn Journal>) -> Self {
        Self::restore(Vec::new(), journal)
    }

    /// Goes on with a predecessor's generations (newest first), those that are young enough.
    pub fn restore(generations: Vec<Generation>, journal: Box<dyn Journal>) -> Self {
        Self { generations: Mutex::new(generations), journal, is_frozen: AtomicBool::new(false) }
    }

    /// Leaves what is noted to a successor: from now on no ticket is honoured here, and nothing is noted.
    pub fn freeze(&self) {
        let _under_the_lock = self.lock();
        self.is_frozen.store(true, Ordering::Relaxed);
    }

    /// Takes it back from a successor that came to nothing and has honoured no ticket.
    pub fn thaw(&self) {
        let generations = self.lock();
        self.is_frozen.store(false, Ordering::Relaxed);
        self.note(&generations);
    }

    /// Seals; `None` when that cannot be, which costs a later full handshake and nothing else.
    pub fn seal(&self, binding: &Binding, plain: Vec<u8>, now: UnixTime) -> Option<Vec<u8>> {
        if HEADER_BYTES + NONCE_BYTES + plain.len() + TAG_BYTES > MAX_TICKET_BYTES {
            return None;
        }
        let keys = {
            let mut generations = self.lock();
            self.rotate(&mut generations, now);
            Keys::derive(generations.first()?, binding)?
        };
        let mut sealed = plain;
        let aad = Aad::from(keys.header);
        let nonce = keys.aead.seal_in_place_append_tag(aad, &mut sealed).ok()?;
        Some([&keys.header, nonce.as_ref().as_slice(), &sealed].concat())
    }

    /// Opens a ticket that was sealed under the same binding. Any bytes may come.
    ///
    /// # Errors
    /// Why it does not open, as far as that can be told.
    pub fn open(&self, binding: &Binding, ticket: &[u8], now: UnixTime) -> Result<Opened, Unresumed> {
        if ticket.len() > MAX_TICKET_BYTES {
            return Err(Unresumed::Unreadable);
        }
        let (header, rest) = ticket.split_first_chunk::<HEADER_BYTES>().ok_or(Unresumed::Unreadable)?;
        let (serial, sealed) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(Unresumed::Unreadable)?;
        let (version, named) = header.split_first().ok_or(Unresumed::Unreadable)?;
        let (name, marks) = named.split_first_chunk::<NAME_BYTES>().ok_or(Unresumed::Unreadable)?;
        if *version != VERSION {
            return Err(Unresumed::UnknownTicket);
        }
        let keys = {
            let mut generations = self.lock();
            if self.is_frozen.load(Ordering::Relaxed) {
                return Err(Unresumed::UnknownTicket);
            }
            self.rotate(&mut generations, now);
            let generation = generations.iter().find(|g| g.name == *name).ok_or(Unresumed::UnknownTicket)?;
            Keys::derive(generation, binding).ok_or(Unresumed::Unreadable)?
        };
        // The marks only tell operators why: a forged one leads to a key that does not open.
        let ours = keys.header[1 + NAME_BYTES..].chunks(MARK_BYTES).zip(marks.chunks(MARK_BYTES));
        let reasons = [Unresumed::TrustChanged, Unresumed::OtherListener, Unresumed::TermsChanged];
        if let Some((_, reason)) = ours.zip(reasons).find(|((ours, theirs), _)| ours != theirs) {
            return Err(reason);
        }
        let mut plain = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*serial);
        let length = keys
            .aead
            .open_in_place(nonce, Aad::from(*header), &mut plain)
            .map_err(|_| Unresumed::Unreadable)?
            .len();
        plain.truncate(length);
        Ok(Opened { plain, name: *name, serial: *serial })
    }

    /// Uses an opened ticket, which works once, for all listeners and threads together.
    ///
    /// # Errors
    /// When it was used before, or its use cannot be remembered.
    pub fn spend(&self, opened: &Opened) -> Result<(), Unresumed> {
        let mut generations = self.lock();
        if self.is_frozen.load(Ordering::Relaxed) {
            return Err(Unresumed::UnknownTicket);
        }
        let generation =
            generations.iter_mut().find(|g| g.name == opened.name).ok_or(Unresumed::UnknownTicket)?;
        if generation.spent.contains(&opened.serial) {
            return Err(Unresumed::Reused);
        }
        if generation.spent.len() >= MAX_SPENT {
            return Err(Unresumed::Full);
        }
        generation.spent.insert(opened.serial);
        self.journal.spent(&opened.name, &opened.serial).map_err(|_| Unresumed::Full)
    }

    /// Begins a generation when the newest is old enough, and lets go of what may open no more.
    fn rotate(&self, generations: &mut Vec<Generation>, now: UnixTime) {
        let now = now.as_secs();
        let before = generations.len();
        // A generation from the future has an age that nobody knows.
        generations.retain(|g| {
            g.born <= now + CLOCK_SLACK_SECONDS && now.saturating_sub(g.born) < 2 * LIFETIME_SECONDS
        });
        let due = generations.first().is_none_or(|g| now.saturating_sub(g.born) >= LIFETIME_SECONDS);
        if due && let Some(new) = Generation::draw(now) {
            generations.insert(0, new);
            generations.truncate(2);
        } else if generations.len() == before {
            return;
        }
        if !self.is_frozen.load(Ordering::Relaxed) {
            self.note(generations);
        }
    }

    fn note(&self, generations: &[Generation]) {
        if let Err(error) = self.journal.rotated(generations) {
            tracing::warn!(%error, "cannot keep the keys of session tickets: a restarted agent's peers make full handshakes");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Generation>> {
        // Every change under the lock is whole.
        self.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Generation {
    /// `None` when the system gives no randomness.
    fn draw(now: u64) -> Option<Self> {
        let mut name = [0; NAME_BYTES];
        let mut secret = Zeroizing::new([0; 32]);
        rand::fill(&mut name).ok()?;
        rand::fill(secret.as_mut()).ok()?;
        Some(Self { name, secret, born: now, spent: HashSet::new() })
    }
}

/// One generation's keys for one binding.
struct Keys {
    aead: RandomizedNonceKey,
    header: [u8; HEADER_BYTES],
}

impl Keys {
    /// HKDF (RFC 5869) from the secret, which is uniform and so needs no extraction. All of `info` has
    /// fixed lengths.
    fn derive(generation: &Generation, binding: &Binding) -> Option<Self> {
        let prk = Prk::new_less_safe(HKDF_SHA256, generation.secret.as_ref());
        let [trust, place, terms] = binding.parts();
        let mut key = Zeroizing::new([0; 32]);
        let info: [&[u8]; 4] = [b"hauberk ticket 1 key", trust, place, terms];
        prk.expand(&info, Length(32)).ok()?.fill(key.as_mut()).ok()?;
        let mut header = [0; HEADER_BYTES];
        header[0] = VERSION;
        header[1..=NAME_BYTES].copy_from_slice(&generation.name);
        for (place, part) in header[1 + NAME_BYTES..].chunks_mut(MARK_BYTES).zip(binding.parts()) {
            // Derived, so that who reads the wire learns nothing but which tickets are alike.
            prk.expand(&[b"hauberk ticket 1 mark", part], Length(MARK_BYTES)).ok()?.fill(place).ok()?;
        }
        Some(Self { aead: RandomizedNonceKey::new(&AES_256_GCM, key.as_ref()).ok()?, header })
    }
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// New keys that end with the process.
pub fn fleeting() -> Arc<TicketKeys> {
    Arc::new(TicketKeys::new(Box::new(Forgetful)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::since_unix_epoch(Duration::from_secs(seconds))
    }

    fn binding(trust: &str, place: &str, terms: &str) -> Binding {
        Binding::new(&[trust.as_bytes()], &[place.as_bytes()], &[terms.as_bytes()])
    }

    /// Remembers what it was told; fails when it shall.
    #[derive(Debug, Default)]
    struct Told {
        generations: Mutex<Vec<Generation>>,
        fails: AtomicBool,
    }

    impl Journal for Arc<Told> {
        fn rotated(&self, generations: &[Generation]) -> io::Result<()> {
            *self.generations.lock().unwrap() = generations.to_vec();
            Ok(())
        }

        fn spent(&self, _: &Name, _: &Serial) -> io::Result<()> {
            if self.fails.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
    }

    #[test]
    fn each_part_of_the_binding_is_named_when_it_is_another() {
        let keys = fleeting();
        let ours = binding("roots", "pod", "strict");
        let ticket = keys.seal(&ours, b"session".to_vec(), at(NOW)).unwrap();
        assert_eq!(keys.open(&ours, &ticket, at(NOW)).unwrap().plain, b"session");
        for (other, why) in [
            (binding("fewer roots", "pod", "strict"), Unresumed::TrustChanged),
            (binding("roots", "other pod", "strict"), Unresumed::OtherListener),
            (binding("roots", "pod", "permissive"), Unresumed::TermsChanged),
        ] {
            assert_eq!(keys.open(&other, &ticket, at(NOW)).unwrap_err(), why);
        }
        let theirs = fleeting();
        assert_eq!(theirs.open(&ours, &ticket, at(NOW)).unwrap_err(), Unresumed::UnknownTicket);
    }

    #[test]
    fn forged_marks_do_not_open_a_ticket_of_another_binding() {
        let keys = fleeting();
        let (ours, theirs) = (binding("a", "b", "c"), binding("x", "y", "z"));
        let mut ticket = keys.seal(&theirs, b"session".to_vec(), at(NOW)).unwrap();
        let mark = keys.seal(&ours, Vec::new(), at(NOW)).unwrap();
        ticket[..HEADER_BYTES].copy_from_slice(&mark[..HEADER_BYTES]);
        assert_eq!(keys.open(&ours, &ticket, at(NOW)).unwrap_err(), Unresumed::Unreadable);
    }

    #[test]
    fn parts_that_run_together_are_not_the_same_binding() {
        let one = Binding::new(&[b"ab", b"c"], &[], &[]);
        assert_ne!(one, Binding::new(&[b"a", b"bc"], &[], &[]));
        assert_ne!(one, Binding::new(&[b"abc"], &[], &[]));
    }

    #[test]
    fn a_key_seals_for_an_hour_and_opens_for_two() {
        let keys = fleeting();
        let ours = binding("a", "b", "c");
        let first = keys.seal(&ours, vec![1], at(NOW)).unwrap();
        let same = keys.seal(&ours, vec![2], at(NOW + LIFETIME_SECONDS - 1)).unwrap();
        let next = keys.seal(&ours, vec![3], at(NOW + LIFETIME_SECONDS)).unwrap();
        assert_eq!(first[..HEADER_BYTES], same[..HEADER_BYTES], "one key within the hour");
        assert_ne!(first[..HEADER_BYTES], next[..HEADER_BYTES], "another key after it");
        let late = at(NOW + 2 * LIFETIME_SECONDS - 1);
        assert_eq!(keys.open(&ours, &same, late).unwrap().plain, [2], "a whole hour later");
        let too_late = at(NOW + 2 * LIFETIME_SECONDS);
        assert_eq!(keys.open(&ours, &same, too_late).unwrap_err(), Unresumed::UnknownTicket);
        assert_eq!(keys.open(&ours, &next, too_late).unwrap().plain, [3], "the younger key still opens");
    }

    #[test]
    fn a_clock_that_was_set_back_replaces_the_keys() {
        let keys = fleeting();
        let ours = binding("a", "b", "c");
        let ticket = keys.seal(&ours, vec![1], at(NOW)).unwrap();
        assert!(keys.open(&ours, &ticket, at(NOW - CLOCK_SLACK_SECONDS)).is_ok(), "a little is no matter");
        let before = at(NOW - CLOCK_SLACK_SECONDS - 1);
        assert_eq!(keys.open(&ours, &ticket, before).unwrap_err(), Unresumed::UnknownTicket);
    }

    #[test]
    fn a_ticket_is_spent_once_also_for_a_successor() {
        let told = Arc::new(Told::default());
        let keys = TicketKeys::new(Box::new(Arc::clone(&told)));
        let ours = binding("a", "b", "c");
        let ticket = keys.seal(&ours, vec![1], at(NOW)).unwrap();
        let opened = keys.open(&ours, &ticket, at(NOW)).unwrap();
        assert_eq!(keys.spend(&opened), Ok(()));
        assert_eq!(keys.spend(&opened), Err(Unresumed::Reused));
        let kept = keys.lock().clone();
        let successor = TicketKeys::restore(kept, Box::new(Forgetful));
        let again = successor.open(&ours, &ticket, at(NOW + 1)).unwrap();
        assert_eq!(successor.spend(&again), Err(Unresumed::Reused));
    }

    #[test]
    fn what_cannot_be_remembered_as_used_is_not_honoured() {
        let told = Arc::new(Told::default());
        let keys = TicketKeys::new(Box::new(Arc::clone(&told)));
        let ours = binding("a", "b", "c");
        let ticket = keys.seal(&ours, vec![1], at(NOW)).unwrap();
        let opened = keys.open(&ours, &ticket, at(NOW)).unwrap();
        told.fails.store(true, Ordering::Relaxed);
        assert_eq!(keys.spend(&opened), Err(Unresumed::Full), "the successor would honour it again");

        let keys = fleeting();
        let ticket = keys.seal(&ours, vec![1], at(NOW)).unwrap();
        let opened = keys.open(&ours, &ticket, at(NOW)).unwrap();
        let full = (0..MAX_SPENT as u64).map(|n| {
            let mut serial = Serial::default();
            serial[..8].copy_from_slice(&n.to_be_bytes());
            serial
        });
        keys.lock()[0].spent = full.collect();
        assert_eq!(keys.spend(&opened), Err(Unresumed::Full), "refused rather than another forgotten");
        assert_eq!(keys.lock()[0].spent.len(), MAX_SPENT);
    }

    proptest! {
        #[test]
        fn a_changed_or_shortened_ticket_does_not_open(
            plain in proptest::collection::vec(any::<u8>(), 0..300),
            at_byte: prop::sample::Index, flip in 1u8.., cut: prop::sample::Index
        ) {
            let keys = fleeting();
            let ours = binding("a", "b", "c");
            let ticket = keys.seal(&ours, plain.clone(), at(NOW)).unwrap();
            prop_assert_eq!(&keys.open(&ours, &ticket, at(NOW)).unwrap().plain, &plain);
            let mut changed = ticket.clone();
            changed[at_byte.index(ticket.len())] ^= flip;
            prop_assert!(keys.open(&ours, &changed, at(NOW)).is_err(), "changed");
            prop_assert!(keys.open(&ours, &ticket[..cut.index(ticket.len())], at(NOW)).is_err(), "cut");
            let longer = [ticket.as_slice(), &[flip]].concat();
            prop_assert!(keys.open(&ours, &longer, at(NOW)).is_err(), "longer");
        }

        #[test]
        fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            prop_assert!(fleeting().open(&binding("a", "b", "c"), &bytes, at(NOW)).is_err());
        }
    }
}
