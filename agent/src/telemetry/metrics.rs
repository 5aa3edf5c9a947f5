//! The Prometheus registry and everything in it.

/// (being written)
#[derive(Debug, Default)]
pub struct Metrics {}

impl Metrics {
    pub(super) fn opened(&self, _: crate::verdict::Direction) {}
    pub(super) fn finished(&self, _: &super::Finished<'_>, _: bool) {}
    pub(super) fn handshake(
        &self,
        _: super::Role,
        _: std::time::Duration,
        _: Option<crate::verdict::Reason>,
    ) {
    }
    pub(super) fn pool(&self, _: i64) {}
}
