//! What is proven on one connection in node scope: the identities that this end has shown, those that
//! the other has, and the streams that rest on them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustls::pki_types::UnixTime;

use super::{Binding, Proven, Refusal, Side, prove, verify};
use crate::hbone::Lease;
use crate::identity::SpiffeId;
use crate::identity::revocation::Revoked;
use crate::identity::svid::X509Svid;
use crate::tls::roots::{Digest, Roots, Verified, digest};
use crate::tls::verify::{Expected, PeerVerifier};
use crate::trust::Snapshot;
use crate::verdict::Reason;

/// Most identities remembered for each direction.
const MAX_IDENTITIES: usize = 4096;
/// After this many proofs that were none, the peer is not an agent of ours, whatever it says.
pub const MAX_FAILURES: u32 = 16;

/// A proof of ours, as it is sent.
#[derive(Debug)]
pub struct Shown {
    /// The header's value.
    pub header: String,
    /// Set once a stream that carried it was answered: the peer has it.
    pub acknowledged: Arc<AtomicBool>,
    /// Of the SVID that it proves.
    generation: u64,
}

/// The proofs of one connection.
#[derive(Debug)]
pub struct Proofs {
    binding: Binding,
    side: Side,
    ours: Mutex<HashMap<SpiffeId, Arc<Shown>>>,
    theirs: Mutex<HashMap<SpiffeId, Theirs>>,
    /// Streams by the two certificates that they rest on.
    streams: Mutex<HashMap<(String, u64), Streams>>,
    failures: AtomicU32,
}

/// An identity that the other end has proven.
#[derive(Debug)]
struct Theirs {
    proven: Proven,
    /// The state of trust that its chain was judged under.
    epoch: u64,
}

#[derive(Debug)]
struct Streams {
    lease: Weak<Lease>,
    theirs: Arc<Verified>,
    ours: Arc<X509Svid>,
}

impl Proofs {
    /// Of a connection just made, at one of its ends.
    pub fn new(binding: Binding, side: Side) -> Arc<Self> {
        Arc::new(Self {
            binding,
            side,
            ours: Mutex::default(),
            theirs: Mutex::default(),
            streams: Mutex::default(),
            failures: AtomicU32::new(0),
        })
    }

    /// The node at the other end.
    pub fn peer(&self) -> &SpiffeId {
        match self.side {
            Side::Client => &self.binding.server,
            Side::Server => &self.binding.client,
        }
    }

    /// Our proof of an identity: signed at the first call for each SVID, then the same.
    ///
    /// # Errors
    /// When the key cannot sign, or too many identities were shown already.
    pub fn show(&self, svid: &Arc<X509Svid>) -> Result<Arc<Shown>, Refusal> {
        let mut ours = lock(&self.ours);
        match ours.get(svid.id()) {
            Some(shown) if shown.generation == svid.generation() => return Ok(Arc::clone(shown)),
            Some(_) => {}
            None => room(ours.len())?,
        }
        let header = prove(svid, &self.binding, self.side)?;
        let acknowledged = Arc::default();
        let shown = Arc::new(Shown { header, acknowledged, generation: svid.generation() });
        ours.insert(svid.id().clone(), Arc::clone(&shown));
        Ok(shown)
    }

    /// Takes the other end's proof, and says whose it is.
    ///
    /// # Errors
    /// When it proves nothing.
    pub fn learn(
        &self,
        header: &[u8],
        trust: &Snapshot,
        roots: &Arc<Roots>,
        now: UnixTime,
    ) -> Result<Arc<Verified>, Refusal> {
        let sent: Digest = digest(&[header]);
        // Streams repeat a proof until one is answered: the same bytes prove the same once more.
        let known = lock(&self.theirs)
            .iter()
            .find(|(_, theirs)| theirs.proven.sent == sent)
            .map(|(id, _)| id.clone());
        if let Some(id) = known {
            return self.knows(&id, trust, roots, now);
        }
        let proven = verify(header, &self.binding, self.side.other(), &verifier(roots), now);
        let proven = proven.inspect_err(|_| {
            self.failures.fetch_add(1, Ordering::Relaxed);
        })?;
        let verified = Arc::clone(&proven.verified);
        let mut theirs = lock(&self.theirs);
        if !theirs.contains_key(&verified.id) {
            room(theirs.len())?;
        }
        theirs.insert(verified.id.clone(), Theirs { proven, epoch: trust.bundle_epoch });
        Ok(verified)
    }

