//! Nodes and entries in the tables: allocated, written, taken out of use, reused after a grace period. Nothing here
//! changes a piece that readers can reach.

use crate::backing::{Backing, GrowError};
use crate::lpm::{INDEX_LIMIT, Kind, Leaf, LpmRead, Word};
use crate::order;
use crate::grace::Grace;
use crate::pool::{Runs, Slots};
use crate::record::{BASE_INLINE, ENTRIES_PER_PAGE, INLINE_ENTRIES, Node, TableId};

/// The memory that routes are published in.
pub trait Memory: LpmRead {
    /// Elements of a table.
    fn elements(&self, table: TableId) -> usize;
    /// Writes a node that no reader can reach.
    fn write_node(&mut self, index: u32, node: &Node);
    /// Writes consecutive entries that no reader can reach.
    fn write_entries(&mut self, base: u32, words: &[u32]);
    /// Publishes a word of a root: `order::publish`.
    fn publish_root(&mut self, root: u32, slot: u16, word: u32);
    /// Publishes the leaf of the default route.
    fn publish_default(&mut self, root: u32, word: u32);
    /// As `Backing::grow`.
    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError>;
}

impl<B: Backing> LpmRead for B {
    fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
        self.view().root_word(root, slot)
    }
    fn root_default(&self, root: u32) -> Option<u32> {
        self.view().root_default(root)
    }
    fn node(&self, index: u32) -> Option<&Node> {
        self.view().node_of(index)
    }
    fn entry(&self, index: u32) -> Option<u32> {
        self.view().entry(index)
    }
}

impl<B: Backing> Memory for B {
    fn elements(&self, table: TableId) -> usize {
        self.view().elements(table)
    }
    fn write_node(&mut self, index: u32, node: &Node) {
        // SAFETY: the one caller, `Store::add`, has just taken the slot from the free ones, where it came only after
        // a grace period.
        let written = unsafe { self.view().write_node(index, node) };
        assert!(written, "node {index} was allocated outside the table");
    }
    fn write_entries(&mut self, base: u32, words: &[u32]) {
        assert!(self.view().write_entries(base, words), "entries at {base} were allocated outside the table");
    }
    fn publish_root(&mut self, root: u32, slot: u16, word: u32) {
        order::publish(&self.view().roots()[root as usize].direct[usize::from(slot)], word);
    }
    fn publish_default(&mut self, root: u32, word: u32) {
        order::publish(&self.view().roots()[root as usize].default, word);
    }
    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        Backing::grow(self, table, elements)
    }
}

/// Something that was taken out of use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Piece {
    /// A node
    Node(u32),
    /// First word and number of words of a run of entries
    Run(u32, u32),
    /// A next hop
    Nexthop(u32),
    /// A group
    Group(u32),
    /// A table of VLAN sub-interfaces
    Vlans(u32),
    /// A root
    Root(u32),
}

/// Pieces in limbo beyond which waiting for a grace period is cheaper than growing.
const LIMBO_LIMIT: usize = 1024;

/// The tables' memory and what is free in it.
pub struct Store<M, G> {
    /// The memory
    pub mem: M,
    grace: G,
    nodes: Slots,
    runs: Runs,
    pub(crate) nexthops: Slots,
    pub(crate) groups: Slots,
    pub(crate) vlans: Slots,
    pub(crate) roots: Slots,
    /// Out of use once the next word is published
    leaving: Vec<Piece>,
    /// Out of use, but perhaps still looked at
    limbo: Vec<Piece>,
    /// Tables that refused to grow since `begin`
    full: Vec<GrowError>,
    /// Nodes written since `begin`
    written: usize,
}

/// What a look through everything published found in use.
#[derive(Default, Debug)]
pub(crate) struct InUse {
    pub nodes: Vec<u32>,
    pub runs: Vec<(u32, u32)>,
    pub nexthops: Vec<u32>,
    pub groups: Vec<u32>,
    pub vlans: Vec<u32>,
    pub roots: Vec<u32>,
}

/// The 256 words of a node.
pub(crate) type Words = [Word; 256];

/// The next hop `Exception(TableFull)`, which stands in for pieces that found no room.
pub const TABLE_FULL: Leaf = Leaf::nexthop(1).unwrap();
/// First next hop that is free at the beginning.
pub(crate) const FIRST_NEXTHOP: u32 = 2;
const FIRST_NODE: u32 = 1;

