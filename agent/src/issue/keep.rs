//! Keeps the node's own SVID over a restart of the agent, in memory only, and what it knew of roots and
//! revocations; in [`crls`], the lists of other CAs; in [`tickets`], the keys of session tickets; in [`nodes`], which
//! nodes it spoke to.
//!
//! A restarted agent has used its join token up, and must not forget whom it refused, nor which roots it had
//! applied, while the authority is away. Keys never touch a disk: the file is written only
//! where the file system is a tmpfs, and goes with the machine's power.

pub mod crls;
pub mod nodes;
pub mod tickets;

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use serde::{Deserialize, Serialize};

use super::{Keypair, pem};
use crate::identity::bundle::TrustBundle;
use crate::identity::federation::{Admit, Federated, Federation};
use crate::identity::revocation::Revocations;
use crate::identity::svid::X509Svid;
use crate::identity::{SpiffeId, TrustDomain};
use crate::text::hex;

/// `RAMFS_MAGIC`, include/uapi/linux/magic.h.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// Files for one SVID, one list and one bundle.
#[derive(Clone, Debug)]
pub struct Keep {
    path: PathBuf,
    in_memory: bool,
    configured: String,
}

/// The authority's roots, and which roots the operator had configured when they were received.
#[derive(Serialize, Deserialize)]
struct KeptRoots {
    configured: String,
    generation: u64,
    /// PEM.
    roots: String,
    /// Other trust domains, as the authority had them.
    #[serde(default)]
    federation: Option<BTreeMap<TrustDomain, KeptFederated>>,
}

#[derive(Serialize, Deserialize)]
struct KeptFederated {
    admit: Admit,
    /// PEM.
    roots: String,
}

impl KeptFederated {
    fn read(&self) -> Result<Federated, String> {
        let roots: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(self.roots.as_bytes()).collect();
        Federated::new(roots.map_err(|e| e.to_string())?, self.admit).map_err(|e| e.to_string())
    }
}

impl Keep {
    /// Keeps in `dir`, if that is in memory; says so if it is not.
    pub fn in_dir(dir: &Path) -> Self {
        let in_memory = in_memory(dir);
        if !in_memory {
            tracing::warn!(dir = %dir.display(), "the runtime directory is not on a tmpfs: the node's key is not kept, so a restarted agent needs a new join token");
        }
        Self { path: dir.join("node.pem"), in_memory, configured: String::new() }
    }

    /// For an agent that was configured with these roots: roots that were received under others are not taken up,
    /// as whoever changed the file meant it.
    #[must_use]
    pub fn configured_with(self, bundle: &TrustBundle) -> Self {
        let all: Vec<u8> = bundle.roots().iter().flat_map(|root| root.iter().copied()).collect();
        Self { configured: hex(digest(&SHA256, &all).as_ref()), ..self }
    }

    /// The authority's roots that were kept, if there are any for this configuration.
    pub fn load_bundle(&self, domain: &TrustDomain) -> Option<TrustBundle> {
        let text = fs::read(self.bundle()).ok()?;
        let read = || {
            let kept: KeptRoots = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
            if kept.configured != self.configured {
                return Ok(None);
            }
            let bundle = TrustBundle::from_pem(domain.clone(), kept.roots.as_bytes());
            let bundle = bundle.map_err(|e| e.to_string())?.with_generation(kept.generation);
            let Some(domains) = kept.federation else { return Ok(Some(bundle)) };
            let mut federation = Federation::default();
            for (domain, federated) in domains {
                federation.insert(domain, federated.read()?);
            }
            Ok(Some(bundle.with_federation(Arc::new(federation))))
        };
        read().unwrap_or_else(|error: String| {
            tracing::warn!(error, file = %self.bundle().display(), "the roots from before the restart cannot be read; those of the configured file hold until the authority says otherwise");
            None
        })
    }

    /// Keeps the authority's roots, in place of earlier ones. They are no secret.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_bundle(&self, bundle: &TrustBundle) -> io::Result<()> {
        let text = |roots: &[CertificateDer<'_>]| roots.iter().map(|root| pem("CERTIFICATE", root)).collect();
        let federated = |(domain, federated): (&TrustDomain, &Federated)| {
            (domain.clone(), KeptFederated { admit: federated.admit(), roots: text(federated.roots()) })
        };
        let kept = KeptRoots {
            configured: self.configured.clone(),
            generation: bundle.generation(),
            roots: text(bundle.roots()),
            federation: bundle.federation().map(|federation| federation.iter().map(federated).collect()),
        };
        replace(&self.bundle(), &serde_json::to_vec(&kept)?).map(drop)
    }

    fn bundle(&self) -> PathBuf {
        self.path.with_file_name("bundle.json")
    }

