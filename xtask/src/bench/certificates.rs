//! The peers' certificates: a CA, and one certificate for both ends, P-256 as Hauberk's SVIDs.

use std::path::Path;

use anyhow::Result;

use crate::shell::{command, output};

/// The name in the certificate, which both ends verify.
pub(super) const NAME: &str = "peer";

/// Writes `peer-ca.pem`, `peer.crt`, `peer.key`, and certificate and key together as `peer.pem`.
pub(super) fn make(dir: &Path) -> Result<()> {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let (ca, ca_key, key, csr, cert) =
        (path("peer-ca.pem"), path("peer-ca.key"), path("peer.key"), path("peer.csr"), path("peer.crt"));
    let openssl = |args: &str| {
        let words: Vec<&str> = args.split_whitespace().collect();
        output(command("openssl", &words))
    };
    let new = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    openssl(&format!("req -x509 -days 2 -subj /CN=bench {new} -keyout {ca_key} -out {ca}"))?;
    openssl(&format!(
        "req -subj /CN={NAME} -addext subjectAltName=DNS:{NAME} {new} -keyout {key} -out {csr}"
    ))?;
    openssl(&format!(
        "x509 -req -in {csr} -CA {ca} -CAkey {ca_key} -days 2 -copy_extensions copy -out {cert}"
    ))?;
    let both = std::fs::read_to_string(&cert)? + &std::fs::read_to_string(&key)?;
    Ok(std::fs::write(path("peer.pem"), both)?)
}
