//! The directory from Kubernetes: pods, services, EndpointSlices, namespaces and nodes.
//!
//! - `objects`: what is read of them
//! - `rows`: the rules about a single object
//! - `cluster`: the rules about objects together, and the directory that follows
//! - `told`: objects of one kind as they are told
//! - `watch`: hears of every change, for as long as the agent lives
//!
//! Not read are external addresses of services (`externalIPs`, load balancers: whoever may write a service
//! could take any destination over).

pub mod cluster;
pub mod objects;
mod rows;
mod told;
pub(crate) mod watch;

pub use rows::MODE_LABEL;
pub(crate) use rows::Name;
pub use told::Unusable;
pub(crate) use told::{Heard, Objects};
pub use watch::{ConnectError, Connection, probe, probe_pods, servers, watch};
