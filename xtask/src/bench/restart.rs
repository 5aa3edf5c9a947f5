//! A rolling restart: peers that had a connection to an agent come back to its successor, all at once,
//! as the agent's own program measures it (`agent/benches/resumption.rs`).

use ::tests::host::bin;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::figures::median;
use super::table::{Table, shown};
use crate::shell::{command, output};

/// What the program is called.
pub(crate) const PROGRAM: &str = "resumption";
/// Peers, and fewer that only show that it works.
pub(super) const PEERS: u64 = 1_000;
pub(super) const FEW_PEERS: u64 = 20;

/// What was found; one value for each run.
#[derive(Debug, Default)]
pub(super) struct Restart {
    peers: u64,
    cases: Vec<Case>,
}

/// What the successor knows of its predecessor, and what that makes of the return.
#[derive(Debug)]
struct Case {
    name: String,
    resumed: u64,
    /// Until the last peer is back, in ms.
    recovered: Vec<f64>,
    /// CPU time for a handshake, in µs: the agent's, and a peer's.
    agent: Vec<f64>,
    peer: Vec<f64>,
}

impl Restart {
    /// Runs the program once.
    pub(super) fn measure(&mut self, peers: u64) -> Result<()> {
        let args = ["--peers", &peers.to_string(), "--rounds", "1", "--json"].map(str::to_owned);
        let text = output(command(&bin(PROGRAM)?, &args))?;
        self.add(peers, &text).with_context(|| format!("{PROGRAM}: {text:?}"))
    }

    fn add(&mut self, peers: u64, text: &str) -> Result<()> {
        let said: Vec<Value> = serde_json::from_str(text)?;
        self.peers = peers;
        for of in &said {
            let number = |field: &str| of[field].as_f64().with_context(|| format!("a case has no {field}"));
            let name = of["case"].as_str().context("a case has no name")?;
            let resumed = of["resumed"].as_u64().context("a case has no count of resumed handshakes")?;
            let at = self.cases.iter().position(|case| case.name == name).unwrap_or_else(|| {
                let empty = Vec::new;
                let (recovered, agent, peer) = (empty(), empty(), empty());
                self.cases.push(Case { name: name.to_owned(), resumed, recovered, agent, peer });
                self.cases.len() - 1
            });
            let case = &mut self.cases[at];
            ensure!(case.resumed == resumed, "{name}: {resumed} resumed, and {} before", case.resumed);
            case.recovered.push(number("recover_seconds")? * 1e3);
            case.agent.push(number("agent_cpu_seconds")? * 1e6 / peers as f64);
            case.peer.push(number("peers_cpu_seconds")? * 1e6 / peers as f64);
        }
        Ok(())
    }

    /// What its table shows.
    pub(super) fn title(&self) -> String {
        format!("A rolling restart, {} peers that come back at once to one thread of an agent:", self.peers)
    }

    /// Medians; nothing when nothing was measured.
    pub(super) fn table(&self) -> Option<Table> {
        let head =
            ["median", "resumed", "all are back after ms", "agent's CPU each µs", "peer's CPU each µs"];
        let row = |case: &Case| {
            let [recovered, agent, peer] =
                [&case.recovered, &case.agent, &case.peer].map(|all| shown(median(all)));
            vec![case.name.clone(), case.resumed.to_string(), recovered, agent, peer]
        };
        let rows: Vec<_> = self.cases.iter().map(row).collect();
        (!rows.is_empty()).then(|| Table { head: head.map(str::to_owned).to_vec(), rows })
    }

    pub(super) fn json(&self) -> Value {
        let case = |case: &Case| {
            json!({"case": case.name, "resumed": case.resumed, "recoveredMs": case.recovered,
                "agentCpuUs": case.agent, "peerCpuUs": case.peer})
        };
        json!({"peers": self.peers, "cases": self.cases.iter().map(case).collect::<Vec<_>>()})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_adds_a_value_to_every_case() {
        let said = |seconds: f64| {
            json!([{"case": "keys lost", "resumed": 0, "recover_seconds": seconds,
                "agent_cpu_seconds": 0.2, "peers_cpu_seconds": 0.1}])
            .to_string()
        };
        let mut restart = Restart::default();
        assert!(restart.table().is_none(), "nothing was measured");
        for seconds in [0.3, 0.5, 0.4] {
            restart.add(1000, &said(seconds)).unwrap();
        }
        let table = restart.table().unwrap();
        assert_eq!(table.rows, [["keys lost", "0", "400", "200", "100"].map(str::to_owned).to_vec()]);
        assert_eq!(restart.json()["cases"][0]["recoveredMs"], json!([300.0, 500.0, 400.0]));
        assert!(restart.add(1000, r#"[{"case": "keys lost", "resumed": 7}]"#).is_err());
        assert!(restart.add(1000, "medians of 1 rounds").is_err());
    }
}
