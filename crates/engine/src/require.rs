//! What must hold before anything is changed: capabilities and kernel features. Features are tried, not read off a
//! version number, because distributions backport; the version is only named for people.

use crate::error::{Error, Result};
use crate::sys::{self, MapSpec};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

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

/// Something that must hold.
pub struct Requirement {
    /// The capability, or what of the kernel
    pub what: &'static str,
    /// Whether it does
    pub met: Result<()>,
}

/// Checks them all.
pub fn check() -> Result<()> {
    requirements()?.try_for_each(|requirement| requirement.met)
}

/// Everything that must hold, the calling thread's capabilities first; each feature is tried when it is asked for.
pub fn requirements() -> Result<impl Iterator<Item = Requirement>> {
    let feature = |feature: &Feature| Requirement { what: feature.name, met: feature.judge((feature.probe)()) };
    Ok(capabilities(effective(&thread_status()?)).chain(FEATURES.iter().map(feature)))
}

/// Whether memory may be locked beyond the limit, as AF_XDP's buffers are.
pub fn may_lock_memory() -> Result<bool> {
    const CAP_IPC_LOCK: u32 = 14;
    has(CAP_IPC_LOCK)
}

/// Whether packet sockets and those of AF_XDP may be opened.
pub fn may_open_raw_sockets() -> Result<bool> {
    const CAP_NET_RAW: u32 = 13;
    has(CAP_NET_RAW)
}

fn has(capability: u32) -> Result<bool> {
    Ok(effective(&thread_status()?) & (1 << capability) != 0)
}

fn thread_status() -> Result<String> {
    let path = "/proc/thread-self/status";
    std::fs::read_to_string(path).map_err(|e| Error::io(format!("read {path}"), e))
}

/// The capabilities in a thread's status (proc_pid_status(5)).
fn effective(status: &str) -> u64 {
    let of_line = |line: &str| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok();
    status.lines().find_map(of_line).unwrap_or_default()
}

fn capabilities(effective: u64) -> impl Iterator<Item = Requirement> {
    CAPABILITIES.into_iter().map(move |(bit, capability)| {
        let missing = || Error::Permission { what: "start the XDP engine".into(), capability };
        let met = if effective & (1 << bit) == 0 { Err(missing()) } else { Ok(()) };
        Requirement { what: capability, met }
    })
}

/// Whether the kernel compiles programs for the processor; otherwise it interprets them.
pub fn compiles() -> Result<bool> {
    let failed = |e| Error::io("ask for what became of a program", e);
    let program = sys::load_pass().map_err(failed)?;
    Ok(sys::program_info(program.as_fd()).map_err(failed)?.jited_prog_len != 0)
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

/// Version of the running kernel, as `uname -r` has it.
pub fn release() -> String {
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
        let missing = |effective: &str| {
            let mut all = capabilities(super::effective(&format!("Name:\tx\nCapEff:\t{effective}\n")));
            match all.find_map(|requirement| requirement.met.err()) {
                None => "none",
                Some(Error::Permission { capability, .. }) => capability,
                Some(other) => panic!("{other}"),
            }
        };
        assert_eq!(missing("000000c000001000"), "none");
        assert_eq!(missing("000000c000000000"), "CAP_NET_ADMIN");
        assert_eq!(missing("0000008000001000"), "CAP_PERFMON");
        assert_eq!(missing("0000004000001000"), "CAP_BPF");
        assert_eq!(missing("not a number"), "CAP_NET_ADMIN");
    }
}
