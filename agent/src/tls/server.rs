//! The accepting side's TLS configuration.

use std::sync::Arc;

use rustls::server::NoServerSessionStorage;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{Error, ServerConfig};

use super::provider::provider;
use super::verify::PeerVerifier;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::X509Svid;

/// Accepts as `svid` any client of the bundle's trust domain that proves itself.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn config(svid: &X509Svid, bundle: &TrustBundle) -> Result<Arc<ServerConfig>, Error> {
    build(svid, PeerVerifier::new(bundle, None)?)
}

/// Accepts clients that prove themselves, and clients without a certificate as nobody.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn config_with_anonymous_clients(
    svid: &X509Svid,
    bundle: &TrustBundle,
) -> Result<Arc<ServerConfig>, Error> {
    build(svid, PeerVerifier::with_anonymous_clients(bundle)?)
}

fn build(svid: &X509Svid, verifier: Arc<PeerVerifier>) -> Result<Arc<ServerConfig>, Error> {
    let identity = SingleCertAndKey::from(Arc::clone(svid.certified_key()));
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(identity));
    config.alpn_protocols = vec![super::ALPN_H2.to_vec()];
    // Our order counts, not the client's: it knows which cipher this CPU accelerates.
    config.ignore_client_order = true;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}
