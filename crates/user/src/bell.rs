//! What wakes a worker.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Rung from any thread; its worker sleeps until it can be read from.
pub struct Bell {
    fd: OwnedFd,
    /// The worker sleeps, or is about to
    asleep: AtomicBool,
}

impl Bell {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and nobody else's.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, asleep: AtomicBool::new(false) })
    }

    /// Wakes the worker, now or when it is about to sleep.
    pub fn ring(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: `one` is as long as said. It can only fail if the bell rings already.
        unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Wakes the worker if it sleeps, for whoever has just put something where it will look.
    pub fn ring_if_asleep(&self) {
        // Pairs with the fence in `lie_down`: either this sees that the worker sleeps, or the worker sees what was put there.
        // Without it a frame could lie there until the next one comes.
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) {
            self.ring();
        }
    }

    /// The worker is about to sleep: it is to look once more at what others put there for it.
    pub fn lie_down(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        // Pairs with the fence in `ring_if_asleep`.
        fence(Ordering::SeqCst);
    }

    /// The worker is awake.
    pub fn get_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        let mut count = [0u8; 8];
        // SAFETY: `count` is as long as said. It fails if the bell does not ring, which is what is wanted.
        unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
