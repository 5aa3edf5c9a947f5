//! What a world's directory file lists: its pods, and what a test adds to them.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Result;

use super::{NODES, Pod, World};

#[derive(Debug)]
pub(super) struct Service {
    name: String,
    address: IpAddr,
    port: u16,
    target: u16,
    endpoints: Vec<String>,
}

impl World {
    /// Adds a service with a virtual address in front of pods.
    pub fn service(&mut self, name: &str, address: &str, port: u16, target: u16, endpoints: &[&str]) {
        // A literal of the test.
        let address = address.parse().unwrap_or_else(|_| panic!("not an address: {address}"));
        let endpoints = endpoints.iter().map(|e| (*e).to_owned()).collect();
        self.services.push(Service { name: name.into(), address, port, target, endpoints });
    }

    /// Lists a workload that is no pod of this world, on a node that the directory does not list.
    pub fn ghost(&mut self, name: &str, address: &str) {
        self.ghost_on("elsewhere", name, address);
    }

    /// Lists a workload that is no pod of this world, on a node by name.
    pub fn ghost_on(&mut self, node: &str, name: &str, address: &str) {
        self.ghosts.push(format!(
            "{{name: {name}, namespace: demo, serviceAccount: {name}, node: {node}, addresses: ['{address}']}}"
        ));
    }

    /// Lists a node that is none of this world, so that agents look for node scope at its address.
    pub fn ghost_node(&mut self, name: &str, address: &str) {
        self.ghost_nodes.push((name.into(), address.into()));
    }

    /// Changes what the directory says of a pod, and writes it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn change(&mut self, pod: &str, change: impl FnOnce(&mut Pod)) -> Result<()> {
        change(self.get_mut(pod));
        self.write_directory()
    }

    /// Where the directory's file is.
    pub fn directory_file(&self) -> PathBuf {
        self.dir().join("directory.yaml")
    }

    /// Writes the directory as the world is now.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_directory(&self) -> Result<()> {
        let mut text = String::from("workloads:\n");
        for (name, pod) in self.pods.iter().filter(|(_, pod)| pod.listed) {
            let netns = pod.host.netns();
            writeln!(
                text,
                "  - {{name: {name}, namespace: {}, serviceAccount: {name}, node: {}, addresses: [{}, '{}'], mode: {}, netns: {}}}",
                pod.namespace,
                pod.node,
                pod.v4,
                pod.v6,
                pod.mode.as_str(),
                netns.display()
            )?;
        }
        for ghost in &self.ghosts {
            writeln!(text, "  - {ghost}")?;
        }
        if self.options.node_scope {
            text.push_str("nodes:\n");
            let ghosts = self.ghost_nodes.iter().map(|(node, address)| (&**node, &**address));
            for (node, address) in NODES.into_iter().chain(ghosts) {
                writeln!(text, "  - {{name: {node}, address: {address}}}")?;
            }
        }
        text.push_str("services:\n");
        for service in &self.services {
            let namespace = |pod: &String| self.pods.get(pod).map_or("demo", |pod| &pod.namespace);
            let endpoints: Vec<_> =
                service.endpoints.iter().map(|e| format!("{}/{e}", namespace(e))).collect();
            writeln!(
                text,
                "  - {{name: {}, namespace: demo, addresses: ['{}'], ports: [{{port: {}, targetPort: {}}}], endpoints: [{}]}}",
                service.name,
                service.address,
                service.port,
                service.target,
                endpoints.join(", ")
            )?;
        }
        if self.services.is_empty() {
            text = text.replace("services:\n", "");
        }
        // Renamed into place: nobody reads half a file.
        let new = self.dir().join("directory.new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(new, self.directory_file())?)
    }
}