    /// What was kept, if it is this identity's and still valid.
    pub fn load(&self, id: &SpiffeId, now: SystemTime) -> Option<X509Svid> {
        if !self.in_memory {
            return None;
        }
        let pem = fs::read_to_string(&self.path).ok()?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().ok()?;
        let svid = Keypair::from_pem(&pem).ok()?.with_chain(chain).ok()?;
        (svid.id() == id && svid.leaf().not_after > now).then_some(svid)
    }

    /// Keeps an SVID with its key, in place of an earlier one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, svid: &X509Svid, key: &Keypair) -> io::Result<()> {
        if !self.in_memory {
            return Ok(());
        }
        let mut text = String::new();
        for certificate in &svid.certified_key().cert {
            text.push_str(&pem("CERTIFICATE", certificate));
        }
        text.push_str(&key.to_pem());
        replace(&self.path, text.as_bytes()).map(drop)
    }

    /// The revocations that were kept; none if there were none.
    ///
    /// # Errors
    /// When there is a file that cannot be read. Whoever was refused before must not be accepted then.
    pub fn load_revocations(&self) -> io::Result<Revocations> {
        match fs::read(self.revocations()) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Revocations::default()),
            Err(error) => Err(error),
        }
    }

    /// Keeps a list of revocations, in place of an earlier one. It is no secret: any file system will
    /// do.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_revocations(&self, list: &Revocations) -> io::Result<()> {
        replace(&self.revocations(), &serde_json::to_vec(list)?).map(drop)
    }

    fn revocations(&self) -> PathBuf {
        self.path.with_file_name("revocations.json")
    }
}

/// Makes the directory if need be; whether what is in it never touches a disk.
fn in_memory(dir: &Path) -> bool {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.is_ok() && statfs(dir).is_ok_and(|fs| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&fs.filesystem_type()))
}

/// Puts a file of ours in place of an earlier one, whole or not at all; returns it, open at its end.
fn replace(path: &Path, content: &[u8]) -> io::Result<File> {
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = OpenOptions::new().create_new(true).append(true).mode(0o600).open(&temporary)?;
    file.write_all(content)?;
    fs::rename(&temporary, path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::TrustDomain;

    #[test]
    fn what_is_kept_in_memory_comes_back_until_it_expires() {
        let now = SystemTime::now();
        let domain = TrustDomain::parse("td.test").unwrap();
        let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now).unwrap()).unwrap();
        let id = SpiffeId::node(&domain, "n1").unwrap();
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let svid = key.with_chain(ca.issue(&proven, &id, Duration::from_secs(60), now).unwrap()).unwrap();
        let dir = Path::new("/dev/shm").join(format!("hauberk-keep-{:x}", fastrand::u64(..)));
        let keep = Keep::in_dir(&dir);
        keep.save(&svid, &key).unwrap();
        let loaded = keep.load(&id, now).map(|s| s.leaf().clone());
        let late = keep.load(&id, now + Duration::from_secs(120)).is_some();
        let other = keep.load(&SpiffeId::node(&domain, "n2").unwrap(), now).is_some();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!(loaded.as_ref(), Some(svid.leaf()));
        assert!(!late && !other);
    }

    #[test]
    fn the_authoritys_roots_come_back_unless_others_were_configured_since() {
        let domain = TrustDomain::parse("td.test").unwrap();
        let bundle = || {
            let root = create_root(&domain, SystemTime::now()).unwrap();
            Ca::from_pem(domain.clone(), &root).unwrap().bundle().clone()
        };
        let (configured, received) = (bundle(), bundle().with_generation(4));
        let dir = std::env::temp_dir().join(format!("hauberk-keep-{:x}", fastrand::u64(..)));
        let keep = Keep::in_dir(&dir).configured_with(&configured);
        let none = keep.load_bundle(&domain);
        keep.save_bundle(&received).unwrap();
        let loaded = keep.load_bundle(&domain);
        let other = Keep::in_dir(&dir).configured_with(&bundle()).load_bundle(&domain);
        fs::write(dir.join("bundle.json"), "{").unwrap();
        let spoilt = keep.load_bundle(&domain);
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!((none, loaded), (None, Some(received)));
        assert_eq!((other, spoilt), (None, None));
    }

    #[test]
    fn revocations_come_back_and_a_spoilt_file_is_no_empty_list() {
        let dir = std::env::temp_dir().join(format!("hauberk-keep-{:x}", fastrand::u64(..)));
        let keep = Keep::in_dir(&dir);
        let none = keep.load_revocations().unwrap();
        let mut list = Revocations::default();
        let serial = crate::identity::revocation::Serial::parse("ab").unwrap();
        let subject = crate::identity::revocation::Subject::Serial(serial);
        list.revoke(subject, SystemTime::now()).unwrap();
        keep.save_revocations(&list).unwrap();
        let loaded = keep.load_revocations().unwrap();
        fs::write(dir.join("revocations.json"), "{").unwrap();
        let spoilt = keep.load_revocations();
        fs::remove_dir_all(&dir).unwrap();
        assert_eq!((none, loaded), (Revocations::default(), list));
        assert!(spoilt.is_err());
    }
}
