//! Hauberk's own authority as an issuer: gRPC over mutual TLS, attested once by a join token.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::BoxFuture;
use hyper_util::rt::TokioIo;
use rustls::pki_types::CertificateDer;
use tokio::sync::{Mutex, mpsc};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Status, Streaming};

use super::grpc::{self, CALL_TIMEOUT};
use super::{IssueError, Issued, Signer};
use crate::authority::proto::authority_client::AuthorityClient;
use crate::authority::proto::{Applied, AttestRequest, Bundle, IssueRequest, Svid};
use crate::authority::wire;
use crate::identity::SpiffeId;
use crate::identity::bundle::TrustBundle;
use crate::identity::svid::X509Svid;
use crate::tls;
use crate::trust::{Snapshot, Trust};
use crate::verdict::IssuerKind;

/// A silent authority is found out in this time, twice: revocations must not wait for a dead connection.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// The authority, as one node asks it.
#[derive(Debug)]
pub struct AuthorityIssuer {
    line: Line,
    join_token: Option<PathBuf>,
    bundles: Mutex<Option<Bundles>>,
}

/// A node's connection to the authority, which is known by its SPIFFE ID.
#[derive(Debug)]
pub struct Line {
    address: String,
    node: SpiffeId,
    trust: Arc<Trust>,
    /// The node's SVIDs as they were held, newest first, and at most two.
    nodes: std::sync::Mutex<Vec<Arc<X509Svid>>>,
    /// Made anew when the node's SVID or the bundle has changed.
    channel: Mutex<Option<(Epoch, Channel)>>,
}

/// The stream of bundles, and the one back that says which roots are applied.
#[derive(Debug)]
struct Bundles {
    sent: Streaming<Bundle>,
    applied: mpsc::Sender<Applied>,
    /// What was said last.
    said: u64,
}

/// What a connection was made with: the node SVID's generation (0 without one) and the bundle's epoch.
type Epoch = (u64, u64);

impl Line {
    /// To the authority at `address` (`host:port`) from `node`, whose SVID is taken from `trust` once it is
    /// there.
    pub fn new(address: String, node: SpiffeId, trust: Arc<Trust>) -> Self {
        let (nodes, channel) = (std::sync::Mutex::default(), Mutex::new(None));
        Self { address, node, trust, nodes, channel }
    }

    /// What the node shows itself with, if it has something good. Where a clock that was ahead has been set back, the
    /// newest may not have begun yet, and the one before still be good.
    fn own(&self, trust: &Snapshot, now: SystemTime) -> Option<Arc<X509Svid>> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = trust.svids.get(&self.node)?;
        if nodes.first().is_none_or(|known| known.generation() != newest.generation()) {
            nodes.insert(0, Arc::clone(newest));
            nodes.truncate(2);
        }
        let has_begun = newest.leaf().not_before <= now;
        nodes.iter().take(if has_begun { 1 } else { 2 }).find(|svid| trust.is_good(svid, now)).cloned()
    }

    /// A channel, once the node has an SVID to show.
    ///
    /// # Errors
    /// When no TLS configuration can be made.
    pub async fn attested(&self) -> Result<Channel, IssueError> {
        self.trust.holding(&[&self.node]).await;
        self.channel().await
    }

    async fn channel(&self) -> Result<Channel, IssueError> {
        let now = self.trust.snapshot();
        // Once the authority accepts it no longer, the node attests itself anew.
        let svid = self.own(&now, SystemTime::now());
        let epoch = (svid.as_ref().map_or(0, |svid| svid.generation()), now.bundle_epoch);
        let mut held = self.channel.lock().await;
        if let Some((made_with, channel)) = held.as_ref()
            && *made_with == epoch
        {
            return Ok(channel.clone());
        }
        let expected = SpiffeId::authority(now.bundle.domain());
        let config = match svid {
            Some(svid) => tls::client::config(&svid, &now.bundle, expected),
            None => tls::client::anonymous(&now.bundle, expected, tls::ALPN_H2),
        };
        let config = config.map_err(|e| IssueError::Ours(e.to_string()))?;
        let connector = TlsConnector::from(config);
        let address = self.address.clone();
        let connect = move |_: Uri| {
            let (connector, address) = (connector.clone(), address.clone());
            async move { grpc::connect(connector, address, None).await.map(TokioIo::new) }
        };
        // The URI only fills HTTP's place; the connector dials the configured address.
        let endpoint = Endpoint::from_static("http://authority.hauberk")
            .timeout(CALL_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(connect));
        *held = Some((epoch, channel.clone()));
        Ok(channel)
    }
}

