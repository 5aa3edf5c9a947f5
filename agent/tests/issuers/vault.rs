//! Against a real server: OpenBao, whose API is Vault's, with TLS, a PKI engine and two ways to log in.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use hauberk::config::CrlConfig;
use hauberk::config::issuer::{IssuerConfig, VaultAuth, VaultConfig};
use hauberk::crls::Keeper;
use hauberk::identity::SpiffeId;
use hauberk::identity::bundle::TrustBundle;
use hauberk::issue::{Issuer, configured};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::mesh::{Dir, Mesh, Rotation, domain, node, obtain, trust, wait_until, web};

fn program() -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache"))).unwrap();
    let program = cache.join("hauberk/bin/bao");
    assert!(program.exists(), "no OpenBao at {}: run `cargo xtask setup`", program.display());
    program
}

struct Bao {
    dir: Dir,
    server: Child,
    address: String,
}

impl Drop for Bao {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Bao {
    /// Starts a server with a PKI engine: a root, an intermediate that signs, and the role `mesh`.
    fn start() -> Self {
        let dir = Dir::new();
        std::fs::create_dir_all(dir.0.join("tls")).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // It dies with this thread, however that ends.
        let server = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program())
            .args(["server", "-dev", "-dev-tls", "-dev-no-store-token", "-dev-root-token-id=root"])
            .arg(format!("-dev-tls-cert-dir={}", dir.0.join("tls").display()))
            .arg(format!("-dev-listen-address=127.0.0.1:{port}"))
            .env("HOME", &dir.0)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let bao = Self { dir, server, address: format!("https://127.0.0.1:{port}") };
        let until = Instant::now() + Duration::from_secs(60);
        while bao.command(&["status"]).is_err() {
            assert!(Instant::now() < until, "the server does not come up");
            std::thread::sleep(Duration::from_millis(100));
        }
        bao.make_pki();
        bao
    }

    fn make_pki(&self) {
        let run = |args: &[&str]| self.command(args).unwrap();
        run(&["secrets", "enable", "-path=root", "pki"]);
        run(&["secrets", "enable", "pki"]);
        run(&["secrets", "tune", "-max-lease-ttl=100h", "root"]);
        let root =
            run(&["write", "-format=json", "root/root/generate/internal", "common_name=root", "key_type=ec"]);
        let root: Value = serde_json::from_str(&root).unwrap();
        self.dir.write("bundle.pem", root["data"]["certificate"].as_str().unwrap());
        let csr = run(&[
            "write",
            "-field=csr",
            "pki/intermediate/generate/internal",
            "common_name=mesh",
            "key_type=ec",
        ]);
        let csr = self.dir.write("intermediate.csr", &csr);
        let csr = format!("csr=@{}", csr.display());
        let signed = run(&["write", "-field=certificate", "root/root/sign-intermediate", &csr, "ttl=90h"]);
        let signed = self.dir.write("intermediate.pem", &format!("{signed}\n"));
        run(&["write", "pki/intermediate/set-signed", &format!("certificate=@{}", signed.display())]);
        run(&[
            "write",
            "pki/roles/mesh",
            "allowed_uri_sans=spiffe://td.test/*",
            "require_cn=false",
            "key_type=ec",
            "key_bits=256",
            "max_ttl=1h",
            "not_before_duration=60s",
        ]);
        let policy = self.dir.write("policy.hcl", "path \"pki/sign/mesh\" { capabilities = [\"update\"] }");
        run(&["policy", "write", "mesh", &policy.to_string_lossy()]);
    }

    fn command(&self, args: &[&str]) -> Result<String, String> {
        let output = Command::new(program())
            .args(args)
            .env("BAO_ADDR", &self.address)
            .env("BAO_TOKEN", "root")
            .env("BAO_CACERT", self.server_root())
            .env("HOME", &self.dir.0)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(text(&output.stdout))
        } else {
            Err(format!("{args:?}: {}", text(&output.stderr)))
        }
    }

    /// Where the server wrote its own CA's certificate: one of three files, beside a certificate and a key.
    fn server_root(&self) -> PathBuf {
        let files = std::fs::read_dir(self.dir.0.join("tls")).unwrap().flatten().map(|entry| entry.path());
        let is_root =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains("ca"));
        files.into_iter().find(is_root).unwrap_or_default()
    }

    fn config(&self, auth: VaultAuth) -> VaultConfig {
        VaultConfig {
            address: self.address.clone(),
            server_bundle: Some(self.server_root()),
            trust_bundle: self.dir.0.join("bundle.pem"),
            mount: "pki".into(),
            role: "mesh".into(),
            namespace: None,
            auth,
            lifetime: Some(Duration::from_secs(600)),
        }
    }

    fn bundle(&self) -> TrustBundle {
        TrustBundle::from_pem(domain(), &std::fs::read(self.dir.0.join("bundle.pem")).unwrap()).unwrap()
    }

    fn token(&self, policy: &str) -> VaultAuth {
        let token = self.command(&["token", "create", "-field=token", &format!("-policy={policy}")]).unwrap();
        VaultAuth::Token { file: self.dir.write("token", &token) }
    }

    fn issuer(&self, config: VaultConfig) -> (Arc<dyn Issuer>, Arc<hauberk::trust::Trust>) {
        let trust = trust(self.bundle());
        (configured(&IssuerConfig::Vault(config), node(), Arc::clone(&trust)), trust)
    }
}

