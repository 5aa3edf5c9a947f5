//! The agent's state, as the admin server tells it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use serde_json::{Value, json};

use super::Page;
use crate::capture::Capture;
use crate::directory::Live;
use crate::enrol::{self, Standing};
use crate::identity::bundle::TrustBundle;
use crate::identity::crl::Listed;
use crate::identity::{SpiffeId, TrustDomain};
use crate::policy::Policies;
use crate::rotate;
use crate::telemetry::Metrics;
use crate::telemetry::metrics::{PolicyCounts, PolicyStanding};
use crate::trust::{Snapshot, Trust};

/// What has to hold before the agent is ready, each with the reason why it does not yet.
#[derive(Debug)]
pub struct Readiness(Mutex<BTreeMap<&'static str, Option<String>>>);

impl Readiness {
    /// All of these are still owed.
    pub fn new(conditions: &[&'static str]) -> Self {
        Self(Mutex::new(conditions.iter().map(|name| (*name, Some("not yet".to_owned()))).collect()))
    }

    /// Says how a condition stands; `None` means that it holds.
    pub fn set(&self, condition: &'static str, missing: Option<String>) {
        self.lock().insert(condition, missing);
    }

    /// The conditions that do not hold, with their reasons.
    pub fn missing(&self) -> BTreeMap<&'static str, String> {
        self.lock().iter().filter_map(|(name, why)| Some((*name, why.clone()?))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, Option<String>>> {
        // Entries are whole at every instant.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything that is told.
#[derive(Debug)]
pub struct State {
    /// This node's name.
    pub node: String,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// SVIDs and bundle.
    pub trust: Arc<Trust>,
    /// Who is where.
    pub directory: Arc<Live>,
    /// Who may reach whom.
    pub policies: Arc<Policies>,
    /// The kernel side.
    pub capture: Arc<Capture>,
    /// How the local workloads stand.
    pub enrolled: Arc<enrol::Status>,
    /// How the SVIDs stand.
    pub rotation: Arc<rotate::Status>,
    /// How long an outage of the issuer shall be outlived.
    pub availability_target: Option<Duration>,
    /// What readiness waits for.
    pub readiness: Arc<Readiness>,
}

impl State {
    /// Pages for everybody.
    pub fn public(&self, path: &str) -> Option<Page> {
        match path {
            "/metrics" => Some(Page::text(self.render())),
            "/healthz" => Some(Page::text("ok\n")),
            "/readyz" => Some(self.ready()),
            _ => None,
        }
    }

    /// Pages for whoever may open the admin socket.
    pub fn private(&self, path: &str) -> Option<Page> {
        match path {
            "/v1/status" => Some(self.status()),
            "/v1/workloads" => Some(self.workloads()),
            "/v1/certs" => Some(self.certs()),
            "/v1/policies" => Some(self.policies()),
            _ => self.public(path),
        }
    }

    fn render(&self) -> String {
        let enrolled =
            self.enrolled.now().values().filter(|standing| **standing == Standing::Enrolled).count();
        let loaded = self.policies.loaded();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let policies = loaded.policies().map(|(policy, _)| PolicyCounts {
            policy: &policy.name,
            denied: count(&policy.counts.denied),
            would_deny: count(&policy.counts.would_deny),
        });
        let policies = PolicyStanding { counts: policies.collect(), stale: self.policies.fault().is_some() };
        let trust = self.trust.snapshot();
        let margin = rotate::margin(&trust, self.availability_target, SystemTime::now());
        let page = self.metrics.render(&trust, self.capture.verdicts(), &policies, margin, enrolled);
        let policies = self.policies.standing().map(|standing| standing.render());
        page + &self.enrolled.render() + &self.directory.standing().render() + &policies.unwrap_or_default()
    }

    fn ready(&self) -> Page {
        let missing = self.readiness.missing();
        if missing.is_empty() {
            // The last good state serves on: a reason to look, not to be taken out of service.
            let stale = |what: &str, faults: Option<String>| {
                faults.map(|faults| format!("{what} stale: {faults}\n")).unwrap_or_default()
            };
            let directory = stale("directory is", self.directory.standing().faults());
            let policies = stale("policies are", self.policies.fault());
            return Page::text(format!("ready\n{directory}{policies}"));
        }
        let body = missing.iter().map(|(name, why)| format!("{name}: {why}\n")).collect::<String>();
        Page { status: StatusCode::SERVICE_UNAVAILABLE, ..Page::text(body) }
    }

    fn status(&self) -> Page {
        let enrolled = self.enrolled.now();
        let directory = self.directory.load();
        let trust = self.trust.snapshot();
        let margin = rotate::margin(&trust, self.availability_target, SystemTime::now());
        let warning = margin.at_risk.then_some(
            "an SVID ends sooner than availabilityTargetSeconds: see `hauberk certs` for which, and why it is not renewed",
        );
        Page::json(&json!({
            "version": env!("CARGO_PKG_VERSION"),
            "node": self.node,
            "trustDomain": trust.bundle.domain().as_str(),
            "ready": self.readiness.missing().is_empty(),
            "missing": self.readiness.missing(),
            "meshWorkloads": directory.workloads().count(),
            "directoryError": self.directory.standing().faults(),
            "enrolled": enrolled.values().filter(|standing| **standing == Standing::Enrolled).count(),
            "notEnrolled": enrolled.values().filter_map(Standing::fault).count(),
            "policies": self.policies.loaded().policies().count(),
            "meshPolicies": self.policies.mesh().load().count(),
            "policyDigest": self.policies.digest().as_deref(),
            "policyError": self.policies.fault(),
            "svids": trust.svids.len(),
            "outageMarginSeconds": margin.left.map(|left| left.as_secs()),
            "availabilityTargetSeconds": margin.target.map(|target| target.as_secs()),
            "warning": warning,
            "roots": trust.bundle.roots().len(),
            "rootsGeneration": trust.bundle.generation(),
            "trustDomainAliases": trust.bundle.aliases().iter().map(TrustDomain::as_str).collect::<Vec<_>>(),
            "federated": federated(&trust.bundle),
            "revocations": trust.bundle.revocations().entries().len(),
            "crls": trust.bundle.crls().0.len(),
            "crlErrors": crl_errors(&trust.bundle),
            "revocationsGeneration": trust.bundle.revocations().generation(),
        }))
    }

    fn workloads(&self) -> Page {
        let enrolled = self.enrolled.now();
        let directory = self.directory.load();
        let rows: Vec<_> = directory
            .workloads()
            .map(|workload| {
                let name = workload.full_name();
                let state = match enrolled.get(&name) {
                    Some(Standing::Enrolled) => "enrolled".to_owned(),
                    Some(Standing::Waiting(reason)) => format!("waiting: {reason}"),
                    Some(Standing::Failed(reason)) => format!("not enrolled: {reason}"),
                    None if workload.node == self.node => "off".to_owned(),
                    None => "remote".to_owned(),
                };
                json!({
                    "workload": name,
                    "id": workload.id.as_str(),
                    "node": workload.node,
                    "mode": workload.mode,
                    "exclusions": workload.exclusions.words(),
                    "addresses": workload.addresses,
                    "state": state,
                })
            })
            .collect();
        Page::json(&rows)
    }

    fn policies(&self) -> Page {
        let loaded = self.policies.loaded();
        let rows: Vec<_> = loaded
            .policies()
            .map(|(policy, document)| {
                let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
                json!({
                    "policy": &*policy.name,
                    "action": document.spec.action,
                    "dryRun": document.spec.dry_run,
                    "hits": count(&policy.counts.hits),
                    "denied": count(&policy.counts.denied),
                    "wouldDeny": count(&policy.counts.would_deny),
                })
            })
            .collect();
        Page::json(&rows)
    }

    fn certs(&self) -> Page {
        let (standing, now) = (self.rotation.now(), rotate::Moment::now());
        let trust = self.trust.snapshot();
        let mut rows: Vec<_> = standing.iter().map(|(id, how)| cert(&trust, id, how, now)).collect();
        rows.sort_by_key(|row| row["id"].to_string());
        Page::json(&rows)
    }
}

/// One identity's SVID, and what becomes of it.
fn cert(trust: &Snapshot, id: &SpiffeId, how: &rotate::Standing, moment: rotate::Moment) -> Value {
    let now = moment.wall;
    let leaf = trust.svids.get(id).map(|svid| svid.leaf());
    let revoked = leaf.and_then(|leaf| trust.revoked(leaf)).map(|revoked| revoked.by);
    let state = match leaf {
        None => "not issued",
        Some(leaf) if leaf.not_after <= now => "expired",
        Some(_) if revoked.is_some() => "revoked",
        Some(leaf) if leaf.not_before > now => "not valid yet",
        Some(_) if how.failures > 0 => "valid, renewal fails",
        Some(_) => "valid",
    };
    json!({
        "id": id.as_str(),
        "state": state,
        "issuer": leaf.and_then(|leaf| leaf.chain.first()).map(|certificate| certificate.issuer_name()),
        "serial": leaf.map(|leaf| &leaf.serial),
        "notBefore": leaf.map(|leaf| unix(leaf.not_before)),
        "notAfter": leaf.map(|leaf| unix(leaf.not_after)),
        "renewal": unix(how.at(moment)),
        "issuerAsksToWaitSeconds": how.asked(moment).map(|wait| wait.as_secs() + 1),
        "revoked": revoked,
        "failures": how.failures,
        "error": how.last_error,
    })
}

/// The other trust domains, with how many roots each has here.
fn federated(bundle: &TrustBundle) -> serde_json::Map<String, Value> {
    let all = bundle.federation().into_iter().flat_map(|federation| federation.iter());
    all.map(|(domain, federated)| (domain.to_string(), federated.roots().len().into())).collect()
}

/// What is wrong with CRLs, in words.
fn crl_errors(bundle: &TrustBundle) -> Vec<String> {
    let fault = |listed: &Listed| {
        let why = listed.unknown.as_ref().or(listed.fault.as_ref())?;
        Some(format!("{}: {why}", listed.file))
    };
    bundle.crls().0.iter().filter_map(fault).collect()
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::revocation::{Revocations, Subject};
    use crate::issue::Keypair;

    #[test]
    fn a_certificate_is_told_with_its_issuer_its_times_and_its_state() {
        let moment = rotate::Moment::now();
        let now = moment.wall;
        let domain = TrustDomain::parse("td.test").unwrap();
        let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now).unwrap()).unwrap();
        let trust = Trust::new(ca.bundle().clone());
        let id = SpiffeId::node(&domain, "n1").unwrap();
        let hour = Duration::from_secs(3600);
        let mut how = rotate::Standing::held(None, Duration::ZERO, moment);
        assert_eq!(cert(&trust.snapshot(), &id, &how, moment)["state"], "not issued");
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        trust.insert(key.with_chain(ca.issue(&proven, &id, hour, now).unwrap()).unwrap());
        let told = cert(&trust.snapshot(), &id, &how, moment);
        assert_eq!((&told["state"], &told["notAfter"]), (&json!("valid"), &json!(unix(now + hour))));
        assert!(told["issuer"].as_str().unwrap().contains("td.test root"), "{told}");
        (how.failures, how.last_error) = (1, Some("refused".into()));
        let told = cert(&trust.snapshot(), &id, &how, moment);
        assert_eq!((&told["state"], &told["error"]), (&json!("valid, renewal fails"), &json!("refused")));
        let late = rotate::Moment { wall: now + 2 * hour, ..moment };
        assert_eq!(cert(&trust.snapshot(), &id, &how, late)["state"], "expired");
        let mut list = Revocations::default();
        list.revoke(Subject::SpiffeId(id.clone()), now).unwrap();
        trust.set_revocations(list);
        assert_eq!(cert(&trust.snapshot(), &id, &how, moment)["state"], "revoked");
    }

    #[test]
    fn readiness_names_what_is_missing_until_nothing_is() {
        let readiness = Readiness::new(&["capture", "svid"]);
        readiness.set("capture", None);
        readiness.set("svid", Some("the authority cannot be reached".into()));
        assert_eq!(
            readiness.missing().into_iter().collect::<Vec<_>>(),
            [("svid", "the authority cannot be reached".to_owned())]
        );
        readiness.set("svid", None);
        assert!(readiness.missing().is_empty());
    }
}
