//! Filters as values, and how they are written and read. See `filtering`.

use core::cmp::Reverse;
use core::net::IpAddr;
use std::collections::BTreeMap;

use crate::backing::{GrowError, View};
use crate::filtering::{PORTS_KNOWN, PROTOCOL_KNOWN, PROTOCOL_SHIFT, in_force};
use crate::mapping::mask;
use crate::mappings::{address, first, words};
use crate::record::*;

/// Addresses from `first` on that share so many bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Block {
    /// The first one
    pub first: IpAddr,
    /// Length of the prefix
    pub len: u8,
}

/// A filter: all that is asked for must be so.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FilterValue {
    /// Where packets come from
    pub source: Block,
    /// Where they go to, of the same family and not all of it
    pub destination: Option<Block>,
    /// Their protocol (the last header's, in IPv6)
    pub protocol: Option<u8>,
    /// Source and destination port; with a protocol that begins with ports
    pub ports: [Option<u16>; 2],
    /// The interface that the frame comes in by; 0 for any
    pub ifindex: u32,
}

/// What becomes of packets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Action {
    /// They are dropped
    Drop,
    /// They go on as without filters
    Pass,
}

/// What is known of a filter besides what it asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// Its number, never 0
    pub number: u32,
    /// What becomes of what it matches
    pub action: Action,
}

/// All filters.
pub type Filters = BTreeMap<FilterValue, Decision>;

/// What a filter has decided over, over all CPUs.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct FilterTotals {
    /// Packets
    pub packets: u64,
    /// Their bytes, from the Ethernet header on
    pub bytes: u64,
}

/// Why filters cannot be put into force.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FilterError {
    /// In all
    #[error("there is room for {FILTERS} filters")]
    TooMany,
    /// For the same packets
    #[error(
        "packets from {first}/{len} would have to be compared with more than {FILTER_STEPS} filters: those of it and of wider \
         prefixes that ask for more than the source"
    )]
    TooDeep {
        /// First address
        first: IpAddr,
        /// Prefix length
        len: u8,
    },
    /// A table does not grow
    #[error("{0}")]
    Room(String),
}

impl From<GrowError> for FilterError {
    fn from(error: GrowError) -> Self {
        Self::Room(error.to_string())
    }
}

impl Block {
    /// The block of this length that an address is in.
    pub fn new(of: IpAddr, len: u8) -> Self {
        Self { first: first(of, len), len }
    }

    /// Whether all addresses of another block are of this one.
    pub fn contains(&self, other: &Self) -> bool {
        self.first.is_ipv4() == other.first.is_ipv4()
            && self.len <= other.len
            && first(other.first, self.len) == self.first
    }
}

impl FilterValue {
    /// Its family
    pub fn family(&self) -> Family {
        Family::of(self.source.first)
    }

    /// Whether it decides over all packets of its sources.
    fn is_plain(&self) -> bool {
        self.destination.is_none() && self.protocol.is_none() && self.ports == [None; 2] && self.ifindex == 0
    }

    /// Less for what goes before others of the same source.
    fn rank(&self) -> impl Ord + use<> {
        let ports = self.ports.iter().flatten().count();
        let destination = self.destination.map_or(0, |block| block.len);
        let asked = (destination, ports, self.protocol.is_some(), self.ifindex != 0);
        (Reverse(asked), *self)
    }

    /// `Filter::transport` and its mask
    fn transport(&self) -> [u64; 2] {
        let protocol = self.protocol.map_or([0; 2], |protocol| {
            [PROTOCOL_KNOWN | u64::from(protocol) << PROTOCOL_SHIFT, PROTOCOL_KNOWN | 0xff << PROTOCOL_SHIFT]
        });
        let [wanted, mask] = [0, 1].map(|which| {
            let ports = self.ports.map(|port| port.map_or(0, |port| [port, u16::MAX][which]).to_be_bytes());
            u64::from(u32::from_ne_bytes(ports.as_flattened().try_into().expect("four bytes")))
        });
        let known = if mask != 0 { PORTS_KNOWN } else { 0 };
        [protocol[0] | known | wanted, protocol[1] | known | mask]
    }

    /// Writes a record that nobody looks at.
    pub fn write(&self, decision: Decision, next: u32, record: &Filter, key: &FilterKey) {
        let pass = if decision.action == Action::Pass { filter_state::PASS } else { 0 };
        record.state.store(filter_state::USED | pass);
        record.next.store(next);
        record.ifindex.store(self.ifindex);
        let [wanted, known] = self.transport();
        record.transport.store(wanted);
        record.transport_mask.store(known);
        let destination = self.destination.map_or([[0; 2]; 2], |block| [words(block.first), mask(block.len.into())]);
        let store =
            |to: &[crate::word::W64; 2], from: [u64; 2]| to.iter().zip(from).for_each(|(to, from)| to.store(from));
        store(&record.destination, destination[0]);
        store(&record.destination_mask, destination[1]);
        store(&key.source, words(self.source.first));
        let len = self.destination.map_or(0, |block| u32::from(block.len));
        key.lengths.store((1 + self.family() as u32) << 16 | len << 8 | u32::from(self.source.len));
    }

