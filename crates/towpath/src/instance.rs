//! An instance serves one network namespace and is named by its inode: where its lock and sockets lie, and who holds
//! the lock.

use anyhow::{Context, Result, bail};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The instance of the network namespace this process is in.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Inode of the namespace (see `ip netns identify`, `ls -Li /proc/self/ns/net`)
    pub inode: u64,
    directory: PathBuf,
}

/// The lock is held while this lives; the file names the holder's pid.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "held for its lock")] File);

impl Instance {
    /// The instance of the calling process's namespace.
    pub fn current() -> Result<Self> {
        let inode =
            fs::metadata("/proc/self/ns/net").context("cannot read /proc/self/ns/net; is /proc mounted?")?.ino();
        Ok(Self { inode, directory: Path::new("/run/towpath").join(inode.to_string()) })
    }

    /// Socket on which the daemon answers the command.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.join("control.sock")
    }

    /// Socket on which a separate FPM awaits its CM.
    pub fn fpc_socket(&self) -> PathBuf {
        self.directory.join("fpc.sock")
    }

    fn lock_file(&self) -> PathBuf {
        self.directory.join("lock")
    }

    fn open_lock(&self) -> Result<File> {
        const TIMES: usize = 100;
        let path = self.lock_file();
        // Whoever ends may take the folder away just before the file is made in it.
        for _ in 1..TIMES {
            match self.make_lock(&path) {
                Err(error) if is_missing(&error) => {}
                made => return made,
            }
        }
        self.make_lock(&path)
    }

    fn make_lock(&self, path: &Path) -> Result<File> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.directory)
            .map_err(|error| denied("make", &self.directory, error))?;
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(path).map_err(|error| {
            // It is empty if it is ours.
            let _ = fs::remove_dir(&self.directory);
            denied("open", path, error)
        })
    }

    /// Takes the instance for this process. Fails at once, naming the holder, if another process has it.
    pub fn lock(&self) -> Result<Lock> {
        match self.try_lock()? {
            Ok(lock) => Ok(lock),
            Err(holder) => bail!(
                "another towpath serves this network namespace already (pid {holder}); \
                 see `towpath status`, or stop it with `towpath down`"
            ),
        }
    }

    /// As `lock`, but waits for a holder to leave, and does `meanwhile` over and over as long as there is one.
    pub fn lock_within(&self, limit: Duration, mut meanwhile: impl FnMut() -> Result<()>) -> Result<Lock> {
        let deadline = Instant::now() + limit;
        loop {
            match self.try_lock()? {
                Ok(lock) => return Ok(lock),
                Err(holder) if Instant::now() > deadline => {
                    bail!("the daemon (pid {holder}) did not stop within {} s", limit.as_secs())
                }
                Err(_) => {
                    meanwhile()?;
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    /// The lock, or the pid of its holder.
    fn try_lock(&self) -> Result<Result<Lock, String>> {
        loop {
            let mut file = self.open_lock()?;
            if !try_lock(&file)? {
                return Ok(Err(read_pid(&mut file).map_or("unknown".into(), |pid| pid.to_string())));
            }
            if !self.is_current(&file) {
                continue; // its former holder removed the file while we waited
            }
            let written = write_pid(&mut file);
            let lock = Lock(file);
            return match written {
                Ok(()) => Ok(Ok(lock)),
                Err(error) => {
                    self.remove(lock);
                    Err(error).with_context(|| format!("cannot write {}", self.lock_file().display()))
                }
            };
        }
    }

    fn is_current(&self, file: &File) -> bool {
        match (file.metadata(), fs::metadata(self.lock_file())) {
            (Ok(held), Ok(named)) => held.ino() == named.ino() && held.dev() == named.dev(),
            _ => false,
        }
    }

    /// Pid of the process that holds the instance; None if nobody does.
    pub fn holder(&self) -> Option<u32> {
        let mut file = File::open(self.lock_file()).ok()?;
        match try_lock(&file) {
            Ok(false) => read_pid(&mut file),
            _ => None,
        }
    }

    /// Removes the instance's files; the caller holds the lock.
    pub fn remove(&self, lock: Lock) {
        for path in [self.control_socket(), self.fpc_socket(), self.lock_file()] {
            let _ = fs::remove_file(path);
        }
        let _ = fs::remove_dir(&self.directory);
        drop(lock);
    }
}

fn denied(what: &str, path: &Path, error: std::io::Error) -> anyhow::Error {
    let remedy = if error.kind() == std::io::ErrorKind::PermissionDenied { "; run as root" } else { "" };
    anyhow::Error::from(error).context(format!("cannot {what} {}{remedy}", path.display()))
}

fn try_lock(file: &File) -> Result<bool> {
    // SAFETY: flock on a descriptor that `file` keeps open.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
        return Ok(true);
    }
    let error = std::io::Error::last_os_error();
    if error.kind() == std::io::ErrorKind::WouldBlock {
        return Ok(false);
    }
    Err(error).context("cannot lock the instance")
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn write_pid(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn is_missing(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_goes_is_told_from_one_that_may_not_be() {
        let error = |number| anyhow::Error::from(std::io::Error::from_raw_os_error(number)).context("cannot open it");
        assert!(is_missing(&error(libc::ENOENT)));
        assert!(!is_missing(&error(libc::EACCES)));
    }

    fn scratch(name: &str) -> Instance {
        let directory = std::env::temp_dir().join(format!("towpath-instance-{}-{name}", std::process::id()));
        Instance { inode: 1, directory }
    }

    #[test]
    fn a_second_holder_is_told_who_the_first_is() {
        let instance = scratch("second");
        let lock = instance.lock().unwrap();
        let message = instance.lock().unwrap_err().to_string();
        assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
        assert_eq!(instance.holder(), Some(std::process::id()));
        drop(lock);
        assert_eq!(instance.holder(), None);
        let lock = instance.lock().unwrap();
        instance.remove(lock);
        assert!(!instance.directory.exists());
    }

    #[test]
    fn waiting_for_the_lock_ends() {
        let instance = scratch("wait");
        let lock = instance.lock().unwrap();
        assert!(instance.lock_within(Duration::from_millis(30), || Ok(())).is_err());
        instance.remove(lock);
    }
}
