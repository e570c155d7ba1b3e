//! Connections that the fast path carries stay in Linux's connection tracking for as long as they are used.
//!
//! A packet that Linux sees sets its connection's timeout anew; those that take the fast path do not count. So the
//! connections that were used are reported, and their entries get the timeout that a packet of the moment would have
//! given them (nf_conntrack_tcp_packet, nf_conntrack_udp_packet, Linux 6.1). What Linux keeps itself is left alone:
//! entries in a flowtable and those whose timeout is fixed. A report comes later than the packets it speaks of, and an
//! entry lasts so much longer.

use crate::RefreshError;
use std::collections::HashMap;
use std::time::{Duration, Instant};
use towpath_cm::conntrack::entry::{ESTABLISHED, Entry, status};
use towpath_cm::conntrack::{Change, Table, Timeouts};
use towpath_fpc::{Feedback, Sender};
use towpath_tables::flow::Tuple;

/// UDP that is used for longer than this counts as a stream (nf_conntrack_proto_udp.c, `stream_ts`).
const STREAM: Duration = Duration::from_secs(2);
/// How long it is remembered when a UDP connection was first used.
const MEMORY: Duration = Duration::from_secs(120);
/// An entry that has still this part of its timeout is not worth a change.
const SLACK: u32 = 50;

/// Where it is reported which connections were used.
pub trait RefreshConnections {
    /// The connections with these original tuples were used.
    fn refresh(&mut self, used: &[Tuple]) -> Result<(), RefreshError>;
    /// What Linux has seen acknowledged on the TCP connections with these original tuples is out of date.
    fn forget_acknowledged(&mut self, ahead: &[Tuple]) -> Result<(), RefreshError>;
}

/// Over FPC: the cache manager's process reports to Linux.
impl RefreshConnections for Sender {
    fn refresh(&mut self, used: &[Tuple]) -> Result<(), RefreshError> {
        Ok(self.feedback(Feedback::FlowsUsed(used.to_vec()))?)
    }

    fn forget_acknowledged(&mut self, ahead: &[Tuple]) -> Result<(), RefreshError> {
        Ok(self.feedback(Feedback::FlowsAhead(ahead.to_vec()))?)
    }
}

/// Reports to the Linux of a network namespace.
pub struct Connections {
    table: Table,
    /// When UDP connections that are no streams yet were first reported
    begun: HashMap<Tuple, Instant>,
    forget: Instant,
}

impl Connections {
    /// Reports to the calling thread's network namespace.
    pub fn open() -> Result<Self, RefreshError> {
        let table = Table::open().map_err(RefreshError::Connections)?;
        Ok(Self { table, begun: HashMap::new(), forget: Instant::now() + MEMORY })
    }

    fn report(&mut self, used: &[Tuple], now: Instant) -> Result<(), towpath_cm::CmError> {
        let Some(timeouts) = self.table.timeouts() else { return Ok(()) };
        let entries = self.table.entries(used)?;
        let entries = used.iter().zip(entries).filter_map(|(original, entry)| Some((*original, entry?)));
        let changes: Vec<_> =
            entries.filter_map(|(original, entry)| self.wanted(original, &entry, &timeouts, now)).collect();
        let changed = self.table.change(&changes);
        self.put_back(&changes, &timeouts)?;
        if self.forget <= now {
            self.begun.retain(|_, begun| now - *begun < MEMORY);
            self.forget = now + MEMORY;
        }
        changed.map(drop)
    }

    /// What a packet of the moment would do to the entry, if that is worth saying.
    fn wanted(&mut self, original: Tuple, entry: &Entry, timeouts: &Timeouts, now: Instant) -> Option<Change> {
        let left = entry.timeout.filter(|_| !entry.is(status::FIXED_TIMEOUT))?;
        // A RST whose number conntrack does not know, since it has not seen the last packets, leaves an entry established
        // by name, but for no longer than it would be closed (nf_conntrack_tcp_packet).
        let reset = left <= timeouts.tcp_close && timeouts.tcp / 4 > timeouts.tcp_close;
        let (timeout, status) = match entry.tcp {
            Some(tcp) if tcp.state == ESTABLISHED && !reset => (timeouts.tcp, None),
            Some(_) => return None,
            None if entry.is(status::ASSURED) => (timeouts.udp_stream, None),
            None if entry.is(status::SEEN_REPLY) && self.is_stream(original, now) => {
                (timeouts.udp_stream, Some(entry.status | status::ASSURED))
            }
            None => (timeouts.udp, None),
        };
        let enough = left >= timeout - timeout / SLACK;
        (!enough || status.is_some()).then_some(Change { original, timeout, status })
    }

