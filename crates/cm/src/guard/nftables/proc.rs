//! What of netfilter only files in /proc tell.

use crate::error::CmError;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// /proc/net of a network namespace: a name looked up in it is found cheaply.
pub struct ProcNet(OwnedFd);

impl ProcNet {
    /// Of the thread's namespace.
    pub fn new() -> Result<Self, CmError> {
        let path = "/proc/thread-self/net";
        Ok(Self(File::open(path).map_err(|e| CmError::io(path, e))?.into()))
    }

    /// What is in a file of it, if there is one.
    pub fn read(&self, name: &CStr) -> Result<Option<String>, CmError> {
        let read = self.open(name).and_then(io::read_to_string);
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            read => read.map(Some).map_err(|e| CmError::io(format!("/proc/net/{}", name.to_string_lossy()), e)),
        }
    }

    fn open(&self, name: &CStr) -> io::Result<File> {
        // SAFETY: the name is a string with its NUL, and the directory is open.
        let fd = unsafe { libc::openat(self.0.as_raw_fd(), name.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor, and nothing else owns it.
        Ok(unsafe { File::from_raw_fd(fd) })
    }
}
