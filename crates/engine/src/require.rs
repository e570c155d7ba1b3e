//! What must hold before anything is changed: capabilities and kernel features. Features are tried, not read off a
//! version number, because distributions backport; the version is only named for people.

use crate::error::{Error, Result};
use crate::sys::{self, MapSpec};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Capabilities by number (include/uapi/linux/capability.h): attaching; mounts, pins and ids of BPF objects; programs.
const CAPABILITIES: [(u32, &str); 4] =
    [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];

/// Checks them all.
pub fn check() -> Result<()> {
    capabilities()?;
    mmapable_arrays()?;
    fragments()?;
    links()
}

fn capabilities() -> Result<()> {
    let path = "/proc/thread-self/status";
    let status = std::fs::read_to_string(path).map_err(|e| Error::io(format!("read {path}"), e))?;
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or_default();
    match CAPABILITIES.iter().find(|(bit, _)| effective & (1 << bit) == 0) {
        Some((_, capability)) => Err(Error::Permission { what: "start the XDP engine".into(), capability }),
        None => Ok(()),
    }
}

fn mmapable_arrays() -> Result<()> {
    let spec = MapSpec {
        kind: bpf_map_type::BPF_MAP_TYPE_ARRAY,
        name: "towpath_probe",
        value_size: 8,
        max_entries: 1,
        flags: sys::MMAPABLE,
    };
    refused_as(
        sys::map_create(spec, None),
        &[libc::EINVAL],
        "BPF arrays that can be mapped into a process",
        "Linux 5.5",
    )
}

fn fragments() -> Result<()> {
    const PASS: [u64; 2] = [0x2_0000_00b7, 0x95]; // r0 = XDP_PASS; exit
    let loaded = sys::prog_load("towpath_probe", c"Dual MIT/GPL", &PASS, &mut []);
    refused_as(loaded, &[libc::EINVAL], "XDP programs for frames of several buffers", "Linux 5.18")
}

/// A request for a link without a program fails with EBADF where XDP links are known.
fn links() -> Result<()> {
    // SAFETY: never a valid descriptor, and the kernel only looks it up.
    let nothing = unsafe { BorrowedFd::borrow_raw(i32::MAX) };
    match sys::link_create(nothing, 1, 0) {
        Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok(()),
        other => refused_as(other, &[libc::EINVAL, libc::ENOSYS], "BPF links for XDP", "Linux 5.9"),
    }
}

fn refused_as<T: AsFd>(
    tried: io::Result<T>,
    lacking: &[i32],
    feature: &'static str,
    since: &'static str,
) -> Result<()> {
    match tried {
        Ok(object) => {
            tracing::trace!(fd = object.as_fd().as_raw_fd(), feature, "present");
            Ok(())
        }
        Err(e) if e.raw_os_error().is_some_and(|code| lacking.contains(&code)) => {
            Err(Error::Kernel { release: release(), feature, since })
        }
        Err(e) => Err(Error::privileged(format!("try out {feature}"), "CAP_BPF and CAP_NET_ADMIN", e)),
    }
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "unknown".into(), |text| text.trim().into())
}
