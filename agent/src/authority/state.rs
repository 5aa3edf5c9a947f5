//! The trust state as the configuration wants it: made at first, and given the operator's intermediate.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use zeroize::Zeroizing;

use super::AuthorityConfig;
use crate::ca::CaError;
use crate::ca::issuer::Supplied;
use crate::ca::rotation::RotationError;
use crate::ca::state::{Root, RootId, TrustState, seconds};
use crate::ca::store::{Store, StoreError, Wrong};

/// What came of an intermediate that was supplied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adopted {
    /// It signs already, or would if its root did.
    Unchanged,
    /// It signs from now on, under this root.
    Taken(RootId),
    /// Its root is not trusted yet: that takes a rotation.
    OtherRoot(RootId),
}

/// The trust state; made if there is none.
///
/// # Errors
/// When it cannot be read or made, or the supplied intermediate cannot be used.
pub fn open(store: &Store, config: &AuthorityConfig, now: SystemTime) -> Result<TrustState> {
    let domain = &config.trust_domain;
    let supplied = supplied(config, now)?;
    let first = || match &supplied {
        Some(root) => Ok(root.clone()),
        None => Root::create(domain, now)
            .map_err(|e| StoreError::Document { path: config.state_dir.clone(), why: e.into() }),
    };
    let state = store.trust_or_new(domain, config.svid_lifetime, now, first)?;
    let Some(supplied) = supplied else { return Ok(state) };
    match adopt(store, &supplied)? {
        Adopted::Unchanged => Ok(state),
        Adopted::Taken(root) => {
            tracing::info!(%root, "the supplied intermediate signs now");
            store.trust(domain)?.context("the trust state is gone")
        }
        Adopted::OtherRoot(root) => {
            tracing::warn!(%root, signing = %state.signing, "the supplied intermediate (issuer) has a root that is not trusted yet, and signs nothing: take it into use with `hauberk authority rotate-root`");
            Ok(state)
        }
    }
}

/// A state in words that are no secret, when no authority runs that could say more.
pub fn describe(state: &TrustState, now: SystemTime) -> serde_json::Value {
    super::status::describe_at_rest(state, now)
}

/// The intermediate that the configuration names, checked.
///
/// # Errors
/// When a file cannot be read, or agents would refuse what it signs.
pub fn supplied(config: &AuthorityConfig, now: SystemTime) -> Result<Option<Root>> {
    let Some(files) = &config.issuer else { return Ok(None) };
    let read = |path: &Path, field: &str| {
        std::fs::read_to_string(path)
            .map(Zeroizing::new)
            .with_context(|| format!("cannot read {} (issuer.{field})", path.display()))
    };
    let certificate = read(&files.certificate, "certificate")?;
    let (key, root) = (read(&files.key, "key")?, read(&files.root, "root")?);
    let supplied = Supplied { certificate: &certificate, key: &key, root: &root };
    let named = || {
        let [certificate, key, root] = [&files.certificate, &files.key, &files.root].map(|p| p.display());
        format!("the issuer (certificate {certificate}, key {key}, root {root}) cannot be used")
    };
    supplied.check(&config.trust_domain, config.svid_lifetime, now).map(Some).with_context(named)
}

/// Has an intermediate sign in place of what signed under the same root. What was signed before stays valid.
///
/// # Errors
/// When the state cannot be written.
pub fn adopt(store: &Store, supplied: &Root) -> Result<Adopted> {
    let (_, adopted) = store.change_trust(|state| {
        let Some(held) = state.roots.iter_mut().find(|root| root.id == supplied.id) else {
            return Ok::<_, CaError>(Adopted::OtherRoot(supplied.id.clone()));
        };
        if (&held.chain, &held.key) == (&supplied.chain, &supplied.key) {
            return Ok(Adopted::Unchanged);
        }
        let Root { chain, key, not_after, .. } = supplied.clone();
        (held.chain, held.key, held.not_after) = (chain, key, not_after);
        Ok(Adopted::Taken(supplied.id.clone()))
    })?;
    Ok(adopted)
}

/// The root to change to: the one `supplied`, or a new one; vouched for by what signs now, if that can be.
///
/// # Errors
/// When there is none.
pub(super) fn next_root(
    state: &TrustState,
    supplied: Option<Root>,
    now: SystemTime,
) -> Result<Root, CaError> {
    let domain = &state.trust_domain;
    let mut next = match supplied {
        Some(root) => root,
        None => Root::create_next(domain, now)?,
    };
    if let Err(error) = next.follow(state.signing()?, domain, now) {
        tracing::warn!(root = %next.id, signing = %state.signing, %error, "what signs now cannot vouch for the new root: an agent that is away for the whole rotation needs a new trust bundle file (`hauberk authority bundle`)");
    }
    Ok(next)
}

/// Begins a rotation: to the supplied intermediate's root, or to a new one. Returns its name, or `None` if one
/// is under way already.
///
/// # Errors
/// When it cannot begin, or the state cannot be written.
pub fn start_rotation(store: &Store, config: &AuthorityConfig, now: SystemTime) -> Result<Option<RootId>> {
    let next = supplied(config, now)?;
    if let (Some(root), Some(state)) = (&next, store.trust(&config.trust_domain)?)
        && state.signing == root.id
    {
        bail!(
            "the root that is supplied (issuer.root) signs already; supply the next root and its intermediate there, then run this again"
        );
    }
    let (_, started) = store.change_trust::<_, Wrong>(|state| {
        let next = next_root(state, next.clone(), now).map_err(Wrong::from)?;
        let id = next.id.clone();
        match state.start(next, seconds(now)) {
            Ok(()) => Ok(Some(id)),
            Err(RotationError::UnderWay(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    })?;
    Ok(started)
}
