//! The authority's own protocol, answered by a server that is busy when it shall be: what the agent makes of that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hauberk::authority::proto::authority_server::{Authority, AuthorityServer};
use hauberk::authority::proto::{Applied, AttestRequest, Bundle, IssueRequest, Svid};
use hauberk::authority::wire;
use hauberk::config::issuer::{AuthorityClientConfig, IssuerConfig};
use hauberk::identity::SpiffeId;
use hauberk::identity::revocation::{Revocations, Subject};
use hauberk::issue::{Keypair, configured};
use hauberk::rotate::Moment;
use rustls::pki_types::CertificateDer;
use tonic::{Request, Response, Status, Streaming};

use super::mesh::{Dir, Mesh, Rotation, domain, node, over_tls, trust, wait_until, web};

/// What it wants of whoever comes while it is busy. More than an agent would wait by itself.
const COME_BACK: Duration = Duration::from_secs(4);

/// An authority that has no room for the first two who ask for a workload's SVID.
struct Busy {
    mesh: Arc<Mesh>,
    asked: Arc<Mutex<Vec<Instant>>>,
}

impl Busy {
    fn svid(&self, csr: &[u8], id: &SpiffeId) -> Response<Svid> {
        let bundle = Some(wire::roots(self.mesh.ca.bundle()));
        Response::new(Svid { chain: vec![self.mesh.sign(csr, id, 600)], bundle })
    }
}

#[tonic::async_trait]
impl Authority for Busy {
    async fn attest(&self, request: Request<AttestRequest>) -> Result<Response<Svid>, Status> {
        Ok(self.svid(&request.into_inner().csr, &node()))
    }

    async fn issue(&self, request: Request<IssueRequest>) -> Result<Response<Svid>, Status> {
        let request = request.into_inner();
        let before = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(Instant::now());
            asked.len() - 1
        };
        if before < 2 {
            let mut busy = Status::resource_exhausted("too much waits to be signed; ask again in 4 s");
            busy.metadata_mut().insert("retry-after", COME_BACK.as_secs().into());
            return Err(busy);
        }
        Ok(self.svid(&request.csr, &SpiffeId::parse(&request.spiffe_id).unwrap()))
    }

    type WatchBundleStream = tokio_stream::Pending<Result<Bundle, Status>>;

    async fn watch_bundle(
        &self,
        _: Request<Streaming<Applied>>,
    ) -> Result<Response<Self::WatchBundleStream>, Status> {
        Ok(Response::new(tokio_stream::pending()))
    }
}

/// Serves it as the authority.
async fn serve(authority: Busy) -> SocketAddr {
    let key = Keypair::generate().unwrap();
    let leaf = authority.mesh.sign(&key.csr().unwrap(), &SpiffeId::authority(&domain()), 600);
    let svid = key.with_chain(vec![CertificateDer::from(leaf)]).unwrap();
    let config = hauberk::tls::server::config_with_anonymous_clients(&svid, authority.mesh.ca.bundle());
    let server = tonic::transport::Server::builder().add_service(AuthorityServer::new(authority));
    over_tls(server, config.unwrap()).await
}

#[tokio::test]
async fn whoever_is_told_when_to_come_back_comes_no_sooner_and_says_so() {
    let (dir, mesh, asked) = (Dir::new(), Arc::new(Mesh::new()), Arc::default());
    let address = serve(Busy { mesh: Arc::clone(&mesh), asked: Arc::clone(&asked) }).await;
    let config = AuthorityClientConfig {
        address: address.to_string(),
        trust_bundle: dir.write("bundle.pem", &mesh.root),
        join_token: Some(dir.write("token", "a token\n")),
    };
    let trust = trust(mesh.ca.bundle().clone());
    let issuer = configured(&IssuerConfig::Authority(config), node(), Arc::clone(&trust));
    let rotation = Rotation::start(&trust, &issuer, Some(node()), &dir.0);
    let standing = || rotation.status.now().get(&web()).cloned().unwrap();
    let refused =
        |failures| rotation.status.now().get(&web()).is_some_and(|standing| standing.failures == failures);
    wait_until("it is sent away", || refused(1)).await;
    let told = standing();
    let error = told.last_error.clone().unwrap();
    assert!(error.contains("ask again in 4 s"), "{error}");
    let wait = told.asked(Moment::now()).expect("it says how long");
    assert!(wait <= COME_BACK && wait > COME_BACK / 2, "{wait:?}");
    wait_until("it is sent away again", || asked.lock().unwrap().len() == 2).await;
    // News that may change an issuer's mind gives it no room.
    let mut list = Revocations::default();
    let other = SpiffeId::workload(&domain(), "shop", "other").unwrap();
    list.revoke(Subject::SpiffeId(other), SystemTime::now()).unwrap();
    trust.set_revocations(list);
    wait_until("it has its SVID", || rotation.serial(&web()).is_some()).await;
    assert!(standing().asked(Moment::now()).is_none() && standing().last_error.is_none());
    let asked = asked.lock().unwrap().clone();
    for pair in asked.windows(2) {
        let between = pair[1] - pair[0];
        assert!(between >= COME_BACK, "it came back after {between:?}");
    }
    assert_eq!(asked.len(), 3, "{asked:?}");
}
