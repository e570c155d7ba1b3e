//! What only files in /proc/net tell: read at every poll, so kept open, and found cheaply while they are not there.

use crate::error::CmError;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// A file fills what it is read into up to the first line that finds no room, and a page at most (fs/seq_file.c, Linux 6.1).
const PAGE: usize = 4096;
/// No line is longer.
const LINE: usize = 512;

/// A file of /proc/net that may come and go with a module.
///
/// To look for a name in /proc that is not there takes the kernel several times as long as all the rest of a poll, since
/// it remembers none. So where a module is needed that was not there at first, it is looked for instead, in sysfs, which does
/// (fs/kernfs/dir.c, kernfs_dop_revalidate, 6.1), and where a module is seen before anything of it can be used.
pub struct ProcNet {
    name: &'static CStr,
    /// What has the file made
    module: &'static CStr,
    /// /sys/module, if it can be seen
    modules: Option<OwnedFd>,
    /// The file was not there when it was last looked for, and nor was the module
    absent: bool,
    /// /proc/net of a network namespace: a name looked up in it is found cheaply
    folder: OwnedFd,
    file: Option<File>,
    text: Vec<u8>,
}

impl ProcNet {
    /// Of the thread's namespace.
    pub fn new(name: &'static CStr, module: &'static CStr) -> Result<Self, CmError> {
        let path = "/proc/thread-self/net";
        let folder = File::open(path).map_err(|e| CmError::io(path, e))?.into();
        let modules = File::open("/sys/module").ok().map(OwnedFd::from);
        Ok(Self { name, module, modules, absent: false, folder, file: None, text: Vec::new() })
    }

    /// What is in it, if it is there.
    pub fn read(&mut self) -> Result<Option<&str>, CmError> {
        // One that was open when its module went gives an error.
        if self.file.is_some() && self.fill().is_err() {
            self.file = None;
        }
        if self.file.is_none() {
            if self.absent && !self.may_have_come() {
                return Ok(None);
            }
            // The module first: it may come in between.
            self.absent = !self.may_have_come();
            match self.open() {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(self.error(error)),
            }
            self.fill().map_err(|error| self.error(error))?;
        }
        str::from_utf8(&self.text).map(Some).map_err(|error| CmError::decode(self.path(), error))
    }

    fn fill(&mut self) -> io::Result<()> {
        self.text.clear();
        let Some(file) = &self.file else { return Ok(()) };
        loop {
            let begin = self.text.len();
            self.text.resize(begin + PAGE, 0);
            let length = file.read_at(&mut self.text[begin..], begin as u64)?;
            self.text.truncate(begin + length);
            if length < PAGE - LINE {
                return Ok(());
            }
        }
    }

    /// Whether the module is there, or cannot be seen.
    fn may_have_come(&self) -> bool {
        let Some(modules) = &self.modules else { return true };
        // SAFETY: the name is a string with its NUL, and the directory is open.
        let found = unsafe { libc::faccessat(modules.as_raw_fd(), self.module.as_ptr(), libc::F_OK, 0) };
        found == 0 || io::Error::last_os_error().kind() != io::ErrorKind::NotFound
    }

    fn open(&self) -> io::Result<File> {
        // SAFETY: the name is a string with its NUL, and the directory is open.
        let fd = unsafe { libc::openat(self.folder.as_raw_fd(), self.name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor, and nothing else owns it.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    fn path(&self) -> String {
        format!("/proc/net/{}", self.name.to_string_lossy())
    }

    fn error(&self, error: io::Error) -> CmError {
        CmError::io(self.path(), error)
    }
}