    /// What records say; None if that is no filter.
    fn read(record: &Filter, key: &FilterKey) -> Option<(Self, Action)> {
        let [source_len, destination_len, family, _] = key.lengths.load().to_le_bytes();
        let (family, bits) = match family {
            1 => (Family::V4, 32),
            2 => (Family::V6, 128),
            _ => return None,
        };
        let block = |from: &[crate::word::W64; 2], len: u8| {
            let block = Block { first: address(family, from.each_ref().map(|word| word.load())), len };
            (len <= bits && Block::new(block.first, len) == block).then_some(block)
        };
        let (transport, known) = (record.transport.load(), record.transport_mask.load());
        let port = |which: usize| {
            let pair = |word: u64| (word as u32).to_ne_bytes().as_chunks::<2>().0[which];
            (pair(known) != [0; 2]).then(|| u16::from_be_bytes(pair(transport)))
        };
        let value = Self {
            source: block(&key.source, source_len)?,
            destination: match destination_len {
                0 => None,
                len => Some(block(&record.destination, len)?),
            },
            protocol: (known & PROTOCOL_KNOWN != 0).then_some((transport >> PROTOCOL_SHIFT) as u8),
            ports: [port(0), port(1)],
            ifindex: record.ifindex.load(),
        };
        let action = if record.state.load() & filter_state::PASS != 0 { Action::Pass } else { Action::Drop };
        (value.transport() == [transport, known]).then_some((value, action))
    }
}

/// What a filter is asked about, without tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Source address
    pub source: IpAddr,
    /// Destination address
    pub destination: IpAddr,
    /// Protocol, if it can be known
    pub protocol: Option<u8>,
    /// Ports, if they can
    pub ports: Option<[u16; 2]>,
    /// The interface that it comes in by; 0 if that may be any
    pub ifindex: u32,
}

impl FilterValue {
    /// Whether it matches a packet.
    pub fn matches(&self, packet: &Packet) -> bool {
        let block = |of: IpAddr| Block { first: of, len: if of.is_ipv4() { 32 } else { 128 } };
        let ports = |which: usize| {
            self.ports[which].is_none_or(|wanted| packet.ports.is_some_and(|ports| ports[which] == wanted))
        };
        self.source.contains(&block(packet.source))
            && self.destination.is_none_or(|wanted| wanted.contains(&block(packet.destination)))
            && (self.protocol.is_none() || self.protocol == packet.protocol)
            && ports(0)
            && ports(1)
            && (self.ifindex == 0 || packet.ifindex == 0 || self.ifindex == packet.ifindex)
    }
}

/// The filter that decides over a packet: what look-ups of the tables come to, by going through all.
pub fn decide<'f>(all: &'f Filters, packet: &Packet) -> Option<(&'f FilterValue, &'f Decision)> {
    let matching = all.iter().filter(|(value, _)| value.matches(packet));
    matching.min_by_key(|(value, _)| (Reverse(value.source.len), value.rank()))
}

/// A filter's place, and the one that decides where it does not.
pub(crate) struct Placed<'f> {
    pub value: &'f FilterValue,
    pub decision: Decision,
    /// Number of the next one, or 0
    pub next: u32,
}

/// How filters are found.
#[derive(Default)]
pub(crate) struct Plan<'f> {
    pub filters: Vec<Placed<'f>>,
    /// For each source prefix the number of the first one to look at
    pub firsts: Vec<(Block, u32)>,
}

/// A source prefix within which others may lie.
struct Open {
    block: Block,
    first: u32,
    /// Filters that a packet is compared with from `first` on, at most
    steps: usize,
}

impl<'f> Plan<'f> {
    /// Of these filters.
    pub fn new(all: &'f Filters) -> Result<Self, FilterError> {
        if all.len() > FILTERS || all.values().any(|decision| decision.number as usize > FILTERS) {
            return Err(FilterError::TooMany);
        }
        let (mut plan, mut open) = (Self::default(), Vec::<Open>::new());
        let all: Vec<_> = all.iter().collect();
        // They are in order of their sources: what a prefix lies in comes before it.
        for group in all.chunk_by(|a, b| a.0.source == b.0.source) {
            let block = group[0].0.source;
            while open.last().is_some_and(|outer| !outer.block.contains(&block)) {
                open.pop();
            }
            let outer = open.last().map_or((0, 0), |outer| (outer.first, outer.steps));
            let (first, steps) = plan.place(group, outer);
            if steps > FILTER_STEPS {
                return Err(FilterError::TooDeep { first: block.first, len: block.len });
            }
            plan.firsts.push((block, first));
            open.push(Open { block, first, steps });
        }
        Ok(plan)
    }

