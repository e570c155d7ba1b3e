//! What must hold before anything is changed: capabilities and kernel features. Features are tried, not read off a
//! version number, because distributions backport; the version is only named for people.

use crate::error::{Error, Result};
use crate::sys::{self, MapSpec};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Capabilities by number (include/uapi/linux/capability.h): attaching and device settings, programs that compare
/// pointers and run without the checks for untrusted ones, BPF itself. What further needs CAP_SYS_ADMIN is mounting a
/// bpffs where there is none, which says so itself.
const CAPABILITIES: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];

/// Something that old kernels lack.
struct Feature {
    /// In words
    name: &'static str,
    /// First version that has it
    since: &'static str,
    /// What a kernel without it answers
    lacking: &'static [i32],
    /// Tries it out; what it makes goes again
    probe: fn() -> io::Result<Option<OwnedFd>>,
}

const FEATURES: [Feature; 3] = [
    Feature {
        name: "BPF arrays that can be mapped into a process",
        since: "Linux 5.5",
        lacking: &[libc::EINVAL],
        probe: mmapable_array,
    },
    Feature {
        name: "XDP programs for frames of several buffers",
        since: "Linux 5.18",
        lacking: &[libc::EINVAL],
        probe: fragments,
    },
    Feature {
        name: "BPF links for XDP",
        since: "Linux 5.9",
        lacking: &[libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP],
        probe: link,
    },
];

/// Checks them all.
pub fn check() -> Result<()> {
    let path = "/proc/thread-self/status";
    let status = std::fs::read_to_string(path).map_err(|e| Error::io(format!("read {path}"), e))?;
    capabilities(&status)?;
    FEATURES.iter().try_for_each(|feature| feature.judge((feature.probe)()))
}

/// Looks for the capabilities in a thread's status (proc_pid_status(5)).
fn capabilities(status: &str) -> Result<()> {
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or_default();
    match CAPABILITIES.iter().find(|(bit, _)| effective & (1 << bit) == 0) {
        Some((_, capability)) => Err(Error::Permission { what: "start the XDP engine".into(), capability }),
        None => Ok(()),
    }
}

impl Feature {
    /// What the kernel's answer to the probe means.
    fn judge(&self, answer: io::Result<Option<OwnedFd>>) -> Result<()> {
        match answer {
            Ok(_) => Ok(()),
            Err(e) if e.raw_os_error().is_some_and(|code| self.lacking.contains(&code)) => {
                Err(Error::Kernel { release: release(), feature: self.name, since: self.since })
            }
            Err(e) => Err(Error::privileged(format!("try out {}", self.name), "CAP_BPF and CAP_NET_ADMIN", e)),
        }
    }
}

fn mmapable_array() -> io::Result<Option<OwnedFd>> {
    let spec = MapSpec {
        kind: bpf_map_type::BPF_MAP_TYPE_ARRAY,
        name: "towpath_probe",
        value_size: 8,
        max_entries: 1,
        flags: sys::MMAPABLE,
    };
    sys::map_create(spec, None).map(Some)
}

fn fragments() -> io::Result<Option<OwnedFd>> {
    sys::load_pass().map(Some)
}

/// A request for a link without a program fails with EBADF where XDP links are known.
fn link() -> io::Result<Option<OwnedFd>> {
    // SAFETY: never a valid descriptor, and the kernel only looks it up.
    let nothing = unsafe { BorrowedFd::borrow_raw(i32::MAX) };
    match sys::link_create(nothing, 1, sys::AttachType::Xdp, 0) {
        Err(e) if e.raw_os_error() == Some(libc::EBADF) => Ok(None),
        other => other.map(Some),
    }
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").map_or_else(|_| "unknown".into(), |text| text.trim().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_everything() {
        check().unwrap();
    }

    #[test]
    fn old_kernels_are_told_what_they_lack_and_since_when_it_is_there() {
        for feature in &FEATURES {
            for code in feature.lacking {
                let message = feature.judge(Err(io::Error::from_raw_os_error(*code))).unwrap_err().to_string();
                for word in [&*release(), "too old", feature.name, feature.since] {
                    assert!(message.contains(word), "{word:?} is missing in: {message}");
                }
            }
        }
    }

    #[test]
    fn other_answers_do_not_blame_the_version() {
        let judge = |code| FEATURES[1].judge(Err(io::Error::from_raw_os_error(code))).unwrap_err();
        assert!(matches!(judge(libc::EPERM), Error::Permission { .. }), "{}", judge(libc::EPERM));
        assert!(matches!(judge(libc::ENOMEM), Error::Io { .. }), "{}", judge(libc::ENOMEM));
    }

    #[test]
    fn the_first_missing_capability_is_named() {
        let missing = |effective: &str| match capabilities(&format!("Name:\tx\nCapEff:\t{effective}\n")) {
            Ok(()) => "none",
            Err(Error::Permission { capability, .. }) => capability,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(missing("000000c000001000"), "none");
        assert_eq!(missing("000000c000000000"), "CAP_NET_ADMIN");
        assert_eq!(missing("0000008000001000"), "CAP_PERFMON");
        assert_eq!(missing("0000004000001000"), "CAP_BPF");
        assert_eq!(missing("not a number"), "CAP_NET_ADMIN");
    }
}
