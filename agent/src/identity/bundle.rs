//! A trust bundle: the roots of one trust domain, and what of theirs is revoked.
//!
//! All in one value, so that no verifier can be built from roots and forget the revocations.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::TrustDomain;
use super::crl::Crls;
use super::revocation::{Revocations, Revoked};
use super::svid::Leaf;

/// Why roots are not a usable trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Not PEM.
    #[error("not PEM: {0}")]
    Pem(String),
    /// A bundle without a root would trust nobody.
    #[error("no certificate in it: a trust bundle needs at least one root")]
    Empty,
    /// A root that cannot be used as a trust anchor.
    #[error("root {index} is not a usable CA certificate: {source}")]
    Root {
        /// Position in the file, from 0.
        index: usize,
        /// What rustls said.
        source: rustls::Error,
    },
}

/// The roots of one trust domain, and what is revoked. Without roots (see [`TrustBundle::unknown`]) it trusts nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    /// See [`TrustBundle::generation`].
    generation: u64,
    revocations: Arc<Revocations>,
    crls: Arc<Crls>,
}

impl TrustBundle {
    /// A bundle of these DER roots, with nothing revoked.
    ///
    /// # Errors
    /// When there is none, or one cannot serve as a trust anchor.
    pub fn new(domain: TrustDomain, roots: Vec<CertificateDer<'static>>) -> Result<Self, BundleError> {
        if roots.is_empty() {
            return Err(BundleError::Empty);
        }
        let bundle = Self { domain, roots, generation: 0, revocations: Arc::default(), crls: Arc::default() };
        bundle.anchors()?;
        Ok(bundle)
    }

    /// For an issuer that has not said yet which roots hold: trusts nobody.
    pub fn unknown(domain: TrustDomain) -> Self {
        Self { domain, roots: Vec::new(), generation: 0, revocations: Arc::default(), crls: Arc::default() }
    }

    /// Reads a PEM file's text.
    ///
    /// # Errors
    /// When the text is not PEM or [`TrustBundle::new`] refuses its certificates.
    pub fn from_pem(domain: TrustDomain, pem: &[u8]) -> Result<Self, BundleError> {
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        Self::new(domain, roots.map_err(|e| BundleError::Pem(e.to_string()))?)
    }

    /// The same roots as the authority's state of this generation.
    #[must_use]
    pub fn with_generation(self, generation: u64) -> Self {
        Self { generation, ..self }
    }

    /// Grows each time that the authority changes its roots; 0 where whoever named the roots does not count.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether its roots may take the place of those held: an older state of the authority may not, and neither
    /// may one that says otherwise of the same generation.
    pub fn supersedes(&self, held: &Self) -> bool {
        self.generation > held.generation
            || self.generation == held.generation && (self.generation == 0 || self.roots == held.roots)
    }

    /// The same roots with this list of revocations.
    #[must_use]
    pub fn with_revocations(self, revocations: Arc<Revocations>) -> Self {
        Self { revocations, ..self }
    }

    /// The same with these CRLs of other CAs than our authority.
    #[must_use]
    pub fn with_crls(self, crls: Arc<Crls>) -> Self {
        Self { crls, ..self }
    }

    /// The CRLs of other CAs.
    pub fn crls(&self) -> &Arc<Crls> {
        &self.crls
    }

    /// Whether this certificate is revoked: by our authority's list, or by a CRL of its chain's issuers.
    pub fn judge(&self, leaf: &Leaf) -> Option<Revoked> {
        self.revocations.judge(leaf).or_else(|| self.crls.judge(leaf))
    }

    /// What our authority has revoked.
    pub fn revocations(&self) -> &Arc<Revocations> {
        &self.revocations
    }

    /// The trust domain these roots speak for.
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The roots, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The roots as rustls trust anchors.
    ///
    /// # Errors
    /// When a root cannot serve as a trust anchor; not after [`TrustBundle::new`] accepted it.
    pub fn anchors(&self) -> Result<RootCertStore, BundleError> {
        let mut store = RootCertStore::empty();
        for (index, root) in self.roots.iter().enumerate() {
            store.add(root.clone()).map_err(|source| BundleError::Root { index, source })?;
        }
        Ok(store)
    }
}
