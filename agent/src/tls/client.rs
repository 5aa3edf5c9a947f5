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
    build(Some(svid), bundle, expected)
}

/// Dials as nobody: for a node that has no SVID yet.
///
/// # Errors
/// When the bundle's roots are unusable.
pub fn anonymous(bundle: &TrustBundle, expected: SpiffeId) -> Result<Arc<ClientConfig>, Error> {
    build(None, bundle, expected)
}

fn build(
    svid: Option<&X509Svid>,
    bundle: &TrustBundle,
    expected: SpiffeId,
) -> Result<Arc<ClientConfig>, Error> {
    let verifier = PeerVerifier::new(bundle, Some(expected))?;
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match svid {
        Some(svid) => {
            let identity = SingleCertAndKey::from(Arc::clone(svid.certified_key()));
            builder.with_client_cert_resolver(Arc::new(identity))
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![super::ALPN_H2.to_vec()];
    // Identities are SPIFFE IDs, which no server name can carry.
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}
