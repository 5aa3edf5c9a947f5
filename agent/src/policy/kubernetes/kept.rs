//! What is in force of each policy object.
//!
//! An object that cannot be used must neither open a door nor touch another namespace: what it said before
//! stays in force, and if it never said anything usable, its workloads are closed. For an access policy that
//! means nobody is allowed (or, of a deny policy, everybody is denied); a mesh policy keeps its mode, which is
//! strict where it cannot be read, and excludes nothing.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use kube::runtime::watcher::Event;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{Fault, Mode};
use crate::directory::kubernetes::objects::{Kind, Policy};
use crate::directory::kubernetes::{Heard, Name, Objects};
use crate::document::{API_VERSION, Metadata};
use crate::identity::TrustDomain;
use crate::mesh_policy::document::{self as mesh, MeshPolicy};
use crate::policy::document::{self as access, AccessPolicy, Action, Documents, Peer};
use crate::policy::rule::Rules;
use crate::text::hex;

/// What is known of an object.
#[derive(Clone, Debug)]
pub struct Row<D> {
    uid: String,
    generation: i64,
    /// What is in force.
    pub document: D,
    /// Why that is not what the object says.
    pub fault: Option<String>,
}

/// The cluster's policies, as they were told.
#[derive(Debug)]
pub struct Kept {
    domain: TrustDomain,
    access: Objects<Row<AccessPolicy>>,
    mesh: Objects<Row<MeshPolicy>>,
}

impl Kept {
    /// Knows of none yet.
    pub fn new(domain: TrustDomain) -> Self {
        Self { domain, access: Objects::default(), mesh: Objects::default() }
    }

    /// Takes note of an access policy; whether anything changed.
    pub fn access(&mut self, event: Event<Policy>) -> bool {
        let domain = &self.domain;
        let read = |object| Ok(Some(read(object, |metadata, spec| read_access(metadata, spec, domain))));
        let heard = self.access.hear(Kind::ACCESS_POLICIES, event, read);
        settle(Kind::ACCESS_POLICIES, &mut self.access, heard)
    }

    /// Takes note of a mesh policy; whether anything changed.
    pub fn mesh(&mut self, event: Event<Policy>) -> bool {
        let heard = self.mesh.hear(Kind::MESH_POLICIES, event, |object| Ok(Some(read(object, read_mesh))));
        settle(Kind::MESH_POLICIES, &mut self.mesh, heard)
    }

    /// Whether both kinds have been told in whole.
    pub fn is_read(&self) -> bool {
        self.access.is_read && self.mesh.is_read
    }

    /// What is in force.
    pub fn documents(&self) -> Documents {
        Documents {
            access: self.access.rows.values().map(|row| row.document.clone()).collect(),
            mesh: self.mesh.rows.values().map(|row| row.document.clone()).collect(),
        }
    }

    /// The objects that cannot be used, by kind and name, and why.
    pub fn faults(&self) -> impl Iterator<Item = (String, &str)> {
        fn of<D>(kind: Kind, objects: &Objects<Row<D>>) -> impl Iterator<Item = (String, &str)> {
            objects.rows.iter().filter_map(move |(name, row)| {
                Some((format!("{} {name}", kind.plural), row.fault.as_deref()?))
            })
        }
        of(Kind::ACCESS_POLICIES, &self.access).chain(of(Kind::MESH_POLICIES, &self.mesh))
    }

    /// Names this state: the same for everyone who was told of the same objects in the same generations.
    pub fn digest(&self) -> String {
        fn lines<D>(kind: Kind, objects: &Objects<Row<D>>) -> impl Iterator<Item = String> {
            objects.rows.values().map(move |row| format!("{} {} {}\n", kind.plural, row.uid, row.generation))
        }
        let (access, mesh) =
            (lines(Kind::ACCESS_POLICIES, &self.access), lines(Kind::MESH_POLICIES, &self.mesh));
        let mut lines: Vec<String> = access.chain(mesh).collect();
        lines.sort_unstable();
        hex(&digest(&SHA256, lines.concat().as_bytes()).as_ref()[..16])
    }
}

/// What an object came to, before it is known what was in force before.
struct Read<D> {
    uid: String,
    generation: i64,
    outcome: Result<D, String>,
    /// What counts if the object cannot be used and never could.
    closed: D,
}

