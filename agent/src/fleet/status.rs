//! Tells each policy's status whether it can be used, and how many agents have applied it.
//!
//! Every authority may run this: all come to the same words, and what is there already is not written again.
//! That a generation was applied by all agents stays true, so a policy is written once or twice for each
//! change of it, whatever other policies do.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::{StreamExt, stream};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::report::{Heard, LABEL};
use crate::directory::Standing;
use crate::directory::kubernetes::objects::{Kind, Policy};
use crate::directory::kubernetes::watch::updates;
use crate::document::{API_VERSION, GROUP, VERSION};
use crate::identity::TrustDomain;
use crate::policy::kubernetes::Connection;
use crate::policy::kubernetes::kept::Kept;

/// How often statuses are looked at; agents' Leases are read then.
const EVERY: Duration = Duration::from_secs(5);
/// Most statuses written at once; the rest comes next.
const AT_ONCE: usize = 100;
/// Agents that are named in a status.
const NAMED: usize = 3;
/// Who owns the fields.
const MANAGER: &str = "hauberk-authority";

/// A condition of a status, as Kubernetes has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// In one word.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Of the object that it was said of.
    pub observed_generation: i64,
    /// Since when it is so (RFC 3339).
    pub last_transition_time: String,
}

impl Condition {
    fn new(kind: &str, status: &str, reason: &str, message: String, generation: i64) -> Self {
        Self {
            kind: kind.into(),
            status: status.into(),
            reason: reason.into(),
            message,
            observed_generation: generation,
            last_transition_time: String::new(),
        }
    }

    fn says_the_same(&self, other: &Self) -> bool {
        let words =
            |it: &Self| (it.status.clone(), it.reason.clone(), it.message.clone(), it.observed_generation);
        words(self) == words(other)
    }
}

/// A policy object and what its status says.
#[derive(Clone, Debug)]
struct Object {
    kind: Kind,
    namespace: String,
    name: String,
    generation: i64,
    said: Vec<Condition>,
}

/// A status to be written.
#[derive(Clone, Debug)]
struct Write {
    object: Object,
    conditions: Vec<Condition>,
}

/// What agents have applied: their nodes, with the digest of each.
type Agents = BTreeMap<String, Option<String>>;

/// What an object's conditions should be; `None` if they say it already.
fn owed(object: &Object, fault: Option<&str>, digest: &str, agents: &Agents, now: &str) -> Option<Write> {
    let generation = object.generation;
    let said = |kind: &str| object.said.iter().find(|condition| condition.kind == kind);
    let accepted = match fault {
        None => Condition::new("Accepted", "True", "Valid", "it can be used".into(), generation),
        Some(why) => Condition::new("Accepted", "False", "Invalid", why.into(), generation),
    };
    let stays = said("Applied").filter(|it| it.status == "True" && it.observed_generation == generation);
    let applied = stays.cloned().unwrap_or_else(|| applied(digest, agents, generation));
    let conditions = [accepted, applied].map(|mut condition| {
        let before = said(&condition.kind).filter(|before| before.status == condition.status);
        condition.last_transition_time =
            before.map_or_else(|| now.to_owned(), |before| before.last_transition_time.clone());
        condition
    });
    let is_said = |condition: &Condition| said(&condition.kind).is_some_and(|it| it.says_the_same(condition));
    (!conditions.iter().all(is_said))
        .then(|| Write { object: object.clone(), conditions: conditions.to_vec() })
}

fn applied(digest: &str, agents: &Agents, generation: i64) -> Condition {
    let waiting = agents.iter().filter(|(_, applied)| applied.as_deref() != Some(digest));
    let waiting: Vec<&str> = waiting.map(|(node, _)| node.as_str()).collect();
    let (all, done) = (agents.len(), agents.len() - waiting.len());
    let (status, reason, message) = match waiting.len() {
        _ if all == 0 => ("Unknown", "NoAgents", "no agent keeps a Lease".to_owned()),
        0 => ("True", "Applied", format!("{all} of {all} agents")),
        many => {
            let named = waiting[..many.min(NAMED)].join(", ");
            let more = if many > NAMED { format!(" and {} more", many - NAMED) } else { String::new() };
            ("False", "Pending", format!("{done} of {all} agents; not yet {named}{more}"))
        }
    };
    Condition::new("Applied", status, reason, message, generation)
}

