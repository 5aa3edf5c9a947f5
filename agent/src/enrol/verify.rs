//! Looks again and again whether what was put in place for each pod is still there, and puts it back.
//!
//! What cannot be put back makes the pod's reason not to be ready; a strict pod is closed meanwhile.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::{Enrolled, Enroller};
use crate::capture::{Capture, Listeners};
use crate::directory::{Mode, Workload};
use crate::handover::Inherited;
use crate::netns::Netns;

/// How often everything is verified.
pub const VERIFY_EVERY: Duration = Duration::from_secs(5);

impl Enroller {
    /// Verifies every enrolled pod, mends what is not as it should be, and takes note of what stays wrong.
    pub fn verify(&mut self) {
        if self.is_retired {
            return;
        }
        self.recognise_kubelet();
        self.verify_front();
        let common = self.verify_programs();
        let names: Vec<String> = self.enrolled.keys().cloned().collect();
        let mut faults: Vec<Option<String>> = names.iter().map(|name| self.verify_pod(name)).collect();
        for (fault, answer) in faults.iter_mut().zip(self.try_capture()) {
            *fault = fault.take().or(answer);
        }
        for (name, fault) in names.iter().zip(faults) {
            self.settle(name, common.clone().or(fault));
        }
    }

    /// What all pods share.
    fn verify_programs(&self) -> Option<String> {
        let why = self.capture.verify_all().err()?;
        tracing::warn!(%why, "the capture is not as it was; attaching it again");
        self.status.repaired();
        let again = self.capture.attach_again().map_err(|e| e.to_string());
        again.and_then(|()| self.capture.verify_all()).err()
    }

    fn verify_pod(&self, name: &str) -> Option<String> {
        let Enrolled { workload, netns, .. } = self.enrolled.get(name)?;
        let why = self.capture.verify(workload, netns).err()?;
        tracing::warn!(workload = name, %why, "a pod's capture is not as it was; putting it back");
        self.status.repaired();
        let again = self.capture.enrol(workload, netns).map_err(|e| e.to_string());
        again.and_then(|()| self.capture.verify(workload, netns)).err()
    }

    /// Connects through each pod's capture; who does not answer gets new listeners, and another try.
    fn try_capture(&self) -> Vec<Option<String>> {
        let all: Vec<(&String, &Enrolled)> = self.enrolled.iter().collect();
        let mut faults = probe(&self.capture, &all);
        let silent: Vec<usize> = (0..all.len()).filter(|place| faults[*place].is_some()).collect();
        if silent.is_empty() {
            return faults;
        }
        let again: Vec<(&String, &Enrolled)> = silent.iter().map(|place| all[*place]).collect();
        for (name, enrolled) in &again {
            tracing::warn!(workload = %name, "its capture is not answered; listening anew");
            self.status.repaired();
            if let Err(error) = self.listen_again(enrolled) {
                tracing::warn!(workload = %name, %error, "cannot listen anew");
            }
        }
        for (place, fault) in silent.into_iter().zip(probe(&self.capture, &again)) {
            faults[place] = fault;
        }
        faults
    }

    /// More listeners for a pod; those that may still be there share the connections with them.
    fn listen_again(&self, enrolled: &Enrolled) -> io::Result<()> {
        let ports = (&*self.config.capture.ports, self.config.tunnel.port);
        let (netns, workload) = (&enrolled.netns, &enrolled.workload);
        let new = Listeners::open(netns, workload, ports, self.threads.len(), &mut Inherited::default())?;
        for (thread, listeners) in self.threads.iter().zip(new) {
            thread.serve(Arc::clone(&enrolled.pod), listeners);
        }
        Ok(())
    }

    fn settle(&mut self, name: &str, fault: Option<String>) {
        let Some(enrolled) = self.enrolled.get_mut(name) else { return };
        if fault.is_some() && enrolled.workload.mode == Mode::Strict {
            if let Err(error) = self.capture.close(&enrolled.workload, &enrolled.netns) {
                tracing::error!(workload = name, %error, "cannot close a strict pod that is not verified");
            }
        } else if fault.is_none() && enrolled.fault.is_some() {
            tracing::info!(workload = name, "verified again");
        }
        enrolled.fault = fault;
    }

    /// Whose probes may enter strict pods.
    fn recognise_kubelet(&mut self) {
        let configured = self.config.probes.kubelet_cgroup.as_deref();
        if configured.is_none() && !self.is_by_cgroup() {
            return;
        }
        let outcome = self.capture.recognise_kubelet(configured).err();
        if outcome != self.kubelet {
            match &outcome {
                Some(why) => {
                    tracing::warn!(%why, "the kubelet's probes are not known from others; strict pods refuse them unless probes.exempt lists their address")
                }
                None => tracing::info!("the kubelet's probes are known by its sockets"),
            }
            self.kubelet = outcome;
        }
    }
}

/// Tries each pod's capture; what is wrong with it.
fn probe(capture: &Capture, pods: &[(&String, &Enrolled)]) -> Vec<Option<String>> {
    let places: Vec<(&Workload, &Netns)> = pods.iter().map(|(_, it)| (&*it.workload, &*it.netns)).collect();
    match capture.probe(&places) {
        Ok(answers) => answers.into_iter().map(Result::err).collect(),
        Err(error) => {
            // That says nothing of the pods.
            tracing::warn!(%error, "cannot try the capture of this node's pods");
            vec![None; pods.len()]
        }
    }
}
