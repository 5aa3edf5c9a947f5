//! The closed vocabulary of outcomes: what happened to a connection, and why.
//!
//! Metrics labels and log lines are made from these and from nothing else, so neither can grow
//! with what a peer sends.

/// Seen from the local workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The local workload opened it.
    Outbound,
    /// The local workload is asked.
    Inbound,
}

/// How a connection's bytes travelled between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encryption {
    /// Mutual TLS 1.3.
    Mtls,
    /// Between two pods of this node: both identities proven, the bytes in nobody's hands but the
    /// kernel's and the agent's.
    Local,
    /// Not at all: it was refused before a byte travelled.
    None,
}

macro_rules! labels {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $label:literal),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant),* }
        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// The label in metrics and logs.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $label),* }
            }
        }
    };
}

labels! {
    /// Why a connection ended as it did.
    Reason {
        /// Both sides finished.
        Done = "done",
        /// The local application reset it.
        AppReset = "app_reset",
        /// The other side reset it.
        PeerReset = "peer_reset",
        /// The tunnel under it broke.
        TunnelLost = "tunnel_lost",
        /// The agent is stopping.
        Draining = "draining",
        /// A limit of ours was reached.
        Overload = "overload",
        /// The original destination of a captured connection is not known.
        NoOriginalDestination = "no_original_destination",
        /// The directory knows nobody at that address.
        UnknownDestination = "unknown_destination",
        /// The service has no endpoint, or not that port.
        NoEndpoint = "no_endpoint",
        /// No SVID has been issued yet for the local workload.
        NoSvid = "no_svid",
        /// The peer's node or application refused the TCP connection.
        Refused = "refused",
        /// No route to the peer.
        Unreachable = "unreachable",
        /// The peer did not answer in time.
        ConnectTimeout = "connect_timeout",
        /// A TLS handshake took too long.
        HandshakeTimeout = "handshake_timeout",
        /// The peer sent no client certificate.
        NoClientCertificate = "no_client_certificate",
        /// The certificate chains to no root of the trust bundle.
        UnknownIssuer = "unknown_issuer",
        /// The peer's identity is of another trust domain.
        OtherTrustDomain = "other_trust_domain",
        /// The peer's certificate has expired.
        Expired = "expired",
        /// The peer's certificate is not valid yet.
        NotYetValid = "not_yet_valid",
        /// The peer is not who the directory says must be there.
        WrongIdentity = "wrong_identity",
        /// The peer's certificate is no X.509-SVID.
        BadCertificate = "bad_certificate",
        /// The peer does not speak TLS 1.3.
        TlsVersion = "tls_version",
        /// Bytes that are no TLS came to the tunnel's port.
        Plaintext = "plaintext",
        /// Any other failure of a TLS handshake.
        HandshakeFailed = "handshake_failed",
        /// The peer broke HTTP/2 or went over its limits.
        Http2 = "http2",
        /// Not a CONNECT request, or one without a usable authority.
        BadRequest = "bad_request",
        /// CONNECT to an address that is not the local workload's.
        NotLocal = "not_local",
        /// CONNECT to one of the agent's own ports.
        AgentPort = "agent_port",
        /// A connection that would lead back into this agent.
        Loop = "loop",
        /// Anything inside this agent that should not fail.
        Internal = "internal",
    }
}

labels! {
    /// What was decided about a connection.
    Verdict {
        /// It was carried.
        Allowed = "allowed",
        /// It was refused, by rule or because the peer could not prove itself.
        Denied = "denied",
        /// It was allowed but could not be carried.
        Failed = "failed",
    }
}

impl Reason {
    /// The verdict this reason belongs to.
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Done | Self::AppReset | Self::PeerReset | Self::Draining => Verdict::Allowed,
            Self::HandshakeTimeout
            | Self::NoClientCertificate
            | Self::UnknownIssuer
            | Self::OtherTrustDomain
            | Self::Expired
            | Self::NotYetValid
            | Self::WrongIdentity
            | Self::BadCertificate
            | Self::TlsVersion
            | Self::Plaintext
            | Self::Http2
            | Self::BadRequest
            | Self::NotLocal
            | Self::AgentPort
            | Self::Loop => Verdict::Denied,
            _ => Verdict::Failed,
        }
    }
}

impl Direction {
    /// The label in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

impl Encryption {
    /// The label in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Local => "local",
            Self::None => "none",
        }
    }
}
