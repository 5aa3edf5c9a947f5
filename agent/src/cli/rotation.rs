//! `hauberk authority rotate-root` and `status`: they write what is wanted into the authority's state, and ask
//! the running authority how it stands. The authority does the rest.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;

use super::{Output, ask, table};
use crate::authority::AuthorityConfig;
use crate::authority::state::{describe, start_rotation};
use crate::ca::state::seconds;
use crate::ca::store::Store;
use crate::identity::revocation::NodeName;

/// How often the authority is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long a restarting authority is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to do with the rotation.
#[derive(Debug, Args)]
pub(super) struct How {
    /// Go back to the root before.
    #[arg(long, conflicts_with_all = ["status", "exclude_node"])]
    abort: bool,
    /// Only tell how far it is.
    #[arg(long)]
    status: bool,
    /// Do not wait for this node: until it hears of the new root, it refuses whoever shows an SVID under that.
    #[arg(long, value_name = "NODE")]
    exclude_node: Vec<NodeName>,
    /// Begin it, or go on, and do not wait for its end.
    #[arg(long)]
    no_wait: bool,
    /// How to print: lines, or one JSON object a line.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

pub(super) fn rotate(config: &AuthorityConfig, how: How) -> Result<()> {
    let store = Store::open(&config.state_dir)?;
    let now = SystemTime::now();
    if how.abort {
        store.change_trust(|state| state.abort(seconds(now)))?;
    } else if !how.status {
        ask(config).context("a rotation goes on only while the authority runs")?;
        match start_rotation(&store, config, now)? {
            Some(root) => eprintln!("begun: the new root is {root}"),
            None => eprintln!("a rotation is under way: going on with it"),
        }
        for node in &how.exclude_node {
            store.change_trust(|state| state.exclude(node.clone()))?;
            eprintln!("not waiting for node {}", node.as_str());
        }
    }
    follow(config, &how)
}

/// Prints how far the rotation is whenever that changes, until it has ended.
fn follow(config: &AuthorityConfig, how: &How) -> Result<()> {
    let mut told = Value::Null;
    let mut heard = Instant::now();
    loop {
        let now = match ask(config) {
            // What the command has written is on disk before the authority has seen it.
            Ok(now) if how.status || is_current(config, &now)? => now,
            Ok(_) => Value::Null,
            Err(error) if how.abort => {
                println!("aborted; the authority takes that up when it runs again ({error:#})");
                return Ok(());
            }
            Err(error) if how.status || heard.elapsed() > PATIENCE => return Err(error),
            Err(_) => Value::Null,
        };
        if !now.is_null() {
            heard = Instant::now();
            let progress = progress(&now);
            if progress != told {
                print(&progress, how.output)?;
                told = progress;
            }
            let idle = now["rotation"]["phase"] == "idle";
            if idle || how.status || how.no_wait || how.abort {
                return Ok(());
            }
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Whether the authority has taken up what is on disk.
fn is_current(config: &AuthorityConfig, now: &Value) -> Result<bool> {
    let state = Store::open(&config.state_dir)?.trust(&config.trust_domain)?;
    Ok(state.is_none_or(|state| {
        now["generation"].as_u64() >= Some(state.generation)
            && (now["rotation"]["phase"] == state.rotation.phase()
                || now["generation"].as_u64() > Some(state.generation))
    }))
}

/// What is told of a rotation.
fn progress(now: &Value) -> Value {
    serde_json::json!({
        "phase": now["rotation"]["phase"],
        "generation": now["generation"],
        "waitsFor": now["rotation"]["waitsFor"],
        "excluded": now["rotation"]["excluded"],
        "roots": now["roots"].as_array().map(|roots| {
            let short = |root: &Value| serde_json::json!({"id": root["id"], "state": root["state"]});
            roots.iter().map(short).collect::<Vec<_>>()
        }),
    })
}

fn print(progress: &Value, output: Output) -> Result<()> {
    match output {
        Output::Json => println!("{progress}"),
        Output::Table => println!("{}", line(progress)?),
    }
    Ok(())
}

fn line(progress: &Value) -> Result<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let roots = progress["roots"].as_array().context("the authority's answer names no roots")?;
    let roots: Vec<_> =
        roots.iter().map(|root| format!("{} {}", text(&root["id"]), text(&root["state"]))).collect();
    let waits = progress["waitsFor"].as_array().into_iter().flatten();
    let waits: Vec<_> = waits.map(|wait| text(&wait["what"])).collect();
    let waits = match waits.len() {
        0 => String::new(),
        1..=5 => format!("; waiting for {}", waits.join(", ")),
        many => format!("; waiting for {} and {} more", waits[..5].join(", "), many - 5),
    };
    Ok(format!(
        "{} (generation {}: {}){waits}",
        text(&progress["phase"]),
        progress["generation"],
        roots.join(", ")
    ))
}

fn ask(config: &AuthorityConfig) -> Result<Value> {
    ask::get(&config.socket(), "/v1/status", "authority")
}

pub(super) fn status(config: &AuthorityConfig, output: Output) -> Result<()> {
    let now = match ask(config) {
        Ok(now) => now,
        Err(error) => {
            // Of one that does not run, the state on disk can still be told.
            let store = Store::open(&config.state_dir)?;
            let Some(state) = store.trust(&config.trust_domain)? else { return Err(error) };
            let mut now = describe(&state, SystemTime::now());
            now["warning"] = format!("{error:#}; this is what its state on disk says").into();
            now
        }
    };
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&now)?),
        Output::Table => print!("{}", page(&now)),
    }
    Ok(())
}

/// Tables of all of it: what it is, its roots, the rotation, its agents.
fn page(now: &Value) -> String {
    let mut page = String::new();
    if let Some(fields) = now.as_object() {
        let plain: Vec<Vec<String>> = fields
            .iter()
            .filter(|(_, value)| !value.is_array() && !value.is_object() && !value.is_null())
            .map(|(key, value)| vec![key.clone(), ask::cell(value)])
            .collect();
        page += &table(&["FIELD", "VALUE"], &plain);
    }
    if let Ok(line) = line(&progress(now)) {
        page += &format!("\nrotation: {line}\n");
    }
    for list in ["roots", "agents"] {
        page += &format!("\n{list}:\n{}", ask::render(&now[list]));
    }
    page
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn one_line_says_how_far_a_rotation_is_and_what_it_waits_for() {
        let waits: Vec<_> = (0..7).map(|n| json!({"what": format!("node n{n}"), "until": 1})).collect();
        let now = json!({
            "generation": 4,
            "rotation": {"phase": "prepare", "waitsFor": waits, "excluded": []},
            "roots": [{"id": "aa", "state": "signs"}, {"id": "bb", "state": "prepared"}],
        });
        assert_eq!(
            line(&progress(&now)).unwrap(),
            "prepare (generation 4: aa signs, bb prepared); waiting for node n0, node n1, node n2, node n3, node n4 and 2 more"
        );
    }
}
