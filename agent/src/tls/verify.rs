//! Who the peer is: chain to the trust bundle, then exactly one SPIFFE ID, then the right one, and
//! none of it revoked.
//!
//! Host names play no part. An identity is compared as a whole value (`SpiffeId`), after the chain
//! was verified, on the very bytes that were verified. A resumed session is judged by this same code,
//! on the chain of the handshake that it goes back to.

use std::sync::Arc;

use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};

use super::roots::{Digest, Roots, Usage, Verified};
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::{Leaf, SvidError};
use crate::identity::{SpiffeId, TrustDomain};
use crate::verdict::Reason;

/// A peer whose chain is good but who is not who it has to be.
#[derive(Debug, thiserror::Error)]
pub enum Misidentified {
    /// The certificate breaks a rule of the X509-SVID specification.
    #[error("the peer's certificate is not an X.509-SVID")]
    NotAnSvid(#[source] SvidError),
    /// An identity of a trust domain whose identities are not accepted here.
    #[error("the peer is {got}, whose trust domain is not {expected}, nor one that may come here")]
    TrustDomain {
        /// Our trust domain.
        expected: TrustDomain,
        /// The identity it presented.
        got: SpiffeId,
    },
    /// Somebody else.
    #[error("the peer is {got}, but the directory says that {expected} must answer there")]
    Identity {
        /// Who must be there.
        expected: SpiffeId,
        /// The identity it presented.
        got: SpiffeId,
    },
    /// A workload where a node's agent must answer.
    #[error("the peer is {0}, which is no node's agent")]
    NotANode(SpiffeId),
}

/// A peer that is who it says, and is refused all the same.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct Refused {
    /// For metrics and logs.
    pub reason: Reason,
    /// In words; names the peer.
    pub detail: String,
}

/// What has to hold of a peer beside its chain and identity, such as that it is not revoked and that
/// some policy lets it in. Asked in full handshakes and whenever a session is resumed.
pub trait Judge: std::fmt::Debug + Send + Sync {
    /// Whether this peer may be spoken to now.
    ///
    /// # Errors
    /// Says why not.
    fn judge(&self, peer: &Leaf, now: UnixTime) -> Result<(), Refused>;

    /// Names the rules by their content: a session that began under others is not resumed.
    fn digest(&self) -> Digest;
}

/// Who a peer may be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Expected {
    /// Anyone of the trust domain, or of one that it is federated with.
    Anyone,
    /// Anyone of the trust domain.
    Member,
    /// Any node agent of the trust domain.
    Node,
    /// Nobody else.
    Exactly(SpiffeId),
}

/// Verifies peers against one trust bundle. An identity of an alias counts as that of our own trust domain.
#[derive(Debug)]
pub struct PeerVerifier {
    pub(super) roots: Arc<Roots>,
    expected: Expected,
    judge: Option<Arc<dyn Judge>>,
    /// Whether a client without a certificate is let in, as nobody.
    anonymous_clients: bool,
}

impl PeerVerifier {
    /// Accepts peers of the bundle's trust domain; only `expected`, if that is given.
    ///
    /// # Errors
    /// When a root of the bundle is unusable; see [`TrustBundle::anchors`].
    pub fn new(bundle: &TrustBundle, expected: Option<SpiffeId>) -> Result<Arc<Self>, Error> {
        let expected = expected.map_or(Expected::Member, Expected::Exactly);
        Ok(Self::under(Roots::new(bundle, None)?, expected, None))
    }

    /// Accepts clients of the trust domain, and clients without a certificate: a node that joins has
    /// none yet. What they may ask is decided by whoever serves them.
    ///
    /// # Errors
    /// When a root of the bundle is unusable; see [`TrustBundle::anchors`].
    pub fn with_anonymous_clients(bundle: &TrustBundle) -> Result<Arc<Self>, Error> {
        let (roots, expected) = (Roots::new(bundle, None)?, Expected::Member);
        Ok(Arc::new(Self { roots, expected, judge: None, anonymous_clients: true }))
    }

    /// Accepts whom `expected` names and `judge`, if there is one, lets in.
    pub fn under(roots: Arc<Roots>, expected: Expected, judge: Option<Arc<dyn Judge>>) -> Arc<Self> {
        Arc::new(Self { roots, expected, judge, anonymous_clients: false })
    }

    /// The state of trust that peers are verified against, by its content.
    pub(super) fn epoch(&self) -> [Digest; 2] {
        [*self.roots.digest(), self.judge.as_ref().map_or([0; 32], |judge| judge.digest())]
    }

    /// Chain, then identity (X509-SVID, section 5.1), then revocation, then whatever else has to hold.
    ///
    /// # Errors
    /// In rustls' words; see [`super::rustls_reason`].
    pub fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: Usage,
    ) -> Result<Arc<Verified>, Error> {
        let verified = self.roots.verify(leaf, intermediates, now, usage)?;
        self.identify(&verified).map_err(|who| refuse(Arc::new(who)))?;
        if let Some(revoked) = self.roots.revoked(&verified.leaf) {
            // rustls' error for this tells the peer by the right alert, but has no room for words.
            tracing::warn!(%revoked, "a peer presented a revoked certificate");
            return Err(Error::InvalidCertificate(CertificateError::Revoked));
        }
        if let Some(judge) = &self.judge {
            judge.judge(&verified.leaf, now).map_err(|why| refuse(Arc::new(why)))?;
        }
        Ok(verified)
    }

    /// Its trust domain's own roots have spoken for it.
    fn identify(&self, peer: &Verified) -> Result<(), Misidentified> {
        let got = peer.leaf.id.clone();
        let is_ours = self.roots.is_ours(&got);
        match &self.expected {
            Expected::Member | Expected::Node if !is_ours => {
                Err(Misidentified::TrustDomain { expected: self.roots.domain().clone(), got })
            }
            Expected::Node if got.node_name().is_none() => Err(Misidentified::NotANode(got)),
            Expected::Exactly(expected) if *self.roots.canonical(expected) != peer.id => {
                Err(Misidentified::Identity { expected: expected.clone(), got })
            }
            _ => Ok(()),
        }
    }
}

fn refuse(why: Arc<dyn std::error::Error + Send + Sync>) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(why)))
}

/// What rustls asks alike of whoever verifies servers or clients: TLS 1.3's signatures with our
/// provider's algorithms, which stand in the named field, and none of TLS 1.2.
macro_rules! signatures {
    ($tls12:ident, $($algorithms:ident).+) => {
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            Err(rustls::PeerIncompatible::$tls12.into())
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            leaf: &rustls::pki_types::CertificateDer<'_>,
            signature: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            rustls::crypto::verify_tls13_signature(message, leaf, signature, &self.$($algorithms).+)
        }

        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.$($algorithms).+.supported_schemes()
        }
    };
}
pub(super) use signatures;

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, intermediates, now, Usage::Server)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!(ServerTlsVersionIsDisabledByOurConfig, roots.algorithms);
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A hint would tell strangers our roots' names and make every handshake larger.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.anonymous_clients
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.verify(leaf, intermediates, now, Usage::Client)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!(Tls12NotOfferedOrEnabled, roots.algorithms);
}
