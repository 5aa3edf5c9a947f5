//! The agents of a cluster together: what each says of itself, and what follows of it.
//!
//! - `report`: what an agent says of itself
//! - `lease`: an agent keeps its report in a Lease of its own
//! - `reach`: which other nodes' agents an agent reaches
//! - `status`: the authority tells each policy's status how many agents have applied it
//!
//! So each agent writes one small object, however many policies there are, and a policy's status is written
//! by the authority alone.

pub mod lease;
pub mod reach;
pub mod report;
pub mod status;
