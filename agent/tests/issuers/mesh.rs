//! What the tests share: a mesh's CA, a directory of their own, and a rotation that runs.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::bundle::TrustBundle;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::keep::Keep;
pub(crate) use hauberk::issue::pem;
use hauberk::issue::{Issuer, Keypair};
use hauberk::rotate::{Rotator, Status, follow_bundle};
use hauberk::telemetry::{Metrics, Observe};
use hauberk::trust::Trust;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::server::Router;

pub(crate) fn domain() -> TrustDomain {
    TrustDomain::parse("td.test").unwrap()
}

pub(crate) fn node() -> SpiffeId {
    SpiffeId::node(&domain(), "n1").unwrap()
}

pub(crate) fn web() -> SpiffeId {
    SpiffeId::workload(&domain(), "shop", "web").unwrap()
}

/// A directory that goes with the test.
pub(crate) struct Dir(pub(crate) PathBuf);

impl Dir {
    pub(crate) fn new() -> Self {
        let path = std::env::temp_dir().join(format!("hauberk-issuers-{:x}", fastrand::u64(..)));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Renamed into place: nobody reads half a file.
    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path.with_extension("new"), text).unwrap();
        std::fs::rename(path.with_extension("new"), &path).unwrap();
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A mesh's CA, and its root as PEM.
pub(crate) struct Mesh {
    pub(crate) ca: Ca,
    pub(crate) root: String,
}

impl Mesh {
    pub(crate) fn new() -> Self {
        let ca = Ca::from_pem(domain(), &create_root(&domain(), SystemTime::now()).unwrap()).unwrap();
        let root = pem("CERTIFICATE", &ca.bundle().roots()[0]);
        Self { ca, root }
    }

    /// Signs whatever the request is for, as `id`, for `seconds`.
    pub(crate) fn sign(&self, csr: &[u8], id: &SpiffeId, seconds: u64) -> Vec<u8> {
        let key = ProvenKey::from_csr(csr).unwrap();
        let chain = self.ca.issue(&key, id, Duration::from_secs(seconds), SystemTime::now()).unwrap();
        chain[0].to_vec()
    }

    /// A certificate and its key, both DER.
    pub(crate) fn pair(&self, id: &SpiffeId, seconds: u64) -> (Vec<u8>, Vec<u8>) {
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
        (self.sign(csr.der(), id, seconds), key.serialize_der())
    }

    /// The same as PEM.
    pub(crate) fn pem(&self, id: &SpiffeId, seconds: u64) -> (String, String) {
        let (leaf, key) = self.pair(id, seconds);
        (pem("CERTIFICATE", &leaf), pem("PRIVATE KEY", &key))
    }
}

pub(crate) fn trust(bundle: TrustBundle) -> Arc<Trust> {
    Trust::new(bundle)
}

/// A rotation for the node and `web` that runs until it is dropped.
pub(crate) struct Rotation {
    pub(crate) trust: Arc<Trust>,
    pub(crate) status: Arc<Status>,
    pub(crate) metrics: Arc<Metrics>,
    _tasks: JoinSet<()>,
    _wanted: watch::Sender<Vec<SpiffeId>>,
}

impl Rotation {
    pub(crate) fn start(
        trust: &Arc<Trust>,
        issuer: &Arc<dyn Issuer>,
        own: Option<SpiffeId>,
        dir: &Path,
    ) -> Self {
        let metrics = Arc::new(Metrics::new().unwrap());
        let observe = Observe::new(Arc::clone(&metrics));
        let keep = Keep::in_dir(dir);
        let rotator = Rotator::new(Arc::clone(trust), Arc::clone(issuer), own, keep, None, observe);
        let (wanted, wants) = watch::channel(vec![web()]);
        let status = rotator.status();
        let mut tasks = JoinSet::new();
        tasks.spawn(rotator.run(wants));
        tasks.spawn(follow_bundle(Arc::clone(trust), Arc::clone(issuer)));
        Self { trust: Arc::clone(trust), status, metrics, _tasks: tasks, _wanted: wanted }
    }

    /// The serial of the SVID held for an identity.
    pub(crate) fn serial(&self, id: &SpiffeId) -> Option<String> {
        self.trust.svid(id).map(|svid| svid.leaf().serial.clone())
    }

    /// A sample of the metrics.
    pub(crate) fn asked(&self, issuer: &str, outcome: &str) -> f64 {
        let page = self.metrics.render(
            &self.trust.snapshot(),
            Default::default(),
            &hauberk::telemetry::metrics::PolicyStanding { counts: Vec::new(), stale: false },
            hauberk::telemetry::metrics::Margin::default(),
            0,
        );
        let sample = format!("hauberk_svid_requests_total{{issuer=\"{issuer}\",outcome=\"{outcome}\"}} ");
        let line = page.lines().find_map(|line| line.strip_prefix(&sample)).unwrap();
        line.parse().unwrap()
    }
}

pub(crate) async fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(std::time::Instant::now() < until, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks once, and judges the answer as the rotation does; what was wrong, in words.
pub(crate) async fn obtain(
    issuer: &Arc<dyn Issuer>,
    id: &SpiffeId,
    bundle: &TrustBundle,
) -> Result<usize, String> {
    let obtained = issuer.obtain(id).await.map_err(|error| error.to_string())?;
    hauberk::issue::check(&obtained.svid, id, obtained.bundle.as_ref().unwrap_or(bundle), SystemTime::now())?;
    Ok(obtained.svid.certified_key().cert.len())
}

/// Another's key, certified for `id`: what a confused CA might answer.
pub(crate) fn other_key(mesh: &Mesh, id: &SpiffeId) -> Vec<u8> {
    mesh.sign(&Keypair::generate().unwrap().csr().unwrap(), id, 600)
}

/// Serves gRPC over TLS; where.
pub(crate) async fn over_tls(server: Router, config: Arc<rustls::ServerConfig>) -> SocketAddr {
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let behind = plain.local_addr().unwrap();
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(plain)));
    let acceptor = tokio_rustls::TlsAcceptor::from(config);
    let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = front.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = front.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut tls = acceptor.accept(tcp).await.ok()?;
                let mut server = TcpStream::connect(behind).await.ok()?;
                tokio::io::copy_bidirectional(&mut tls, &mut server).await.ok()
            });
        }
    });
    address
}
