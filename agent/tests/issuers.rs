//! Issuers: what they are asked, what is believed of their answers, and how the
//! rotation follows them. Istio's CA and SPIRE's agent are played by servers of the published protocols;
//! Vault is a real OpenBao server.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

#[path = "issuers/authority.rs"]
mod authority;
#[path = "issuers/files.rs"]
mod files;
#[path = "issuers/istio.rs"]
mod istio;
#[path = "issuers/mesh.rs"]
mod mesh;
#[path = "issuers/spire.rs"]
mod spire;
#[path = "issuers/vault.rs"]
mod vault;
