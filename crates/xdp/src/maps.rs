//! The tables as global data, each in a section of its own, for which whoever loads the program gives the table's map
//! (one element that holds all records): addresses are constants to the program, so reading a record takes no look-up in
//! a map, no call, and leaves all registers as they are. Lengths are constants too, put into the code when it is loaded.

use crate::constant::constant;
use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_REDIRECT};
use aya_ebpf::helpers::{bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns, bpf_redirect_map};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{DevMap, XskMap};
use towpath_pipeline::{Tables, roots};
use towpath_tables::flow::{self, FlowRead, Found, Key};
use towpath_tables::lpm::{self, FirstLine, Internal, LpmRead, Word};
use towpath_tables::mapping::{self, Service, Way, Words};
use towpath_tables::record::{
    Config, CpuMappings, CpuStats, Family, Filter, FilterCounters, Flow, FlowLine, Group, LINE_BYTES, LINE_WORDS, Line,
    MAPPINGS, MappingSet, NODE_REACH, Nexthop, PORT_SLOTS, Port, Root, SOCKET_QUEUES, SourceList, TableId, VlanTable,
};
use towpath_tables::word::W32;
use towpath_tables::{Reason, opaque};

/// Where a table begins. What the compiler knows of it is less than what is there.
#[repr(C)]
struct Table(u64);

macro_rules! tables {
    ($($table:ident = $id:ident: $section:literal;)*) => { $(
        #[unsafe(no_mangle)]
        #[unsafe(link_section = $section)]
        static $table: Table = Table(0);
        const _: () = assert!(same(TableId::$id.section(), $section));
    )* };
}

const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut equal = a.len() == b.len();
    let mut i = 0;
    while equal && i < a.len() {
        equal = a[i] == b[i];
        i += 1;
    }
    equal
}

tables! {
    CONFIG = Config: ".bss.config";
    PORTS = Ports: ".bss.ports";
    VLANS = Vlans: ".bss.vlans";
    ROOTS = Roots: ".bss.roots";
    NODES = Nodes: ".bss.nodes";
    NEXTHOPS = Nexthops: ".bss.nexthops";
    GROUPS = Groups: ".bss.groups";
    STATS = Stats: ".bss.stats";
    FLOWS = Flows: ".bss.flows";
    FLOW_LINES = FlowLines: ".bss.flow_lines";
    MAPPING_SETS = Mappings: ".bss.mappings";
    MAPPING_STATS = MappingStats: ".bss.mapping_stats";
    FILTERS = Filters: ".bss.filters";
    FILTER_STATS = FilterStats: ".bss.filter_stats";
    SOURCES = Sources: ".bss.sources";
}

/// A record of a table; the length is the one that is put there when the program is loaded.
macro_rules! record {
    ($table:ident[$index:expr]: $record:ty, $id:ident) => {{
        const _: () = assert!(TableId::$id.element_size() == size_of::<$record>());
        // SAFETY: the table holds records of this type, as many as the number in place of the mark says.
        let place = unsafe { place::<$record>(constant!(sym $table), constant!(const TableId::$id.length_mark()), $index) };
        // SAFETY: the record lies in the table.
        place.map(|record| unsafe { &*record })
    }};
}

/// Where a record is. The very register that is compared becomes the address, in one piece: a compiler may compare a copy, or
/// form the address before, and verifiers (that of Linux 6.1 more than later ones) do not see that it is the same number.
///
/// # Safety
/// At `first`, which is not 0, there are `length` records.
#[cfg(target_arch = "bpf")]
#[inline(always)]
unsafe fn place<T>(first: usize, length: usize, index: u32) -> Option<*const T> {
    let mut place = index as usize;
    macro_rules! scaled {
        ($operation:literal, $by:expr) => {
            core::arch::asm!(
                "if {place} >= {length} goto {outside}",
                $operation,
                "{place} += {first}",
                place = inout(reg) place,
                length = in(reg) length,
                first = in(reg) first,
                by = const $by,
                outside = label { return None },
                options(nomem, nostack),
            )
        };
    }
    // SAFETY: changes a register; the address is that of a record, so it is not 0.
    unsafe {
        if const { size_of::<T>().is_power_of_two() } {
            scaled!("{place} <<= {by}", size_of::<T>().trailing_zeros());
        } else {
            scaled!("{place} *= {by}", size_of::<T>());
        }
        core::hint::assert_unchecked(place != 0);
    }
    Some(place as *const T)
}
/// For lints.
#[cfg(not(target_arch = "bpf"))]
unsafe fn place<T>(first: usize, length: usize, index: u32) -> Option<*const T> {
    // SAFETY: by the promise.
    ((index as usize) < length).then(|| unsafe { (first as *const T).add(index as usize) })
}

