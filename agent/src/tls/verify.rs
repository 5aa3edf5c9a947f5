//! Who the peer is: chain to the trust bundle, then exactly one SPIFFE ID, then the right one, and
//! none of it revoked.
//!
//! Host names play no part. An identity is compared as a whole value (`SpiffeId`), after the chain
//! was verified, on the very bytes that were verified.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    RootCertStore, SignatureScheme,
};
use webpki::{EndEntityCert, KeyUsage};

use super::provider::provider;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::{Revocations, Revoked};
use crate::identity::svid::{Leaf, SvidError};
use crate::identity::{SpiffeId, TrustDomain};

/// A peer whose chain is good but who is not who it has to be.
#[derive(Debug, thiserror::Error)]
pub enum Misidentified {
    /// The certificate breaks a rule of the X509-SVID specification.
    #[error("the peer's certificate is not an X.509-SVID")]
    NotAnSvid(#[source] SvidError),
    /// Another trust domain's identity under our roots.
    #[error("the peer is {got}, which is not in trust domain {expected}")]
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
}

/// Verifies peers against one trust bundle.
#[derive(Debug)]
pub struct PeerVerifier {
    roots: RootCertStore,
    domain: TrustDomain,
    revocations: Arc<Revocations>,
    /// The only identity accepted; `None` accepts any of the trust domain.
    expected: Option<SpiffeId>,
    /// Whether a client without a certificate is let in, as nobody.
    anonymous_clients: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PeerVerifier {
    /// Accepts peers of the bundle's trust domain; only `expected`, if that is given.
    ///
    /// # Errors
    /// When a root of the bundle is unusable; see [`TrustBundle::anchors`].
    pub fn new(bundle: &TrustBundle, expected: Option<SpiffeId>) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self::build(bundle, expected, false)?))
    }

    /// Accepts clients of the trust domain, and clients without a certificate: a node that joins has
    /// none yet. What they may ask is decided by whoever serves them.
    ///
    /// # Errors
    /// When a root of the bundle is unusable; see [`TrustBundle::anchors`].
    pub fn with_anonymous_clients(bundle: &TrustBundle) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self::build(bundle, None, true)?))
    }

    fn build(
        bundle: &TrustBundle,
        expected: Option<SpiffeId>,
        anonymous_clients: bool,
    ) -> Result<Self, Error> {
        let roots = bundle.anchors().map_err(|e| Error::General(e.to_string()))?;
        let algorithms = provider().signature_verification_algorithms;
        let (domain, revocations) = (bundle.domain().clone(), Arc::clone(bundle.revocations()));
        Ok(Self { roots, domain, revocations, expected, anonymous_clients, algorithms })
    }

    /// Chain, then identity (X509-SVID, section 5.1), then revocation.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), Error> {
        let certificate = EndEntityCert::try_from(leaf).map_err(webpki_error)?;
        certificate
            .verify_for_usage(self.algorithms.all, &self.roots.roots, intermediates, now, usage, None, None)
            .map_err(webpki_error)?;
        let leaf = Leaf::from_der(leaf).map_err(Misidentified::NotAnSvid).and_then(|leaf| {
            self.identify(leaf.id.clone())?;
            Ok(leaf)
        });
        let leaf = leaf
            .map_err(|who| Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(who)))))?;
        match self.revoked(&leaf) {
            None => Ok(()),
            Some(revoked) => {
                // rustls' error for this tells the peer by the right alert, but has no room for words.
                tracing::warn!(%revoked, "a peer presented a revoked certificate");
                Err(Error::InvalidCertificate(CertificateError::Revoked))
            }
        }
    }

    /// Whether this certificate, its identity or its node has been revoked.
    pub fn revoked(&self, leaf: &Leaf) -> Option<Revoked> {
        self.revocations.judge(leaf)
    }

    fn identify(&self, got: SpiffeId) -> Result<(), Misidentified> {
        if got.trust_domain() != self.domain.as_str() {
            return Err(Misidentified::TrustDomain { expected: self.domain.clone(), got });
        }
        match &self.expected {
            Some(expected) if *expected != got => {
                Err(Misidentified::Identity { expected: expected.clone(), got })
            }
            _ => Ok(()),
        }
    }
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

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.verify(leaf, intermediates, now, KeyUsage::server_auth())?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
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
        self.verify(leaf, intermediates, now, KeyUsage::client_auth())?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOfferedOrEnabled.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
