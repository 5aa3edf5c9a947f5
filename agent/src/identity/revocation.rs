//! What the authority has revoked: SPIFFE IDs, nodes and single certificates, as one bounded list.
//!
//! A revoked SPIFFE ID or node is banned: none of its SVIDs is accepted and none is issued, until the
//! ban is lifted; what was issued before that moment stays refused after it too. A revoked serial
//! concerns that one certificate. Judging is pure: a list and a leaf in, a verdict out. What can no longer
//! concern a valid certificate leaves; bans stay until they are lifted.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::SpiffeId;
use super::svid::Leaf;

/// Most entries of a list. More revocations than this are a case for a new root.
pub const MAX_ENTRIES: usize = 10_000;
/// Most bytes that all subjects of a list may have together, so that it travels in one message.
pub const MAX_SUBJECT_BYTES: usize = 1 << 20;
/// No SVID of the authority is valid for longer, so an entry that concerns certificates issued up to
/// some moment concerns none this long after it.
pub const MAX_SVID_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// RFC 5280, section 4.1.2.2: at most 20 octets.
const MAX_SERIAL_DIGITS: usize = 40;
/// Kubernetes' bound for a node's name.
const MAX_NODE_BYTES: usize = 253;

/// Why a list or a part of it is refused.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RevocationError {
    /// Not a serial number.
    #[error("{0:?} is not a serial number: give 1 to 40 hexadecimal digits, as `hauberk certs` prints them")]
    Serial(String),
    /// Not a node's name.
    #[error("{0:?} is not a node's name")]
    Node(String),
    /// No room for another entry.
    #[error(
        "the list of revocations is full ({MAX_ENTRIES} entries, {MAX_SUBJECT_BYTES} bytes); lift what is no longer needed, or make a new root"
    )]
    Full,
    /// The same subject twice in a list.
    #[error("{0} is in the list twice")]
    Twice(Subject),
}

/// What is revoked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Subject {
    /// An identity, wherever it runs.
    SpiffeId(SpiffeId),
    /// A node: its own identity, and every workload's SVID that was issued to it.
    Node(NodeName),
    /// One certificate.
    Serial(Serial),
}

impl Subject {
    fn bytes(&self) -> usize {
        match self {
            Self::SpiffeId(id) => id.as_str().len(),
            Self::Node(NodeName(name)) => name.len(),
            Self::Serial(Serial(digits)) => digits.len(),
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SpiffeId(id) => write!(f, "SPIFFE ID {id}"),
            Self::Node(NodeName(name)) => write!(f, "node {name}"),
            Self::Serial(Serial(digits)) => write!(f, "serial {digits}"),
        }
    }
}

macro_rules! checked_text {
    ($type:ident) => {
        impl $type {
            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl std::str::FromStr for $type {
            type Err = RevocationError;
            fn from_str(text: &str) -> Result<Self, RevocationError> {
                Self::parse(text)
            }
        }
        impl TryFrom<String> for $type {
            type Error = RevocationError;
            fn try_from(text: String) -> Result<Self, RevocationError> {
                Self::parse(&text)
            }
        }
        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.0.as_ref().into()
            }
        }
    };
}

/// A certificate's serial number: lower-case hex, as [`Leaf::serial`] has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Serial(Arc<str>);
checked_text!(Serial);

impl Serial {
    /// Reads hex digits; colons between them, upper case and leading zeros make no difference.
    ///
    /// # Errors
    /// When it is anything else, or longer than a serial number may be.
    pub fn parse(text: &str) -> Result<Self, RevocationError> {
        let digits: String = text.chars().filter(|c| *c != ':').map(|c| c.to_ascii_lowercase()).collect();
        let significant = digits.trim_start_matches('0');
        let hex = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex || significant.len() > MAX_SERIAL_DIGITS {
            return Err(RevocationError::Serial(text.chars().take(2 * MAX_SERIAL_DIGITS).collect()));
        }
        Ok(Self(if significant.is_empty() { "0" } else { significant }.into()))
    }
}

/// A node's name, as the directory writes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);
checked_text!(NodeName);

impl NodeName {
    /// Checks that it can be part of a node's SPIFFE ID.
    ///
    /// # Errors
    /// When it cannot.
    pub fn parse(name: &str) -> Result<Self, RevocationError> {
        let wrong = || RevocationError::Node(name.chars().take(MAX_NODE_BYTES).collect());
        if name.len() > MAX_NODE_BYTES {
            return Err(wrong());
        }
        let id = SpiffeId::parse(&format!("spiffe://any/node/{name}")).map_err(|_| wrong())?;
        if id.node_name() == Some(name) { Ok(Self(name.into())) } else { Err(wrong()) }
    }
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Revocation {
    /// What is revoked.
    pub subject: Subject,
    /// When, in Unix seconds.
    pub revoked_at: u64,
    /// After a ban was lifted: SVIDs whose validity began before this (Unix seconds) stay refused.
    pub begun_before: u64,
    /// When the entry leaves, in Unix seconds. `None`: a ban, in force until it is lifted.
    pub until: Option<u64>,
}

impl Revocation {
    /// Whether nothing may be issued to the subject.
    pub fn is_ban(&self) -> bool {
        self.until.is_none()
    }

