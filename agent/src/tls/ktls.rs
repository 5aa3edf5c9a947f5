//! TLS in the kernel (Documentation/networking/tls.rst): whether this one has it, keys for it, and
//! records with their kinds. What a connection does with that is in [`super::stream`].

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{SndBuf, SndBufForce, TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, TlsGetRecordType, cmsg_space, getsockopt, recvmsg, setsockopt,
};
use nix::{libc, setsockopt_impl, sockopt_impl};
use rustls::{ConnectionTrafficSecrets, Error, InvalidMessage};

use super::record::Content;

/// Of the end of a connection: what TCP may hold beyond its limit, and a record or two.
const LAST_BYTES: usize = 256 * 1024;

static SWITCHED_ON: AtomicBool = AtomicBool::new(false);

/// What the kernel can do.
#[derive(Clone, Copy, Debug)]
pub struct Ability {
    /// Whether a connection can change its keys (Linux 6.14). Without that it ends when either side's
    /// key is worn: with small records that is a matter of minutes.
    pub rekeys: bool,
}

/// The kernel cannot.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {error}")]
pub struct Missing {
    what: &'static str,
    error: io::Error,
}

/// Tries it on a connection of its own. The kernel loads its modules on the way.
///
/// # Errors
/// What is missing.
pub fn probe() -> Result<Ability, Missing> {
    let (near, _far) = pair().map_err(|error| Missing { what: "no connection to try it on", error })?;
    let missing = |what| move |error| Missing { what, error };
    attach(&near).map_err(missing("no TLS (CONFIG_TLS, module tls)"))?;
    let key = [0; 16];
    let info = || aes_128_gcm(&key, &[0; 12], 0).ok_or_else(|| Errno::EINVAL.into());
    let set = |info| setsockopt(&near, TcpTlsTx, &info).map_err(io::Error::from);
    info().and_then(set).map_err(missing("no TLS 1.3 with AES-GCM (CONFIG_CRYPTO_GCM)"))?;
    let receive = |info| setsockopt(&near, TcpTlsRx, &info).map_err(io::Error::from);
    info().and_then(receive).map_err(missing("no receiving with TLS 1.3"))?;
    Ok(Ability { rekeys: info().and_then(set).is_ok() })
}

fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    Ok((near, listener.accept()?.0))
}

impl Ability {
    /// From now on this process hands new connections' keys to the kernel.
    pub fn switch_on(self) {
        SWITCHED_ON.store(true, Ordering::Relaxed);
    }
}

pub(super) fn is_on() -> bool {
    SWITCHED_ON.load(Ordering::Relaxed)
}

/// Makes a connected socket one that takes keys. Until it has one, bytes pass as they are.
pub(super) fn attach(socket: &impl AsFd) -> io::Result<()> {
    Ok(setsockopt(socket, TcpUlp::default(), b"tls")?)
}

/// Seals with this key from the next byte on. A second time: the kernel changes keys, if it can.
pub(super) fn set_sending_key(
    socket: &impl AsFd,
    sequence: u64,
    secrets: &ConnectionTrafficSecrets,
) -> io::Result<()> {
    Ok(setsockopt(socket, TcpTlsTx, &crypto_info(sequence, secrets)?)?)
}

/// Opens with this key from the next unread byte on, at which a record must begin.
pub(super) fn set_receiving_key(
    socket: &impl AsFd,
    sequence: u64,
    secrets: &ConnectionTrafficSecrets,
) -> io::Result<()> {
    setsockopt(socket, TcpTlsRx, &crypto_info(sequence, secrets)?)?;
    // Nobody pads, so data may be opened straight into the reader's buffer; what is padded nevertheless
    // is opened twice.
    let _ = setsockopt(socket, ExpectNoPad, &true);
    Ok(())
}

sockopt_impl!(
    /// `TLS_RX_EXPECT_NO_PAD` (Linux 6.0).
    ExpectNoPad,
    SetOnly,
    libc::SOL_TLS,
    libc::TLS_RX_EXPECT_NO_PAD,
    bool
);

fn crypto_info(sequence: u64, secrets: &ConnectionTrafficSecrets) -> io::Result<TlsCryptoInfo> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => aes_128_gcm(key.as_ref(), iv.as_ref(), sequence),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => aes_256_gcm(key.as_ref(), iv.as_ref(), sequence),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => chacha(key.as_ref(), iv.as_ref(), sequence),
        _ => None,
    }
    .ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, "a cipher suite that kernels do not have"))
}

fn info(cipher_type: u16) -> libc::tls_crypto_info {
    libc::tls_crypto_info { version: libc::TLS_1_3_VERSION, cipher_type }
}

