//! What to make of what was gathered: pure, one function for each named check.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::{Duration, UNIX_EPOCH};

use super::{Facts, Found};
use crate::check::kernel;
use crate::fleet::report::Heard;

const DAY: u64 = 86_400;
/// Roots have to be valid for longer than this: replacing one takes its time.
const ROOT_DAYS: u64 = 60;
/// A renewal that fails this near to the end is no matter of patience any more.
const SVID_SECONDS: u64 = 600;
/// Clocks this far apart are told, and this far fail: an SVID may be refused as not yet valid.
const SKEW_TOLD: Duration = Duration::from_secs(5);
const SKEW_FAILS: Duration = Duration::from_secs(60);
/// How many nodes or objects a line names.
const NAMED: usize = 5;

/// Every check, in the order in which one fault explains the next.
pub(super) fn all(facts: &Facts) -> Vec<Found> {
    let mut found = vec![
        Found::ok("API server", facts.server.clone()),
        definitions(facts),
        rights(facts),
        authority(facts),
        agents(facts),
    ];
    let Ok(heard) = &facts.agents else { return found };
    let live: Vec<&Heard> = heard.iter().filter(|agent| agent.is_live(facts.now)).collect();
    found.extend([
        kernels(&live),
        versions(&live),
        clocks(&live),
        ready(&live),
        roots(&live, facts),
        certificates(&live, facts),
        captured(&live),
        reached(&live),
        policies(&live, facts),
    ]);
    found
}

/// Names some, and counts the rest.
fn some(what: impl IntoIterator<Item = String>) -> String {
    let all: Vec<String> = what.into_iter().collect();
    match all.len().checked_sub(NAMED) {
        Some(more @ 1..) => format!("{} and {more} more", all[..NAMED].join("; ")),
        _ => all.join("; "),
    }
}

fn definitions(facts: &Facts) -> Found {
    const NAME: &str = "definitions";
    match &facts.policies {
        Ok(_) => Found::ok(NAME, "AccessPolicy and MeshPolicy are served"),
        Err(error) => Found::fail(NAME, error.clone(), "kubectl apply -k manifests/crds"),
    }
}

fn rights(facts: &Facts) -> Found {
    const NAME: &str = "RBAC";
    match &facts.rights {
        Ok(missing) if missing.is_empty() => {
            Found::ok(NAME, "agents and authority have the rights they need")
        }
        Ok(missing) => Found::fail(
            NAME,
            some(missing.clone()),
            "apply manifests/base/agent/rbac.yaml and manifests/base/authority/rbac.yaml (or their like)",
        ),
        Err(error) => Found::warn(
            NAME,
            format!("cannot be asked: {error}"),
            "whoever checks needs to create subjectaccessreviews",
        ),
    }
}

fn authority(facts: &Facts) -> Found {
    const NAME: &str = "authority";
    const LOOK: &str = "kubectl -n hauberk-system describe deployment hauberk-authority, and its pods' logs";
    match &facts.authority {
        Ok(None) => Found::ok(NAME, "not installed: another issuer is used"),
        Ok(Some((_, 0))) => Found::fail(NAME, "no replica is available", LOOK),
        Ok(Some((wanted, available))) if available < wanted => {
            Found::warn(NAME, format!("{available} of {wanted} replicas are available"), LOOK)
        }
        Ok(Some((wanted, _))) => Found::ok(NAME, format!("{wanted} replicas are available")),
        Err(error) => {
            Found::warn(NAME, format!("cannot be asked: {error}"), "whoever checks needs to get deployments")
        }
    }
}

fn agents(facts: &Facts) -> Found {
    const NAME: &str = "agents";
    const LOOK: &str = "look at its pod (kubectl -n hauberk-system get pods -o wide) and that pod's log";
    let (agents, nodes) = match (&facts.agents, &facts.nodes) {
        (Ok(agents), Ok(nodes)) => (agents, nodes),
        (Err(error), _) => {
            return Found::fail(
                NAME,
                format!("cannot read Leases: {error}"),
                "whoever checks needs to list leases in hauberk-system (--namespace)",
            );
        }
        (_, Err(error)) => {
            return Found::fail(
                NAME,
                format!("cannot list nodes: {error}"),
                "whoever checks needs to list nodes",
            );
        }
    };
    let live: HashSet<&str> =
        agents.iter().filter(|agent| agent.is_live(facts.now)).map(|agent| agent.node.as_str()).collect();
    let without: Vec<String> = nodes.iter().filter(|node| !live.contains(node.as_str())).cloned().collect();
    if without.is_empty() {
        return Found::ok(NAME, format!("on all {} nodes", nodes.len()));
    }
    let detail = format!(
        "{} of {} nodes have no agent that was heard of lately: {}",
        without.len(),
        nodes.len(),
        some(without)
    );
    Found::fail(NAME, detail, LOOK)
}