    fn concerns(&self, begun: u64) -> bool {
        match self.subject {
            Subject::Serial(_) => true,
            Subject::SpiffeId(_) | Subject::Node(_) => self.is_ban() || begun < self.begun_before,
        }
    }
}

/// A certificate that is revoked, and by what; or one that cannot be judged though there is a CRL for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the certificate of {id} with serial {serial} {} {by}", if *unknown { "is refused, as nobody can judge it by" } else { "is revoked, by" })]
pub struct Revoked {
    /// The certificate's identity.
    pub id: SpiffeId,
    /// Its serial number.
    pub serial: String,
    /// The entry's subject, in words.
    pub by: String,
    /// Nobody knows: the CRL for it does not hold any more, or not yet.
    pub unknown: bool,
}

/// Everything that is revoked. An empty list of generation 0 says that nothing ever was.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "List", into = "List")]
pub struct Revocations {
    generation: u64,
    entries: BTreeMap<Subject, Revocation>,
}

/// As it is stored.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    generation: u64,
    revocations: Vec<Revocation>,
}

impl TryFrom<List> for Revocations {
    type Error = RevocationError;
    fn try_from(list: List) -> Result<Self, RevocationError> {
        Self::new(list.generation, list.revocations)
    }
}

impl From<Revocations> for List {
    fn from(list: Revocations) -> Self {
        Self { generation: list.generation, revocations: list.entries.into_values().collect() }
    }
}

impl Revocations {
    /// A list as it was stored or sent.
    ///
    /// # Errors
    /// When it is larger than a list may be, or has a subject twice.
    pub fn new(
        generation: u64,
        revocations: impl IntoIterator<Item = Revocation>,
    ) -> Result<Self, RevocationError> {
        let mut list = Self { generation, entries: BTreeMap::new() };
        let mut bytes = 0;
        for revocation in revocations {
            bytes += revocation.subject.bytes();
            if list.entries.len() == MAX_ENTRIES || bytes > MAX_SUBJECT_BYTES {
                return Err(RevocationError::Full);
            }
            if let Some(twice) = list.entries.insert(revocation.subject.clone(), revocation) {
                return Err(RevocationError::Twice(twice.subject));
            }
        }
        Ok(list)
    }

    /// Grows with every change, and with time: a list that was lost and begun anew still comes to be
    /// the newer one.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The entries, by subject.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Revocation> {
        self.entries.values()
    }

    /// Whether this certificate is revoked.
    pub fn judge(&self, leaf: &Leaf) -> Option<Revoked> {
        if self.entries.is_empty() {
            return None;
        }
        let begun = unix(leaf.not_before);
        let by = self.find(&leaf.id, leaf.node.as_deref(), begun).or_else(|| {
            let serial = Serial::parse(&leaf.serial).ok()?;
            self.entries.get(&Subject::Serial(serial))
        })?;
        Some(Revoked {
            id: leaf.id.clone(),
            serial: leaf.serial.clone(),
            by: by.subject.to_string(),
            unknown: false,
        })
    }

    /// What forbids issuing to this identity on this node an SVID whose validity begins at `begins`.
    pub fn forbids(&self, id: &SpiffeId, node: &str, begins: SystemTime) -> Option<&Subject> {
        self.find(id, Some(node), unix(begins)).map(|revocation| &revocation.subject)
    }

    fn find(&self, id: &SpiffeId, node: Option<&str>, begun: u64) -> Option<&Revocation> {
        let node = node.map(|name| Subject::Node(NodeName(name.into())));
        [Some(Subject::SpiffeId(id.clone())), node]
            .into_iter()
            .flatten()
            .filter_map(|subject| self.entries.get(&subject))
            .find(|revocation| revocation.concerns(begun))
    }

    /// Revokes; false if that was so already.
    ///
    /// # Errors
    /// When there is no room.
    pub fn revoke(&mut self, subject: Subject, now: SystemTime) -> Result<bool, RevocationError> {
        let held = self.entries.get(&subject);
        if held.is_some_and(|held| held.is_ban() || matches!(held.subject, Subject::Serial(_))) {
            return Ok(false);
        }
        let bytes: usize = self.entries.keys().map(Subject::bytes).sum();
        let over = self.entries.len() >= MAX_ENTRIES || bytes + subject.bytes() > MAX_SUBJECT_BYTES;
        if held.is_none() && over {
            return Err(RevocationError::Full);
        }
        let revoked_at = unix(now);
        let until = matches!(subject, Subject::Serial(_)).then(|| end_of(revoked_at));
        let revocation = Revocation { subject: subject.clone(), revoked_at, begun_before: 0, until };
        self.entries.insert(subject, revocation);
        self.advance(now);
        Ok(true)
    }

    /// Lifts a ban, or forgets a revoked serial; false if there was none. What was issued before a ban
    /// was lifted stays refused; `backdated` is by how much SVIDs begin before they are issued.
    pub fn lift(&mut self, subject: &Subject, now: SystemTime, backdated: Duration) -> bool {
        let Some(held) = self.entries.get_mut(subject) else { return false };
        match subject {
            Subject::Serial(_) => drop(self.entries.remove(subject)),
            Subject::SpiffeId(_) | Subject::Node(_) if held.is_ban() => {
                // Certificates count in whole seconds: those of this very second are included.
                held.begun_before = (unix(now) + 1).saturating_sub(backdated.as_secs());
                held.until = Some(end_of(unix(now)));
            }
            Subject::SpiffeId(_) | Subject::Node(_) => return false,
        }
        self.advance(now);
        true
    }

    /// Lets go of what concerns no valid certificate any more; whether there was any.
    pub fn prune(&mut self, now: SystemTime) -> bool {
        let before = self.entries.len();
        self.entries.retain(|_, held| held.until.is_none_or(|until| until > unix(now)));
        let pruned = self.entries.len() < before;
        if pruned {
            self.advance(now);
        }
        pruned
    }

    fn advance(&mut self, now: SystemTime) {
        let millis = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        self.generation = (self.generation + 1).max(u64::try_from(millis).unwrap_or(u64::MAX));
    }
}

