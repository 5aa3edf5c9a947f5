//! SVIDs and trust bundle as rustls configurations; failures as [`Reason`]s.
//!
//! TLS 1.3 only, ALPN `h2` only, a certificate from both sides, no resumption and no tickets: every
//! connection proves both identities anew against the trust of its moment. Connections are pooled,
//! so that is rare. The crypto provider is always named, never the process-wide default.

pub mod client;
pub mod provider;
pub mod server;
pub mod verify;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};

use crate::verdict::Reason;
use verify::Misidentified;

/// The one protocol spoken inside TLS (RFC 7301; RFC 9113, section 3.2).
pub const ALPN_H2: &[u8] = b"h2";

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
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown => Reason::BadCertificate,
            _ => Reason::HandshakeFailed,
        },
        _ => Reason::HandshakeFailed,
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
            Some(Misidentified::Identity { .. }) => Reason::WrongIdentity,
            Some(Misidentified::NotAnSvid(_)) | None => Reason::BadCertificate,
        },
        _ => Reason::BadCertificate,
    }
}
