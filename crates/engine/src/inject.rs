//! Frames for Linux from user space, which sees them received by an interface of our choice.
//!
//! A live test run (net/bpf/test_run.c 6.1, `xdp_test_run_batch`) of an XDP program that says XDP_PASS hands the frame to
//! the stack exactly as a driver in native mode does after its program said so. Nothing else in the kernel does that from
//! outside: what is written to a packet socket or a TAP leaves by the interface, or arrives by another.

use crate::error::{Error, Result};
use crate::sys;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// A way into Linux.
#[derive(Debug)]
pub struct Injector(OwnedFd);

impl Injector {
    /// Opens it. Takes CAP_BPF and CAP_NET_ADMIN.
    pub fn open() -> Result<Self> {
        let failed = |e| Error::privileged("load a program that hands frames to Linux", "CAP_BPF and CAP_NET_ADMIN", e);
        sys::load_pass().map(Self).map_err(failed)
    }

    /// Has Linux receive a frame by an interface of this thread's network namespace whose driver has memory for XDP (any
    /// driver with native support; a veth while a program is attached, or `gro on`). `SOCKET_FRAME` bytes always fit.
    pub fn inject(&self, ifindex: u32, frame: &[u8]) -> io::Result<()> {
        sys::run_live(self.0.as_fd(), frame, ifindex)
    }
}
