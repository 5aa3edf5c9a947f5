//! Identities of other trust domains: who of them is taken for one of ours, and who needs a policy to come.

use super::document::AccessPolicy;
use crate::directory::Workload;
use crate::identity::{SpiffeId, TrustDomain};

/// What is known of other trust domains' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// Other names of our own trust domain.
    pub aliases: Vec<TrustDomain>,
    /// Trust domains whose identities come in like those of our own, where no policy is about the workload.
    pub admitted: Vec<TrustDomain>,
}

impl Neighbours {
    /// The policies with each identity under our own trust domain's name, if it is one of ours.
    pub(super) fn canonical(&self, documents: &[AccessPolicy], domain: &TrustDomain) -> Vec<AccessPolicy> {
        let mut documents = documents.to_vec();
        for peer in documents.iter_mut().flat_map(|document| document.spec.from.iter_mut().flatten()) {
            if let Some(id) = &mut peer.spiffe_id {
                *id = id.under(domain, &self.aliases).into_owned();
            }
            if peer.trust_domain.as_ref().is_some_and(|named| self.aliases.contains(named)) {
                peer.trust_domain = Some(domain.clone());
            }
        }
        documents
    }

    /// Whether a peer, by its canonical identity, may come only where a policy lets it.
    pub(super) fn is_outsider(&self, peer: &SpiffeId, domain: &TrustDomain) -> bool {
        let of = |known: &TrustDomain| known.as_str() == peer.trust_domain();
        !of(domain) && !self.admitted.iter().any(of)
    }

    /// Whether a workload is another trust domain's: our policies say nothing of it, whatever its namespace.
    pub(super) fn is_foreign(&self, workload: &Workload, domain: &TrustDomain) -> bool {
        workload.id.under(domain, &self.aliases).trust_domain() != domain.as_str()
    }
}
