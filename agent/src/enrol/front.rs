//! The listeners at the node's own address, where other nodes' agents arrive.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

use socket2::SockRef;

use super::Enroller;
use crate::capture::Listeners;
use crate::directory::Directory;
use crate::handover::Name;
use crate::inbound::Node;

/// Where other nodes' agents arrive.
pub(super) struct OwnFront {
    pub(super) address: SocketAddr,
    pub(super) node: Arc<Node>,
    /// Its listeners, for a successor.
    pub(super) listeners: Vec<TcpListener>,
}

impl Enroller {
    /// Listens at the node's address for other agents, as long as the directory lists it.
    pub(super) fn serve_node(&mut self, directory: &Directory) {
        let node = directory.node(&self.config.node).filter(|_| self.config.issuer().issues_nodes());
        let wanted = node.map(|node| SocketAddr::new(node.address, self.config.tunnel.port));
        if wanted == self.front.as_ref().map(|front| front.address) {
            return;
        }
        if let Some(front) = self.front.take() {
            front.node.gone.cancel();
        }
        let Some((node, address)) = node.zip(wanted) else { return };
        let node = Node::new(node.id.clone());
        match self.listen_for_nodes(address, &node) {
            Ok(listeners) => {
                tracing::info!(%address, "listening for other nodes' agents");
                self.front = Some(OwnFront { address, node, listeners });
            }
            Err(error) => {
                tracing::error!(%address, %error, "cannot listen for other nodes' agents; they reach the pods one by one; trying again every second");
            }
        }
    }

    fn listen_for_nodes(&mut self, address: SocketAddr, node: &Arc<Node>) -> io::Result<Vec<TcpListener>> {
        let mut listeners = match &self.own_netns {
            Some(cookie) => self.inherited.take(Name { cookie: *cookie, address }),
            None => Vec::new(),
        };
        while listeners.len() < self.threads.len() {
            listeners.push(Listeners::at(address)?);
        }
        let handles = listeners.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?;
        for (listener, thread) in listeners.into_iter().zip(self.threads.iter().cycle()) {
            thread.serve_node(Arc::clone(node), listener);
        }
        Ok(handles)
    }

    /// Listens anew for other nodes' agents where somebody has closed the sockets by the kernel.
    pub(super) fn verify_front(&mut self) {
        let is_dead = |listener: &TcpListener| !SockRef::from(listener).is_listener().unwrap_or(false);
        let dead = self.front.take_if(|front| front.listeners.iter().any(is_dead));
        let Some(OwnFront { address, node, .. }) = dead else { return };
        tracing::warn!(%address, "the listeners for other nodes' agents are gone; listening anew");
        self.status.repaired();
        match self.listen_for_nodes(address, &node) {
            Ok(listeners) => self.front = Some(OwnFront { address, node, listeners }),
            Err(error) => tracing::error!(%address, %error, "cannot listen for other nodes' agents"),
        }
    }
}
