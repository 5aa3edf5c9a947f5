//! A trust bundle ready to verify with, and the chains that it has verified.
//!
//! A chain is verified under the roots of the trust domain that its leaf names, and under no others: the roots
//! of another trust domain vouch for nobody of ours, nor of a third.
//!
//! A chain that was good under these roots is good until the first of its certificates expires, so
//! its signatures are not computed again until then. What was verified belongs to the roots it was
//! verified with: other roots are another value of this type, which begins with nothing. Who the
//! peer may be is not decided here.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, Error, OtherError, RootCertStore};
use webpki::{EndEntityCert, KeyUsage};

use super::bounded::Bounded;
use super::provider::provider;
use super::verify::Misidentified;
use crate::identity::bundle::{BundleError, TrustBundle};
use crate::identity::revocation::Revoked;
use crate::identity::svid::{Leaf, SvidError, validity};
use crate::identity::{SpiffeId, TrustDomain};
use crate::telemetry::Observe;

/// Most verified chains remembered, some 300 bytes each: the peers of a busy node.
const MAX_CHAINS: usize = 4_096;

/// SHA-256.
pub type Digest = [u8; 32];

/// What a chain is presented for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// By a server.
    Server,
    /// By a client.
    Client,
}

/// A chain that leads to the roots, and for how long it does.
#[derive(Debug)]
pub struct Verified {
    /// What its leaf says, which can be believed now.
    pub leaf: Leaf,
    /// Whom it is taken for: an identity of an alias is that of our own trust domain.
    pub id: SpiffeId,
    /// From when all of its certificates are valid.
    pub from: UnixTime,
    /// Until when all of them are.
    pub until: UnixTime,
}

/// The roots of one trust bundle.
#[derive(Debug)]
pub struct Roots {
    anchors: RootCertStore,
    /// Those of other trust domains, and of aliases of ours that have roots of their own.
    others: HashMap<TrustDomain, RootCertStore>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
    digest: Digest,
    bundle: TrustBundle,
    chains: Mutex<Bounded<Digest, Arc<Verified>>>,
    observe: Option<Observe>,
}

impl Roots {
    /// The bundle's roots; reports to `observe` whether a chain was remembered.
    ///
    /// # Errors
    /// When a root of the bundle is unusable; see [`TrustBundle::anchors`].
    pub fn new(bundle: &TrustBundle, observe: Option<Observe>) -> Result<Arc<Self>, Error> {
        let unusable = |e: BundleError| Error::General(e.to_string());
        let federated = bundle.federation().into_iter().flat_map(|federation| federation.iter());
        // Nobody else's roots are ours, whatever a list says.
        let federated: Vec<_> = federated.filter(|(domain, _)| *domain != bundle.domain()).collect();
        let others = federated
            .iter()
            .map(|(domain, federated)| federated.anchors().map(|anchors| ((*domain).clone(), anchors)))
            .collect::<Result<_, _>>()
            .map_err(unusable)?;
        let own = named(bundle.domain(), bundle.roots());
        let aliases = bundle.aliases().iter().map(|alias| digest(&[b"alias", alias.as_str().as_bytes()]));
        let federated = federated.iter().map(|(domain, federated)| named(domain, federated.roots()));
        let more: Vec<Digest> = aliases.chain(federated).collect();
        Ok(Arc::new(Self {
            anchors: bundle.anchors().map_err(unusable)?,
            others,
            algorithms: provider().signature_verification_algorithms,
            digest: match more.is_empty() {
                true => own,
                false => {
                    let parts = [&own].into_iter().chain(&more).map(|part| part.as_slice());
                    digest(&parts.collect::<Vec<_>>())
                }
            },
            bundle: bundle.clone(),
            chains: Mutex::new(Bounded::new(MAX_CHAINS)),
            observe,
        }))
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        self.bundle.domain()
    }

