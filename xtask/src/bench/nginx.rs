//! nginx' configuration as a TCP proxy (its `stream` module): a worker for each core, sessions
//! resumed on both sides.

use std::fmt::Write as _;

use super::certificates::NAME;
use super::pair::Site;
use crate::setup::NGINX_STREAM;

/// The near or the far proxy's configuration.
pub(super) fn config(site: &Site, near: bool) -> String {
    let (dir, cores) = (site.dir.display(), site.cores);
    let end = if near { "near" } else { "far" };
    let mut text = format!(
        "load_module {NGINX_STREAM};\ndaemon off; worker_processes {cores}; worker_rlimit_nofile 65536;\n\
         pid {dir}/nginx-{end}.pid; error_log stderr crit;\n\
         events {{ worker_connections 20000; }}\nstream {{\n  proxy_buffer_size 64k;\n"
    );
    if near {
        let _ = write!(
            text,
            "  proxy_ssl on; proxy_ssl_protocols TLSv1.3; proxy_ssl_name {NAME};\n  \
             proxy_ssl_certificate {dir}/peer.crt; proxy_ssl_certificate_key {dir}/peer.key;\n  \
             proxy_ssl_verify on; proxy_ssl_trusted_certificate {dir}/peer-ca.pem;\n"
        );
    } else {
        let _ = write!(
            text,
            "  ssl_protocols TLSv1.3; ssl_certificate {dir}/peer.crt; ssl_certificate_key {dir}/peer.key;\n  \
             ssl_verify_client on; ssl_client_certificate {dir}/peer-ca.pem;\n  \
             ssl_session_cache shared:sessions:10m;\n"
        );
    }
    for lane in site.lanes.all() {
        // Writing to a String cannot fail.
        let _ = if near {
            let reuse = if lane.resume { "on" } else { "off" };
            writeln!(
                text,
                "  server {{ listen 127.0.0.1:{} backlog=8192; proxy_pass {}:{}; proxy_ssl_session_reuse {reuse}; }}",
                lane.near, site.far, lane.far
            )
        } else {
            writeln!(
                text,
                "  server {{ listen {} ssl backlog=8192; proxy_pass 127.0.0.1:{}; }}",
                lane.far, lane.server
            )
        };
    }
    text + "}\n"
}
