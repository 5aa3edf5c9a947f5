//! Another proxy, one that somebody has set up: only where its near end listens is known of it.

use std::fs;
use std::net::SocketAddr;
use std::str::FromStr;

use ::tests::Host;
use anyhow::{Context, Result, ensure};

/// `NAME=ADDR:PORT[,BULK_ADDR:PORT][@NETNS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    pub(super) name: String,
    /// A web server that has `/1k` is behind it.
    pub(super) web: SocketAddr,
    /// An iperf3 server is behind it.
    pub(super) bulk: Option<SocketAddr>,
    /// The namespace that clients run in, if not our own.
    netns: Option<String>,
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("it is NAME=ADDR:PORT")?;
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
            return Err(format!("{name:?} is no name: use letters, digits, '-', '_' and '.'"));
        }
        let (addresses, netns) = match rest.split_once('@') {
            Some((addresses, netns)) => (addresses, Some(netns.to_owned())),
            None => (rest, None),
        };
        let address = |text: &str| text.parse().map_err(|e| format!("{text:?} is no ADDR:PORT: {e}"));
        let (web, bulk) = match addresses.split_once(',') {
            Some((web, bulk)) => (web, Some(address(bulk)?)),
            None => (addresses, None),
        };
        Ok(Self { name: name.to_owned(), web: address(web)?, bulk, netns })
    }
}

impl Peer {
    /// Where its clients run.
    pub(super) fn host(&self) -> Host {
        // A path stays a path when it is joined to /run/netns.
        let name = self.netns.clone().unwrap_or_else(|| "/proc/self/ns/net".into());
        Host { name, cgroup: None }
    }

    /// Looks whether it answers, and which congestion control its clients will have; a word of
    /// warning when that is not the others'.
    pub(super) fn look(&self) -> Result<Option<String>> {
        let host = self.host();
        let (status, _) =
            host.http(self.web, "/1k").with_context(|| format!("--peer {}: {}/1k", self.name, self.web))?;
        ensure!(status == 200, "--peer {}: {}/1k answers {status}, not a page", self.name, self.web);
        let control = host.inside(|| fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control"))??;
        let control = control.trim();
        let warning = format!("{} is measured under {control}, the others under reno", self.name);
        Ok((control != "reno").then_some(warning))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_name_an_address_and_what_else_is_known() {
        let peer: Peer = "zt=10.0.0.1:80,10.0.0.1:81@pod-a".parse().unwrap();
        assert_eq!((peer.name.as_str(), peer.netns.as_deref()), ("zt", Some("pod-a")));
        assert_eq!(peer.bulk.unwrap().port(), 81);
        let peer: Peer = "x=[::1]:80".parse().unwrap();
        assert_eq!((peer.bulk, peer.netns), (None, None));
        for wrong in ["10.0.0.1:80", "=10.0.0.1:80", "x=10.0.0.1", "x=a:80", "x=10.0.0.1:80,", "a b=[::1]:1"]
        {
            assert!(wrong.parse::<Peer>().is_err(), "{wrong} was taken");
        }
    }

    #[test]
    fn a_peer_that_does_not_answer_is_named() {
        let peer: Peer = "nobody=127.0.0.1:1".parse().unwrap();
        let error = format!("{:#}", peer.look().unwrap_err());
        assert!(error.contains("--peer nobody: 127.0.0.1:1"), "{error}");
    }
}