    /// Whom an identity is taken for; see [`TrustBundle::canonical`].
    pub fn canonical<'a>(&self, id: &'a SpiffeId) -> Cow<'a, SpiffeId> {
        self.bundle.canonical(id)
    }

    /// Whether an identity is of our own trust domain, by whichever name.
    pub fn is_ours(&self, id: &SpiffeId) -> bool {
        self.bundle.is_ours(id)
    }

    /// The roots that speak for an identity. An alias without any of its own is ours to speak for.
    fn speaking_for(&self, id: &SpiffeId) -> Option<&RootCertStore> {
        let theirs = self.others.get(id.trust_domain());
        theirs.or_else(|| self.is_ours(id).then_some(&self.anchors))
    }

    /// Names the roots by their content: the same in every agent, and over restarts.
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Whether this certificate, its identity or its node has been revoked. Not part of the digest:
    /// a revocation concerns those it names, and a session of theirs is judged whenever it resumes.
    pub fn revoked(&self, leaf: &Leaf) -> Option<Revoked> {
        self.bundle.judge(leaf)
    }

    /// Whether the chain leads now to a root of the trust domain that its leaf names, and the leaf is an X.509-SVID
    /// (X509-SVID, section 5.1).
    ///
    /// # Errors
    /// In rustls' words.
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: Usage,
    ) -> Result<Arc<Verified>, Error> {
        let name = name(leaf, intermediates, usage);
        let known = self.chains().get(&name);
        if let Some(known) = known
            && known.from <= now
            && now <= known.until
        {
            self.count(true);
            return Ok(known);
        }
        self.count(false);
        // One that is out of its time is judged anew too, so that the error is the right one.
        let verified = Arc::new(self.judge(leaf, intermediates, now, usage)?);
        self.chains().insert(name, Arc::clone(&verified));
        Ok(verified)
    }

    fn judge(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: Usage,
    ) -> Result<Verified, Error> {
        let certificate = EndEntityCert::try_from(leaf).map_err(webpki_error)?;
        let usage = match usage {
            Usage::Server => KeyUsage::server_auth(),
            Usage::Client => KeyUsage::client_auth(),
        };
        let algorithms = self.algorithms.all;
        // Whose roots count is all that is taken from it before they have spoken.
        let claimed = Leaf::from_chain(leaf, intermediates);
        let speaking = claimed.as_ref().ok().and_then(|claimed| self.speaking_for(&claimed.id));
        // Where nobody can speak for it, the error is about the chain first, and then about what it claims.
        let roots = &speaking.unwrap_or(&self.anchors).roots;
        certificate
            .verify_for_usage(algorithms, roots, intermediates, now, usage, None, None)
            .map_err(webpki_error)?;
        let misidentified = |who: Misidentified| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(who))))
        };
        let not_an_svid = |e: SvidError| misidentified(Misidentified::NotAnSvid(e));
        let parsed = claimed.map_err(not_an_svid)?;
        if speaking.is_none() {
            let (expected, got) = (self.domain().clone(), parsed.id);
            return Err(misidentified(Misidentified::TrustDomain { expected, got }));
        }
        let id = self.canonical(&parsed.id).into_owned();
        let (mut from, mut until) = (parsed.not_before, parsed.not_after);
        for intermediate in intermediates {
            let (begins, ends) = validity(intermediate).map_err(not_an_svid)?;
            (from, until) = (from.max(begins), until.min(ends));
        }
        Ok(Verified { leaf: parsed, id, from: unix(from), until: unix(until) })
    }

    fn chains(&self) -> std::sync::MutexGuard<'_, Bounded<Digest, Arc<Verified>>> {
        // Entries are whole at every instant.
        self.chains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, known: bool) {
        if let Some(observe) = &self.observe {
            observe.chain(known);
        }
    }
}

/// A digest of parts that no other parts have: each is preceded by its length.
pub fn digest(parts: &[&[u8]]) -> Digest {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

/// Names one trust domain's roots, in whatever order they are.
fn named(domain: &TrustDomain, roots: &[CertificateDer<'_>]) -> Digest {
    let mut roots: Vec<&[u8]> = roots.iter().map(AsRef::as_ref).collect();
    roots.sort_unstable();
    let parts: Vec<&[u8]> = [domain.as_str().as_bytes()].into_iter().chain(roots).collect();
    digest(&parts)
}

fn name(leaf: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>], usage: Usage) -> Digest {
    let usage: &[u8] = match usage {
        Usage::Server => b"server",
        Usage::Client => b"client",
    };
    let parts: Vec<&[u8]> =
        [usage, leaf.as_ref()].into_iter().chain(intermediates.iter().map(AsRef::as_ref)).collect();
    digest(&parts)
}

/// Whole seconds, as rustls counts them; certificates have no finer ones.
pub(crate) fn unix(time: std::time::SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default())
}