#[tokio::test]
async fn vault_signs_by_its_role_and_what_it_will_not_sign_is_told() {
    let bao = Bao::start();
    let config = bao.config(bao.token("mesh"));
    let (issuer, trust) = bao.issuer(config.clone());
    let rotation = Rotation::start(&trust, &issuer, Some(node()), &bao.dir.0);
    wait_until("both are held", || rotation.serial(&node()).is_some() && rotation.serial(&web()).is_some())
        .await;
    let svid = trust.svid(&web()).unwrap();
    assert_eq!(svid.certified_key().cert.len(), 2, "the leaf and the intermediate, but not the root");
    let life = svid.leaf().not_after.duration_since(std::time::SystemTime::now()).unwrap();
    assert!(life <= Duration::from_secs(600), "as was asked for: {life:?}");
    assert_eq!(rotation.asked("vault", "issued"), 2.0);

    let bundle = bao.bundle();
    let stranger = SpiffeId::parse("spiffe://elsewhere.test/ns/shop/sa/web").unwrap();
    let error = obtain(&issuer, &stranger, &bundle).await.unwrap_err();
    assert!(error.contains("Vault at https://") && error.contains("allowed_uri_sans"), "{error}");
    let (other, _) =
        bao.issuer(VaultConfig { role: "none".into(), auth: bao.token("root"), ..config.clone() });
    let error = obtain(&other, &web(), &bundle).await.unwrap_err();
    assert!(error.contains("none") && error.contains("refused"), "{error}");
    let (denied, _) = bao.issuer(VaultConfig { auth: bao.token("default"), ..config.clone() });
    let error = obtain(&denied, &web(), &bundle).await.unwrap_err();
    assert!(error.contains("403") && error.contains("may the agent's token sign"), "{error}");
    bao.dir.write("stranger.pem", &Mesh::new().root);
    let stranger = VaultConfig { server_bundle: Some(bao.dir.0.join("stranger.pem")), ..config };
    let error = obtain(&bao.issuer(stranger).0, &web(), &bundle).await.unwrap_err();
    assert!(error.contains("cannot be reached"), "a server of other roots is shown no token: {error}");
}

/// A serial as Vault names it: two digits for each byte. Ours is a number, and begins with no zero.
fn in_bytes(serial: &str) -> String {
    let mut digits = serial.to_owned();
    if !digits.len().is_multiple_of(2) {
        digits.insert(0, '0');
    }
    digits.as_bytes().chunks(2).map(String::from_utf8_lossy).collect::<Vec<_>>().join(":")
}

#[test]
fn a_serial_of_an_odd_number_of_digits_is_named_by_its_bytes() {
    assert_eq!(in_bytes("abc"), "0a:bc");
    assert_eq!(in_bytes("0abc"), "0a:bc");
}

