//! Rows of the directory as messages, and back. What comes back is checked as if a stranger had sent it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;

use super::proto;
use crate::cidr::Cidr;
use crate::config::Mode;
use crate::directory::delta::{Delta, Found, Gone};
use crate::directory::{Directory, Endpoint, Node, Service, Target, Workload};
use crate::identity::{ParseError, SpiffeId, TrustDomain};
use crate::mesh_policy::Exclusions;
use crate::mesh_policy::document::Exclude;

/// A chunk is sent when it has so many bytes. A row is never divided. Few in tests, where a state shall take
/// several chunks too.
const CHUNK_BYTES: usize = if cfg!(test) { 100 } else { 256 << 10 };
/// The longest chunk that is read: a service of 100,000 endpoints fits.
pub const MAX_CHUNK_BYTES: usize = 8 << 20;
/// Kubernetes' own bound on names.
const MAX_NAME_BYTES: usize = 253;
/// An address of each family for a workload, and some more for a service.
const MAX_ADDRESSES: usize = 16;
/// Ports or ranges of all policies together.
const MAX_EXCLUDED: usize = 4096;

/// Why rows cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Not a message.
    #[error(transparent)]
    Message(#[from] prost::DecodeError),
    /// A field.
    #[error("{field} of {of}: {why}")]
    Field {
        /// Whose: kind and name.
        of: String,
        /// Which.
        field: &'static str,
        /// What is wrong.
        why: String,
    },
    /// Chunks that do not follow from what was asked for.
    #[error("chunks that do not follow from the state that was asked for")]
    Order,
}

/// What leads from one state to another, in chunks; none when nothing differs.
pub(super) fn between(before: &Directory, now: &Directory) -> Vec<Bytes> {
    let delta = Delta::between(before, now);
    let mut chunks = Chunks::default();
    for name in delta.gone_nodes {
        chunks.add(|rows| push(&mut rows.gone_nodes, name));
    }
    for node in &delta.nodes {
        chunks.add(|rows| push(&mut rows.nodes, node_row(node)));
    }
    for Gone { node, namespace, name } in delta.gone_workloads {
        chunks.add(|rows| push(&mut rows.gone_workloads, proto::WorkloadName { node, namespace, name }));
    }
    for found in &delta.workloads {
        chunks.add(|rows| push(&mut rows.workloads, workload_row(found)));
    }
    for address in &delta.workload_addresses {
        chunks.add(|rows| push(&mut rows.workload_addresses, octets(*address)));
    }
    for found in &delta.services {
        chunks.add(|rows| push(&mut rows.services, service_row(found, now)));
    }
    for address in &delta.service_addresses {
        chunks.add(|rows| push(&mut rows.service_addresses, octets(*address)));
    }
    chunks.end()
}

/// Rows on their way into chunks.
#[derive(Default)]
struct Chunks {
    full: Vec<Bytes>,
    rows: proto::Rows,
    bytes: usize,
}

impl Chunks {
    fn add(&mut self, put: impl FnOnce(&mut proto::Rows) -> usize) {
        self.bytes += put(&mut self.rows);
        if self.bytes >= CHUNK_BYTES {
            self.close();
        }
    }

    fn close(&mut self) {
        self.full.push(std::mem::take(&mut self.rows).encode_to_vec().into());
        self.bytes = 0;
    }

    fn end(mut self) -> Vec<Bytes> {
        if self.bytes > 0 {
            self.close();
        }
        self.full
    }
}