/// rustls' own words for the webpki errors that operators tell apart.
fn webpki_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    Error::InvalidCertificate(match error {
        E::CertExpired { .. } => CertificateError::Expired,
        E::CertNotValidYet { .. } => CertificateError::NotValidYet,
        // A root of the right name that did not sign it is not its issuer.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => CertificateError::UnknownIssuer,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::federation::{Admit, Federated, Federation};
    use crate::issue::Keypair;
    use crate::verdict::Reason;

    #[test]
    fn a_known_chain_is_good_until_it_expires_and_under_its_own_roots_only() {
        let now = SystemTime::now();
        let domain = TrustDomain::parse("td.test").unwrap();
        let ca = || Ca::from_pem(domain.clone(), &create_root(&domain, now).unwrap()).unwrap();
        let (ours, theirs) = (ca(), ca());
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let id = SpiffeId::node(&domain, "n1").unwrap();
        let chain = ours.issue(&proven, &id, Duration::from_secs(60), now).unwrap();
        let roots = Roots::new(ours.bundle(), None).unwrap();
        let verify = |roots: &Roots, seconds| {
            let at = unix(now + Duration::from_secs(seconds));
            roots.verify(&chain[0], &chain[1..], at, Usage::Client)
        };
        let first = verify(&roots, 0).unwrap();
        assert_eq!(first.leaf.id, id);
        assert!(Arc::ptr_eq(&first, &verify(&roots, 50).unwrap()), "verified twice");
        let expired = Error::InvalidCertificate(CertificateError::Expired);
        assert_eq!(verify(&roots, 62).unwrap_err(), expired, "known, and expired");
        assert_eq!(verify(&roots, 62).unwrap_err(), expired, "and again");
        let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
        assert_eq!(verify(&Roots::new(theirs.bundle(), None).unwrap(), 0).unwrap_err(), unknown);
    }

    #[test]
    fn roots_are_named_by_their_content_in_any_order() {
        let domain = TrustDomain::parse("td.test").unwrap();
        let root = || {
            let pem = create_root(&domain, SystemTime::now()).unwrap();
            Ca::from_pem(domain.clone(), &pem).unwrap().bundle().roots()[0].clone()
        };
        let (one, two) = (root(), root());
        let digest = |roots: &[&CertificateDer<'static>]| {
            let roots = roots.iter().map(|root| (*root).clone()).collect();
            *Roots::new(&TrustBundle::new(domain.clone(), roots).unwrap(), None).unwrap().digest()
        };
        assert_eq!(digest(&[&one, &two]), digest(&[&two, &one]));
        assert_ne!(digest(&[&one, &two]), digest(&[&one]));
    }

    fn domain(name: &str) -> TrustDomain {
        TrustDomain::parse(name).unwrap()
    }

    /// A root, which can be made to sign for any trust domain.
    struct Signer(&'static str, String);

    impl Signer {
        fn as_ca_of(&self, name: &str) -> Ca {
            Ca::from_pem(domain(name), &self.1).unwrap()
        }

        fn bundle(&self) -> TrustBundle {
            self.as_ca_of(self.0).bundle().clone()
        }
    }

    fn ca(name: &'static str) -> Signer {
        Signer(name, create_root(&domain(name), SystemTime::now()).unwrap())
    }

    /// What roots say of a certificate of `named`, signed with the key of `signer`.
    fn judge(roots: &Roots, signer: &Signer, named: &str) -> Result<SpiffeId, Reason> {
        let now = SystemTime::now();
        let id = SpiffeId::workload(&domain(named), "demo", "web").unwrap();
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let chain = signer.as_ca_of(named).issue(&proven, &id, Duration::from_secs(60), now).unwrap();
        let verified = roots.verify(&chain[0], &chain[1..], unix(now), Usage::Client);
        verified.map(|verified| verified.id.clone()).map_err(|error| crate::tls::rustls_reason(&error))
    }

    fn federated(domains: &[(&str, &Signer)]) -> Arc<Federation> {
        let mut federation = Federation::default();
        for (name, ca) in domains {
            let roots = ca.bundle().roots().to_vec();
            federation.insert(domain(name), Federated::new(roots, Admit::default()).unwrap());
        }
        Arc::new(federation)
    }

    #[test]
    fn the_roots_of_a_trust_domain_speak_for_its_own_identities_and_for_no_others() {
        let (ours, theirs, third) = (ca("td.test"), ca("other.test"), ca("third.test"));
        let federation = federated(&[("other.test", &theirs), ("third.test", &third)]);
        let roots = Roots::new(&ours.bundle().with_federation(federation), None).unwrap();
        for (signer, named) in [(&ours, "td.test"), (&theirs, "other.test"), (&third, "third.test")] {
            assert_eq!(judge(&roots, signer, named).unwrap().trust_domain(), named);
        }
        for (signer, named) in [
            (&theirs, "td.test"),
            (&third, "td.test"),
            (&ours, "other.test"),
            (&third, "other.test"),
            (&theirs, "third.test"),
            (&theirs, "unknown.test"),
        ] {
            let refused = judge(&roots, signer, named).unwrap_err();
            assert_eq!(refused, Reason::UnknownIssuer, "{named} by {}", signer.0);
        }
        assert_eq!(judge(&roots, &ours, "unknown.test").unwrap_err(), Reason::OtherTrustDomain);
        // A list that names our own trust domain changes nothing for it.
        let usurped = ours.bundle().with_federation(federated(&[("td.test", &theirs)]));
        let roots = Roots::new(&usurped, None).unwrap();
        assert_eq!(judge(&roots, &theirs, "td.test").unwrap_err(), Reason::UnknownIssuer);
        judge(&roots, &ours, "td.test").unwrap();
        // One that has taken all of its roots back is trusted no more.
        let mut gone = Federation::default();
        gone.insert(domain("other.test"), Federated::new(Vec::new(), Admit::All).unwrap());
        let roots = Roots::new(&ours.bundle().with_federation(Arc::new(gone)), None).unwrap();
        assert_eq!(judge(&roots, &theirs, "other.test").unwrap_err(), Reason::UnknownIssuer);
    }

    #[test]
    fn an_alias_is_our_own_by_its_own_roots_or_by_ours_if_it_has_none() {
        let (ours, old) = (ca("td.test"), ca("old.test"));
        let bundle = ours.bundle().with_aliases([domain("old.test")].into());
        let roots = Roots::new(&bundle, None).unwrap();
        assert_eq!(judge(&roots, &ours, "old.test").unwrap().trust_domain(), "td.test");
        assert_eq!(judge(&roots, &old, "old.test").unwrap_err(), Reason::UnknownIssuer);
        let roots = Roots::new(&bundle.with_federation(federated(&[("old.test", &old)])), None).unwrap();
        assert_eq!(judge(&roots, &old, "old.test").unwrap().trust_domain(), "td.test");
        assert_eq!(judge(&roots, &ours, "old.test").unwrap_err(), Reason::UnknownIssuer);
        assert_eq!(judge(&roots, &old, "td.test").unwrap_err(), Reason::UnknownIssuer);
    }

    #[test]
    fn other_trust_domains_and_aliases_are_part_of_what_names_the_roots() {
        let (ours, theirs, newer) = (ca("td.test"), ca("other.test"), ca("other.test"));
        let digest = |bundle: TrustBundle| *Roots::new(&bundle, None).unwrap().digest();
        let bundle = || ours.bundle();
        let with = |domains: &[(&str, &Signer)]| digest(bundle().with_federation(federated(domains)));
        assert_eq!(digest(bundle()), with(&[]));
        let all = [
            digest(bundle()),
            digest(bundle().with_aliases([domain("other.test")].into())),
            with(&[("other.test", &theirs)]),
            with(&[("other.test", &newer)]),
            with(&[("third.test", &theirs)]),
            with(&[("other.test", &theirs), ("third.test", &newer)]),
        ];
        let different: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(different.len(), all.len());
    }
}
