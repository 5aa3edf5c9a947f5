//! An enrolled pod: one local workload with what the data path needs to serve it.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::deliver::Deliver;
use crate::directory::{Mode, Workload};
use crate::tls;
use crate::tls::memory::Memory;
use crate::tls::server::{Listener, Terms};
use crate::tls::verify::Expected;
use crate::trust::Trust;
use crate::verdict::Reason;

/// An enrolled pod.
#[derive(Debug)]
pub struct Pod {
    /// Who it is. A pod whose identity or addresses change is enrolled anew.
    pub workload: Arc<Workload>,
    /// The way to its applications.
    pub deliver: Deliver,
    /// Ports inside the pod that are the agent's own.
    pub own_ports: Vec<u16>,
    /// Cancelled when the pod is removed: ends everything that is its.
    pub gone: CancellationToken,
    /// The mode, which may change while the pod is served.
    mode: Mutex<Mode>,
    /// The TLS listener, and what it was made from.
    listener: Mutex<Option<Made>>,
}

/// A TLS listener, and what it was made from: the generations of SVID and bundle, and the mode.
type Made = ((u64, u64, Mode), Arc<Listener>);

impl Pod {
    /// A pod just enrolled.
    pub fn new(workload: Arc<Workload>, deliver: Deliver, own_ports: Vec<u16>) -> Self {
        let mode = Mutex::new(workload.mode);
        Self {
            workload,
            deliver,
            own_ports,
            gone: CancellationToken::new(),
            mode,
            listener: Mutex::default(),
        }
    }

    /// Serves on under another mode: sessions that began under the old one are not resumed.
    pub fn set_mode(&self, mode: Mode) {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
    }

    /// Whether the address is one of the pod's.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.workload.addresses.contains(&ip)
    }

    /// How the pod's tunnel answers now; made anew when SVID, bundle or mode have changed.
    ///
    /// # Errors
    /// [`Reason::NoSvid`] until one has been issued.
    pub fn listener(&self, trust: &Trust, memory: &Memory) -> Result<Arc<Listener>, Reason> {
        let now = trust.snapshot();
        let svid = now.svids.get(&self.workload.id).ok_or(Reason::NoSvid)?;
        let mode = *self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = (svid.generation(), now.bundle_epoch, mode);
        // The listener is replaced whole, so a panic elsewhere leaves a good one.
        let mut cached = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_from, listener)) = cached.as_ref()
            && *made_from == wanted
        {
            return Ok(Arc::clone(listener));
        }
        let roots = memory.roots(&now.bundle, now.bundle_epoch).map_err(|_| Reason::Internal)?;
        let listener = memory.listener(&Terms {
            svid,
            roots: &roots,
            peers: Expected::Member,
            judge: None,
            alpn: &[tls::ALPN_H2],
            place: &place(&self.workload).iter().map(|part| part.as_bytes()).collect::<Vec<_>>(),
            mode: match mode {
                Mode::Strict => "strict",
                Mode::Permissive => "permissive",
                Mode::Off => "off",
            },
        });
        let listener = listener.map_err(|_| Reason::Internal)?;
        *cached = Some((wanted, Arc::clone(&listener)));
        Ok(listener)
    }

    /// The pod's address of the same family as `like`, with a port.
    pub fn address(&self, like: IpAddr, port: u16) -> Option<SocketAddr> {
        let ip = self.workload.addresses.iter().find(|a| a.is_ipv4() == like.is_ipv4())?;
        Some(SocketAddr::new(*ip, port))
    }
}

/// Names a workload's listener: a ticket of one pod is none of another's, whatever their identities.
fn place(workload: &Workload) -> Vec<String> {
    let named = ["workload", &workload.namespace, &workload.name].map(str::to_owned);
    named.into_iter().chain(workload.addresses.iter().map(IpAddr::to_string)).collect()
}