/// When the last certificate issued at `moment` has expired; a second more for rounding.
fn end_of(moment: u64) -> u64 {
    moment + MAX_SVID_LIFETIME.as_secs() + 1
}

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BACKDATED: Duration = Duration::from_secs(60);

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
    }

    fn id(name: &str) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td.test/ns/a/sa/{name}")).unwrap()
    }

    fn node(name: &str) -> Subject {
        Subject::Node(NodeName::parse(name).unwrap())
    }

    /// A leaf as the authority makes it when it issues at `issued`.
    fn leaf(name: &str, on: &str, serial: &str, issued: SystemTime) -> Leaf {
        Leaf {
            id: id(name),
            node: Some(on.into()),
            serial: serial.into(),
            not_before: issued - BACKDATED,
            not_after: issued + Duration::from_secs(3600),
            chain: Arc::default(),
        }
    }

    #[test]
    fn a_banned_identity_is_refused_until_lifted_and_what_was_issued_before_that_for_ever() {
        let mut list = Revocations::default();
        let subject = Subject::SpiffeId(id("web"));
        assert!(list.revoke(subject.clone(), at(10)).unwrap());
        assert!(!list.revoke(subject.clone(), at(11)).unwrap(), "twice is once");
        for issued in [at(0), at(10), at(500)] {
            assert!(list.judge(&leaf("web", "n1", "1", issued)).is_some(), "{issued:?}");
        }
        assert_eq!(list.judge(&leaf("other", "n1", "1", at(0))), None);
        assert_eq!(list.forbids(&id("web"), "n1", at(500) - BACKDATED), Some(&subject));

        assert!(list.lift(&subject, at(20), BACKDATED));
        assert!(!list.lift(&subject, at(21), BACKDATED), "it is lifted already");
        assert!(list.judge(&leaf("web", "n1", "1", at(20))).is_some(), "issued in the lift's second");
        assert!(list.forbids(&id("web"), "n1", at(20) - BACKDATED).is_some(), "so nothing is issued in it");
        assert_eq!(list.judge(&leaf("web", "n1", "1", at(21))), None);
        assert_eq!(list.forbids(&id("web"), "n1", at(21) - BACKDATED), None);
    }

    #[test]
    fn a_banned_node_takes_every_svid_that_was_issued_to_it_and_no_other() {
        let mut list = Revocations::default();
        list.revoke(node("n1"), at(0)).unwrap();
        assert!(list.judge(&leaf("web", "n1", "1", at(0))).is_some());
        assert_eq!(list.judge(&leaf("web", "n2", "2", at(0))), None, "the same identity on another node");
        assert!(list.forbids(&id("web"), "n1", at(5)).is_some());
        assert!(list.forbids(&id("web"), "n2", at(5)).is_none());
    }

    #[test]
    fn a_revoked_serial_is_that_certificate_alone_and_leaves_by_itself() {
        let mut list = Revocations::default();
        let subject = Subject::Serial(Serial::parse("00:AB:cd").unwrap());
        list.revoke(subject.clone(), at(0)).unwrap();
        let revoked = list.judge(&leaf("web", "n1", "abcd", at(0))).unwrap();
        assert!(revoked.to_string().contains("sa/web") && revoked.to_string().contains("serial abcd"));
        assert_eq!(list.judge(&leaf("web", "n1", "abce", at(0))), None);
        assert_eq!(list.forbids(&id("web"), "n1", at(0)), None);
        assert!(!list.prune(at(MAX_SVID_LIFETIME.as_secs())));
        assert!(list.prune(at(MAX_SVID_LIFETIME.as_secs() + 2)));
        assert_eq!(list.entries().len(), 0);
    }

    #[test]
    fn bans_stay_and_lifted_ones_leave_with_the_last_certificate() {
        let mut list = Revocations::default();
        list.revoke(node("n1"), at(0)).unwrap();
        let far = at(100 * MAX_SVID_LIFETIME.as_secs());
        assert!(!list.prune(far));
        list.lift(&node("n1"), far, BACKDATED);
        assert!(!list.prune(far), "what another issuer gave out during the ban may still be valid");
        assert!(list.prune(far + MAX_SVID_LIFETIME + Duration::from_secs(2)));
    }

    #[test]
    fn a_list_is_bounded() {
        let serial = |n: usize| Subject::Serial(Serial::parse(&format!("{n:x}")).unwrap());
        let entry = |n| Revocation { subject: serial(n), revoked_at: 0, begun_before: 1, until: Some(9) };
        let mut full = Revocations::new(1, (0..MAX_ENTRIES).map(entry)).unwrap();
        assert_eq!(full.revoke(serial(MAX_ENTRIES), at(0)), Err(RevocationError::Full));
        assert_eq!(Revocations::new(1, (0..=MAX_ENTRIES).map(entry)), Err(RevocationError::Full));
        assert_eq!(Revocations::new(1, [entry(1), entry(1)]), Err(RevocationError::Twice(serial(1))));
        let long = (0..600).map(|n| {
            let subject = Subject::SpiffeId(id(&format!("{}{n}", "x".repeat(2000))));
            Revocation { subject, revoked_at: 0, begun_before: 1, until: None }
        });
        assert_eq!(Revocations::new(1, long), Err(RevocationError::Full), "over a mebibyte of subjects");
    }

    fn subjects() -> impl Strategy<Value = Subject> {
        prop_oneof![
            "[a-z0-9]{1,12}".prop_map(|name| Subject::SpiffeId(id(&name))),
            "[a-z0-9.-]{0,8}[a-z0-9]".prop_map(|name| node(&name)),
            "[0-9a-fA-F:]{0,30}[0-9a-f]".prop_map(|text| Subject::Serial(Serial::parse(&text).unwrap())),
        ]
    }

    proptest! {
        #[test]
        fn every_change_is_newer_and_what_is_stored_comes_back(
            changes in proptest::collection::vec((subjects(), any::<bool>(), 0u64..100_000), 0..30)
        ) {
            let mut list = Revocations::default();
            for (subject, revoke, when) in changes {
                let before = list.generation();
                let changed = match revoke {
                    true => list.revoke(subject, at(when)).unwrap(),
                    false => list.lift(&subject, at(when), BACKDATED),
                };
                // Also when the clock jumps back.
                prop_assert_eq!(list.generation() > before, changed);
            }
            let text = serde_json::to_string(&list).unwrap();
            prop_assert_eq!(serde_json::from_str::<Revocations>(&text).unwrap(), list);
        }

        #[test]
        fn nothing_issued_until_a_ban_was_lifted_is_ever_accepted_again(
            issued in 0u64..1000, banned in 0u64..1000, lifted in 0u64..1000
        ) {
            let mut list = Revocations::default();
            let subject = Subject::SpiffeId(id("web"));
            list.revoke(subject.clone(), at(banned)).unwrap();
            prop_assert!(list.judge(&leaf("web", "n1", "1", at(issued))).is_some());
            list.lift(&subject, at(banned + lifted), BACKDATED);
            prop_assert_eq!(list.judge(&leaf("web", "n1", "1", at(issued))).is_some(), issued <= banned + lifted);
        }

        #[test]
        fn no_text_makes_the_readers_panic(text: String) {
            let _ = serde_json::from_str::<Revocations>(&text);
            if let Ok(serial) = Serial::parse(&text) {
                prop_assert_eq!(Serial::parse(serial.as_str()).unwrap(), serial);
            }
            if let Ok(name) = NodeName::parse(&text) {
                prop_assert_eq!(name.as_str(), text.as_str());
            }
        }
    }
}
