//! Who is who: trust domains and SPIFFE IDs, as parsed values.
//!
//! Identities are compared as whole values and never matched by pattern or prefix. Nothing here
//! reads a certificate, a clock or a file.

pub mod bundle;
pub mod crl;
pub mod federation;
pub mod revocation;
pub mod svid;

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest SPIFFE ID accepted, in bytes (SPIFFE-ID, section 2.3).
pub const MAX_SPIFFE_ID_BYTES: usize = 2048;
/// The longest trust domain name accepted, in bytes (SPIFFE-ID, section 2.1).
pub const MAX_TRUST_DOMAIN_BYTES: usize = 255;

/// Why a text is not a trust domain or a SPIFFE ID.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone, Copy)]
pub enum ParseError {
    /// Empty where a name is owed.
    #[error("the trust domain is empty")]
    EmptyTrustDomain,
    /// SPIFFE-ID section 2.1 allows lower-case letters, digits, dots, dashes and underscores.
    #[error("a trust domain may hold only a-z, 0-9, '.', '-' and '_'")]
    TrustDomainCharacter,
    /// Longer than the specification's bound.
    #[error("longer than the SPIFFE specification allows")]
    TooLong,
    /// Not a `spiffe://` URI.
    #[error("a SPIFFE ID begins with spiffe://")]
    Scheme,
    /// A path segment is empty, `.` or `..`.
    #[error("a path segment is empty, '.' or '..'")]
    PathSegment,
    /// SPIFFE-ID section 2.2 allows letters, digits, dots, dashes and underscores in a segment.
    #[error("a path segment may hold only letters, digits, '.', '-' and '_'")]
    PathCharacter,
}

/// The name of a trust domain, such as `cluster.local`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TrustDomain {
    name: Arc<str>,
}

impl TrustDomain {
    /// Parses a bare trust domain name (no scheme, no path).
    pub fn parse(name: &str) -> Result<Self, ParseError> {
        if name.is_empty() {
            return Err(ParseError::EmptyTrustDomain);
        }
        if name.len() > MAX_TRUST_DOMAIN_BYTES {
            return Err(ParseError::TooLong);
        }
        if !name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_')) {
            return Err(ParseError::TrustDomainCharacter);
        }
        Ok(Self { name: name.into() })
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.name
    }
}

/// Two are in the order of their names, and hash as these do.
impl Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.name
    }
}

/// A SPIFFE ID: a trust domain and a non-empty path.
///
/// Kept as its whole URI, so comparing two is comparing their bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SpiffeId {
    uri: Arc<str>,
    /// Where the path begins in `uri`.
    path_at: usize,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// Parses a whole `spiffe://trust-domain/path` URI.
    ///
    /// Control bytes, percent-encoding, queries and fragments are refused by the character set
    /// (SPIFFE-ID, section 2.2), so two IDs that look the same are the same.
    pub fn parse(uri: &str) -> Result<Self, ParseError> {
        if uri.len() > MAX_SPIFFE_ID_BYTES {
            return Err(ParseError::TooLong);
        }
        let rest = uri.strip_prefix(SCHEME).ok_or(ParseError::Scheme)?;
        let (domain, path) = rest.split_once('/').ok_or(ParseError::PathSegment)?;
        TrustDomain::parse(domain)?;
        for segment in path.split('/') {
            if matches!(segment, "" | "." | "..") {
                return Err(ParseError::PathSegment);
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
                return Err(ParseError::PathCharacter);
            }
        }
        Ok(Self { uri: uri.into(), path_at: SCHEME.len() + domain.len() })
    }

    /// The identity of a workload: `spiffe://TD/ns/NS/sa/SA`.
    pub fn workload(
        domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, ParseError> {
        Self::parse(&format!("{SCHEME}{domain}/ns/{namespace}/sa/{service_account}"))
    }

    /// The identity of a node agent: `spiffe://TD/node/NODE`.
    pub fn node(domain: &TrustDomain, node: &str) -> Result<Self, ParseError> {
        Self::parse(&format!("{SCHEME}{domain}/node/{node}"))
    }

    /// The identity of the authority itself: `spiffe://TD/hauberk/authority`.
    pub fn authority(domain: &TrustDomain) -> Self {
        let uri = format!("{SCHEME}{domain}/hauberk/authority");
        let path_at = SCHEME.len() + domain.as_str().len();
        Self { uri: uri.into(), path_at }
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.uri[SCHEME.len()..self.path_at]
    }

    /// The identity that this one is taken for in `domain`, which has these `aliases` too: the same path under
    /// the domain's own name.
    pub fn under(&self, domain: &TrustDomain, aliases: &[TrustDomain]) -> Cow<'_, Self> {
        if self.trust_domain() == domain.as_str()
            || !aliases.iter().any(|alias| alias.as_str() == self.trust_domain())
        {
            return Cow::Borrowed(self);
        }
        let uri = format!("{SCHEME}{domain}{}", self.path());
        Cow::Owned(Self { uri: uri.into(), path_at: SCHEME.len() + domain.as_str().len() })
    }

    /// The path with its leading slash.
    pub fn path(&self) -> &str {
        &self.uri[self.path_at..]
    }

    /// The namespace of a workload's identity (`/ns/NAMESPACE/sa/...`); `None` for any other form.
    pub fn namespace(&self) -> Option<&str> {
        let (namespace, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        rest.starts_with("sa/").then_some(namespace)
    }

    /// The service account of a workload's identity (`/ns/.../sa/SERVICE_ACCOUNT`).
    pub fn service_account(&self) -> Option<&str> {
        let (_, rest) = self.path().strip_prefix("/ns/")?.split_once('/')?;
        rest.strip_prefix("sa/")
    }

    /// The node's name when this is a node agent's identity.
    pub fn node_name(&self) -> Option<&str> {
        self.path().strip_prefix("/node/").filter(|name| !name.contains('/'))
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }
}