fn kernels(live: &[&Heard]) -> Found {
    const NAME: &str = "kernels";
    let below = |least: (u32, u32)| {
        let older = move |agent: &&&Heard| {
            kernel::version_of(&agent.report.kernel).is_none_or(|version| version < least)
        };
        live.iter().filter(older).map(|agent| format!("{}: {}", agent.node, agent.report.kernel))
    };
    if below(kernel::LEAST).next().is_some() {
        return Found::fail(NAME, some(below(kernel::LEAST)), "needs Linux 6.1, better 6.6 or later");
    }
    if below(kernel::WITH_GUARD).next().is_some() {
        let words = "the egress guard needs 6.6; capture.egressGuard: optional does without";
        return Found::warn(NAME, some(below(kernel::WITH_GUARD)), words);
    }
    let kernels: BTreeSet<&str> = live.iter().map(|agent| agent.report.kernel.as_str()).collect();
    Found::ok(NAME, some(kernels.into_iter().map(Into::into)))
}

fn versions(live: &[&Heard]) -> Found {
    const NAME: &str = "versions";
    let mut by_version: BTreeMap<&str, usize> = BTreeMap::new();
    live.iter().for_each(|agent| *by_version.entry(&agent.report.version).or_default() += 1);
    let own = env!("CARGO_PKG_VERSION");
    let words = some(by_version.iter().map(|(version, count)| format!("{count} with {version}")));
    match by_version.len() {
        0 => Found::ok(NAME, "no agents"),
        1 if by_version.contains_key(own) => Found::ok(NAME, words),
        1 => {
            Found::warn(NAME, format!("{words}; this program is {own}"), "check with the agents' own version")
        }
        _ => Found::warn(
            NAME,
            words,
            "an upgrade is under way, or stuck: kubectl -n hauberk-system rollout status ds/hauberk-agent",
        ),
    }
}

/// How far an agent's clock is from the API server's, beyond what the latter's seconds and the way take.
fn skew(agent: &Heard) -> Option<Duration> {
    let told = agent.told?;
    let apart = told.duration_since(agent.at).or_else(|_| agent.at.duration_since(told)).ok()?;
    Some(apart.saturating_sub(Duration::from_secs(1)))
}

fn clocks(live: &[&Heard]) -> Found {
    const NAME: &str = "clocks";
    const MEND: &str = "run chrony or systemd-timesyncd on these nodes: certificates depend on the time";
    let apart = |least: Duration| {
        live.iter().filter_map(move |agent| {
            let skew = skew(agent).filter(|skew| *skew >= least)?;
            Some(format!("{}: {} s from the API server's", agent.node, skew.as_secs()))
        })
    };
    if apart(SKEW_FAILS).next().is_some() {
        return Found::fail(NAME, some(apart(SKEW_FAILS)), MEND);
    }
    if apart(SKEW_TOLD).next().is_some() {
        return Found::warn(NAME, some(apart(SKEW_TOLD)), MEND);
    }
    Found::ok(NAME, "within seconds of the API server's")
}

fn ready(live: &[&Heard]) -> Found {
    const NAME: &str = "readiness";
    let words = |agent: &&Heard| {
        let missing = agent.report.missing.first()?;
        Some(format!("{}: {missing}", agent.node))
    };
    let stale = |agent: &&Heard| {
        let fault = agent.report.directory_fault.as_ref()?;
        Some(format!("{}: the directory is stale: {fault}", agent.node))
    };
    if live.iter().any(|agent| words(agent).is_some()) {
        return Found::fail(
            NAME,
            some(live.iter().filter_map(words)),
            "hauberk status on the node says more",
        );
    }
    if live.iter().any(|agent| stale(agent).is_some()) {
        return Found::fail(
            NAME,
            some(live.iter().filter_map(stale)),
            "mend what the API server's words name",
        );
    }
    Found::ok(NAME, format!("{} agents are ready", live.len()))
}

