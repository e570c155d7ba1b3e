//! Connections that Linux handed over, and how one is found by a packet of it.
//!
//! A flow is found by the tuple of either direction. The index has two lines for a tuple, and the tuple is in one of them;
//! since its tag is no other's in that line, at most two records are looked at.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towpath_wire::transport::protocol::{TCP, UDP};

use crate::order;
use crate::record::{Family, Flow, FlowLine, flow_state};

/// Name of the program on ports' egress that notes which packets Linux lets through.
pub const ACCEPT_PROGRAM: &str = "towpath_accept";

/// One direction's addresses and ports, as packets of it arrive.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Tuple {
    /// Source address
    pub source: IpAddr,
    /// Destination address, of the source's family
    pub destination: IpAddr,
    /// Source port
    pub source_port: u16,
    /// Destination port
    pub destination_port: u16,
    /// 6 (TCP) or 17 (UDP)
    pub protocol: u8,
}

impl Tuple {
    /// Whether the protocol is TCP.
    pub fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// What a packet that leaves as the answer's opposite has: source and destination exchanged.
    pub fn inverse(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            protocol: self.protocol,
        }
    }

    /// Whether both addresses are of one family, and the protocol is TCP or UDP
    pub fn is_sound(&self) -> bool {
        self.source.is_ipv4() == self.destination.is_ipv4() && matches!(self.protocol, TCP | UDP)
    }
}

/// A connection as Linux's connection tracking has it: packets of one direction arrive as its tuple and leave as the inverse
/// of the other direction's. So what is translated, and how, needs no words of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Connection {
    /// Packets of whoever began it
    pub original: Tuple,
    /// The answers
    pub reply: Tuple,
}

impl Connection {
    /// A connection; None unless both directions are sound, of one family and protocol, and not the same.
    pub fn new(original: Tuple, reply: Tuple) -> Option<Self> {
        let same = original.protocol == reply.protocol && original.source.is_ipv4() == reply.source.is_ipv4();
        (same && original != reply && original.is_sound() && reply.is_sound()).then_some(Self { original, reply })
    }
}

/// Where flows are found.
pub trait FlowRead {
    /// A line of the index: the number modulo the number of lines
    fn flow_line(&self, number: u32) -> Option<&FlowLine>;
    /// A flow; None if there is no such index
    fn flow(&self, index: u32) -> Option<&Flow>;
}

/// The line with a number: modulo how many there are, a power of two.
#[inline(always)]
pub fn line_at(lines: &[FlowLine], number: u32) -> Option<&FlowLine> {
    lines.get(number as usize & lines.len().wrapping_sub(1))
}

/// A tuple as it lies in packets and records: `WORDS` is 1 for IPv4 and 4 for IPv6.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key<const WORDS: usize> {
    /// Source and destination address as on the wire
    pub addresses: [u64; WORDS],
    /// Source and destination port as on the wire
    pub ports: u32,
    /// See `flow_state::KIND`
    pub kind: u32,
}

impl<const WORDS: usize> Key<WORDS> {
    /// The kind of a tuple's flows.
    #[inline(always)]
    pub const fn kind(protocol: u8) -> u32 {
        let family = if WORDS == 1 { Family::V4 } else { Family::V6 };
        (1 + family as u32) | (protocol as u32) << 8
    }

    /// Source and destination exchanged.
    #[inline(always)]
    pub fn inverse(&self) -> Self {
        let half = |word: usize| self.addresses[(word + WORDS / 2) % WORDS];
        let addresses = core::array::from_fn(|word| if WORDS == 1 { half(word).rotate_left(32) } else { half(word) });
        Self { addresses, ports: self.ports.rotate_left(16), ..*self }
    }

    /// Its lines' numbers (not yet modulo their number), and its tag.
    #[inline(always)]
    pub fn place(&self, seed: u32) -> ([u32; 2], u32) {
        let hash = self.addresses.iter().fold(u64::from(seed), |hash, word| mix(hash, *word));
        let hash = mix(hash, u64::from(self.kind) << 32 | u64::from(self.ports));
        let (first, tag) = ((hash >> 32) as u32, hash as u32);
        ([first, first ^ tag.wrapping_mul(0x9e37_79b1)], tag)
    }

    /// Whether this is a flow's tuple of a direction.
    #[inline(always)]
    pub fn is(&self, flow: &Flow, direction: Direction) -> bool {
        let kind = flow.state.load() & flow_state::KIND;
        let addresses = &flow.addresses[direction as usize];
        kind == self.kind
            && flow.ports[direction as usize].load() == self.ports
            && self.addresses.iter().zip(addresses).all(|(word, found)| *word == found.load())
    }

