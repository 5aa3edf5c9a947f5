//! What a ticket holds: until when it is good, whose session it is, and rustls' own state of it.
//!
//! The peer's certificates are not put in a second time: they are pointed at inside rustls' state. So
//! what is judged when the ticket is used are the very bytes that rustls will call the peer's
//! certificates, and a state that does not hold the verified chain makes no ticket.

use rustls::pki_types::CertificateDer;

/// Longer chains are not resumed.
const MAX_CHAIN: usize = 8;
/// Expiry, then the number of certificates.
const FIXED_BYTES: usize = 9;
/// Offset and length of a certificate.
const SPAN_BYTES: usize = 4;

/// A ticket's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// When the ticket ends, in seconds since 1970.
    pub expires: u64,
    /// The peer's certificates, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// What rustls wants back.
    pub session: Vec<u8>,
}

impl Content {
    /// Writes it down; `None` if `session` does not hold every certificate of `chain`.
    pub fn encode(expires: u64, chain: &[CertificateDer<'_>], session: &[u8]) -> Option<Vec<u8>> {
        if chain.is_empty() || chain.len() > MAX_CHAIN {
            return None;
        }
        let mut bytes =
            Vec::with_capacity(FIXED_BYTES + SPAN_BYTES * chain.len() + session.len() + super::TAG_BYTES);
        bytes.extend(expires.to_be_bytes());
        bytes.push(u8::try_from(chain.len()).ok()?);
        let mut from = 0;
        for certificate in chain {
            let offset = from + find(session.get(from..)?, certificate)?;
            bytes.extend(u16::try_from(offset).ok()?.to_be_bytes());
            bytes.extend(u16::try_from(certificate.len()).ok()?.to_be_bytes());
            from = offset + certificate.len();
        }
        bytes.extend(session);
        Some(bytes)
    }

    /// Reads it back; `None` for bytes that [`Content::encode`] did not write.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (expires, rest) = bytes.split_first_chunk()?;
        let (count, rest) = rest.split_first()?;
        let count = usize::from(*count);
        if count == 0 || count > MAX_CHAIN {
            return None;
        }
        let (spans, session) = rest.split_at_checked(count * SPAN_BYTES)?;
        let chain = spans.chunks_exact(SPAN_BYTES).map(|span| {
            let offset = usize::from(u16::from_be_bytes([span[0], span[1]]));
            let length = usize::from(u16::from_be_bytes([span[2], span[3]]));
            let certificate = session.get(offset..offset + length).filter(|c| !c.is_empty())?;
            Some(CertificateDer::from(certificate.to_vec()))
        });
        let chain = chain.collect::<Option<_>>()?;
        Some(Self { expires: u64::from_be_bytes(*expires), chain, session: session.to_vec() })
    }
}

fn find(within: &[u8], what: &[u8]) -> Option<usize> {
    if what.is_empty() {
        return None;
    }
    within.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 1..most)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            expires: u64,
            chain in proptest::collection::vec(bytes(40), 1..=MAX_CHAIN),
            between in bytes(20)
        ) {
            let mut session = between.clone();
            for certificate in &chain {
                session.extend(certificate);
                session.extend(&between);
            }
            let chain: Vec<_> = chain.into_iter().map(CertificateDer::from).collect();
            let written = Content::encode(expires, &chain, &session).unwrap();
            prop_assert_eq!(Content::decode(&written), Some(Content { expires, chain, session }));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Content::decode(&bytes);
        }
    }

    #[test]
    fn a_session_of_another_chain_makes_no_ticket() {
        let chain = [CertificateDer::from(b"leaf".to_vec()), CertificateDer::from(b"between".to_vec())];
        assert!(Content::encode(1, &chain, b"..leaf..between..").is_some());
        for session in [&b"..leaf.."[..], b"..between..leaf..", b"....", b""] {
            assert_eq!(Content::encode(1, &chain, session), None, "{session:?}");
        }
        assert_eq!(Content::encode(1, &[], b"..leaf.."), None, "nobody's session");
    }
}
