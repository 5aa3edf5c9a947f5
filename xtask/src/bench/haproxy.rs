//! HAProxy's configuration. Sessions may be resumed by its client side, and every core is used:
//! HAProxy at its best, not at its worst.

use std::fmt::Write as _;

use super::certificates::NAME;
use super::pair::Site;

/// The near or the far proxy's configuration.
pub(super) fn config(site: &Site, near: bool) -> String {
    let (dir, cores) = (site.dir.display(), site.cores);
    let identity = format!("ssl crt {dir}/peer.pem ca-file {dir}/peer-ca.pem verify required");
    let mut text = format!(
        "global\n  maxconn 9000\n  nbthread {cores}\n  ssl-default-bind-options ssl-min-ver TLSv1.3 no-tls-tickets\n  \
         ssl-default-server-options ssl-min-ver TLSv1.3\n\
         defaults\n  mode tcp\n  timeout connect 1m\n  timeout client 5m\n  timeout server 5m\n"
    );
    for lane in site.lanes.all() {
        let reuse = if lane.resume { "" } else { " no-ssl-reuse" };
        let (listen, server) = if near {
            let far = format!("{}:{} {identity} verifyhost {NAME}{reuse}", site.far, lane.far);
            (format!("127.0.0.1:{}", lane.near), far)
        } else {
            (format!(":{} {identity}", lane.far), format!("127.0.0.1:{}", lane.server))
        };
        // Writing to a String cannot fail.
        let _ = write!(text, "listen l{}\n  bind {listen}\n  server s {server}\n", lane.near);
    }
    text
}