/// The first line of a node. See `NODE_REACH`.
#[inline(always)]
fn node(index: u32) -> Option<*const Line> {
    let length = constant!(const TableId::Nodes.length_mark()) - NODE_REACH;
    // SAFETY: the table has as many lines as the number in place of the mark says.
    unsafe { place(constant!(sym NODES), length, index) }
}

/// The interface of each port, by slot: whom frames are redirected to.
#[map(name = "devices")]
static DEVICES: DevMap = DevMap::with_max_entries(PORT_SLOTS, 0);

/// Sockets of the user engine, by port and queue.
#[map(name = "sockets")]
static SOCKETS: XskMap = XskMap::with_max_entries(PORT_SLOTS * SOCKET_QUEUES, 0);

/// A word that was found, as a number; or that there is none, which no word is.
const INTERNAL: u64 = u64::MAX;

/// Opaque as all answers of functions, see `frame::result`.
#[inline(always)]
fn found(word: u64) -> Result<Word, Internal> {
    let word = opaque(word as usize) as u64;
    if word == INTERNAL { Err(Internal) } else { Ok(Word(word as u32)) }
}

/// Look-ups as functions of their own.
#[inline(never)]
#[unsafe(no_mangle)]
fn lookup4(root: u32, address: u32) -> u64 {
    lpm::lookup(&MAPS, root, &address.to_ne_bytes()).map_or(INTERNAL, |word| word.0.into())
}
/// As `lookup4`; the address in two words as on the wire.
#[inline(never)]
#[unsafe(no_mangle)]
fn lookup6(root: u32, high: u64, low: u64) -> u64 {
    // SAFETY: as in `Tables::lookup6`.
    let address: [u8; 16] = unsafe { core::mem::transmute([high, low]) };
    lpm::lookup(&MAPS, root, &address).map_or(INTERNAL, |word| word.0.into())
}

/// As `lookup4`, for `Tables::root_by_source`.
#[inline(never)]
#[unsafe(no_mangle)]
fn root_by_source(list: u32, first: u64, second: u64) -> u64 {
    roots::by_source(&MAPS, list, [first, second]).map_or(INTERNAL, u64::from)
}

/// As `lookup4`, for `Tables::leads_back`: 0, 1, or 2 + a reason.
#[inline(never)]
#[unsafe(no_mangle)]
fn leads_back(group: u32, slot: u32) -> u32 {
    match towpath_pipeline::leads_back(&MAPS, group, slot) {
        Ok(does) => does.into(),
        Err(reason) => 2 + opaque(reason as usize) as u32,
    }
}

/// As `lookup4`, for a flow; 0 if there is none.
#[inline(never)]
fn find_flow<const WORDS: usize>(key: &Key<WORDS>) -> u32 {
    let seed = FAR_MAPS.config().map_or(0, |config| config.flow_seed.load());
    flow::find(&FAR_MAPS, seed, key).map_or(0, |found| found.0)
}

/// As `lookup4`, for a mapping; 0 if there is none. `what`: the port's slot, then a bit each for the way and the family.
#[inline(never)]
#[unsafe(no_mangle)]
fn find_mapping(what: u32, first: u64, second: u64, service: u64) -> u32 {
    let way = if what & MAPPING_IN == 0 { Way::Out } else { Way::In };
    let family = if what & MAPPING_V6 == 0 { Family::V4 } else { Family::V6 };
    let index = FAR_MAPS.config().and_then(mapping::in_force).unwrap_or(u32::MAX);
    let set = FAR_MAPS.mapping_set(index);
    let service = Service(service);
    let found = set.and_then(|set| mapping::find(set, index, what % PORT_SLOTS, way, family, [first, second], service));
    // As `Frame::forget`: what follows is to be looked at once.
    found.map_or(0, |found| found.0) ^ FAR_MAPS.config().map_or(0, |config| config.reserved[0].load())
}
const MAPPING_IN: u32 = PORT_SLOTS;
const MAPPING_V6: u32 = 2 * PORT_SLOTS;

