//! An enrolled pod: one local workload with what the data path needs to serve it.

mod listening;
mod proof;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::deliver::Deliver;
use crate::directory::{Destination, Mode, Workload};
use crate::identity::svid::X509Svid;
use crate::tls;
use crate::tls::memory::Memory;
use crate::tls::roots::Usage;
use crate::tls::server::{Listener, Terms};
use crate::tls::verify::{Expected, Judge};
use crate::trust::{Snapshot, Trust};
use crate::verdict::Reason;
pub use listening::Listening;
use proof::Proof;
pub use proof::Refusal;

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
    listening: Listening,
    proof: Proof,
}

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
            listening: Listening::default(),
            proof: Proof::default(),
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

    /// How the pod's tunnel answers now (to peers that `judge` lets in as well), and the SVID it
    /// presents; made anew when SVID, bundle or mode have changed.
    ///
    /// # Errors
    /// [`Reason::NoSvid`] until one has been issued, [`Reason::Revoked`] while that one is revoked.
    pub fn listener(
        &self,
        trust: &Trust,
        memory: &Memory,
        judge: impl FnOnce() -> Arc<dyn Judge>,
    ) -> Result<(Arc<Listener>, Arc<X509Svid>), Reason> {
        let mode = match *self.mode.lock().unwrap_or_else(PoisonError::into_inner) {
            Mode::Strict => "strict",
            Mode::Permissive => "permissive",
            Mode::Off => "off",
        };
        self.listening.get(&self.workload.id, mode, trust, memory, |svid, roots| {
            memory.listener(&Terms {
                svid,
                roots,
                peers: Expected::Anyone,
                judge: Some(judge()),
                alpn: &[tls::ALPN_H2],
                place: &place(&self.workload).iter().map(|part| part.as_bytes()).collect::<Vec<_>>(),
                mode,
            })
        })
    }

    /// Whether the pod's SVID would convince a peer, on that side of a TLS connection: checked when
    /// SVID or bundle are new, and remembered for as long as all of the chain is valid.
    ///
    /// # Errors
    /// With what the peer would say, or [`Reason::NoSvid`] until one has been issued.
    pub fn prove(&self, usage: Usage, trust: &Snapshot, now: SystemTime) -> Result<(), Refusal> {
        self.proof.check(&self.workload, usage, trust, now)
    }
}

/// Names a workload's listener: a ticket of one pod is none of another's, whatever their identities.
fn place(workload: &Workload) -> Vec<String> {
    let named = ["workload", &workload.namespace, &workload.name].map(str::to_owned);
    named.into_iter().chain(workload.addresses.iter().map(IpAddr::to_string)).collect()
}

/// The enrolled pods of this node, by address. Reading is one atomic load.
#[derive(Debug, Default)]
pub struct Pods(ArcSwap<HashMap<IpAddr, Arc<Pod>>>);

impl Pods {
    /// The pod that has an address.
    pub fn at(&self, ip: IpAddr) -> Option<Arc<Pod>> {
        self.0.load().get(&ip).map(Arc::clone)
    }

    /// A pod of an identity.
    pub fn of(&self, id: &str) -> Option<Arc<Pod>> {
        self.0.load().values().find(|pod| pod.workload.id.as_str() == id).map(Arc::clone)
    }

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