/// None when the lengths are wrong, here and below. The kernel wants the IV in two parts.
fn aes_128_gcm(key: &[u8], iv: &[u8], sequence: u64) -> Option<TlsCryptoInfo> {
    let (salt, iv) = iv.split_at_checked(libc::TLS_CIPHER_AES_GCM_128_SALT_SIZE)?;
    Some(TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
        info: info(libc::TLS_CIPHER_AES_GCM_128),
        iv: iv.try_into().ok()?,
        key: key.try_into().ok()?,
        salt: salt.try_into().ok()?,
        rec_seq: sequence.to_be_bytes(),
    }))
}

fn aes_256_gcm(key: &[u8], iv: &[u8], sequence: u64) -> Option<TlsCryptoInfo> {
    let (salt, iv) = iv.split_at_checked(libc::TLS_CIPHER_AES_GCM_256_SALT_SIZE)?;
    Some(TlsCryptoInfo::Aes256Gcm(libc::tls12_crypto_info_aes_gcm_256 {
        info: info(libc::TLS_CIPHER_AES_GCM_256),
        iv: iv.try_into().ok()?,
        key: key.try_into().ok()?,
        salt: salt.try_into().ok()?,
        rec_seq: sequence.to_be_bytes(),
    }))
}

fn chacha(key: &[u8], iv: &[u8], sequence: u64) -> Option<TlsCryptoInfo> {
    Some(TlsCryptoInfo::Chacha20Poly1305(libc::tls12_crypto_info_chacha20_poly1305 {
        info: info(libc::TLS_CIPHER_CHACHA20_POLY1305),
        iv: iv.try_into().ok()?,
        key: key.try_into().ok()?,
        salt: [],
        rec_seq: sequence.to_be_bytes(),
    }))
}

/// The control message that says of which kind a record is to be (RFC 8446, section 5.1).
#[repr(C)]
struct Kind {
    header: libc::cmsghdr,
    code: u8,
}

/// Sends one record that is not data. Waits for nothing: [`io::ErrorKind::WouldBlock`].
pub(super) fn send_record(socket: BorrowedFd<'_>, content: Content, bytes: &[u8]) -> io::Result<()> {
    let mut kind = Kind {
        header: libc::cmsghdr {
            cmsg_len: std::mem::offset_of!(Kind, code) + 1,
            cmsg_level: libc::SOL_TLS,
            cmsg_type: libc::TLS_SET_RECORD_TYPE,
        },
        code: content.code(),
    };
    let mut part = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let message = libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut part,
        msg_iovlen: 1,
        msg_control: (&raw mut kind).cast(),
        msg_controllen: size_of::<Kind>(),
        msg_flags: 0,
    };
    #[expect(unsafe_code, reason = "nix can read this control message, but not write it")]
    // SAFETY: everything that the message points to outlives the call, which only reads it.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    match usize::try_from(sent) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(sent) if sent < bytes.len() => Err(io::ErrorKind::WriteZero.into()),
        Ok(_) => Ok(()),
    }
}

/// Control messages are aligned like their header.
#[repr(C, align(8))]
struct Space([u8; cmsg_space::<u8>()]);

/// Reads opened records of one kind, as much as there is and fits; a record that is not data comes
/// alone, in pieces if need be. None at the end of TCP's stream.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Option<(Content, usize)>> {
    let mut space = Space([0; _]);
    let mut parts = [IoSliceMut::new(into)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space.0), MsgFlags::MSG_DONTWAIT)?;
    let kind = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::TlsGetRecordType(kind) => Some(kind),
        _ => None,
    });
    let content = match kind {
        Some(TlsGetRecordType::ApplicationData) => Content::Data,
        Some(TlsGetRecordType::Handshake) => Content::Handshake,
        Some(TlsGetRecordType::Alert) => Content::Alert,
        None if message.bytes == 0 => return Ok(None),
        _ => return Err(Errno::EINVAL.into()),
    };
    Ok(Some((content, message.bytes)))
}

/// What is wrong with the peer's records, if the kernel complains of that (tls_rx_msg_size(),
/// tls_do_decryption()).
pub(super) fn bad_record(error: &io::Error) -> Option<Error> {
    match Errno::from_raw(error.raw_os_error()?) {
        Errno::EBADMSG => Some(Error::DecryptError),
        Errno::EMSGSIZE => Some(Error::PeerSentOversizedRecord),
        Errno::EINVAL => Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)),
        _ => None,
    }
}

/// Makes TCP take at once everything that is still to be sent. The kernel keeps a record for which TCP
/// has no room, where shutdown(2) and close(2) do not see it: it would be lost, and the peer told of an
/// end without a close_notify.
pub(super) fn make_room(socket: &impl AsFd) {
    // The kernel tells twice of what it is told.
    if let Ok(limit) = getsockopt(socket, SndBuf) {
        let _ = setsockopt(socket, SndBufForce, &(limit / 2 + LAST_BYTES));
    }
}