/// Adds a row; about how many bytes it takes.
fn push<M: Message>(rows: &mut Vec<M>, row: M) -> usize {
    let bytes = row.encoded_len() + 4;
    rows.push(row);
    bytes
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn node_row(node: &Node) -> proto::Node {
    proto::Node { name: node.name.clone(), address: octets(node.address), zone: node.zone.clone() }
}

/// Which of the addresses are not among those where it is found.
fn taken(addresses: &[IpAddr], at: &[IpAddr]) -> u32 {
    let taken = addresses.iter().take(32).enumerate().filter(|(_, address)| !at.contains(address));
    taken.fold(0, |bits, (place, _)| bits | (1_u32 << place))
}

fn workload_row(Found { of, at }: &Found<Workload>) -> proto::Workload {
    let mode = match of.mode {
        Mode::Strict => proto::Mode::Strict,
        Mode::Permissive => proto::Mode::Permissive,
        Mode::Off => proto::Mode::Off,
    };
    let exclusions = (*of.exclusions != Exclusions::default()).then(|| proto::Exclusions {
        inbound_ports: of.exclusions.inbound_ports().iter().map(|port| u32::from(*port)).collect(),
        outbound_ports: of.exclusions.outbound_ports().iter().map(|port| u32::from(*port)).collect(),
        outbound_cidrs: of.exclusions.outbound_cidrs().iter().map(ToString::to_string).collect(),
    });
    proto::Workload {
        namespace: of.namespace.clone(),
        name: of.name.clone(),
        spiffe_id: of.id.to_string(),
        node: of.node.clone(),
        addresses: of.addresses.iter().copied().map(octets).collect(),
        taken: taken(&of.addresses, at),
        mode: mode.into(),
        exclusions,
        svid_lifetime_seconds: of.svid_lifetime.map(|lifetime| lifetime.as_secs()),
    }
}

fn service_row(Found { of, at }: &Found<Service>, now: &Directory) -> proto::Service {
    let mut targets: Vec<&Arc<[Target]>> = Vec::new();
    let mut endpoints = Vec::new();
    for endpoint in &of.endpoints {
        // Whoever reads this looks the endpoint up by its address.
        if now.workload_at(endpoint.address) != Some(&endpoint.workload) {
            continue;
        }
        // Few: one for each slice at most.
        let place = targets.iter().position(|known| **known == endpoint.targets).unwrap_or_else(|| {
            targets.push(&endpoint.targets);
            targets.len() - 1
        });
        endpoints.push(proto::Endpoint {
            address: octets(endpoint.address),
            targets: u32::try_from(place).unwrap_or(u32::MAX),
            draining: endpoint.is_draining,
            zones: endpoint.zones.to_vec(),
        });
    }
    let targets = targets.into_iter().map(|targets| proto::Targets {
        ports: targets.iter().map(|target| target.port.into()).collect(),
        targets: targets.iter().map(|target| target.target.into()).collect(),
    });
    proto::Service {
        namespace: of.namespace.clone(),
        name: of.name.clone(),
        addresses: of.addresses.iter().copied().map(octets).collect(),
        taken: taken(&of.addresses, at),
        ports: of.ports.iter().map(|port| u32::from(*port)).collect(),
        local_only: of.local_only,
        affinity_seconds: of.affinity.map(|affinity| affinity.as_secs()),
        targets: targets.collect(),
        endpoints,
    }
}

/// Takes the rows of a chunk over.
pub(super) fn apply(to: &mut Directory, chunk: &[u8], domain: &TrustDomain) -> Result<(), WireError> {
    let rows = proto::Rows::decode(chunk)?;
    let delta = Delta {
        gone_nodes: rows.gone_nodes,
        nodes: read_all(rows.nodes, |row| read_node(row, domain))?,
        gone_workloads: read_all(rows.gone_workloads, |row| {
            Ok(Gone { node: row.node, namespace: row.namespace, name: row.name })
        })?,
        workloads: read_all(rows.workloads, |row| read_workload(row, domain))?,
        workload_addresses: read_addresses("workloads", &rows.workload_addresses)?,
        ..Delta::default()
    };
    to.apply(&delta);
    let services = read_all(rows.services, |row| read_service(row, to))?;
    to.apply_services(services, &read_addresses("services", &rows.service_addresses)?);
    Ok(())
}

fn read_all<M, T>(rows: Vec<M>, read: impl FnMut(M) -> Result<T, WireError>) -> Result<Vec<T>, WireError> {
    rows.into_iter().map(read).collect()
}

fn wrong<T>(of: &str, field: &'static str, why: impl ToString) -> Result<T, WireError> {
    Err(WireError::Field { of: of.to_owned(), field, why: why.to_string() })
}

fn name_of(kind: &str, namespace: &str, name: &str) -> Result<String, WireError> {
    let of = format!("{kind} {namespace}/{name}");
    let is_name = |text: &str| !text.is_empty() && text.len() <= MAX_NAME_BYTES && !text.contains('/');
    match is_name(namespace) && is_name(name) {
        true => Ok(of),
        false => wrong(kind, "name", "empty, too long, or with a '/'"),
    }
}

fn read_address(of: &str, octets: &[u8]) -> Result<IpAddr, WireError> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    let address = v4.or_else(|_| <[u8; 16]>::try_from(octets).map(IpAddr::from));
    match address.map(|address| address.to_canonical()) {
        Ok(address) if address.is_loopback() || address.is_unspecified() || address.is_multicast() => {
            wrong(of, "address", format!("{address} cannot be a workload's, service's or node's"))
        }
        Ok(address) => Ok(address),
        Err(_) => wrong(of, "address", "must be 4 or 16 bytes"),
    }
}

fn read_addresses(of: &str, all: &[Vec<u8>]) -> Result<Vec<IpAddr>, WireError> {
    all.iter().map(|octets| read_address(of, octets)).collect()
}

/// An object's addresses, and those of them where it is found.
fn read_found(of: &str, all: &[Vec<u8>], taken: u32) -> Result<(Vec<IpAddr>, Vec<IpAddr>), WireError> {
    if all.len() > MAX_ADDRESSES {
        return wrong(of, "addresses", format!("more than {MAX_ADDRESSES}"));
    }
    let addresses = read_addresses(of, all)?;
    let at = addresses.iter().enumerate().filter(|(place, _)| taken >> place & 1 == 0);
    let at = at.map(|(_, address)| *address).collect();
    Ok((addresses, at))
}

