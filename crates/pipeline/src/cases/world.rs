//! A small router in memory: the tables that the cases start from.

use crate::SlotSet;
use crate::slices::Slices;
use std::collections::BTreeMap;
use std::net::IpAddr;
use towpath_tables::clock;
use towpath_tables::filter::local_filter_bit;
use towpath_tables::filtering::InForce;
use towpath_tables::filters::{Action, Decision, FilterValue};
use towpath_tables::lpm::{self, Leaf, Word};
use towpath_tables::record::{
    BY_SOURCE, Config, FILTER_ROOT, Filter, FilterCounters, FilterKey, Flow, FlowLine, Group, LINE_WORDS, Line,
    MAPPINGS, MappingCounters, MappingSet, NO_VLANS, NODE_HEAD, Nexthop, NexthopKind, Node, PORT_SLOTS, Port,
    PortStats, Root, SourceList, TableId, VlanTable, WIDE_FOURS, WIDE_HEAD, WIDE_RUNS, Wide, mac_word,
    port_flags::{FORWARD_V4, FORWARD_V6, PRESENT, READY, REDIRECTS, VLAN},
};
use towpath_tables::sources::{self, SourceRoots};
use towpath_tables::tunnel;
use towpath_tables::word::W32;
use towpath_tables::{Obstacle, REASONS, Reason};

/// Interface index of the port that every frame enters by: that of the loopback interface, which is what a test run
/// of an XDP program claims to come from.
pub const INGRESS: u32 = 1;
/// The slot of that port
pub const IN: u32 = 1;
/// Slots of the ports that frames leave by
pub const OUT: u32 = 2;
/// See `OUT`
pub const OTHER: u32 = 3;
/// Sub-interface of `IN` for 802.1Q tag 100
pub const IN_VLAN: u32 = 10;
/// Sub-interface of `IN` for 802.1ad tag 300
pub const IN_SERVICE: u32 = 12;
/// Sub-interface of `IN_SERVICE` for 802.1Q tag 5
pub const IN_DOUBLE: u32 = 13;
/// Sub-interface of `OUT` for 802.1Q tag 200
pub const OUT_VLAN: u32 = 11;
/// Sub-interface of a sub-interface of `OTHER`
pub const OUT_DOUBLE: u32 = 14;

/// A tunnel without key
pub const TUNNEL: u32 = 200;
/// A tunnel with keys
pub const KEYED: u32 = 201;
/// As `TUNNEL`, over IPv6
pub const TUNNEL6: u32 = 202;
/// As `KEYED`, over IPv6
pub const KEYED6: u32 = 203;
pub(super) const TUNNEL_FLAG: u32 = towpath_tables::record::port_flags::TUNNEL;

/// Next hops: the router itself
pub const LOCAL: u32 = 1;
/// Next hop by `OUT`
pub const HOP: u32 = 2;
/// Next hop by `OUT_VLAN`
pub const HOP_VLAN: u32 = 3;
/// Next hop by `OUT_DOUBLE`
pub const HOP_DOUBLE: u32 = 4;
/// Next hop by `OTHER`
pub const HOP_OTHER: u32 = 5;
/// Next hop by `IN`
pub const HOP_BACK: u32 = 6;
/// Next hop into `TUNNEL`
pub const INTO: u32 = 7;
/// Next hop into `KEYED`
pub const INTO_KEYED: u32 = 8;
/// Next hop into `TUNNEL6`
pub const INTO6: u32 = 9;
/// Next hop into `KEYED6`
pub const INTO_KEYED6: u32 = 10;
/// Next hops of kind exception, one for each reason from here on
pub const HOP_REASON: u32 = 16;
/// The group of `HOP` and `HOP_OTHER`, by turns
pub const GROUP: u32 = 1;

const NEXTHOPS: usize = HOP_REASON as usize + REASONS;
const NODES: usize = 512;
/// Room for filters of both halves
const FILTERS: usize = 32;
/// The first root of filters; the one for IPv6 follows
const FILTERS_ROOT: u32 = 3;

