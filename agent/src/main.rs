//! The `hauberk` binary: see [`hauberk::cli`].

fn main() {}
