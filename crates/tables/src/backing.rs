//! Where the tables lie: raw arrays given by a `Backing` (heap here, mapped BPF arrays in the engine), seen through a
//! typed `View`.

use core::ptr::NonNull;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

use crate::brake::Brake;
use crate::lpm::LpmRead;
use crate::order;
use crate::record::{
    Config, FLOW_PLACES, Filter, FilterCounters, FilterKey, Flow, FlowLine, Group, Line, MAPPINGS, MappingCounters,
    MappingSet, Nexthop, NexthopKey, Port, PortStats, Root, SourceList, TableId, VlanTable,
};

/// Alignment of every table: one cache line, which no record exceeds.
pub const TABLE_ALIGN: usize = 64;

/// A number for each table, such as its elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PerTable(pub [usize; TableId::ALL.len()]);

/// Flows at most: no program can reach further than 512 MiB into a table.
pub const MAX_FLOWS: usize = (1 << 22) - 1;

impl PerTable {
    /// The number of one table.
    pub const fn get(&self, table: TableId) -> usize {
        self.0[table as usize]
    }

    /// The same with one table's number replaced.
    pub const fn with(mut self, table: TableId, value: usize) -> Self {
        self.0[table as usize] = value;
        self
    }

    /// The same with room for so many flows (at most `MAX_FLOWS`).
    pub const fn with_flows(self, flows: usize) -> Self {
        let flows = if flows > MAX_FLOWS { MAX_FLOWS } else { flows };
        // Two places for each, in lines that are half full at most: hardly ever are both of a tuple's lines full.
        let lines = (4 * flows).div_ceil(FLOW_PLACES).next_power_of_two();
        self.with(TableId::Flows, flows).with(TableId::FlowLines, lines)
    }
}

/// Elements of each table before anything is known about the routes.
pub const fn initial_elements(cpus: usize) -> PerTable {
    const PORTS: usize = 256;
    const FLOWS: usize = 64;
    PerTable([0; TableId::ALL.len()])
        .with(TableId::Config, 1)
        .with(TableId::Ports, PORTS)
        .with(TableId::Vlans, 16)
        .with(TableId::Roots, 2)
        .with(TableId::Sources, 4)
        .with(TableId::Nodes, 1 << 14)
        .with(TableId::Nexthops, 1024)
        .with(TableId::NexthopKeys, 1024)
        .with(TableId::Groups, 64)
        .with(TableId::Stats, cpus * PORTS)
        .with(TableId::Mappings, 2)
        .with(TableId::MappingStats, cpus * MAPPINGS)
        .with(TableId::Filters, 1)
        .with(TableId::FilterKeys, 1)
        .with(TableId::FilterStats, 1)
        .with_flows(FLOWS)
}

/// One table's memory.
#[derive(Clone, Copy, Debug)]
pub struct RawTable {
    base: NonNull<u8>,
    elements: usize,
}

impl RawTable {
    /// The table of `elements` records at `base`.
    ///
    /// # Safety
    /// `base` must be aligned to `TABLE_ALIGN` and point to that many records of the table it is given out for,
    /// zeroed or written by this crate, readable and writable for as long as it is in use. Nothing but this crate (in
    /// this or other processes) and the engines' programs may write there.
    pub const unsafe fn from_raw(base: NonNull<u8>, elements: usize) -> Self {
        Self { base, elements }
    }

    /// Number of records.
    pub const fn elements(&self) -> usize {
        self.elements
    }

    /// Where the first begins.
    pub const fn base(&self) -> NonNull<u8> {
        self.base
    }
}

// SAFETY: an address and a size. What lies there is only read, or written word by word atomically, but for the free
// lines of its single writer.
unsafe impl Send for RawTable {}
// SAFETY: as above.
unsafe impl Sync for RawTable {}

/// Every table's memory, in the order of `TableId::ALL`.
pub type RawTables = [RawTable; TableId::ALL.len()];

/// A table could not be made larger.
#[derive(Clone, Debug, thiserror::Error)]
#[error("table {} cannot grow to {elements} elements: {cause}", table.name())]
pub struct GrowError {
    /// Which table
    pub table: TableId,
    /// Elements asked for
    pub elements: usize,
    /// Why, in the words of whoever refused
    pub cause: String,
}