/// The tables, as vectors.
pub struct World {
    config: Vec<Config>,
    ports: Vec<Port>,
    vlans: Vec<VlanTable>,
    roots: Vec<Root>,
    sources: Vec<SourceList>,
    nodes: Vec<Line>,
    nexthops: Vec<Nexthop>,
    groups: Vec<Group>,
    stats: Vec<PortStats>,
    flows: Vec<Flow>,
    flow_lines: Vec<FlowLine>,
    mapping_sets: Vec<MappingSet>,
    mapping_stats: Vec<MappingCounters>,
    filters: Vec<Filter>,
    filter_keys: Vec<FilterKey>,
    filter_stats: Vec<FilterCounters>,
    routes: BTreeMap<(u32, Vec<u8>), [u32; 256]>,
}

/// A vector of records, all zero.
fn zeroed<T>(len: usize) -> Vec<T> {
    // SAFETY: the records of the shared tables are integers and words of integers, for which zero bytes are valid.
    (0..len).map(|_| unsafe { std::mem::zeroed() }).collect()
}

/// The records' bytes.
fn bytes<T>(records: &[T]) -> &[u8] {
    // SAFETY: records of the shared tables have no padding; they are compared and copied as bytes while no one
    // writes them.
    unsafe { std::slice::from_raw_parts(records.as_ptr().cast(), size_of_val(records)) }
}

/// The MAC address of the port in a slot.
pub fn mac(slot: u32) -> [u8; 6] {
    [2, 0, 0, 0, 0, slot as u8]
}

/// The MAC address of the neighbour behind a port.
pub fn neighbour(slot: u32) -> [u8; 6] {
    [2, 0, 0, 0, 1, slot as u8]
}

