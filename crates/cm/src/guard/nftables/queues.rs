//! Programs that take packets out of the kernel (nfnetlink_queue, Linux 6.1), and may give one back long after the rule is gone
//! that took it out: it goes on behind that rule, and leaves accepted by rules that it never met. A program that listens
//! may hold such packets. Those of one that goes are dropped, and those of a chain that is deleted.

use super::super::{FAMILIES, Finding};
use crate::error::CmError;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use towpath_tables::Reason;

const LIST: &str = "/proc/net/netfilter/nfnetlink_queue";

/// The queues of a network namespace.
pub struct Queues {
    /// /proc/net of the namespace
    directory: OwnedFd,
}

impl Queues {
    /// Of the thread's namespace.
    pub fn new() -> Result<Self, CmError> {
        let path = "/proc/thread-self/net";
        Ok(Self { directory: File::open(path).map_err(|e| CmError::io(path, e))?.into() })
    }

    /// One for each family while a program listens.
    pub fn findings(&self) -> Result<Vec<Finding>, CmError> {
        let Some(file) = super::hooks::open_at(&self.directory, c"netfilter/nfnetlink_queue", LIST)? else {
            return Ok(Vec::new());
        };
        let list = io::read_to_string(file).map_err(|e| CmError::io(LIST, e))?;
        let Some(queue) = list.split_whitespace().next() else { return Ok(Vec::new()) };
        let detail = format!("netfilter queue {queue}: a program may hold packets (no connection may pass)");
        Ok(FAMILIES.map(|family| Finding::family(family, Reason::PolicyNetfilter, &detail)).into())
    }
}
