//! Nodes in the tables: allocated, written, taken out of use, reused after a grace period. Nothing here
//! changes a piece that readers can reach.

use crate::backing::{Backing, GrowError};
use crate::grace::Grace;
use crate::lpm::{FirstLine, Kind, Leaf, LpmRead, NODE_LIMIT, Word};
use crate::order;
use crate::pool::{Runs, Slots};
use crate::record::{LINE_BYTES, Line, NO_END, NODE_LINES, NODE_REACH, Node, PACKED_WIDE_RUNS, TableId, WIDE_RUNS};

/// The memory that routes are published in.
pub trait Memory: LpmRead {
    /// Elements of a table.
    fn elements(&self, table: TableId) -> usize;
    /// Writes consecutive lines that no reader can reach.
    fn write_lines(&mut self, index: u32, lines: &[Line]);
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
    fn line(&self, index: u32) -> Option<&Line> {
        self.view().line_of(index)
    }
}

impl<B: Backing> Memory for B {
    fn elements(&self, table: TableId) -> usize {
        self.view().elements(table)
    }
    fn write_lines(&mut self, index: u32, lines: &[Line]) {
        // SAFETY: the one caller, `Store::write`, has just taken the lines from the free ones, where they came only
        // after a grace period.
        let written = unsafe { self.view().write_lines(index, lines) };
        assert!(written, "node {index} was allocated outside the table");
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
    /// First line and number of lines of a node
    Node(u32, u32),
    /// A next hop
    Nexthop(u32),
    /// A group
    Group(u32),
    /// A table of VLAN sub-interfaces
    Vlans(u32),
    /// A root
    Root(u32),
    /// A list of roots by source
    Sources(u32),
}

/// Pieces in limbo beyond which waiting for a grace period is cheaper than growing.
const LIMBO_LIMIT: usize = 1024;
/// Pieces in limbo beyond which they are made free though there is room. A grace period takes milliseconds, and a hundred
/// thousand changes a second leave as many pieces: fewer, and the writer would do nothing but wait.
const LIMBO_MOST: usize = 1 << 15;

/// The tables' memory and what is free in it.
pub struct Store<M, G> {
    /// The memory
    pub mem: M,
    grace: G,
    nodes: Runs,
    pub(crate) nexthops: Slots,
    pub(crate) groups: Slots,
    pub(crate) vlans: Slots,
    pub(crate) roots: Slots,
    pub(crate) sources: Slots,
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
    /// First line and number of lines
    pub nodes: Vec<(u32, u32)>,
    pub nexthops: Vec<u32>,
    pub groups: Vec<u32>,
    pub vlans: Vec<u32>,
    pub roots: Vec<u32>,
    pub sources: Vec<u32>,
}

/// The 256 words of a node.
pub(crate) type Words = [Word; 256];

/// The words of 16 bits: the first value of each run and its word, neighbours different.
pub(crate) type WideRuns = Vec<(u16, Word)>;

/// What is published for 16 bits.
pub(crate) enum Published {
    /// A wide node
    Wide(WideRuns),
    /// The word for each of the first eight bits: leaves, and nodes for the other eight
    Bytes(Box<Words>),
}

/// The next hop `Exception(TableFull)`, which stands in for pieces that found no room.
pub const TABLE_FULL: Leaf = Leaf::nexthop(1).unwrap();
/// First next hop that is free at the beginning.
pub(crate) const FIRST_NEXTHOP: u32 = 2;

impl<M: Memory, G: Grace> Store<M, G> {
    /// Memory in which nothing is published yet.
    pub fn new(mem: M, grace: G) -> Self {
        Self::with_used(mem, grace, InUse::default()).expect("nothing overlaps nothing")
    }

