//! TLS 1.3's record layer (RFC 8446, section 5) with the keys of a finished handshake: seals and opens
//! records, and counts them. No I/O, no buffer of its own.
//!
//! rustls makes the handshake, keeps the secrets and derives new ones; only the records are ours. Its own
//! record layer copies each byte three times on the way in and once on the way out. Here a record is
//! opened straight into the reader's buffer and sealed straight out of the writer's: for bulk that is
//! the difference between a third and a half of the direct path's throughput.

use std::fmt;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use rustls::{ConnectionTrafficSecrets, Error, InvalidMessage, SupportedCipherSuite};

/// A record's header: type, version, length.
pub(super) const HEADER_BYTES: usize = 5;
/// What every suite of TLS 1.3 appends to authenticate a record.
pub(super) const TAG_BYTES: usize = 16;
/// Most content of one record (section 5.1).
pub(super) const MAX_CONTENT_BYTES: usize = 1 << 14;
/// What a record has beside its content: header, inner type, tag.
pub(super) const OVERHEAD_BYTES: usize = HEADER_BYTES + 1 + TAG_BYTES;
/// Longest encrypted part that is accepted (section 5.2).
const MAX_PAYLOAD_BYTES: usize = MAX_CONTENT_BYTES + 256;

/// What a record holds (section 5.1, `ContentType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Alert,
    Handshake,
    Data,
}

impl Content {
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::Data => 23,
        }
    }
}

/// One direction's key.
struct Key {
    aead: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): &(u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher suite that this record layer does not have".into())),
        };
        let unusable = |_| Error::General("the handshake's keys do not fit their cipher suite".into());
        let iv =
            iv.as_ref().try_into().map_err(|_| Error::General("an IV that is not 96 bits long".into()))?;
        let aead = LessSafeKey::new(UnboundKey::new(algorithm, key.as_ref()).map_err(unusable)?);
        Ok(Self { aead, iv, sequence: *sequence })
    }

    /// The nonce of the next record (section 5.3). Numbers never repeat: the connection ends before they
    /// would wrap.
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= number;
        }
        self.sequence =
            self.sequence.checked_add(1).ok_or_else(|| Error::General("too many records".into()))?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// Records that one key may seal (section 5.5).
pub(super) fn limit(suite: SupportedCipherSuite) -> Result<u64, Error> {
    match suite {
        SupportedCipherSuite::Tls13(suite) => Ok(suite.common.confidentiality_limit),
        #[allow(
            unreachable_patterns,
            reason = "TLS 1.2 is a feature of rustls that another crate may turn on"
        )]
        _ => Err(Error::General("TLS 1.3 only".into())),
    }
}

/// The sending direction.
#[derive(Debug)]
pub(super) struct Sealer {
    key: Key,
    limit: u64,
}

impl Sealer {
    /// From rustls' secrets: the next record's number, and key and IV.
    pub(super) fn new(
        secrets: &(u64, ConnectionTrafficSecrets),
        suite: SupportedCipherSuite,
    ) -> Result<Self, Error> {
        Ok(Self { key: Key::new(secrets)?, limit: limit(suite)? })
    }

    /// Whether it is time for a new key. True well before the limit, as a write may hold many records.
    pub(super) fn is_worn(&self) -> bool {
        self.key.sequence >= self.limit - self.limit / 8
    }

    /// Takes the next key into use.
    pub(super) fn renew(&mut self, secrets: &(u64, ConnectionTrafficSecrets)) -> Result<(), Error> {
        self.key = Key::new(secrets)?;
        Ok(())
    }

    /// Writes one record with both `parts`, together at most 16 KiB, to the front of `out`, which must
    /// have room for them and [`OVERHEAD_BYTES`]. Returns the record's length.
    pub(super) fn seal(
        &mut self,
        content: Content,
        parts: [&[u8]; 2],
        out: &mut [u8],
    ) -> Result<usize, Error> {
        let length = parts[0].len() + parts[1].len();
        let (header, rest) = out.split_at_mut(HEADER_BYTES);
        let (body, rest) = rest.split_at_mut(length);
        let tail = &mut rest[..1 + TAG_BYTES];
        header.copy_from_slice(&head(length + 1 + TAG_BYTES));
        let (nonce, aad, inner) = (self.key.nonce()?, Aad::from(&*header), [content.code()]);
        let sealed = match parts {
            // The usual case in bulk: no copy but the encryption itself.
            [whole, []] | [[], whole] => {
                self.key.aead.seal_out_of_place_scatter(nonce, aad, whole, body, &inner, tail)
            }
            [first, second] => {
                body[..first.len()].copy_from_slice(first);
                body[first.len()..].copy_from_slice(second);
                self.key.aead.seal_in_place_scatter(nonce, aad, body, &inner, tail)
            }
        };
        sealed.map_err(|_| Error::EncryptError)?;
        Ok(length + OVERHEAD_BYTES)
    }
}

/// Every encrypted record claims to be application data of TLS 1.2 (section 5.2).
fn head(payload: usize) -> [u8; HEADER_BYTES] {
    // At most 16,401.
    let [high, low] = (payload as u16).to_be_bytes();
    [Content::Data.code(), 3, 3, high, low]
}

/// The receiving direction.
#[derive(Debug)]
pub(super) struct Opener {
    key: Key,
}

impl Opener {
    /// From rustls' secrets: the next record's number, and key and IV.
    pub(super) fn new(secrets: &(u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        Ok(Self { key: Key::new(secrets)? })
    }

    /// The next record's number.
    pub(super) fn sequence(&self) -> u64 {
        self.key.sequence
    }

    /// Opens one record, whose header is `header`. `payload` is what lies behind it. What it held is
    /// in `into`, which has as much room as the payload less its tag; returns its kind and length.
    pub(super) fn open(
        &mut self,
        header: &[u8; HEADER_BYTES],
        payload: &[u8],
        into: &mut [u8],
    ) -> Result<(Content, usize), Error> {
        let (ciphertext, tag) = payload.split_at(payload.len() - TAG_BYTES);
        let nonce = self.key.nonce()?;
        self.key
            .aead
            .open_separate_gather(nonce, Aad::from(header), ciphertext, tag, into)
            .map_err(|_| Error::DecryptError)?;
        // The inner type is the last byte that is not padding (section 5.4).
        let end = into
            .iter()
            .rposition(|byte| *byte != 0)
            .ok_or(Error::InvalidMessage(InvalidMessage::InvalidContentType))?;
        if end > MAX_CONTENT_BYTES {
            return Err(Error::PeerSentOversizedRecord);
        }
        let content = match into[end] {
            21 => Content::Alert,
            22 => Content::Handshake,
            23 => Content::Data,
            _ => return Err(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
        };
        Ok((content, end))
    }
}

/// Reads a header: the length of the payload behind it, which is at least a tag and an inner type.
///
/// # Errors
/// When it is none of an encrypted record: after the handshake nothing else may come.
pub(super) fn payload_length(header: &[u8; HEADER_BYTES]) -> Result<usize, Error> {
    let [kind, major, minor, high, low] = *header;
    let invalid = |what| Err(Error::InvalidMessage(what));
    if kind != Content::Data.code() {
        return invalid(InvalidMessage::InvalidContentType);
    }
    if (major, minor) != (3, 3) {
        return invalid(InvalidMessage::UnknownProtocolVersion);
    }
    match usize::from(u16::from_be_bytes([high, low])) {
        length if length > MAX_PAYLOAD_BYTES => invalid(InvalidMessage::MessageTooLarge),
        length if length <= TAG_BYTES => invalid(InvalidMessage::MessageTooShort),
        length => Ok(length),
    }
}
