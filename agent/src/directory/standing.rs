//! How a source fares (of the directory, of policies), as metrics and operators see it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

/// How the source stands.
#[derive(Debug)]
pub struct Standing {
    /// What comes from it, in words.
    what: &'static str,
    registry: Registry,
    objects: IntGaugeVec,
    last_event: GaugeVec,
    resyncs: IntCounterVec,
    errors: IntCounterVec,
    /// What is wrong now, by kind of objects.
    faults: Mutex<BTreeMap<&'static str, String>>,
}

impl Standing {
    /// Nothing heard yet of what `what` is, in one word.
    ///
    /// # Errors
    /// When two metrics have one name, which is a mistake in this file.
    pub fn new(what: &'static str) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let objects = IntGaugeVec::new(
            Opts::new(
                format!("hauberk_{what}_objects"),
                format!("Objects that the source of the {what} has, by kind."),
            ),
            &["kind"],
        )?;
        // Without labels: it is not there until something was heard.
        let last_event = GaugeVec::new(
            Opts::new(
                format!("hauberk_{what}_last_event_timestamp_seconds"),
                format!("When the source of the {what} was heard of last (Unix time)."),
            ),
            &[],
        )?;
        let resyncs = IntCounterVec::new(
            Opts::new(
                format!("hauberk_{what}_resyncs_total"),
                "How often objects were read in whole, by kind.",
            ),
            &["kind"],
        )?;
        let errors = IntCounterVec::new(
            Opts::new(
                format!("hauberk_{what}_errors_total"),
                format!("Failures to read the source of the {what}, by reason."),
            ),
            &["reason"],
        )?;
        registry.register(Box::new(objects.clone()))?;
        registry.register(Box::new(last_event.clone()))?;
        registry.register(Box::new(resyncs.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        Ok(Self { what, registry, objects, last_event, resyncs, errors, faults: Mutex::default() })
    }

    /// The metrics' text.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    /// What comes from the source, in a word.
    pub fn what(&self) -> &'static str {
        self.what
    }

    /// What is wrong now; `None` when nothing is.
    pub fn faults(&self) -> Option<String> {
        let faults = self.lock();
        let words: Vec<&str> = faults.values().map(String::as_str).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }

    /// Something was heard of a kind, so nothing is wrong with it; it may have been all of it.
    pub(crate) fn heard(&self, kind: &'static str, in_whole: bool) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_event.with_label_values::<&str>(&[]).set(now.as_secs_f64());
        if in_whole {
            self.resyncs.with_label_values(&[kind]).inc();
        }
        if self.lock().remove(kind).is_some() {
            tracing::info!(kind, "the source of the {} is heard again", self.what);
        }
    }

    /// So many objects of a kind are known.
    pub(crate) fn objects(&self, kind: &'static str, count: usize) {
        self.objects.with_label_values(&[kind]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts a failure; `reason` is one of a fixed set.
    pub(crate) fn failed(&self, reason: &'static str) {
        self.errors.with_label_values(&[reason]).inc();
    }

    /// Says what is wrong with a kind; whether that is news.
    pub(crate) fn fault(&self, kind: &'static str, words: &str) -> bool {
        self.lock().insert(kind, words.to_owned()).is_none_or(|before| before != words)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        // Entries are whole at every instant.
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
