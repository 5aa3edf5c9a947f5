//! Trust bundle, revocations and other trust domains as messages, and back. What comes back is checked as if a stranger had
//! sent it.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use super::proto;
use crate::identity::bundle::{BundleError, TrustBundle};
use crate::identity::federation::{Admit, Federated, Federation, MAX_DOMAINS};
use crate::identity::revocation::{NodeName, Revocation, RevocationError, Revocations, Serial, Subject};
use crate::identity::{ParseError, SpiffeId, TrustDomain};

/// The longest message that carries a bundle: its roots, a full list of revocations, and the roots of as many other
/// trust domains as there may be.
pub const MAX_BUNDLE_BYTES: usize = 4 << 20;

/// Why a message is not a bundle.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// A trust domain or SPIFFE ID.
    #[error(transparent)]
    Id(#[from] ParseError),
    /// The roots.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The revocations.
    #[error(transparent)]
    Revocation(#[from] RevocationError),
    /// An entry of a kind that this version does not know.
    #[error(
        "a revocation without a subject that this version knows; is the authority newer than this agent?"
    )]
    NoSubject,
    /// More other trust domains than there may be.
    #[error("more than {MAX_DOMAINS} federated trust domains")]
    TooManyDomains,
}

/// A bundle's roots alone.
pub fn roots(bundle: &TrustBundle) -> proto::Bundle {
    proto::Bundle {
        trust_domain: bundle.domain().to_string(),
        roots: bundle.roots().iter().map(|root| root.to_vec()).collect(),
        revocations: None,
        generation: bundle.generation(),
        federation: None,
    }
}

/// A bundle with its revocations and the other trust domains.
pub fn bundle(bundle: &TrustBundle) -> proto::Bundle {
    let list = bundle.revocations();
    let entries = list.entries().map(entry).collect();
    let revocations = proto::Revocations { generation: list.generation(), entries };
    let federation = bundle.federation().map(|known| proto::Federation {
        domains: known.iter().map(|(domain, federated)| sent(domain, federated)).collect(),
    });
    proto::Bundle { revocations: Some(revocations), federation, ..roots(bundle) }
}

/// Reads a bundle. One that was sent without revocations comes back with the empty list of generation
/// 0, which never replaces another.
///
/// # Errors
/// When any part of it is not what it must be: half a list would un-revoke somebody.
pub fn read(message: proto::Bundle) -> Result<TrustBundle, WireError> {
    let domain = TrustDomain::parse(&message.trust_domain)?;
    let roots = message.roots.into_iter().map(CertificateDer::from).collect();
    let bundle = TrustBundle::new(domain, roots)?.with_generation(message.generation);
    let list = message.revocations.unwrap_or_default();
    let entries: Vec<_> = list.entries.into_iter().map(read_entry).collect::<Result<_, _>>()?;
    let bundle = bundle.with_revocations(Revocations::new(list.generation, entries)?.into());
    match message.federation {
        Some(federation) => Ok(bundle.with_federation(Arc::new(read_federation(federation)?))),
        None => Ok(bundle),
    }
}

fn sent(domain: &TrustDomain, federated: &Federated) -> proto::Federated {
    proto::Federated {
        trust_domain: domain.to_string(),
        roots: federated.roots().iter().map(|root| root.to_vec()).collect(),
        admit_all: federated.admit() == Admit::All,
    }
}

fn read_federation(message: proto::Federation) -> Result<Federation, WireError> {
    let mut federation = Federation::default();
    if message.domains.len() > MAX_DOMAINS {
        return Err(WireError::TooManyDomains);
    }
    for proto::Federated { trust_domain, roots, admit_all } in message.domains {
        let roots = roots.into_iter().map(CertificateDer::from).collect();
        let admit = if admit_all { Admit::All } else { Admit::ByPolicy };
        federation.insert(TrustDomain::parse(&trust_domain)?, Federated::new(roots, admit)?);
    }
    Ok(federation)
}

fn entry(revocation: &Revocation) -> proto::Revocation {
    use proto::revocation::Subject as Sent;
    let subject = match &revocation.subject {
        Subject::SpiffeId(id) => Sent::SpiffeId(id.to_string()),
        Subject::Node(name) => Sent::Node(name.as_str().to_owned()),
        Subject::Serial(digits) => Sent::Serial(digits.as_str().to_owned()),
    };
    proto::Revocation {
        subject: Some(subject),
        revoked_at: revocation.revoked_at,
        begun_before: revocation.begun_before,
        until: revocation.until,
    }
}