/// Owner of the tables' memory.
///
/// # Safety
/// `tables()` returns the memory of each table in the order of `TableId::ALL`, one `Config` at least, valid until `grow`
/// for that table or the end of the backing.
pub unsafe trait Backing {
    /// The tables' memory, ready: the writer asks for it at every step.
    fn tables(&self) -> &RawTables;

    /// Makes a table at least `elements` large, keeping its content and zeroing the rest. Returns when every reader
    /// uses the new memory.
    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError>;

    /// The brake on the policies of these tables, always the same.
    fn brake(&self) -> Brake;

    /// The tables, typed.
    fn view(&self) -> View<'_> {
        // By the contract of this trait the memory is right, and stays while `self` is borrowed.
        View { tables: self.tables() }
    }
}

/// The tables, typed. Shared access only: what changes is made of atomic words, what does not is read in place.
#[derive(Clone, Copy)]
pub struct View<'a> {
    tables: &'a RawTables,
}

macro_rules! slices {
    ($($(#[$doc:meta])* $name:ident: $record:ty = $table:ident;)*) => { $(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(&self) -> &'a [$record] {
            let raw = &self.tables[TableId::$table as usize];
            // SAFETY: `Backing` promises records of this type, which consist of atomic words, for the lifetime 'a.
            unsafe { core::slice::from_raw_parts(raw.base.cast().as_ptr(), raw.elements) }
        }
    )* };
}

impl<'a> View<'a> {
    /// Elements of a table.
    pub fn elements(&self, table: TableId) -> usize {
        self.tables[table as usize].elements
    }

    /// Counters there are of each thing.
    #[inline(always)]
    pub fn cpus(&self) -> usize {
        self.stats().len() / self.ports().len().max(1)
    }

    /// The region's configuration.
    #[inline(always)]
    pub fn config(&self) -> &'a Config {
        // SAFETY: `Backing` promises one.
        unsafe { self.tables[TableId::Config as usize].base.cast().as_ref() }
    }

    slices! {
        /// Ports by slot
        ports: Port = Ports;
        /// Tables of VLAN sub-interfaces
        vlans: VlanTable = Vlans;
        /// Route tables' top levels
        roots: Root = Roots;
        /// Next hops
        nexthops: Nexthop = Nexthops;
        /// What the next hops are, index by index
        nexthop_keys: NexthopKey = NexthopKeys;
        /// Next-hop groups
        groups: Group = Groups;
        /// Counters
        stats: PortStats = Stats;
        /// Flows
        flows: Flow = Flows;
        /// Their index
        flow_lines: FlowLine = FlowLines;
        /// Lists of roots by source
        sources: SourceList = Sources;
        /// Sets of mappings
        mapping_sets: MappingSet = Mappings;
        /// Their counters
        mapping_stats: MappingCounters = MappingStats;
        /// The operator's filters
        filters: Filter = Filters;
        /// What else they are
        filter_keys: FilterKey = FilterKeys;
        /// Their counters
        filter_stats: FilterCounters = FilterStats;
    }

    #[inline(always)]
    fn lines_ptr(&self, index: u32, count: usize) -> Option<NonNull<Line>> {
        let raw = &self.tables[TableId::Nodes as usize];
        // SAFETY: the index was compared with the number of lines there are.
        (index as usize + count <= raw.elements).then(|| unsafe { raw.base.cast::<Line>().add(index as usize) })
    }

    /// A line of a node that a published word leads to.
    #[inline(always)]
    pub fn line_of(&self, index: u32) -> Option<&'a Line> {
        // SAFETY: the line lies in the table; the index came from a published word, so it does not change before a
        // grace period has passed for this reader.
        self.lines_ptr(index, 1).map(|line| unsafe { line.as_ref() })
    }

    /// Writes the lines of a node that no reader can reach; false if they are not all in the table.
    ///
    /// # Safety
    /// Nothing published leads to the node, and no reader that could still look at it is under way.
    pub(crate) unsafe fn write_lines(&self, index: u32, lines: &[Line]) -> bool {
        // SAFETY: inside the table, and by the promise above not shared.
        let copy = |slot: NonNull<Line>| unsafe { slot.as_ptr().copy_from_nonoverlapping(lines.as_ptr(), lines.len()) };
        self.lines_ptr(index, lines.len()).map(copy).is_some()
    }
}

