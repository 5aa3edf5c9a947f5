//! Everything of trust that the authority must not forget, as one document: its roots with their keys, which
//! of them signs, how far their rotation has come, and until when what they signed is valid on which node.
//!
//! It is read and written whole (see `store`), so every state that is on disk is one that was meant. What may
//! follow which is in [`super::rotation`]. All times are Unix seconds.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::rotation::Rotation;
use super::{BACKDATED, Ca, CaError, create_root, create_successor, cross, ends};
use crate::identity::TrustDomain;
use crate::identity::bundle::TrustBundle;
use crate::identity::revocation::{MAX_SVID_LIFETIME, NodeName};
use crate::text::hex;

/// The form of the document that this version writes and reads.
const FORMAT: u32 = 1;

/// The document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TrustState {
    format: u32,
    /// Whom it speaks for.
    pub trust_domain: TrustDomain,
    /// Grows with every change of `roots`; the first is 1.
    pub generation: u64,
    /// The roots that are trusted, the oldest first; never none.
    pub roots: Vec<Root>,
    /// Which of them signs.
    pub signing: RootId,
    /// Whether another root is about to take its place.
    pub rotation: Rotation,
    /// Certificates (PEM) of later roots by earlier ones, newest first: what the authority shows to whoever
    /// was away while roots came and went.
    pub crosses: Vec<String>,
    /// How the nodes stand that were issued anything.
    pub nodes: BTreeMap<NodeName, Lease>,
    /// Until when SVIDs may be valid on nodes that are not in `nodes`: of an authority that did not count them.
    pub strangers_until: u64,
}

/// A root and what signs under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Root {
    /// Names it.
    pub id: RootId,
    /// PEM.
    pub certificate: String,
    /// The certificates between the signing key and the root (PEM, the key's own first); empty where the key
    /// is the root's.
    pub chain: String,
    /// The signing key (PEM).
    pub key: Secret,
    /// This root by what signed before it, and what stands above that (PEM), if that could be made.
    pub cross: Option<String>,
    /// When it was taken up.
    pub since: u64,
    /// When the certificate of root or signing key ends, whichever is first.
    pub not_after: u64,
    /// Nothing that was signed under it is valid after this.
    pub signed_until: u64,
}

/// Names a root: the first half of its certificate's SHA-256, in hex.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct RootId(Arc<str>);

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

/// What a node holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lease {
    /// When it was last heard of.
    pub seen: u64,
    /// Nothing that was issued to it is valid after this.
    pub until: u64,
    /// The generation of the roots that it has applied, by its own word.
    pub applied: u64,
}

/// Unix seconds.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Until when a certificate that ends at `not_after` may count as valid anywhere: clocks differ.
pub fn with_skew(not_after: SystemTime, lifetime: Duration) -> u64 {
    // What lives shorter than that is used by nobody whose clock is that wrong.
    seconds(not_after + BACKDATED.min(lifetime / 10)) + 1
}

impl RootId {
    /// The name of a certificate.
    pub fn of(root: &CertificateDer<'_>) -> Self {
        Self(hex(&digest(&SHA256, root).as_ref()[..16]).into())
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for RootId {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl From<RootId> for String {
    fn from(id: RootId) -> Self {
        id.0.as_ref().into()
    }
}

impl fmt::Display for RootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl Root {
    /// The first root of our own.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        Self::from_pem(&create_root(domain, now)?, now)
    }

    /// One that comes beside another.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_next(domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        Self::from_pem(&create_successor(domain, now)?, now)
    }

    /// Has what signs under `before` vouch for this root, for whoever knows only that one.
    ///
    /// # Errors
    /// When it cannot: its path length leaves no room, say, or the root's name has a form that cannot be repeated.
    pub fn follow(&mut self, before: &Self, domain: &TrustDomain, now: SystemTime) -> Result<(), CaError> {
        self.cross = Some(cross::certify(&self.ca(domain)?, &before.ca(domain)?, now)?);
        Ok(())
    }

    /// Takes up what an authority kept in one PEM text: certificate and key of a root. What that has signed is
    /// not known.
    ///
    /// # Errors
    /// When it is anything else.
    pub fn from_pem(pem: &str, now: SystemTime) -> Result<Self, CaError> {
        let root = CertificateDer::from_pem_slice(pem.as_bytes());
        let root = root.map_err(|e| CaError::Material(e.to_string()))?;
        let at = pem.find("-----BEGIN PRIVATE KEY-----");
        let (certificate, key) = at.and_then(|at| pem.split_at_checked(at)).unwrap_or((pem, ""));
        Ok(Self {
            id: RootId::of(&root),
            certificate: certificate.into(),
            chain: String::new(),
            key: key.to_owned().into(),
            cross: None,
            since: seconds(now),
            not_after: seconds(ends(&root)?),
            signed_until: 0,
        })
    }

    /// What signs under it.
    ///
    /// # Errors
    /// When what is kept cannot be used.
    pub fn ca(&self, domain: &TrustDomain) -> Result<Ca, CaError> {
        let chain = certificates(&self.chain)?;
        Ca::new(domain.clone(), self.der()?, chain, &self.key.0)
    }

    /// Its certificate.
    ///
    /// # Errors
    /// When what is kept is no certificate.
    pub fn der(&self) -> Result<CertificateDer<'static>, CaError> {
        CertificateDer::from_pem_slice(self.certificate.as_bytes())
            .map_err(|e| CaError::Material(e.to_string()))
    }
}

