//! Predictions, and what was measured held against them.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use hauberk::capacity::calibrate::calibrate;
use hauberk::capacity::calibration::Calibration;
use hauberk::capacity::flow::Way;
use hauberk::capacity::model::{Prediction, predict};
use hauberk::capacity::scenario::Scenario;

/// Of this machine; taken once.
pub(crate) fn calibration() -> &'static Calibration {
    static CALIBRATION: OnceLock<Calibration> = OnceLock::new();
    CALIBRATION.get_or_init(|| calibrate(Duration::ZERO, &mut |_| ()).unwrap())
}

/// The handshakes and connections of a prediction do not depend on the machine.
pub(crate) fn prediction(scenario: &Scenario, way: Way) -> Prediction {
    predict(scenario, calibration()).into_iter().find(|prediction| prediction.way == way).unwrap()
}

pub(crate) fn within(what: &str, counted: f64, predicted: f64, error: f64) {
    println!("{what}: counted {counted}, predicted {predicted:.1}");
    assert!(
        (counted - predicted).abs() <= error * predicted,
        "{what}: counted {counted}, predicted {predicted:.1}, which is off by more than {} %",
        100.0 * error
    );
}

/// A factor of two, for CPU time: tasks and buffers come on top of what is predicted, and machines are noisy.
pub(crate) fn within_twice(what: &str, measured: f64, predicted: f64) {
    println!("{what}: measured {measured:.1}, predicted {predicted:.1}");
    assert!(is_within_twice(measured, predicted), "{what}: measured {measured:.1}, predicted {predicted:.1}");
}

/// What tests are built as hardly optimises our own code, while the calibration is mostly the optimised crypto:
/// a factor of three then.
pub(crate) fn is_within_twice(measured: f64, predicted: f64) -> bool {
    let slower = if cfg!(debug_assertions) { 3.0 } else { 2.0 };
    measured > predicted / 2.0 && measured < predicted * slower
}

/// Relays connections to `to`, and tells of each how many bytes it carried, both ways together.
pub(crate) fn tap(to: SocketAddr) -> (SocketAddr, Receiver<u64>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), std::net::TcpStream::connect(to).unwrap());
            near.set_nodelay(true).unwrap();
            far.set_nodelay(true).unwrap();
            let pipes = [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)];
            let tell = tell.clone();
            std::thread::spawn(move || {
                let ways = pipes.map(|(mut from, mut into)| {
                    std::thread::spawn(move || {
                        let copied = std::io::copy(&mut from, &mut into).unwrap();
                        let _ = into.shutdown(std::net::Shutdown::Write);
                        copied
                    })
                });
                let carried = ways.map(|way| way.join().unwrap());
                let _ = tell.send(carried[0] + carried[1]);
            });
        }
    });
    (address, told)
}

/// What a tap counted of so many connections, which end about now.
pub(crate) fn carried(bytes: &Receiver<u64>, connections: usize) -> f64 {
    let next = || bytes.recv_timeout(Duration::from_secs(10)).expect("each connection ends and is counted");
    (0..connections).map(|_| next()).sum::<u64>() as f64
}
