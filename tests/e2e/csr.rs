//! SVIDs by Kubernetes CertificateSigningRequests: a real API server, and a signer of a name of our own, played by the
//! test, that approves and signs by the API as any other would.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::pem;
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};
use tests::kubernetes::AGENT;
use tests::{Mode, Options, World, wait_until};

const SOON: Duration = Duration::from_secs(60);
const REQUESTS: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
const SIGNER: &str = "hauberk.test/mesh";
const ASKED: &str = "hauberk_svid_requests_total";

fn new_ca() -> Ca {
    let domain = TrustDomain::parse(tests::world::TRUST_DOMAIN).unwrap();
    let root = create_root(&domain, SystemTime::now()).unwrap();
    Ca::from_pem(domain, &root).unwrap()
}

/// Lets agents use the API of requests, and no more of it than they need.
fn grant(world: &mut World) {
    let (cluster, host) = world.kubernetes();
    let (path, api) = ("/apis/rbac.authorization.k8s.io/v1", "rbac.authorization.k8s.io/v1");
    let role = json!({
        "apiVersion": api, "kind": "ClusterRole", "metadata": {"name": "csr"},
        "rules": [{
            "apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"],
            "verbs": ["create", "get", "list", "watch", "delete"],
        }],
    });
    cluster.apply(host, &format!("{path}/clusterroles/csr"), &role).unwrap();
    let binding = json!({
        "apiVersion": api, "kind": "ClusterRoleBinding", "metadata": {"name": "csr"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "csr"},
        "subjects": [{"kind": "User", "name": AGENT, "apiGroup": "rbac.authorization.k8s.io"}],
    });
    cluster.apply(host, &format!("{path}/clusterrolebindings/csr"), &binding).unwrap();
}

fn requests(world: &mut World) -> Vec<Value> {
    let (cluster, host) = world.kubernetes();
    cluster.get(host, REQUESTS).unwrap()["items"].as_array().unwrap().clone()
}

fn put(world: &mut World, request: &Value, part: &str) {
    let (cluster, host) = world.kubernetes();
    let path = format!("{REQUESTS}/{}/{part}", request["metadata"]["name"].as_str().unwrap());
    // Its agent may have given the request up meanwhile.
    match cluster.ask(host, "PUT", &path, "application/json", &request.to_string()) {
        Ok(_) => {}
        Err(error) => assert!(error.to_string().contains("not found"), "{error:#}"),
    }
}

fn conditioned(request: &Value, kind: &str) -> Value {
    let mut request = request.clone();
    // Whatever the list leaves out.
    (request["apiVersion"], request["kind"]) =
        ("certificates.k8s.io/v1".into(), "CertificateSigningRequest".into());
    let condition = json!({"type": kind, "status": "True", "reason": "Test", "message": "says the test"});
    request["status"] = json!({"conditions": [condition]});
    request
}

/// Decides every open request: with a CA it is approved and signed for `seconds`, without one denied.
fn decide(world: &mut World, ca: Option<&Ca>, seconds: u64) {
    for request in requests(world) {
        if request["status"]["conditions"].is_array() {
            continue;
        }
        let spec = &request["spec"];
        assert_eq!((&spec["signerName"], &spec["username"]), (&json!(SIGNER), &json!(AGENT)));
        assert_eq!(spec["usages"], json!(["digital signature", "client auth", "server auth"]));
        let Some(ca) = ca else {
            put(world, &conditioned(&request, "Denied"), "approval");
            continue;
        };
        put(world, &conditioned(&request, "Approved"), "approval");
        let (cluster, host) = world.kubernetes();
        let path = format!("{REQUESTS}/{}", request["metadata"]["name"].as_str().unwrap());
        let Ok(mut approved) = cluster.get(host, &path) else { continue };
        let text = STANDARD.decode(spec["request"].as_str().unwrap()).unwrap();
        let csr = CertificateSigningRequestDer::from_pem_slice(&text).unwrap();
        let id = request["metadata"]["annotations"]["hauberk.dev/spiffe-id"].as_str().unwrap();
        let id = SpiffeId::parse(id).unwrap();
        // The request itself must name the identity, as a signer has nothing else to go by.
        let key = ProvenKey::for_id(&csr, &id).unwrap();
        let chain = ca.issue(&key, &id, Duration::from_secs(seconds), SystemTime::now()).unwrap();
        approved["status"]["certificate"] = STANDARD.encode(pem("CERTIFICATE", &chain[0])).into();
        put(world, &approved, "status");
    }
}

fn asked(world: &World, outcome: &str) -> f64 {
    let outcome = format!("outcome=\"{outcome}\"");
    world.agent_ref("n1").metric(ASKED, &["issuer=\"kubernetes\"", &outcome]).unwrap()
}

#[test]
fn agents_live_from_a_signer_of_requests_and_say_why_they_cannot() {
    let mut world = World::new(Options::default()).unwrap();
    world.add_kubernetes().unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    let kubeconfig = world.kubernetes().0.kubeconfig(AGENT);
    let issuer = format!(
        "{{kubernetes: {{signerName: {SIGNER}, trustBundle: DIR/roots.pem, kubeconfig: {}}}}}",
        kubeconfig.display()
    );
    world.configure(|options| options.issuer = Some(issuer));
    let ca = new_ca();
    for node in ["n1", "n2"] {
        std::fs::create_dir_all(world.dir().join(node)).unwrap();
        let root = pem("CERTIFICATE", &ca.bundle().roots()[0]);
        std::fs::write(world.dir().join(node).join("roots.pem"), root).unwrap();
    }
    world.prepare().unwrap();
    world.start_authority().unwrap();
    for node in ["n1", "n2"] {
        world.start_agent(node).unwrap();
    }
    wait_until(SOON, "the log says that the API may not be used, and what to grant", || {
        world.agent_ref("n1").log().contains("may the agent create, get, list, watch and delete")
    });
    grant(&mut world);
    wait_until(SOON, "both agents are ready", || {
        decide(&mut world, Some(&ca), 30);
        ["n1", "n2"].iter().all(|node| world.agent_ref(node).page("/readyz").is_ok_and(|it| it.0 == 200))
    });
    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let works = |world: &World| world.get("client").host.actor(&["poke", &to]).unwrap()["end"] == "data";
    assert!(works(&world));

    // Renewals are denied: what is held is used on, and the log says by whom and why.
    wait_until(SOON, "a denial is heard of", || {
        decide(&mut world, None, 0);
        asked(&world, "refused") >= 2.0
    });
    let log = world.agent_ref("n1").log();
    assert!(log.contains("was denied: Test: says the test"), "{}", world.agent_ref("n1").log_tail(10));
    assert!(works(&world));
    let issued = asked(&world, "issued");
    wait_until(SOON, "the next request is made, signed and used", || {
        decide(&mut world, Some(&ca), 600);
        asked(&world, "issued") >= issued + 2.0
    });
    assert!(works(&world));
    wait_until(SOON, "what has served is deleted", || {
        decide(&mut world, Some(&ca), 600);
        requests(&mut world).is_empty()
    });
}
