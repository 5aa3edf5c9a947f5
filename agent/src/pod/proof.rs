//! Whether a local workload's SVID proves it, by the rules that its peers hold it to in a TLS handshake.
//!
//! The agent has the key of both ends, so nothing is signed here: that key and certificate belong
//! together was checked when the SVID was made (`X509Svid::new`). Chain, validity and identity are
//! verified by the verifier of the tunnel itself.

use std::io;
use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::{CertificateError, Error};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::directory::Workload;
use crate::tls;
use crate::tls::verify::PeerVerifier;
use crate::trust::Snapshot;
use crate::verdict::Reason;

/// The side of a connection that a workload would be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It opens the connection.
    Client,
    /// It is asked.
    Server,
}

/// Why a workload is not believed: the label, and what an operator needs to know.
pub type Refusal = (Reason, String);

/// What was verified last, for each side.
#[derive(Debug, Default)]
pub(super) struct Proof([ArcSwapOption<Verified>; 2]);

#[derive(Debug)]
struct Verified {
    /// Generation of the SVID, epoch of the bundle.
    made_from: (u64, u64),
    /// When every certificate of the chain is valid.
    valid: Range<SystemTime>,
}

impl Proof {
    pub(super) fn check(
        &self,
        workload: &Workload,
        side: Side,
        trust: &Snapshot,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let id = &workload.id;
        let svid = trust
            .svids
            .get(id)
            .ok_or_else(|| (Reason::NoSvid, format!("no SVID has been issued for {id} yet")))?;
        let wanted = (svid.generation(), trust.bundle_epoch);
        let verified = &self.0[side as usize];
        if verified.load().as_ref().is_some_and(|v| v.made_from == wanted && v.valid.contains(&now)) {
            return Ok(());
        }
        let valid = PeerVerifier::new(&trust.bundle, Some(id.clone()))
            .and_then(|verifier| verify(&verifier, side, &svid.certified_key().cert, now))
            .map_err(|error| {
                let error = io::Error::other(error);
                (tls::reason(&error), format!("the SVID held for {id}: {}", tls::explain(&error)))
            })?;
        verified.store(Some(Verified { made_from: wanted, valid }.into()));
        Ok(())
    }
}

/// Verifies a chain as the other side would; says when all of it is valid.
fn verify(
    verifier: &PeerVerifier,
    side: Side,
    chain: &[CertificateDer<'_>],
    now: SystemTime,
) -> Result<Range<SystemTime>, Error> {
    let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
    let at = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default());
    match side {
        Side::Client => verifier.verify_client_cert(leaf, intermediates, at).map(|_| ())?,
        Side::Server => {
            // As in the dialler, the name only fills the API's place.
            let nobody = ServerName::IpAddress(std::net::IpAddr::from([0, 0, 0, 0]).into());
            verifier.verify_server_cert(leaf, intermediates, &nobody, &[], at).map(|_| ())?;
        }
    }
    validity(chain)
}

/// When every certificate of a chain is valid.
fn validity(chain: &[CertificateDer<'_>]) -> Result<Range<SystemTime>, Error> {
    let time = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let mut all = UNIX_EPOCH..time(i64::MAX);
    for certificate in chain {
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|_| Error::InvalidCertificate(CertificateError::BadEncoding))?;
        let validity = certificate.validity();
        all.start = all.start.max(time(validity.not_before.timestamp()));
        all.end = all.end.min(time(validity.not_after.timestamp()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::directory::Mode;
    use crate::identity::{SpiffeId, TrustDomain};
    use crate::issue::Keypair;
    use crate::trust::Trust;

    const HOUR: Duration = Duration::from_secs(3600);

    struct Scene {
        ca: Ca,
        trust: Arc<Trust>,
        workload: Workload,
        proof: Proof,
        now: SystemTime,
    }

    impl Scene {
        fn new() -> Self {
            let now = SystemTime::now();
            let ca = new_ca(now);
            let id = SpiffeId::workload(&domain(), "demo", "web").unwrap();
            let workload = Workload {
                name: "web-0".into(),
                namespace: "demo".into(),
                id,
                node: "n1".into(),
                addresses: vec![[10, 1, 1, 2].into()],
                mode: Mode::Strict,
                netns: None,
            };
            let trust = Trust::new(ca.bundle().clone());
            Self { trust, ca, workload, proof: Proof::default(), now }
        }

        /// Gives the agent an SVID for the workload, signed by `ca` at a time.
        fn issue(&self, ca: &Ca, at: SystemTime) {
            let key = Keypair::generate().unwrap();
            let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
            let chain = ca.issue(&proven, &self.workload.id, HOUR, at).unwrap();
            self.trust.insert(key.with_chain(chain).unwrap());
        }

        /// What either side says at a time; it must be the same.
        fn at(&self, now: SystemTime) -> Result<(), Reason> {
            let said = [Side::Client, Side::Server].map(|side| {
                self.proof.check(&self.workload, side, &self.trust.snapshot(), now).map_err(|(why, _)| why)
            });
            assert_eq!(said[0], said[1], "as client and as server");
            said[0]
        }
    }

    fn domain() -> TrustDomain {
        TrustDomain::parse("td.test").unwrap()
    }

    fn new_ca(now: SystemTime) -> Ca {
        Ca::from_pem(domain(), &create_root(&domain(), now).unwrap()).unwrap()
    }

    #[test]
    fn an_svid_proves_from_its_issuance_to_its_expiry_and_no_longer() {
        let scene = Scene::new();
        assert_eq!(scene.at(scene.now), Err(Reason::NoSvid));
        scene.issue(&scene.ca, scene.now);
        assert_eq!(scene.at(scene.now), Ok(()));
        assert_eq!(scene.at(scene.now + HOUR / 2), Ok(()));
        assert_eq!(scene.at(scene.now + 2 * HOUR), Err(Reason::Expired), "though it was verified before");
        assert_eq!(scene.at(scene.now - 2 * HOUR), Err(Reason::NotYetValid));
        assert_eq!(scene.at(scene.now), Ok(()));
    }

    #[test]
    fn a_new_bundle_and_a_new_svid_are_verified_anew() {
        let scene = Scene::new();
        scene.issue(&scene.ca, scene.now);
        assert_eq!(scene.at(scene.now), Ok(()));
        let other = new_ca(scene.now);
        scene.trust.set_bundle(other.bundle().clone());
        assert_eq!(scene.at(scene.now), Err(Reason::UnknownIssuer), "its root is not trusted any more");
        scene.issue(&other, scene.now);
        assert_eq!(scene.at(scene.now), Ok(()));
        scene.issue(&scene.ca, scene.now);
        assert_eq!(scene.at(scene.now), Err(Reason::UnknownIssuer), "renewed by a CA that is not trusted");
        scene.trust.retain(|_| false);
        assert_eq!(scene.at(scene.now), Err(Reason::NoSvid));
    }
}
