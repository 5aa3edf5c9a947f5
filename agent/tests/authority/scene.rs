//! A real authority in this process, and clients that say what they like.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hauberk::authority::proto::authority_client::AuthorityClient;
use hauberk::authority::proto::{AttestRequest, IssueRequest, Svid};
use hauberk::authority::{self, AuthorityConfig};
use hauberk::ca::state::TrustState;
use hauberk::ca::store::Store;
use hauberk::identity::bundle::TrustBundle;
use hauberk::identity::svid::X509Svid;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::Keypair;
use hauberk::tls;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};

pub(crate) const SOON: Duration = Duration::from_secs(30);

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

pub(crate) fn workload(name: &str) -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", name).unwrap()
}

/// A directory, removed at the end, and an authority on it while it is started.
pub(crate) struct Scene {
    pub(crate) dir: PathBuf,
    pub(crate) listen: SocketAddr,
    admin: SocketAddr,
    running: Option<(CancellationToken, JoinHandle<anyhow::Result<()>>)>,
}

impl Scene {
    /// The directory alone. `web` runs on `n1`, `db` on `n2`.
    pub(crate) fn new(more: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("hauberk-authority-{:x}", fastrand::u64(..)));
        fs::create_dir(&dir).unwrap();
        let on = |name: &str, node: &str, address: &str| {
            format!(
                "- {{name: {name}, namespace: shop, serviceAccount: {name}, node: {node}, addresses: [{address}]}}\n"
            )
        };
        let workloads = on("web", "n1", "10.0.0.1") + &on("db", "n2", "10.0.0.2");
        fs::write(dir.join("directory.yaml"), format!("workloads:\n{workloads}")).unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (listen, admin) = (free(), free());
        let config = format!(
            "trustDomain: {}\nstateDir: {1}/state\ndirectory: {{file: {1}/directory.yaml}}\nlisten: {listen}\nadmin: {admin}\n{more}",
            domain(),
            dir.display(),
        );
        fs::write(dir.join("authority.yaml"), config).unwrap();
        Self { dir, listen, admin, running: None }
    }

    /// With an authority that serves.
    pub(crate) async fn started(more: &str) -> Self {
        let mut scene = Self::new(more);
        scene.start().await;
        scene
    }

    pub(crate) fn config(&self) -> AuthorityConfig {
        AuthorityConfig::load(&self.dir.join("authority.yaml")).unwrap()
    }

    pub(crate) async fn start(&mut self) {
        let stop = CancellationToken::new();
        let task = tokio::spawn(authority::run(self.config(), stop.clone()));
        let connected = async {
            while TcpStream::connect(self.listen).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(SOON, connected).await.expect("the authority serves");
        self.running = Some((stop, task));
    }

    pub(crate) async fn stop(&mut self) {
        if let Some((stop, task)) = self.running.take() {
            stop.cancel();
            task.abort();
            let _ = task.await;
            wait_until("nobody listens", async || TcpStream::connect(self.listen).await.is_err()).await;
        }
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(&self.dir.join("state")).unwrap()
    }

    pub(crate) fn state(&self) -> TrustState {
        self.store().trust(&domain()).unwrap().unwrap()
    }

    pub(crate) fn bundle(&self) -> TrustBundle {
        self.state().bundle().unwrap()
    }

    /// A token for a node, made at some time for a minute.
    pub(crate) fn token(&self, node: &str, now: SystemTime) -> String {
        self.store().new_token(node, Duration::from_secs(60), now).unwrap()
    }

    /// One connection, as whoever has this SVID or as nobody, that trusts `bundle`.
    pub(crate) async fn channel(
        &self,
        svid: Option<&X509Svid>,
        bundle: &TrustBundle,
    ) -> Result<Channel, String> {
        let expected = SpiffeId::authority(&domain());
        let config = match svid {
            Some(svid) => tls::client::config(svid, bundle, expected),
            None => tls::client::anonymous(bundle, expected, tls::ALPN_H2),
        };
        let (connector, listen) = (TlsConnector::from(config.unwrap()), self.listen);
        let connect = move |_: Uri| {
            let connector = connector.clone();
            async move {
                let tcp = TcpStream::connect(listen).await?;
                connector.connect(ServerName::IpAddress(listen.ip().into()), tcp).await.map(TokioIo::new)
            }
        };
        let endpoint = Endpoint::from_static("http://authority.test");
        let channel = endpoint.connect_with_connector(tower::service_fn(connect)).await;
        channel.map_err(|error| format!("{error:?}"))
    }

    pub(crate) async fn client(&self, svid: Option<&X509Svid>) -> AuthorityClient<Channel> {
        AuthorityClient::new(self.channel(svid, &self.bundle()).await.unwrap())
    }

    pub(crate) async fn attest(&self, node: &str, join_token: String, csr: Vec<u8>) -> Result<Svid, Status> {
        let request = AttestRequest { node: node.into(), join_token, csr };
        self.client(None).await.attest(request).await.map(tonic::Response::into_inner)
    }

    /// The SVID of a node that joins.
    pub(crate) async fn join(&self, node: &str) -> X509Svid {
        let key = Keypair::generate().unwrap();
        let token = self.token(node, SystemTime::now());
        let svid = self.attest(node, token, key.csr().unwrap()).await.unwrap();
        complete(&key, svid)
    }

    pub(crate) async fn issue(&self, node: &X509Svid, id: &SpiffeId) -> Result<X509Svid, Status> {
        let key = Keypair::generate().unwrap();
        let issued = self.ask(node, id.as_str(), key.csr_for(id).unwrap()).await?;
        Ok(complete(&key, issued))
    }

    /// Asks with any CSR for anything.
    pub(crate) async fn ask(&self, node: &X509Svid, id: &str, csr: Vec<u8>) -> Result<Svid, Status> {
        let request = IssueRequest { spiffe_id: id.into(), csr, held_until: 0 };
        self.client(Some(node)).await.issue(request).await.map(tonic::Response::into_inner)
    }

    /// The sample of the authority's metrics that begins with this.
    pub(crate) async fn metric(&self, sample: &str) -> f64 {
        let mut tcp = TcpStream::connect(self.admin).await.unwrap();
        tcp.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut page = String::new();
        tcp.read_to_string(&mut page).await.unwrap();
        let value = page.lines().find_map(|line| line.strip_prefix(sample));
        value.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    pub(crate) async fn refused(&self, reason: &str) -> f64 {
        self.metric(&format!("hauberk_authority_refused_total{{reason=\"{reason}\"}}")).await
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if let Some((stop, task)) = self.running.take() {
            stop.cancel();
            task.abort();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Chain and key together.
pub(crate) fn complete(key: &Keypair, svid: Svid) -> X509Svid {
    key.with_chain(svid.chain.into_iter().map(CertificateDer::from).collect()).unwrap()
}

/// Waits for something of the authority.
pub(crate) async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(SOON, async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// Roots and node as an agent knows them.
pub(crate) fn trust(bundle: TrustBundle) -> Arc<hauberk::trust::Trust> {
    hauberk::trust::Trust::new(bundle)
}
