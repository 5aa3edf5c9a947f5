//! Unmodified programs speak through it, and the wire shows nothing of what they say.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::time::Duration;

use tests::{Host, Mode, Options, Process, World};

const SECRET: &str = "correct-horse-battery-staple";

/// The usual world with a listener on the wire; `f` plays, then the wire must show TLS 1.3 only, from its
/// handshake on: no connection is made ahead.
fn unseen(f: impl FnOnce(&World)) {
    let agent_yaml = "tunnel: {warmNodes: 0}\n".into();
    let mut world = World::new(Options { agent_yaml, ..Options::default() }).unwrap();
    world.pod("client", "n1", Mode::Strict).unwrap();
    world.pod("server", "n2", Mode::Strict).unwrap();
    world.start().unwrap();
    let tap = world.tap().unwrap();
    f(&world);
    let seen = tap.finish().unwrap();
    assert_eq!(seen.plaintext_bytes, 0, "{:?}", seen.plaintext_flows);
    assert_eq!(seen.not_tls_bytes, 0, "bytes on the tunnel's port that are no TLS");
    assert_eq!(seen.other_hellos, 0, "a handshake that is not TLS 1.3");
    assert!(seen.tls13_hellos > 0 && seen.tls_records > 10, "{} records", seen.tls_records);
    assert!(!seen.contains(SECRET.as_bytes()), "the secret was on the wire");
}

fn serve(host: &Host, port: u16, program: &str, args: &[&str]) -> Process {
    let process = host.spawn(program, args).unwrap();
    host.wait_listening(([127, 0, 0, 1], port).into()).unwrap();
    process
}

#[test]
fn http_1_1() {
    unseen(|world| {
        let server = world.get("server");
        let www = world.dir().join("www");
        std::fs::create_dir(&www).unwrap();
        std::fs::write(www.join("index.html"), SECRET.repeat(1000)).unwrap();
        let dir = www.to_string_lossy().into_owned();
        let _python =
            serve(&server.host, 8000, "python3", &["-m", "http.server", "--directory", &dir, "8000"]);
        let url = format!("http://{}/", server.v4(8000));
        let text = world.get("client").host.run("curl", &["-sS", "--http1.1", &url]).unwrap().ok().unwrap();
        assert_eq!(text, SECRET.repeat(1000));
        // What the server writes of its clients is the client pod's address.
        let url6 = format!("http://{}/", server.v6(8000));
        let refused = world.get("client").host.run("curl", &["-sS", &url6]).unwrap();
        assert!(!refused.status.success(), "python listens on IPv4 only");
    });
}

#[test]
fn http_2_without_tls_of_its_own() {
    unseen(|world| {
        let server = world.get("server");
        let www = world.dir().join("www");
        std::fs::create_dir(&www).unwrap();
        std::fs::write(www.join("page"), SECRET.repeat(5000)).unwrap();
        let dir = www.to_string_lossy().into_owned();
        let _nghttpd = serve(&server.host, 8000, "nghttpd", &["--no-tls", "-d", &dir, "8000"]);
        let url = format!("http://{}/page", server.v4(8000));
        let client = &world.get("client").host;
        let text = client.run("curl", &["-sS", "--http2-prior-knowledge", &url]).unwrap().ok().unwrap();
        assert_eq!(text.len(), SECRET.len() * 5000);
        let load = client.run("h2load", &["-n", "2000", "-c", "4", "-m", "20", &url]).unwrap().ok().unwrap();
        assert!(load.contains("2000 succeeded, 0 failed"), "{load}");
    });
}

#[test]
fn a_server_that_speaks_first() {
    unseen(|world| {
        let server = world.get("server");
        let _greet = server.host.actor_server(&["greet", "0.0.0.0:2525"]).unwrap();
        let script = format!(
            "import socket; s = socket.create_connection(('{}', 2525)); print(s.recv(100).decode(), end=''); s.sendall(b'{SECRET}'); print(s.recv(100).decode())",
            server.v4
        );
        let said = world.get("client").host.run("python3", &["-c", &script]).unwrap().ok().unwrap();
        assert_eq!(said, format!("220 welcome\r\n{SECRET}\n"));
    });
}

