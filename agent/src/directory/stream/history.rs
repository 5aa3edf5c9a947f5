//! What the authority remembers of its directory: so many of its last states that an agent which is a little
//! behind is told what differs, however much happened in between; whoever is further behind gets everything.
//!
//! A state costs what differs from the next one: copies of a directory share their rows. Nothing is kept for
//! an agent, so a slow one takes no memory. Every agent that goes the same way is sent the same bytes.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::proto::{Chunk, WatchRequest};
use super::wire;
use crate::directory::Directory;

/// States that are remembered: six seconds' worth where everything changes all the time.
const STATES: usize = 64;

/// The way to a state: chunks of rows.
type Way = Arc<[Bytes]>;

/// Everything of one state.
#[derive(Clone, Debug)]
struct Whole {
    version: u64,
    rows: Way,
}

/// The states of one run of the authority.
#[derive(Debug)]
pub struct History {
    run: u64,
    /// The newest version; 0 before there is one.
    version: u64,
    /// The newest last.
    states: VecDeque<Arc<Directory>>,
    /// From versions to the newest.
    ways: HashMap<u64, Way>,
    /// Used for as long as its state is remembered.
    whole: Option<Whole>,
}

impl History {
    /// Remembers nothing; `run` is drawn at random.
    pub fn new(run: u64) -> Self {
        Self { run, version: 0, states: VecDeque::new(), ways: HashMap::new(), whole: None }
    }

    /// Takes note of the next state.
    pub fn push(&mut self, directory: Arc<Directory>) {
        if self.states.len() == STATES {
            self.states.pop_front();
        }
        self.states.push_back(directory);
        self.version += 1;
        self.ways.clear();
    }

    /// The newest version.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The state that an agent has once it was told all of [`History::since`].
    pub fn newest(&self) -> WatchRequest {
        WatchRequest { run: self.run, version: self.version }
    }

    /// Whether [`History::since`] has nothing to make.
    pub fn is_made(&self, has: &WatchRequest) -> bool {
        has.run == self.run && (has.version == self.version || self.ways.contains_key(&has.version))
    }

    /// What leads an agent from the state that it has to the newest; nothing before there is one.
    pub fn since(&mut self, has: &WatchRequest) -> Vec<Chunk> {
        if self.version == 0 || (has.run, has.version) == (self.run, self.version) {
            return Vec::new();
        }
        if has.run == self.run && self.state(has.version).is_some() {
            let way = self.way(has.version);
            return self.chunks(&way, self.version, false);
        }
        let whole = self.whole();
        let mut chunks = self.chunks(&whole.rows, whole.version, true);
        if whole.version != self.version {
            let way = self.way(whole.version);
            chunks.extend(self.chunks(&way, self.version, false));
        }
        chunks
    }

    /// A state that is remembered.
    fn state(&self, version: u64) -> Option<&Arc<Directory>> {
        let back = usize::try_from(self.version.checked_sub(version)?).ok()?;
        self.states.get(self.states.len().checked_sub(back + 1)?)
    }

    fn way(&mut self, from: u64) -> Way {
        if let Some(known) = self.ways.get(&from) {
            return Arc::clone(known);
        }
        let way: Way = match (self.state(from), self.state(self.version)) {
            (Some(before), Some(now)) => wire::between(before, now).into(),
            // Asked for remembered states only.
            _ => Arc::default(),
        };
        self.ways.insert(from, Arc::clone(&way));
        way
    }

    fn whole(&mut self) -> Whole {
        let known = self.whole.take().filter(|whole| self.state(whole.version).is_some());
        let whole = known.unwrap_or_else(|| {
            let now = self.state(self.version).map(|now| wire::between(&Directory::default(), now));
            Whole { version: self.version, rows: now.unwrap_or_default().into() }
        });
        self.whole = Some(whole.clone());
        whole
    }

    fn chunks(&self, way: &Way, version: u64, anew: bool) -> Vec<Chunk> {
        // A state is told even where nothing differs.
        let empty = [Bytes::new()];
        let parts: &[Bytes] = if way.is_empty() { &empty } else { way };
        let chunk = |(place, rows): (usize, &Bytes)| Chunk {
            run: self.run,
            version,
            anew: anew && place == 0,
            last: place + 1 == parts.len(),
            rows: rows.clone(),
            fault: String::new(),
        };
        parts.iter().enumerate().map(chunk).collect()
    }
}
