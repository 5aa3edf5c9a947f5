//! How one identity answers TLS: its listener, made anew when what it is made from has changed.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::Error;

use crate::identity::SpiffeId;
use crate::identity::svid::X509Svid;
use crate::tls::memory::Memory;
use crate::tls::roots::Roots;
use crate::tls::server::Listener;
use crate::trust::Trust;
use crate::verdict::Reason;

/// One identity's TLS listener, once somebody has asked for it.
#[derive(Debug, Default)]
pub struct Listening(Mutex<Option<Made>>);

/// A TLS listener, and what it was made from: the generations of SVID and bundle, and the mode.
type Made = ((u64, u64, &'static str), Arc<Listener>);

impl Listening {
    /// How `id` answers now, and the SVID it presents; `make` is asked when SVID, bundle or mode have
    /// changed.
    ///
    /// # Errors
    /// [`Reason::NoSvid`] until one has been issued, [`Reason::Revoked`] while that one is revoked.
    pub fn get(
        &self,
        id: &SpiffeId,
        mode: &'static str,
        trust: &Trust,
        memory: &Memory,
        make: impl FnOnce(&X509Svid, &Arc<Roots>) -> Result<Arc<Listener>, Error>,
    ) -> Result<(Arc<Listener>, Arc<X509Svid>), Reason> {
        let now = trust.snapshot();
        let svid = now.svids.get(id).ok_or(Reason::NoSvid)?;
        if now.revoked(svid.leaf()).is_some() {
            return Err(Reason::Revoked);
        }
        let wanted = (svid.generation(), now.bundle_epoch, mode);
        // The listener is replaced whole, so a panic elsewhere leaves a good one.
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_from, listener)) = cached.as_ref()
            && *made_from == wanted
        {
            return Ok((Arc::clone(listener), Arc::clone(svid)));
        }
        let roots = memory.roots(&now.bundle, now.bundle_epoch).map_err(|_| Reason::Internal)?;
        let listener = make(svid, &roots).map_err(|_| Reason::Internal)?;
        *cached = Some((wanted, Arc::clone(&listener)));
        Ok((listener, Arc::clone(svid)))
    }
}
