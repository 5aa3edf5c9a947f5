//! The closed vocabulary of outcomes: what happened to a connection, and why.
//!
//! Metrics labels and log lines are made from these and from nothing else, so neither can grow
//! with what a peer sends.

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
    /// Seen from the local workload.
    Direction {
        /// The local workload opened it.
        Outbound = "outbound",
        /// The local workload is asked.
        Inbound = "inbound",
    }
}

labels! {
    /// How a connection's bytes travelled between the nodes.
    Encryption {
        /// Mutual TLS 1.3.
        Mtls = "mtls",
        /// Between two pods of this node: both identities proven, the bytes in nobody's hands but the
        /// kernel's and the agent's.
        Local = "local",
        /// Not at all: it was refused before a byte travelled.
        None = "none",
    }
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
        /// A certificate, the identity in it or its node has been revoked.
        Revoked = "revoked",
        /// The peer is not who the directory says must be there.
        WrongIdentity = "wrong_identity",
        /// The peer's certificate is no X.509-SVID.
        BadCertificate = "bad_certificate",
        /// The peer does not speak TLS 1.3.
        TlsVersion = "tls_version",
        /// The two sides share no application protocol (ALPN).
        NoProtocol = "no_protocol",
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
        /// An identity proof that proves nothing.
        BadProof = "bad_proof",
        /// A stream in node scope whose identity was not proven.
        Unproven = "unproven",
        /// What answers at the peer's node does not speak node scope.
        NoNodeScope = "no_node_scope",
        /// The directory has the peer's identity on another node.
        NotPlaced = "not_placed",
        /// CONNECT to one of the agent's own ports.
        AgentPort = "agent_port",
        /// A connection that would lead back into this agent.
        Loop = "loop",
        /// An access policy denies it, or none allows it.
        DeniedByPolicy = "denied_by_policy",
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

labels! {
    /// Why a TLS session was not resumed though a ticket for it was there. The handshake is a full one
    /// then; that it failed says [`Reason`].
    Unresumed {
        /// Sealed with a key that is not known (any more): too old, or another agent's.
        UnknownTicket = "unknown_ticket",
        /// No ticket of ours, or one that was changed on its way.
        Unreadable = "unreadable",
        /// It, or a certificate it rests on, has expired.
        Expired = "expired",
        /// The trust bundle, revocations or policies are others than when it was issued.
        TrustChanged = "trust_changed",
        /// Issued as another identity, by another listener or for another workload.
        OtherListener = "other_listener",
        /// The workload's mode, the application protocols or the cipher suites are others.
        TermsChanged = "terms_changed",
        /// The peer's certificate or identity was revoked.
        Revoked = "revoked",
        /// A policy denies the peer.
        Policy = "policy",
        /// The peer would not be accepted today for any other reason.
        Untrusted = "untrusted",
        /// It was used before.
        Reused = "reused",
        /// So many were used that no more can be remembered.
        Full = "full",
    }
}

labels! {
    /// How near a service's endpoint is, seen from this node.
    Locality {
        /// On this node.
        Node = "node",
        /// On another node of this node's zone.
        Zone = "zone",
        /// Farther, or nobody knows.
        Other = "other",
    }
}

labels! {
    /// Where SVIDs come from.
    IssuerKind {
        /// Hauberk's own authority.
        Authority = "authority",
        /// A CA that speaks Istio's protocol.
        Istio = "istio",
        /// A PKI engine of Vault.
        Vault = "vault",
        /// A signer of Kubernetes CertificateSigningRequests.
        Kubernetes = "kubernetes",
        /// Files that somebody else writes.
        Files = "files",
        /// A SPIRE agent.
        Spire = "spire",
    }
}

labels! {
    /// What came of asking an issuer for an SVID.
    Issuance {
        /// A new one.
        Issued = "issued",
        /// The one that is held already.
        Unchanged = "unchanged",
        /// The issuer cannot be reached.
        Unreachable = "unreachable",
        /// It said no.
        Refused = "refused",
        /// Its answer cannot be used.
        Unusable = "unusable",
        /// Something is missing or wrong on our side.
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
            | Self::Revoked
            | Self::WrongIdentity
            | Self::BadCertificate
            | Self::TlsVersion
            | Self::NoProtocol
            | Self::Plaintext
            | Self::Http2
            | Self::BadRequest
            | Self::NotLocal
            | Self::BadProof
            | Self::Unproven
            | Self::NotPlaced
            | Self::AgentPort
            | Self::Loop
            | Self::DeniedByPolicy => Verdict::Denied,
            _ => Verdict::Failed,
        }
    }
}
