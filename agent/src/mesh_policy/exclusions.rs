//! What of a workload's connections is left alone: neither captured nor refused.

use std::net::IpAddr;

use super::document::Exclude;
use crate::cidr::Cidr;

/// Ports and ranges of addresses that are left alone, each sorted and given once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions {
    inbound_ports: Vec<u16>,
    outbound_ports: Vec<u16>,
    outbound_cidrs: Vec<Cidr>,
}

impl Exclusions {
    /// Adds what a policy or an annotation excludes.
    pub fn add(&mut self, more: &Exclude) {
        merge(&mut self.inbound_ports, more.inbound_ports.as_deref());
        merge(&mut self.outbound_ports, more.outbound_ports.as_deref());
        merge(&mut self.outbound_cidrs, more.outbound_cidrs.as_deref());
    }

    /// Adds what is excluded elsewhere too.
    pub fn merge(&mut self, more: &Self) {
        merge(&mut self.inbound_ports, Some(&more.inbound_ports));
        merge(&mut self.outbound_ports, Some(&more.outbound_ports));
        merge(&mut self.outbound_cidrs, Some(&more.outbound_cidrs));
    }

    /// The application's ports where plaintext from outside the mesh is accepted in any mode.
    pub fn inbound_ports(&self) -> &[u16] {
        &self.inbound_ports
    }

    /// Ports of destinations that connections go to in plaintext.
    pub fn outbound_ports(&self) -> &[u16] {
        &self.outbound_ports
    }

    /// Addresses of destinations that connections go to in plaintext.
    pub fn outbound_cidrs(&self) -> &[Cidr] {
        &self.outbound_cidrs
    }

    /// In words, for people; empty when nothing is excluded.
    pub fn words(&self) -> Vec<String> {
        let inbound = self.inbound_ports.iter().map(|port| format!("in:{port}"));
        let outbound = self.outbound_ports.iter().map(|port| format!("out:{port}"));
        inbound.chain(outbound).chain(self.outbound_cidrs.iter().map(|cidr| format!("out:{cidr}"))).collect()
    }

    /// Whether a connection to a destination is left alone.
    pub fn leaves_out(&self, destination: IpAddr, port: u16) -> bool {
        self.outbound_ports.binary_search(&port).is_ok()
            || self.outbound_cidrs.iter().any(|cidr| cidr.contains(destination))
    }

    /// Whether a connection to a port of the workload is left alone.
    pub fn lets_in(&self, port: u16) -> bool {
        self.inbound_ports.binary_search(&port).is_ok()
    }
}

fn merge<T: Ord + Copy>(list: &mut Vec<T>, more: Option<&[T]>) {
    list.extend(more.into_iter().flatten());
    list.sort_unstable();
    list.dedup();
}
