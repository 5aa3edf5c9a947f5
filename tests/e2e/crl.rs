//! CRLs of a CA that is not our authority, from the file to the live connection: who is revoked is out, the others
//! notice nothing, and a list that nobody renews lets nobody in.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use hauberk::ca::{Ca, ProvenKey, create_root};
use hauberk::identity::svid::Leaf;
use hauberk::identity::{SpiffeId, TrustDomain};
use hauberk::issue::{Keypair, pem};
use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use tests::host::bin;
use tests::{Mode, Options, World, wait_until};

/// How long a loaded machine may take.
const SOON: Duration = Duration::from_secs(20);

/// Somebody else's CA, whose tools write files.
struct Outside {
    ca: Ca,
    signer: Issuer<'static, KeyPair>,
    domain: TrustDomain,
}

impl Outside {
    fn new() -> Self {
        let domain = TrustDomain::parse(tests::world::TRUST_DOMAIN).unwrap();
        let text = create_root(&domain, SystemTime::now()).unwrap();
        let root = CertificateDer::from_pem_slice(text.as_bytes()).unwrap();
        let key = KeyPair::from_pem(&text[text.find("-----BEGIN PRIVATE").unwrap()..]).unwrap();
        let signer = Issuer::from_ca_cert_der(&root, key).unwrap();
        Self { ca: Ca::from_pem(domain.clone(), &text).unwrap(), signer, domain }
    }

    /// Writes an SVID; its serial number.
    fn svid(&self, dir: &Path, name: &str, id: &SpiffeId) -> String {
        let key = Keypair::generate().unwrap();
        let proven = ProvenKey::from_csr(&key.csr().unwrap()).unwrap();
        let chain = self.ca.issue(&proven, id, Duration::from_secs(3600), SystemTime::now()).unwrap();
        write(&dir.join(name), &(pem("CERTIFICATE", &chain[0]) + &key.to_pem()));
        Leaf::from_der(&chain[0]).unwrap().serial
    }

    fn crl(&self, file: &Path, number: u64, serials: &[&str], valid: Duration) {
        let now = SystemTime::now();
        let bytes = |hex: &str| -> Vec<u8> {
            (0..hex.len() / 2).map(|at| u8::from_str_radix(&hex[2 * at..][..2], 16).unwrap()).collect()
        };
        let revoked = |serial: &&str| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&bytes(serial)),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + valid).into(),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        write(file, &params.signed_by(&self.signer).unwrap().pem().unwrap());
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path.with_extension("new"), text).unwrap();
    std::fs::rename(path.with_extension("new"), path).unwrap();
}

fn reaches(world: &World, from: &str, to: &str) -> bool {
    world.get(from).host.actor(&["poke", to]).unwrap()["end"] == "data"
}

fn status(world: &World) -> Value {
    let config = world.agent_ref("n2").config().to_string_lossy().into_owned();
    let out = world.host("n2").run(&bin("hauberk").unwrap(), &["status", "-o", "json", "--config", &config]);
    serde_json::from_str(&out.unwrap().ok().unwrap()).unwrap()
}

