//! A pair of another proxy: one beside the client, as a sidecar would be, one beside the server,
//! mutual TLS 1.3 between them. The same four ways through each.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tests::{Process, World};

use super::programs;
use super::{haproxy, nginx};

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Haproxy,
    Nginx,
}

/// A way through a pair.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    /// Where the near proxy listens, on its pod's loopback.
    pub(super) near: u16,
    /// Where the far proxy listens, TLS.
    pub(super) far: u16,
    /// Where the server listens, on the far pod's loopback.
    pub(super) server: u16,
    /// Whether the near proxy may resume sessions.
    pub(super) resume: bool,
}

/// Where a pair's clients connect.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lanes {
    pub(super) web: Lane,
    pub(super) bulk: Lane,
    pub(super) echo: Lane,
    /// To the web server, with a full handshake for each connection.
    pub(super) full: Lane,
}

impl Lanes {
    pub(super) fn all(self) -> [Lane; 4] {
        [self.web, self.bulk, self.echo, self.full]
    }
}

/// A running pair, between the pods outside the mesh.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) kind: Kind,
    processes: Vec<Process>,
}

/// What a proxy's configuration is written from.
pub(super) struct Site {
    /// The world's files, the certificates among them.
    pub(super) dir: PathBuf,
    pub(super) lanes: Lanes,
    /// The far proxy's address.
    pub(super) far: std::net::Ipv4Addr,
    pub(super) cores: usize,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Haproxy, Self::Nginx];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    pub(super) fn lanes(self) -> Lanes {
        // Below every pod's ephemeral ports.
        let base = match self {
            Self::Haproxy => 18000,
            Self::Nginx => 19000,
        };
        let lane = |number: u16, server, resume| Lane {
            near: base + number,
            far: base + 100 + number,
            server,
            resume,
        };
        Lanes {
            web: lane(0, programs::WEB, true),
            bulk: lane(1, programs::BULK, true),
            echo: lane(2, programs::ECHO, true),
            full: lane(3, programs::WEB, false),
        }
    }
}

impl Pair {
    /// Starts both proxies of a kind, and waits until they listen.
    pub(super) fn start(kind: Kind, world: &World) -> Result<Self> {
        let site = Site {
            dir: world.dir(),
            lanes: kind.lanes(),
            far: world.get("plain-server").v4,
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        let mut processes = Vec::new();
        for (pod, end) in [("plain-server", "far"), ("plain-client", "near")] {
            let file = site.dir.join(format!("{}-{end}.conf", kind.name()));
            let config = match kind {
                Kind::Haproxy => haproxy::config(&site, end == "near"),
                Kind::Nginx => nginx::config(&site, end == "near"),
            };
            std::fs::write(&file, config)?;
            let file = file.to_string_lossy().into_owned();
            let args = match kind {
                Kind::Haproxy => vec!["-db", "-f", &file],
                Kind::Nginx => vec!["-c", &file],
            };
            let ports = site.lanes.all().map(|lane| if end == "near" { lane.near } else { lane.far });
            processes.push(programs::start(world, pod, kind.name(), &args, &ports)?);
        }
        Ok(Self { kind, processes })
    }

    /// The same kind of pair, freshly started.
    pub(super) fn restart(&mut self, world: &World) -> Result<()> {
        for process in self.processes.drain(..) {
            // Killed, a master would leave its workers, and they the ports.
            process.signal(Signal::SIGTERM);
            process.wait(Duration::from_secs(5)).context(self.kind.name())?;
        }
        *self = Self::start(self.kind, world)?;
        Ok(())
    }

    pub(super) fn pids(&self) -> Vec<i32> {
        self.processes.iter().map(Process::pid).collect()
    }
}