    /// The certificate by which the other end has proven an identity, which is called by our own trust domain's
    /// name. After a change of trust its chain
    /// is judged anew; that the other end holds its key was shown once for this connection.
    ///
    /// # Errors
    /// [`Reason::Unproven`], or why the certificate is not good any more.
    pub fn knows(
        &self,
        id: &SpiffeId,
        trust: &Snapshot,
        roots: &Arc<Roots>,
        now: UnixTime,
    ) -> Result<Arc<Verified>, Refusal> {
        let mut theirs = lock(&self.theirs);
        let known = theirs.get_mut(id).ok_or_else(|| Refusal {
            reason: Reason::Unproven,
            detail: format!("{id} was not proven on this connection"),
        })?;
        if known.epoch == trust.bundle_epoch && now <= known.proven.verified.until {
            return Ok(Arc::clone(&known.proven.verified));
        }
        match known.proven.again(self.side.other(), &verifier(roots), now) {
            Ok(verified) => {
                known.proven.verified = Arc::clone(&verified);
                known.epoch = trust.bundle_epoch;
                Ok(verified)
            }
            Err(refusal) => {
                theirs.remove(id);
                Err(refusal)
            }
        }
    }

    /// Whose proofs this end has shown, and whose it has seen.
    pub fn met(&self) -> [Vec<SpiffeId>; 2] {
        [lock(&self.ours).keys().cloned().collect(), lock(&self.theirs).keys().cloned().collect()]
    }

    /// Whether the peer has failed so often that the connection shall end.
    pub fn is_hopeless(&self) -> bool {
        self.failures.load(Ordering::Relaxed) >= MAX_FAILURES
    }

    /// What the streams that rest on the same two certificates share: cut when one of them is revoked.
    pub fn lease(&self, theirs: &Arc<Verified>, ours: &Arc<X509Svid>) -> Arc<Lease> {
        let mut streams = lock(&self.streams);
        let pair = (theirs.leaf.serial.clone(), ours.generation());
        if let Some(lease) = streams.get(&pair).and_then(|streams| streams.lease.upgrade()) {
            return lease;
        }
        // Pairs without streams leave now and then, so that the table follows what is open.
        if streams.len() >= 64 && streams.len().is_power_of_two() {
            streams.retain(|_, streams| streams.lease.strong_count() > 0);
        }
        let lease = Arc::new(Lease::default());
        let row =
            Streams { lease: Arc::downgrade(&lease), theirs: Arc::clone(theirs), ours: Arc::clone(ours) };
        streams.insert(pair, row);
        lease
    }

    /// Cuts the streams whose identities are revoked now; says why, if there are any.
    pub fn cut_revoked(&self, trust: &Snapshot) -> Option<Revoked> {
        let mut first = None;
        lock(&self.streams).retain(|_, streams| {
            let revoked = trust.revoked(&streams.theirs.leaf).or_else(|| trust.revoked(streams.ours.leaf()));
            let Some(revoked) = revoked else { return true };
            // The other end may have been quicker, and no stream be left here.
            if let Some(lease) = streams.lease.upgrade() {
                lease.cut();
            }
            first.get_or_insert(revoked);
            false
        });
        first
    }

    /// Cuts every stream: the connection itself rests on something that is revoked.
    pub fn cut_all(&self) {
        for (_, streams) in lock(&self.streams).drain() {
            if let Some(lease) = streams.lease.upgrade() {
                lease.cut();
            }
        }
    }
}

fn verifier(roots: &Arc<Roots>) -> Arc<PeerVerifier> {
    PeerVerifier::under(Arc::clone(roots), Expected::Member, None)
}

fn room(held: usize) -> Result<(), Refusal> {
    if held < MAX_IDENTITIES {
        return Ok(());
    }
    let detail = format!("more than {MAX_IDENTITIES} identities on one connection");
    Err(Refusal { reason: Reason::Overload, detail })
}

