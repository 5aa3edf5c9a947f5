//! A whole world: two nodes and an outside host joined by wires, pods on the nodes, an authority
//! and an agent on each node. Dropping it removes everything, also after a panic.

mod directory;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::agent::{Agent, Mode, Options};
use crate::host::Host;
use crate::kubernetes::{self, Kubernetes};
use crate::process::Process;
use crate::sweep;
use crate::tap::Tap;
use directory::Service;

/// The trust domain of every world.
pub const TRUST_DOMAIN: &str = "test.local";
/// Where the authority serves, on node 1.
pub const AUTHORITY: &str = "192.168.50.1:15012";
/// The nodes that run agents, with their addresses.
const NODES: [(&str, &str); 2] = [("n1", "192.168.50.1"), ("n2", "192.168.50.2")];

/// A world.
#[derive(Debug)]
pub struct World {
    id: String,
    // Processes before namespaces: fields drop in order.
    authority: Option<Process>,
    cluster: Option<Kubernetes>,
    agents: BTreeMap<String, Agent>,
    nodes: BTreeMap<String, Host>,
    pods: BTreeMap<String, Pod>,
    services: Vec<Service>,
    /// Workloads that only the directory knows, as YAML.
    ghosts: Vec<String>,
    /// Nodes that only the directory knows, with their addresses.
    ghost_nodes: Vec<(String, String)>,
    options: Options,
}

/// A pod: a namespace and a cgroup on a node, with an identity.
#[derive(Debug)]
pub struct Pod {
    /// Where its programs run.
    pub host: Host,
    /// Its node.
    pub node: String,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
    /// Its mode, as the directory has it.
    pub mode: Mode,
    /// The process that a container runtime keeps in every pod, in worlds with an API server.
    pub pause: Option<Process>,
    /// Whether the directory knows it.
    pub listed: bool,
    /// Its namespace, as the directory has it: `demo` unless a test changes it.
    pub namespace: String,
}

impl Pod {
    /// An address of the pod with a port.
    pub fn v4(&self, port: u16) -> String {
        SocketAddr::from((self.v4, port)).to_string()
    }

    /// Its IPv6 address with a port.
    pub fn v6(&self, port: u16) -> String {
        SocketAddr::from((self.v6, port)).to_string()
    }
}