impl TrustState {
    /// The state of a new authority.
    pub fn new(trust_domain: TrustDomain, root: Root) -> Self {
        let (signing, roots) = (root.id.clone(), vec![root]);
        Self {
            format: FORMAT,
            trust_domain,
            generation: 1,
            roots,
            signing,
            rotation: Rotation::Idle,
            crosses: Vec::new(),
            nodes: BTreeMap::new(),
            strangers_until: 0,
        }
    }

    /// The state of an authority that kept a root and nothing else. Its SVIDs live for at most `lifetime`, or
    /// did so lately.
    pub fn migrated(trust_domain: TrustDomain, root: Root, lifetime: Duration, now: SystemTime) -> Self {
        // It may have been configured otherwise before: the root stays for as long as any SVID could live.
        let root = Root { signed_until: with_skew(now + MAX_SVID_LIFETIME, MAX_SVID_LIFETIME), ..root };
        let strangers_until = with_skew(now + lifetime, lifetime);
        Self { strangers_until, ..Self::new(trust_domain, root) }
    }

    /// Whether a document that was read says what one of ours must say.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self, domain: &TrustDomain) -> Result<(), CaError> {
        let wrong = |words: String| Err(CaError::State(words));
        if self.format != FORMAT {
            return wrong(format!("it has format {}, this version knows {FORMAT}", self.format));
        }
        if self.trust_domain != *domain {
            return wrong(format!("it is of trust domain {}, not {domain}", self.trust_domain));
        }
        let named = [Some(&self.signing), self.rotation.root()];
        let mut missing = named.into_iter().flatten().filter(|id| self.root(id).is_none());
        match missing.next() {
            Some(id) => wrong(format!("root {id} is not in it")),
            None => self.bundle().map(drop),
        }
    }

    /// A root by its name.
    pub fn root(&self, id: &RootId) -> Option<&Root> {
        self.roots.iter().find(|root| root.id == *id)
    }

    /// The root that signs.
    ///
    /// # Errors
    /// When it is not there, which no checked document says.
    pub fn signing(&self) -> Result<&Root, CaError> {
        self.root(&self.signing).ok_or_else(|| CaError::State(format!("root {} is not there", self.signing)))
    }

    /// The trust bundle that it says.
    ///
    /// # Errors
    /// When a root cannot be used.
    pub fn bundle(&self) -> Result<TrustBundle, CaError> {
        let roots = self.roots.iter().map(Root::der).collect::<Result<Vec<_>, _>>()?;
        Ok(TrustBundle::new(self.trust_domain.clone(), roots)?.with_generation(self.generation))
    }

    /// What the authority shows with its own certificate, for whoever knows an earlier root only.
    ///
    /// # Errors
    /// When what is kept is no certificate.
    pub fn crosses(&self) -> Result<Vec<CertificateDer<'static>>, CaError> {
        self.crosses
            .iter()
            .map(|pem| certificates(pem))
            .collect::<Result<Vec<_>, _>>()
            .map(|all| all.concat())
    }
}

/// All certificates of a PEM text.
pub(super) fn certificates(pem: &str) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    all.map_err(|e| CaError::Material(e.to_string()))
}
