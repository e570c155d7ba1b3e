//! Names of what labs make, and removal of what a killed process could not remove itself.

use crate::wait_for;
use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const PREFIX: &str = "towpath-lab";
/// Where iproute2 keeps named network namespaces.
pub const NETNS: &str = "/run/netns";

/// Prefix of the names that belong to lab number `number` of this process.
pub fn prefix(number: u32, lab: &str) -> String {
    format!("{PREFIX}-{}-{number}-{lab}", std::process::id())
}

/// Removes namespaces and folders of labs whose process is gone.
pub fn remove() -> Result<()> {
    for name in entries(Path::new(NETNS)).filter(|name| orphaned(name)) {
        remove_namespace(&name)?;
    }
    for name in entries(&std::env::temp_dir()).filter(|name| orphaned(name)) {
        let _ = fs::remove_dir_all(std::env::temp_dir().join(name));
    }
    Ok(())
}

/// Ends every process inside the namespace, removes what Towpath pinned for it, and the namespace itself.
pub fn remove_namespace(name: &str) -> Result<()> {
    let path = Path::new(NETNS).join(name);
    let Ok(inode) = fs::metadata(&path).map(|m| m.ino()) else { return Ok(()) };
    let ended = end_processes_in(inode).with_context(|| format!("in the network namespace {name}"));
    for folder in towpath_state(inode) {
        let _ = fs::remove_dir_all(folder);
    }
    let output = std::process::Command::new("ip").args(["netns", "del", name]).output().context("cannot run ip")?;
    // Another process may have been removing the same leftover.
    anyhow::ensure!(
        output.status.success() || !path.exists(),
        "cannot remove the network namespace {name}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    ended
}

/// Where an instance of Towpath for the namespace keeps pins and its control socket; they outlive it on purpose.
fn towpath_state(inode: u64) -> [PathBuf; 3] {
    ["/sys/fs/bpf/towpath", "/proc/1/root/sys/fs/bpf/towpath", "/run/towpath"]
        .map(|p| Path::new(p).join(inode.to_string()))
}

fn orphaned(name: &str) -> bool {
    let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-')?.split('-').next()?.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// Kills them until none is left: one may have started another meanwhile.
fn end_processes_in(inode: u64) -> Result<()> {
    wait_for(Duration::from_secs(10), "every process to end", || {
        let mut none = true;
        for pid in processes_in(inode) {
            none = false;
            // SAFETY: kill takes plain integers. The process lives in a namespace that this lab made.
            unsafe { libc::kill(pid as i32, libc::SIGKILL) };
        }
        none.then_some(())
    })
}

fn processes_in(inode: u64) -> impl Iterator<Item = u32> {
    let own = std::process::id();
    entries(Path::new("/proc"))
        .filter_map(|name| name.parse().ok())
        .filter(move |pid| *pid != own && is_in(*pid, inode))
}

/// Whether the process lives in the network namespace. A dead one that nobody has asked about lives nowhere.
pub fn is_in(pid: u32, inode: u64) -> bool {
    fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| m.ino() == inode)
}

fn entries(folder: &Path) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_processes_are_orphaned() {
        assert!(!orphaned(&prefix(0, "x")), "ours is alive");
        assert!(orphaned("towpath-lab-4194999-0-x-r"), "above the largest pid");
        assert!(!orphaned("towpath-lab-x-r"));
        assert!(!orphaned("other-4194999-0-x"));
    }

    #[test]
    fn what_a_dead_process_left_is_removed() -> Result<()> {
        let name = "towpath-lab-4194998-0-dead-a";
        assert!(std::process::Command::new("ip").args(["netns", "add", name]).status()?.success());
        remove()?;
        assert!(!Path::new(NETNS).join(name).exists());
        Ok(())
    }
}
