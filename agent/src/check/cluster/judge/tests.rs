use std::time::SystemTime;

use super::*;
use crate::check::Outcome;
use crate::check::cluster::Policies;
use crate::fleet::report::Report;

const NOW: u64 = 1_800_000_000;

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(NOW)
}

/// Two nodes with agents that want for nothing.
fn facts() -> Facts {
    let agent = |node: &str, other: &str| Heard {
        node: node.into(),
        at: now(),
        told: Some(now()),
        report: Report {
            version: env!("CARGO_PKG_VERSION").into(),
            kernel: "6.12.1-x".into(),
            policies: Some("d".into()),
            enrolled: 3,
            roots_until: Some(NOW + 90 * DAY),
            svids_until: Some(NOW + 3000),
            looked_for: vec![other.into()],
            ..Report::default()
        },
    };
    Facts {
        now: now(),
        server: "v1.33.0".into(),
        nodes: Ok(vec!["n1".into(), "n2".into()]),
        agents: Ok(vec![agent("n1", "n2"), agent("n2", "n1")]),
        authority: Ok(Some((2, 2))),
        policies: Ok(Policies { count: 4, faults: Vec::new(), digest: "d".into() }),
        rights: Ok(Vec::new()),
    }
}

fn with(change: impl FnOnce(&mut Report)) -> Facts {
    let mut facts = facts();
    change(&mut facts.agents.as_mut().unwrap()[1].report);
    facts
}

#[test]
fn a_mesh_that_stands_fails_nothing() {
    let wrong: Vec<_> = all(&facts()).into_iter().filter(|found| found.outcome != Outcome::Ok).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn each_fault_is_found_under_its_name_and_says_what_to_do() {
    use Outcome::{Fail, Warn};
    let mut gone = facts();
    gone.agents.as_mut().unwrap()[1].at = now() - Duration::from_secs(3600);
    let mut ahead = facts();
    ahead.agents.as_mut().unwrap()[1].told = Some(now() - Duration::from_secs(100));
    let mut slightly = facts();
    slightly.agents.as_mut().unwrap()[1].told = Some(now() + Duration::from_secs(7));
    for (facts, name, outcome, words) in [
        (Facts { rights: Ok(vec!["x may not y".into()]), ..facts() }, "RBAC", Fail, "x may not y"),
        (Facts { rights: Err("403".into()), ..facts() }, "RBAC", Warn, "403"),
        (Facts { authority: Ok(Some((2, 0))), ..facts() }, "authority", Fail, "no replica"),
        (Facts { authority: Ok(Some((2, 1))), ..facts() }, "authority", Warn, "1 of 2"),
        (Facts { policies: Err("404".into()), ..facts() }, "definitions", Fail, "404"),
        (Facts { agents: Err("403".into()), ..facts() }, "agents", Fail, "403"),
        (gone, "agents", Fail, "1 of 2 nodes have no agent that was heard of lately: n2"),
        (ahead, "clocks", Fail, "n2: 99 s"),
        (slightly, "clocks", Warn, "n2: 6 s"),
        (with(|it| it.kernel = "5.15.0-91".into()), "kernels", Fail, "n2: 5.15"),
        (with(|it| it.kernel = "6.1.0-91".into()), "kernels", Warn, "n2: 6.1"),
        (with(|it| it.version = "0.0.9".into()), "versions", Warn, "1 with 0.0.9"),
        (with(|it| it.missing = vec!["directory: x".into()]), "readiness", Fail, "n2: directory: x"),
        (with(|it| it.directory_fault = Some("y".into())), "readiness", Fail, "stale: y"),
        (with(|it| it.roots_until = Some(NOW + 60 * DAY)), "roots", Fail, "in 60 days"),
        (with(|it| it.roots_until = Some(NOW - 5)), "roots", Fail, "has expired"),
        (with(|it| it.svids_until = Some(NOW + 100)), "certificates", Fail, "n2"),
        (with(|it| it.svid_failures = vec!["id: no".into()]), "certificates", Warn, "n2: id: no"),
        (
            with(|it| (it.not_enrolled, it.why_not_enrolled) = (1, vec!["shop/a: z".into()])),
            "captured pods",
            Fail,
            "1 of 7 are not: shop/a: z",
        ),
        (
            with(|it| it.not_reached = vec![("n1".into(), "no answer".into())]),
            "15008 between nodes",
            Fail,
            "n2 to n1: no answer",
        ),
        (with(|it| it.policies = Some("e".into())), "policies", Warn, "n2: has not applied"),
        (
            Facts {
                policies: Ok(Policies { faults: vec![("o".into(), "w".into())], ..Policies::default() }),
                ..facts()
            },
            "policies",
            Fail,
            "o: w",
        ),
    ] {
        let all = all(&facts);
        let found = all.iter().find(|found| found.name == name).unwrap_or_else(|| panic!("{name}: {all:?}"));
        assert_eq!(found.outcome, outcome, "{found:?}");
        assert!(found.detail.contains(words), "{words}: {found:?}");
        assert!(!found.remedy.is_empty(), "{found:?}");
    }
}

#[test]
fn a_node_without_an_agent_is_no_unreachable_one() {
    let mut facts = with(|it| it.not_reached = vec![("n3".into(), "refused".into())]);
    facts.nodes = Ok(vec!["n1".into(), "n2".into(), "n3".into()]);
    let all = all(&facts);
    let outcome = |name: &str| all.iter().find(|found| found.name == name).unwrap().outcome;
    assert_eq!((outcome("agents"), outcome("15008 between nodes")), (Outcome::Fail, Outcome::Ok));
}