/// The maps of this program. Look-ups of routes are called if `CALLS`, and repeated at every place otherwise.
pub struct Maps<const CALLS: bool>;

/// The maps, for the way that most packets take.
pub const MAPS: Maps<false> = Maps;
/// The maps, for a way with so many look-ups that a verifier would not come to an end of it.
pub const FAR_MAPS: Maps<true> = Maps;

impl Maps<false> {
    /// Names the socket of a port's queue for the verdict XDP_REDIRECT that is to follow, if there is one.
    #[inline(always)]
    pub fn socket(slot: u32, queue: u32) -> bool {
        let key = slot * SOCKET_QUEUES + queue;
        // SAFETY: the map is a map of sockets.
        queue < SOCKET_QUEUES
            && unsafe { bpf_redirect_map((&raw const SOCKETS).cast_mut().cast(), key.into(), XDP_PASS.into()) }
                == i64::from(XDP_REDIRECT)
    }
}

impl<const CALLS: bool> LpmRead for Maps<CALLS> {
    #[inline(always)]
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        record!(ROOTS[root]: Root, Roots)?.direct.get(usize::from(slot)).map(W32::load)
    }

    #[inline(always)]
    fn root_default(&self, root: u32) -> Option<u32> {
        Some(record!(ROOTS[root]: Root, Roots)?.default.load())
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        // SAFETY: the line lies in the table.
        node(index).map(|line| unsafe { &*line })
    }

    #[inline(always)]
    fn stored(&self, node: FirstLine, position: u32) -> Option<Word> {
        const WORDS: usize = NODE_REACH * LINE_WORDS;
        // SAFETY: behind a node's first line the table goes on for as many words.
        unsafe { Some(Word(*(&raw const *node.line).cast::<u32>().add(opaque(position as usize) % WORDS))) }
    }

    #[inline(always)]
    fn byte(&self, node: FirstLine, position: u32) -> Option<u8> {
        const BYTES: usize = NODE_REACH * LINE_BYTES;
        // SAFETY: as for `stored`.
        unsafe { Some(*(&raw const *node.line).cast::<u8>().add(opaque(position as usize) % BYTES)) }
    }
}

impl<const CALLS: bool> FlowRead for Maps<CALLS> {
    #[inline(always)]
    fn flow_line(&self, number: u32) -> Option<&FlowLine> {
        let mask = constant!(const TableId::FlowLines.length_mark()) as u32 - 1;
        record!(FLOW_LINES[number & mask]: FlowLine, FlowLines)
    }

    #[inline(always)]
    fn flow(&self, index: u32) -> Option<&Flow> {
        record!(FLOWS[index]: Flow, Flows)
    }
}

