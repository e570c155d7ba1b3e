//! The kernel, the process, and what the user engine would find.

use super::checks::{Check, finding};
use crate::report::{Finding, State};
use anyhow::Result;
use std::fs::read_to_string;
use std::path::Path;
use towpath_engine::{Error, Requirement};

const KERNEL: &str = "kernel";
const PROCESS: &str = "process";
const USER: &str = "user engine";
/// All that is needed with either engine.
const GRANT: &str = "setcap cap_net_admin,cap_perfmon,cap_bpf,cap_net_raw+ep $(command -v towpath)";

/// What holds for every port.
pub fn look() -> Result<Vec<Finding>> {
    let mut findings = vec![finding(Check::Kernel, KERNEL, State::Well, towpath_engine::release())];
    findings.extend(towpath_engine::requirements()?.map(requirement));
    findings.push(bpffs());
    findings.push(jit());
    findings.push(btf());
    findings.push(xdp_features());
    Ok(findings)
}

/// What holds for the workers of the user engine.
pub fn user_engine() -> Vec<Finding> {
    vec![cores(), isolated_cores(), huge_pages(), raw_sockets(), locked_memory()]
}

fn requirement(Requirement { what, met }: Requirement) -> Finding {
    let privilege = what.starts_with("CAP_");
    let (check, about) = if privilege { (Check::Capability, PROCESS) } else { (Check::Feature, KERNEL) };
    match met {
        Ok(()) => finding(check, about, State::Well, what),
        Err(error @ Error::Permission { .. }) => {
            finding(check, about, State::Stops, format!("{what}: {error}")).with(GRANT)
        }
        Err(error) => finding(check, about, State::Stops, error.to_string()),
    }
}

fn bpffs() -> Finding {
    const REMEDY: &str = "mount -t bpf bpf /sys/fs/bpf";
    match towpath_engine::is_mounted() {
        Ok(true) => finding(Check::Bpffs, KERNEL, State::Well, "mounted at /sys/fs/bpf"),
        Ok(false) => finding(Check::Bpffs, KERNEL, State::Slower, "none at /sys/fs/bpf").with(REMEDY),
        Err(error) => finding(Check::Bpffs, KERNEL, State::Stops, error.to_string()).with(REMEDY),
    }
}

fn jit() -> Finding {
    match towpath_engine::compiles() {
        Ok(true) => finding(Check::Jit, KERNEL, State::Well, "programs are compiled"),
        Ok(false) => finding(Check::Jit, KERNEL, State::Slower, "programs are interpreted")
            .with("sysctl -w net.core.bpf_jit_enable=1"),
        Err(error) => finding(Check::Jit, KERNEL, State::Unknown, error.to_string()),
    }
}

fn btf() -> Finding {
    const PATH: &str = "/sys/kernel/btf/vmlinux";
    match Path::new(PATH).exists() {
        true => finding(Check::Btf, KERNEL, State::Well, PATH),
        false => finding(Check::Btf, KERNEL, State::Slower, format!("no {PATH} (CONFIG_DEBUG_INFO_BTF)")),
    }
}

fn xdp_features() -> Finding {
    const LOOPBACK: u32 = 1;
    match towpath_engine::xdp_features(LOOPBACK) {
        Ok(Some(_)) => finding(Check::XdpFeatures, KERNEL, State::Well, "told by netlink family netdev"),
        Ok(None) => {
            finding(Check::XdpFeatures, KERNEL, State::Slower, "not told (Linux 6.3 has netlink family netdev)")
        }
        Err(error) => finding(Check::XdpFeatures, KERNEL, State::Unknown, error.to_string()),
    }
}

fn cores() -> Finding {
    match towpath_user::usable_cores() {
        Ok(cores) if cores.len() > 1 => {
            finding(Check::Cores, USER, State::Well, format!("{} may be used", cores.len()))
        }
        Ok(_) => finding(Check::Cores, USER, State::Slower, "only one may be used, and everything else runs there too"),
        Err(error) => finding(Check::Cores, USER, State::Unknown, error.to_string()),
    }
}

fn isolated_cores() -> Finding {
    let isolated = read_to_string("/sys/devices/system/cpu/isolated").unwrap_or_default();
    match isolated.trim() {
        "" => finding(Check::IsolatedCores, USER, State::Slower, "none; here with core 1, from the next boot on").with(
            "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX isolcpus=1 nohz_full=1 rcu_nocbs=1\"' >> /etc/default/grub && update-grub",
        ),
        cores => finding(Check::IsolatedCores, USER, State::Well, cores),
    }
}

fn huge_pages() -> Finding {
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
    match read_to_string(PATH) {
        Ok(text) if text.contains("[never]") => {
            finding(Check::HugePages, USER, State::Slower, "transparent ones are switched off")
                .with(format!("echo madvise > {PATH}"))
        }
        Ok(_) => finding(Check::HugePages, USER, State::Well, "transparent ones are granted"),
        Err(error) => finding(Check::HugePages, USER, State::Slower, format!("no transparent ones: {PATH}: {error}")),
    }
}

fn raw_sockets() -> Finding {
    match towpath_engine::may_open_raw_sockets() {
        Ok(true) => finding(Check::RawSockets, USER, State::Well, "may be opened (CAP_NET_RAW)"),
        Ok(false) => {
            finding(Check::RawSockets, USER, State::Slower, "without CAP_NET_RAW no worker starts").with(GRANT)
        }
        Err(error) => finding(Check::RawSockets, USER, State::Unknown, error.to_string()),
    }
}

fn locked_memory() -> Finding {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is ours, and the call fills it.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) } == 0;
    let unlimited = known && limit.rlim_cur == libc::RLIM_INFINITY;
    match towpath_engine::may_lock_memory() {
        Ok(true) => finding(Check::LockedMemory, USER, State::Well, "as much as there is (CAP_IPC_LOCK)"),
        _ if unlimited => finding(Check::LockedMemory, USER, State::Well, "without limit"),
        _ => {
            let found = format!("limited to {}", crate::text::bytes(limit.rlim_cur));
            finding(Check::LockedMemory, USER, State::Slower, found).with("ulimit -l unlimited")
        }
    }
}
