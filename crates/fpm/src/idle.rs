//! Which connections are in use. Linux does not see the packets that go fast. So it is told of connections that have some,
//! well before their timeouts run out; and one that had none for so long that Linux may be about to forget it is Linux's
//! again, until Linux has accepted a packet of it anew. So what Linux forgets never passes.
//!
//! All are looked at in a pass, some at each step, and most by their packet counters alone.
//!
//! Linux is also told of TCP connections that are *ahead* of what it has seen: a sequence number is behind or before another
//! one by their difference modulo 2^32, so that one of 2 GiB later is taken for an old one.

use std::time::{Duration, Instant};
use towpath_tables::Tuple;
use towpath_tables::flow::{AnyKey, Direction};
use towpath_tables::record::{Flow, flow_state};
use towpath_wire::transport::protocol;

/// How long a pass over all connections takes.
pub const PASS: Duration = Duration::from_secs(2);
/// Between two steps of a pass.
const STEP: Duration = Duration::from_millis(50);
const STEPS: usize = (PASS.as_millis() / STEP.as_millis()) as usize;
/// Linux is told of a connection in use at least this often, whatever the timeouts: it may have one of its own.
const OFTEN: Duration = Duration::from_secs(60);
/// A connection is ahead when a direction has carried so many bytes: half of what makes numbers old.
pub const AHEAD: u64 = 1 << 30;

/// For how long Linux keeps connections that have no packets, by protocol: the shortest that one may have which Linux handed
/// over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// TCP's, established
    pub tcp: Duration,
    /// UDP's
    pub udp: Duration,
}

impl Default for Timeouts {
    /// Linux's own: data that is not acknowledged (net/netfilter/nf_conntrack_proto_tcp.c, 6.1), and UDP's
    /// (net/netfilter/nf_conntrack_proto_udp.c).
    fn default() -> Self {
        Self { tcp: Duration::from_secs(300), udp: Duration::from_secs(30) }
    }
}

/// In milliseconds: what is done about connections of a protocol.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Linux is told no more often
    tell: u32,
    /// Without packets for this long it is Linux's
    idle: u32,
}

impl Limits {
    fn of(timeout: Duration) -> Self {
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        // What Linux is told may take a pass, and so may what is found out here.
        Self { tell: millis((timeout / 4).min(OFTEN)), idle: millis(timeout.saturating_sub(2 * PASS)) }
    }

    fn shortest(self, other: Self) -> Self {
        Self { tell: self.tell.min(other.tell), idle: self.idle.min(other.idle) }
    }

    /// Whether there may be something to do about a connection.
    fn concern(self, untold: bool, told: u32, used: u32) -> bool {
        untold && told >= self.tell || used >= self.idle
    }
}

/// What is known of a record. Times are milliseconds since the beginning, around.
#[derive(Clone, Copy, Default, Debug)]
struct Seen {
    packets: u32,
    /// When it last had new packets, or its idle time began anew
    used: u32,
    told: u32,
    /// It had packets since
    untold: bool,
    ahead: bool,
}

/// What Linux is to be told of connections, by their original tuples.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Told {
    /// They are in use
    pub used: Vec<Tuple>,
    /// They have come to be ahead of what Linux has seen
    pub ahead: Vec<Tuple>,
}

/// What a step has found.
#[derive(Default, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    /// What Linux is to be told
    pub told: Told,
    /// Indices of those that were not used for too long
    pub idle: Vec<u32>,
}

/// Looks at the records, over and over.
#[derive(Debug)]
pub(crate) struct Idle {
    seen: Vec<Seen>,
    /// Of this pass, the next record and the steps that were done
    next: usize,
    steps: usize,
    begin: Option<Instant>,
    due: Option<Instant>,
    tcp: Limits,
    udp: Limits,
    /// Of the two
    shortest: Limits,
}

impl Default for Idle {
    fn default() -> Self {
        let Timeouts { tcp, udp } = Timeouts::default();
        let (tcp, udp) = (Limits::of(tcp), Limits::of(udp));
        Self { seen: Vec::new(), next: 0, steps: 0, begin: None, due: None, tcp, udp, shortest: tcp.shortest(udp) }
    }
}

impl Idle {
    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        (self.tcp, self.udp) = (Limits::of(timeouts.tcp), Limits::of(timeouts.udp));
        self.shortest = self.tcp.shortest(self.udp);
    }

    /// When the next step is due.
    pub fn due(&self) -> Instant {
        self.due.unwrap_or_else(Instant::now)
    }

    /// Does the next step if it is due.
    pub fn step(&mut self, records: &[Flow], now: Instant) -> Found {
        let mut found = Found::default();
        if self.due.is_some_and(|due| now < due) {
            return found;
        }
        self.due = Some(now + STEP);
        // As a counter that goes around in 49 days.
        let time = now.saturating_duration_since(*self.begin.get_or_insert(now)).as_millis() as u32;
        self.seen.resize(records.len(), Seen { used: time, told: time.wrapping_sub(u32::MAX / 2), ..Seen::default() });
        if self.next >= records.len() && self.steps >= STEPS {
            (self.next, self.steps) = (0, 0);
        }
        let share = records.len().div_ceil(STEPS);
        for (index, (record, seen)) in records.iter().zip(&mut self.seen).enumerate().skip(self.next).take(share) {
            let packets = record.counters.iter().fold(0, |sum: u32, of| sum.wrapping_add(of.packets.load() as u32));
            let original = || AnyKey::of(record, Direction::Original).map(|key| Tuple::from(&key));
            if packets != seen.packets {
                let ahead = record.counters.iter().any(|of| of.bytes.load() >= AHEAD) && is_tcp(kind(record));
                if ahead && !seen.ahead {
                    found.told.ahead.extend(original());
                }
                // One without packets is another connection, whose counters began anew.
                *seen = Seen { packets, used: time, untold: packets != 0, ahead, ..*seen };
            }
            let (told, used) = (time.wrapping_sub(seen.told), time.wrapping_sub(seen.used));
            if !self.shortest.concern(seen.untold, told, used) {
                continue;
            }
            let (state, kind) = (record.state.load(), kind(record));
            // What Linux ends it must end in its time: a RST may leave it established, by name, for seconds only
            // (`nf_conntrack_tcp_packet`, net/netfilter/nf_conntrack_proto_tcp.c, 6.1).
            seen.untold &= state & flow_state::CLOSED == 0;
            let limits = if is_tcp(kind) { self.tcp } else { self.udp };
            if seen.untold && told >= limits.tell {
                (seen.told, seen.untold) = (time, false);
                found.told.used.extend(original());
            }
            if used >= limits.idle {
                seen.used = time;
                found.idle.extend(u32::try_from(index).ok().filter(|_| kind != 0));
            }
        }
        (self.next, self.steps) = (self.next + share, self.steps + 1);
        found
    }
}

fn is_tcp(kind: u32) -> bool {
    kind >> 8 == u32::from(protocol::TCP)
}

/// Its protocol and family, as `flow_state::KIND` has them.
fn kind(record: &Flow) -> u32 {
    record.state.load() & flow_state::KIND
}
