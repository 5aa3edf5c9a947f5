//! Other trust domains, as the agent's parts are told of them.

use std::sync::Arc;

use anyhow::Result;
use tokio::sync::watch;

use crate::config::AgentConfig;
use crate::federation::Federator;
use crate::identity::bundle::TrustBundle;
use crate::identity::federation::{Admit, Federation};
use crate::policy::Policies;
use crate::policy::neighbours::Neighbours;
use crate::trust::Trust;

/// The agent's own sources of other trust domains' bundles, if it has any.
pub(super) fn federator(config: &AgentConfig, trust: &Trust) -> Result<Option<Federator>> {
    let Some(federation) = &config.federation else { return Ok(None) };
    let federator = Federator::open(federation, Some(&config.runtime_dir.join("federation")))?;
    trust.set_federation(Arc::clone(&federator.subscribe().borrow()));
    Ok(Some(federator))
}

/// Runs for ever: takes what the agent's own sources say into use.
pub(super) async fn follow_federation(trust: Arc<Trust>, mut federation: watch::Receiver<Arc<Federation>>) {
    loop {
        let now = Arc::clone(&federation.borrow_and_update());
        trust.set_federation(now);
        if federation.changed().await.is_err() {
            return;
        }
    }
}

/// Runs for ever: tells the policies whose identities need one to come.
pub(super) async fn tell_policies(trust: Arc<Trust>, policies: Arc<Policies>) {
    let mut changes = trust.subscribe_bundle();
    loop {
        policies.know(neighbours(&trust.snapshot().bundle));
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// What policies have to know of other trust domains.
pub(super) fn neighbours(bundle: &TrustBundle) -> Neighbours {
    let federated = bundle.federation().into_iter().flat_map(|federation| federation.iter());
    let admitted = federated.filter(|(_, federated)| federated.admit() == Admit::All);
    Neighbours {
        aliases: bundle.aliases().to_vec(),
        admitted: admitted.map(|(domain, _)| domain.clone()).collect(),
    }
}
