//! Waiting for descriptors, level-triggered.

use crate::error::CmError;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// A set of descriptors to wait for, each with a token.
pub struct Epoll(OwnedFd);

impl Epoll {
    /// An empty set.
    pub fn new() -> Result<Self, CmError> {
        // SAFETY: takes no pointers; the result is checked before use.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(CmError::last_os("epoll_create1"));
        }
        // SAFETY: the kernel just made this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Waits for `fd` too, as long as it is open.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> Result<(), CmError> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        // SAFETY: `event` lives across the call, both descriptors are open.
        let rc = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event) };
        if rc < 0 { Err(CmError::last_os("epoll_ctl")) } else { Ok(()) }
    }

    /// Tokens of the descriptors that are readable, at most 16, after waiting for at most `timeout`.
    pub fn wait(&self, timeout: Duration) -> Result<Vec<u64>, CmError> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // Rounded up, so that a deadline has passed when it returns.
        let millis = timeout.as_micros().div_ceil(1000).min(60_000) as libc::c_int;
        // SAFETY: the pointer and count describe `events`, which lives across the call.
        let count =
            unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, millis) };
        match usize::try_from(count) {
            Ok(count) => Ok(events.iter().take(count).map(|event| event.u64).collect()),
            Err(_) => match std::io::Error::last_os_error() {
                e if e.kind() == std::io::ErrorKind::Interrupted => Ok(Vec::new()),
                e => Err(CmError::io("epoll_wait", e)),
            },
        }
    }
}
