//! How the directory's source fares, as metrics and operators see it.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{Gauge, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

/// How the source stands.
#[derive(Debug)]
pub struct Standing {
    registry: Registry,
    objects: IntGaugeVec,
    last_event: Gauge,
    resyncs: IntCounterVec,
    errors: IntCounterVec,
    /// What is wrong now, by kind of objects.
    faults: Mutex<BTreeMap<&'static str, String>>,
}

impl Standing {
    /// Nothing heard yet.
    ///
    /// # Errors
    /// When two metrics have one name, which is a mistake in this file.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let objects = IntGaugeVec::new(
            Opts::new("hauberk_directory_objects", "Objects that the directory's source has, by kind."),
            &["kind"],
        )?;
        let last_event = Gauge::new(
            "hauberk_directory_last_event_timestamp_seconds",
            "When the directory's source was heard of last (Unix time).",
        )?;
        let resyncs = IntCounterVec::new(
            Opts::new("hauberk_directory_resyncs_total", "How often objects were read in whole, by kind."),
            &["kind"],
        )?;
        let errors = IntCounterVec::new(
            Opts::new(
                "hauberk_directory_errors_total",
                "Failures to read the directory's source, by reason.",
            ),
            &["reason"],
        )?;
        registry.register(Box::new(objects.clone()))?;
        registry.register(Box::new(last_event.clone()))?;
        registry.register(Box::new(resyncs.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        Ok(Self { registry, objects, last_event, resyncs, errors, faults: Mutex::default() })
    }

    /// The metrics' text.
    pub fn render(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }

    /// What is wrong now; `None` when nothing is.
    pub fn faults(&self) -> Option<String> {
        let faults = self.lock();
        let words: Vec<&str> = faults.values().map(String::as_str).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }

    /// Something was heard of a kind, so nothing is wrong with it; it may have been all of it.
    pub(super) fn heard(&self, kind: &'static str, in_whole: bool) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_event.set(now.as_secs_f64());
        if in_whole {
            self.resyncs.with_label_values(&[kind]).inc();
        }
        if self.lock().remove(kind).is_some() {
            tracing::info!(kind, "the directory's source is heard again");
        }
    }

    /// So many objects of a kind are known.
    pub(super) fn objects(&self, kind: &'static str, count: usize) {
        self.objects.with_label_values(&[kind]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts a failure; `reason` is one of a fixed set.
    pub(super) fn failed(&self, reason: &'static str) {
        self.errors.with_label_values(&[reason]).inc();
    }

    /// Says what is wrong with a kind; whether that is news.
    pub(super) fn fault(&self, kind: &'static str, words: &str) -> bool {
        self.lock().insert(kind, words.to_owned()).is_none_or(|before| before != words)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        // Entries are whole at every instant.
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