impl LpmRead for View<'_> {
    #[inline(always)]
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        self.roots().get(root as usize).map(|root| order::load(&root.direct[usize::from(slot)]))
    }

    #[inline(always)]
    fn root_default(&self, root: u32) -> Option<u32> {
        self.roots().get(root as usize).map(|root| order::load(&root.default))
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Line> {
        self.line_of(index)
    }
}

/// Tables on the heap, for tests, tools and engines without BPF. Growing copies.
pub struct HeapBacking {
    tables: RawTables,
    limits: PerTable,
    brake: Brake,
}

impl HeapBacking {
    /// Zeroed tables of these sizes, which may grow without limit.
    pub fn new(elements: PerTable) -> Self {
        Self::with_limits(elements, PerTable([usize::MAX; TableId::ALL.len()]))
    }

    /// Zeroed tables that refuse to grow beyond `limits`.
    pub fn with_limits(elements: PerTable, limits: PerTable) -> Self {
        Self { tables: TableId::ALL.map(|table| allocate(table, elements.get(table))), limits, brake: Brake::default() }
    }
}

/// Size of a huge page. Tables of that size and more may lie in such pages: a look-up among many routes then waits for one
/// memory access where there would be several, to the translations of addresses.
const HUGE: usize = 2 << 20;

fn layout(table: TableId, elements: usize) -> Layout {
    // One element at least, so that the size is never zero.
    let bytes = table.element_size() * elements.max(1);
    let layout = Layout::from_size_align(bytes, TABLE_ALIGN).expect("a table's size fits");
    if cfg!(miri) || bytes < HUGE { layout } else { layout.align_to(HUGE).expect("a table's size fits").pad_to_align() }
}

fn allocate(table: TableId, elements: usize) -> RawTable {
    let layout = layout(table, elements);
    // SAFETY: the size is not zero.
    let base = NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
    if layout.align() == HUGE {
        // Before the first touch, which is what chooses the pages. The kernel may ignore it.
        // SAFETY: the range is one allocation, aligned to pages; the advice changes no contents.
        unsafe { libc::madvise(base.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
    }
    // SAFETY: as large as that.
    unsafe { base.write_bytes(0, layout.size()) };
    // SAFETY: just allocated, zeroed, with the size and alignment asked for.
    unsafe { RawTable::from_raw(base, elements) }
}

// SAFETY: each table was allocated for its id and is freed only when replaced or dropped.
unsafe impl Backing for HeapBacking {
    fn tables(&self) -> &RawTables {
        &self.tables
    }

    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        let limit = self.limits.get(table);
        if elements > limit {
            return Err(GrowError { table, elements, cause: format!("the limit is {limit}") });
        }
        let old = self.tables[table as usize];
        if elements <= old.elements {
            return Ok(());
        }
        let new = allocate(table, elements);
        // SAFETY: both are at least as large as the old one and do not overlap; nobody borrows `self` meanwhile.
        unsafe {
            old.base.copy_to_nonoverlapping(new.base, table.element_size() * old.elements);
            dealloc(old.base.as_ptr(), layout(table, old.elements));
        }
        self.tables[table as usize] = new;
        Ok(())
    }

    fn brake(&self) -> Brake {
        self.brake.clone()
    }
}

impl Drop for HeapBacking {
    fn drop(&mut self) {
        for table in TableId::ALL {
            let raw = self.tables[table as usize];
            // SAFETY: allocated with this layout, and not used after.
            unsafe { dealloc(raw.base.as_ptr(), layout(table, raw.elements)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_keeps_content_and_zeroes_the_rest() {
        let sizes = initial_elements(2).with(TableId::Groups, 1);
        let mut backing = HeapBacking::with_limits(sizes, PerTable([8; TableId::ALL.len()]));
        backing.view().groups()[0].buckets[255].store(77);
        backing.grow(TableId::Groups, 3).unwrap();
        let groups = backing.view().groups();
        assert_eq!(groups.len(), 3);
        assert_eq!(groups[0].buckets[255].load(), 77);
        assert!(groups[1..].iter().flat_map(|g| &g.buckets).all(|bucket| bucket.load() == 0));
        let error = backing.grow(TableId::Groups, 9).unwrap_err();
        assert_eq!(error.to_string(), "table groups cannot grow to 9 elements: the limit is 8");
        assert_eq!(backing.view().groups().len(), 3);
    }
}