    /// A flow's tuple of a direction; it is of this family.
    #[inline(always)]
    pub fn of(flow: &Flow, direction: Direction) -> Self {
        let addresses = &flow.addresses[direction as usize];
        Self {
            addresses: core::array::from_fn(|word| addresses[word].load()),
            ports: flow.ports[direction as usize].load(),
            kind: flow.state.load() & flow_state::KIND,
        }
    }
}

/// One round: a product by an odd constant, its upper half folded into the lower.
#[inline(always)]
pub(crate) fn mix(hash: u64, word: u64) -> u64 {
    let product = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ product >> 32
}

/// Which of a connection's two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Direction {
    /// Of whoever began it
    Original = 0,
    /// The answers
    Reply = 1,
}

impl Direction {
    /// The other one
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Original => Self::Reply,
            Self::Reply => Self::Original,
        }
    }
}

/// The lower half of a word of the index: which flow, and which of its directions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found(pub u32);

impl Found {
    /// The half word for a direction of a flow.
    pub const fn new(index: u32, direction: Direction) -> Self {
        Self(2 * index + 2 + direction as u32)
    }

    /// The flow's index
    #[inline(always)]
    pub const fn index(self) -> u32 {
        (self.0 >> 1).wrapping_sub(1)
    }

    /// Which direction
    #[inline(always)]
    pub const fn direction(self) -> Direction {
        if self.0 & 1 == 0 { Direction::Original } else { Direction::Reply }
    }
}

/// Finds the flow that has this tuple in one of its directions.
#[inline(always)]
pub fn find<const WORDS: usize>(tables: &impl FlowRead, seed: u32, key: &Key<WORDS>) -> Option<Found> {
    let (lines, tag) = key.place(seed);
    for line in lines {
        if let Some(found) = in_line(tables.flow_line(line)?, tag)
            && let Some(flow) = tables.flow(found.index())
            && key.is(flow, found.direction())
        {
            return Some(found);
        }
    }
    None
}

/// What a line has for a tag.
#[inline(always)]
pub(crate) fn in_line(line: &FlowLine, tag: u32) -> Option<Found> {
    let word = line.places.iter().map(order::load).find(|word| (*word >> 32) as u32 == tag && *word as u32 != 0)?;
    Some(Found(word as u32))
}

/// What `Flow::accepted` says of a packet that came in by one port and left by another in this generation.
#[inline(always)]
pub const fn acceptance(generation: u32, from: u32, to: u32) -> u64 {
    (generation as u64) << 32 | accepted_way(from, to) as u64
}

#[inline(always)]
const fn accepted_way(from: u32, to: u32) -> u32 {
    (from + 1) << 16 | (to + 1) & 0xffff
}

/// For so long after Linux's rules were last looked at flows pass, in nanoseconds. Whoever looks says so every second.
pub const LEASE: u64 = 3_000_000_000;

/// Whether rules have been looked at lately, by `Config::heartbeat` and what time it is now. A clock that is not the one of the
/// heartbeat (of another time namespace) says no.
#[inline(always)]
pub const fn is_watched(heartbeat: u64, now: u64) -> bool {
    now.wrapping_sub(heartbeat) <= LEASE
}

/// Whether flows pass in this generation
#[inline(always)]
pub const fn is_open(generation: u32) -> bool {
    generation & 1 == 0
}

/// A tuple with its addresses and ports as on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AnyKey {
    /// IPv4
    V4(Key<1>),
    /// IPv6
    V6(Key<4>),
}

impl AnyKey {
    /// As the record of a flow has it; None for a record that is not in use.
    pub fn of(flow: &Flow, direction: Direction) -> Option<Self> {
        // Read once: it may go out of use meanwhile.
        let kind = flow.state.load() & flow_state::KIND;
        match kind & 0xff {
            1 => Some(Self::V4(Key { kind, ..Key::of(flow, direction) })),
            2 => Some(Self::V6(Key { kind, ..Key::of(flow, direction) })),
            _ => None,
        }
    }

    /// Finds the flow that has this tuple in one of its directions.
    pub fn find(&self, tables: &impl FlowRead, seed: u32) -> Option<Found> {
        match self {
            Self::V4(key) => find(tables, seed, key),
            Self::V6(key) => find(tables, seed, key),
        }
    }
}

/// The words of two addresses as on the wire.
fn words<const WORDS: usize>(bytes: &[&[u8]; 2]) -> [u64; WORDS] {
    let mut all = bytes.iter().flat_map(|half| half.iter()).copied();
    core::array::from_fn(|_| u64::from_ne_bytes(core::array::from_fn(|_| all.next().unwrap_or_default())))
}

/// The bytes of a source and a destination of so many bytes each.
fn halves<const BYTES: usize>(words: &[u64]) -> [[u8; BYTES]; 2] {
    let byte = |at: usize| words.get(at / 8).map_or(0, |word| word.to_ne_bytes()[at % 8]);
    [0, BYTES].map(|first| core::array::from_fn(|at| byte(first + at)))
}

