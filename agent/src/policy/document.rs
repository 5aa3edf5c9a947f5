//! AccessPolicy documents, as operators write them: what they may hold, and what is wrong with one.
//!
//! Everything is named exactly: there is no pattern, prefix or wildcard in a document, so nothing an
//! operator writes can mean more than it says. Nothing is left out to mean "everything" where that
//! would open a door: who is let in and what is protected is written down. An empty list matches
//! nothing, and is written back as an empty list.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::cidr::Cidr;
use crate::config::{ConfigError, Fault, read_text};
use crate::identity::{SpiffeId, TrustDomain};

/// The only version there is.
pub const API_VERSION: &str = "hauberk.dev/v1alpha1";
/// The only kind read here.
pub const KIND: &str = "AccessPolicy";

/// Policies in one file.
pub const MAX_POLICIES: usize = 4096;
/// Entries of a policy's `from`.
pub const MAX_PEERS: usize = 256;
/// Entries of a policy's `ports`.
pub const MAX_PORTS: usize = 128;
/// Entries of a selector's list.
pub const MAX_SELECTED: usize = 256;
/// The longest name, as in Kubernetes (RFC 1123).
pub const MAX_NAME_BYTES: usize = 253;

/// Who may, or may not, reach which workloads of a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessPolicy {
    /// [`API_VERSION`].
    pub api_version: String,
    /// [`KIND`].
    pub kind: String,
    /// Its name and namespace.
    pub metadata: Metadata,
    /// What it says.
    pub spec: Spec,
}

/// A policy's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Unique in its namespace.
    pub name: String,
    /// The namespace whose workloads it is about; no other's.
    pub namespace: String,
}

/// What a policy says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Spec {
    /// Which workloads of its namespace it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
    /// What it does with a connection that matches.
    pub action: Action,
    /// Who opens the connection: any entry that matches. Empty: nobody. Owed.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub from: Option<Vec<Peer>>,
    /// The application's ports. Left out: every port. Empty: none.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub ports: Option<Vec<u16>>,
    /// Only counted and logged, not enforced.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a policy does with a connection that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Lets it in, unless a deny policy matches too; and closes its workloads to everything that no
    /// allow policy matches.
    Allow,
    /// Refuses it, whatever else allows it.
    Deny,
}

/// Which workloads a policy is about: exactly one of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Every workload of the namespace.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub all: Option<bool>,
    /// Those with one of these service accounts.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub service_accounts: Option<Vec<String>>,
    /// Those with one of these names.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub workloads: Option<Vec<String>>,
}

/// One entry of `from`: everything it names must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Peer {
    /// Whoever has proven an identity.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub any: Option<bool>,
    /// This identity.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub spiffe_id: Option<SpiffeId>,
    /// Workloads of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub namespace: Option<String>,
    /// With this service account of `namespace`.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub service_account: Option<String>,
    /// Identities of this trust domain. For `namespace` it is the agent's own if left out.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub trust_domain: Option<TrustDomain>,
    /// With a source address in this range.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "given")]
    pub cidr: Option<Cidr>,
}

/// A field that is written must have a value: `from: null` or `from:` is not the same as none.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Reads a file of policies.
///
/// # Errors
/// One line that names the file, the document, the field and what is wrong with it.
pub fn load(path: &Path) -> Result<Vec<AccessPolicy>, ConfigError> {
    let text = read_text(path)?;
    parse(&text).map_err(|fault| ConfigError::invalid(path, fault))
}

