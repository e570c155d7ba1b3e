//! Waiting for every XDP program in flight to end.
//!
//! XDP programs run under RCU, so what they can no longer find is free after an RCU grace period.
//! `membarrier(MEMBARRIER_CMD_GLOBAL)` is one (kernel/sched/membarrier.c: `synchronize_rcu`; on a single CPU nothing,
//! because a program in flight would have to have been preempted, and softirqs are not). With `nohz_full` the kernel
//! does not offer it. An array of maps then does: an update of an element waits for programs that may still use the
//! old one (kernel/bpf/syscall.c `maybe_wait_bpf_programs`, since 5.0: `synchronize_rcu`).

use crate::error::{Error, Result};
use crate::sys::{self, MapSpec};
use aya_obj::generated::bpf_map_type;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const MEMBARRIER_QUERY: libc::c_long = 0;
const RETRY: std::time::Duration = std::time::Duration::from_millis(100);
const MEMBARRIER_GLOBAL: libc::c_long = 1;

/// A way to wait, chosen once.
#[derive(Debug)]
pub enum GraceMethod {
    /// The system call
    Membarrier,
    /// An array of maps, and the map stored into it
    MapUpdate(OwnedFd, OwnedFd),
}

impl GraceMethod {
    /// The best this kernel offers.
    pub fn choose() -> Result<Self> {
        match membarrier(MEMBARRIER_QUERY) {
            Ok(commands) if commands & MEMBARRIER_GLOBAL != 0 => Ok(Self::Membarrier),
            _ => Self::map_update(),
        }
    }

    /// The one that needs no membarrier.
    pub fn map_update() -> Result<Self> {
        let failed = |e| Error::privileged("create an array of maps, for grace periods", "CAP_BPF", e);
        let array = MapSpec {
            kind: bpf_map_type::BPF_MAP_TYPE_ARRAY,
            name: "towpath_inner",
            value_size: 4,
            max_entries: 1,
            flags: 0,
        };
        let inner = sys::map_create(array, None).map_err(failed)?;
        let kind = bpf_map_type::BPF_MAP_TYPE_ARRAY_OF_MAPS;
        let outer =
            sys::map_create(MapSpec { kind, name: "towpath_grace", ..array }, Some(inner.as_fd())).map_err(failed)?;
        Ok(Self::MapUpdate(outer, inner))
    }

    /// Returns once every program that ran when it was called has ended.
    pub fn wait(&self) -> Result<()> {
        let waited = match self {
            Self::Membarrier => membarrier(MEMBARRIER_GLOBAL).map(drop),
            Self::MapUpdate(outer, inner) => sys::map_update(outer.as_fd(), 0, &inner.as_raw_fd()),
        };
        waited.map_err(|e| Error::io("wait for an RCU grace period", e))
    }
}

impl towpath_tables::grace::Grace for GraceMethod {
    /// Never returns early: what the writer does next would take memory from under a program. A kernel that offered
    /// the method does not refuse it later, short of memory exhaustion, so trying again is all there is to do.
    fn wait(&mut self) {
        while let Err(error) = GraceMethod::wait(self) {
            tracing::error!("{error}; trying again");
            std::thread::sleep(RETRY);
        }
    }
}

fn membarrier(command: libc::c_long) -> io::Result<libc::c_long> {
    // SAFETY: no pointers.
    let ret = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}
