//! TLS handshakes per second per core, as the agent's own program counts them
//! (`agent/benches/handshakes.rs`).

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::host::bin;

use super::figures::median;
use crate::shell::{command, output};

/// What the program is called.
pub(crate) const PROGRAM: &str = "handshakes";

/// Accepted handshakes per second per core; one value for each run.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    pub(super) full: Rates,
    pub(super) resumed: Rates,
}

/// Of rustls alone, and of Hauberk (nothing when it makes no such handshake).
#[derive(Debug, Default)]
pub(super) struct Rates {
    pub(super) bare: Vec<f64>,
    pub(super) hauberk: Vec<f64>,
}

impl Rates {
    /// Hauberk's share of what rustls alone does.
    pub(super) fn share(&self) -> Option<f64> {
        Some(median(&self.hauberk)? / median(&self.bare)?)
    }

    fn add(&mut self, said: &Value) -> Result<()> {
        let server = |who: &str| said[who]["server"].as_f64();
        self.bare.push(server("bare").context("no rate of bare rustls")?);
        self.hauberk.extend(server("hauberk"));
        Ok(())
    }
}

impl Handshakes {
    /// Runs the program once.
    pub(super) fn measure(&mut self, seconds: u64) -> Result<()> {
        let text = output(command(&bin(PROGRAM)?, &[seconds.to_string()]))?;
        let said: Value = serde_json::from_str(&text).with_context(|| format!("{PROGRAM}: {text:?}"))?;
        self.full.add(&said["full"]).with_context(|| format!("{PROGRAM}: {text}"))?;
        self.resumed.add(&said["resumed"]).with_context(|| format!("{PROGRAM}: {text}"))?;
        ensure!(!self.full.hauberk.is_empty(), "{PROGRAM}: no full handshake of Hauberk's: {text}");
        Ok(())
    }
}
