//! SVIDs and trust bundle as rustls configurations; failures as [`Reason`]s.
//!
//! TLS 1.3 only, and a certificate from both sides: every connection proves both identities against
//! the trust of its moment. A resumed session does so too: [`ticket`] opens only where and under what
//! it was sealed, and on both sides the certificates of the handshake it goes back to are judged as if
//! they had been sent now ([`verify`]). No early data. The crypto provider is always named, never the
//! process-wide default.

mod bounded;
mod buffers;
pub mod client;
pub mod exporter;
pub mod handshake;
pub mod ktls;
pub mod memory;
pub mod provider;
mod record;
pub mod roots;
pub mod server;
mod session;
pub mod stream;
pub mod ticket;
pub mod verify;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

use crate::identity::svid::Leaf;
use crate::verdict::{Reason, Unresumed};
use verify::{Misidentified, Refused};

/// The one protocol spoken inside TLS (RFC 7301; RFC 9113, section 3.2).
pub const ALPN_H2: &[u8] = b"h2";

/// A thread that takes up a buffer so often in a second does so in a hundredth of it.
const FEW: usize = 1000;

/// A peer that is who it must be.
#[derive(Clone, Debug)]
pub struct Settled {
    /// What its certificate says.
    pub leaf: Leaf,
    /// Whether a session was resumed for it.
    pub resumed: bool,
}

/// The same between two agents of ours, whose connection carries many workloads (see `proof`).
pub const ALPN_NODE: &[u8] = b"hauberk/1";

/// Frees what this thread keeps for records on their way and has not needed since the last call. Call it
/// every second. Says whether the thread is quiet: it has had few records, or none.
pub fn trim() -> bool {
    buffers::trim() <= FEW
}

/// rustls' error as an I/O error, the way tokio-rustls has it, so that [`reason`] and [`explain`] find it.
pub(crate) fn broken(error: Error) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, error)
}

/// Why a handshake failed, from the error rustls or the socket gave.
pub fn reason(error: &std::io::Error) -> Reason {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(error) => rustls_reason(error),
        None if error.kind() == std::io::ErrorKind::TimedOut => Reason::HandshakeTimeout,
        None => Reason::HandshakeFailed,
    }
}

/// Why a handshake failed, from rustls' own error.
pub fn rustls_reason(error: &Error) -> Reason {
    match error {
        Error::NoCertificatesPresented => Reason::NoClientCertificate,
        Error::NoApplicationProtocol => Reason::NoProtocol,
        Error::InvalidCertificate(error) => certificate_reason(error),
        Error::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
        ) => Reason::TlsVersion,
        Error::InvalidMessage(
            InvalidMessage::InvalidContentType
            | InvalidMessage::UnknownProtocolVersion
            | InvalidMessage::InvalidEmptyPayload
            | InvalidMessage::MessageTooLarge,
        ) => Reason::Plaintext,
        // What the peer says of our certificate is what it would have logged itself.
        Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => Reason::NoClientCertificate,
            AlertDescription::CertificateExpired => Reason::Expired,
            AlertDescription::CertificateRevoked => Reason::Revoked,
            AlertDescription::UnknownCA => Reason::UnknownIssuer,
            AlertDescription::ProtocolVersion => Reason::TlsVersion,
            AlertDescription::AccessDenied => Reason::WrongIdentity,
            AlertDescription::NoApplicationProtocol => Reason::NoProtocol,
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown => Reason::BadCertificate,
            _ => Reason::HandshakeFailed,
        },
        _ => Reason::HandshakeFailed,
    }
}

/// Why a session whose peer would be refused with this error is not resumed.
fn unresumed(error: &Error) -> Unresumed {
    match rustls_reason(error) {
        Reason::Expired => Unresumed::Expired,
        Reason::Revoked => Unresumed::Revoked,
        Reason::DeniedByPolicy => Unresumed::Policy,
        _ => Unresumed::Untrusted,
    }
}

/// What an operator needs to know of a failed handshake: whose identity was not whose.
pub fn explain(error: &std::io::Error) -> String {
    let rustls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match rustls {
        Some(Error::InvalidCertificate(CertificateError::Other(other))) => other.0.to_string(),
        // Who, and by what, is in the verifier's own line.
        Some(Error::InvalidCertificate(CertificateError::Revoked)) => {
            "the peer's certificate is revoked".into()
        }
        Some(Error::AlertReceived(alert)) => format!("the peer refused us: {alert:?}"),
        _ => error.to_string(),
    }
}

fn certificate_reason(error: &CertificateError) -> Reason {
    match error {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => Reason::Expired,
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Reason::NotYetValid,
        CertificateError::Revoked => Reason::Revoked,
        CertificateError::UnknownIssuer => Reason::UnknownIssuer,
        CertificateError::Other(other) => match other.0.downcast_ref::<Misidentified>() {
            Some(Misidentified::TrustDomain { .. }) => Reason::OtherTrustDomain,
            Some(Misidentified::Identity { .. } | Misidentified::NotANode(_)) => Reason::WrongIdentity,
            Some(Misidentified::NotAnSvid(_)) => Reason::BadCertificate,
            None => other.0.downcast_ref::<Refused>().map_or(Reason::BadCertificate, |why| why.reason),
        },
        _ => Reason::BadCertificate,
    }
}