    /// Whether it is in use for long enough.
    fn is_stream(&mut self, original: Tuple, now: Instant) -> bool {
        let stream = now - *self.begun.entry(original).or_insert(now) > STREAM;
        if stream {
            self.begun.remove(&original);
        }
        stream
    }

    /// A TCP connection may have ended between the question and the change: then no packet would end its new timeout.
    fn put_back(&mut self, changes: &[Change], timeouts: &Timeouts) -> Result<(), towpath_cm::CmError> {
        let tcp = |change: &&Change| change.original.is_tcp();
        let changed: Vec<_> = changes.iter().filter(tcp).map(|change| change.original).collect();
        let entries = self.table.entries(&changed)?;
        let ended = |(original, entry): (&Tuple, Option<Entry>)| {
            entry?.tcp.filter(|tcp| tcp.state != ESTABLISHED)?;
            Some(Change { original: *original, timeout: timeouts.tcp_closing, status: None })
        };
        let ended: Vec<_> = changed.iter().zip(entries).filter_map(ended).collect();
        self.table.change(&ended).map(drop)
    }
}

impl RefreshConnections for Connections {
    fn refresh(&mut self, used: &[Tuple]) -> Result<(), RefreshError> {
        self.report(used, Instant::now()).map_err(RefreshError::Connections)
    }

    fn forget_acknowledged(&mut self, ahead: &[Tuple]) -> Result<(), RefreshError> {
        self.table.forget_acknowledged(ahead).map_err(RefreshError::Connections)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_cm::conntrack::entry::Tcp;
    use towpath_tables::flow::Connection;

    const TIMEOUTS: Timeouts = Timeouts { tcp: 1000, tcp_closing: 100, tcp_close: 10, udp: 30, udp_stream: 200 };

    fn entry(protocol: u8, left: u32) -> Entry {
        let (source, destination) = ([10, 0, 0, 2].into(), [192, 0, 2, 2].into());
        let original = Tuple { source, destination, source_port: 1, destination_port: 2, protocol };
        Entry {
            connection: Connection::new(original, original.inverse()).unwrap(),
            status: status::CONFIRMED | status::SEEN_REPLY,
            mark: 0,
            labels: None,
            timeout: Some(left),
            tcp: (protocol == 6).then_some(Tcp { state: ESTABLISHED, liberal: true }),
            zoned: false,
            helped: false,
            proxied: false,
        }
    }

    #[test]
    fn only_what_a_packet_would_do_is_done() {
        let mut connections = Connections::open().unwrap();
        let start = Instant::now();
        let mut wanted = |entry: Entry, after: Duration| {
            let change = connections.wanted(entry.connection.original, &entry, &TIMEOUTS, start + after)?;
            Some((change.timeout, change.status))
        };
        let now = Duration::ZERO;
        assert_eq!(wanted(entry(6, 900), now), Some((1000, None)));
        assert_eq!(wanted(entry(6, 980), now), None, "it is as good as new");
        assert_eq!(wanted(entry(6, 11), now), Some((1000, None)));
        assert_eq!(wanted(entry(6, 10), now), None, "a RST has ended it");
        assert_eq!(wanted(Entry { timeout: None, tcp: None, ..entry(6, 0) }, now), None, "in a flowtable");
        let fixed = Entry { status: entry(17, 1).status | status::FIXED_TIMEOUT, ..entry(17, 1) };
        assert_eq!(wanted(fixed, now), None);
        for state in [1, 2, 4, 5, 6, 7, 8] {
            let closing = Entry { tcp: Some(Tcp { state, liberal: true }), ..entry(6, 1) };
            assert_eq!(wanted(closing, now), None, "{state}");
        }
        assert_eq!(wanted(entry(17, 10), now), Some((30, None)));
        assert_eq!(wanted(entry(17, 10), STREAM), Some((30, None)), "not yet a stream");
        let assured = entry(17, 10).status | status::ASSURED;
        let later = STREAM + Duration::from_millis(1);
        assert_eq!(wanted(entry(17, 30), later), Some((200, Some(assured))));
        assert_eq!(wanted(Entry { status: assured, ..entry(17, 10) }, now), Some((200, None)));
        let unanswered = Entry { status: status::CONFIRMED, ..entry(17, 10) };
        assert_eq!(wanted(unanswered, now), Some((30, None)));
        assert_eq!(wanted(unanswered, later), Some((30, None)), "nobody answered");
    }
}
