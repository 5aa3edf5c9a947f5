//! What all issuers that are asked over the network share: connecting, and errors in our words.

use std::io;
use std::path::Path;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::{Code, Status};

use super::IssueError;
use crate::config::read_text;
use crate::text::with_causes;
use crate::tls;

/// TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// For an answer.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// What verifies a server by the name `host`, which `field` says, under the roots in a file.
pub(super) fn verifying(
    host: &str,
    field: &str,
    roots: &Path,
    alpn: &[u8],
) -> Result<(TlsConnector, ServerName<'static>), IssueError> {
    let host = host.trim_matches(['[', ']']);
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| IssueError::Ours(format!("{field}: {host} is no name of a host")))?;
    let pem = read_text(roots).map_err(|error| IssueError::Ours(error.to_string()))?;
    let config = tls::client::named(pem.as_bytes(), alpn)
        .map_err(|error| IssueError::Ours(format!("{}: {error}", roots.display())))?;
    Ok((TlsConnector::from(config), name))
}

/// Connects to `address` (`host:port`). `None` for a server that is verified by its SPIFFE ID.
pub(super) async fn connect(
    connector: TlsConnector,
    address: String,
    name: Option<ServerName<'static>>,
) -> io::Result<TlsStream<TcpStream>> {
    let dial = async {
        let tcp = TcpStream::connect(&address).await?;
        tcp.set_nodelay(true)?;
        // Without a name of its own, the address only fills the API's place.
        let name = match name {
            Some(name) => name,
            None => ServerName::IpAddress(tcp.peer_addr()?.ip().into()),
        };
        connector.connect(name, tcp).await
    };
    timeout(CONNECT_TIMEOUT, dial).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A gRPC status as an error of `issuer`; `hint` says what an operator does about a refusal.
pub(super) fn failed(issuer: String, status: &Status, hint: &str) -> IssueError {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown => {
            IssueError::Unreachable { issuer, detail: with_causes(status.message(), status) }
        }
        _ => {
            let retry_after = status
                .metadata()
                .get("retry-after")
                .and_then(|seconds| seconds.to_str().ok()?.parse().ok())
                .map(Duration::from_secs);
            let detail = format!("{}{hint}", status.message());
            IssueError::Refused { issuer, detail, retry_after }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_carries_when_to_come_back_and_what_cannot_be_reached_does_not() {
        let mut status = Status::resource_exhausted("too much waits");
        status.metadata_mut().insert("retry-after", 7.into());
        let error = failed("the authority".into(), &status, "");
        let IssueError::Refused { detail, retry_after, .. } = error else { panic!("{error:?}") };
        assert_eq!((detail.as_str(), retry_after), ("too much waits", Some(Duration::from_secs(7))));
        let gone = failed("the authority".into(), &Status::unavailable("no route"), "");
        assert!(matches!(gone, IssueError::Unreachable { .. }));
    }
}
