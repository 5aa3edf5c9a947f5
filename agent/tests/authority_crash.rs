//! The authority dies at any moment, again and again, while its root is changed: what it starts with afterwards
//! is a state that it meant, and no trust that it gave is lost.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use hauberk::ca::state::TrustState;
use hauberk::ca::store::Store;
use hauberk::identity::TrustDomain;

/// At least so many; and until so many changes of the roots have been seen, however slow the machine is.
const DEATHS: usize = 20;
const CHANGES: u64 = 4;
const LIMIT: Duration = Duration::from_secs(150);

/// An authority's directory; removed at the end.
struct Scene {
    dir: PathBuf,
    ports: (u16, u16),
}

impl Scene {
    fn new(domain: &TrustDomain) -> Self {
        let dir = std::env::temp_dir().join(format!("hauberk-crash-{:x}", fastrand::u64(..)));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("directory.yaml"), "workloads: []\n").unwrap();
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ports = (free(), free());
        let config = format!(
            "trustDomain: {domain}\nstateDir: {0}/state\ndirectory: {{file: {0}/directory.yaml}}\nlisten: 127.0.0.1:{1}\nadmin: 127.0.0.1:{2}\n",
            dir.display(),
            ports.0,
            ports.1
        );
        fs::write(dir.join("authority.yaml"), config).unwrap();
        Self { dir, ports }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hauberk"));
        command.args(["authority", "--config"]).arg(self.dir.join("authority.yaml")).args(args);
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log")).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command
    }

    fn start(&self) -> Killed {
        Killed(self.command(&[]).spawn().unwrap())
    }

    fn wait_serving(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", self.ports.0)).is_err() {
            assert!(Instant::now() < until, "it does not serve: {}", self.log());
            sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A process that does not outlive this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn whenever_the_authority_dies_its_state_is_whole_and_goes_on_from_there() {
    let domain = TrustDomain::parse("crash.test").unwrap();
    let scene = Scene::new(&domain);
    let read = || Store::open(&scene.dir.join("state")).unwrap().trust(&domain).unwrap();
    let (mut before, mut changes): (Option<TrustState>, u64) = (None, 0);
    let began = Instant::now();
    for death in 0.. {
        if death >= DEATHS && (changes >= CHANGES || began.elapsed() > LIMIT) {
            break;
        }
        let authority = scene.start();
        if death % 2 == 0 {
            scene.wait_serving();
        }
        if death % 10 == 0 {
            assert!(!scene.command(&[]).status().unwrap().success(), "a second one is refused");
        }
        // Nobody holds anything that the old root signed: each rotation is done as fast as it can be written.
        let mut rotating: Vec<_> = Vec::new();
        let until = Instant::now() + Duration::from_millis(fastrand::u64(50..1500));
        while Instant::now() < until {
            rotating.push(Killed(scene.command(&["rotate-root", "--no-wait"]).spawn().unwrap()));
            sleep(Duration::from_millis(fastrand::u64(10..80)));
        }
        drop(authority);
        drop(rotating);
        let Some(now) = read() else {
            assert!(before.is_none(), "the state is gone: {}", scene.log());
            continue;
        };
        if let Some(before) = &before {
            assert!(now.generation >= before.generation, "older than before: {now:?}");
            changes += now.generation - before.generation;
            if now.generation == before.generation {
                assert_eq!(now.roots.len(), before.roots.len(), "other roots of the same generation");
            }
        }
        before = Some(now);
    }
    assert!(changes >= CHANGES, "it never came to a rotation: {}", scene.log());
    let _authority = scene.start();
    scene.wait_serving();
    assert!(scene.command(&["rotate-root"]).status().unwrap().success(), "{}", scene.log());
    let now = read().unwrap();
    assert_eq!((now.roots.len(), now.rotation.phase()), (1, "idle"));
}
