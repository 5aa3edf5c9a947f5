//! The roots of other trust domains, each good for its own identities and for nothing else.

use std::collections::BTreeMap;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

use super::TrustDomain;
use super::bundle::BundleError;

/// Most roots of one trust domain.
pub const MAX_ROOTS: usize = 32;
/// Most bytes of one trust domain's roots (DER) together.
pub const MAX_ROOT_BYTES: usize = 32 << 10;
/// Most trust domains: what all agents hold, and are sent whenever one changes.
pub const MAX_DOMAINS: usize = 32;

/// What it takes for an identity of another trust domain to be let in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Admit {
    /// An access policy that allows it: a workload without policies is open to its own trust domain only.
    #[default]
    ByPolicy,
    /// As for identities of our own: where no policy is about the workload, it may come.
    All,
}

/// One other trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Federated {
    roots: Vec<CertificateDer<'static>>,
    admit: Admit,
}

impl Federated {
    /// A trust domain with these DER roots; without any it has taken back all that it ever published.
    ///
    /// # Errors
    /// When one cannot serve as a trust anchor, or there are more than anybody has.
    pub fn new(roots: Vec<CertificateDer<'static>>, admit: Admit) -> Result<Self, BundleError> {
        if roots.len() > MAX_ROOTS || roots.iter().map(|root| root.len()).sum::<usize>() > MAX_ROOT_BYTES {
            return Err(BundleError::TooLarge);
        }
        let federated = Self { roots, admit };
        federated.anchors()?;
        Ok(federated)
    }

    /// The roots, DER.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// What it takes to be let in.
    pub fn admit(&self) -> Admit {
        self.admit
    }

    /// The roots as rustls trust anchors.
    ///
    /// # Errors
    /// When a root cannot serve as one; not after [`Federated::new`] accepted it.
    pub fn anchors(&self) -> Result<RootCertStore, BundleError> {
        super::bundle::anchors(&self.roots)
    }
}

/// All of the other trust domains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Federation(BTreeMap<TrustDomain, Federated>);

impl Federation {
    /// Adds a trust domain, in place of what was known of it.
    pub fn insert(&mut self, domain: TrustDomain, federated: Federated) {
        self.0.insert(domain, federated);
    }

    /// What is known of a trust domain, by its name.
    pub fn get(&self, domain: &TrustDomain) -> Option<&Federated> {
        self.0.get(domain)
    }

    /// The trust domains, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&TrustDomain, &Federated)> {
        self.0.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an identity of a trust domain of this name can be proven.
    pub fn knows(&self, domain: &str) -> bool {
        self.0.contains_key(domain)
    }
}
