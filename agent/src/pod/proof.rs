//! Whether a local workload's SVID proves it, by the rules that its peers hold it to in a TLS handshake.
//!
//! The agent has the key of both ends, so nothing is signed here: that key and certificate belong
//! together was checked when the SVID was made (`X509Svid::new`). Chain, validity and identity are
//! verified by the verifier of the tunnel itself.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use rustls::Error;

use crate::directory::Workload;
use crate::tls;
use crate::tls::roots::{Usage, Verified, unix};
use crate::tls::verify::PeerVerifier;
use crate::trust::Snapshot;
use crate::verdict::Reason;

/// Why a workload is not believed: the label, and what an operator needs to know.
pub type Refusal = (Reason, String);

/// What was verified last, as a client and as a server.
#[derive(Debug, Default)]
pub(super) struct Proof([ArcSwapOption<Known>; 2]);

#[derive(Debug)]
struct Known {
    /// Generation of the SVID, epoch of the bundle and its revocations.
    made_from: (u64, u64),
    verified: Arc<Verified>,
}

impl Proof {
    pub(super) fn check(
        &self,
        workload: &Workload,
        usage: Usage,
        trust: &Snapshot,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let id = &workload.id;
        let svid = trust
            .svids
            .get(id)
            .ok_or_else(|| (Reason::NoSvid, format!("no SVID has been issued for {id} yet")))?;
        let wanted = (svid.generation(), trust.bundle_epoch);
        let now = unix(now);
        let known = &self.0[usage as usize];
        let holds =
            |k: &Arc<Known>| k.made_from == wanted && (k.verified.from..=k.verified.until).contains(&now);
        if known.load().as_ref().is_some_and(holds) {
            return Ok(());
        }
        let verify = |verifier: Arc<PeerVerifier>| {
            let chain = &svid.certified_key().cert;
            let (leaf, intermediates) = chain.split_first().ok_or(Error::NoCertificatesPresented)?;
            verifier.verify(leaf, intermediates, now, usage)
        };
        let verified =
            PeerVerifier::new(&trust.bundle, Some(id.clone())).and_then(verify).map_err(|error| {
                let error = io::Error::other(error);
                (tls::reason(&error), format!("the SVID held for {id}: {}", tls::explain(&error)))
            })?;
        known.store(Some(Known { made_from: wanted, verified }.into()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
                exclusions: Arc::default(),
                svid_lifetime: None,
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
            let said = [Usage::Client, Usage::Server].map(|usage| {
                self.proof.check(&self.workload, usage, &self.trust.snapshot(), now).map_err(|(why, _)| why)
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
