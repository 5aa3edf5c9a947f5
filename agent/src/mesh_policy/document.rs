//! MeshPolicy documents, as operators write them: what they may hold, and what is wrong with one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Labels;
use crate::cidr::Cidr;
use crate::config::{Fault, Mode};
use crate::document::{Metadata, check_kind, given, limit, ports};

/// The kind's name.
pub const KIND: &str = "MeshPolicy";
/// Labels that a selector may ask for.
pub const MAX_LABELS: usize = 16;
/// Ports in a list.
pub const MAX_PORTS: usize = 64;
/// Ranges of addresses in a list.
pub const MAX_CIDRS: usize = 64;
/// The shortest life of an SVID, in seconds: renewals come at half of it.
pub const MIN_LIFETIME: u64 = 60;
/// The longest, which is the authority's too: 30 days.
pub const MAX_LIFETIME: u64 = 2_592_000;

/// How the workloads of a namespace, or some of them, take part in the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshPolicy {
    /// [`crate::document::API_VERSION`].
    pub api_version: String,
    /// [`KIND`].
    pub kind: String,
    /// Its name and namespace.
    pub metadata: Metadata,
    /// What it says.
    pub spec: Spec,
}

/// What a policy says: at least one thing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// Which workloads of its namespace it is about. Owed.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub selector: Option<Selector>,
    /// Their mode, unless their own label says another.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub mode: Option<Mode>,
    /// What is left alone.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub exclude: Option<Exclude>,
    /// How long their SVIDs are valid, at most; never longer than the authority's own setting.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub certificate_lifetime_seconds: Option<u64>,
}

/// Which workloads a policy is about: exactly one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Every workload of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub all: Option<bool>,
    /// Those with all of these labels.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub match_labels: Option<BTreeMap<String, String>>,
}

/// What is left alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Exclude {
    /// The application's ports where plaintext is accepted in any mode.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub inbound_ports: Option<Vec<u16>>,
    /// Ports of destinations that are connected to in plaintext.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub outbound_ports: Option<Vec<u16>>,
    /// Addresses of destinations that are connected to in plaintext.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub outbound_cidrs: Option<Vec<Cidr>>,
}

impl MeshPolicy {
    /// Whether it is about the whole namespace.
    pub fn is_about_all(&self) -> bool {
        self.spec.selector.as_ref().is_some_and(|selector| selector.all == Some(true))
    }