enum Update {
    Access(Event<Policy>),
    Mesh(Event<Policy>),
}

/// The cluster's policies with their statuses.
struct Known {
    kept: Kept,
    objects: HashMap<String, Object>,
}

impl Known {
    fn hear(&mut self, update: Update) {
        match update {
            Update::Access(event) => {
                self.note(Kind::ACCESS_POLICIES, &event);
                self.kept.access(event);
            }
            Update::Mesh(event) => {
                self.note(Kind::MESH_POLICIES, &event);
                self.kept.mesh(event);
            }
        }
    }

    fn note(&mut self, kind: Kind, event: &Event<Policy>) {
        let key = |policy: &Policy| {
            let meta = &policy.metadata;
            let of = |text: &Option<String>| text.clone().unwrap_or_default();
            format!("{} {}/{}", kind.plural, of(&meta.namespace), of(&meta.name))
        };
        match event {
            // What is told anew is told in whole: whatever is missing from it is gone.
            Event::Init => self.objects.retain(|_, object| object.kind != kind),
            Event::InitDone => {}
            Event::Delete(policy) => drop(self.objects.remove(&key(policy))),
            Event::Apply(policy) | Event::InitApply(policy) => {
                let meta = &policy.metadata;
                let said = Vec::<Condition>::deserialize(&policy.status["conditions"]).unwrap_or_default();
                let object = Object {
                    kind,
                    namespace: meta.namespace.clone().unwrap_or_default(),
                    name: meta.name.clone().unwrap_or_default(),
                    generation: meta.generation.unwrap_or_default(),
                    said,
                };
                self.objects.insert(key(policy), object);
            }
        }
    }

    fn owed(&self, agents: &Agents) -> Vec<Write> {
        let digest = self.kept.digest();
        let faults: HashMap<String, &str> = self.kept.faults().collect();
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let fault = |key: &str| faults.get(key).copied();
        self.objects
            .iter()
            .filter_map(|(key, object)| owed(object, fault(key), &digest, agents, &now))
            .collect()
    }
}

/// Runs for ever: keeps the policies' statuses.
pub async fn keep(connection: Connection, domain: TrustDomain, standing: Arc<Standing>) {
    let client = &connection.client;
    let mut updates = stream::select_all([
        updates(client, Kind::ACCESS_POLICIES, &standing, Update::Access),
        updates(client, Kind::MESH_POLICIES, &standing, Update::Mesh),
    ]);
    let mut known = Known { kept: Kept::new(domain), objects: HashMap::new() };
    // Not in step with another authority: who comes later finds it written.
    let first = Instant::now() + EVERY.mul_f64(fastrand::f64());
    let mut every = interval(EVERY);
    every.reset_at(first);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = None;
    loop {
        tokio::select! {
            Some(update) = updates.next() => known.hear(update),
            _ = every.tick(), if known.kept.is_read() => {
                let outcome = write(&connection, &known).await.err().map(|error| error.to_string());
                if let Some(error) = &outcome && told != outcome {
                    tracing::warn!(error, "cannot keep the policies' statuses; trying again");
                }
                told = outcome;
            }
        }
    }
}

