use std::sync::Arc;

use hauberk::config::issuer::{FilesConfig, IssuerConfig};
use hauberk::identity::SpiffeId;
use hauberk::issue::{Issuer, configured};

use super::mesh::{Dir, Mesh, Rotation, domain, node, obtain, trust, wait_until, web};

fn issuer(dir: &Dir, mesh: &Mesh) -> (Arc<dyn Issuer>, Arc<hauberk::trust::Trust>) {
    let trust = trust(mesh.ca.bundle().clone());
    let config = FilesConfig { directory: dir.0.join("svids"), trust_bundle: dir.0.join("bundle.pem") };
    (configured(&IssuerConfig::Files(config), node(), Arc::clone(&trust)), trust)
}

#[tokio::test]
async fn what_is_written_is_used_within_moments_and_what_is_spoilt_replaces_nothing() {
    let (dir, mesh) = (Dir::new(), Mesh::new());
    dir.write("bundle.pem", &mesh.root);
    let (chain, key) = mesh.pem(&node(), 600);
    // Key and root in the same file, as some write them; beside it, as a mounted secret has it.
    dir.write("svids/node.pem", &format!("{chain}{}{key}", mesh.root));
    let (chain, key) = mesh.pem(&web(), 600);
    dir.write("svids/web/tls.crt", &chain);
    dir.write("svids/web/tls.key", &key);
    let (issuer, trust) = issuer(&dir, &mesh);
    let rotation = Rotation::start(&trust, &issuer, Some(node()), &dir.0);
    wait_until("both are held", || rotation.serial(&node()).is_some() && rotation.serial(&web()).is_some())
        .await;
    assert_eq!(trust.svid(&node()).unwrap().certified_key().cert.len(), 1, "the root stays here");

    let first = rotation.serial(&web());
    let (chain, key) = mesh.pem(&web(), 900);
    dir.write("svids/web/tls.key", &key);
    dir.write("svids/web/tls.crt", &chain);
    wait_until("the renewed one is taken", || rotation.serial(&web()) != first).await;

    let second = rotation.serial(&web());
    dir.write("svids/web/tls.crt", "-----BEGIN CERTIFICATE-----\nspoilt\n-----END CERTIFICATE-----\n");
    let said = || rotation.status.now().get(&web()).and_then(|standing| standing.last_error.clone());
    wait_until("the fault is told", || said().is_some()).await;
    let said = said().unwrap();
    assert!(said.contains("tls.crt") && said.contains(web().as_str()), "{said}");
    assert_eq!(rotation.serial(&web()), second, "the last good one is kept");
    assert!(rotation.asked("files", "issued") >= 3.0 && rotation.asked("files", "refused") >= 1.0);
}

#[tokio::test]
async fn a_new_root_is_trusted_when_its_file_says_so() {
    let (dir, mesh, next) = (Dir::new(), Mesh::new(), Mesh::new());
    dir.write("bundle.pem", &mesh.root);
    let (issuer, trust) = issuer(&dir, &mesh);
    let (chain, key) = next.pem(&node(), 600);
    dir.write("svids/node.pem", &(chain + &key));
    let rotation = Rotation::start(&trust, &issuer, Some(node()), &dir.0);
    let said = || rotation.status.now().get(&node()).and_then(|standing| standing.last_error.clone());
    wait_until("its chain leads nowhere", || said().is_some_and(|said| said.contains("leads to none"))).await;
    assert!(rotation.serial(&node()).is_none());
    dir.write("bundle.pem", "nothing");
    dir.write("bundle.pem", &format!("{}{}", mesh.root, next.root));
    wait_until("with its root it is used", || rotation.serial(&node()).is_some()).await;
    assert_eq!(trust.snapshot().bundle.roots().len(), 2);
}

#[tokio::test]
async fn files_that_cannot_be_used_are_refused_in_words_that_name_them() {
    let (dir, mesh) = (Dir::new(), Mesh::new());
    let (issuer, _) = issuer(&dir, &mesh);
    let ask = async || obtain(&issuer, &web(), mesh.ca.bundle()).await;
    let error = ask().await.unwrap_err();
    assert!(error.contains("svids") && error.contains("issuer.files.directory"), "{error}");
    let other = SpiffeId::workload(&domain(), "shop", "other").unwrap();
    let (chain, key) = mesh.pem(&other, 600);
    dir.write("svids/other.pem", &(chain.clone() + &key));
    let error = ask().await.unwrap_err();
    assert!(error.contains(web().as_str()), "{error}");
    let (_, foreign) = mesh.pem(&web(), 600);
    let (mine, _) = mesh.pem(&web(), 600);
    dir.write("svids/web.crt", &mine);
    assert!(ask().await.unwrap_err().contains("web.key"), "no key");
    dir.write("svids/web.key", &foreign);
    assert!(ask().await.unwrap_err().contains("does not belong"), "another's key");
    let (short, key) = mesh.pem(&web(), 1);
    dir.write("svids/web.crt", &short);
    dir.write("svids/web.key", &key);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert!(ask().await.unwrap_err().contains("expired"));
}
