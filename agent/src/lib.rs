//! Hauberk: mutual TLS for workloads that know nothing of it.
//!
//! The map, in the order a connection meets it:
//!
//! - [`capture`] takes a connection over, inside the pod's [`netns`];
//! - [`directory`] says who must be at its destination, [`balance`] which endpoint of a service it is;
//! - [`policy`] says who may reach whom, [`mesh_policy`] how workloads take part in the mesh;
//! - [`outbound`] is the sending agent's whole way: resolve, then a stream from the [`pool`];
//! - [`pool`] holds connections by (source identity, destination identity, address);
//! - [`proof`] proves many workloads on one connection between two nodes;
//! - [`tls`] turns SVIDs and trust bundle into rustls configurations, [`hbone`] speaks CONNECT;
//! - [`inbound`] is the receiving agent's whole way: accept, authorize, then
//! - [`deliver`] connects to the application, and [`relay`] moves the bytes, on both sides;
//! - [`local`] is the shorter way, when both pods are this node's;
//! - [`warm`] has the pool connect to other nodes before anybody needs them;
//! - [`shard`] is one thread of all that, [`pod`] what it serves, [`enrol`] decides which those are;
//! - [`handover`] leaves it to a successor, by [`passing`] open sockets on.
//!
//! Who is who: [`identity`], [`ca`], [`authority`], [`issue`], [`rotate`], [`crls`], [`federation`], and
//! [`trust`], which is what holds now. Seen from outside: [`verdict`], [`telemetry`], [`admin`], [`check`], [`fleet`],
//! [`capacity`], [`cli`]. [`run`] alone knows all of them.

// The exceptions are at the kernel boundary, and each says why.
#![deny(unsafe_code)]

/// The gRPC code that was generated of one protocol: `module: "package"`. Our lints are not held against it.
macro_rules! generated {
    ($(#[$doc:meta])* $module:ident: $package:literal) => {
        $(#[$doc])*
        #[allow(
            missing_docs,
            unreachable_pub,
            unused_qualifications,
            clippy::all,
            clippy::allow_attributes_without_reason,
            clippy::clone_on_ref_ptr,
            reason = "generated"
        )]
        pub mod $module {
            tonic::include_proto!($package);
        }
    };
}

pub mod cidr;
pub mod config;
pub mod document;
mod text;
pub mod verdict;

pub mod authority;
pub mod ca;
pub mod crls;
pub mod federation;
pub mod identity;
pub mod issue;
pub mod rotate;
pub mod trust;

pub mod balance;
pub mod capture;
pub mod deliver;
pub mod directory;
pub mod enrol;
pub mod handover;
pub mod hbone;
pub mod inbound;
pub mod local;
pub mod mesh_policy;
pub mod netns;
pub mod outbound;
pub mod passing;
pub mod pod;
pub mod policy;
pub mod pool;
pub mod proof;
pub mod relay;
pub mod shard;
pub mod tls;
pub mod warm;

pub mod admin;
pub mod capacity;
pub mod check;
pub mod cli;
pub mod fleet;
pub mod run;
pub mod telemetry;