async fn write(connection: &Connection, known: &Known) -> Result<(), kube::Error> {
    if known.objects.is_empty() {
        return Ok(());
    }
    let agents = live(&connection.client, &connection.namespace).await?;
    let now = SystemTime::now();
    let agents: Agents = agents
        .into_iter()
        .filter(|heard| heard.is_live(now))
        .map(|heard| (heard.node, heard.report.policies))
        .collect();
    for Write { object, conditions } in known.owed(&agents).into_iter().take(AT_ONCE) {
        let kind = kind_of(object.kind);
        let api: Api<DynamicObject> =
            Api::namespaced_with(connection.client.clone(), &object.namespace, &kind);
        let status = json!({
            "apiVersion": API_VERSION,
            "kind": kind.kind,
            "metadata": {"name": object.name, "namespace": object.namespace},
            "status": {"conditions": conditions},
        });
        let params = PatchParams::apply(MANAGER).force();
        match api.patch_status(&object.name, &params, &Patch::Apply(&status)).await {
            // Deleted meanwhile.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            outcome => drop(outcome?),
        }
    }
    Ok(())
}

/// What the agents say of themselves.
///
/// # Errors
/// When their Leases cannot be read.
pub async fn live(client: &Client, namespace: &str) -> Result<Vec<Heard>, kube::Error> {
    let (label, value) = LABEL;
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    let listed = leases.list(&ListParams::default().labels(&format!("{label}={value}"))).await?;
    Ok(listed.iter().filter_map(Heard::read).collect())
}

fn kind_of(kind: Kind) -> ApiResource {
    let name = if kind == Kind::ACCESS_POLICIES { "AccessPolicy" } else { "MeshPolicy" };
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, name), kind.plural)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agents(applied: &[(&str, &str)]) -> Agents {
        applied.iter().map(|(node, digest)| ((*node).into(), Some((*digest).into()))).collect()
    }

    fn object(generation: i64, said: Vec<Condition>) -> Object {
        Object { kind: Kind::MESH_POLICIES, namespace: "shop".into(), name: "p".into(), generation, said }
    }

    fn words(write: Option<Write>) -> Vec<(String, String, String)> {
        let conditions = write.map(|write| write.conditions).unwrap_or_default();
        conditions.into_iter().map(|it| (it.status, it.message, it.last_transition_time)).collect()
    }

    #[test]
    fn a_generation_that_all_have_applied_stays_applied_and_is_written_once() {
        let (some, all) = (agents(&[("a", "new"), ("b", "old")]), agents(&[("a", "new"), ("b", "new")]));
        let first = owed(&object(1, Vec::new()), None, "new", &some, "t1").unwrap().conditions;
        assert_eq!((&*first[1].status, &*first[1].message), ("False", "1 of 2 agents; not yet b"));
        assert!(owed(&object(1, first.clone()), None, "new", &some, "t2").is_none(), "said already");
        let second = owed(&object(1, first), None, "new", &all, "t3").unwrap().conditions;
        assert_eq!((&*second[1].status, &*second[1].message), ("True", "2 of 2 agents"));
        assert_eq!(second[0].last_transition_time, "t1", "nothing changed there");
        assert_eq!(second[1].last_transition_time, "t3");
        assert!(
            owed(&object(1, second.clone()), None, "newer", &all, "t4").is_none(),
            "another policy changed"
        );
        let third = words(owed(&object(2, second), None, "newer", &all, "t5"));
        assert_eq!(third[1], ("False".into(), "0 of 2 agents; not yet a, b".into(), "t5".into()));
    }

    #[test]
    fn what_cannot_be_used_says_why_and_nobody_is_unknown() {
        let said = words(owed(&object(1, Vec::new()), Some("spec.mode: x"), "d", &Agents::new(), "t"));
        assert_eq!(said[0], ("False".into(), "spec.mode: x".into(), "t".into()));
        assert_eq!(said[1].0, "Unknown");
        let many: Vec<String> = (0..5).map(|n| format!("n{n}")).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|node| (node.as_str(), "old")).collect();
        let said = words(owed(&object(1, Vec::new()), None, "d", &agents(&many), "t"));
        assert_eq!(said[1].1, "0 of 5 agents; not yet n0, n1, n2 and 2 more");
    }
}
