//! The kernel side for real: programs loaded, a pod enrolled, connections captured and delivered.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test may stop at the first surprise")]
use hauberk::capture::Capture;
use hauberk::config::CaptureConfig;

#[tokio::test]
async fn loads() {
    let dir = std::env::temp_dir().join(format!("hbk-capture-{}", std::process::id()));
    let cgroup = format!("hauberk-cap-{}", std::process::id());
    let root = hauberk::capture::mount::cgroup2().unwrap().unwrap();
    std::fs::create_dir(root.join(&cgroup)).unwrap();
    let config =
        CaptureConfig { cgroup: cgroup.clone().into(), bpffs: dir.clone(), ..CaptureConfig::default() };
    let started = Capture::start(&config, 15008, &[]);
    if let Err(e) = &started {
        eprintln!("{e}");
    }
    let second = started.is_ok().then(|| Capture::start(&config, 15008, &[]).map_err(|e| e.to_string()));
    eprintln!("{:?}", second.map(|s| s.map(|_| ())));
    let ok = started.is_ok();
    drop(started);
    Capture::uninstall(&config).unwrap();
    std::fs::remove_dir(root.join(&cgroup)).unwrap();
    assert!(ok);
}