fn revoked_client_is_out_and_the_rest_stays(node_scope: bool) {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let issuer = Some("{files: {directory: DIR/svids, trustBundle: DIR/roots.pem}}".into());
    let mut world = World::new(Options { issuer, node_scope, ..Options::default() }).unwrap();
    let crl = world.dir().join("outside.crl");
    let yaml = format!("drainSeconds: 5\nrevocation: {{crls: [{{file: {}}}]}}\n", crl.display());
    world.configure(|options| options.agent_yaml = yaml);
    for (pod, node) in [("client", "n1"), ("other", "n1"), ("server", "n2")] {
        world.pod(pod, node, Mode::Strict).unwrap();
    }
    let outside = Outside::new();
    let mut serial = String::new();
    for (node, pods) in [("n1", &["client", "other"][..]), ("n2", &["server"])] {
        let dir = world.dir().join(node);
        outside.svid(&dir.join("svids"), "node.pem", &SpiffeId::node(&outside.domain, node).unwrap());
        for pod in pods {
            let id = SpiffeId::workload(&outside.domain, "demo", pod).unwrap();
            let of = outside.svid(&dir.join("svids"), &format!("{pod}.pem"), &id);
            if *pod == "client" {
                serial = of;
            }
        }
        write(&dir.join("roots.pem"), &pem("CERTIFICATE", &outside.ca.bundle().roots()[0]));
    }
    outside.crl(&crl, 1, &[], DAY);
    world.start().unwrap();

    let to = world.get("server").v4(8080);
    let _echo = world.get("server").host.actor_server(&["echo", "0.0.0.0:8080"]).unwrap();
    let mut live = world.get("client").host.actor_server(&["stay", &to]).unwrap();
    let _unconcerned = world.get("other").host.actor_server(&["stay", &to]).unwrap();
    wait_until(SOON, "both are connected", || {
        world.agent_ref("n2").metric("hauberk_connections_open", &["inbound"]).unwrap() == 2.0
    });
    let began = Instant::now();
    outside.crl(&crl, 2, &[&serial], DAY);
    assert_eq!(live.said().unwrap()["ended"], "reset");
    println!("a live connection was reset {:?} after the CRL had been written", began.elapsed());
    // The first of the two agents that read it ended the connection.
    let in_force = |node: &str| {
        let log = world.agent_ref(node).log();
        log.lines().any(|line| line.contains("a CRL is in force") && line.ends_with("entries=1"))
    };
    wait_until(SOON, "both agents have it", || in_force("n1") && in_force("n2"));
    assert!(!reaches(&world, "client", &to), "nor is a new one made");
    assert!(reaches(&world, "other", &to));
    let open = || world.agent_ref("n2").metric("hauberk_connections_open", &["inbound"]).unwrap();
    wait_until(SOON, "the other's old connection is the only one left", || open() == 1.0);
    let labels = ["outbound", "reason=\"revoked\""];
    world.agent_ref("n1").wait_metric("hauberk_connections_total", &labels, 1.0).unwrap();
    wait_until(SOON, "the log says why", || {
        world.agent_ref("n1").log().contains(&format!("serial {serial} in the CRL"))
    });

    // What is no good list changes nothing.
    for (bad, says) in [("spoilt", "neither DER nor PEM"), ("", "neither DER nor PEM")] {
        write(&crl, bad);
        wait_until(SOON, "the fault is told", || status(&world)["crlErrors"].to_string().contains(says));
        assert!(reaches(&world, "other", &to) && !reaches(&world, "client", &to));
    }
    Outside::new().crl(&crl, 3, &[], DAY);
    wait_until(SOON, "another CA's signature is no good", || {
        status(&world)["crlErrors"].to_string().contains("signature")
    });
    outside.crl(&crl, 1, &[], DAY);
    wait_until(SOON, "nor is an older list", || status(&world)["crlErrors"].to_string().contains("older"));
    assert!(reaches(&world, "other", &to) && !reaches(&world, "client", &to));
    assert_eq!(world.agent_ref("n2").metric("hauberk_crls_unusable", &[]).unwrap(), 1.0);
    outside.crl(&crl, 3, &[&serial], DAY);
    wait_until(SOON, "a good one mends it", || status(&world)["crlErrors"] == Value::Array(Vec::new()));

    // A list whose time is over lets nobody in, and cuts who is.
    outside.crl(&crl, 4, &[], Duration::from_secs(3));
    wait_until(SOON, "nobody knows what is revoked", || !reaches(&world, "other", &to));
    wait_until(SOON, "and the live connection is cut", || open() == 0.0);
    wait_until(SOON, "and the operator is told", || {
        status(&world)["crlErrors"].to_string().contains("overdue")
    });
    outside.crl(&crl, 5, &[&serial], DAY);
    wait_until(SOON, "until the next list", || reaches(&world, "other", &to));
    assert!(!reaches(&world, "client", &to));
    // Who restarts without the file remembers.
    std::fs::remove_file(&crl).unwrap();
    for node in ["n1", "n2"] {
        world.agent(node).restart().unwrap();
    }
    wait_until(SOON, "the others are served again", || reaches(&world, "other", &to));
    assert!(!reaches(&world, "client", &to), "the restart has forgotten who is revoked");
    assert!(status(&world)["crlErrors"].to_string().contains("cannot read it"), "{}", status(&world));
    // Somebody's tool renews it.
    let id = SpiffeId::workload(&outside.domain, "demo", "client").unwrap();
    outside.svid(&world.dir().join("n1/svids"), "client.pem", &id);
    wait_until(SOON, "the client's next certificate is another one", || reaches(&world, "client", &to));
}

#[test]
fn a_crl_acts_on_everything_in_node_scope() {
    revoked_client_is_out_and_the_rest_stays(true);
}

#[test]
fn a_crl_acts_on_everything_in_workload_scope() {
    revoked_client_is_out_and_the_rest_stays(false);
}