impl AuthorityIssuer {
    /// Asks the authority at `address` (`host:port`) on behalf of `node`, whose SVID is taken from
    /// `trust` once it is there.
    pub fn new(address: String, join_token: Option<PathBuf>, node: SpiffeId, trust: Arc<Trust>) -> Self {
        Self { line: Line::new(address, node, trust), join_token, bundles: Mutex::new(None) }
    }

    async fn client(&self) -> Result<AuthorityClient<Channel>, IssueError> {
        self.line.channel().await.map(|channel| self.limited(channel))
    }

    fn limited(&self, channel: Channel) -> AuthorityClient<Channel> {
        AuthorityClient::new(channel).max_decoding_message_size(wire::MAX_BUNDLE_BYTES)
    }

    async fn ask(&self, id: &SpiffeId, csr: &[u8]) -> Result<Issued, IssueError> {
        let now = self.line.trust.snapshot();
        let attested = self.line.own(&now, SystemTime::now()).is_some();
        let held_until = now.svids.get(id).map_or(0, |svid| seconds(svid.leaf().not_after));
        let mut client = self.client().await?;
        let answer = if attested {
            let (spiffe_id, csr, generation) = (id.to_string(), csr.to_vec(), now.bundle.generation());
            let request = IssueRequest { spiffe_id, csr, held_until, generation };
            client.issue(request).await
        } else if *id == self.line.node {
            let join_token = self.token()?;
            let node = id.node_name().unwrap_or_default().to_owned();
            client.attest(AttestRequest { node, join_token, csr: csr.to_vec() }).await
        } else {
            return Err(IssueError::Ours("the node itself has no valid SVID yet".into()));
        };
        self.issued(answer.map_err(|status| self.failed(&status))?.into_inner())
    }

    fn token(&self) -> Result<String, IssueError> {
        let path = self.join_token.as_ref().ok_or_else(|| {
            IssueError::Ours("this node has no SVID and no join token: make one with `hauberk authority token` and name its file in authority.joinToken".into())
        })?;
        let text = std::fs::read_to_string(path)
            .map_err(|e| IssueError::Ours(format!("cannot read the join token {}: {e}", path.display())))?;
        Ok(text.trim().to_owned())
    }

    fn issued(&self, svid: Svid) -> Result<Issued, IssueError> {
        // Without roots those that are held have to verify it, which is checked like everything else.
        let bundle = svid.bundle.map(|bundle| self.bundle(bundle)).transpose()?;
        let chain = svid.chain.into_iter().map(CertificateDer::from).collect();
        Ok(Issued { chain, bundle })
    }

    fn bundle(&self, bundle: Bundle) -> Result<TrustBundle, IssueError> {
        let bundle = wire::read(bundle).map_err(|e| self.unusable(&e.to_string()))?;
        let held = Arc::clone(&self.line.trust.snapshot().bundle);
        if bundle.domain() != held.domain() {
            return Err(self.unusable(&format!("a bundle of another trust domain, {}", bundle.domain())));
        }
        if !bundle.supersedes(&held) {
            let (offered, known) = (bundle.generation(), held.generation());
            tracing::error!(
                offered,
                known,
                "the authority's roots are not newer than those known here, which stay in force: its state was put back, or it is another authority's; have its newest trust.json restored"
            );
        }
        let (offered, known) = (bundle.revocations().generation(), held.revocations().generation());
        // 0 is what a bundle without a list has.
        if offered > 0 && offered < known {
            tracing::warn!(
                offered,
                known,
                "the authority's revocations are older than those known here, which stay in force; any change at the authority makes its list the newer one"
            );
        }
        Ok(bundle)
    }

