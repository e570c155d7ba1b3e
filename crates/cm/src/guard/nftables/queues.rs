//! Programs that take packets out of the kernel (nfnetlink_queue, Linux 6.1), and may give one back long after the rule is gone
//! that took it out: it goes on behind that rule, and leaves accepted by rules that it never met. A program that listens
//! may hold such packets. Those of one that goes are dropped, and those of a chain that is deleted.

use super::super::Finding;
use super::super::proc::ProcNet;
use crate::error::CmError;
use std::ffi::CStr;
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// Who listens to which queue.
pub const FILE: &CStr = c"netfilter/nfnetlink_queue";

/// One for each family while a program listens.
pub fn findings(list: &mut ProcNet) -> Result<Vec<Finding>, CmError> {
    let list = list.read()?.unwrap_or_default();
    let Some(queue) = list.split_whitespace().next() else { return Ok(Vec::new()) };
    let detail = format!("netfilter queue {queue}: a program may hold packets (no connection may pass)");
    Ok(Family::ALL.map(|family| Finding::family(family, Reason::PolicyNetfilter, &detail)).into())
}
