//! A node with a good certificate of its own, and bad intentions.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use h2::client::SendRequest;
use hauberk::hbone::{DESTINATION_HEADER, PROOF_HEADER, REASON_HEADER, SOURCE_HEADER};
use hauberk::identity::SpiffeId;
use hauberk::identity::svid::X509Svid;
use hauberk::proof::{Binding, Side, prove};
use hauberk::tls::handshake::{self, Established};
use hauberk::tls::{self, ALPN_NODE};
use http::{Method, Request};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;

use crate::siege::{Siege, domain, id};

/// Node 2's agent, for other nodes.
pub(crate) const NODE: &str = "192.168.50.2:15008";

pub(crate) fn node(name: &str) -> SpiffeId {
    SpiffeId::node(&domain(), name).unwrap()
}

/// The directory lists a node `evil` with two workloads.
pub(crate) fn lay() -> Siege {
    Siege::of(|world| {
        world.ghost_node("evil", "192.168.60.2");
        for (workload, address) in [("mole", "192.168.60.3"), ("rat", "192.168.60.4")] {
            world.ghost_on("evil", workload, address);
            world.host("out").ip(&["addr", "add", &format!("{address}/24"), "dev", "uplink"]).unwrap();
        }
    })
}

impl Siege {
    pub(crate) fn svid(&self, id: &SpiffeId) -> X509Svid {
        self.svid_of(id, SystemTime::now())
    }

    pub(crate) fn dials(&self, svid: &X509Svid, expected: SpiffeId, alpn: &[&[u8]]) -> Arc<ClientConfig> {
        let config = tls::client::config(svid, self.ca.bundle(), expected).unwrap();
        let mut config = ClientConfig::clone(&config);
        config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(config)
    }

    /// A connection to node 2's agent as a node.
    pub(crate) async fn intrude(&self, from: &str) -> Intruder {
        let config = self.dials(&self.svid(&node(from)), node("n2"), &[ALPN_NODE]);
        let to: SocketAddr = NODE.parse().unwrap();
        let tcp = TcpStream::connect(to).await.unwrap();
        let name = ServerName::IpAddress(to.ip().into());
        let Established { stream, session } = handshake::connect(config, name, tcp).await.unwrap();
        let (send, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let binding = Binding { exporter: session.exporter, client: node(from), server: node("n2") };
        Intruder { send, binding }
    }
}

/// A node that is in, and may say what it likes.
pub(crate) struct Intruder {
    send: SendRequest<Bytes>,
    pub(crate) binding: Binding,
}

impl Intruder {
    pub(crate) fn proves(&self, svid: &X509Svid) -> String {
        prove(svid, &self.binding, Side::Client).unwrap()
    }

    /// Asks for a stream to `server`, and says how it is answered: by the reason's word, or by the status.
    pub(crate) async fn ask(
        &self,
        to: &str,
        source: Option<&SpiffeId>,
        proof: Option<&str>,
    ) -> Result<String, h2::Error> {
        self.ask_for(Some(&id("server")), to, source, proof).await
    }

    pub(crate) async fn ask_for(
        &self,
        destination: Option<&SpiffeId>,
        to: &str,
        source: Option<&SpiffeId>,
        proof: Option<&str>,
    ) -> Result<String, h2::Error> {
        let request = Request::builder().method(Method::CONNECT).uri(to);
        self.send(request, destination, source, proof).await
    }

    /// Asks for no stream, only to be known.
    pub(crate) async fn introduce(
        &self,
        destination: &SpiffeId,
        source: &SpiffeId,
        proof: Option<&str>,
    ) -> String {
        let request = Request::builder().method(Method::OPTIONS).uri("https://node/");
        self.send(request, Some(destination), Some(source), proof).await.unwrap()
    }

    pub(crate) async fn send(
        &self,
        mut request: http::request::Builder,
        destination: Option<&SpiffeId>,
        source: Option<&SpiffeId>,
        proof: Option<&str>,
    ) -> Result<String, h2::Error> {
        if let Some(destination) = destination {
            request = request.header(DESTINATION_HEADER, destination.as_str());
        }
        if let Some(source) = source {
            request = request.header(SOURCE_HEADER, source.as_str());
        }
        if let Some(proof) = proof {
            request = request.header(PROOF_HEADER, proof);
        }
        let mut send = self.send.clone().ready().await?;
        let (response, _body) = send.send_request(request.body(()).unwrap(), false)?;
        let response = response.await?;
        let word = response.headers().get(REASON_HEADER).map(|word| word.to_str().unwrap().to_owned());
        Ok(word.unwrap_or_else(|| response.status().as_u16().to_string()))
    }
}
