//! What is measured in: worlds of the same shape that differ in how their agents speak, and in the
//! first of them the direct path and the pairs of other proxies, between pods outside the mesh.

use anyhow::Result;
use tests::host::Actor;
use tests::{Host, Mode, Options, World};

use super::figures::Figure;
use super::pair::{Kind, Pair};
use super::peer::Peer;
use super::programs::{self, BULK, ECHO, Servers, WEB};
use super::{certificates, rounds};
use crate::shell::say;

/// Names of ways in JSON.
pub(super) const DIRECT: &str = "direct";
pub(super) const HAUBERK: &str = "hauberk";
pub(super) const WORKLOAD: &str = "hauberk-workload";
pub(super) const DIRECT_SAME_NODE: &str = "direct-same-node";
pub(super) const SAME_NODE: &str = "hauberk-same-node";
/// Ways of which only [`Figure::Redial`] is measured.
pub(super) const RESUMING: &str = "hauberk-resumption-on";
pub(super) const NOT_RESUMING: &str = "hauberk-resumption-off";

/// Everything that runs. What runs in worlds ends before them: fields drop in order.
pub(super) struct Field {
    _servers: Vec<Servers>,
    _echoes: Vec<Actor>,
    pub(super) pairs: Vec<Pair>,
    /// Node scope, and everything outside the mesh.
    pub(super) node: World,
    workload: World,
    /// Its tunnels are closed as idle after a second.
    pub(super) resuming: World,
    /// The same without resumption; none when the agent knows no such setting.
    pub(super) not_resuming: Option<World>,
}

/// A way from a client to a server, and the proxies on it.
pub(super) struct Way<'a> {
    pub(super) name: String,
    pub(super) client: Client<'a>,
    /// Where the client finds the web server.
    pub(super) web: String,
    /// And iperf3's.
    pub(super) bulk: Option<String>,
    /// And the web server, when every connection pays a full handshake.
    pub(super) full: Option<String>,
    /// The processes of the proxies; none on the direct path, or when they are not ours.
    pub(super) proxies: Vec<i32>,
    pub(super) measures: &'static [rounds::Measure],
}

/// Where a way's clients run.
pub(super) enum Client<'a> {
    Pod(&'a Host),
    Own(Host),
}

impl Client<'_> {
    pub(super) fn host(&self) -> &Host {
        match self {
            Self::Pod(host) => host,
            Self::Own(host) => host,
        }
    }
}

impl Field {
    pub(super) fn make() -> Result<Self> {
        say("  node scope, with pods outside the mesh for the direct path and the peers");
        let mut node = world("", true)?;
        for (pod, on) in [("plain-client", "n1"), ("plain-server", "n2"), ("plain-near", "n1")] {
            node.pod(pod, on, Mode::Off)?;
        }
        node.pod("near", "n1", Mode::Strict)?;
        node.start()?;
        say("  workload scope");
        let mut workload = world("", false)?;
        workload.start()?;
        say("  tunnels that are closed as idle, with and without resumption");
        let resuming = redialling("")?;
        let not_resuming = match redialling(", resumption: false") {
            Ok(world) => Some(world),
            Err(error) if format!("{error:#}").contains("unknown field `resumption`") => {
                say("  (this agent has no tunnel.resumption: only one of the two)");
                None
            }
            Err(error) => return Err(error),
        };
        let mut servers = Vec::new();
        for (world, pods) in
            [(&node, &["server", "near", "plain-server", "plain-near"][..]), (&workload, &["server"])]
        {
            for pod in pods {
                servers.push(programs::servers(world, pod)?);
            }
        }
        let mut echoes = Vec::new();
        for world in [Some(&resuming), not_resuming.as_ref()].into_iter().flatten() {
            for pod in ["server", "second", "outside"] {
                echoes.push(programs::echo(world, pod)?);
            }
        }
        certificates::make(&node.dir())?;
        let pairs = Kind::ALL.into_iter().map(|kind| Pair::start(kind, &node)).collect::<Result<_>>()?;
        Ok(Self { _servers: servers, _echoes: echoes, pairs, node, workload, resuming, not_resuming })
    }