    /// Places the filters of one source prefix before those of the next wider one: the first of all, and how many there are.
    fn place(&mut self, group: &[(&'f FilterValue, &Decision)], outer: (u32, usize)) -> (u32, usize) {
        let mut group = group.to_vec();
        group.sort_by_key(|(value, _)| value.rank());
        let (mut next, mut steps) = outer;
        for (value, decision) in group.into_iter().rev() {
            if value.is_plain() {
                (next, steps) = (0, 0);
            }
            self.filters.push(Placed { value, decision: *decision, next });
            (next, steps) = (decision.number, steps + 1);
        }
        (next, steps)
    }
}

/// Index of a filter's record.
pub(crate) const fn index(number: u32, half: u32) -> u32 {
    if number == 0 { 0 } else { 2 * number + half }
}

/// The filters in force; None if what is there are none.
pub fn read(view: &View<'_>) -> Option<Filters> {
    let mut all = Filters::new();
    for family in Family::ALL {
        let Some(force) = in_force(view.config(), family) else { continue };
        let records = view.filters().iter().zip(view.filter_keys()).skip(force.half as usize).step_by(2);
        for (number, (record, key)) in (0..).zip(records) {
            if record.state.load() & filter_state::USED == 0 || key.lengths.load() >> 16 != 1 + family as u32 {
                continue;
            }
            let (value, action) = FilterValue::read(record, key).filter(|_| number != 0)?;
            if all.insert(value, Decision { number, action }).is_some() {
                return None;
            }
        }
    }
    Some(all)
}

/// The counters of a filter, CPU by CPU.
pub(crate) fn counters<'a>(view: &View<'a>, number: u32) -> impl Iterator<Item = [&'a crate::word::W64; 2]> + use<'a> {
    let (cpus, place) = (view.cpus(), number as usize % FILTERS_COUNTED);
    let lines = view.filter_stats().iter().skip(number as usize / FILTERS_COUNTED * cpus).take(cpus);
    lines.map(move |line| [&line.packets[place], &line.bytes[place]])
}

/// What a filter has decided over.
pub fn totals(view: &View<'_>, number: u32) -> FilterTotals {
    counters(view, number).fold(FilterTotals::default(), |sum, [packets, bytes]| FilterTotals {
        packets: sum.packets + packets.load(),
        bytes: sum.bytes + bytes.load(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(source: &str, len: u8) -> FilterValue {
        let source = Block::new(source.parse().expect("an address"), len);
        FilterValue { source, destination: None, protocol: None, ports: [None; 2], ifindex: 0 }
    }

    fn all(values: &[FilterValue]) -> Filters {
        let decision = |number| Decision { number, action: Action::Drop };
        values.iter().copied().zip((1..).map(decision)).collect()
    }

    #[test]
    fn more_than_a_packet_is_compared_with_is_refused() {
        let ports = |from: &str, len, n: usize| {
            let from = value(from, len);
            (0..n as u16).map(move |port| FilterValue { protocol: Some(17), ports: [None, Some(port)], ..from })
        };
        let most: Vec<_> = ports("0.0.0.0", 0, FILTER_STEPS).collect();
        assert!(Plan::new(&all(&most)).is_ok());
        let more: Vec<_> = most.iter().copied().chain(ports("10.0.0.0", 8, 1)).collect();
        let error = Plan::new(&all(&more)).err().expect("one too many for 10.0.0.0/8");
        assert_eq!(error, FilterError::TooDeep { first: "10.0.0.0".parse().unwrap(), len: 8 });
        let behind_a_plain_one: Vec<_> =
            most.into_iter().chain([value("10.0.0.0", 8)]).chain(ports("10.1.0.0", 16, FILTER_STEPS - 1)).collect();
        assert!(Plan::new(&all(&behind_a_plain_one)).is_ok());
    }

    #[test]
    fn those_of_a_source_are_in_order_and_lead_to_wider_ones() {
        let wide = FilterValue { protocol: Some(6), ..value("10.0.0.0", 8) };
        let udp = FilterValue { protocol: Some(17), ..value("10.1.0.0", 16) };
        let port = FilterValue { ports: [None, Some(53)], ..udp };
        let to =
            FilterValue { destination: Some(Block::new("192.0.2.0".parse().unwrap(), 24)), ..value("10.1.0.0", 16) };
        let beside = value("10.2.0.0", 16);
        let all = all(&[wide, udp, port, to, beside]);
        let plan = Plan::new(&all).expect("few");
        let next: BTreeMap<u32, u32> =
            plan.filters.iter().map(|placed| (placed.decision.number, placed.next)).collect();
        assert_eq!(next, [(1, 0), (2, 1), (3, 2), (4, 3), (5, 0)].into());
        let firsts: Vec<_> = plan.firsts.iter().map(|(block, number)| (block.len, *number)).collect();
        assert_eq!(firsts, [(8, 1), (16, 4), (16, 5)]);
    }
}
