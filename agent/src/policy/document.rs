//! AccessPolicy documents, as operators write them: what they may hold, and what is wrong with one; and files
//! of these and of MeshPolicy documents.
//!
//! Everything is named exactly: there is no pattern, prefix or wildcard in a document, so nothing an
//! operator writes can mean more than it says. Nothing is left out to mean "everything" where that
//! would open a door: who is let in and what is protected is written down. An empty list matches
//! nothing, and is written back as an empty list.

use std::collections::HashSet;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::cidr::Cidr;
use crate::config::{ConfigError, Fault, read_text};
use crate::document::{self, check_kind, given, limit, name};
pub use crate::document::{API_VERSION, MAX_NAME_BYTES, Metadata};
use crate::identity::{SpiffeId, TrustDomain};
use crate::mesh_policy::document::{self as mesh, MeshPolicy};

/// The kind's name.
pub const KIND: &str = "AccessPolicy";

/// Policies in one file.
pub const MAX_POLICIES: usize = 4096;
/// Entries of a policy's `from`.
pub const MAX_PEERS: usize = 256;
/// Entries of a policy's `ports`.
pub const MAX_PORTS: usize = 128;
/// Entries of a selector's list.
pub const MAX_SELECTED: usize = 256;
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

/// What a file of policies holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Documents {
    /// Who may reach whom.
    pub access: Vec<AccessPolicy>,
    /// How workloads take part in the mesh.
    pub mesh: Vec<MeshPolicy>,
}

impl Documents {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.access.len() + self.mesh.len()
    }
}

/// Reads a file of policies.
///
/// # Errors
/// One line that names the file, the document, the field and what is wrong with it.
pub fn load(path: &Path) -> Result<Documents, ConfigError> {
    let text = read_text(path)?;
    parse(&text).map_err(|fault| ConfigError::invalid(path, fault))
}

/// What tells which kind of document it is; the rest is read by that kind's type.
#[derive(Deserialize)]
struct Kinded {
    kind: Option<String>,
}

/// Parses a text of YAML documents, and checks each.
///
/// # Errors
/// The document, its name and field, and what is wrong there.
pub fn parse(text: &str) -> Result<Documents, Fault> {
    let mut documents = Documents::default();
    let mut names = HashSet::new();
    let kinds = serde_yaml::Deserializer::from_str(text);
    for (index, (kind, document)) in kinds.zip(serde_yaml::Deserializer::from_str(text)).enumerate() {
        let at = format!("document {}", index + 1);
        // What cannot be read even so far is refused by the type, in its words.
        let kind = Option::<Kinded>::deserialize(kind).ok().flatten().and_then(|it| it.kind);
        let unread = |error: serde_yaml::Error| (at.clone(), error.to_string());
        let named = |metadata: &Metadata, field: &str| format!("{at} ({}).{field}", metadata.full_name());
        let (kind, metadata) = if kind.as_deref() == Some(mesh::KIND) {
            let policy = MeshPolicy::deserialize(document).map_err(unread)?;
            policy.check().map_err(|(field, message)| (named(&policy.metadata, &field), message))?;
            let metadata = policy.metadata.clone();
            documents.mesh.push(policy);
            (mesh::KIND, metadata)
        } else {
            let policy = Option::<AccessPolicy>::deserialize(document).map_err(unread)?;
            // Nothing between two separators, as templates leave it.
            let Some(policy) = policy else { continue };
            policy.check().map_err(|(field, message)| (named(&policy.metadata, &field), message))?;
            let metadata = policy.metadata.clone();
            documents.access.push(policy);
            (KIND, metadata)
        };
        if documents.count() > MAX_POLICIES {
            return Err((at, format!("there may be {MAX_POLICIES} policies in a file")));
        }
        let field = named(&metadata, "metadata.name");
        if !names.insert((kind, metadata.full_name())) {
            return Err((field, "another policy has this namespace and name".into()));
        }
    }
    // Half-written and emptied files look like this, and no policies means that nothing is refused.
    if documents.count() == 0 && !text.lines().any(|line| line.trim_end() == "---") {
        let message = "there is no policy in it; if that is meant, write a line `---`";
        return Err(("document 1".into(), message.into()));
    }
    Ok(documents)
}

impl AccessPolicy {
    /// `namespace/name`, by which logs and metrics call it.
    pub fn name(&self) -> String {
        self.metadata.full_name()
    }

    /// Who may match; checked documents always say.
    pub fn peers(&self) -> &[Peer] {
        self.spec.from.as_deref().unwrap_or_default()
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// The field, and what is wrong with it.
    pub fn check(&self) -> Result<(), Fault> {
        let wrong = |field: &str, message: &str| Err((field.to_owned(), message.to_owned()));
        check_kind(&self.api_version, &self.kind, KIND)?;
        self.metadata.check()?;
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
            document::ports("spec.ports", ports, MAX_PORTS)?;
        }
        Ok(())
    }
}

impl Selector {
    pub(crate) fn check(&self) -> Result<(), Fault> {
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
    pub(crate) fn check(&self) -> Result<(), Fault> {
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

fn names(field: &str, texts: &[String]) -> Result<(), Fault> {
    limit(field, texts.len(), MAX_SELECTED)?;
    texts.iter().enumerate().try_for_each(|(index, text)| name(&format!("{field}[{index}]"), text))
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
        let names: Vec<_> = parse(&text).unwrap().access.iter().map(AccessPolicy::name).collect();
        assert_eq!(names, ["shop/a", "shop/b"]);
        let twice = fault(&format!("{}---\n{}", one("a"), one("a")));
        assert!(twice.contains("document 2 (shop/a).metadata.name"), "{twice}");
    }

    #[test]
    fn both_kinds_are_read_from_one_text_and_may_have_one_name() {
        let mesh =
            "apiVersion: hauberk.dev/v1alpha1\nkind: MeshPolicy\nmetadata: {name: a, namespace: shop}\n";
        let access = format!(
            "{HEAD}metadata: {{name: a, namespace: shop}}\nspec: {{selector: {{all: true}}, action: allow, from: []}}\n"
        );
        let text = format!("{mesh}spec: {{selector: {{all: true}}, mode: strict}}\n---\n{access}");
        let read = parse(&text).unwrap();
        assert_eq!((read.mesh.len(), read.access.len()), (1, 1));
        let bad = fault(&format!("{access}---\n{mesh}spec: {{selector: {{all: true}}}}\n"));
        assert_eq!(
            bad,
            "document 2 (shop/a).spec: says nothing; give mode, exclude or certificateLifetimeSeconds"
        );
        assert!(fault(&format!("{mesh}spec: 3")).starts_with("document 1: spec"));
    }

    #[test]
    fn no_policies_must_be_meant() {
        assert_eq!(parse("---\n").unwrap(), Documents::default());
        assert_eq!(parse("# none\n---\n# yet\n").unwrap(), Documents::default());
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
