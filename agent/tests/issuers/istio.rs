use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hauberk::config::issuer::{IssuerConfig, IstioConfig};
use hauberk::issue::istio::proto::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use hauberk::issue::istio::proto::{IstioCertificateRequest, IstioCertificateResponse};
use hauberk::issue::{Issuer, configured};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateSigningRequestDer, PrivatePkcs8KeyDer};
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509CertificationRequest};

use super::mesh::{
    Dir, Mesh, Rotation, domain, node, obtain, other_key, over_tls, pem, trust, wait_until, web,
};
use hauberk::identity::SpiffeId;

/// What the CA answers with.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Answer {
    Good,
    OtherIdentity,
    OtherKey,
    OtherRoot,
    NoPem,
    Denied,
}

/// A CA of the published protocol, that knows one token.
struct IstioCa {
    mesh: Arc<Mesh>,
    answer: Arc<Mutex<Answer>>,
}

#[tonic::async_trait]
impl IstioCertificateService for IstioCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name| request.metadata().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        if header("authorization").as_deref() != Some("Bearer the-token") || header("clusterid").is_none() {
            return Err(Status::unauthenticated("no such token"));
        }
        let request = request.into_inner();
        let whom = request.metadata.unwrap().fields.remove("ImpersonatedIdentity").unwrap();
        let Some(prost_types::value::Kind::StringValue(whom)) = whom.kind else { panic!("no text") };
        let csr = CertificateSigningRequestDer::from_pem_slice(request.csr.as_bytes()).unwrap();
        // istio-csr demands that the request names the identity too.
        assert_eq!(uris(&csr), std::slice::from_ref(&whom));
        assert_eq!(request.validity_duration, 600);
        let id = SpiffeId::parse(&whom).unwrap();
        let other = SpiffeId::workload(&domain(), "shop", "other").unwrap();
        let leaf = match *self.answer.lock().unwrap() {
            Answer::Good => self.mesh.sign(&csr, &id, 600),
            Answer::OtherIdentity => self.mesh.sign(&csr, &other, 600),
            Answer::OtherKey => other_key(&self.mesh, &id),
            Answer::OtherRoot => Mesh::new().sign(&csr, &id, 600),
            Answer::NoPem => {
                return Ok(Response::new(IstioCertificateResponse { cert_chain: vec!["leaf".into()] }));
            }
            Answer::Denied => return Err(Status::permission_denied("no such pod on this node")),
        };
        let cert_chain = vec![pem("CERTIFICATE", &leaf), self.mesh.root.clone()];
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

fn uris(csr: &[u8]) -> Vec<String> {
    let (_, csr) = X509CertificationRequest::from_der(csr).unwrap();
    let names = csr.requested_extensions().unwrap().find_map(|extension| match extension {
        ParsedExtension::SubjectAlternativeName(names) => Some(&names.general_names),
        _ => None,
    });
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    names.unwrap().iter().filter_map(uri).collect()
}

/// Serves it over TLS 1.3 as `localhost`; the PEM root that its server's certificate leads to.
async fn serve(mesh: Arc<Mesh>, answer: Arc<Mutex<Answer>>) -> (SocketAddr, String) {
    let service = IstioCertificateServiceServer::new(IstioCa { mesh, answer });
    let server = tonic::transport::Server::builder().add_service(service);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["localhost".into()]).unwrap().self_signed(&key).unwrap();
    let chain = vec![certificate.der().clone()];
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let mut config = rustls::ServerConfig::builder_with_provider(hauberk::tls::provider::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    (over_tls(server, Arc::new(config)).await, certificate.pem())
}

struct World {
    dir: Dir,
    mesh: Arc<Mesh>,
    answer: Arc<Mutex<Answer>>,
    issuer: Arc<dyn Issuer>,
    trust: Arc<hauberk::trust::Trust>,
}

async fn world() -> World {
    let (dir, mesh) = (Dir::new(), Arc::new(Mesh::new()));
    let answer = Arc::new(Mutex::new(Answer::Good));
    let (address, root) = serve(Arc::clone(&mesh), Arc::clone(&answer)).await;
    dir.write("token", "the-token\n");
    let config = IstioConfig {
        address: format!("localhost:{}", address.port()),
        trust_bundle: dir.write("bundle.pem", &mesh.root),
        server_bundle: Some(dir.write("server.pem", &root)),
        token: dir.0.join("token"),
        cluster_id: "Kubernetes".into(),
        lifetime: Duration::from_secs(600),
    };
    let trust = trust(mesh.ca.bundle().clone());
    let issuer = configured(&IssuerConfig::Istio(config), node(), Arc::clone(&trust));
    World { dir, mesh, answer, issuer, trust }
}

#[tokio::test]
async fn an_istio_ca_issues_identities_of_service_accounts_and_the_agent_needs_none_of_its_own() {
    let world = world().await;
    let rotation = Rotation::start(&world.trust, &world.issuer, None, &world.dir.0);
    wait_until("the workload's SVID is held", || rotation.serial(&web()).is_some()).await;
    assert_eq!(world.trust.svid(&web()).unwrap().certified_key().cert.len(), 1, "the root stays here");
    assert_eq!(rotation.asked("istio", "issued"), 1.0);
    assert_eq!(world.trust.snapshot().svids.len(), 1);
    let next = Mesh::new();
    world.dir.write("bundle.pem", &format!("{}{}", world.mesh.root, next.root));
    wait_until("a new root is trusted", || world.trust.snapshot().bundle.roots().len() == 2).await;
}

#[tokio::test]
async fn an_answer_that_is_not_what_was_asked_for_is_never_used() {
    let world = world().await;
    let ask = async || obtain(&world.issuer, &web(), world.mesh.ca.bundle()).await;
    for (answer, says) in [
        (Answer::OtherIdentity, "was issued spiffe://td.test/ns/shop/sa/other"),
        (Answer::OtherKey, "private key does not belong"),
        (Answer::OtherRoot, "leads to none of the 1 roots"),
        (Answer::NoPem, "chain is empty"),
        (Answer::Denied, "CA_TRUSTED_NODE_ACCOUNTS"),
    ] {
        *world.answer.lock().unwrap() = answer;
        let error = ask().await.unwrap_err();
        assert!(error.contains(says), "{answer:?}: {error}");
    }
    *world.answer.lock().unwrap() = Answer::Good;
    assert_eq!(ask().await, Ok(1));
    world.dir.write("token", "another");
    let error = ask().await.unwrap_err();
    assert!(error.contains("the Istio CA at localhost") && error.contains("audience"), "{error}");
    std::fs::remove_file(world.dir.0.join("token")).unwrap();
    let error = ask().await.unwrap_err();
    assert!(error.contains("issuer.istio.token"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_not_the_ca_is_shown_no_token() {
    let world = world().await;
    world.dir.write("server.pem", &Mesh::new().root);
    let error = obtain(&world.issuer, &web(), world.mesh.ca.bundle()).await.unwrap_err();
    assert!(error.contains("cannot be reached") && error.to_lowercase().contains("issuer"), "{error}");
}