impl<M: Memory, G: Grace> Store<M, G> {
    /// Memory in which nothing is published yet.
    pub fn new(mem: M, grace: G) -> Self {
        Self::with_used(mem, grace, InUse::default()).expect("nothing overlaps nothing")
    }

    /// Memory in which exactly this is in use; None if pieces overlap.
    pub(crate) fn with_used(mem: M, grace: G, mut used: InUse) -> Option<Self> {
        for list in [&mut used.nodes, &mut used.nexthops, &mut used.groups, &mut used.vlans, &mut used.roots] {
            list.sort_unstable();
        }
        if used.nodes.windows(2).any(|pair| pair[0] == pair[1]) {
            return None;
        }
        for list in [&mut used.nexthops, &mut used.groups, &mut used.vlans, &mut used.roots] {
            list.dedup();
        }
        Some(Self {
            mem,
            grace,
            nodes: Slots::with_used(FIRST_NODE, used.nodes),
            runs: Runs::with_used(used.runs)?,
            nexthops: Slots::with_used(FIRST_NEXTHOP, used.nexthops.into_iter().filter(|&i| i >= FIRST_NEXTHOP)),
            groups: Slots::with_used(0, used.groups),
            vlans: Slots::with_used(0, used.vlans),
            roots: Slots::with_used(0, used.roots),
            leaving: Vec::new(),
            limbo: Vec::new(),
            full: Vec::new(),
            written: 0,
        })
    }

    /// Starts a publication: tables that refused to grow are asked again.
    pub(crate) fn begin(&mut self) {
        self.full.clear();
        self.written = 0;
    }

    /// Nodes written since `begin`, and the tables that refused to grow.
    pub(crate) fn outcome(&mut self) -> (usize, Vec<GrowError>) {
        (self.written, core::mem::take(&mut self.full))
    }

    /// Elements in use, as far as they are handed out one by one; for entries the pages they would fill.
    pub fn used(&self, table: TableId) -> Option<usize> {
        Some(match table {
            TableId::Nodes => self.nodes.used(),
            TableId::Entries => self.runs.used_words().div_ceil(ENTRIES_PER_PAGE),
            TableId::Nexthops | TableId::NexthopKeys => self.nexthops.used() + FIRST_NEXTHOP as usize,
            TableId::Groups => self.groups.used(),
            TableId::Vlans => self.vlans.used(),
            TableId::Roots => self.roots.used(),
            _ => return None,
        })
    }

    /// Words of entries in use.
    pub fn used_entries(&self) -> usize {
        self.runs.used_words()
    }

    /// Pieces that wait for a grace period.
    pub fn limbo(&self) -> usize {
        self.limbo.len() + self.leaving.len()
    }

    /// Takes something out of use once the next word has been published.
    pub(crate) fn retire(&mut self, piece: Piece) {
        self.leaving.push(piece);
    }

    /// The word that made `leaving` unreachable is published.
    pub(crate) fn settle(&mut self) {
        self.limbo.append(&mut self.leaving);
    }

    /// Waits for a grace period and makes everything in limbo free.
    pub fn reclaim(&mut self) {
        if self.limbo.is_empty() {
            return;
        }
        self.grace.wait();
        for piece in core::mem::take(&mut self.limbo) {
            self.give(piece);
        }
    }

    /// Waits for a grace period if so much is in limbo that it is worth while.
    pub(crate) fn tidy(&mut self) {
        if self.limbo.len() >= LIMBO_LIMIT {
            self.reclaim();
        }
    }

    /// Waits until no reader holds anything found before.
    pub(crate) fn wait(&mut self) {
        self.grace.wait();
    }

    fn give(&mut self, piece: Piece) {
        match piece {
            Piece::Node(index) => self.nodes.give(index),
            Piece::Run(base, words) => self.runs.give(base, words),
            Piece::Nexthop(index) => self.nexthops.give(index),
            Piece::Group(index) => self.groups.give(index),
            Piece::Vlans(index) => self.vlans.give(index),
            Piece::Root(index) => self.roots.give(index),
        }
    }

    /// Takes from a table what `take` finds, making room by whatever means there are.
    pub(crate) fn allocate(&mut self, table: TableId, take: impl Fn(&mut Self, usize) -> Option<u32>) -> Option<u32> {
        let room = self.mem.elements(table);
        if let Some(index) = take(self, room) {
            return Some(index);
        }
        if self.limbo.len() >= LIMBO_LIMIT {
            self.reclaim();
            if let Some(index) = take(self, room) {
                return Some(index);
            }
        }
        if self.grow(table, room.saturating_mul(2).max(1)) {
            return take(self, self.mem.elements(table));
        }
        self.reclaim();
        take(self, room)
    }