impl<const CALLS: bool> Tables for Maps<CALLS> {
    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        let config = constant!(sym CONFIG) as *const Config;
        // SAFETY: this table is one such record.
        unsafe {
            core::hint::assert_unchecked(!config.is_null());
            Some(&*config)
        }
    }

    #[inline(always)]
    fn port(&self, slot: u32) -> Option<&Port> {
        let first = constant!(sym PORTS) as *const Port;
        // SAFETY: this table has always so many records; the remainder says it to the verifier.
        (slot < PORT_SLOTS).then(|| unsafe {
            core::hint::assert_unchecked(!first.is_null());
            &*first.add(opaque(slot as usize) % PORT_SLOTS as usize)
        })
    }

    #[inline(always)]
    fn vlan_table(&self, index: u32) -> Option<&VlanTable> {
        record!(VLANS[index]: VlanTable, Vlans)
    }

    #[inline(always)]
    fn nexthop(&self, index: u32) -> Option<&Nexthop> {
        record!(NEXTHOPS[index]: Nexthop, Nexthops)
    }

    #[inline(always)]
    fn group(&self, index: u32) -> Option<&Group> {
        record!(GROUPS[index]: Group, Groups)
    }

    #[inline(always)]
    fn cpu(&self) -> u32 {
        // SAFETY: takes no arguments and cannot fail.
        unsafe { bpf_get_smp_processor_id() }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: takes no arguments and cannot fail.
        unsafe { bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn stats(&self, cpu: u32) -> Option<&CpuStats> {
        let cpus = constant!(const TableId::Stats.length_mark()) / PORT_SLOTS as usize;
        // SAFETY: the table has as many records as the number in place of the mark says.
        unsafe { place(constant!(sym STATS), cpus, cpu).map(|stats| &*stats) }
    }

    #[inline(always)]
    fn lookup4(&self, root: u32, address: &[u8; 4]) -> Result<Word, Internal> {
        if CALLS { found(lookup4(root, u32::from_ne_bytes(*address))) } else { lpm::lookup(self, root, address) }
    }

    #[inline(always)]
    fn lookup6(&self, root: u32, address: &[u8; 16]) -> Result<Word, Internal> {
        if !CALLS {
            return lpm::lookup(self, root, address);
        }
        // SAFETY: both are sixteen bytes, of any value.
        let [high, low]: [u64; 2] = unsafe { core::mem::transmute(*address) };
        found(lookup6(root, high, low))
    }

    #[inline(always)]
    fn root_by_source(&self, list: u32, source: [u64; 2]) -> Option<u32> {
        let root = opaque(root_by_source(list, source[0], source[1]) as usize) as u64;
        if root == INTERNAL { None } else { Some(root as u32) }
    }

    #[inline(always)]
    fn leads_back(&self, group: u32, slot: u32) -> Result<bool, Reason> {
        match opaque(leads_back(group, slot) as usize) {
            does @ 0..=1 => Ok(does == 1),
            reason => Err(Reason::from_index((reason - 2) as u8).unwrap_or(Reason::Internal)),
        }
    }

    #[inline(always)]
    fn find_flow<const WORDS: usize>(&self, key: &Key<WORDS>) -> Option<Found> {
        match opaque(find_flow(key) as usize) {
            0 => None,
            found => Some(Found(found as u32)),
        }
    }

    #[inline(always)]
    fn filter(&self, index: u32) -> Option<&Filter> {
        record!(FILTERS[index]: Filter, Filters)
    }

    #[inline(always)]
    fn filter_stats(&self, line: u32, cpu: u32) -> Option<&FilterCounters> {
        let cpus = constant!(const TableId::Stats.length_mark()) / PORT_SLOTS as usize;
        record!(FILTER_STATS[line.wrapping_mul(cpus as u32).wrapping_add(cpu)]: FilterCounters, FilterStats)
    }

    #[inline(always)]
    fn sources(&self, index: u32) -> Option<&SourceList> {
        record!(SOURCES[index]: SourceList, Sources)
    }

    #[inline(always)]
    fn mapping_set(&self, index: u32) -> Option<&MappingSet> {
        record!(MAPPING_SETS[index]: MappingSet, Mappings)
    }

    #[inline(always)]
    fn mapping_stats(&self, cpu: u32) -> Option<&CpuMappings> {
        let cpus = constant!(const TableId::MappingStats.length_mark()) / MAPPINGS;
        // SAFETY: as for `stats`.
        unsafe { place(constant!(sym MAPPING_STATS), cpus, cpu).map(|stats| &*stats) }
    }

    #[inline(always)]
    fn find_mapping(
        &self,
        slot: u32,
        way: Way,
        family: Family,
        address: Words,
        service: Service,
    ) -> Option<mapping::Found> {
        let way = if way == Way::Out { 0 } else { MAPPING_IN };
        let family = if family == Family::V4 { 0 } else { MAPPING_V6 };
        match opaque(find_mapping(slot | way | family, address[0], address[1], service.0) as usize) {
            0 => None,
            found => Some(mapping::Found(found as u32)),
        }
    }

    /// Names the receiver for the verdict XDP_REDIRECT that is to follow.
    #[inline(always)]
    fn transmitter(&self, slot: u32) -> bool {
        // SAFETY: the map is a device map.
        let action = unsafe { bpf_redirect_map((&raw const DEVICES).cast_mut().cast(), slot.into(), XDP_PASS.into()) };
        action == i64::from(XDP_REDIRECT)
    }
}
