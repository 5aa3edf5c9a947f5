//! What applications see of their sockets: addresses, errors, options.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use tests::{Mode, Options, World};

#[test]
fn both_sides_see_each_others_true_address() {
    let world = World::usual().unwrap();
    let (client, server) = (world.get("client"), world.get("server"));
    let _server = server.host.actor_server(&["whoami", "0.0.0.0:8080", "[::]:8081"]).unwrap();
    for (to, local) in [
        (server.v4(8080), client.v4.to_string()),
        (server.v6(8081), client.v6.to_string()),
        (format!("[::ffff:{}]:8080", server.v4), client.v4.to_string()),
        // An IPv4 client of a dual-stack listener.
        (server.v4(8081), client.v4.to_string()),
    ] {
        let seen = client.host.actor(&["ask", &to]).unwrap();
        let expected = to.replace("[::ffff:", "").replace(&format!("{}]", server.v4), &server.v4.to_string());
        assert_eq!(seen["peer"], expected, "the client's getpeername() for {to}: {seen}");
        assert!(seen["local"].as_str().unwrap().contains(&local), "{seen}");
        assert_eq!(seen["server"]["accept"], seen["local"], "accept() at the server for {to}: {seen}");
        assert_eq!(seen["server"]["getpeername"], seen["local"], "{seen}");
        assert_eq!(seen["server"]["local"], expected, "{seen}");
    }
}
