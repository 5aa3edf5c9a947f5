//! An agent keeps its report in a Lease of its own.
//!
//! It is written when what matters in it changes (the policies in force, above all), and every minute. At 5,000 nodes that is 80 small writes a
//! second, a sixth of what the kubelets' own Leases are; after a change the writes are spread over seconds.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use tokio::time::{Instant, sleep, sleep_until};

use super::report::{ANNOTATION, LABEL, Report};
use crate::policy::kubernetes::Connection;

/// How often a Lease is renewed, give or take a fifth.
const EVERY: Duration = Duration::from_secs(60);
/// When an agent that was not heard of is taken for gone.
pub const GONE_AFTER: Duration = Duration::from_secs(200);
/// A change is told within this, by chance, for each node of the cluster; at most [`MOST_SPREAD`].
const SPREAD: Duration = Duration::from_millis(2);
const MOST_SPREAD: Duration = Duration::from_secs(10);
/// Between two looks at whether what matters has changed, and so between two writes at least.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Who owns the fields.
const MANAGER: &str = "hauberk-agent";

/// The name of a node's Lease.
pub fn name(node: &str) -> String {
    format!("hauberk-agent-{node}")
}

/// Runs for ever: keeps the node's Lease. `nodes` says how many nodes there are.
pub async fn keep(
    connection: Connection,
    node: String,
    nodes: impl Fn() -> usize,
    report: impl Fn() -> Report,
) {
    let leases: Api<Lease> = Api::namespaced(connection.client.clone(), &connection.namespace);
    let owner = owner(&connection, &node).await;
    let mut is_told = false;
    loop {
        let said = report();
        let lease = lease(&node, &connection.namespace, owner.clone(), &said);
        let params = PatchParams::apply(MANAGER).force();
        match leases.patch(&name(&node), &params, &Patch::Apply(&lease)).await {
            Ok(_) if is_told => {
                tracing::info!("the agent's Lease is kept again");
                is_told = false;
            }
            Err(error) if !is_told => {
                tracing::warn!(%error, namespace = connection.namespace, "cannot keep the agent's Lease (a Role must grant create and patch on leases there); policies' statuses do not count this agent");
                is_told = true;
            }
            _ => {}
        }
        let next = Instant::now() + EVERY.mul_f64(0.8 + 0.4 * fastrand::f64());
        tokio::select! {
            () = sleep_until(next) => {}
            () = differs(&report, &said) => {
                let spread = SPREAD.saturating_mul(u32::try_from(nodes()).unwrap_or(u32::MAX)).min(MOST_SPREAD);
                sleep(spread.mul_f64(fastrand::f64())).await;
            }
        }
    }
}

/// Resolves when something that matters is not as it was said.
async fn differs(report: &impl Fn() -> Report, said: &Report) {
    loop {
        sleep(LOOK_EVERY).await;
        if !report().matches(said) {
            return;
        }
    }
}

/// The node itself, so that its Lease goes with it.
async fn owner(connection: &Connection, node: &str) -> Option<Vec<OwnerReference>> {
    let nodes: Api<Node> = Api::all(connection.client.clone());
    let uid = nodes.get(node).await.ok()?.metadata.uid?;
    let node = OwnerReference {
        api_version: "v1".into(),
        kind: "Node".into(),
        name: node.into(),
        uid,
        ..OwnerReference::default()
    };
    Some(vec![node])
}

fn lease(node: &str, namespace: &str, owner: Option<Vec<OwnerReference>>, report: &Report) -> Lease {
    // Strings, numbers and lists of them: there is nothing in it that JSON cannot say.
    let text = serde_json::to_string(report).unwrap_or_default();
    let (label, value) = LABEL;
    Lease {
        metadata: ObjectMeta {
            name: Some(name(node)),
            namespace: Some(namespace.into()),
            labels: Some(BTreeMap::from([(label.into(), value.into())])),
            annotations: Some(BTreeMap::from([(ANNOTATION.into(), text)])),
            owner_references: owner,
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(node.into()),
            lease_duration_seconds: i32::try_from(GONE_AFTER.as_secs()).ok(),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::super::report::Heard;
    use super::*;

    #[test]
    fn a_report_comes_back_from_its_lease_and_grows_old() {
        let report = Report { policies: Some("d".into()), enrolled: 3, ..Report::default() };
        let lease = lease("n1", "hauberk-system", None, &report);
        let heard = Heard::read(&lease).unwrap();
        assert_eq!((heard.node.as_str(), &heard.report), ("n1", &report));
        let now = SystemTime::now();
        assert!(heard.is_live(now) && !heard.is_live(now + GONE_AFTER));
        let mut older = lease;
        let annotations = older.metadata.annotations.as_mut().unwrap();
        annotations.insert(ANNOTATION.into(), "{\"enrolled\": 2, \"later\": {}}".into());
        assert_eq!(Heard::read(&older).unwrap().report.enrolled, 2);
        older.metadata.annotations = None;
        assert!(Heard::read(&older).is_none());
    }
}
