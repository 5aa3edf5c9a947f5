//! Makes handshakes: rustls decides what is said, this carries it over TCP, then hands the secrets to
//! our own record layer ([`TlsStream`]).

use std::io;
use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedConnectionCommon, UnbufferedStatus};
use rustls::{
    ClientConfig, Error, ExtractedSecrets, HandshakeKind, KeyLog, ServerConfig, SupportedCipherSuite,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::broken;
use super::exporter::Exporter;
use super::stream::{Session, TlsStream};

/// The longest flight that is taken: a chain of several certificates fits ten times.
const MAX_FLIGHT_BYTES: usize = 64 * 1024;
const READ_BYTES: usize = 8 * 1024;

/// A finished handshake.
#[derive(Debug)]
pub struct Established {
    /// The connection.
    pub stream: TlsStream,
    /// What was learnt of the peer.
    pub session: Facts,
}

/// What a handshake established beside its keys.
#[derive(Debug)]
pub struct Facts {
    /// Leaf first: verified in this handshake, or in the one it resumed. Empty when there are none.
    peer_chain: Vec<CertificateDer<'static>>,
    /// The protocol agreed on (RFC 7301).
    pub alpn: Option<Vec<u8>>,
    /// Whether it was full or resumed.
    pub kind: HandshakeKind,
    /// Names this connection, and no other, to both ends (RFC 8446, section 7.5).
    pub exporter: [u8; 32],
}

impl Facts {
    /// The peer's certificates, if it presented any.
    pub fn peer_chain(&self) -> Option<&[CertificateDer<'static>]> {
        (!self.peer_chain.is_empty()).then_some(&*self.peer_chain)
    }
}

/// Dials: speaks TLS as the client on a TCP connection.
///
/// # Errors
/// rustls' own error inside an [`io::Error`], as [`super::reason`] reads it; or the socket's.
pub async fn connect(
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    tcp: TcpStream,
) -> io::Result<Established> {
    let mut config = Arc::unwrap_or_clone(config);
    let exporter = Exporter::new();
    config.key_log = Arc::clone(&exporter) as Arc<dyn KeyLog>;
    config.enable_secret_extraction = true;
    let connection = UnbufferedClientConnection::new(Arc::new(config), name).map_err(broken)?;
    run(connection, tcp, &exporter).await
}

/// Accepts: speaks TLS as the server on a TCP connection.
///
/// # Errors
/// As [`connect`].
pub async fn accept(config: Arc<ServerConfig>, tcp: TcpStream) -> io::Result<Established> {
    let mut config = Arc::unwrap_or_clone(config);
    let exporter = Exporter::new();
    config.key_log = Arc::clone(&exporter) as Arc<dyn KeyLog>;
    config.enable_secret_extraction = true;
    let connection = UnbufferedServerConnection::new(Arc::new(config)).map_err(broken)?;
    run(connection, tcp, &exporter).await
}

/// Either side's connection: rustls has two types without a common trait.
trait Connection {
    type Data;
    fn common(&mut self) -> &mut UnbufferedConnectionCommon<Self::Data>;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn Session>, SupportedCipherSuite), Error>;
}

impl Connection for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn common(&mut self) -> &mut UnbufferedConnectionCommon<ClientConnectionData> {
        self
    }
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, ClientConnectionData> {
        self.process_tls_records(incoming)
    }
    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn Session>, SupportedCipherSuite), Error> {
        let (secrets, session) = self.dangerous_into_kernel_connection()?;
        let suite = session.negotiated_cipher_suite();
        Ok((secrets, Box::new(session), suite))
    }
}

impl Connection for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn common(&mut self) -> &mut UnbufferedConnectionCommon<ServerConnectionData> {
        self
    }
    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, ServerConnectionData> {
        self.process_tls_records(incoming)
    }
    fn finish(self) -> Result<(ExtractedSecrets, Box<dyn Session>, SupportedCipherSuite), Error> {
        let (secrets, session) = self.dangerous_into_kernel_connection()?;
        let suite = session.negotiated_cipher_suite();
        Ok((secrets, Box::new(session), suite))
    }
}

/// What the driver is to do next.
enum Step {
    Again,
    Receive,
    Done,
}

/// Bytes on their way while the handshake runs.
#[derive(Default)]
struct Flights {
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// Application data that came right behind the peer's last flight.
    plain: Vec<u8>,
}