    /// Makes a table at least so large; false if that was refused now or since `begin`.
    pub(crate) fn grow(&mut self, table: TableId, elements: usize) -> bool {
        if self.full.iter().any(|error| error.table == table) {
            return false;
        }
        self.mem.grow(table, elements).map_err(|error| self.full.push(error)).is_ok()
    }

    fn take_node(&mut self) -> Option<u32> {
        self.allocate(TableId::Nodes, |store, room| store.nodes.take(room.min(INDEX_LIMIT as usize) as u32))
    }

    fn take_run(&mut self, words: u32) -> Option<u32> {
        const MOST_PAGES: usize = BASE_INLINE as usize / ENTRIES_PER_PAGE;
        self.allocate(TableId::Entries, |store, room| store.runs.take(words, room.min(MOST_PAGES)))
    }

    /// Writes a node with these words; None if there is no room.
    pub(crate) fn add(&mut self, words: &Words) -> Option<u32> {
        let (mut node, stored, count) = compress(words);
        if count > INLINE_ENTRIES {
            node.base = self.take_run(count as u32)?;
            self.mem.write_entries(node.base, &stored[..count]);
        }
        let Some(index) = self.take_node() else {
            if node.base != BASE_INLINE {
                self.runs.give(node.base, count as u32);
            }
            return None;
        };
        self.mem.write_node(index, &node);
        self.written += 1;
        Some(index)
    }

    /// The 256 words that a word stands for.
    pub(crate) fn expand(&self, word: Word) -> Words {
        let Kind::Node(index) = word.kind() else { return [word; 256] };
        let node = *self.mem.node(index).expect("published words lead to nodes in the table");
        let mut words = [Word::NONE; 256];
        let mut rank = 0;
        for (value, slot) in words.iter_mut().enumerate() {
            rank += (node.bitmap[value / 64] >> (value % 64) & 1) as u32;
            *slot = self.stored(&node, rank - 1);
        }
        words
    }

    fn stored(&self, node: &Node, rank: u32) -> Word {
        Word(if node.base == BASE_INLINE {
            node.inline[rank as usize]
        } else {
            self.mem.entry(node.base + rank).expect("published nodes' entries lie in the table")
        })
    }

    /// Retires a node and its entries, but nothing that its words lead to.
    pub(crate) fn retire_node(&mut self, index: u32) {
        let node = self.mem.node(index).expect("published words lead to nodes in the table");
        let (base, count) = (node.base, stored_count(node));
        self.retire(Piece::Node(index));
        if base != BASE_INLINE {
            self.retire(Piece::Run(base, count));
        }
    }

    /// Retires everything that a word leads to.
    pub(crate) fn retire_tree(&mut self, word: Word) {
        let Kind::Node(index) = word.kind() else { return };
        let node = *self.mem.node(index).expect("published words lead to nodes in the table");
        for rank in 0..stored_count(&node) {
            self.retire_tree(self.stored(&node, rank));
        }
        self.retire_node(index);
    }
}

/// Number of words that a node stores.
pub(crate) fn stored_count(node: &Node) -> u32 {
    node.bitmap.iter().map(|quarter| quarter.count_ones()).sum()
}

/// The node for 256 words (inline if they fit), and what it has to store.
fn compress(words: &Words) -> (Node, [u32; 256], usize) {
    let mut node = Node { bitmap: [0; 4], base: BASE_INLINE, counts: [0; 4], inline: [0; INLINE_ENTRIES] };
    let mut stored = [0; 256];
    let mut count = 0;
    for (value, word) in words.iter().enumerate() {
        if value % 64 == 0 {
            node.counts[value / 64] = count as u8;
        }
        if value == 0 || words[value - 1] != *word {
            node.bitmap[value / 64] |= 1 << (value % 64);
            stored[count] = word.0;
            count += 1;
        }
    }
    if count <= INLINE_ENTRIES {
        node.inline[..count].copy_from_slice(&stored[..count]);
    }
    (node, stored, count)
}

/// Nodes and words of entries that 256 words take, without what they lead to.
pub(crate) fn footprint(words: &Words) -> (usize, usize) {
    match 1 + words.windows(2).filter(|pair| pair[0] != pair[1]).count() {
        1 => (0, 0),
        count if count <= INLINE_ENTRIES => (1, 0),
        count => (1, (crate::pool::run_units(count as u32) * crate::pool::RUN_UNIT) as usize),
    }
}