/// Parses a text of YAML documents, and checks each.
///
/// # Errors
/// The document, its name and field, and what is wrong there.
pub fn parse(text: &str) -> Result<Vec<AccessPolicy>, Fault> {
    let mut policies: Vec<AccessPolicy> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for (index, document) in serde_yaml::Deserializer::from_str(text).enumerate() {
        let at = format!("document {}", index + 1);
        let policy =
            Option::<AccessPolicy>::deserialize(document).map_err(|e| (at.clone(), e.to_string()))?;
        // Nothing between two separators, as templates leave it.
        let Some(policy) = policy else { continue };
        let named = |field: &str| format!("{at} ({}).{field}", policy.name());
        policy.check().map_err(|(field, message)| (named(field.as_str()), message))?;
        if !names.insert(policy.name()) {
            return Err((named("metadata.name"), "another policy has this namespace and name".into()));
        }
        if policies.len() == MAX_POLICIES {
            return Err((at, format!("there may be {MAX_POLICIES} policies in a file")));
        }
        policies.push(policy);
    }
    // Half-written and emptied files look like this, and no policies means that nothing is refused.
    if policies.is_empty() && !text.lines().any(|line| line.trim_end() == "---") {
        let message = "there is no policy in it; if that is meant, write a line `---`";
        return Err(("document 1".into(), message.into()));
    }
    Ok(policies)
}

impl AccessPolicy {
    /// `namespace/name`, by which logs and metrics call it.
    pub fn name(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }

    /// Who may match; checked documents always say.
    pub fn peers(&self) -> &[Peer] {
        self.spec.from.as_deref().unwrap_or_default()
    }

    /// Checks what types cannot say.
    fn check(&self) -> Result<(), Fault> {
        let wrong = |field: &str, message: &str| Err((field.to_owned(), message.to_owned()));
        if self.api_version != API_VERSION {
            return Err(("apiVersion".into(), format!("must be {API_VERSION}")));
        }
        if self.kind != KIND {
            return Err(("kind".into(), format!("must be {KIND}")));
        }
        name("metadata.name", &self.metadata.name)?;
        name("metadata.namespace", &self.metadata.namespace)?;
        match &self.spec.selector {
            Some(selector) => selector.check()?,
            None => {
                return wrong(
                    "spec.selector",
                    "is missing; for the whole namespace write `selector: {all: true}`",
                );
            }
        }
        let Some(from) = &self.spec.from else {
            return wrong("spec.from", "is missing; for every identity write `from: [{any: true}]`");
        };
        limit("spec.from", from.len(), MAX_PEERS)?;
        for (index, peer) in from.iter().enumerate() {
            peer.check().map_err(|(field, message)| (format!("spec.from[{index}]{field}"), message))?;
        }
        if let Some(ports) = &self.spec.ports {
            limit("spec.ports", ports.len(), MAX_PORTS)?;
            if ports.contains(&0) {
                return wrong("spec.ports", "a port must not be 0");
            }
        }
        Ok(())
    }
}

impl Selector {
    fn check(&self) -> Result<(), Fault> {
        let wrong = |message: &str| Err(("spec.selector".to_owned(), message.to_owned()));
        match (&self.all, &self.service_accounts, &self.workloads) {
            (Some(true), None, None) => Ok(()),
            (Some(false), None, None) => wrong("`all: false` selects nothing; leave the policy out"),
            (None, Some(accounts), None) => names("spec.selector.serviceAccounts", accounts),
            (None, None, Some(workloads)) => names("spec.selector.workloads", workloads),
            (None, None, None) => wrong("is empty; for the whole namespace write `selector: {all: true}`"),
            _ => wrong("give one of all, serviceAccounts and workloads; write a policy for each"),
        }
    }
}

