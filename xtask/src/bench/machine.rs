//! What it was measured on.

use std::fs;

use anyhow::Result;
use serde_json::{Value, json};

use crate::shell::{command, output};

/// The machine, the time, and the versions of what is compared.
#[derive(Debug, Default)]
pub(super) struct Machine {
    cores: usize,
    cpu: String,
    kernel: String,
    memory_gb: f64,
    date: String,
    commit: String,
    /// Names and versions of the other proxies.
    proxies: Vec<String>,
}

impl Machine {
    pub(super) fn look() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|line| line.trim().split(' ').next()?.parse::<f64>().ok());
        Ok(Self {
            cores: std::thread::available_parallelism().map_or(0, |n| n.get()),
            cpu: model.map_or("an unknown CPU", |(_, model)| model).trim().to_owned(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            memory_gb: kib.unwrap_or(0.0) * 1024.0 / 1e9,
            date: output(command("date", &["-u", "+%F %H:%M UTC"]))?.trim().to_owned(),
            // A tree that is no checkout has no commit.
            commit: output(command("git", &["describe", "--always", "--dirty"]))
                .map_or_else(|_| "unknown".into(), |text| text.trim().to_owned()),
            proxies: vec![version("haproxy", "HAProxy"), version("nginx", "nginx")],
        })
    }

    /// In a sentence without its full stop.
    pub(super) fn words(&self) -> String {
        format!(
            "{} cores ({}), {:.0} GB, Linux {}, {}; Hauberk {}, {}",
            self.cores,
            self.cpu,
            self.memory_gb,
            self.kernel,
            self.date,
            self.commit,
            self.proxies.join(", ")
        )
    }

    pub(super) fn json(&self) -> Value {
        json!({"cores": self.cores, "cpu": self.cpu, "kernel": self.kernel, "memoryGb": self.memory_gb,
            "date": self.date, "commit": self.commit, "proxies": self.proxies, "congestionControl": "reno"})
    }
}

/// What a program answers to `-v`: HAProxy on its output, nginx on its error output.
fn version(program: &str, name: &str) -> String {
    let said = command(program, &["-v"]).output();
    let text = said.map(|said| [said.stdout, said.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let number = text.split([' ', '/', '\n']).find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    format!("{name} {}", number.unwrap_or("of an unknown version"))
}
