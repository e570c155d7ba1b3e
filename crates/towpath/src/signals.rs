//! SIGINT and SIGTERM as an event of the daemon's loop.

use anyhow::{Context, Result};

/// Signals that end the daemon, blocked in this thread and all it starts from now on.
pub struct Termination(libc::sigset_t);

impl Termination {
    /// Blocks the signals. Call before any thread is started.
    pub fn block() -> Result<Self> {
        // SAFETY: sigset_t is plain data that sigemptyset initialises; the calls get valid pointers.
        let (set, error) = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGINT);
            libc::sigaddset(&mut set, libc::SIGTERM);
            (set, libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()))
        };
        if error != 0 {
            return Err(std::io::Error::from_raw_os_error(error)).context("cannot block signals");
        }
        Ok(Self(set))
    }

    /// Waits for one of the signals and returns its name.
    pub fn wait(&self) -> &'static str {
        let mut signal = 0;
        // SAFETY: the set was initialised by `block`, and `signal` outlives the call.
        while unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {}
        if signal == libc::SIGINT { "SIGINT" } else { "SIGTERM" }
    }
}
