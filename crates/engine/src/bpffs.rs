//! Where pins live: a bpffs that outlives this process.
//!
//! `ip netns exec` gives its command a mount namespace of its own, in which /sys is mounted anew and /sys/fs/bpf is
//! empty; a bpffs mounted there dies with the command, and with it every pin. So the bpffs is the one of process 1,
//! reached through /proc/1/root, or, where that is not ours to enter (process 1 of a container's host has more
//! capabilities than we), of the oldest of our ancestors whose root we may enter.

use crate::error::{Error, Result};
use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const MOUNT_POINT: &CStr = c"/sys/fs/bpf";
/// `BPF_FS_MAGIC`, include/uapi/linux/magic.h
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// An instance's folder in a bpffs.
#[derive(Debug)]
pub struct PinDir {
    /// Keeps the way to the bpffs open although the process it was reached through may end
    _bpffs: OwnedFd,
    path: PathBuf,
    shown: PathBuf,
    created: bool,
}

/// Inode of this thread's network namespace: the name of the instance.
pub fn netns_inode() -> Result<u64> {
    let path = "/proc/thread-self/ns/net";
    Ok(std::fs::metadata(path).map_err(|e| Error::io(format!("read {path}"), e))?.ino())
}

impl PinDir {
    /// The folder of the instance `netns` (see `netns_inode`), in a bpffs that is mounted if need be. The folder
    /// itself need not exist.
    pub fn find(netns: u64) -> Result<Self> {
        let process = reference_process()?;
        let bpffs = open_mounted(process)?;
        let fd = bpffs.as_raw_fd();
        Ok(Self {
            path: PathBuf::from(format!("/proc/self/fd/{fd}/towpath/{netns}")),
            shown: PathBuf::from(format!("/sys/fs/bpf/towpath/{netns}")),
            _bpffs: bpffs,
            created: false,
        })
    }

    /// Path of the pin `name`, good in this process only.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The folder's path as an administrator outside any `ip netns exec` sees it.
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    /// True if there are pins of an instance.
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// Makes the folder.
    pub fn create(&mut self) -> Result<()> {
        if !self.path.is_dir() {
            std::fs::create_dir_all(&self.path)
                .map_err(|e| Error::io(format!("create {}", self.shown.display()), e))?;
            self.created = true;
        }
        Ok(())
    }

    /// Names of the pins, in no order.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = match std::fs::read_dir(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|e| Error::io(format!("read {}", self.shown.display()), e))?,
        };
        entries
            .map(|entry| entry.map_err(|e| Error::io(format!("read {}", self.shown.display()), e)))
            .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
            .collect()
    }

    /// Removes one pin or marker; not an error if it is absent.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.pin(name);
        let removed = if path.is_dir() { std::fs::remove_dir(&path) } else { std::fs::remove_file(&path) };
        match removed {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|e| Error::io(format!("remove {}", self.shown.join(name).display()), e)),
        }
    }

    /// Gives a pin another name, replacing what had it.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        std::fs::rename(self.pin(from), self.pin(to))
            .map_err(|e| Error::io(format!("rename {} to {to}", self.shown.join(from).display()), e))
    }

    /// Leaves a marker: a folder, the only thing besides BPF objects that a bpffs keeps and that goes with it.
    pub fn mark(&self, name: &str) -> Result<()> {
        match std::fs::create_dir(self.pin(name)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(|e| Error::io(format!("create {}", self.shown.join(name).display()), e)),
        }
    }

    /// Removes every pin, the folder, and the parent if no other instance is left.
    pub fn remove_all(&self) -> Result<()> {
        for name in self.names()? {
            self.remove(&name)?;
        }
        match std::fs::remove_dir(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io(format!("remove {}", self.shown.display()), e));
            }
            _ => {}
        }
        if let Some(parent) = self.path.parent() {
            // Fails while another instance has its folder there, which is as it should be.
            let _ = std::fs::remove_dir(parent);
        }
        Ok(())
    }

    /// Removes the folder again if this value made it and it is empty.
    pub fn discard_if_created(&self) {
        if self.created && self.names().is_ok_and(|names| names.is_empty()) {
            let _ = self.remove_all();
        }
    }
}

