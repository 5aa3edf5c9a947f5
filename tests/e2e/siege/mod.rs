//! A world whose CA's key is in the wrong hands: what attackers with good certificates start from.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::time::{Duration, SystemTime};

use hauberk::ca::{Ca, ProvenKey};
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use tests::{Agent, Mode, Options, World};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::parse("test.local").unwrap()
}

pub(crate) fn id(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "demo", name).unwrap()
}

/// A world whose agents do not wait long, and its CA.
pub(crate) struct Siege {
    pub(crate) world: World,
    pub(crate) ca: Ca,
}

impl Siege {
    /// A client and a server on two nodes, and what else is prepared before they start.
    pub(crate) fn of(prepare: impl FnOnce(&mut World)) -> Self {
        let agent_yaml = "drainSeconds: 1\ntunnel: {handshakeTimeoutMs: 1500}\n".into();
        let mut world = World::new(Options { agent_yaml, ..Options::default() }).unwrap();
        world.pod("client", "n1", Mode::Strict).unwrap();
        world.pod("server", "n2", Mode::Strict).unwrap();
        prepare(&mut world);
        world.start().unwrap();
        let pem = world.root_pem().unwrap();
        let ca = Ca::from_pem(domain(), &pem).unwrap();
        Self { world, ca }
    }

    /// The one that is attacked.
    pub(crate) fn agent(&self) -> &Agent {
        self.world.agent_ref("n2")
    }

    pub(crate) fn svid_of(&self, id: &SpiffeId, now: SystemTime) -> X509Svid {
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        key.with_chain(self.ca.issue(&proven, id, HOUR, now).unwrap()).unwrap()
    }

    /// Runs an attack from the outside host.
    pub(crate) fn attack<T: Send>(&self, attack: impl Future<Output = T> + Send) -> T {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), attack).await })
        };
        self.world.host("out").inside(run).unwrap().expect("the attack hangs")
    }

    /// So many refusals were counted under their reason, and the log warns of it.
    pub(crate) fn refused_for(&self, reason: &str, times: u32) {
        let (agent, label) = (self.agent(), format!("reason=\"{reason}\""));
        let labels = ["inbound", "denied", &label];
        agent.wait_metric("hauberk_connections_total", &labels, times.into()).unwrap();
        let log = agent.log();
        let told = log.lines().any(|line| line.contains("WARN") && line.contains(&label));
        assert!(told, "the log warns of {reason}:\n{}", agent.log_tail(10));
    }

    /// Honest members are still served.
    pub(crate) fn still_serves(&self) {
        let server = self.world.get("server");
        let _echo = server.host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
        let seen = self.world.get("client").host.actor(&["many", &server.v4(8080), "20", "4"]).unwrap();
        assert_eq!(seen["ok"], 20, "{seen}");
    }
}