fn read_entry(sent: proto::Revocation) -> Result<Revocation, WireError> {
    use proto::revocation::Subject as Sent;
    let subject = match sent.subject.ok_or(WireError::NoSubject)? {
        Sent::SpiffeId(id) => Subject::SpiffeId(SpiffeId::parse(&id)?),
        Sent::Node(name) => Subject::Node(NodeName::parse(&name)?),
        Sent::Serial(digits) => Subject::Serial(Serial::parse(&digits)?),
    };
    let proto::Revocation { revoked_at, begun_before, until, .. } = sent;
    Ok(Revocation { subject, revoked_at, begun_before, until })
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;
    use prost::Message;

    use super::*;
    use crate::ca::{Ca, create_root};
    use crate::identity::federation::MAX_ROOT_BYTES;

    fn some_bundle() -> TrustBundle {
        let domain = TrustDomain::parse("td.test").unwrap();
        let root = create_root(&domain, SystemTime::now()).unwrap();
        Ca::from_pem(domain, &root).unwrap().bundle().clone()
    }

    fn sent_subject() -> impl Strategy<Value = Option<proto::revocation::Subject>> {
        use proto::revocation::Subject as Sent;
        proptest::option::of(prop_oneof![
            "(spiffe://td.test/[a-z/.]{0,12}|.{0,9})".prop_map(Sent::SpiffeId),
            "([a-z0-9.-]{1,12}|.{0,9})".prop_map(Sent::Node),
            "([0-9a-fA-F:]{1,44}|.{0,9})".prop_map(Sent::Serial),
        ])
    }

    proptest! {
        #[test]
        fn what_is_read_says_what_was_sent_and_nothing_makes_the_reader_panic(
            generation: u64,
            entries in proptest::collection::vec(
                (sent_subject(), any::<u64>(), any::<u64>(), any::<Option<u64>>()), 0..4
            )
        ) {
            let entries: Vec<_> = entries.into_iter().map(|(subject, revoked_at, begun_before, until)| {
                proto::Revocation { subject, revoked_at, begun_before, until }
            }).collect();
            let count = entries.len();
            let revocations = Some(proto::Revocations { generation, entries });
            let sent = proto::Bundle { revocations, ..roots(&some_bundle()) };
            let decoded = proto::Bundle::decode(sent.encode_to_vec().as_slice()).unwrap();
            if let Ok(held) = read(decoded) {
                prop_assert_eq!(held.revocations().entries().len(), count, "no entry is dropped in silence");
                prop_assert_eq!(held.revocations().generation(), generation);
                prop_assert_eq!(read(bundle(&held)).unwrap(), held);
            }
        }
    }

    #[test]
    fn a_full_list_fits_into_a_message() {
        let entries = (0..10_000).map(|n: u64| Revocation {
            subject: Subject::Node(NodeName::parse(&format!("{n:0>104}")).unwrap()),
            revoked_at: u64::MAX,
            begun_before: u64::MAX,
            until: Some(u64::MAX),
        });
        let full = some_bundle().with_revocations(Revocations::new(u64::MAX, entries).unwrap().into());
        let bytes = bundle(&full).encoded_len();
        let others = MAX_DOMAINS * (MAX_ROOT_BYTES + 1024);
        assert!(bytes + others < MAX_BUNDLE_BYTES - 64 * 1024, "{bytes} bytes leave no room for roots");
    }

    #[test]
    fn other_trust_domains_come_as_they_were_sent_and_are_absent_with_the_roots_alone() {
        let mut federation = Federation::default();
        for (name, admit) in [("a.test", Admit::All), ("b.test", Admit::ByPolicy)] {
            let federated = Federated::new(some_bundle().roots().to_vec(), admit).unwrap();
            federation.insert(TrustDomain::parse(name).unwrap(), federated);
        }
        federation.insert(
            TrustDomain::parse("gone.test").unwrap(),
            Federated::new(Vec::new(), Admit::All).unwrap(),
        );
        let held = some_bundle().with_federation(Arc::new(federation));
        assert_eq!(read(bundle(&held)).unwrap(), held);
        assert!(read(roots(&held)).unwrap().federation().is_none());
        let spoilt = |edit: fn(&mut proto::Federation)| {
            let mut message = bundle(&held);
            edit(message.federation.as_mut().unwrap());
            read(message)
        };
        assert!(matches!(spoilt(|f| f.domains[0].trust_domain = "A".into()), Err(WireError::Id(_))));
        assert!(matches!(spoilt(|f| f.domains[0].roots = vec![vec![0]]), Err(WireError::Bundle(_))));
        let many = |f: &mut proto::Federation| f.domains = vec![f.domains[0].clone(); MAX_DOMAINS + 1];
        assert!(matches!(spoilt(many), Err(WireError::TooManyDomains)));
    }

    #[test]
    fn roots_alone_say_nothing_of_revocations_and_carry_their_generation() {
        let held = some_bundle().with_generation(7);
        let read = read(roots(&held)).unwrap();
        assert_eq!((read.revocations().generation(), read.generation()), (0, 7));
    }
}