fn roots(live: &[&Heard], facts: &Facts) -> Found {
    const NAME: &str = "roots";
    let now = facts.now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let first = live.iter().filter_map(|agent| agent.report.roots_until).min();
    match first.map(|until| until.saturating_sub(now) / DAY) {
        None => Found::warn(NAME, "no agent knows of any", "see readiness"),
        Some(0) => Found::fail(NAME, "a root has expired, or does today", "distribute a new bundle"),
        Some(days @ 1..=ROOT_DAYS) => Found::fail(
            NAME,
            format!("a root expires in {days} days"),
            "replace it: distribute old and new together first",
        ),
        Some(days) => Found::ok(NAME, format!("valid for {days} days")),
    }
}

fn certificates(live: &[&Heard], facts: &Facts) -> Found {
    const NAME: &str = "certificates";
    const LOOK: &str = "hauberk certs on the node says why; look at the issuer";
    let now = facts.now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let ends = |agent: &&&Heard| agent.report.svids_until.is_some_and(|until| until < now + SVID_SECONDS);
    if live.iter().any(|agent| ends(&agent)) {
        let words = live
            .iter()
            .filter(ends)
            .map(|agent| format!("{}: one ends within 10 minutes and was not renewed", agent.node));
        return Found::fail(NAME, some(words), LOOK);
    }
    let failures = || {
        let failed = |agent: &&Heard| {
            agent.report.svid_failures.iter().map(|why| format!("{}: {why}", agent.node)).collect::<Vec<_>>()
        };
        live.iter().flat_map(failed)
    };
    if failures().next().is_some() {
        return Found::warn(NAME, some(failures()), LOOK);
    }
    Found::ok(NAME, "renewed in time everywhere")
}

fn captured(live: &[&Heard]) -> Found {
    const NAME: &str = "captured pods";
    let not: usize = live.iter().map(|agent| agent.report.not_enrolled).sum();
    let captured: usize = live.iter().map(|agent| agent.report.enrolled).sum();
    if not == 0 {
        return Found::ok(NAME, format!("all {captured} pods of the mesh"));
    }
    let why = live.iter().flat_map(|agent| agent.report.why_not_enrolled.iter().cloned());
    Found::fail(
        NAME,
        format!("{not} of {} are not: {}", not + captured, some(why)),
        "the agent tries again every second; mend the reason",
    )
}

fn reached(live: &[&Heard]) -> Found {
    const NAME: &str = "15008 between nodes";
    let nodes: HashSet<&str> = live.iter().map(|agent| agent.node.as_str()).collect();
    // Who has no agent is told elsewhere.
    let not = live.iter().flat_map(|agent| {
        let not = agent.report.not_reached.iter().filter(|(node, _)| nodes.contains(node.as_str()));
        not.map(|(node, why)| format!("{} to {node}: {why}", agent.node))
    });
    let not: Vec<String> = not.collect();
    if !not.is_empty() {
        return Found::fail(
            NAME,
            some(not),
            "a firewall, security group or host policy stops TCP to the tunnel's port between nodes",
        );
    }
    let looked: usize = live
        .iter()
        .map(|agent| agent.report.looked_for.iter().filter(|node| nodes.contains(node.as_str())).count())
        .sum();
    match (looked, live.len()) {
        (0, 2..) => Found::warn(NAME, "no agent has looked yet", "check again in a minute"),
        (0, _) => Found::ok(NAME, "there are no two nodes with agents"),
        _ => Found::ok(NAME, format!("{looked} connections tried, all made")),
    }
}

fn policies(live: &[&Heard], facts: &Facts) -> Found {
    const NAME: &str = "policies";
    let Ok(policies) = &facts.policies else { return Found::fail(NAME, "cannot be read", "see definitions") };
    if !policies.faults.is_empty() {
        let words = policies.faults.iter().map(|(object, why)| format!("{object}: {why}"));
        return Found::fail(
            NAME,
            some(words),
            "correct the object; until then what it said before holds, or its workloads are closed",
        );
    }
    let other = |agent: &&&Heard| agent.report.policies.as_deref() != Some(&policies.digest);
    let behind: Vec<String> = live
        .iter()
        .filter(other)
        .map(|agent| {
            format!(
                "{}: {}",
                agent.node,
                agent.report.policy_fault.as_deref().unwrap_or("has not applied the newest yet")
            )
        })
        .collect();
    if !behind.is_empty() {
        return Found::warn(
            NAME,
            some(behind),
            "check again in some seconds, then look at these agents' logs",
        );
    }
    Found::ok(NAME, format!("{}, all parsed and applied by all agents", policies.count))
}

#[cfg(test)]
mod tests;