/// Entries are whole at every instant, so a panic elsewhere leaves good ones.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::TrustDomain;
    use crate::identity::revocation::Subject;
    use crate::issue::Keypair;
    use crate::trust::Trust;

    /// Both ends of one connection, and the client's workload.
    struct Scene {
        ca: Ca,
        trust: Arc<Trust>,
        client: Arc<Proofs>,
        server: Arc<Proofs>,
        web: Arc<X509Svid>,
    }

    impl Scene {
        fn new() -> Self {
            let domain = TrustDomain::parse("td.test").unwrap();
            let ca = Ca::from_pem(domain.clone(), &create_root(&domain, SystemTime::now()).unwrap()).unwrap();
            let [one, two] = ["n1", "n2"].map(|node| SpiffeId::node(&domain, node).unwrap());
            let binding = Binding { exporter: [7; 32], client: one, server: two };
            Self {
                trust: Trust::new(ca.bundle().clone()),
                client: Proofs::new(binding.clone(), Side::Client),
                server: Proofs::new(binding, Side::Server),
                web: svid(&ca, "web"),
                ca,
            }
        }

        fn roots(&self) -> Arc<Roots> {
            Roots::new(&self.trust.snapshot().bundle, None).unwrap()
        }

        fn learn(&self) -> Result<Arc<Verified>, Refusal> {
            let header = &self.client.show(&self.web).unwrap().header;
            self.server.learn(header.as_bytes(), &self.trust.snapshot(), &self.roots(), now())
        }

        fn knows(&self) -> Result<Arc<Verified>, Reason> {
            let known = self.server.knows(self.web.id(), &self.trust.snapshot(), &self.roots(), now());
            known.map_err(|refusal| refusal.reason)
        }
    }

    fn svid(ca: &Ca, name: &str) -> Arc<X509Svid> {
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let id = SpiffeId::workload(ca.domain(), "shop", name).unwrap();
        let chain = ca.issue(&proven, &id, Duration::from_secs(600), SystemTime::now()).unwrap();
        Arc::new(key.with_chain(chain).unwrap())
    }

    fn now() -> UnixTime {
        UnixTime::since_unix_epoch(SystemTime::now().duration_since(UNIX_EPOCH).unwrap())
    }

    #[test]
    fn a_proof_is_signed_once_and_may_come_again() {
        let scene = Scene::new();
        assert_eq!(scene.knows().unwrap_err(), Reason::Unproven);
        let first = scene.client.show(&scene.web).unwrap();
        assert_eq!(first.header, scene.client.show(&scene.web).unwrap().header, "the same signature");
        for _ in 0..3 {
            assert_eq!(scene.learn().unwrap().leaf.id, *scene.web.id());
        }
        assert_eq!(scene.knows().unwrap().leaf.id, *scene.web.id());
    }

    #[test]
    fn other_roots_have_what_was_proven_judged_anew() {
        let scene = Scene::new();
        scene.learn().unwrap();
        let other = Scene::new();
        scene.trust.set_bundle(other.ca.bundle().clone());
        assert_eq!(scene.knows().unwrap_err(), Reason::UnknownIssuer);
    }

    #[test]
    fn a_revoked_workloads_streams_are_cut_and_no_others() {
        let scene = Scene::new();
        let web = scene.learn().unwrap();
        let (own, other) = (svid(&scene.ca, "api"), svid(&scene.ca, "db"));
        let shown = scene.client.show(&other).unwrap();
        let db = scene.server.learn(shown.header.as_bytes(), &scene.trust.snapshot(), &scene.roots(), now());
        let (cut, left) = (scene.server.lease(&web, &own), scene.server.lease(&db.unwrap(), &own));
        let mut list = crate::identity::revocation::Revocations::default();
        list.revoke(Subject::SpiffeId(scene.web.id().clone()), SystemTime::now()).unwrap();
        scene.trust.set_revocations(list);
        assert!(scene.server.cut_revoked(&scene.trust.snapshot()).is_some());
        assert!(cut.is_cut() && !left.is_cut());
        assert_eq!(scene.knows().unwrap_err(), Reason::Revoked);
    }

    #[test]
    fn a_peer_that_sends_rubbish_is_hopeless_in_the_end() {
        let scene = Scene::new();
        for tried in 0..MAX_FAILURES {
            assert!(!scene.server.is_hopeless(), "after {tried}");
            let learnt = scene.server.learn(b"AQ", &scene.trust.snapshot(), &scene.roots(), now());
            assert_eq!(learnt.unwrap_err().reason, Reason::BadProof);
        }
        assert!(scene.server.is_hopeless());
    }
}