#[test]
fn redis() {
    unseen(|world| {
        let server = world.get("server");
        let args = [
            "--port",
            "6379",
            "--bind",
            "0.0.0.0",
            "--protected-mode",
            "no",
            "--save",
            "",
            "--daemonize",
            "no",
        ];
        let _redis = serve(&server.host, 6379, "redis-server", &args);
        let client = &world.get("client").host;
        let at = server.v4.to_string();
        let cli =
            |args: &[&str]| client.run("redis-cli", &[&["-h", &at], args].concat()).unwrap().ok().unwrap();
        assert_eq!(cli(&["set", "key", SECRET]), "OK\n");
        assert_eq!(cli(&["get", "key"]), format!("{SECRET}\n"));
        let list = cli(&["client", "list"]);
        let client_v4 = world.get("client").v4.to_string();
        assert!(list.contains(&format!(" addr={client_v4}:")), "redis sees its client's own address: {list}");
        let bench = ["-h", &at, "-n", "5000", "-c", "20", "-q", "-t", "get,set"];
        client.run("redis-benchmark", &bench).unwrap().ok().unwrap();
    });
}

#[test]
fn postgres() {
    unseen(|world| {
        let server = world.get("server");
        let data = world.dir().join("pg");
        let data = data.to_string_lossy().into_owned();
        let bin = postgres_bin();
        let run = |args: &[&str]| {
            server.host.run_for("runuser", args, Duration::from_secs(60)).unwrap().ok().unwrap()
        };
        server.host.run("install", &["-d", "-o", "postgres", &data]).unwrap().ok().unwrap();
        run(&["-u", "postgres", "--", &format!("{bin}/initdb"), "-D", &data, "-A", "trust", "-N"]);
        let hba = std::fs::OpenOptions::new().append(true).open(format!("{data}/pg_hba.conf"));
        // Only the client pod's own address is let in: it must be the address that postgres sees.
        let rule = format!("host all all {}/32 trust\n", world.get("client").v4);
        std::io::Write::write_all(&mut hba.unwrap(), rule.as_bytes()).unwrap();
        let postgres = format!("{bin}/postgres");
        let args = [
            "-u",
            "postgres",
            "--",
            &postgres,
            "-D",
            &data,
            "-c",
            "listen_addresses=*",
            "-c",
            "unix_socket_directories=",
            // It is killed in the end: what it had in /dev/shm would stay.
            "-c",
            "dynamic_shared_memory_type=mmap",
        ];
        let _server = serve(&server.host, 5432, "runuser", &args);
        let at = server.v4.to_string();
        let psql = |sql: &str| {
            let args = ["-h", &at, "-U", "postgres", "-Atc", sql];
            world.get("client").host.run("psql", &args).unwrap().ok()
        };
        // It listens before it is ready.
        let until = std::time::Instant::now() + Duration::from_secs(30);
        while psql("select 1").is_err() && std::time::Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
        }
        let psql = |sql: &str| psql(sql).unwrap();
        assert_eq!(psql("select inet_client_addr()"), format!("{}\n", world.get("client").v4));
        psql("create table t (x text)");
        psql(&format!("insert into t select '{SECRET}' from generate_series(1, 20000)"));
        assert_eq!(psql("select count(*) from t where x like 'correct%'"), "20000\n");
    });
}

/// Debian keeps each version's programs in a directory of its own.
fn postgres_bin() -> String {
    let mut versions: Vec<_> = std::fs::read_dir("/usr/lib/postgresql")
        .expect("postgresql is installed (cargo xtask setup)")
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("bin/postgres").exists())
        .collect();
    versions.sort();
    versions.pop().expect("a version").join("bin").to_string_lossy().into_owned()
}
