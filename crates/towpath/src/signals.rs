//! SIGINT, SIGTERM and SIGHUP as an event of the daemon's loop. A terminal that closes ends the daemon as Ctrl-C does:
//! without it, programs would go on forwarding by what was true then.

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
            // nohup(1) asks to ignore it; to wait for a signal would undo that.
            if !is_ignored(libc::SIGHUP) {
                libc::sigaddset(&mut set, libc::SIGHUP);
            }
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
        match signal {
            libc::SIGINT => "SIGINT",
            libc::SIGHUP => "SIGHUP",
            _ => "SIGTERM",
        }
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: sigaction is plain data, for which zeroes are valid, and is only filled in.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, std::ptr::null(), &mut action) == 0 && action.sa_sigaction == libc::SIG_IGN
    }
}
