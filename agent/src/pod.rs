//! An enrolled pod: one local workload with what the data path needs to serve it.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::deliver::Deliver;
use crate::directory::Workload;
use crate::identity::svid::X509Svid;
use crate::tls;
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
    /// The TLS configuration for the SVID and bundle it was made from (their generations).
    server: Mutex<Option<Made>>,
}

/// A TLS configuration, and the generations of SVID and bundle that it was made from.
type Made = ((u64, u64), Arc<ServerConfig>);

impl Pod {
    /// A pod just enrolled.
    pub fn new(workload: Arc<Workload>, deliver: Deliver, own_ports: Vec<u16>) -> Self {
        Self { workload, deliver, own_ports, gone: CancellationToken::new(), server: Mutex::new(None) }
    }

    /// Whether the address is one of the pod's.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.workload.addresses.contains(&ip)
    }

    /// How the pod's tunnel answers now, and the SVID it presents; made anew when SVID or bundle have
    /// changed.
    ///
    /// # Errors
    /// [`Reason::NoSvid`] until one has been issued, [`Reason::Revoked`] while that one is revoked.
    pub fn server_config(&self, trust: &Trust) -> Result<(Arc<ServerConfig>, Arc<X509Svid>), Reason> {
        let now = trust.snapshot();
        let svid = now.svids.get(&self.workload.id).ok_or(Reason::NoSvid)?;
        if now.revoked(svid.leaf()).is_some() {
            return Err(Reason::Revoked);
        }
        let wanted = (svid.generation(), now.bundle_epoch);
        // The configuration is replaced whole, so a panic elsewhere leaves a good one.
        let mut cached = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_from, config)) = cached.as_ref()
            && *made_from == wanted
        {
            return Ok((Arc::clone(config), Arc::clone(svid)));
        }
        let config = tls::server::config(svid, &now.bundle).map_err(|_| Reason::Internal)?;
        *cached = Some((wanted, Arc::clone(&config)));
        Ok((config, Arc::clone(svid)))
    }

    /// The pod's address of the same family as `like`, with a port.
    pub fn address(&self, like: IpAddr, port: u16) -> Option<SocketAddr> {
        let ip = self.workload.addresses.iter().find(|a| a.is_ipv4() == like.is_ipv4())?;
        Some(SocketAddr::new(*ip, port))
    }
}