impl Peer {
    fn check(&self) -> Result<(), Fault> {
        let wrong = |field: &str, message: &str| Err((field.to_owned(), message.to_owned()));
        let names_identity =
            self.spiffe_id.is_some() || self.namespace.is_some() || self.trust_domain.is_some();
        match self.any {
            Some(false) => return wrong(".any", "`any: false` matches nothing; leave the entry out"),
            Some(true) if names_identity || self.service_account.is_some() || self.cidr.is_some() => {
                return wrong(".any", "matches every identity; give nothing else beside it");
            }
            None if !names_identity && self.service_account.is_none() && self.cidr.is_none() => {
                return wrong("", "is empty; for every identity write `{any: true}`");
            }
            _ => {}
        }
        if self.spiffe_id.is_some()
            && (self.namespace.is_some() || self.service_account.is_some() || self.trust_domain.is_some())
        {
            return wrong(
                ".spiffeId",
                "is a whole identity; give no namespace, serviceAccount or trustDomain beside it",
            );
        }
        if self.service_account.is_some() && self.namespace.is_none() {
            return wrong(".serviceAccount", "needs its namespace beside it");
        }
        self.namespace.iter().try_for_each(|text| name(".namespace", text))?;
        self.service_account.iter().try_for_each(|text| name(".serviceAccount", text))
    }
}

/// The names of workloads, accounts, namespaces and policies: what a SPIFFE ID's segment may hold.
fn name(field: &str, text: &str) -> Result<(), Fault> {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > MAX_NAME_BYTES || !text.bytes().all(good) || matches!(text, "." | "..")
    {
        let message =
            format!("must be 1 to {MAX_NAME_BYTES} letters, digits, '.', '-' and '_'; it is matched exactly");
        return Err((field.into(), message));
    }
    Ok(())
}

fn names(field: &str, texts: &[String]) -> Result<(), Fault> {
    limit(field, texts.len(), MAX_SELECTED)?;
    texts.iter().enumerate().try_for_each(|(index, text)| name(&format!("{field}[{index}]"), text))
}