async fn run<C: Connection>(
    mut connection: C,
    mut tcp: TcpStream,
    exporter: &Exporter,
) -> io::Result<Established> {
    let mut flights = Flights::default();
    loop {
        match step(&mut connection, &mut flights) {
            Ok(Step::Again) => {}
            Ok(Step::Receive) => {
                send(&mut tcp, &mut flights).await?;
                receive(&mut tcp, &mut flights).await?;
            }
            Ok(Step::Done) => break,
            Err(error) => {
                last_words(&mut connection, &mut flights);
                let _ = send(&mut tcp, &mut flights).await;
                return Err(broken(error));
            }
        }
    }
    send(&mut tcp, &mut flights).await?;
    established(connection, tcp, &flights, exporter).map_err(broken)
}

/// Takes what rustls has ready after an error: the rest of its flight, then the alert that tells the peer.
/// The error itself matters more. Nothing is asked of it behind the alert: it would look at the bad bytes
/// again, and panic.
fn last_words<C: Connection>(connection: &mut C, flights: &mut Flights) {
    loop {
        let said = flights.outgoing.len();
        let again = matches!(step(connection, flights), Ok(Step::Again));
        let record = flights.outgoing.get(said..).unwrap_or_default();
        if !again || record.is_empty() || is_alert(record) {
            return;
        }
    }
}

/// An alert is two bytes; encrypted (RFC 8446, section 5.2), with its type and a tag of 16 bytes, it is
/// shorter than any handshake message.
fn is_alert(record: &[u8]) -> bool {
    matches!(record, [21, ..] | [23, _, _, 0, 19, ..])
}

/// Lets rustls go on until it wants something.
fn step<C: Connection>(connection: &mut C, flights: &mut Flights) -> Result<Step, Error> {
    let UnbufferedStatus { mut discard, state, .. } = connection.process(&mut flights.incoming);
    let state = match state {
        Ok(state) => state,
        Err(error) => {
            flights.incoming.drain(..discard);
            return Err(error);
        }
    };
    let next = match state {
        ConnectionState::EncodeTlsData(mut data) => {
            encode(&mut data, &mut flights.outgoing)?;
            Step::Again
        }
        ConnectionState::TransmitTlsData(transmit) => {
            // Sent before anything is awaited from the peer; flights that follow each other go together.
            transmit.done();
            Step::Again
        }
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                flights.plain.extend_from_slice(record.payload);
            }
            Step::Again
        }
        ConnectionState::BlockedHandshake => Step::Receive,
        ConnectionState::WriteTraffic(_) => Step::Done,
        // A peer that closes in the middle, or sends early data, which no configuration of ours allows.
        _ => return Err(Error::General("the peer closed the connection in the handshake".into())),
    };
    flights.incoming.drain(..discard);
    Ok(next)
}

fn encode<D>(data: &mut rustls::unbuffered::EncodeTlsData<'_, D>, out: &mut Vec<u8>) -> Result<(), Error> {
    let end = out.len();
    let mut wanted = 4096;
    loop {
        out.resize(end + wanted, 0);
        match data.encode(&mut out[end..]) {
            Ok(written) => {
                out.truncate(end + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(size)) if wanted < size.required_size => {
                wanted = size.required_size;
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}

async fn send(tcp: &mut TcpStream, flights: &mut Flights) -> io::Result<()> {
    if !flights.outgoing.is_empty() {
        tcp.write_all(&flights.outgoing).await?;
        flights.outgoing.clear();
    }
    Ok(())
}

async fn receive(tcp: &mut TcpStream, flights: &mut Flights) -> io::Result<()> {
    if flights.incoming.len() > MAX_FLIGHT_BYTES {
        return Err(broken(Error::InvalidMessage(rustls::InvalidMessage::MessageTooLarge)));
    }
    flights.incoming.reserve(READ_BYTES);
    match tcp.read_buf(&mut flights.incoming).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

fn established<C: Connection>(
    mut connection: C,
    tcp: TcpStream,
    flights: &Flights,
    exporter: &Exporter,
) -> Result<Established, Error> {
    let common = connection.common();
    let facts = Facts {
        peer_chain: common
            .peer_certificates()
            .unwrap_or_default()
            .iter()
            .map(|c| c.clone().into_owned())
            .collect(),
        alpn: common.alpn_protocol().map(<[u8]>::to_vec),
        kind: common.handshake_kind().ok_or(Error::HandshakeNotComplete)?,
        exporter: exporter.export()?,
    };
    let (secrets, session, suite) = connection.finish()?;
    let stream = TlsStream::new(tcp, secrets, suite, session, &flights.incoming, &flights.plain)?;
    Ok(Established { stream, session: facts })
}
