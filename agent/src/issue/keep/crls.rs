//! Keeps the last good CRL of each configured file over a restart of the agent.
//!
//! A file that is missing, spoilt or put back must not make a restarted agent forget what was revoked. With a list
//! stand the certificates that vouched for it, as it is verified again before anybody is judged by it. None of it is
//! secret: any file system will do.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer};

use super::replace;
use crate::identity::svid::pem;
use crate::text::hex;

/// A list as it was when it was good.
#[derive(Debug)]
pub struct KeptCrl {
    /// The list.
    pub der: Vec<u8>,
    /// The certificates that were in the issuer's file.
    pub issuers: Vec<CertificateDer<'static>>,
}

/// Where lists are kept: one file for each that is configured.
#[derive(Clone, Debug)]
pub struct CrlKeep(PathBuf);

impl CrlKeep {
    /// Keeps in `dir`, which must exist.
    pub fn in_dir(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Where the list of `file` is kept. A list that leaves the configuration and comes back is remembered.
    pub fn path(&self, file: &Path) -> PathBuf {
        let name = digest(&SHA256, file.as_os_str().as_bytes());
        self.0.join(format!("crl-{}.pem", hex(&name.as_ref()[..8])))
    }

    /// The list of `file` that was kept, if there is one.
    ///
    /// # Errors
    /// When something was kept and cannot be read: what was revoked is not known then.
    pub fn load(&self, file: &Path) -> io::Result<Option<KeptCrl>> {
        let text = match fs::read(self.path(file)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let list = CertificateRevocationListDer::from_pem_slice(&text).map_err(io::Error::other)?;
        let issuers = CertificateDer::pem_slice_iter(&text).collect::<Result<_, _>>();
        Ok(Some(KeptCrl { der: list.to_vec(), issuers: issuers.map_err(io::Error::other)? }))
    }

    /// Keeps a list of `file`, in place of an earlier one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, file: &Path, kept: &KeptCrl) -> io::Result<()> {
        let mut text = pem("X509 CRL", &kept.der);
        text.extend(kept.issuers.iter().map(|issuer| pem("CERTIFICATE", issuer)));
        replace(&self.path(file), text.as_bytes()).map(drop)
    }
}