fn read<D>(object: Policy, read: impl FnOnce(Metadata, Value) -> (Result<D, Fault>, D)) -> Read<D> {
    let meta = object.metadata;
    let metadata =
        Metadata { name: meta.name.unwrap_or_default(), namespace: meta.namespace.unwrap_or_default() };
    let (outcome, closed) = read(metadata, object.spec);
    Read {
        uid: meta.uid.unwrap_or_default(),
        generation: meta.generation.unwrap_or_default(),
        outcome: outcome.map_err(|(field, why)| format!("{field}: {why}")),
        closed,
    }
}

fn settle<D: PartialEq + Clone>(kind: Kind, objects: &mut Objects<Row<D>>, heard: Heard<Read<D>>) -> bool {
    let mut changed = false;
    for (name, read) in heard.changes {
        changed |= match read {
            None => objects.rows.remove(&name).is_some(),
            Some(read) => settle_one(kind, objects, name, read),
        };
    }
    changed
}

fn settle_one<D: PartialEq + Clone>(
    kind: Kind,
    objects: &mut Objects<Row<D>>,
    name: Name,
    read: Read<D>,
) -> bool {
    let before = objects.rows.get(&name);
    // Told again for what does not concern us: its status, its labels.
    if before.is_some_and(|row| row.uid == read.uid && row.generation == read.generation) {
        return false;
    }
    let (document, fault) = match read.outcome {
        Ok(document) => (document, None),
        Err(why) => {
            // Another object of the name is no earlier state of this one.
            let last = before.filter(|row| row.uid == read.uid);
            let instead =
                if last.is_some() { "what it said before stays" } else { "its workloads are closed" };
            tracing::error!(object = format!("{} {name}", kind.plural), why, "cannot be used; {instead}");
            (last.map_or(read.closed, |row| row.document.clone()), Some(why))
        }
    };
    let row = Row { uid: read.uid, generation: read.generation, document, fault };
    objects.rows.insert(Arc::clone(&name), row);
    true
}

fn from<T: DeserializeOwned>(value: &Value) -> Result<T, Fault> {
    T::deserialize(value).map_err(|error| ("spec".into(), error.to_string()))
}

/// Reads what an access policy says, and what counts if it cannot be used.
pub fn read_access(
    metadata: Metadata,
    spec: Value,
    domain: &TrustDomain,
) -> (Result<AccessPolicy, Fault>, AccessPolicy) {
    let policy = |metadata, spec| AccessPolicy {
        api_version: API_VERSION.into(),
        kind: access::KIND.into(),
        metadata,
        spec,
    };
    let is_deny = spec["action"] == "deny";
    let everybody = Peer { any: Some(true), ..Peer::default() };
    let named = from::<access::Selector>(&spec["selector"]).ok().filter(|it| it.check().is_ok());
    let closed = access::Spec {
        selector: Some(named.unwrap_or(access::Selector { all: Some(true), ..access::Selector::default() })),
        action: if is_deny { Action::Deny } else { Action::Allow },
        from: Some(if is_deny { vec![everybody] } else { Vec::new() }),
        ports: None,
        dry_run: spec["dryRun"] == true,
    };
    let outcome = from(&spec).and_then(|spec| {
        let policy = policy(metadata.clone(), spec);
        policy.check()?;
        Rules::compile(std::slice::from_ref(&policy), domain)
            .map_err(|(_, e)| ("spec".into(), e.to_string()))?;
        Ok(policy)
    });
    (outcome, policy(metadata, closed))
}