/// Whether there is a bpffs already where pins go.
pub fn is_mounted() -> Result<bool> {
    let path = format!("/proc/{}/root/sys/fs/bpf", reference_process()?);
    Ok(open_bpffs(&path)?.is_some())
}

/// Process 1, or the oldest ancestor (possibly this process) whose root may be entered.
fn reference_process() -> Result<u32> {
    let mut lineage = vec![std::process::id()];
    while let Some(parent) = lineage.last().and_then(|&pid| parent_of(pid)).filter(|&parent| parent != 0) {
        lineage.push(parent);
    }
    if lineage.last() != Some(&1) {
        lineage.push(1);
    }
    lineage
        .into_iter()
        .rev()
        .find(|pid| Path::new(&format!("/proc/{pid}/root/proc")).exists())
        .ok_or_else(|| Error::no_bpffs("/proc is not mounted", "mount -t proc proc /proc"))
}

fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything; the state and the parent follow it.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn open_mounted(process: u32) -> Result<OwnedFd> {
    let path = format!("/proc/{process}/root/sys/fs/bpf");
    if let Some(fd) = open_bpffs(&path)? {
        return Ok(fd);
    }
    mount_in(process)?;
    open_bpffs(&path)?.ok_or_else(|| {
        Error::no_bpffs("it was mounted at /sys/fs/bpf but is not seen there", "mount -t bpf bpf /sys/fs/bpf")
    })
}

/// The folder if it is a bpffs.
fn open_bpffs(path: &str) -> Result<Option<OwnedFd>> {
    let missing = |e: io::Error| {
        Error::no_bpffs(format!("{path}: {e} (the kernel needs CONFIG_BPF_SYSCALL)"), "mount -t bpf bpf /sys/fs/bpf")
    };
    let dir: File =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC).open(path).map_err(missing)?;
    // SAFETY: statfs is plain integers, for which zeroes are valid; the descriptor is open.
    let (ret, stat) = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(dir.as_raw_fd(), &mut stat), stat)
    };
    if ret < 0 {
        return Err(Error::io(format!("statfs {path}"), io::Error::last_os_error()));
    }
    Ok((stat.f_type & 0xffff_ffff == BPF_FS_MAGIC).then(|| dir.into()))
}

/// Mounts a bpffs at /sys/fs/bpf in the mount namespace of `process`, from a child that joins it and ends.
fn mount_in(process: u32) -> Result<()> {
    let remedy = "mount -t bpf bpf /sys/fs/bpf";
    let namespace = format!("/proc/{process}/ns/mnt");
    let file = File::open(&namespace).map_err(|e| Error::no_bpffs(format!("open {namespace}: {e}"), remedy))?;
    // SAFETY: the child only makes system calls with arguments prepared here and ends with _exit; it allocates
    // nothing and takes no locks, as is required after fork in a process with threads.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            let ok = libc::setns(file.as_raw_fd(), libc::CLONE_NEWNS) == 0
                && libc::mount(c"bpf".as_ptr(), MOUNT_POINT.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null()) == 0;
            libc::_exit(if ok { 0 } else { *libc::__errno_location() });
        }
        let mut status = 0;
        if child < 0 || libc::waitpid(child, &mut status, 0) < 0 {
            return Err(Error::io("start a child to mount a bpffs", io::Error::last_os_error()));
        }
        status
    };
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::from_raw_os_error(libc::WEXITSTATUS(status));
    let why = match error.raw_os_error() {
        Some(libc::EPERM) => format!(
            "mounting one at /sys/fs/bpf failed: {error}; it needs CAP_SYS_ADMIN (`ip netns exec` hides the one there \
             may be from a process without it; `nsenter --net=/run/netns/NAME` does not)"
        ),
        _ => format!("mounting one at /sys/fs/bpf failed: {error}"),
    };
    Err(Error::no_bpffs(why, remedy))
}