fn read_ports(of: &str, ports: Vec<u32>) -> Result<Vec<u16>, WireError> {
    let ports: Result<Vec<u16>, _> = ports.into_iter().map(u16::try_from).collect();
    ports.or_else(|_| wrong(of, "ports", "a port is at most 65535"))
}

fn read_node(row: proto::Node, domain: &TrustDomain) -> Result<Arc<Node>, WireError> {
    let of = format!("node {}", row.name);
    let id = SpiffeId::node(domain, &row.name).or_else(|error| wrong(&of, "name", error))?;
    let address = read_address(&of, &row.address)?;
    Ok(Arc::new(Node { name: row.name, id, address, zone: row.zone }))
}

fn read_workload(row: proto::Workload, domain: &TrustDomain) -> Result<Found<Workload>, WireError> {
    let of = name_of("workload", &row.namespace, &row.name)?;
    let (addresses, at) = read_found(&of, &row.addresses, row.taken)?;
    let id = SpiffeId::parse(&row.spiffe_id).or_else(|error: ParseError| wrong(&of, "spiffe_id", error))?;
    if id.trust_domain() != domain.as_str() || id.node_name().is_some() {
        return wrong(&of, "spiffe_id", format!("{id} is no workload's in {domain}"));
    }
    if row.node.is_empty() || row.node.len() > MAX_NAME_BYTES {
        return wrong(&of, "node", "empty or too long");
    }
    let mode = match proto::Mode::try_from(row.mode) {
        Ok(proto::Mode::Strict) => Mode::Strict,
        Ok(proto::Mode::Permissive) => Mode::Permissive,
        Ok(proto::Mode::Off) => Mode::Off,
        Err(_) => return wrong(&of, "mode", "not one that this version knows"),
    };
    let exclusions = match row.exclusions {
        Some(row) => Arc::new(read_exclusions(&of, row)?),
        None => Arc::default(),
    };
    let workload = Workload {
        name: row.name,
        namespace: row.namespace,
        id,
        node: row.node,
        addresses,
        mode,
        netns: None,
        exclusions,
        svid_lifetime: row.svid_lifetime_seconds.map(Duration::from_secs),
    };
    Ok(Found { of: Arc::new(workload), at })
}

fn read_exclusions(of: &str, row: proto::Exclusions) -> Result<Exclusions, WireError> {
    let lengths = [row.inbound_ports.len(), row.outbound_ports.len(), row.outbound_cidrs.len()];
    if lengths.into_iter().max() > Some(MAX_EXCLUDED) {
        return wrong(of, "exclusions", format!("more than {MAX_EXCLUDED}"));
    }
    let cidrs = read_all(row.outbound_cidrs, |text| {
        Cidr::parse(&text).or_else(|error| wrong(of, "exclusions", error))
    });
    let exclude = Exclude {
        inbound_ports: Some(read_ports(of, row.inbound_ports)?),
        outbound_ports: Some(read_ports(of, row.outbound_ports)?),
        outbound_cidrs: Some(cidrs?),
    };
    let mut exclusions = Exclusions::default();
    exclusions.add(&exclude);
    Ok(exclusions)
}

fn read_service(row: proto::Service, directory: &Directory) -> Result<Found<Service>, WireError> {
    let of = name_of("service", &row.namespace, &row.name)?;
    let (addresses, at) = read_found(&of, &row.addresses, row.taken)?;
    let targets = read_all(row.targets, |row| read_targets(&of, row))?;
    let no_zones: Arc<[String]> = Arc::default();
    let endpoints = read_all(row.endpoints, |row| {
        let address = read_address(&of, &row.address)?;
        let Some(workload) = directory.workload_at(address) else {
            return wrong(&of, "endpoints", format!("there is no workload at {address}"));
        };
        let Some(targets) = targets.get(row.targets as usize) else {
            return wrong(&of, "endpoints", format!("{address} refers to targets that are not there"));
        };
        let zones = if row.zones.is_empty() { Arc::clone(&no_zones) } else { row.zones.into() };
        let (workload, targets) = (Arc::clone(workload), Arc::clone(targets));
        Ok(Endpoint { workload, address, targets, is_draining: row.draining, zones })
    })?;
    let service = Service {
        name: row.name,
        namespace: row.namespace,
        addresses,
        ports: read_ports(&of, row.ports)?,
        endpoints,
        local_only: row.local_only,
        affinity: row.affinity_seconds.map(Duration::from_secs),
    };
    Ok(Found { of: Arc::new(service), at })
}

fn read_targets(of: &str, row: proto::Targets) -> Result<Arc<[Target]>, WireError> {
    if row.ports.len() != row.targets.len() {
        return wrong(of, "targets", "not one for each port");
    }
    let (ports, targets) = (read_ports(of, row.ports)?, read_ports(of, row.targets)?);
    Ok(ports.into_iter().zip(targets).map(|(port, target)| Target { port, target }).collect())
}