/// Reads what a mesh policy says, and what counts if it cannot be used.
pub fn read_mesh(metadata: Metadata, spec: Value) -> (Result<MeshPolicy, Fault>, MeshPolicy) {
    let policy = |metadata, spec| MeshPolicy {
        api_version: API_VERSION.into(),
        kind: mesh::KIND.into(),
        metadata,
        spec,
    };
    let named = from::<mesh::Selector>(&spec["selector"]).ok().filter(|it| it.check().is_ok());
    let closed = mesh::Spec {
        selector: Some(named.unwrap_or(mesh::Selector { all: Some(true), ..mesh::Selector::default() })),
        mode: spec.get("mode").map(|mode| from(mode).unwrap_or(Mode::Strict)),
        ..mesh::Spec::default()
    };
    let outcome = from(&spec).and_then(|spec| {
        let policy = policy(metadata.clone(), spec);
        policy.check().map(|()| policy)
    });
    (outcome, policy(metadata, closed))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(name: &str, uid: &str, generation: i64, spec: Value) -> Event<Policy> {
        let metadata = json!({"name": name, "namespace": "shop", "uid": uid, "generation": generation, "resourceVersion": "1"});
        Event::Apply(serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap())
    }

    fn kept() -> Kept {
        let mut kept = Kept::new(TrustDomain::parse("td.test").unwrap());
        for told in [Event::Init, Event::InitDone] {
            kept.access(told.clone());
            kept.mesh(told);
        }
        assert!(kept.is_read());
        kept
    }

    fn only(kept: &Kept) -> AccessPolicy {
        kept.documents().access.pop().unwrap()
    }

    #[test]
    fn what_was_said_stays_while_an_object_cannot_be_used() {
        let mut kept = kept();
        let good = json!({"selector": {"all": true}, "action": "allow", "from": [{"namespace": "shop"}]});
        assert!(kept.access(object("p", "u1", 1, good.clone())));
        let before = only(&kept);
        let bad = json!({"selector": {"all": true}, "action": "allow", "from": [{"namespace": "*"}]});
        assert!(kept.access(object("p", "u1", 2, bad.clone())));
        assert_eq!(only(&kept), before);
        let (name, why) = kept.faults().next().unwrap();
        assert_eq!(name, "accesspolicies shop/p");
        assert!(why.starts_with("spec.from[0].namespace: must be"), "{why}");
        // Made anew under its name, it never said anything.
        assert!(kept.access(object("p", "u2", 1, bad)));
        assert_eq!(only(&kept).spec.from, Some(Vec::new()));
        assert!(kept.access(object("p", "u2", 2, good)));
        assert_eq!((only(&kept), kept.faults().count()), (before, 0));
    }

    #[test]
    fn what_cannot_be_used_closes_what_it_is_about() {
        let domain = TrustDomain::parse("td.test").unwrap();
        let metadata = Metadata { name: "p".into(), namespace: "shop".into() };
        let closed = |spec: Value| {
            let (outcome, closed) = read_access(metadata.clone(), spec, &domain);
            outcome.unwrap_err();
            closed.check().unwrap();
            closed.spec
        };
        let some = json!({"workloads": ["db-0"]});
        let allow = closed(json!({"selector": some, "action": "allow", "from": [{"later": 1}]}));
        assert_eq!((allow.action, allow.from), (Action::Allow, Some(Vec::new())));
        assert_eq!(allow.selector.unwrap().workloads.unwrap(), ["db-0"]);
        let deny = closed(json!({"selector": {"later": true}, "action": "deny", "from": []}));
        assert_eq!(deny.from.unwrap()[0].any, Some(true));
        assert_eq!(deny.selector.unwrap().all, Some(true), "a selector that is not understood is everybody");
        assert!(closed(json!({"action": "allow", "dryRun": true})).dry_run);
        assert_eq!(closed(Value::Null).action, Action::Allow);

        let mode = |spec: Value| read_mesh(metadata.clone(), spec).1.spec.mode;
        assert_eq!(mode(json!({"mode": "off", "exclude": {"outboundCidrs": ["x"]}})), Some(Mode::Off));
        assert_eq!(mode(json!({"mode": "later"})), Some(Mode::Strict));
        assert_eq!(mode(json!({"exclude": {"outboundCidrs": ["x"]}})), None);
    }

    #[test]
    fn the_digest_is_of_generations_in_any_order_and_not_of_statuses() {
        let spec = json!({"selector": {"all": true}, "mode": "strict"});
        let told = |events: Vec<Event<Policy>>| {
            let mut kept = kept();
            for event in events {
                kept.mesh(event);
            }
            kept.digest()
        };
        let one = || object("a", "1", 1, spec.clone());
        let two = |generation| object("b", "2", generation, spec.clone());
        let digest = told(vec![one(), two(1)]);
        assert_eq!(digest.len(), 32);
        assert_eq!(digest, told(vec![two(1), one(), one()]));
        assert_ne!(digest, told(vec![one(), two(2)]));
        assert_ne!(digest, told(vec![one()]));
        let mut kept = kept();
        assert!(kept.mesh(one()) && !kept.mesh(one()), "told again");
    }
}
