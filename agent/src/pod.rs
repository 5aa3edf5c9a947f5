//! An enrolled pod: one local workload with what the data path needs to serve it.

mod proof;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::deliver::Deliver;
use crate::directory::{Destination, Workload};
use crate::tls;
use crate::trust::{Snapshot, Trust};
use crate::verdict::Reason;
use proof::Proof;
pub use proof::{Refusal, Side};

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
    proof: Proof,
}

/// A TLS configuration, and the generations of SVID and bundle that it was made from.
type Made = ((u64, u64), Arc<ServerConfig>);

impl Pod {
    /// A pod just enrolled.
    pub fn new(workload: Arc<Workload>, deliver: Deliver, own_ports: Vec<u16>) -> Self {
        let gone = CancellationToken::new();
        Self { workload, deliver, own_ports, gone, server: Mutex::new(None), proof: Proof::default() }
    }

    /// Whether the address is one of the pod's.
    pub fn has(&self, ip: IpAddr) -> bool {
        self.workload.addresses.contains(&ip)
    }

    /// How the pod's tunnel answers now; made anew when SVID or bundle have changed.
    ///
    /// # Errors
    /// [`Reason::NoSvid`] until one has been issued.
    pub fn server_config(&self, trust: &Trust) -> Result<Arc<ServerConfig>, Reason> {
        let now = trust.snapshot();
        let svid = now.svids.get(&self.workload.id).ok_or(Reason::NoSvid)?;
        let wanted = (svid.generation(), now.bundle_epoch);
        // The configuration is replaced whole, so a panic elsewhere leaves a good one.
        let mut cached = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_from, config)) = cached.as_ref()
            && *made_from == wanted
        {
            return Ok(Arc::clone(config));
        }
        let config = tls::server::config(svid, &now.bundle).map_err(|_| Reason::Internal)?;
        *cached = Some((wanted, Arc::clone(&config)));
        Ok(config)
    }

    /// Whether the pod's SVID would convince a peer, on that side of a TLS connection: checked when
    /// SVID or bundle are new, and remembered for as long as all of the chain is valid.
    ///
    /// # Errors
    /// With what the peer would say, or [`Reason::NoSvid`] until one has been issued.
    pub fn prove(&self, side: Side, trust: &Snapshot, now: SystemTime) -> Result<(), Refusal> {
        self.proof.check(&self.workload, side, trust, now)
    }

    /// The pod's address of the same family as `like`, with a port.
    pub fn address(&self, like: IpAddr, port: u16) -> Option<SocketAddr> {
        let ip = self.workload.addresses.iter().find(|a| a.is_ipv4() == like.is_ipv4())?;
        Some(SocketAddr::new(*ip, port))
    }
}

/// The enrolled pods of this node, by address. Reading is one atomic load.
#[derive(Debug, Default)]
pub struct Pods(ArcSwap<HashMap<IpAddr, Arc<Pod>>>);

impl Pods {
    /// The pod that serves a destination, if it is one of this node's: at that address, with the
    /// identity and on the node that the directory says. While enrolment and directory differ it is
    /// none, and the tunnel's handshake finds out who is there.
    pub fn serving(&self, destination: &Destination) -> Option<Arc<Pod>> {
        let pods = self.0.load();
        let pod = pods.get(&destination.address.ip())?;
        let (is, must_be) = (&pod.workload, &destination.workload);
        (is.id == must_be.id && is.node == must_be.node).then(|| Arc::clone(pod))
    }

    /// Adds a pod that is served from now on.
    pub fn insert(&self, pod: &Arc<Pod>) {
        self.change(|pods| pods.extend(pod.workload.addresses.iter().map(|ip| (*ip, Arc::clone(pod)))));
    }

    /// Removes a pod; another that has its address by now stays.
    pub fn remove(&self, pod: &Arc<Pod>) {
        self.change(|pods| pods.retain(|_, other| !Arc::ptr_eq(pod, other)));
    }

    fn change(&self, edit: impl Fn(&mut HashMap<IpAddr, Arc<Pod>>)) {
        self.0.rcu(|pods| {
            let mut next = HashMap::clone(pods);
            edit(&mut next);
            next
        });
    }
}