    /// Opens the stream, and says first which roots are applied here.
    async fn bundles(&self) -> Result<Bundles, IssueError> {
        let said = self.line.trust.snapshot().bundle.generation();
        // One word at a time is enough: only the latest counts, and the authority reads at once.
        let (applied, saying) = mpsc::channel(1);
        let first = Applied { generation: said };
        applied.try_send(first).map_err(|e| IssueError::Ours(e.to_string()))?;
        let answer = self.client().await?.watch_bundle(ReceiverStream::new(saying)).await;
        let sent = answer.map_err(|status| self.failed(&status))?.into_inner();
        Ok(Bundles { sent, applied, said })
    }

    async fn bundle_from_stream(&self) -> Result<TrustBundle, IssueError> {
        // The authority speaks to attested nodes only.
        self.line.trust.holding(&[&self.line.node]).await;
        let mut held = self.bundles.lock().await;
        let bundles = match held.as_mut() {
            Some(bundles) => bundles,
            None => held.insert(self.bundles().await?),
        };
        match next(bundles, &self.line.trust).await {
            Ok(Some(bundle)) => self.bundle(bundle),
            Ok(None) => {
                *held = None;
                Err(self.failed(&Status::unavailable("the authority ended the stream")))
            }
            Err(status) => {
                *held = None;
                Err(self.failed(&status))
            }
        }
    }

    fn unusable(&self, detail: &str) -> IssueError {
        IssueError::Unusable { issuer: self.name(), detail: detail.to_owned() }
    }

    fn failed(&self, status: &Status) -> IssueError {
        grpc::failed(self.name(), status, "")
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The next bundle. Meanwhile the authority hears whenever other roots are applied here: with an SVID come
/// roots too.
async fn next(bundles: &mut Bundles, trust: &Trust) -> Result<Option<Bundle>, Status> {
    let mut changes = trust.subscribe_bundle();
    loop {
        let applied = trust.snapshot().bundle.generation();
        if applied != bundles.said {
            // A stream that has ended says so below.
            let _ = bundles.applied.send(Applied { generation: applied }).await;
            bundles.said = applied;
        }
        tokio::select! {
            next = bundles.sent.message() => return next,
            // The sender lives as long as `trust`.
            _ = changes.changed() => {}
        }
    }
}

impl Signer for AuthorityIssuer {
    fn kind(&self) -> IssuerKind {
        IssuerKind::Authority
    }

    fn name(&self) -> String {
        format!("the authority at {}", self.line.address)
    }

    fn sign<'a>(&'a self, id: &'a SpiffeId, csr: &'a [u8]) -> BoxFuture<'a, Result<Issued, IssueError>> {
        Box::pin(self.ask(id, csr))
    }

    fn next_bundle(&self) -> BoxFuture<'_, Result<TrustBundle, IssueError>> {
        Box::pin(self.bundle_from_stream())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::{Ca, ProvenKey, create_root};
    use crate::identity::TrustDomain;
    use crate::identity::revocation::{Revocations, Subject};
    use crate::issue::Keypair;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn after_a_clock_came_back_the_node_shows_the_svid_that_is_good() {
        let now = SystemTime::now();
        let domain = TrustDomain::parse("td.test").unwrap();
        let ca = Ca::from_pem(domain.clone(), &create_root(&domain, now - HOUR).unwrap()).unwrap();
        let trust = Trust::new(ca.bundle().clone());
        let id = SpiffeId::node(&domain, "n1").unwrap();
        let issuer = AuthorityIssuer::new("a:1".into(), None, id.clone(), Arc::clone(&trust));
        let take = |issued: SystemTime| {
            let key = Keypair::generate().unwrap();
            let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
            trust.insert(key.with_chain(ca.issue(&proven, &id, HOUR, issued).unwrap()).unwrap());
            trust.svid(&id).unwrap().generation()
        };
        let shown = |at| issuer.line.own(&trust.snapshot(), at).map(|svid| svid.generation());
        assert_eq!(shown(now), None, "nothing is held");
        let first = take(now);
        assert_eq!(shown(now), Some(first));
        // The clock is half an hour ahead, and then right again.
        let second = take(now + HOUR / 2);
        assert_eq!(shown(now + HOUR / 2), Some(second));
        assert_eq!(shown(now), Some(first), "the newest has not begun");
        assert_eq!(shown(now + 2 * HOUR), None, "both have expired");
        let mut list = Revocations::default();
        list.revoke(Subject::SpiffeId(id.clone()), now).unwrap();
        trust.set_revocations(list);
        assert_eq!(shown(now), None, "both are revoked");
    }
}
