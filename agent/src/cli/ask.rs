//! Commands that ask the running agent over its admin socket.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use super::{Output, table};
use crate::config::AgentConfig;

#[derive(Debug, Args)]
pub(super) struct Ask {
    /// The agent's configuration file; tells where its admin socket is.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The agent's admin socket.
    #[arg(long, value_name = "PATH", conflicts_with = "config", default_value = "/run/hauberk/admin.sock")]
    socket: PathBuf,
    /// How to print.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

impl Ask {
    pub(super) fn run(self, path: &str) -> Result<()> {
        let socket = match &self.config {
            Some(config) => AgentConfig::load(config)?.runtime_dir.join("admin.sock"),
            None => self.socket,
        };
        let value = get(&socket, path, "agent")?;
        match self.output {
            Output::Json => println!("{}", serde_json::to_string_pretty(&value)?),
            Output::Table => print!("{}", render(&value)),
        }
        Ok(())
    }
}

/// Asks who listens on a socket; `whom` is for errors.
pub(super) fn get(socket: &Path, path: &str, whom: &str) -> Result<Value> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let unix = UnixStream::connect(socket).await.with_context(|| {
            format!("cannot reach the {whom} at {} (does it run? are you root?)", socket.display())
        })?;
        let (mut send, connection) = http1::handshake(TokioIo::new(unix)).await?;
        // Ends when the answer has been read; its error would be the request's too.
        tokio::spawn(connection);
        let request = Request::get(path).header("host", "hauberk").body(Empty::<Bytes>::new())?;
        let response =
            send.send_request(request).await.with_context(|| format!("the {whom} did not answer"))?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        if status != StatusCode::OK {
            bail!("the {whom} answered {status}: {}", String::from_utf8_lossy(&body).trim());
        }
        serde_json::from_slice(&body).with_context(|| format!("the {whom}'s answer is not JSON"))
    })
}

/// A list of objects becomes a table, one object a list of its fields.
pub(super) fn render(value: &Value) -> String {
    match value {
        Value::Array(rows) => {
            let Some(Value::Object(first)) = rows.first() else { return "none\n".into() };
            let heads: Vec<String> = first.keys().map(|key| key.to_uppercase()).collect();
            let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
            let cells: Vec<Vec<String>> =
                rows.iter().map(|row| first.keys().map(|key| cell(&row[key.as_str()])).collect()).collect();
            table(&heads, &cells)
        }
        Value::Object(fields) => {
            let rows: Vec<Vec<String>> =
                fields.iter().map(|(key, value)| vec![key.clone(), cell(value)]).collect();
            table(&["FIELD", "VALUE"], &rows)
        }
        other => cell(other) + "\n",
    }
}

pub(super) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_become_tables() {
        let text = render(&json!([{"id": "a", "addresses": ["1", "2"]}, {"id": "bcd", "addresses": []}]));
        assert_eq!(text, "ADDRESSES  ID\n1,2        a\n           bcd\n");
        assert_eq!(render(&json!([])), "none\n");
    }
}