fn limit(field: &str, length: usize, most: usize) -> Result<(), Fault> {
    if length > most {
        return Err((field.into(), format!("has {length} entries, and may have {most}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\n";

    fn fault(text: &str) -> String {
        let (at, what) = parse(text).expect_err(text);
        format!("{at}: {what}")
    }

    #[test]
    fn several_documents_in_one_text_are_all_read() {
        let one = |name: &str| {
            format!(
                "{HEAD}metadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {{workloads: [w]}}, action: allow, from: [{{cidr: 10.0.0.0/8}}]}}\n"
            )
        };
        let text = format!("# why\n---\n{}---\n---\n{}---\n", one("a"), one("b"));
        let names: Vec<_> = parse(&text).unwrap().iter().map(AccessPolicy::name).collect();
        assert_eq!(names, ["shop/a", "shop/b"]);
        let twice = fault(&format!("{}---\n{}", one("a"), one("a")));
        assert!(twice.contains("document 2 (shop/a).metadata.name"), "{twice}");
    }

    #[test]
    fn no_policies_must_be_meant() {
        assert_eq!(parse("---\n").unwrap(), []);
        assert_eq!(parse("# none\n---\n# yet\n").unwrap(), []);
        for text in ["", "\n", "# only words\n", "---#\n#"] {
            let _ = parse(text).expect_err(text);
        }
    }

    #[test]
    fn each_fault_names_its_document_and_field() {
        for (spec, words) in [
            (
                "{selector: {all: true}, action: allow}",
                "spec.from: is missing; for every identity write `from: [{any: true}]`",
            ),
            ("{selector: {all: true}, action: allow, from: null}", "spec.from"),
            ("{selector: {all: true}, action: allow, from: [{}]}", "spec.from[0]: is empty"),
            ("{selector: {all: true}, action: allow, from: [{any: false}]}", "spec.from[0].any"),
            ("{selector: {all: true}, action: allow, from: [{any: true, namespace: x}]}", "spec.from[0].any"),
            (
                "{selector: {all: true}, action: allow, from: [{serviceAccount: x}]}",
                "spec.from[0].serviceAccount",
            ),
            (
                "{selector: {all: true}, action: allow, from: [{any: true}, {namespace: 'a/sa/b'}]}",
                "spec.from[1].namespace",
            ),
            ("{selector: {all: true}, action: allow, from: [{namespace: '*'}]}", "it is matched exactly"),
            (
                "{selector: {all: true}, action: allow, from: [{spiffeId: 'spiffe://td/a', namespace: x}]}",
                "spec.from[0].spiffeId",
            ),
            (
                "{selector: {all: true}, action: allow, from: [{spiffeId: 'spiffe://td/*'}]}",
                "spec.from[0]: a path segment may hold only",
            ),
            ("{selector: {all: true}, action: allow, from: [{cidr: 10.1.2.3/8}]}", "write 10.0.0.0/8"),
            (
                "{selector: {all: true}, action: allow, from: [{trustDomain: 'A'}]}",
                "spec.from[0]: a trust domain may hold only",
            ),
            ("{selector: {all: true}, action: allow, from: [{names: x}]}", "unknown field `names`"),
            (
                "{selector: {all: true}, action: allow, from: [], ports: [0]}",
                "spec.ports: a port must not be 0",
            ),
            ("{selector: {all: true}, action: allow, from: [], ports: [65536]}", "spec.ports[0]"),
            ("{selector: {all: true}, action: allow, from: [], dryrun: true}", "unknown field `dryrun`"),
            ("{selector: {all: true}, action: audit, from: []}", "spec.action"),
            ("{selector: {all: true}, from: []}", "missing field `action`"),
            ("{action: allow, from: []}", "spec.selector: is missing"),
            ("{selector: {}, action: allow, from: []}", "spec.selector: is empty"),
            ("{selector: {all: false}, action: allow, from: []}", "spec.selector"),
            (
                "{selector: {all: true, workloads: [x]}, action: allow, from: []}",
                "spec.selector: give one of",
            ),
            ("{selector: {workloads: ['a b']}, action: allow, from: []}", "spec.selector.workloads[0]"),
        ] {
            let error = fault(&format!("{HEAD}metadata: {{name: p, namespace: shop}}\nspec: {spec}"));
            assert!(error.starts_with("document 1") && error.contains(words), "{spec}: {error}");
        }
        for (head, words) in [
            (
                "apiVersion: v1\nkind: AccessPolicy\nmetadata: {name: p, namespace: shop}",
                "apiVersion: must be",
            ),
            (
                "apiVersion: hauberk.dev/v1alpha1\nkind: Policy\nmetadata: {name: p, namespace: shop}",
                "kind: must be",
            ),
            ("apiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: p}", "namespace"),
            (
                "apiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {name: '', namespace: x}",
                "metadata.name",
            ),
        ] {
            let error = fault(&format!("{head}\nspec: {{selector: {{all: true}}, action: allow, from: []}}"));
            assert!(error.contains(words), "{head}: {error}");
        }
    }

    #[test]
    fn everything_has_a_limit() {
        let list = |what: &str, many: usize| vec![what; many].join(", ");
        let long = "x".repeat(MAX_NAME_BYTES + 1);
        for (spec, words) in [
            (
                format!(
                    "{{selector: {{all: true}}, action: allow, from: [{}]}}",
                    list("{any: true}", MAX_PEERS + 1)
                ),
                "spec.from: has 257",
            ),
            (
                format!(
                    "{{selector: {{all: true}}, action: allow, from: [], ports: [{}]}}",
                    list("1", MAX_PORTS + 1)
                ),
                "spec.ports: has 129",
            ),
            (
                format!(
                    "{{selector: {{workloads: [{}]}}, action: allow, from: []}}",
                    list("w", MAX_SELECTED + 1)
                ),
                "workloads: has 257",
            ),
            (
                format!("{{selector: {{workloads: [{long}]}}, action: allow, from: []}}"),
                "workloads[0]: must be 1 to 253",
            ),
        ] {
            let error = fault(&format!("{HEAD}metadata: {{name: p, namespace: shop}}\nspec: {spec}"));
            assert!(error.contains(words), "{error}");
        }
    }
}
