//! Where the log goes: text for people, JSON for collectors.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The library tells of each denial by the API server, at every try; we do once, with what to do. A filter
/// that names it wins.
const QUIET: &str = "kube_runtime=error";

/// Starts logging to standard error. `filter` is in `RUST_LOG`'s syntax; default `info`.
///
/// # Errors
/// When the filter cannot be read, or logging was started already.
pub fn start(format: Format, filter: Option<&str>) -> anyhow::Result<()> {
    let filter = match filter {
        Some(filter) => filter.to_owned(),
        None => std::env::var("RUST_LOG").ok().filter(|it| !it.is_empty()).unwrap_or("info".into()),
    };
    let filter = EnvFilter::try_new(format!("{QUIET},{filter}"))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match format {
        Format::Text => lines.with_ansi(std::io::stderr().is_terminal()).try_init(),
        Format::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|e| anyhow::anyhow!("cannot start logging: {e}"))
}