impl From<&Tuple> for AnyKey {
    /// A sound tuple's key.
    fn from(tuple: &Tuple) -> Self {
        let [a, b] = [tuple.source_port, tuple.destination_port].map(u16::to_be_bytes);
        let ports = u32::from_ne_bytes([a[0], a[1], b[0], b[1]]);
        let protocol = tuple.protocol;
        match (tuple.source, tuple.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let addresses = words(&[&source.octets(), &destination.octets()]);
                Self::V4(Key { addresses, ports, kind: Key::<1>::kind(protocol) })
            }
            (source, destination) => {
                let octets = |address| match address {
                    IpAddr::V4(address) => Ipv4Addr::to_ipv6_mapped(&address).octets(),
                    IpAddr::V6(address) => address.octets(),
                };
                let addresses = words(&[&octets(source), &octets(destination)]);
                Self::V6(Key { addresses, ports, kind: Key::<4>::kind(protocol) })
            }
        }
    }
}

impl From<&AnyKey> for Tuple {
    fn from(key: &AnyKey) -> Self {
        let (source, destination, ports, kind) = match key {
            AnyKey::V4(key) => {
                let [source, destination] = halves::<4>(&key.addresses).map(|a| IpAddr::V4(Ipv4Addr::from(a)));
                (source, destination, key.ports, key.kind)
            }
            AnyKey::V6(key) => {
                let [source, destination] = halves::<16>(&key.addresses).map(|a| IpAddr::V6(Ipv6Addr::from(a)));
                (source, destination, key.ports, key.kind)
            }
        };
        let [a, b, c, d] = ports.to_ne_bytes();
        let (source_port, destination_port) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        Self { source, destination, source_port, destination_port, protocol: (kind >> 8) as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: &str, destination: &str, protocol: u8) -> Tuple {
        let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
        Tuple { source, destination, source_port: 1, destination_port: 2, protocol }
    }

    #[test]
    fn a_connection_is_of_one_family_and_protocol() {
        let four = tuple("192.0.2.1", "198.51.100.1", 6);
        let six = tuple("2001:db8::1", "2001:db8::2", 6);
        let mixed = tuple("192.0.2.1", "2001:db8::2", 6);
        assert!(Connection::new(four, four.inverse()).is_some());
        assert!(Connection::new(six, six.inverse()).is_some());
        assert_eq!(Connection::new(four, six), None);
        assert_eq!(Connection::new(four, four), None);
        assert_eq!(Connection::new(mixed, mixed), None);
        assert_eq!(Connection::new(four, Tuple { protocol: 17, ..four.inverse() }), None);
        let sctp = Tuple { protocol: 132, ..four };
        assert_eq!(Connection::new(sctp, sctp.inverse()), None);
    }

    #[test]
    fn the_inverse_goes_back() {
        let there = tuple("192.0.2.1", "198.51.100.1", 17);
        let back = there.inverse();
        assert_eq!((back.source, back.source_port), (there.destination, 2));
        assert_eq!((back.destination, back.destination_port), (there.source, 1));
        assert_eq!(back.inverse(), there);
    }

    #[test]
    fn keys_are_as_on_the_wire() {
        let four = Tuple { source_port: 0x1234, destination_port: 53, ..tuple("192.0.2.1", "198.51.100.9", 17) };
        let AnyKey::V4(key) = AnyKey::from(&four) else { panic!("it is IPv4") };
        assert_eq!(key.addresses[0].to_ne_bytes(), [192, 0, 2, 1, 198, 51, 100, 9]);
        assert_eq!(key.ports.to_ne_bytes(), [0x12, 0x34, 0, 53]);
        assert_eq!(key.kind, 17 << 8 | 1);
        let six = tuple("2001:db8::1", "2001:db8::2:3", 6);
        let AnyKey::V6(key6) = AnyKey::from(&six) else { panic!("it is IPv6") };
        assert_eq!(key6.addresses[0].to_ne_bytes(), [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0]);
        assert_eq!(key6.addresses[3].to_ne_bytes(), [0, 0, 0, 0, 0, 2, 0, 3]);
        assert_eq!(key6.kind, 6 << 8 | 2);
        assert_eq!([Tuple::from(&AnyKey::V4(key)), Tuple::from(&AnyKey::V6(key6))], [four, six]);
        assert_eq!(Tuple::from(&AnyKey::V4(key.inverse())), four.inverse());
        assert_eq!(Tuple::from(&AnyKey::V6(key6.inverse())), six.inverse());
    }

    #[test]
    fn half_words_name_flow_and_direction() {
        for index in [0, 1, 77, crate::backing::MAX_FLOWS as u32] {
            for direction in [Direction::Original, Direction::Reply] {
                let found = Found::new(index, direction);
                assert!(found.0 != 0);
                assert_eq!((found.index(), found.direction()), (index, direction));
            }
        }
    }
}