    /// Whether it is about a workload of its namespace with these labels.
    pub fn selects(&self, labels: &Labels) -> bool {
        let wanted = self.spec.selector.as_ref().and_then(|selector| selector.match_labels.as_ref());
        self.is_about_all()
            || wanted.is_some_and(|wanted| wanted.iter().all(|(key, value)| labels.get(key) == Some(value)))
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn check(&self) -> Result<(), Fault> {
        check_kind(&self.api_version, &self.kind, KIND)?;
        self.metadata.check()?;
        self.spec.check()
    }
}

impl Spec {
    pub(crate) fn check(&self) -> Result<(), Fault> {
        let wrong = |field: &str, message: String| Err((field.to_owned(), message));
        match &self.selector {
            Some(selector) => selector.check()?,
            None => {
                let message = "is missing; for the whole namespace write `selector: {all: true}`";
                return wrong("spec.selector", message.into());
            }
        }
        if self.mode.is_none() && self.exclude.is_none() && self.certificate_lifetime_seconds.is_none() {
            let message = "says nothing; give mode, exclude or certificateLifetimeSeconds";
            return wrong("spec", message.into());
        }
        if let Some(exclude) = &self.exclude {
            exclude.check().map_err(|(field, message)| (format!("spec.exclude{field}"), message))?;
        }
        match self.certificate_lifetime_seconds {
            Some(seconds) if !(MIN_LIFETIME..=MAX_LIFETIME).contains(&seconds) => wrong(
                "spec.certificateLifetimeSeconds",
                format!("must be between {MIN_LIFETIME} and {MAX_LIFETIME} (30 days)"),
            ),
            _ => Ok(()),
        }
    }
}

impl Selector {
    pub(crate) fn check(&self) -> Result<(), Fault> {
        let wrong = |message: &str| Err(("spec.selector".to_owned(), message.to_owned()));
        match (self.all, &self.match_labels) {
            (Some(true), None) => Ok(()),
            (Some(false), None) => wrong("`all: false` selects nothing; leave the policy out"),
            (None, Some(labels)) if labels.is_empty() => {
                wrong("an empty matchLabels selects nothing; for the whole namespace write `all: true`")
            }
            (None, Some(labels)) => {
                let field = "spec.selector.matchLabels";
                limit(field, labels.len(), MAX_LABELS)?;
                labels.iter().try_for_each(|(key, value)| label(field, key, value))
            }
            (None, None) => wrong("is empty; for the whole namespace write `selector: {all: true}`"),
            (Some(_), Some(_)) => wrong("give one of all and matchLabels"),
        }
    }
}

/// A label as Kubernetes has them: `[prefix/]name` and a value, each of at most 63 characters, the prefix 253.
fn label(field: &str, key: &str, value: &str) -> Result<(), Fault> {
    let word = |text: &str| {
        let ends = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        let inside = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        text.len() <= 63 && ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(inside)
    };
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if !word(name) || prefix.is_some_and(|prefix| prefix.len() > 253 || !prefix.split('.').all(word)) {
        return Err((field.into(), format!("{key:?} is no label's name")));
    }
    if !value.is_empty() && !word(value) {
        return Err((field.into(), format!("{value:?} is no label's value")));
    }
    Ok(())
}

impl Exclude {
    /// Checks what types cannot say; a field is named from `.` on.
    pub(crate) fn check(&self) -> Result<(), Fault> {
        let lists = [(".inboundPorts", &self.inbound_ports), (".outboundPorts", &self.outbound_ports)];
        for (field, list) in lists {
            list.iter().try_for_each(|list| ports(field, list, MAX_PORTS))?;
        }
        limit(".outboundCidrs", self.outbound_cidrs.as_ref().map_or(0, Vec::len), MAX_CIDRS)?;
        if *self == Self::default() {
            return Err((String::new(), "is empty; name ports or ranges of addresses".into()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(spec: &str) -> String {
        let text = format!(
            "{{apiVersion: hauberk.dev/v1alpha1, kind: MeshPolicy, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
        );
        let read = serde_yaml::from_str::<MeshPolicy>(&text).map_err(|e| e.to_string());
        let checked =
            read.and_then(|policy| policy.check().map_err(|(field, what)| format!("{field}: {what}")));
        checked.expect_err(spec)
    }

    #[test]
    fn each_fault_names_its_field() {
        let many = |what: &str, count: usize| vec![what; count].join(", ");
        let labels: String = (0..=MAX_LABELS).map(|n| format!("l{n}: x, ")).collect();
        for (spec, words) in [
            ("{mode: strict}", "spec.selector: is missing"),
            ("{selector: {}, mode: strict}", "spec.selector: is empty"),
            ("{selector: {all: false}, mode: strict}", "selects nothing"),
            ("{selector: {matchLabels: {}}, mode: strict}", "selects nothing"),
            ("{selector: {all: true, matchLabels: {a: b}}, mode: strict}", "give one of"),
            ("{selector: {matchLabels: {'a b': c}}, mode: strict}", "no label's name"),
            ("{selector: {matchLabels: {'x/y/z': c}}, mode: strict}", "no label's name"),
            ("{selector: {matchLabels: {a: '-'}}, mode: strict}", "no label's value"),
            (&format!("{{selector: {{matchLabels: {{{labels}}}}}, mode: strict}}")[..], "has 17 entries"),
            ("{selector: {all: true}}", "spec: says nothing"),
            ("{selector: {all: true}, mode: Strict}", "unknown variant"),
            ("{selector: {all: true}, mode: null}", "mode"),
            ("{selector: {all: true}, exclude: {}}", "spec.exclude: is empty"),
            ("{selector: {all: true}, exclude: {inboundPorts: [0]}}", "spec.exclude.inboundPorts: a port"),
            ("{selector: {all: true}, exclude: {outboundPorts: [70000]}}", "outboundPorts[0]"),
            ("{selector: {all: true}, exclude: {outboundCidrs: [10.0.0.1/8]}}", "write 10.0.0.0/8"),
            ("{selector: {all: true}, exclude: {ports: [1]}}", "unknown field `ports`"),
            (
                &format!(
                    "{{selector: {{all: true}}, exclude: {{inboundPorts: [{}]}}}}",
                    many("1", MAX_PORTS + 1)
                ),
                "has 65 entries",
            ),
            (
                &format!(
                    "{{selector: {{all: true}}, exclude: {{outboundCidrs: [{}]}}}}",
                    many("10.0.0.0/8", MAX_CIDRS + 1)
                ),
                "has 65 entries",
            ),
            ("{selector: {all: true}, certificateLifetimeSeconds: 59}", "must be between 60 and"),
            ("{selector: {all: true}, certificateLifetimeSeconds: 2592001}", "must be between 60 and"),
        ] {
            let error = fault(spec);
            assert!(error.contains(words), "{spec}: {error}");
        }
    }
}
