//! Questions about entries of connection tracking, and changes of them, many at a time.

use super::entry::{self, Entry};
use super::{GET, NEW};
use crate::error::CmError;
use crate::guard::nl::Netlink;
use crate::netlink::NETLINK_NETFILTER;
use crate::sysctl::Setting;
use netlink_packet_core::NLM_F_ACK;
use std::io;
use towpath_tables::flow::Tuple;

/// Entries named in one system call: their answers fit into any socket's buffer.
const BATCH: usize = 64;

/// Linux's timeouts for connections that are used, in seconds (net.netfilter.nf_conntrack_*).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// `tcp_timeout_established`
    pub tcp: u32,
    /// `tcp_timeout_time_wait`
    pub tcp_closing: u32,
    /// `tcp_timeout_close`
    pub tcp_close: u32,
    /// `udp_timeout`
    pub udp: u32,
    /// `udp_timeout_stream`
    pub udp_stream: u32,
}

/// What is to become of an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// Which
    pub original: Tuple,
    /// Seconds from now until it is removed
    pub timeout: u32,
    /// All of its status bits, if some change
    pub status: Option<u32>,
}

/// The entries of a network namespace.
pub struct Table {
    netlink: Netlink,
    settings: [Setting; 5],
}

impl Table {
    /// Those of the calling thread's namespace.
    pub fn open() -> Result<Self, CmError> {
        let netlink = Netlink::open(NETLINK_NETFILTER).map_err(|e| CmError::io("conntrack: netlink socket", e))?;
        let names = [
            "tcp_timeout_established",
            "tcp_timeout_time_wait",
            "tcp_timeout_close",
            "udp_timeout",
            "udp_timeout_stream",
        ];
        let settings = names.map(|name| Setting::new(&format!("netfilter/nf_conntrack_{name}")));
        let mut table = Self { netlink, settings };
        // The files are this namespace's from now on.
        table.timeouts();
        Ok(table)
    }

    /// The timeouts of the moment; None where connections are not tracked.
    pub fn timeouts(&mut self) -> Option<Timeouts> {
        let [tcp, tcp_closing, tcp_close, udp, udp_stream] =
            self.settings.each_mut().map(|setting| setting.read().and_then(|seconds| u32::try_from(seconds).ok()));
        Some(Timeouts {
            tcp: tcp?,
            tcp_closing: tcp_closing?,
            tcp_close: tcp_close?,
            udp: udp?,
            udp_stream: udp_stream?,
        })
    }

    /// The entries with these original tuples, in their order; None for those that are gone.
    pub fn entries(&mut self, originals: &[Tuple]) -> Result<Vec<Option<Entry>>, CmError> {
        let mut entries = vec![None; originals.len()];
        for (originals, entries) in originals.chunks(BATCH).zip(entries.chunks_mut(BATCH)) {
            let bodies: Vec<_> = originals.iter().map(entry::named).collect();
            self.netlink.batch("conntrack entries", GET, 0, &bodies, |number, answer| {
                match answer.map(|message| Entry::parse(message.payload)) {
                    Ok(entry) => entries[number] = entry?,
                    Err(error) if is_gone(&error) => {}
                    Err(error) => return Err(error),
                }
                Ok(())
            })?;
        }
        Ok(entries)
    }

    /// Changes entries; gives how many of them were gone.
    ///
    /// # Errors
    /// The first refusal, after all changes have been asked for.
    pub fn change(&mut self, changes: &[Change]) -> Result<usize, CmError> {
        self.write(changes.iter().map(body).collect())
    }

    /// Has a RST of these TCP connections, by original tuple, no longer compared with what was acknowledged before
    /// (`nf_conntrack_tcp_packet`): it ends them whatever its number is. Linux's own flowtable does so when it lets go of a
    /// connection (net/netfilter/nf_flow_table_core.c, 6.14). Those that are gone are passed over.
    ///
    /// # Errors
    /// As for `change`.
    pub fn forget_acknowledged(&mut self, originals: &[Tuple]) -> Result<(), CmError> {
        let body = |original| [entry::named(original), entry::unacknowledged()].concat();
        self.write(originals.iter().map(body).collect()).map(drop)
    }

    fn write(&mut self, bodies: Vec<Vec<u8>>) -> Result<usize, CmError> {
        let (mut gone, mut refused) = (0, None);
        for bodies in bodies.chunks(BATCH) {
            self.netlink.batch("changing conntrack entries", NEW, NLM_F_ACK, bodies, |_, answer| {
                match answer {
                    Err(error) if is_gone(&error) => gone += 1,
                    Err(error) => drop(refused.get_or_insert(error)),
                    Ok(_) => {}
                }
                Ok(())
            })?;
        }
        refused.map_or(Ok(gone), Err)
    }
}

fn body(change: &Change) -> Vec<u8> {
    let mut body = entry::named(&change.original);
    body.extend(entry::timeout(change.timeout));
    body.extend(change.status.map(entry::with_status).unwrap_or_default());
    body
}

/// There is no such entry any more, or it is being removed.
fn is_gone(error: &CmError) -> bool {
    let gone = |source: &io::Error| matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ETIME));
    matches!(error, CmError::Kernel { source, .. } if gone(source))
}
