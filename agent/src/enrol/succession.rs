//! What an agent takes from its predecessor, and leaves to its successor: listening sockets.

use std::collections::HashSet;
use std::io;
use std::net::TcpListener;

use super::Enroller;
use crate::capture::Listeners;
use crate::directory::Directory;
use crate::handover::{Inherited, Name, Named};

impl Enroller {
    /// Enrols on these sockets, where they fit; call it before the first [`Enroller::apply`].
    pub fn inherit(&mut self, inherited: Inherited) {
        self.inherited = inherited;
    }

    /// Second handles of all listening sockets, for a successor.
    ///
    /// # Errors
    /// When the system has no more descriptors.
    pub fn sockets(&self) -> io::Result<Vec<Named>> {
        let of_pods = self
            .enrolled
            .values()
            .flat_map(|pod| pod.listeners.iter().map(|listener| (pod.netns.cookie(), listener)));
        let of_node = self.front.iter().flat_map(|front| &front.listeners).zip(self.own_netns.iter().cycle());
        of_pods
            .chain(of_node.map(|(listener, cookie)| (*cookie, listener)))
            .map(|(cookie, listener)| {
                Ok((Name { cookie, address: listener.local_addr()? }, listener.try_clone()?))
            })
            .collect()
    }

    /// Leaves the pods to a successor: from now on only lets go of those that end.
    pub fn retire(&mut self) {
        self.is_retired = true;
        self.front.iter_mut().for_each(|front| front.listeners.clear());
        self.enrolled.values_mut().for_each(|pod| pod.listeners.clear());
    }

    /// Ends what is served of pods that are no more; a successor does everything else.
    pub(super) fn let_go(&mut self, directory: &Directory) {
        let here: HashSet<String> =
            directory.enrolled_on(&self.config.node).map(|workload| workload.full_name()).collect();
        for (_, gone) in self.enrolled.extract_if(.., |name, _| !here.contains(name)) {
            self.pods.remove(&gone.pod);
            gone.pod.gone.cancel();
        }
    }
}

/// Second handles of a pod's listeners.
pub(super) fn handles(listeners: &[Listeners]) -> io::Result<Vec<TcpListener>> {
    let each: io::Result<Vec<Vec<TcpListener>>> = listeners.iter().map(Listeners::handles).collect();
    Ok(each?.into_iter().flatten().collect())
}
