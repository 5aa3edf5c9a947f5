//! A trust bundle ready to verify with, and the chains that it has verified.
//!
//! A chain that was good under these roots is good until the first of its certificates expires, so
//! its signatures are not computed again until then. What was verified belongs to the roots it was
//! verified with: other roots are another value of this type, which begins with nothing. Who the
//! peer may be is not decided here.

use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{Context, SHA256};
use rustls::crypto::WebPkiSupportedAlgorithms;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, Error, OtherError, RootCertStore};
use webpki::{EndEntityCert, KeyUsage};

use super::bounded::Bounded;
use super::provider::provider;
use super::verify::Misidentified;
use crate::identity::TrustDomain;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::Revoked;
use crate::identity::svid::{Leaf, SvidError, validity};
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
    /// From when all of its certificates are valid.
    pub from: UnixTime,
    /// Until when all of them are.
    pub until: UnixTime,
}

/// The roots of one trust bundle.
#[derive(Debug)]
pub struct Roots {
    anchors: RootCertStore,
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
        let anchors = bundle.anchors().map_err(|e| Error::General(e.to_string()))?;
        let mut roots: Vec<&[u8]> = bundle.roots().iter().map(AsRef::as_ref).collect();
        roots.sort_unstable();
        let parts: Vec<&[u8]> = [bundle.domain().as_str().as_bytes()].into_iter().chain(roots).collect();
        Ok(Arc::new(Self {
            anchors,
            algorithms: provider().signature_verification_algorithms,
            digest: digest(&parts),
            bundle: bundle.clone(),
            chains: Mutex::new(Bounded::new(MAX_CHAINS)),
            observe,
        }))
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        self.bundle.domain()
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

    /// Whether the chain leads to a root now, and its leaf is an X.509-SVID (X509-SVID, section 5.1).
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
        certificate
            .verify_for_usage(algorithms, &self.anchors.roots, intermediates, now, usage, None, None)
            .map_err(webpki_error)?;
        let not_an_svid = |e: SvidError| {
            let other = OtherError(Arc::new(Misidentified::NotAnSvid(e)));
            Error::InvalidCertificate(CertificateError::Other(other))
        };
        let parsed = Leaf::from_chain(leaf, intermediates).map_err(not_an_svid)?;
        let (mut from, mut until) = (parsed.not_before, parsed.not_after);
        for intermediate in intermediates {
            let (begins, ends) = validity(intermediate).map_err(not_an_svid)?;
            (from, until) = (from.max(begins), until.min(ends));
        }
        Ok(Verified { leaf: parsed, from: unix(from), until: unix(until) })
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
    use crate::identity::SpiffeId;
    use crate::issue::Keypair;

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
}
