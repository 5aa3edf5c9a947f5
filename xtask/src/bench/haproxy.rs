//! The named peer: a HAProxy beside the client and one beside the server, mutual TLS 1.3 between.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use tests::{Process, World};

use crate::shell::{command, output};

/// Starts the pair. The client finds the servers at 127.0.0.1:18080 and :15201.
pub(super) fn start(world: &World) -> Result<Vec<Process>> {
    let dir = world.dir();
    certificates(&dir)?;
    let server = world.get("plain-server");
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let head = format!(
        "global\n  maxconn 9000\n  nbthread {cores}\n  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets\n\
         defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n"
    );
    let d = dir.display();
    // Sessions may be resumed by its client side: HAProxy at its best, not at its worst.
    let near = format!(
        "{head}listen web\n  bind 127.0.0.1:18080\n  server s {0}:9443 ssl crt {d}/peer.pem ca-file {d}/peer-ca.pem verify required verifyhost peer\n\
         listen bulk\n  bind 127.0.0.1:15201\n  server s {0}:9444 ssl crt {d}/peer.pem ca-file {d}/peer-ca.pem verify required verifyhost peer\n",
        server.v4
    );
    let far = format!(
        "{head}listen web\n  bind :9443 ssl crt {d}/peer.pem ca-file {d}/peer-ca.pem verify required\n  server s 127.0.0.1:8080\n\
         listen bulk\n  bind :9444 ssl crt {d}/peer.pem ca-file {d}/peer-ca.pem verify required\n  server s 127.0.0.1:5201\n"
    );
    let mut running = Vec::new();
    for (pod, name, text, port) in [("plain-server", "far", far, 9443), ("plain-client", "near", near, 18080)]
    {
        let file = dir.join(format!("haproxy-{name}.cfg"));
        std::fs::write(&file, text)?;
        let host = &world.get(pod).host;
        running.push(host.spawn("haproxy", &["-db", "-f", &file.to_string_lossy()])?);
        host.wait_listening(SocketAddr::from(([127, 0, 0, 1], port))).context("haproxy")?;
    }
    Ok(running)
}

/// P-256, as Hauberk's SVIDs.
fn certificates(dir: &Path) -> Result<()> {
    let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
    let (ca, ca_key, key, csr, cert) =
        (path("peer-ca.pem"), path("peer-ca.key"), path("peer.key"), path("peer.csr"), path("peer.crt"));
    let ec = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let openssl = |args: &[&str]| output(command("openssl", args));
    openssl(
        &[&["req", "-x509", "-days", "2", "-subj", "/CN=bench", "-keyout", &ca_key, "-out", &ca], &ec[..]]
            .concat(),
    )?;
    openssl(
        &[
            &[
                "req",
                "-subj",
                "/CN=peer",
                "-addext",
                "subjectAltName=DNS:peer",
                "-keyout",
                &key,
                "-out",
                &csr,
            ],
            &ec[..],
        ]
        .concat(),
    )?;
    openssl(&[
        "x509",
        "-req",
        "-in",
        &csr,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-days",
        "2",
        "-copy_extensions",
        "copy",
        "-out",
        &cert,
    ])?;
    let both = std::fs::read_to_string(&cert)? + &std::fs::read_to_string(&key)?;
    Ok(std::fs::write(path("peer.pem"), both)?)
}
