//! Which ways and measures were asked for, when not all were.

use anyhow::{Result, bail};

use super::rounds;

/// Measures that are not of a single way under load.
pub(super) const FIRST: &str = "first";
pub(super) const HANDSHAKES: &str = "handshakes";
pub(super) const RESTART: &str = "restart";
pub(super) const MEMORY: &str = "memory";

/// A choice of ways and measures.
#[derive(Debug)]
pub(super) struct Only {
    ways: Vec<String>,
    measures: Vec<String>,
}

impl Only {
    /// Of a kind that `names` has none of, all are chosen.
    ///
    /// # Errors
    /// For a name that is neither a way's nor a measure's.
    pub(super) fn of<'a>(names: &[String], ways: impl Iterator<Item = &'a str>) -> Result<Self> {
        let known: Vec<_> = ways.collect();
        let (mut only, mut loads) = (Self { ways: Vec::new(), measures: Vec::new() }, Vec::new());
        loads.extend(rounds::ALL.iter().map(|measure| measure.name()));
        loads.extend([FIRST, HANDSHAKES, RESTART, MEMORY]);
        for name in names {
            match &**name {
                way if known.contains(&way) => only.ways.push(name.clone()),
                measure if loads.contains(&measure) => only.measures.push(name.clone()),
                _ => bail!("--only {name}: ways are {}; measures are {}", known.join(", "), loads.join(", ")),
            }
        }
        Ok(only)
    }

    pub(super) fn way(&self, name: &str) -> bool {
        self.ways.is_empty() || self.ways.iter().any(|way| way == name)
    }

    pub(super) fn measure(&self, name: &str) -> bool {
        self.measures.is_empty() || self.measures.iter().any(|measure| measure == name)
    }
}