impl World {
    /// The router that the cases start from. Routes (IPv4 in root 0, IPv6 in root 1), all of 16 bits, 48 in IPv6:
    /// 192.0 and 2001:db8:: back to `IN` (192.0.2.1 and 2001:db8::1 are its own), 198.51 and 2001:db8:1 to `OUT`,
    /// 203.0 and 2001:db8:2 to `OUT_VLAN`, 203.1 and 2001:db8:3 to `OUT_DOUBLE`, 10.1 and 2001:db8:a to the group,
    /// 10.200.x.0/24 and 2001:db8:ff:x::/64 to exceptions for reason x. No default routes.
    pub fn new() -> Self {
        let mut world = Self {
            config: zeroed(1),
            ports: zeroed(PORT_SLOTS as usize),
            vlans: zeroed(2),
            roots: zeroed(5),
            sources: zeroed(2),
            nodes: zeroed(NODES),
            nexthops: zeroed(NEXTHOPS),
            groups: zeroed(2),
            stats: zeroed(PORT_SLOTS as usize),
            flows: zeroed(4),
            flow_lines: zeroed(4),
            mapping_sets: zeroed(2),
            mapping_stats: zeroed(MAPPINGS),
            filters: zeroed(FILTERS),
            filter_keys: zeroed(FILTERS),
            filter_stats: zeroed(FILTERS),
            routes: BTreeMap::new(),
        };
        for (slot, lower, vlan) in [
            (IN, IN, 0),
            (OUT, OUT, 0),
            (OTHER, OTHER, 0),
            (IN_VLAN, IN, 0x8100 << 16 | 100),
            (IN_SERVICE, IN, 0x88a8 << 16 | 300),
            (IN_DOUBLE, IN_SERVICE, 0x8100 << 16 | 5),
            (OUT_VLAN, OUT, 0x8100 << 16 | 200),
            (OUT_DOUBLE, OTHER, 0x8100 << 16 | 7),
        ] {
            world.add_port(slot, lower, vlan);
        }
        world.port(IN).vlans.store(0);
        world.port(IN_SERVICE).vlans.store(1);
        world.set_vlan(0, 100, IN_VLAN);
        world.set_vlan(0, 300, IN_SERVICE);
        world.set_vlan(1, 5, IN_DOUBLE);
        world.add_exception(LOCAL, Reason::LocalDestination, 0);
        world.add_hop(HOP, OUT, OUT, &[]);
        world.add_hop(HOP_VLAN, OUT_VLAN, OUT, &[0x8100, 200]);
        world.add_hop(HOP_DOUBLE, OUT_DOUBLE, OTHER, &[0x88a8, 400, 0x8100, 7]);
        world.add_hop(HOP_OTHER, OTHER, OTHER, &[]);
        world.add_hop(HOP_BACK, IN, IN, &[]);
        for (index, bucket) in world.groups[GROUP as usize].buckets.iter().enumerate() {
            bucket.store(if index % 2 == 0 { HOP } else { HOP_OTHER });
        }
        for (prefix4, prefix6, leaf) in [
            ([192, 0], 0, hop(HOP_BACK)),
            ([198, 51], 1, hop(HOP)),
            ([203, 0], 2, hop(HOP_VLAN)),
            ([203, 1], 3, hop(HOP_DOUBLE)),
            ([10, 1], 10, group(GROUP)),
        ] {
            world.insert(0, &prefix4, leaf);
            world.insert(1, &[0x20, 1, 0xd, 0xb8, 0, prefix6], leaf);
        }
        world.insert(1, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], hop(LOCAL));
        for reason in Reason::ALL {
            let index = *reason as u8;
            world.add_exception(HOP_REASON + u32::from(index), *reason, OUT);
            world.insert(0, &[10, 200, index], hop(HOP_REASON + u32::from(index)));
            world.insert(1, &[0x20, 1, 0xd, 0xb8, 0, 0xff, 0, index], hop(HOP_REASON + u32::from(index)));
        }
        world.add_tunnels();
        world.config().heartbeat.store(clock::now());
        world.local(0, &[192, 0, 2, 1]);
        world
    }

    /// The port in a slot
    pub fn port(&self, slot: u32) -> &Port {
        &self.ports[slot as usize]
    }

    /// A next hop
    pub fn nexthop(&self, index: u32) -> &Nexthop {
        &self.nexthops[index as usize]
    }

    /// A group
    pub fn group(&self, index: u32) -> &Group {
        &self.groups[index as usize]
    }

    /// The region's record
    pub fn config(&self) -> &Config {
        &self.config[0]
    }

    /// The counters of a slot
    pub fn stats(&self, slot: u32) -> &PortStats {
        &self.stats[slot as usize]
    }

    /// The flows
    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// Has rules last been looked at when they were for another router.
    pub fn watched_like(&self, other: &Self) {
        self.config().heartbeat.store(other.config().heartbeat.load());
    }

    pub(super) fn flow_lines(&self) -> &[FlowLine] {
        &self.flow_lines
    }

    pub(super) fn mapping_sets(&self) -> &[MappingSet] {
        &self.mapping_sets
    }

    /// Counters of mappings, by number
    pub fn mapping_stats(&self) -> &[MappingCounters] {
        &self.mapping_stats
    }

    /// Counters of filters
    pub fn filter_stats(&self) -> &[FilterCounters] {
        &self.filter_stats
    }

    /// Adds a filter, for sources of whole bytes, at least two. Shorter prefixes must come first, and of one prefix the filter
    /// that decides last.
    pub fn filter(&mut self, value: FilterValue, action: Action) {
        let family = value.family();
        let root = FILTERS_ROOT + family as u32;
        let number = (1..).find(|number| self.filters[2 * *number as usize].state.load() == 0).expect("room");
        let bytes = match value.source.first {
            IpAddr::V4(first) => first.octets().to_vec(),
            IpAddr::V6(first) => first.octets().to_vec(),
        };
        let source = &bytes[..usize::from(value.source.len) / 8];
        let next = match value.source.first {
            IpAddr::V4(first) => lpm::lookup(&self.slices(), root, &first.octets()),
            IpAddr::V6(first) => lpm::lookup(&self.slices(), root, &first.octets()),
        };
        let (at, next) = (2 * number as usize, next.expect("a root").0);
        value.write(Decision { number, action }, next, &self.filters[at], &self.filter_keys[at]);
        self.roots[root as usize].family.store(FILTER_ROOT + family as u32);
        self.route(root, source, hop(2 * number));
        self.config().filters[family as usize].store(InForce { root, half: 0 }.word());
    }

    /// Makes a port and the next hops by it known to have mappings.
    pub(super) fn show_mappings(&self, slot: u32) {
        let word = Obstacle::word(Some(Obstacle::new(Reason::Mapped)));
        self.port(slot).ingress_policy.iter().for_each(|policy| policy.store(word));
        for hop in &self.nexthops {
            if hop.port.load() == slot && hop.state.load() & 0xff == NexthopKind::Forward as u32 {
                hop.state.store(hop.state.load() & !0xff | NexthopKind::Mapped as u32);
            }
        }
    }

    /// Sets flags of a port.
    pub fn flag(&self, slot: u32, flags: u32) {
        let word = &self.port(slot).flags;
        word.store(word.load() | flags);
    }

    /// Clears flags of a port.
    pub fn unflag(&self, slot: u32, flags: u32) {
        let word = &self.port(slot).flags;
        word.store(word.load() & !flags);
    }

    pub(super) fn add_port(&self, slot: u32, lower: u32, vlan: u32) {
        let port = self.port(slot);
        port.ifindex.store(slot);
        port.flags.store(PRESENT | READY | FORWARD_V4 | FORWARD_V6 | REDIRECTS | if vlan != 0 { VLAN } else { 0 });
        port.mac.store(mac_word(mac(slot)));
        port.root[1].store(1);
        port.vlans.store(NO_VLANS);
        port.vlan.store(vlan);
        port.lower.store(lower);
        port.mtu.store(1500);
    }

    /// Moves the port in slot `from` to slot `to`.
    pub fn move_port(&mut self, from: u32, to: u32) {
        self.ports.swap(from as usize, to as usize);
    }

    /// Names the sub-interface for a VLAN identifier.
    pub fn set_vlan(&self, table: usize, id: u16, slot: u32) {
        let word = &self.vlans[table].slots[usize::from(id / 2)];
        let shift = u32::from(id % 2) * 16;
        word.store(word.load() & !(0xffff << shift) | (slot + 1) << shift);
    }

    fn add_hop(&self, index: u32, port: u32, device: u32, tags: &[u16]) {
        let hop = self.nexthop(index);
        let mut l2 = [neighbour(port), mac(port)].concat();
        l2.extend(tags.iter().flat_map(|tag| tag.to_be_bytes()));
        l2.resize(24, 0);
        for (word, bytes) in hop.l2.iter().zip(l2.chunks_exact(8)) {
            word.store(u64::from_ne_bytes(bytes.try_into().expect("eight bytes")));
        }
        hop.sequence.store(8);
        hop.state.store(NexthopKind::Forward as u32 | (tags.len() as u32 / 2) << 16);
        hop.port.store(port);
        hop.device.store(device);
        hop.mtu.store(1500);
    }

    pub(super) fn add_tunnel_hop(&self, index: u32, port: u32) {
        let hop = self.nexthop(index);
        hop.state.store(NexthopKind::Tunnel as u32);
        hop.port.store(port);
        hop.device.store(port);
        hop.mtu.store(1476);
    }

    fn add_exception(&self, index: u32, reason: Reason, port: u32) {
        let hop = self.nexthop(index);
        hop.state.store(NexthopKind::Exception as u32 | (reason as u32) << 8);
        hop.port.store(port);
    }

    /// Adds an address of the router.
    pub fn local(&mut self, root: u32, address: &[u8]) {
        self.route(root, address, hop(LOCAL));
        if let Ok(address) = <[u8; 4]>::try_from(address) {
            self.suspect(address);
        }
    }

    /// Puts an address into the filter of sources.
    pub fn suspect(&mut self, address: [u8; 4]) {
        let bit = local_filter_bit(address);
        let word = &self.config().local_filter[(bit / 64) as usize];
        word.store(word.load() | 1 << (bit % 64));
    }

    /// Has packets that come in by a port looked up in roots by their source: address, length and root, short ones first.
    pub fn by_source(&mut self, slot: u32, family: usize, prefixes: &[(IpAddr, u8, u32)]) {
        let list = SourceRoots { prefixes: prefixes.to_vec(), other: 7 };
        // A list for each family.
        sources::write(&self.sources[family], &list);
        self.port(slot).root[family].store(BY_SOURCE | family as u32);
    }

    /// Sets the route that is taken where nothing longer matches.
    pub fn default_route(&self, root: u32, leaf: Leaf) {
        self.roots[root as usize].default.store(leaf.word().0);
    }

    /// Adds a route of whole bytes, at least two. Shorter prefixes must come first.
    pub fn route(&mut self, root: u32, prefix: &[u8], leaf: Leaf) {
        self.insert(root, prefix, leaf);
        self.render();
    }

    pub(super) fn insert(&mut self, root: u32, prefix: &[u8], leaf: Leaf) {
        let [high, low, rest @ ..] = prefix else { panic!("prefix shorter than 16 bits") };
        let mut inherited = self.direct(root, *high, *low).load();
        if rest.is_empty() {
            return self.direct(root, *high, *low).store(leaf.word().0);
        }
        for len in 2..prefix.len() {
            let words = self.routes.entry((root, prefix[..len].to_vec())).or_insert([inherited; 256]);
            let word = &mut words[usize::from(prefix[len])];
            inherited = *word;
            if len == prefix.len() - 1 {
                *word = leaf.word().0;
            }
        }
    }

    fn direct(&self, root: u32, high: u8, low: u8) -> &W32 {
        &self.roots[root as usize].direct[usize::from(u16::from_be_bytes([high, low]))]
    }

    /// Writes all nodes anew.
    fn render(&mut self) {
        let mut nodes = self.routes.clone();
        let mut next = 1;
        // The longest come first, so that each node's words are complete when it is written.
        let mut keys: Vec<_> = self.routes.keys().cloned().collect();
        keys.sort_by_key(|(_, prefix)| std::cmp::Reverse(prefix.len()));
        for (root, prefix) in keys {
            let words = nodes[&(root, prefix.clone())];
            let beneath = |byte: u8| nodes.get(&(root, [prefix.as_slice(), &[byte]].concat())).copied();
            let (word, lines) = match wide(&words, beneath).filter(|_| prefix.len() % 2 == 0) {
                Some(lines) => (Word::wide(next), lines),
                None => (Word::node(next), compress(&words)),
            };
            self.nodes[next as usize..][..lines.len()].copy_from_slice(&lines);
            next += lines.len() as u32;
            match prefix.as_slice() {
                [high, low] => self.direct(root, *high, *low).store(word.0),
                [above @ .., last] => {
                    let words = nodes.get_mut(&(root, above.to_vec())).expect("made before what is below");
                    words[usize::from(*last)] = word.0;
                }
                [] => unreachable!("nodes begin below 16 bits"),
            }
        }
    }

    /// Finds the tunnels' ways to their other ends, which are to follow the routes.
    pub fn find_ways(&self) {
        self.ports.iter().for_each(|port| tunnel::find_way(&self.slices(), port));
    }

    /// What the packet path reads.
    pub fn slices(&self) -> Slices<'_> {
        Slices {
            config: self.config(),
            ports: &self.ports,
            vlans: &self.vlans,
            roots: &self.roots,
            sources: &self.sources,
            nodes: &self.nodes,
            nexthops: &self.nexthops,
            groups: &self.groups,
            stats: &self.stats,
            flows: &self.flows,
            flow_lines: &self.flow_lines,
            mapping_sets: &self.mapping_sets,
            mapping_stats: &self.mapping_stats,
            filters: &self.filters,
            filter_stats: &self.filter_stats,
            cpu: 0,
            transmitters: SlotSet::ALL,
        }
    }

    /// A table's bytes, to be copied into a map or compared with it.
    pub fn table(&self, id: TableId) -> &[u8] {
        match id {
            TableId::Config => bytes(&self.config),
            TableId::Ports => bytes(&self.ports),
            TableId::Vlans => bytes(&self.vlans),
            TableId::Roots => bytes(&self.roots),
            TableId::Sources => bytes(&self.sources),
            TableId::Nodes => bytes(&self.nodes),
            TableId::Nexthops => bytes(&self.nexthops),
            TableId::NexthopKeys => &[],
            TableId::Groups => bytes(&self.groups),
            TableId::Stats => bytes(&self.stats),
            TableId::Flows => bytes(&self.flows),
            TableId::FlowLines => bytes(&self.flow_lines),
            TableId::Mappings => bytes(&self.mapping_sets),
            TableId::MappingStats => bytes(&self.mapping_stats),
            TableId::Filters => bytes(&self.filters),
            TableId::FilterKeys => &[],
            TableId::FilterStats => bytes(&self.filter_stats),
        }
    }

    /// Slots whose interfaces can be named as receivers.
    pub fn devices(&self) -> impl Iterator<Item = u32> {
        use crate::Tables;
        (0..PORT_SLOTS).filter(|slot| self.slices().transmitter(*slot))
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

/// The lines of the node that holds these words.
fn compress(words: &[u32; 256]) -> Vec<Line> {
    let mut node = Node { bitmap: [0; 4], counts: [0; 4], words: [0; LINE_WORDS - NODE_HEAD] };
    let mut runs = Vec::new();
    for (value, word) in words.iter().enumerate() {
        if runs.last() != Some(word) {
            runs.push(*word);
            node.bitmap[value / 64] |= 1 << (value % 64);
        }
    }
    for quarter in 1..4 {
        node.counts[quarter] = node.counts[quarter - 1] + node.bitmap[quarter - 1].count_ones() as u8;
    }
    lines(&node.to_line().words[..NODE_HEAD], &runs)
}

/// Lines with these words one after the other.
fn lines(head: &[u32], words: &[u32]) -> Vec<Line> {
    let all = [head, words].concat();
    let line = |words: &[u32]| Line { words: std::array::from_fn(|at| words.get(at).copied().unwrap_or_default()) };
    all.chunks(LINE_WORDS).map(line).collect()
}

/// The lines of the wide node for these words and those beneath each of them, if there are any beneath and few enough of
/// all. (The ordinary nodes that were made for those beneath stay, and nothing leads to them.)
fn wide(words: &[u32; 256], beneath: impl Fn(u8) -> Option<[u32; 256]>) -> Option<Vec<Line>> {
    (0..=255).find_map(&beneath)?;
    let all: Vec<u32> = (0..=255).flat_map(|byte| beneath(byte).unwrap_or([words[usize::from(byte)]; 256])).collect();
    let last = |value: &u16| all[usize::from(*value)] != all[usize::from(*value) + 1];
    let mut ends: Vec<u16> = (0..u16::MAX).filter(last).collect();
    if ends.len() >= WIDE_RUNS {
        return None;
    }
    let mut node = Wide { ends: [[u16::MAX; 4]; WIDE_FOURS], words: [0; LINE_WORDS - WIDE_HEAD] };
    node.ends.as_flattened_mut()[..ends.len()].copy_from_slice(&ends);
    ends.push(u16::MAX);
    let stored: Vec<u32> = ends.iter().map(|end| all[usize::from(*end)]).collect();
    Some(lines(&node.to_line().words[..WIDE_HEAD], &stored))
}

/// The leaf of a next hop
pub fn hop(index: u32) -> Leaf {
    Leaf::nexthop(index).expect("a next hop's index")
}

/// The leaf of a group
pub fn group(index: u32) -> Leaf {
    Leaf::group(index).expect("a group's index")
}
