//! What the kernel offers.

use std::path::Path;

use aya::maps::MapType;
use aya::programs::ProgramType;
use aya::sys::{is_map_supported, is_program_supported};
use nix::sys::utsname::uname;

use super::Found;
use crate::capture::mount;
use crate::tls::ktls;

pub(super) fn checks() -> Vec<Found> {
    let mut found = vec![version(), btf(), cgroup()];
    found.extend(privileges());
    let programs = [
        ("eBPF connect/getpeername hooks", ProgramType::CgroupSockAddr, "CONFIG_CGROUP_BPF"),
        ("eBPF sock_ops", ProgramType::SockOps, "CONFIG_CGROUP_BPF"),
        ("eBPF sk_lookup", ProgramType::SkLookup, "Linux 5.9, CONFIG_BPF_SYSCALL"),
        ("eBPF classifier", ProgramType::SchedClassifier, "CONFIG_NET_CLS_BPF"),
    ];
    for (name, kind, needs) in programs {
        found.push(match is_program_supported(kind) {
            Ok(true) => Found::ok(name, "loads"),
            Ok(false) => Found::fail(name, "the kernel has no such program type", format!("needs {needs}")),
            Err(error) => Found::fail(name, error.to_string(), format!("run as root; needs {needs}")),
        });
    }
    for (name, kind) in [("eBPF socket storage", MapType::SkStorage), ("eBPF ring buffer", MapType::RingBuf)]
    {
        found.push(match is_map_supported(kind) {
            Ok(true) => Found::ok(name, "can be made"),
            Ok(false) => Found::fail(name, "the kernel has no such map", "needs Linux 5.8"),
            Err(error) => Found::fail(name, error.to_string(), "run as root"),
        });
    }
    found.push(ktls());
    found
}

/// What an agent needs.
pub(super) const LEAST: (u32, u32) = (6, 1);
/// What the egress guard needs.
pub(super) const WITH_GUARD: (u32, u32) = (6, 6);

/// The version in a release's name, such as `6.12.1-cloud`.
pub(super) fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-']).map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

fn version() -> Found {
    const NAME: &str = "Linux";
    let release = uname().map(|it| it.release().to_string_lossy().into_owned()).unwrap_or_default();
    match version_of(&release) {
        Some(version) if version >= WITH_GUARD => Found::ok(NAME, release),
        Some(version) if version >= LEAST => Found::warn(
            NAME,
            release,
            "the egress guard (TCX) needs 6.6; set capture.egressGuard: optional to do without",
        ),
        Some(_) => Found::fail(NAME, release, "needs Linux 6.1, better 6.6 or later"),
        None => Found::warn(NAME, "the version cannot be read", ""),
    }
}

fn btf() -> Found {
    const NAME: &str = "BTF";
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        Found::ok(NAME, "/sys/kernel/btf/vmlinux")
    } else {
        Found::fail(NAME, "no /sys/kernel/btf/vmlinux", "needs a kernel with CONFIG_DEBUG_INFO_BTF")
    }
}

fn cgroup() -> Found {
    const NAME: &str = "cgroup v2";
    match mount::cgroup2() {
        Ok(Some(path)) => Found::ok(NAME, path.display().to_string()),
        Ok(None) => Found::fail(NAME, "not mounted", "mount -t cgroup2 none /sys/fs/cgroup"),
        Err(error) => Found::fail(NAME, error.to_string(), "is /proc mounted?"),
    }
}

/// capabilities(7): numbers of those an agent needs, and for what.
const NEEDED: [(&str, u32, &str); 4] = [
    ("CAP_BPF", 39, "to load programs"),
    ("CAP_NET_ADMIN", 12, "to attach programs and set sockets' options"),
    ("CAP_SYS_ADMIN", 21, "to enter pods' network namespaces"),
    ("CAP_PERFMON", 38, "to let programs read socket fields"),
];

fn privileges() -> Vec<Found> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    NEEDED
        .iter()
        .map(|(name, bit, what)| {
            if effective & (1 << bit) != 0 {
                Found::ok(name, "held")
            } else {
                Found::fail(name, "missing", format!("run as root or grant it: it is needed {what}"))
            }
        })
        .collect()
}

fn ktls() -> Found {
    const NAME: &str = "kernel TLS";
    let detail = match ktls::probe() {
        Ok(ability) if ability.rekeys => "available, with changes of key: tunnel.kernelTls uses it".into(),
        Ok(_) => "available, without changes of key (Linux 6.14): not used".into(),
        Err(missing) => format!("not available, not needed: {missing}"),
    };
    Found::ok(NAME, detail)
}
