//! The dialling side's TLS configuration.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, Error};

use super::provider::provider;
use super::verify::PeerVerifier;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::X509Svid;

/// Dials as `svid`, and accepts nobody but `expected` under `bundle`.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn config(svid: &X509Svid, bundle: &TrustBundle, expected: SpiffeId) -> Result<Arc<ClientConfig>, Error> {
    let verifier = PeerVerifier::new(bundle, Some(expected))?;
    let identity = SingleCertAndKey::from(Arc::clone(svid.certified_key()));
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(identity));
    config.alpn_protocols = vec![super::ALPN_H2.to_vec()];
    // Identities are SPIFFE IDs, which no server name can carry.
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}
