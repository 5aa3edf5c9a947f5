//! The programs that make load, and what they say of it.

use std::time::Duration;

use ::tests::Host;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// What a load of bulk came to, as the receiver counted it.
pub(crate) struct Bulk {
    pub(crate) mb_per_second: f64,
    pub(super) gb: f64,
}

/// Sends to an iperf3 server for so long.
pub(crate) fn iperf(client: &Host, host: &str, port: &str, streams: u32, seconds: u64) -> Result<Bulk> {
    let (streams, time) = (streams.to_string(), seconds.to_string());
    let args = ["-c", host, "-p", port, "-P", &streams, "-t", &time, "-J"];
    let said = client.run_for("iperf3", &args, patience(seconds)).context("iperf3")?;
    read_iperf(&said.stdout)
        .with_context(|| format!("iperf3 to {host}:{port}: {}\n{}{}", said.status, said.stdout, said.stderr))
}

fn read_iperf(text: &str) -> Result<Bulk> {
    let value: Value = serde_json::from_str(text)?;
    let sum = &value["end"]["sum_received"];
    let read = |field: &str| sum[field].as_f64().with_context(|| format!("it has no {field}"));
    Ok(Bulk { mb_per_second: read("bits_per_second")? / 8e6, gb: read("bytes")? / 1e9 })
}

/// What wrk found.
#[derive(Debug)]
pub(crate) struct Wrk {
    pub(crate) per_second: f64,
    pub(crate) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) requests: f64,
    pub(super) failed: f64,
}

/// Requests for a page of 1 KiB; with `close`, each on a connection of its own.
pub(crate) fn wrk(client: &Host, url: &str, connections: &str, seconds: u64, close: bool) -> Result<Wrk> {
    let duration = format!("{seconds}s");
    let mut args = vec!["-t", "1", "-c", connections, "-d", &duration, "--latency"];
    if close {
        args.extend(["-H", "Connection: close"]);
    }
    args.push(url);
    let said = client.run_for("wrk", &args, patience(seconds)).context("wrk")?;
    let all = || format!("wrk {url}: {}\n{}{}", said.status, said.stdout, said.stderr);
    ensure!(said.status.success(), "{}", all());
    let found = read_wrk(&said.stdout, close).with_context(all)?;
    ensure!(found.requests > 0.0, "no request was answered: {}", all());
    Ok(found)
}

fn read_wrk(text: &str, close: bool) -> Result<Wrk> {
    let line = |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim);
    let per_second = line("Requests/sec:").and_then(|v| v.parse().ok()).context("no Requests/sec")?;
    let requests = text.lines().find_map(|line| line.trim().split_once(" requests in "));
    let requests = requests.and_then(|(count, _)| count.parse().ok()).context("no count of requests")?;
    let errors = line("Socket errors:").map_or(0.0, |errors| {
        // With a connection per request wrk counts the server's close as a read error.
        let kinds = errors.split(',').filter(|kind| !(close && kind.contains("read")));
        kinds.filter_map(|kind| kind.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    });
    let failed = errors + line("Non-2xx or 3xx responses:").and_then(|v| v.parse().ok()).unwrap_or(0.0);
    Ok(Wrk { per_second, p50_us: micros(line("50%"))?, p99_us: micros(line("99%"))?, requests, failed })
}

/// wrk's times, such as `1.23ms`.
fn micros(text: Option<&str>) -> Result<f64> {
    let text = text.context("no latency")?;
    for (unit, factor) in [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 6e7)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>()? * factor);
        }
    }
    bail!("not a time: {text}")
}

/// How long a measurement of so many seconds may take before something hangs.
fn patience(seconds: u64) -> Duration {
    Duration::from_secs(seconds + 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 1s test @ http://10.1.2.3:8080/1k
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.36ms  512.30us  10.14ms   77.75%
  Latency Distribution
     50%    3.30ms
     75%    3.62ms
     90%    3.92ms
     99%  941.00us
  18712 requests in 1.00s, 23.18MB read
  Socket errors: connect 1, read 18712, write 2, timeout 3
  Non-2xx or 3xx responses: 4
Requests/sec:  18691.72
Transfer/sec:     23.15MB
";

    #[test]
    fn wrk_is_read_and_a_closed_connection_is_no_failure() {
        let closing = read_wrk(WRK, true).unwrap();
        assert_eq!((closing.per_second, closing.requests), (18691.72, 18712.0));
        assert_eq!((closing.p50_us, closing.p99_us, closing.failed), (3300.0, 941.0, 10.0));
        assert_eq!(read_wrk(WRK, false).unwrap().failed, 18722.0);
        assert!(read_wrk("unable to connect", true).is_err());
    }

    #[test]
    fn iperf3_is_read_and_its_error_is_not_taken_for_a_figure() {
        let text = r#"{"end": {"sum_received": {"bytes": 2e9, "bits_per_second": 8e9}}}"#;
        let bulk = read_iperf(text).unwrap();
        assert_eq!((bulk.mb_per_second, bulk.gb), (1000.0, 2.0));
        assert!(read_iperf(r#"{"end": {}, "error": "unable to connect"}"#).is_err());
    }
}
