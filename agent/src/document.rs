//! What the documents of operators have in common: group and version, names, and what is wrong with a field.
//! They are the same in a YAML file and as objects of Kubernetes.

use serde::{Deserialize, Deserializer, Serialize};

use crate::config::Fault;

/// Their group, as Kubernetes calls it.
pub const GROUP: &str = "hauberk.dev";
/// The only version there is.
pub const VERSION: &str = "v1alpha1";
/// Group and version together.
pub const API_VERSION: &str = "hauberk.dev/v1alpha1";
/// The longest name, as in Kubernetes (RFC 1123).
pub const MAX_NAME_BYTES: usize = 253;

/// A document's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Unique in its namespace.
    pub name: String,
    /// The namespace whose workloads it is about; no other's.
    pub namespace: String,
}

impl Metadata {
    /// `namespace/name`, by which logs and metrics call it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Checks both names.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        name("metadata.name", &self.name)?;
        name("metadata.namespace", &self.namespace)
    }
}

/// Checks what kind of document it says it is.
pub(crate) fn check_kind(api_version: &str, kind: &str, expected: &str) -> Result<(), Fault> {
    if api_version != API_VERSION {
        return Err(("apiVersion".into(), format!("must be {API_VERSION}")));
    }
    if kind != expected {
        return Err(("kind".into(), format!("must be {expected}")));
    }
    Ok(())
}

/// A field that is written must have a value: `from: null` or `from:` is not the same as none.
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// The names of workloads, accounts, namespaces and policies: what a SPIFFE ID's segment may hold.
pub(crate) fn name(field: &str, text: &str) -> Result<(), Fault> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > MAX_NAME_BYTES || !text.bytes().all(good) || matches!(text, "." | "..")
    {
        let message =
            format!("must be 1 to {MAX_NAME_BYTES} letters, digits, '.', '-' and '_'; it is matched exactly");
        return Err((field.into(), message));
    }
    Ok(())
}

/// Checks how many entries a list has.
pub(crate) fn limit(field: &str, length: usize, most: usize) -> Result<(), Fault> {
    if length > most {
        return Err((field.into(), format!("has {length} entries, and may have {most}")));
    }
    Ok(())
}

/// Checks a list of ports.
pub(crate) fn ports(field: &str, ports: &[u16], most: usize) -> Result<(), Fault> {
    limit(field, ports.len(), most)?;
    if ports.contains(&0) {
        return Err((field.into(), "a port must not be 0".into()));
    }
    Ok(())
}
