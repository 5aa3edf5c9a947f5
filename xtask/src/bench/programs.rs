//! Starts the programs that are measured through and against; says what one complained of that does
//! not come up.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tests::host::Actor;
use tests::{Process, World};

use crate::demo::nginx_conf;

/// Where servers listen in their pods.
pub(super) const WEB: u16 = 8080;
pub(super) const BULK: u16 = 5201;
pub(super) const ECHO: u16 = 9000;

/// What one server pod runs; ends when dropped.
pub(super) struct Servers {
    _processes: Vec<Process>,
    _echo: Actor,
}

/// A web server with a page of 1 KiB, an iperf3 server and an echo server in a pod.
pub(super) fn servers(world: &World, pod: &str) -> Result<Servers> {
    let www = world.dir().join("www");
    fs::create_dir_all(&www)?;
    fs::write(www.join("1k"), vec![b'x'; 1024])?;
    let conf = nginx_conf(world, pod, &WEB.to_string())?;
    let web = start(world, pod, "nginx", &["-c", &conf], &[WEB])?;
    let bulk = start(world, pod, "iperf3", &["-s", "-p", &BULK.to_string()], &[BULK])?;
    Ok(Servers { _processes: vec![web, bulk], _echo: echo(world, pod)? })
}

/// Only the echo server.
pub(super) fn echo(world: &World, pod: &str) -> Result<Actor> {
    world.get(pod).host.actor_server(&["echo", &format!("0.0.0.0:{ECHO}")]).context("an echo server")
}

/// Starts a program in a pod, and waits until it listens on these ports.
pub(super) fn start(
    world: &World,
    pod: &str,
    program: &str,
    args: &[&str],
    ports: &[u16],
) -> Result<Process> {
    let host = &world.get(pod).host;
    let log = world.dir().join(format!("{program}-{pod}.log"));
    let mut command = host.command(program, args)?;
    let out = File::create(&log)?;
    command.stdout(out.try_clone()?).stderr(out);
    let mut process = Process::spawn(command)?;
    let until = Instant::now() + Duration::from_secs(10);
    for port in ports {
        let address = SocketAddr::from(([127, 0, 0, 1], *port));
        while !host.inside(|| TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok())? {
            let said = || fs::read_to_string(&log).unwrap_or_default();
            if !process.runs() {
                bail!("{program} in pod {pod} has ended:\n{}", said());
            }
            if Instant::now() > until {
                bail!("{program} in pod {pod} does not listen on port {port}:\n{}", said());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(process)
}