    /// Every way; those aside from the comparison are measured less when it has to be quick.
    pub(super) fn ways<'a>(&'a self, peers: &[Peer], quick: bool) -> Result<Vec<Way<'a>>> {
        let less: &[_] = if quick { rounds::FEW } else { rounds::ALL };
        let within = |name: &str, world: &'a World, server: &str, client: &str, measures| -> Result<_> {
            let server = world.get(server);
            let agents = ["n1", "n2"].map(|node| world.agent_ref(node).pid());
            let captured = world.get(client).mode != Mode::Off;
            Ok(Way {
                name: name.into(),
                client: Client::Pod(&world.get(client).host),
                web: server.v4(WEB),
                bulk: Some(server.v4(BULK)),
                full: None,
                proxies: if captured { agents.into_iter().collect::<Result<_>>()? } else { Vec::new() },
                measures,
            })
        };
        let mut ways = vec![
            within(DIRECT, &self.node, "plain-server", "plain-client", rounds::ALL)?,
            within(HAUBERK, &self.node, "server", "client", rounds::ALL)?,
            within(WORKLOAD, &self.workload, "server", "client", less)?,
        ];
        for pair in &self.pairs {
            let lanes = pair.kind.lanes();
            let at = |port: u16| format!("127.0.0.1:{port}");
            ways.push(Way {
                name: pair.kind.name().into(),
                client: Client::Pod(&self.node.get("plain-client").host),
                web: at(lanes.web.near),
                bulk: Some(at(lanes.bulk.near)),
                full: Some(at(lanes.full.near)),
                proxies: pair.pids(),
                // One pair shows that the lanes work.
                measures: if pair.kind == Kind::Haproxy { rounds::ALL } else { less },
            });
        }
        ways.extend(peers.iter().map(|peer| Way {
            name: peer.name.clone(),
            client: Client::Own(peer.host()),
            web: peer.web.to_string(),
            bulk: peer.bulk.map(|bulk| bulk.to_string()),
            full: None,
            proxies: Vec::new(),
            measures: rounds::ALL,
        }));
        ways.push(within(DIRECT_SAME_NODE, &self.node, "plain-near", "plain-client", less)?);
        ways.push(within(SAME_NODE, &self.node, "near", "client", less)?);
        Ok(ways)
    }

    /// Where the echo server outside the mesh is, and a pair's way to it.
    pub(super) fn echo_through(&self, pair: &Pair) -> (String, String) {
        let direct = self.node.get("plain-server").v4(ECHO);
        (direct, format!("127.0.0.1:{}", pair.kind.lanes().echo.near))
    }
}

/// The column's head for a way.
pub(super) fn label(way: &str) -> &str {
    match way {
        DIRECT | DIRECT_SAME_NODE => "direct",
        HAUBERK => "Hauberk, node scope",
        WORKLOAD => "Hauberk, workload scope",
        SAME_NODE => "Hauberk",
        "haproxy" => "HAProxy pair",
        "nginx" => "nginx pair",
        other => other,
    }
}

/// Whether a figure compares other proxies with us.
pub(super) fn is_peer(way: &str) -> bool {
    !way.starts_with(HAUBERK) && !way.starts_with(DIRECT)
}

/// Two strict pods on node 2, and a client on node 1; the agents log no connections, as no peer
/// does.
pub(super) fn world(tunnel: &str, node_scope: bool) -> Result<World> {
    let agent_yaml = format!("drainSeconds: 5\n{tunnel}");
    let mut world = World::new(Options { log: "warn".into(), agent_yaml, node_scope, ..Options::default() })?;
    world.pod("client", "n1", Mode::Strict)?;
    world.pod("server", "n2", Mode::Strict)?;
    world.pod("second", "n2", Mode::Strict)?;
    Ok(world)
}

fn redialling(more: &str) -> Result<World> {
    let mut world = world(&format!("tunnel: {{idleTimeoutSeconds: 1{more}}}\n"), true)?;
    world.pod("outside", "n2", Mode::Off)?;
    world.start()?;
    Ok(world)
}

/// Whether a way of its own is shown as a column of the comparison.
pub(super) fn is_column(way: &str) -> bool {
    ![DIRECT_SAME_NODE, SAME_NODE, RESUMING, NOT_RESUMING].contains(&way)
}

/// Figures that are shown for traffic within a node.
pub(super) const SAME_NODE_FIGURES: [Figure; 6] =
    [Figure::Bulk1, Figure::Bulk8, Figure::Bulk1Cpu, Figure::Many, Figure::ManyCpu, Figure::New];
