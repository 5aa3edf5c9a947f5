//! Worlds to test in: nodes, pods and an outside host as network namespaces, joined by wires that
//! can be listened to, with the real agent and authority in them.
//!
//! - [`world`]: a whole world; making it, and leaving nothing of it behind
//! - [`host`]: a namespace, and running programs in it
//! - [`process`]: a program that runs
//! - [`agent`]: the agent and the authority as processes
//! - [`kubernetes`]: a real API server, and pods as its objects
//! - [`clock`]: a clock of its own for a program
//! - [`tap`]: what a wire carried
//! - [`sweep`]: removes worlds whose makers are gone
//!
//! Everything is inside namespaces of its own, so worlds may have the same addresses and do not
//! meet.

pub mod agent;
pub mod clock;
pub mod host;
pub mod kubernetes;
pub mod process;
pub mod sweep;
pub mod tap;
pub mod world;

pub use agent::{Agent, Mode, Options};
pub use host::Host;
pub use kubernetes::Kubernetes;
pub use process::{Output, Process};
pub use tap::{Seen, Tap};
pub use world::{Pod, World};

/// Tries until it holds, for as long as `limit`; `what` says what should have held.
///
/// # Panics
/// When it does not.
pub fn wait_until(limit: std::time::Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + limit;
    while !holds() {
        assert!(std::time::Instant::now() < until, "not within {limit:?}: {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
