//! CPU time: of proxies by their processes, of the machine, of others; and proxies' memory.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// `/proc` counts in hundredths of a second on every architecture (`USER_HZ`).
const TICKS: f64 = 100.0;

/// What the machine has spent, in seconds (proc_stat(5)).
#[derive(Clone, Copy, Debug)]
pub(super) struct Machine {
    /// By anybody here.
    pub(super) busy: f64,
    /// By the hypervisor's other guests.
    pub(super) stolen: f64,
}

impl Machine {
    pub(super) fn now() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        let cpu = stat.lines().next().context("/proc/stat is empty")?;
        let ticks: Vec<f64> = cpu.split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
        // user, nice, system, then idle and iowait, then irq, softirq, steal.
        let sum = |at: &[usize]| at.iter().filter_map(|i| ticks.get(*i)).sum::<f64>() / TICKS;
        Ok(Self { busy: sum(&[0, 1, 2, 5, 6]), stolen: sum(&[7]) })
    }
}

/// How much of a core others use: what is used while nothing of ours runs.
pub(super) fn others() -> Result<f64> {
    let (before, began) = (Machine::now()?.busy, Instant::now());
    std::thread::sleep(Duration::from_secs(1));
    Ok((Machine::now()?.busy - before) / began.elapsed().as_secs_f64())
}

/// Seconds of CPU that these processes and their children have used.
pub(super) fn used(pids: &[i32]) -> Result<f64> {
    let ticks = family(pids)?.iter().map(|process| process.ticks).sum::<f64>();
    Ok(ticks / TICKS)
}

/// Memory of a process and its children in MB: what each has of its own, and once what they share.
pub(super) fn resident(pid: i32) -> Result<f64> {
    let (mut own, mut shared) = (0.0, 0.0_f64);
    for process in family(&[pid])? {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid))?;
        let kib = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            line.trim().split(' ').next()?.parse::<f64>().ok()
        };
        // A child that has just ended, and is not waited for yet, has no memory.
        if process.pid != pid && kib("RssAnon:").is_none() {
            continue;
        }
        let field = |field: &str| {
            kib(field).with_context(|| format!("process {} has ended: no {field} in its status", process.pid))
        };
        own += field("RssAnon:")?;
        shared = shared.max(field("RssFile:")? + field("RssShmem:")?);
    }
    Ok((own + shared) * 1024.0 / 1e6)
}

/// Memory that could be had, in MB.
pub(super) fn available() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<f64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? * 1024.0 / 1e6)
}

/// The most that the kernel lets all TCP sockets hold, in MB (tcp(7), `tcp_mem`).
pub(super) fn most_of_sockets() -> Result<f64> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/tcp_mem")?;
    let pages = text.split_whitespace().nth(2).and_then(|pages| pages.parse::<f64>().ok());
    Ok(pages.context("tcp_mem has no third number")? * 4096.0 / 1e6)
}

struct Stat {
    pid: i32,
    parent: i32,
    ticks: f64,
}

/// These processes and all below them.
fn family(pids: &[i32]) -> Result<Vec<Stat>> {
    let all: Vec<Stat> = fs::read_dir("/proc")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        // One may end while we look.
        .filter_map(|pid| parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?))
        .collect();
    let mut members: BTreeSet<i32> = pids.iter().copied().collect();
    if let Some(gone) = pids.iter().find(|pid| !all.iter().any(|process| process.pid == **pid)) {
        bail!("process {gone} has ended while it was measured");
    }
    while let Some(child) = all.iter().find(|p| members.contains(&p.parent) && !members.contains(&p.pid)) {
        members.insert(child.pid);
    }
    Ok(all.into_iter().filter(|process| members.contains(&process.pid)).collect())
}

/// A line of /proc/PID/stat (proc_pid_stat(5)); the name in it may hold anything.
fn parse(line: &str) -> Option<Stat> {
    let (pid, rest) = line.split_once(" (")?;
    let fields: Vec<&str> = rest.rsplit_once(") ")?.1.split(' ').collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(Stat {
        pid: pid.parse().ok()?,
        parent: fields.get(1)?.parse().ok()?,
        ticks: number(11)? + number(12)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_whatever_the_program_is_called() {
        let line = "71 (a) b (c) S 7 71 71 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 1 0 5 6 7";
        let stat = parse(line).unwrap();
        assert_eq!((stat.pid, stat.parent, stat.ticks), (71, 7, 200.0));
    }

    #[test]
    fn a_process_has_its_childrens_time_and_memory() {
        let own = i32::try_from(std::process::id()).unwrap();
        let before = used(&[own]).unwrap();
        let mut child = std::process::Command::new("sh");
        child.args(["-c", "while :; do :; done"]);
        let mut child = child.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let with_child = used(&[own]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(with_child > before, "{with_child} s with a busy child, {before} s before");
        assert!(resident(own).unwrap() > 0.1);
        assert!(used(&[i32::MAX]).unwrap_err().to_string().contains("has ended"));
    }
}
