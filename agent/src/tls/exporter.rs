//! The TLS exporter (RFC 8446, section 7.5): bytes that both ends of one connection know, and nobody
//! else, ever. rustls exports them from its buffered connections only; from the kind that gives its
//! records away ([`super::handshake`]) the secret behind them is taken by the key log, whose one
//! reader is here.

use std::sync::{Arc, Mutex, PoisonError};

use aws_lc_rs::digest::{self, SHA256, SHA384};
use aws_lc_rs::hkdf::{HKDF_SHA256, HKDF_SHA384, KeyType, Prk};
use rustls::{Error, KeyLog};

/// Names what the bytes are for (registered with nobody, as RFC 5705 section 4 allows).
pub const LABEL: &[u8] = b"EXPORTER-hauberk-identity-proof-v1";
/// How rustls names the secret that exporters are made of.
const SECRET: &str = "EXPORTER_SECRET";

/// Keeps one connection's exporter secret until it is used.
#[derive(Default)]
pub(super) struct Exporter(Mutex<Vec<u8>>);

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exporter").finish_non_exhaustive()
    }
}

impl KeyLog for Exporter {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if label == SECRET {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = secret.to_vec();
        }
    }

    fn will_log(&self, label: &str) -> bool {
        label == SECRET
    }
}

impl Exporter {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The exported bytes; the secret is forgotten.
    ///
    /// # Errors
    /// When the handshake is not done.
    pub(super) fn export(&self) -> Result<[u8; 32], Error> {
        let mut secret = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let exported = export(&secret, LABEL).ok_or(Error::HandshakeNotComplete);
        secret.fill(0);
        exported
    }
}

struct Bytes(usize);

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

/// Section 7.5, without a context value. The secret's length tells the suite's hash.
fn export(secret: &[u8], label: &[u8]) -> Option<[u8; 32]> {
    let (hkdf, hash) = match secret.len() {
        32 => (HKDF_SHA256, &SHA256),
        48 => (HKDF_SHA384, &SHA384),
        _ => return None,
    };
    let empty = digest::digest(hash, &[]);
    let mut derived = vec![0; secret.len()];
    expand(&Prk::new_less_safe(hkdf, secret), label, empty.as_ref(), &mut derived)?;
    let mut exported = [0; 32];
    expand(&Prk::new_less_safe(hkdf, &derived), b"exporter", empty.as_ref(), &mut exported)?;
    derived.fill(0);
    Some(exported)
}

/// HKDF-Expand-Label (section 7.1).
fn expand(secret: &Prk, label: &[u8], context: &[u8], out: &mut [u8]) -> Option<()> {
    let length = u16::try_from(out.len()).ok()?.to_be_bytes();
    let label_length = [u8::try_from(6 + label.len()).ok()?];
    let context_length = [u8::try_from(context.len()).ok()?];
    let info: [&[u8]; 6] = [&length, &label_length, b"tls13 ", label, &context_length, context];
    secret.expand(&info, Bytes(out.len())).ok()?.fill(out).ok()
}