impl World {
    /// Nodes, wires and the outside host; no pods and no agents yet.
    ///
    /// # Errors
    /// When the machine lacks something: root, iproute2, cgroup v2.
    pub fn new(options: Options) -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            anyhow::bail!("worlds need root: they are made of network namespaces");
        }
        sweep::stale();
        let id = format!("{}-{:04x}", std::process::id(), fastrand::u16(..));
        let mut world = Self {
            id,
            authority: None,
            cluster: None,
            agents: BTreeMap::new(),
            nodes: BTreeMap::new(),
            pods: BTreeMap::new(),
            services: Vec::new(),
            ghosts: Vec::new(),
            ghost_nodes: Vec::new(),
            options,
        };
        std::fs::create_dir_all(world.dir()).context("a tmpfs at /dev/shm is needed")?;
        for node in ["n1", "n2", "out"] {
            let host = Host::new(world.netns_name(node), None)?;
            world.nodes.insert(node.into(), host);
        }
        world.wires()?;
        Ok(world)
    }

    /// The usual world: pods `client` on node 1 and `server` on node 2, both strict, everything
    /// running and ready.
    ///
    /// # Errors
    /// When anything does not come up.
    pub fn usual() -> Result<Self> {
        let mut world = Self::new(Options::default())?;
        world.pod("client", "n1", Mode::Strict)?;
        world.pod("server", "n2", Mode::Strict)?;
        world.start()?;
        Ok(world)
    }

    /// Names everything that is the world's.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where its files are: on a tmpfs, as keys never touch a disk.
    pub fn dir(&self) -> PathBuf {
        PathBuf::from("/dev/shm").join(format!("hauberk-{}", self.id))
    }

    fn netns_name(&self, host: &str) -> String {
        format!("hbk-{}-{host}", self.id)
    }

    /// The cgroup above all pods of a node.
    ///
    /// # Errors
    /// When no cgroup v2 is mounted.
    pub fn pods_cgroup(&self, node: &str) -> Result<PathBuf> {
        Ok(sweep::cgroup_root()?.join(format!("hauberk-{}", self.id)).join(node).join("pods"))
    }

    fn wires(&self) -> Result<()> {
        let (n1, n2, out) = (self.host("n1"), self.host("n2"), self.host("out"));
        for (one, other, name, net) in [(n1, n2, "wire", 50), (n1, out, "uplink", 60)] {
            one.ip(&["link", "add", name, "type", "veth", "peer", "name", name, "netns", &other.name])?;
            for (host, last) in [(one, 1), (other, 2)] {
                host.ip(&["addr", "add", &format!("192.168.{net}.{last}/24"), "dev", name])?;
                host.ip(&["addr", "add", &format!("fd{net}::{last}/64"), "dev", name, "nodad"])?;
                host.ip(&["link", "set", name, "up"])?;
            }
        }
        for node in [n1, n2] {
            node.sysctl("net/ipv4/ip_forward", "1")?;
            node.sysctl("net/ipv6/conf/all/forwarding", "1")?;
        }
        n1.ip(&["route", "add", "10.1.2.0/24", "via", "192.168.50.2"])?;
        n1.ip(&["-6", "route", "add", "fd00:2::/64", "via", "fd50::2"])?;
        n2.ip(&["route", "add", "10.1.1.0/24", "via", "192.168.50.1"])?;
        n2.ip(&["-6", "route", "add", "fd00:1::/64", "via", "fd50::1"])?;
        n2.ip(&["route", "add", "192.168.60.0/24", "via", "192.168.50.1"])?;
        n2.ip(&["-6", "route", "add", "fd60::/64", "via", "fd50::1"])?;
        out.ip(&["route", "add", "default", "via", "192.168.60.1"])?;
        out.ip(&["-6", "route", "add", "default", "via", "fd60::1"])
    }

    /// A node, or the outside host (`out`).
    ///
    /// # Panics
    /// When there is no such host: a mistake in the test.
    pub fn host(&self, name: &str) -> &Host {
        self.nodes.get(name).unwrap_or_else(|| panic!("no host {name}"))
    }

    /// A pod by name.
    ///
    /// # Panics
    /// When there is no such pod: a mistake in the test.
    pub fn get(&self, name: &str) -> &Pod {
        self.pods.get(name).unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// A node's agent.
    ///
    /// # Panics
    /// When it was not started: a mistake in the test.
    pub fn agent(&mut self, node: &str) -> &mut Agent {
        self.agents.get_mut(node).unwrap_or_else(|| panic!("no agent on {node}"))
    }

    /// A node's agent, to look at.
    ///
    /// # Panics
    /// When it was not started: a mistake in the test.
    pub fn agent_ref(&self, node: &str) -> &Agent {
        self.agents.get(node).unwrap_or_else(|| panic!("no agent on {node}"))
    }

    /// Makes a pod; its service account has its name.
    ///
    /// # Errors
    /// When a namespace, link or cgroup cannot be made.
    pub fn pod(&mut self, name: &str, node: &str, mode: Mode) -> Result<&Pod> {
        self.bare_pod(name, node, mode)?;
        if self.cluster.is_some() {
            let pause = self.get(name).host.spawn("sleep", &["infinity"])?;
            self.get_mut(name).pause = Some(pause);
            self.tell_addresses(name)?;
        }
        Ok(self.get(name))
    }

    /// Makes a pod as far as a kubelet has come before its sandbox's first process: object, cgroup and
    /// network are there; nobody has told its addresses.
    ///
    /// # Errors
    /// As [`World::pod`].
    pub fn bare_pod(&mut self, name: &str, node: &str, mode: Mode) -> Result<&Pod> {
        let number = u8::try_from(self.pods.len() + 2).context("too many pods")?;
        let node_number = if node == "n1" { 1 } else { 2 };
        let cgroup = self.pods_cgroup(node)?.join(match &self.cluster {
            Some(cluster) => self.pod_object(cluster, name, node, mode)?,
            None => name.into(),
        });
        let host = Host::new(self.netns_name(name), Some(cgroup))?;
        let v4 = Ipv4Addr::new(10, 1, node_number, number);
        let v6 = Ipv6Addr::new(0xfd00, node_number.into(), 0, 0, 0, 0, 0, number.into());
        let on = self.host(node);
        let link = format!("pod{number}");
        // As routed CNIs do it: a /32, and a gateway that every host end has.
        on.ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &host.name])?;
        on.ip(&["addr", "add", "169.254.1.1/32", "dev", &link])?;
        on.ip(&["link", "set", &link, "up"])?;
        on.ip(&["-6", "addr", "add", "fe80::1/64", "dev", &link, "nodad"])?;
        host.ip(&["addr", "add", &format!("{v4}/32"), "dev", "eth0"])?;
        host.ip(&["-6", "addr", "add", &format!("{v6}/128"), "dev", "eth0", "nodad"])?;
        host.ip(&["link", "set", "eth0", "up"])?;
        host.ip(&["route", "add", "169.254.1.1", "dev", "eth0", "scope", "link"])?;
        host.ip(&["route", "add", "default", "via", "169.254.1.1", "dev", "eth0"])?;
        host.ip(&["-6", "route", "add", "default", "via", "fe80::1", "dev", "eth0"])?;
        on.ip(&["route", "add", &v4.to_string(), "dev", &link])?;
        on.ip(&["-6", "route", "add", &v6.to_string(), "dev", &link])?;
        let namespace = "demo".into();
        let pod = Pod { host, node: node.into(), v4, v6, mode, pause: None, listed: true, namespace };
        self.pods.insert(name.into(), pod);
        Ok(self.get(name))
    }

    /// Tells the API server a pod's addresses, as a kubelet does some time after it has started.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn tell_addresses(&mut self, name: &str) -> Result<()> {
        let (v4, v6) = (self.get(name).v4, self.get(name).v6);
        let status = json!({"phase": "Running", "podIP": v4, "podIPs": [{"ip": v4}, {"ip": v6}]});
        let path = format!("/api/v1/namespaces/demo/pods/{name}/status");
        let (cluster, host) = self.kubernetes();
        cluster.patch(host, &path, &json!({"status": status})).map(drop)
    }

    /// Adds a real API server to a new world, which agents and authority take for their directory from then
    /// on: pods become objects of it, in namespace `demo`, with a cgroup as a kubelet makes it.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn add_kubernetes(&mut self) -> Result<()> {
        let host = self.host("n1");
        let cluster = Kubernetes::start(host, self.dir().join("kubernetes"))?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "demo"}});
        cluster.apply(host, "/api/v1/namespaces/demo", &namespace)?;
        for (node, address) in NODES {
            let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
            cluster.apply(host, &format!("/api/v1/nodes/{node}"), &object)?;
            let addresses = json!([{"type": "InternalIP", "address": address}]);
            let status = json!({"status": {"addresses": addresses}});
            cluster.patch(host, &format!("/api/v1/nodes/{node}/status"), &status)?;
        }
        self.cluster = Some(cluster);
        Ok(())
    }

    /// The API server, and the host it runs on.
    ///
    /// # Panics
    /// When there is none: a mistake in the test.
    pub fn kubernetes(&mut self) -> (&mut Kubernetes, &Host) {
        let cluster = self.cluster.as_mut().unwrap_or_else(|| panic!("no API server in this world"));
        (cluster, &self.nodes["n1"])
    }

    /// Makes a pod's object; the cgroup that a kubelet would make for it, below that of all pods.
    fn pod_object(&self, cluster: &Kubernetes, name: &str, node: &str, mode: Mode) -> Result<PathBuf> {
        let pod = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"hauberk.dev/mode": mode.as_str()}},
            "spec": {
                "nodeName": node,
                "serviceAccountName": name,
                "containers": [{"name": "app", "image": "none"}],
            },
        });
        let made = cluster.apply(self.host("n1"), &format!("/api/v1/namespaces/demo/pods/{name}"), &pod)?;
        let uid = made["metadata"]["uid"].as_str().context("every object has a UID")?;
        // Both drivers of cgroups, by turns.
        Ok(match self.pods.len() % 2 {
            0 => {
                let under = uid.replace('-', "_");
                format!("kubepods-burstable.slice/kubepods-burstable-pod{under}.slice/cri-containerd-1.scope")
            }
            _ => format!("besteffort/pod{uid}/crio-1"),
        }
        .into())
    }

    /// Deletes a pod: its object, then its processes.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn delete_pod(&mut self, name: &str) -> Result<()> {
        self.delete_object(name)?;
        self.end_sandbox(name);
        Ok(())
    }

    /// Deletes a pod's object and nothing else.
    ///
    /// # Errors
    /// When the API server refuses.
    pub fn delete_object(&mut self, name: &str) -> Result<()> {
        let (cluster, host) = self.kubernetes();
        cluster.delete(host, &format!("/api/v1/namespaces/demo/pods/{name}"))
    }

    /// Ends the process that a container runtime keeps in every pod.
    pub fn end_sandbox(&mut self, name: &str) {
        self.get_mut(name).pause = None;
    }

    fn get_mut(&mut self, name: &str) -> &mut Pod {
        self.pods.get_mut(name).unwrap_or_else(|| panic!("no pod {name}"))
    }

    /// Where agents, or the authority, are told to read the directory from, and policies.
    fn sources(&self, of_agents: bool) -> String {
        let kubeconfig = self.cluster.as_ref().map(|cluster| cluster.kubeconfig(kubernetes::AGENT));
        let kind = if of_agents && self.options.told_directory { "authority" } else { "kubernetes" };
        let mut lines = match &kubeconfig {
            Some(file) => format!("directory: {{{kind}: {{kubeconfig: {}}}}}\n", file.display()),
            None => format!("directory: {{file: {}}}\n", self.directory_file().display()),
        };
        if let Some(file) = kubeconfig.filter(|_| self.options.cluster_policies) {
            lines += &format!("policy: {{kubernetes: {{kubeconfig: {}}}}}\n", file.display());
        }
        if self.options.policies.is_some() {
            lines += &format!("policy: {{file: {}}}\n", self.policies_file().display());
        }
        lines
    }

    /// Where the access policies' file is.
    pub fn policies_file(&self) -> PathBuf {
        self.dir().join("policies.yaml")
    }

    /// Changes what the agents that are started from now on are configured with.
    pub fn configure(&mut self, change: impl FnOnce(&mut Options)) {
        change(&mut self.options);
    }

    /// Replaces the access policies.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_policies(&self, text: &str) -> Result<()> {
        let new = self.dir().join("policies.new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(new, self.policies_file())?)
    }

    /// Starts the authority and an agent on each node, and waits until they are ready.
    ///
    /// # Errors
    /// When one does not get ready; with its log.
    pub fn start(&mut self) -> Result<()> {
        self.prepare()?;
        self.start_authority()?;
        for node in ["n1", "n2"] {
            self.start_agent(node)?;
        }
        for agent in self.agents.values_mut() {
            agent.wait_ready()?;
        }
        Ok(())
    }

    /// Makes what authority and agents read before they are started.
    ///
    /// # Errors
    /// When something cannot be written.
    pub fn prepare(&self) -> Result<()> {
        self.write_directory()?;
        if let Some(policies) = &self.options.policies {
            self.write_policies(policies)?;
        }
        for node in ["n1", "n2"] {
            std::fs::create_dir_all(self.pods_cgroup(node)?)?;
        }
        Ok(())
    }

    /// Starts the authority on node 1.
    ///
    /// # Errors
    /// When it does not begin to listen.
    pub fn start_authority(&mut self) -> Result<()> {
        let dir = self.dir();
        let config = format!(
            "trustDomain: {TRUST_DOMAIN}\nlisten: {AUTHORITY}\nstateDir: {}\nsvidLifetimeSeconds: {}\n{}{}",
            dir.join("authority").display(),
            self.options.svid_seconds,
            self.sources(false),
            self.options.authority_yaml,
        );
        std::fs::write(dir.join("authority.yaml"), config)?;
        std::fs::write(dir.join("bundle.pem"), self.authority_command(&["bundle"])?)?;
        let file = dir.join("authority.yaml").to_string_lossy().into_owned();
        let mut command = self
            .host("n1")
            .command(&self.options.hauberk("authority")?, &["authority", "--config", &file])?;
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("authority.log"))?;
        command.stdout(log.try_clone()?).stderr(log);
        self.authority = Some(Process::spawn(command)?);
        // Literal constants of this file.
        let address = AUTHORITY.parse()?;
        let listening = self.host("n1").wait_listening(address);
        listening.with_context(|| std::fs::read_to_string(dir.join("authority.log")).unwrap_or_default())
    }

    /// The authority's root: certificate and key (PEM).
    ///
    /// # Errors
    /// When there is none yet.
    pub fn root_pem(&self) -> Result<String> {
        let text = std::fs::read_to_string(self.dir().join("authority/trust.json"))?;
        let state: serde_json::Value = serde_json::from_str(&text)?;
        let part = |key: &str| state["roots"][0][key].as_str().context("trust.json has no root");
        Ok(format!("{}{}", part("certificate")?, part("key")?))
    }

    /// Stops the authority.
    pub fn stop_authority(&mut self) {
        self.authority = None;
    }

    /// Runs a subcommand of `hauberk authority`; what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn authority_command(&self, args: &[&str]) -> Result<String> {
        let file = self.dir().join("authority.yaml");
        let output = Command::new(self.options.hauberk("authority")?)
            .args(["authority", "--config"])
            .arg(file)
            .args(args)
            .output()?;
        anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Starts a node's agent, with a new join token; does not wait for it.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_agent(&mut self, node: &str) -> Result<()> {
        let token = self.authority_command(&["token", "--node", node])?;
        self.configure_agent(node)?;
        std::fs::write(self.dir().join(node).join("token"), token)?;
        self.agent(node).start_again()
    }

    /// Writes a node's agent's configuration, without starting it; where that is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure_agent(&mut self, node: &str) -> Result<PathBuf> {
        let dir = self.dir().join(node);
        std::fs::create_dir_all(&dir)?;
        let agent = Agent::configure(
            node,
            self.host(node),
            dir,
            &self.dir().join("bundle.pem"),
            &self.sources(true),
            &self.pods_cgroup(node)?,
            &self.options,
        )?;
        let config = agent.config();
        self.agents.insert(node.into(), agent);
        Ok(config)
    }

    /// Listens to the wire between the nodes.
    ///
    /// # Errors
    /// When the packet socket cannot be made.
    pub fn tap(&self) -> Result<Tap> {
        self.tap_on("n1", "wire")
    }

    /// Listens to any interface of a host.
    ///
    /// # Errors
    /// When the packet socket cannot be made.
    pub fn tap_on(&self, host: &str, interface: &str) -> Result<Tap> {
        Tap::start(self.host(host), interface)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // What the agents said is what one wants to know of a test that failed.
            for (node, agent) in &self.agents {
                eprintln!("--- the end of {node}'s log ---\n{}", agent.log_tail(12));
            }
        }
        self.agents.clear();
        self.authority = None;
        self.cluster = None;
        if let Err(error) = sweep::world(&self.id) {
            eprintln!("cannot remove all of world {}: {error:#}", self.id);
        }
    }
}