macro_rules! text {
    ($type:ty, $field:ident) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.$field)
            }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.$field)
            }
        }
        impl FromStr for $type {
            type Err = ParseError;
            fn from_str(text: &str) -> Result<Self, ParseError> {
                Self::parse(text)
            }
        }
        impl TryFrom<String> for $type {
            type Error = ParseError;
            fn try_from(text: String) -> Result<Self, ParseError> {
                Self::parse(&text)
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.$field.as_ref().into()
            }
        }
    };
}
text!(TrustDomain, name);
text!(SpiffeId, uri);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_identity_has_its_parts() {
        let domain = TrustDomain::parse("cluster.local").expect("valid");
        let id = SpiffeId::workload(&domain, "shop", "cart").expect("valid");
        assert_eq!(id.as_str(), "spiffe://cluster.local/ns/shop/sa/cart");
        assert_eq!(id.trust_domain(), "cluster.local");
        assert_eq!(id.path(), "/ns/shop/sa/cart");
        assert_eq!((id.namespace(), id.service_account()), (Some("shop"), Some("cart")));
        assert_eq!(id.node_name(), None);
        for other in ["spiffe://td/ns/shop", "spiffe://td/ns/shop/x/y", "spiffe://td/x/ns/shop/sa/y"] {
            assert_eq!(SpiffeId::parse(other).expect("valid").namespace(), None, "{other}");
        }
        assert_eq!(SpiffeId::node(&domain, "n1").expect("valid").node_name(), Some("n1"));
    }

    #[test]
    fn what_the_specification_refuses_is_refused() {
        for (text, why) in [
            ("https://td/a", ParseError::Scheme),
            ("spiffe://td", ParseError::PathSegment),
            ("spiffe://td/", ParseError::PathSegment),
            ("spiffe://td/a//b", ParseError::PathSegment),
            ("spiffe://td/a/../b", ParseError::PathSegment),
            ("spiffe:///a", ParseError::EmptyTrustDomain),
            ("spiffe://TD/a", ParseError::TrustDomainCharacter),
            ("spiffe://td:80/a", ParseError::TrustDomainCharacter),
            ("spiffe://td/a%62", ParseError::PathCharacter),
            ("spiffe://td/a\0b", ParseError::PathCharacter),
            ("spiffe://td/a?x", ParseError::PathCharacter),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(why), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics_and_what_parses_prints_back(text in "(spiffe://)?[a-zA-Z0-9/._%\\x00-]{0,40}") {
            if let Ok(id) = SpiffeId::parse(&text) {
                proptest::prop_assert_eq!(id.as_str(), text.as_str());
                proptest::prop_assert!(TrustDomain::parse(id.trust_domain()).is_ok());
            }
        }
    }
}
