//! A trust bundle: the roots of our trust domain, what of theirs is revoked, and whom else it is to know:
//! other trust domains with roots of their own, and other names of ours.
//!
//! All in one value, so that no verifier can be built from roots and forget the revocations.

use std::borrow::Cow;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::crl::Crls;
use super::federation::{Federation, MAX_ROOT_BYTES, MAX_ROOTS};
use super::revocation::{Revocations, Revoked};
use super::svid::Leaf;
use super::{SpiffeId, TrustDomain};

/// Why roots are not a usable trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Not PEM.
    #[error("not PEM: {0}")]
    Pem(String),
    /// A bundle without a root would trust nobody.
    #[error("no certificate in it: a trust bundle needs at least one root")]
    Empty,
    /// More than any trust domain has.
    #[error("too many roots, or too large: at most {MAX_ROOTS} of {MAX_ROOT_BYTES} bytes together")]
    TooLarge,
    /// A root that cannot be used as a trust anchor.
    #[error("root {index} is not a usable CA certificate: {source}")]
    Root {
        /// Position in the file, from 0.
        index: usize,
        /// What rustls said.
        source: rustls::Error,
    },
}

/// The roots of our trust domain, what is revoked, and whom else it knows. Without roots (see
/// [`TrustBundle::unknown`]) it trusts nobody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustBundle {
    domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
    /// See [`TrustBundle::generation`].
    generation: u64,
    revocations: Arc<Revocations>,
    crls: Arc<Crls>,
    /// `None`: whoever named the roots does not say.
    federation: Option<Arc<Federation>>,
    aliases: Arc<[TrustDomain]>,
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
        let bundle = Self { roots, ..Self::unknown(domain) };
        bundle.anchors()?;
        Ok(bundle)
    }

    /// For an issuer that has not said yet which roots hold: trusts nobody.
    pub fn unknown(domain: TrustDomain) -> Self {
        Self {
            domain,
            roots: Vec::new(),
            generation: 0,
            revocations: Arc::default(),
            crls: Arc::default(),
            federation: None,
            aliases: Arc::default(),
        }
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

    /// The same with these other trust domains.
    #[must_use]
    pub fn with_federation(self, federation: Arc<Federation>) -> Self {
        Self { federation: Some(federation), ..self }
    }

    /// These roots, with all else as it is `held`: a list of roots says nothing of revocations, CRLs and aliases, and
    /// of other trust domains only if it names them.
    #[must_use]
    pub fn in_place_of(self, held: &Self) -> Self {
        Self {
            revocations: Arc::clone(&held.revocations),
            crls: Arc::clone(&held.crls),
            federation: self.federation.or_else(|| held.federation.clone()),
            aliases: Arc::clone(&held.aliases),
            ..self
        }
    }

    /// The other trust domains; `None` where whoever named the roots does not say.
    pub fn federation(&self) -> Option<&Arc<Federation>> {
        self.federation.as_ref()
    }

    /// The same, where our trust domain has these other names too.
    #[must_use]
    pub fn with_aliases(self, aliases: Arc<[TrustDomain]>) -> Self {
        Self { aliases, ..self }
    }

    /// Other names of our trust domain.
    pub fn aliases(&self) -> &Arc<[TrustDomain]> {
        &self.aliases
    }

    /// The identity that one is taken for: one of an alias is that of our own trust domain.
    pub fn canonical<'a>(&self, id: &'a SpiffeId) -> Cow<'a, SpiffeId> {
        id.under(&self.domain, &self.aliases)
    }

    /// Whether an identity is of our own trust domain, by whichever name.
    pub fn is_ours(&self, id: &SpiffeId) -> bool {
        self.canonical(id).trust_domain() == self.domain.as_str()
    }

    /// Whether this certificate is refused: by our authority's list, by a CRL of its chain's issuers, or since
    /// its trust domain is none that is known (any more).
    ///
    /// An entry for an identity or a node of ours is about those of an alias too.
    pub fn judge(&self, leaf: &Leaf) -> Option<Revoked> {
        let federated = |id: &SpiffeId| self.federation.as_ref().is_some_and(|f| f.knows(id.trust_domain()));
        let listed = match self.canonical(&leaf.id) {
            id if id.trust_domain() != self.domain.as_str() => {
                if !federated(&id) {
                    let by = format!("the end of federation with {}", id.trust_domain());
                    let (id, serial) = (leaf.id.clone(), leaf.serial.clone());
                    return Some(Revoked { id, serial, by, unknown: false });
                }
                // Its nodes may have the names of ours.
                self.revocations.judge(&Leaf { node: None, ..leaf.clone() })
            }
            Cow::Borrowed(_) => self.revocations.judge(leaf),
            Cow::Owned(id) => {
                self.revocations.judge(leaf).or_else(|| self.revocations.judge(&Leaf { id, ..leaf.clone() }))
            }
        };
        listed.or_else(|| self.crls.judge(leaf))
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
        anchors(&self.roots)
    }
}

pub(super) fn anchors(roots: &[CertificateDer<'static>]) -> Result<RootCertStore, BundleError> {
    let mut store = RootCertStore::empty();
    for (index, root) in roots.iter().enumerate() {
        store.add(root.clone()).map_err(|source| BundleError::Root { index, source })?;
    }
    Ok(store)
}