#[tokio::test]
async fn what_vault_revokes_in_its_crl_is_refused_under_its_intermediate() {
    let bao = Bao::start();
    let (issuer, trust) = bao.issuer(bao.config(bao.token("mesh")));
    let rotation = Rotation::start(&trust, &issuer, Some(node()), &bao.dir.0);
    wait_until("both are held", || rotation.serial(&node()).is_some() && rotation.serial(&web()).is_some())
        .await;
    let publish = || {
        let crl = bao.command(&["read", "-field=certificate", "pki/cert/crl"]).unwrap();
        bao.dir.write("pki.crl", &crl)
    };
    let config = CrlConfig { file: publish(), issuer: None, grace: Duration::ZERO };
    let keep = || hauberk::issue::keep::crls::CrlKeep::in_dir(&bao.dir.0);
    let without = Keeper::load(std::slice::from_ref(&config), Arc::clone(&trust), keep()).unwrap();
    let why = trust.snapshot().bundle.crls().0[0].unknown.clone().unwrap();
    assert!(why.contains("revocation.crls.issuer"), "an intermediate's list needs its certificate: {why}");
    drop(without);
    let issuer_file = Some(bao.dir.0.join("intermediate.pem"));
    let keeper =
        Keeper::load(&[CrlConfig { issuer: issuer_file, ..config }], Arc::clone(&trust), keep()).unwrap();
    assert_eq!(trust.snapshot().bundle.crls().0[0].unknown, None);
    let following = tokio::spawn(keeper.follow());
    let svid = trust.svid(&web()).unwrap();
    assert_eq!(trust.snapshot().revoked(svid.leaf()), None);
    let serial = in_bytes(&svid.leaf().serial);
    bao.command(&["write", "pki/revoke", &format!("serial_number={serial}")]).unwrap();
    publish();
    let leaves = [svid.leaf()];
    let revoked = tokio::time::timeout(Duration::from_secs(10), trust.until_revoked(&leaves)).await.unwrap();
    assert!(!revoked.unknown && revoked.by.contains("pki.crl"), "{revoked}");
    wait_until("another is asked for at once", || {
        rotation.serial(&web()) != Some(svid.leaf().serial.clone())
    })
    .await;
    assert_eq!(trust.snapshot().revoked(trust.svid(&web()).unwrap().leaf()), None);
    following.abort();
}

/// Answers every TokenReview with the hauberk service account, as an API server would for its token.
async fn token_reviews() -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let _ = tcp.read(&mut vec![0; 16 * 1024]).await;
            let user = json!({"username": "system:serviceaccount:hauberk:agent", "uid": "1",
                "groups": ["system:serviceaccounts", "system:serviceaccounts:hauberk"]});
            let body = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
                "status": {"authenticated": true, "user": user}})
            .to_string();
            let head = "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\nconnection: close\r\n";
            let _ =
                tcp.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await;
        }
    });
    port
}

fn jwt(account: &str) -> String {
    let part = |value: Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"iss": "kubernetes/serviceaccount", "sub": format!("system:serviceaccount:hauberk:{account}"),
        "kubernetes.io/serviceaccount/namespace": "hauberk",
        "kubernetes.io/serviceaccount/service-account.name": account,
        "kubernetes.io/serviceaccount/service-account.uid": "1"});
    format!("{}.{}.c2ln", part(json!({"alg": "RS256", "typ": "JWT"})), part(claims))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_agent_logs_in_to_vault_by_its_service_account_once_and_again_when_its_token_is_revoked() {
    let bao = Bao::start();
    let reviews = token_reviews().await;
    let run = |args: &[&str]| bao.command(args).unwrap();
    run(&["auth", "enable", "kubernetes"]);
    let host = format!("kubernetes_host=http://127.0.0.1:{reviews}");
    // It insists on one, though it reaches this API server over plain HTTP.
    let ca = format!("kubernetes_ca_cert=@{}", bao.dir.write("api.pem", &Mesh::new().root).display());
    run(&[
        "write",
        "auth/kubernetes/config",
        &host,
        &ca,
        "disable_local_ca_jwt=true",
        "token_reviewer_jwt=reviewer",
    ]);
    run(&[
        "write",
        "auth/kubernetes/role/agent",
        "bound_service_account_names=agent",
        "bound_service_account_namespaces=hauberk",
        "token_policies=mesh",
        "token_ttl=1h",
    ]);
    let token = bao.dir.write("jwt", &jwt("agent"));
    let auth =
        VaultAuth::Kubernetes { role: "agent".into(), mount: "kubernetes".into(), token: token.clone() };
    let (issuer, _) = bao.issuer(bao.config(auth));
    let bundle = bao.bundle();
    assert_eq!(obtain(&issuer, &web(), &bundle).await, Ok(2));
    // Without a usable service-account token: the login from before is used.
    std::fs::remove_file(&token).unwrap();
    assert_eq!(obtain(&issuer, &web(), &bundle).await, Ok(2));
    run(&["token", "revoke", "-mode=path", "auth/kubernetes"]);
    let error = obtain(&issuer, &web(), &bundle).await.unwrap_err();
    assert!(error.contains("403"), "{error}");
    let error = obtain(&issuer, &web(), &bundle).await.unwrap_err();
    assert!(error.contains("issuer.vault.auth.kubernetes.token"), "the login is not used again: {error}");
    bao.dir.write("jwt", &jwt("agent"));
    assert_eq!(obtain(&issuer, &web(), &bundle).await, Ok(2), "it logs in again");
}
