//! `hauberk authority revoke`, `unrevoke` and `revocations`: they change and read the authority's state
//! on disk, whether it runs or not. A running one notices at once.

use std::time::{Duration, SystemTime};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::json;

use super::{Output, table};
use crate::authority::AuthorityConfig;
use crate::ca::BACKDATED;
use crate::ca::store::Store;
use crate::identity::SpiffeId;
use crate::identity::revocation::{NodeName, Revocation, Serial, Subject};

/// What is revoked, or not any more.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct What {
    /// An identity: every SVID of it is refused and none is issued, until it is lifted.
    #[arg(long, value_name = "ID")]
    spiffe_id: Option<SpiffeId>,
    /// A node: its own identity, every SVID that was issued to it, and its join tokens.
    #[arg(long, value_name = "NAME")]
    node: Option<NodeName>,
    /// One certificate, by its serial number in hex as `hauberk certs` prints it.
    #[arg(long, value_name = "HEX")]
    serial: Option<Serial>,
}

impl What {
    fn subject(self, config: &AuthorityConfig) -> Result<Subject> {
        match (self.spiffe_id, self.node, self.serial) {
            (Some(id), None, None) if id.trust_domain() != config.trust_domain.as_str() => {
                bail!("{id} is not in this authority's trust domain {}", config.trust_domain)
            }
            // Agents would refuse the one that could tell them otherwise.
            (Some(id), None, None) if id == SpiffeId::authority(&config.trust_domain) => {
                bail!("{id} is the authority itself: to be rid of its key, make a new root")
            }
            (Some(id), None, None) => Ok(Subject::SpiffeId(id)),
            (None, Some(name), None) => Ok(Subject::Node(name)),
            (None, None, Some(serial)) => Ok(Subject::Serial(serial)),
            _ => bail!("give one of --spiffe-id, --node, --serial"),
        }
    }
}

pub(super) fn revoke(config: &AuthorityConfig, what: What) -> Result<()> {
    let subject = what.subject(config)?;
    let store = Store::open(&config.state_dir)?;
    let new = store.change_revocations(|list| list.revoke(subject.clone(), SystemTime::now()))?;
    println!("{subject} {}", if new { "is revoked" } else { "was revoked already" });
    Ok(())
}

pub(super) fn unrevoke(config: &AuthorityConfig, what: What) -> Result<()> {
    let subject = what.subject(config)?;
    let store = Store::open(&config.state_dir)?;
    if !store.change_revocations(|list| Ok(list.lift(&subject, SystemTime::now(), BACKDATED)))? {
        bail!("{subject} is not revoked; `hauberk authority revocations` lists what is");
    }
    // Certificates count in whole seconds: what is asked for in this one is still refused, and a new join
    // token would be used up by that.
    std::thread::sleep(Duration::from_secs(1));
    println!(
        "{}",
        match subject {
            Subject::SpiffeId(_) =>
                format!("{subject} may be issued again; what was issued before stays refused"),
            Subject::Node(_) => format!("{subject} may join again, with a new join token"),
            Subject::Serial(_) => format!("{subject} is accepted again"),
        }
    );
    Ok(())
}

pub(super) fn list(config: &AuthorityConfig, output: Output) -> Result<()> {
    let list = Store::open(&config.state_dir)?.revocations()?;
    match output {
        Output::Json => {
            let rows: Vec<_> = list.entries().map(row).collect();
            let all = json!({"generation": list.generation(), "revocations": rows});
            println!("{}", serde_json::to_string_pretty(&all)?);
        }
        Output::Table if list.entries().len() == 0 => println!("none"),
        Output::Table => {
            let rows: Vec<_> = list
                .entries()
                .map(|entry| {
                    let until = entry.until.map_or_else(|| "-".to_owned(), |until| until.to_string());
                    vec![entry.subject.to_string(), state(entry).into(), entry.revoked_at.to_string(), until]
                })
                .collect();
            print!("{}", table(&["SUBJECT", "STATE", "REVOKED", "UNTIL"], &rows));
        }
    }
    Ok(())
}

fn row(entry: &Revocation) -> serde_json::Value {
    let (kind, value) = match &entry.subject {
        Subject::SpiffeId(id) => ("spiffeId", id.as_str()),
        Subject::Node(name) => ("node", name.as_str()),
        Subject::Serial(digits) => ("serial", digits.as_str()),
    };
    json!({kind: value, "state": state(entry), "revoked": entry.revoked_at, "until": entry.until})
}

/// Whether it bans, is one certificate, or keeps out only what was issued before.
fn state(entry: &Revocation) -> &'static str {
    match entry.subject {
        Subject::Serial(_) => "certificate",
        _ if entry.is_ban() => "banned",
        _ => "lifted",
    }
}