    /// Memory in which exactly this is in use; None if pieces overlap.
    pub(crate) fn with_used(mem: M, grace: G, mut used: InUse) -> Option<Self> {
        for list in [&mut used.nexthops, &mut used.groups, &mut used.vlans, &mut used.roots, &mut used.sources] {
            list.sort_unstable();
            list.dedup();
        }
        Some(Self {
            mem,
            grace,
            nodes: Runs::with_used(used.nodes)?,
            nexthops: Slots::with_used(FIRST_NEXTHOP, used.nexthops.into_iter().filter(|&i| i >= FIRST_NEXTHOP)),
            groups: Slots::with_used(0, used.groups),
            vlans: Slots::with_used(0, used.vlans),
            roots: Slots::with_used(0, used.roots),
            sources: Slots::with_used(0, used.sources),
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

    /// Elements in use, as far as they are handed out.
    pub fn used(&self, table: TableId) -> Option<usize> {
        Some(match table {
            TableId::Nodes => self.nodes.used(),
            TableId::Nexthops | TableId::NexthopKeys => self.nexthops.used() + FIRST_NEXTHOP as usize,
            TableId::Groups => self.groups.used(),
            TableId::Vlans => self.vlans.used(),
            TableId::Roots => self.roots.used(),
            TableId::Sources => self.sources.used(),
            _ => return None,
        })
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
        if self.limbo.len() >= LIMBO_MOST {
            self.reclaim();
        }
    }

    /// Waits until no reader holds anything found before.
    pub(crate) fn wait(&mut self) {
        self.grace.wait();
    }

    fn give(&mut self, piece: Piece) {
        match piece {
            Piece::Node(index, lines) => self.nodes.give(index, lines),
            Piece::Nexthop(index) => self.nexthops.give(index),
            Piece::Group(index) => self.groups.give(index),
            Piece::Vlans(index) => self.vlans.give(index),
            Piece::Root(index) => self.roots.give(index),
            Piece::Sources(index) => self.sources.give(index),
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

    /// Writes a node with these words; None if there is no room.
    pub(crate) fn add(&mut self, words: &Words) -> Option<Word> {
        let shape = shape(words);
        self.write(&compress(words, shape)).map(|index| shape.at(index))
    }

    /// Writes a wide node with these words, of which there must be at least two and at most `WIDE_RUNS`; None if there
    /// is no room.
    pub(crate) fn add_wide(&mut self, runs: &[(u16, Word)]) -> Option<Word> {
        let shape = wide_shape(runs);
        self.write(&wide(runs, shape)).map(|index| shape.at(index))
    }

    fn write(&mut self, piece: &Lines) -> Option<u32> {
        let lines = piece.lines();
        let limit = |room: usize| room.saturating_sub(NODE_REACH).min(NODE_LIMIT as usize) as u32;
        let index = self.allocate(TableId::Nodes, |store, room| store.nodes.take(lines.len(), limit(room)))?;
        self.mem.write_lines(index, lines);
        self.written += 1;
        Some(index)
    }

    /// What is published for 16 bits where `word` leads.
    pub(crate) fn published(&self, word: Word) -> Published {
        match word.kind() {
            Kind::Node(index) if word.is_wide() => {
                let starts = core::iter::once(0).chain(ends(word, self.node(index).line).map(|end| end + 1));
                Published::Wide(starts.zip((0..).map(|rank| self.stored(word, index, rank))).collect())
            }
            _ => Published::Bytes(Box::new(self.expand(word))),
        }
    }

    /// What is published for eight of 16 bits.
    pub(crate) fn words_of(&self, published: &Published, byte: u8) -> Words {
        match published {
            Published::Wide(runs) => words_of_byte(runs, byte),
            Published::Bytes(words) => self.expand(words[usize::from(byte)]),
        }
    }

    fn node(&self, index: u32) -> FirstLine<'_> {
        self.mem.node(index).expect("published words lead to nodes in the table")
    }

    /// One of the words that the node to which `word` leads stores.
    fn stored(&self, word: Word, index: u32, rank: u32) -> Word {
        stored(&self.mem, word, self.node(index), rank).expect("published nodes lie in the table")
    }

    /// The 256 words that a word stands for; it does not lead to a wide node.
    pub(crate) fn expand(&self, word: Word) -> Words {
        let Kind::Node(index) = word.kind() else { return [word; 256] };
        let bitmap = self.node(index).line.as_node().bitmap;
        let mut words = [Word::NONE; 256];
        let (mut ranks, mut last) = (0.., Word::NONE);
        for (value, slot) in words.iter_mut().enumerate() {
            if bitmap[value / 64] >> (value % 64) & 1 != 0
                && let Some(rank) = ranks.next()
            {
                last = self.stored(word, index, rank);
            }
            *slot = last;
        }
        words
    }

    /// Retires the node that a word leads to, if it does, but nothing that its words lead to.
    pub(crate) fn retire_node(&mut self, word: Word) {
        let Kind::Node(index) = word.kind() else { return };
        let lines = lines_of(word, stored_count(word, self.node(index).line));
        self.retire(Piece::Node(index, lines));
    }

    /// Retires everything that a word leads to.
    pub(crate) fn retire_tree(&mut self, word: Word) {
        let Kind::Node(index) = word.kind() else { return };
        if !word.is_packed() {
            let count = stored_count(word, self.node(index).line);
            (0..count).for_each(|rank| self.retire_tree(self.stored(word, index, rank)));
        }
        self.retire_node(word);
    }
}

/// Last values of the runs of a wide node but the last one; `word` leads to it.
pub(crate) fn ends(word: Word, first: &Line) -> impl Iterator<Item = u16> + '_ {
    all_ends(word, first).iter().copied().take_while(|end| *end != NO_END)
}

/// The places for ends in a wide node.
pub(crate) fn all_ends(word: Word, first: &Line) -> &[u16] {
    if word.is_packed() { first.as_packed_wide().ends.as_flattened() } else { first.as_wide().ends.as_flattened() }
}

/// Number of words that a node stores; `word` leads to it.
pub(crate) fn stored_count(word: Word, first: &Line) -> u32 {
    if word.is_wide() {
        ends(word, first).count() as u32 + 1
    } else {
        first.as_node().bitmap.iter().map(|quarter| quarter.count_ones()).sum()
    }
}

/// One of the words that a node stores; `word` leads to it.
pub(crate) fn stored(mem: &impl LpmRead, word: Word, node: FirstLine, rank: u32) -> Option<Word> {
    let position = word.head() + rank;
    if word.is_packed() { mem.byte(node, position).map(Word::unpack) } else { mem.stored(node, position) }
}

/// Lines of a node that stores so many words; `word` leads to it.
pub(crate) fn lines_of(word: Word, count: u32) -> u32 {
    (word.head() + count).div_ceil(word.line_elements())
}

/// The lines of a node under construction.
pub(crate) struct Lines {
    lines: [Line; NODE_LINES],
    /// Bytes so far
    len: usize,
    packed: bool,
}

impl Lines {
    /// Of a node of this shape, with room for its beginning.
    fn new(shape: Word) -> Self {
        let len = (shape.head() * LINE_BYTES as u32 / shape.line_elements()) as usize;
        Self { lines: [Line::ZERO; NODE_LINES], len, packed: shape.is_packed() }
    }

    /// Adds a word; one that can be packed if the node is.
    fn push(&mut self, word: Word) {
        match word.pack().filter(|_| self.packed) {
            Some(byte) => self.push_bytes(&[byte]),
            None => self.push_bytes(&word.0.to_ne_bytes()),
        }
    }

    fn push_bytes(&mut self, bytes: &[u8]) {
        let at = self.len % LINE_BYTES;
        self.lines[self.len / LINE_BYTES].bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Sets the beginning.
    fn set_head(&mut self, head: &[u8]) {
        self.lines[0].bytes_mut()[..head.len()].copy_from_slice(head);
    }

    fn lines(&self) -> &[Line] {
        &self.lines[..self.len.div_ceil(LINE_BYTES)]
    }
}

fn fits_packed<'w>(mut words: impl Iterator<Item = &'w Word>) -> bool {
    words.all(|word| word.pack().is_some())
}

/// The word that would lead to a node of these words in line 0.
fn shape(words: &Words) -> Word {
    if fits_packed(words.iter()) { Word::node(0).to_packed() } else { Word::node(0) }
}

/// The word that would lead to a wide node of these words in line 0.
fn wide_shape(runs: &[(u16, Word)]) -> Word {
    let packed = runs.len() <= PACKED_WIDE_RUNS && fits_packed(runs.iter().map(|run| &run.1));
    if packed { Word::wide(0).to_packed() } else { Word::wide(0) }
}

/// The wide node for these words.
fn wide(runs: &[(u16, Word)], shape: Word) -> Lines {
    let mut lines = Lines::new(shape);
    let head = core::mem::take(&mut lines.len);
    runs[1..].iter().for_each(|(start, _)| lines.push_bytes(&(start - 1).to_ne_bytes()));
    while lines.len < head {
        lines.push_bytes(&NO_END.to_ne_bytes());
    }
    runs.iter().for_each(|run| lines.push(run.1));
    lines
}

/// The words for the values of 16 bits that begin with `byte`.
fn words_of_byte(runs: &[(u16, Word)], byte: u8) -> Words {
    let first = u16::from(byte) << 8;
    let mut at = runs.partition_point(|run| run.0 <= first) - 1;
    core::array::from_fn(|low| {
        while runs.get(at + 1).is_some_and(|next| next.0 <= first | low as u16) {
            at += 1;
        }
        runs[at].1
    })
}

/// The words of 16 bits as a wide node holds them: `words` for the first eight bits, and for the others `inner` where
/// there is more than one word to a byte. None if an ordinary node can hold them all, or if they are too many.
pub(crate) fn wide_runs(words: &Words, inner: impl Iterator<Item = (u8, Words)>) -> Option<WideRuns> {
    let mut inner = inner.peekable();
    inner.peek()?;
    let mut runs = WideRuns::with_capacity(WIDE_RUNS + 1);
    let mut add = |value: usize, word: Word| {
        let differs = runs.last().is_none_or(|run: &(u16, Word)| run.1 != word);
        if differs {
            runs.push((value as u16, word));
        }
        runs.len() <= WIDE_RUNS
    };
    let mut next = 0;
    for (byte, inner) in inner {
        let byte = usize::from(byte);
        let fits = (next..byte).all(|byte| add(byte << 8, words[byte]))
            && (0..256).all(|low| add(byte << 8 | low, inner[low]));
        if !fits {
            return None;
        }
        next = byte + 1;
    }
    let fits = (next..256).all(|byte| add(byte << 8, words[byte]));
    (fits && runs.iter().any(|run| run.0 & 0xff != 0)).then_some(runs)
}

/// The node for 256 words.
fn compress(words: &Words, shape: Word) -> Lines {
    let mut node = Node { bitmap: [0; 4], counts: [0; 4], words: [0; _] };
    let mut lines = Lines::new(shape);
    let head = lines.len;
    let mut count = 0;
    for (value, word) in words.iter().enumerate() {
        if value % 64 == 0 {
            node.counts[value / 64] = count;
        }
        if value == 0 || words[value - 1] != *word {
            node.bitmap[value / 64] |= 1 << (value % 64);
            lines.push(*word);
            count = count.wrapping_add(1);
        }
    }
    lines.set_head(&node.to_line().bytes()[..head]);
    lines
}

/// Lines that 256 words take, without what they lead to.
pub(crate) fn footprint(words: &Words) -> usize {
    match 1 + words.windows(2).filter(|pair| pair[0] != pair[1]).count() {
        1 => 0,
        count => lines_of(shape(words), count as u32) as usize,
    }
}

/// Lines that a wide node with these words takes.
pub(crate) fn wide_footprint(runs: &[(u16, Word)]) -> usize {
    lines_of(wide_shape(runs), runs.len() as u32) as usize
}
