//! Which module of the agent may know which: an edge that is not in the table fails, and so does a
//! table that has an edge nobody uses. A new edge is a decision, and a commit of its own.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

use crate::shell::root;

/// A module, and the modules it may name. `run` puts everything together and may name all.
const LAYERS: &[(&str, &[&str])] = &[
    ("text", &[]),
    ("verdict", &[]),
    ("identity", &[]),
    ("config", &["identity"]),
    ("cidr", &[]),
    ("document", &["config"]),
    ("mesh_policy", &["cidr", "config", "document"]),
    ("ca", &["identity", "text"]),
    ("trust", &["identity"]),
    ("crls", &["config", "identity", "issue", "trust"]),
    ("federation", &["config", "identity", "text", "tls"]),
    ("tls", &["identity", "telemetry", "verdict"]),
    ("issue", &["authority", "config", "directory", "identity", "text", "tls", "trust", "verdict"]),
    (
        "authority",
        &["admin", "ca", "config", "directory", "federation", "fleet", "identity", "issue", "policy", "tls"],
    ),
    ("rotate", &["identity", "issue", "telemetry", "trust", "verdict"]),
    ("netns", &[]),
    ("directory", &["cidr", "config", "document", "identity", "mesh_policy", "text"]),
    ("passing", &[]),
    ("handover", &["passing"]),
    ("capture", &["cidr", "config", "directory", "handover", "mesh_policy", "netns", "passing", "text"]),
    ("hbone", &["identity", "tls", "verdict"]),
    ("relay", &["hbone", "verdict"]),
    ("proof", &["hbone", "identity", "tls", "trust", "verdict"]),
    ("pool", &["config", "hbone", "identity", "proof", "telemetry", "tls", "trust", "verdict"]),
    ("deliver", &["capture", "netns"]),
    ("pod", &["deliver", "directory", "identity", "tls", "trust", "verdict"]),
    ("policy", &["cidr", "config", "directory", "document", "identity", "mesh_policy", "text"]),
    ("fleet", &["directory", "document", "identity", "policy"]),
    ("balance", &["directory", "telemetry", "verdict"]),
    (
        "local",
        &[
            "deliver",
            "hbone",
            "identity",
            "pod",
            "policy",
            "pool",
            "relay",
            "shard",
            "telemetry",
            "tls",
            "trust",
            "verdict",
        ],
    ),
    (
        "outbound",
        &[
            "balance",
            "directory",
            "hbone",
            "local",
            "pod",
            "policy",
            "pool",
            "relay",
            "shard",
            "telemetry",
            "verdict",
        ],
    ),
    (
        "inbound",
        &[
            "deliver",
            "directory",
            "hbone",
            "identity",
            "pod",
            "policy",
            "pool",
            "proof",
            "relay",
            "shard",
            "telemetry",
            "tls",
            "trust",
            "verdict",
        ],
    ),
    (
        "shard",
        &[
            "balance",
            "capture",
            "config",
            "directory",
            "identity",
            "inbound",
            "outbound",
            "pod",
            "policy",
            "pool",
            "relay",
            "telemetry",
            "tls",
            "trust",
            "verdict",
            "warm",
        ],
    ),
    ("warm", &["directory", "identity", "issue", "pool", "shard"]),
    (
        "enrol",
        &[
            "capture",
            "config",
            "deliver",
            "directory",
            "handover",
            "inbound",
            "netns",
            "pod",
            "shard",
            "warm",
        ],
    ),
    ("telemetry", &["identity", "trust", "verdict"]),
    (
        "admin",
        &["capture", "directory", "enrol", "fleet", "identity", "policy", "rotate", "telemetry", "trust"],
    ),
    ("check", &["capture", "config", "directory", "fleet", "identity", "mesh_policy", "policy", "tls"]),
    (
        "cli",
        &[
            "authority",
            "ca",
            "capacity",
            "capture",
            "check",
            "config",
            "directory",
            "identity",
            "policy",
            "run",
            "telemetry",
        ],
    ),
    ("capacity", &["ca", "hbone", "identity", "issue", "proof", "telemetry", "tls"]),
    ("lib", &[]),
];

/// A file this long has more than one idea in it.
const LONG: usize = 400;

/// Reads the agent's sources against the table.
pub(crate) fn check() -> Result<()> {
    let mut used: BTreeSet<(String, String)> = BTreeSet::new();
    let mut wrong = Vec::new();
    let src = root().join("agent/src");
    visit(&src, &mut |path| {
        let text = fs::read_to_string(path)?;
        let inside = path.strip_prefix(&src)?;
        let first = inside.components().next().map(|c| c.as_os_str().to_string_lossy().into_owned());
        let module = first.unwrap_or_default().trim_end_matches(".rs").to_owned();
        if text.lines().count() > LONG {
            println!("  {} has {} lines", inside.display(), text.lines().count());
        }
        if module == "main" || module == "run" {
            return Ok(());
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{module} is not in the table"));
            return Ok(());
        };
        for edge in edges(&text) {
            if edge == module {
                continue;
            }
            if !allowed.contains(&edge.as_str()) {
                wrong.push(format!("{} names crate::{edge}, which {module} may not know", inside.display()));
            }
            used.insert((module.clone(), edge));
        }
        Ok(())
    })?;
    for (module, allowed) in LAYERS {
        for edge in allowed.iter().filter(|edge| !used.contains(&((*module).to_owned(), (**edge).to_owned())))
        {
            wrong.push(format!("the table lets {module} know {edge}, which it does not"));
        }
    }
    if !wrong.is_empty() {
        bail!("layers:\n  {}", wrong.join("\n  "));
    }
    Ok(())
}

fn visit(dir: &Path, each: &mut impl FnMut(&Path) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            visit(&path, each)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            each(&path)?;
        }
    }
    Ok(())
}

/// The modules that a file names as `crate::x` outside its tests and comments; grouped uses
/// (`crate::{x, y}`) too.
fn edges(text: &str) -> BTreeSet<String> {
    // Some tests lend their helpers to others'.
    let code = ["#[cfg(test)]\nmod tests {", "#[cfg(test)]\npub(crate) mod tests {"]
        .iter()
        .fold(text, |text, mark| text.split(mark).next().unwrap_or_default());
    let code: String =
        code.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => {
                let mut depth = 0;
                let mut word = String::new();
                for c in group.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => {
                            found.insert(first_word(&word));
                            word.clear();
                            continue;
                        }
                        _ => {}
                    }
                    word.push(c);
                }
                found.insert(first_word(&word));
            }
            None => {
                found.insert(first_word(rest));
            }
        }
    }
    found.remove("");
    found
}

fn first_word(text: &str) -> String {
    text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_are_found_plain_and_grouped_and_not_in_tests() {
        let text = "use crate::a::B;\nuse crate::{c, d::{E, f}, g};\n/// [`crate::h`]\nfn x() { crate::i::y() }\n#[cfg(test)]\nmod tests { use crate::j; }";
        let expected: BTreeSet<String> = ["a", "c", "d", "g", "i"].map(str::to_owned).into();
        assert_eq!(edges(text), expected);
    }
}
