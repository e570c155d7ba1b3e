//! Longest-prefix match: what a word means, and the look-up. Compiled for BPF and natively; it allocates nothing,
//! cannot panic and walks at most one node per address byte after the second, or one wide node per two.

use crate::opaque;
use crate::record::{LINE_BYTES, LINE_WORDS, Line, NODE_HEAD, Node, PACKED_HEAD, PACKED_WIDE_HEAD, WIDE_HEAD};

const NODE: u32 = 1 << 31;
const GROUP: u32 = 1 << 30;
const WIDE: u32 = 1 << 30;
const PACKED: u32 = 1 << 29;

/// Indices of next hops and groups are below this. The bits between it and `GROUP` are the writer's, for a route's level.
pub const INDEX_LIMIT: u32 = 1 << 26;
/// Indices of nodes are below this.
pub const NODE_LIMIT: u32 = 1 << 29;

/// What a byte of a packed node says: from here on a group, counted from 0; below, a next hop, or nothing.
const FIRST_GROUP: u32 = 192;

/// What a root slot or an entry holds: nothing, a node to go on at, or a leaf.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
#[repr(transparent)]
pub struct Word(pub u32);

/// A word taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// No route longer than /0
    None,
    /// Go on at this node, wide or not
    Node(u32),
    /// Leaf: this next hop
    Nexthop(u32),
    /// Leaf: this next-hop group
    Group(u32),
}

impl Word {
    /// No route longer than /0.
    pub const NONE: Word = Word(0);

    /// The word that leads to a node.
    pub const fn node(index: u32) -> Word {
        Word(NODE | index)
    }

    /// The word that leads to a wide node.
    pub const fn wide(index: u32) -> Word {
        Word(NODE | WIDE | index)
    }

    /// The word that leads to a node of the same shape in another line; `self` leads to line 0.
    pub const fn at(self, index: u32) -> Word {
        Word(self.0 | index)
    }

    /// The same for a packed node: that of a word that leads to a node, wide or not.
    pub const fn to_packed(self) -> Word {
        Word(self.0 | PACKED)
    }

    /// True if the walk goes on at a packed node. Asked only of words that lead to a node.
    #[inline(always)]
    pub const fn is_packed(self) -> bool {
        self.0 & PACKED != 0
    }

    /// The byte that stands for it in a packed node, if one can: for nothing, and for the first next hops and groups.
    pub const fn pack(self) -> Option<u8> {
        match self.kind() {
            Kind::None => Some(0),
            Kind::Nexthop(index) if index < FIRST_GROUP => Some(index as u8),
            Kind::Group(index) if index < 256 - FIRST_GROUP => Some((FIRST_GROUP + index) as u8),
            _ => None,
        }
    }

    /// What a byte of a packed node stands for.
    #[inline(always)]
    pub const fn unpack(byte: u8) -> Word {
        let byte = byte as u32;
        if byte < FIRST_GROUP { Word(byte) } else { Word(GROUP | (byte - FIRST_GROUP)) }
    }

    /// Position of the first element in the node that the word leads to. Elements are words, or bytes if it is packed.
    #[inline(always)]
    pub const fn head(self) -> u32 {
        (match (self.is_wide(), self.is_packed()) {
            (false, false) => NODE_HEAD,
            (false, true) => PACKED_HEAD,
            (true, false) => WIDE_HEAD,
            (true, true) => PACKED_WIDE_HEAD,
        }) as u32
    }

    /// Elements of a line of the node that the word leads to.
    #[inline(always)]
    pub const fn line_elements(self) -> u32 {
        (if self.is_packed() { LINE_BYTES } else { LINE_WORDS }) as u32
    }

    /// True if the walk goes on at a wide node.
    #[inline(always)]
    pub const fn is_wide(self) -> bool {
        self.0 & (NODE | WIDE) == NODE | WIDE
    }

    /// True if the walk goes on at a node, wide or not.
    #[inline(always)]
    pub const fn is_node(self) -> bool {
        self.0 & NODE != 0
    }

    /// The word taken apart.
    #[inline(always)]
    pub const fn kind(self) -> Kind {
        if self.0 == 0 {
            Kind::None
        } else if self.0 & NODE != 0 {
            Kind::Node(self.0 & !(NODE | WIDE | PACKED))
        } else if self.0 & GROUP != 0 {
            Kind::Group(self.0 & !GROUP)
        } else {
            Kind::Nexthop(self.0)
        }
    }
}

/// A word that is a leaf: a next hop or a group. Cannot hold anything else.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Leaf(u32);

impl Leaf {
    /// No leaf is less than this.
    pub const MIN: Leaf = Leaf(1);
    /// No leaf is greater than this.
    pub const MAX: Leaf = Leaf(GROUP | (INDEX_LIMIT - 1));

    /// The leaf that names a next hop; None if there can be no such next hop (0, or `INDEX_LIMIT` and more).
    pub const fn nexthop(index: u32) -> Option<Leaf> {
        if index != 0 && index < INDEX_LIMIT { Some(Leaf(index)) } else { None }
    }

    /// The leaf that names a next-hop group; None from `INDEX_LIMIT` on.
    pub const fn group(index: u32) -> Option<Leaf> {
        if index < INDEX_LIMIT { Some(Leaf(GROUP | index)) } else { None }
    }

    /// The leaf as a word.
    pub const fn word(self) -> Word {
        Word(self.0)
    }

    /// The leaf in a word, if it is one.
    pub const fn from_word(word: Word) -> Option<Leaf> {
        if word.0 == 0 || word.is_node() { None } else { Some(Leaf(word.0)) }
    }
}

/// An index in the tables was out of range. Never happens while there is one writer; counted, not trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Internal;

/// The first line of a node, and its place in the table.
#[derive(Clone, Copy, Debug)]
pub struct FirstLine<'t> {
    /// Its place
    pub index: u32,
    /// The line
    pub line: &'t Line,
}

/// The memory a look-up reads. Each method returns None if the index is outside the table.
pub trait LpmRead {
    /// `Root::direct[slot]`. What the word leads to was written before the word: a native implementation orders its
    /// later reads after this one (`order::load`), the BPF one relies on the address dependency.
    fn root_word(&self, root: u32, slot: u16) -> Option<u32>;
    /// `Root::default`
    fn root_default(&self, root: u32) -> Option<u32>;
    /// A line of a node
    fn line(&self, index: u32) -> Option<&Line>;
    /// The first line of a node
    #[inline(always)]
    fn node(&self, index: u32) -> Option<FirstLine<'_>> {
        self.line(index).map(|line| FirstLine { index, line })
    }
    /// The word at a position of a node, counted from its beginning
    #[inline(always)]
    fn stored(&self, node: FirstLine, position: u32) -> Option<Word> {
        const WORDS: u32 = LINE_WORDS as u32;
        let line = self.line(node.index.wrapping_add(position / WORDS))?;
        line.words.get((position % WORDS) as usize).map(|word| Word(*word))
    }
    /// The byte at a position of a packed node, counted from its beginning
    #[inline(always)]
    fn byte(&self, node: FirstLine, position: u32) -> Option<u8> {
        const BYTES: u32 = LINE_BYTES as u32;
        let line = self.line(node.index.wrapping_add(position / BYTES))?;
        line.bytes().get((position % BYTES) as usize).copied()
    }
    /// Asks for the memory that `root_word` will read, where that can be done.
    #[inline(always)]
    fn prefetch_root_word(&self, _root: u32, _slot: u16) {}
    /// Asks for the memory of a line, where that can be done.
    #[inline(always)]
    fn prefetch_line(&self, _index: u32) {}
}

/// The leaf for an address (network byte order; 4 or 16 bytes), or `Word::NONE` if there is no route.
#[inline(always)]
pub fn lookup<const BYTES: usize>(mem: &impl LpmRead, root: u32, addr: &[u8; BYTES]) -> Result<Word, Internal> {
    let [high, low, rest @ ..] = addr.as_slice() else { return Err(Internal) };
    let mut word = Word(mem.root_word(root, u16::from_be_bytes([*high, *low])).ok_or(Internal)?);
    for pair in rest.chunks_exact(2) {
        let &[high, low] = pair else { return Err(Internal) };
        let Kind::Node(index) = word.kind() else { break };
        let node = mem.node(index).ok_or(Internal)?;
        if word.is_wide() {
            word = wide_step(mem, word, node, u16::from_be_bytes([high, low])).ok_or(Internal)?;
            continue;
        }
        word = step(mem, word, node, high).ok_or(Internal)?;
        let Kind::Node(index) = word.kind() else { break };
        word = step(mem, word, mem.node(index).ok_or(Internal)?, low).ok_or(Internal)?;
    }
    match word.kind() {
        Kind::Node(_) => Err(Internal),
        Kind::None => mem.root_default(root).map(Word).ok_or(Internal),
        _ => Ok(word),
    }
}

/// A look-up in steps, each of which asks for the memory that the next one reads. An engine that looks several addresses
/// up at once takes each step with all of them, and waits for none: `begin`, then `locate` and `follow` in turn for as long
/// as `locate` finds something to follow.
#[derive(Clone, Copy, Debug)]
pub struct Walk {
    /// How far it has come
    word: Word,
    /// The line that holds the next element
    line: u32,
    /// The element's place in that line
    place: u8,
    /// Bytes of the address that have been looked at
    bytes: u8,
}

/// The bytes that a walk has looked at when it met an index that is out of range: there is no further step, and what it
/// has come to is no leaf.
const ASTRAY: u8 = u8::MAX;

impl Walk {
    /// Asks for the root's word.
    #[inline(always)]
    pub fn new<const BYTES: usize>(mem: &impl LpmRead, root: u32, addr: &[u8; BYTES]) -> Self {
        if let Some(slot) = first_pair(addr) {
            mem.prefetch_root_word(root, slot);
        }
        Self { word: Word::node(0), line: 0, place: 0, bytes: ASTRAY }
    }

    /// Reads the root's word.
    #[inline(always)]
    pub fn begin<const BYTES: usize>(&mut self, mem: &impl LpmRead, root: u32, addr: &[u8; BYTES]) {
        if let Some(word) = first_pair(addr).and_then(|slot| mem.root_word(root, slot)) {
            self.bytes = 2;
            self.come_to(mem, Word(word));
        }
    }

    /// If it has come to a node, reads the node's first line; true if there is a word to follow.
    #[inline(always)]
    pub fn locate<const BYTES: usize>(&mut self, mem: &impl LpmRead, addr: &[u8; BYTES]) -> bool {
        let Kind::Node(line) = self.word.kind() else { return false };
        let position = self.position(mem, line, addr);
        if let Some(position) = position {
            self.line = line.wrapping_add(position / self.word.line_elements());
            self.place = (position % self.word.line_elements()) as u8;
            mem.prefetch_line(self.line);
        } else {
            self.bytes = ASTRAY;
        }
        position.is_some()
    }

    /// Where in the node the element for the address lies.
    #[inline(always)]
    fn position<const BYTES: usize>(&mut self, mem: &impl LpmRead, line: u32, addr: &[u8; BYTES]) -> Option<u32> {
        let (at, first) = (usize::from(self.bytes), mem.line(line)?);
        let rank = if self.word.is_wide() {
            self.bytes = self.bytes.saturating_add(2);
            let value = u16::from_be_bytes([*addr.get(at)?, *addr.get(at + 1)?]);
            if self.word.is_packed() {
                wide_rank(&first.as_packed_wide().ends, value)?
            } else {
                wide_rank(&first.as_wide().ends, value)?
            }
        } else {
            self.bytes = self.bytes.saturating_add(1);
            rank(first.as_node(), *addr.get(at)?)?
        };
        Some(self.word.head() + rank)
    }

    /// Reads the word that `locate` found, if it did.
    #[inline(always)]
    pub fn follow(&mut self, mem: &impl LpmRead) {
        if !self.word.is_node() || self.bytes == ASTRAY {
            return;
        }
        let place = usize::from(self.place);
        let word = mem.line(self.line).and_then(|line| match self.word.is_packed() {
            true => line.bytes().get(place).map(|byte| Word::unpack(*byte)),
            false => line.words.get(place).map(|word| Word(*word)),
        });
        match word {
            Some(word) => self.come_to(mem, word),
            None => self.bytes = ASTRAY,
        }
    }

    #[inline(always)]
    fn come_to(&mut self, mem: &impl LpmRead, word: Word) {
        self.word = word;
        if let Kind::Node(line) = word.kind() {
            mem.prefetch_line(line);
        }
    }

    /// What it has come to: after the last step the longest match, but for the default route.
    #[inline(always)]
    pub fn word(&self) -> Word {
        self.word
    }

    /// What `lookup` returns; an error before the last step.
    #[inline(always)]
    pub fn found(&self, mem: &impl LpmRead, root: u32) -> Result<Word, Internal> {
        match self.word.kind() {
            Kind::Node(_) => Err(Internal),
            Kind::None => mem.root_default(root).map(Word).ok_or(Internal),
            _ => Ok(self.word),
        }
    }
}

#[inline(always)]
fn first_pair(addr: &[u8]) -> Option<u16> {
    let [high, low, ..] = addr else { return None };
    Some(u16::from_be_bytes([*high, *low]))
}

/// The word for `byte` in the node that `word` leads to: the last stored one at or before it.
#[inline(always)]
fn step(mem: &impl LpmRead, word: Word, node: FirstLine, byte: u8) -> Option<Word> {
    let rank = rank(node.line.as_node(), byte)?;
    if word.is_packed() {
        mem.byte(node, PACKED_HEAD as u32 + rank).map(Word::unpack)
    } else {
        mem.stored(node, NODE_HEAD as u32 + rank)
    }
}

/// The word for two bytes in the wide node that `word` leads to.
#[inline(always)]
fn wide_step(mem: &impl LpmRead, word: Word, node: FirstLine, value: u16) -> Option<Word> {
    if word.is_packed() {
        let rank = wide_rank(&node.line.as_packed_wide().ends, value)?;
        mem.byte(node, PACKED_WIDE_HEAD as u32 + rank).map(Word::unpack)
    } else {
        mem.stored(node, WIDE_HEAD as u32 + wide_rank(&node.line.as_wide().ends, value)?)
    }
}

/// Words stored before the one for `byte`.
#[inline(always)]
fn rank(node: &Node, byte: u8) -> Option<u32> {
    let quarter = usize::from(byte >> 6);
    let upto = node.bitmap.get(quarter)? & (u64::MAX >> (63 - (byte & 63)));
    Some((u32::from(*node.counts.get(quarter)?) + upto.count_ones()).wrapping_sub(1))
}

/// Runs that end before `value`: fours that do, then ends in the next four, of which the last cannot. Nothing here is a
/// branch, nor what a compiler takes for one.
#[inline(always)]
fn wide_rank<const FOURS: usize>(all: &[[u16; 4]; FOURS], value: u16) -> Option<u32> {
    // Bit 16 is set exactly if the value is greater than the end.
    let greater = opaque(usize::from(value) + 0xffff) as u32;
    let behind = |end: u16| greater.wrapping_sub(end.into()) >> 16;
    let fours: u32 = all[..FOURS - 1].iter().map(|[.., last]| behind(*last)).sum();
    let [ends @ .., _] = all.get(fours as usize)?;
    Some(fours * 4 + ends.iter().map(|end| behind(*end)).sum::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{PACKED_WIDE_RUNS, WIDE_RUNS};

    /// One root slot (0x0a00) leading to the node at line 1; everything else is empty.
    struct Fixture(Vec<Line>);

    impl LpmRead for Fixture {
        fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
            (root == 0).then_some(if slot == 0x0a00 { Word::node(1).0 } else { 0 })
        }
        fn root_default(&self, root: u32) -> Option<u32> {
            (root == 0).then_some(9)
        }
        fn line(&self, index: u32) -> Option<&Line> {
            self.0.get(index as usize)
        }
    }

    /// The lines of the node to which `word` leads, with this head and these elements.
    fn lines(word: Word, head: &[u8], elements: &[u32]) -> Vec<Line> {
        let mut all = head.to_vec();
        for element in elements {
            if word.is_packed() { all.push(*element as u8) } else { all.extend(element.to_ne_bytes()) }
        }
        all.resize(all.len().next_multiple_of(LINE_BYTES), 0);
        let line = |bytes: &[u8]| {
            let mut line = Line::ZERO;
            line.bytes_mut().copy_from_slice(bytes);
            line
        };
        all.chunks_exact(LINE_BYTES).map(line).collect()
    }

    /// The lines of a node that has these elements from these values on; `word` leads to it.
    fn node(word: Word, runs: &[(u8, u32)]) -> Vec<Line> {
        let mut node = Node { bitmap: [0; 4], counts: [0; 4], words: [0; 7] };
        for (value, _) in runs {
            node.bitmap[usize::from(value >> 6)] |= 1 << (value & 63);
        }
        for quarter in 1..4 {
            node.counts[quarter] = node.counts[quarter - 1] + node.bitmap[quarter - 1].count_ones() as u8;
        }
        let elements: Vec<u32> = runs.iter().map(|run| run.1).collect();
        lines(word, &node.to_line().bytes()[..4 * NODE_HEAD], &elements)
    }

    const PLAIN: Word = Word::node(2);
    const PACKED_NODE: Word = Word::node(4).to_packed();

    fn fixture() -> Fixture {
        // 10.0.0/24: default; 10.0.1/24: next hop 2; 10.0.2 to 10.0.199: the node at line 2; from 10.0.200: group 3; from
        // 10.0.210: the packed node at line 4
        let first = node(PLAIN, &[(0, 0), (1, 2), (2, PLAIN.0), (200, GROUP | 3), (210, PACKED_NODE.0)]);
        // Eight words, one more than the first line holds
        let second = node(PLAIN, &[0, 63, 64, 127, 128, 191, 192, 255].map(|value| (value, 100 + u32::from(value))));
        // 32 bytes, four more than the first line holds: nothing, next hops from 1 on, the last two groups 0 and 63
        let byte = |n: u32| [n, 192, 255][n.saturating_sub(29) as usize];
        let runs: Vec<(u8, u32)> = (0..32u8).map(|n| (n * 8, byte(n.into()))).collect();
        let third = node(PACKED_NODE, &runs);
        assert_eq!((first.len(), second.len(), third.len()), (1, 2, 2));
        Fixture([vec![Line::ZERO], first, second, third].concat())
    }

    #[test]
    fn walks_words_in_and_behind_the_first_line() {
        let mem = fixture();
        let at = |a: [u8; 4]| lookup(&mem, 0, &a).map(Word::kind);
        assert_eq!(at([11, 0, 0, 1]), Ok(Kind::Nexthop(9)), "empty slot: default");
        assert_eq!(at([10, 0, 0, 1]), Ok(Kind::Nexthop(9)), "empty word: default");
        assert_eq!(at([10, 0, 1, 1]), Ok(Kind::Nexthop(2)));
        assert_eq!(at([10, 0, 200, 1]), Ok(Kind::Group(3)));
        assert_eq!(at([10, 0, 209, 255]), Ok(Kind::Group(3)));
        let last = [(0, 0), (62, 0), (63, 63), (64, 64), (126, 64), (127, 127), (128, 128), (191, 191), (192, 192)];
        for (last, stored) in last.into_iter().chain([(254, 192), (255, 255)]) {
            assert_eq!(at([10, 0, 2, last]), Ok(Kind::Nexthop(100 + stored)), "last byte {last}");
            assert_eq!(at([10, 0, 199, last]), Ok(Kind::Nexthop(100 + stored)), "last byte {last}");
        }
    }

    #[test]
    fn walks_packed_nodes() {
        let mem = fixture();
        for last in 0..=255u8 {
            let expected = match u32::from(last / 8) {
                0 => Kind::Nexthop(9),
                30 => Kind::Group(0),
                31 => Kind::Group(63),
                hop => Kind::Nexthop(hop),
            };
            assert_eq!(lookup(&mem, 0, &[10, 0, 210, last]).map(Word::kind), Ok(expected), "last byte {last}");
        }
    }

    #[test]
    fn a_byte_stands_for_one_word() {
        for byte in 0..=255 {
            assert_eq!(Word::unpack(byte).pack(), Some(byte));
            assert!(!Word::unpack(byte).is_node());
        }
        for word in [Word(192), Word(GROUP | 64), Word::node(1), Word::wide(1), Word::node(1).to_packed()] {
            assert_eq!(word.pack(), None, "{word:?}");
        }
    }

    #[test]
    fn walks_wide_nodes() {
        for (word, runs) in [(Word::wide(1), WIDE_RUNS), (Word::wide(1).to_packed(), PACKED_WIDE_RUNS)] {
            // The ends of every number of runs, far apart and side by side, with the greatest there can be.
            for ends in (0..runs as u16).flat_map(|count| {
                [(0..count).map(|n| n * 2341).collect::<Vec<_>>(), (0..count).map(|n| 0xffff - count + n).collect()]
            }) {
                let all = ends.iter().copied().chain(std::iter::repeat(u16::MAX)).take(runs);
                let head: Vec<u8> = all.flat_map(u16::to_ne_bytes).collect();
                let elements: Vec<u32> = (100..).take(ends.len() + 1).collect();
                let mem = Fixture([vec![Line::ZERO], lines(word, &head, &elements)].concat());
                let near = ends.iter().flat_map(|&end| [end.saturating_sub(1), end, end + 1]);
                for value in near.chain([0, 1, 0x00ff, 0x0100, 0x7fff, 0x8000, 0xfffe, 0xffff]) {
                    let rank = ends.iter().filter(|&&end| end < value).count() as u32;
                    let found = wide_step(&mem, word, mem.node(1).unwrap(), value);
                    assert_eq!(found, Some(Word(100 + rank)), "{value} among {ends:?}, {word:?}");
                }
            }
        }
    }

    /// Notes what is read of a fixture, and what is asked for.
    struct Log(Fixture, std::cell::RefCell<Vec<(&'static str, u32)>>);

    impl LpmRead for Log {
        fn root_word(&self, root: u32, slot: u16) -> Option<u32> {
            self.1.borrow_mut().push(("read slot", slot.into()));
            self.0.root_word(root, slot)
        }
        fn root_default(&self, root: u32) -> Option<u32> {
            self.0.root_default(root)
        }
        fn line(&self, index: u32) -> Option<&Line> {
            self.1.borrow_mut().push(("read line", index));
            self.0.line(index)
        }
        fn prefetch_root_word(&self, _: u32, slot: u16) {
            self.1.borrow_mut().push(("ask for slot", slot.into()));
        }
        fn prefetch_line(&self, index: u32) {
            self.1.borrow_mut().push(("ask for line", index));
        }
    }

    /// All steps of a walk.
    fn walk(mem: &impl LpmRead, root: u32, address: [u8; 4]) -> Result<Word, Internal> {
        let mut walk = Walk::new(mem, root, &address);
        assert_eq!(walk.found(mem, root), Err(Internal), "nothing is read");
        walk.begin(mem, root, &address);
        while walk.locate(mem, &address) {
            walk.follow(mem);
        }
        walk.found(mem, root)
    }

    #[test]
    fn a_walk_reads_what_the_look_up_reads_and_asked_for_it_before() {
        for address in [
            [11, 0, 0, 1],
            [10, 0, 1, 1],
            [10, 0, 2, 64],
            [10, 0, 2, 255],
            [10, 0, 200, 0],
            [10, 0, 210, 7],
            [10, 0, 210, 240],
        ] {
            let log = Log(fixture(), Default::default());
            let expected = lookup(&log, 0, &address);
            let mut reads = log.1.take();
            reads.dedup();
            assert_eq!(walk(&log, 0, address), expected);
            let (mut asked, mut read): (Vec<_>, Vec<_>) =
                log.1.borrow().iter().copied().partition(|(what, _)| what.starts_with("ask"));
            // A node's first line is asked for again if it holds the word too.
            asked.dedup();
            read.dedup();
            assert_eq!(read, reads, "{address:?}");
            let places: Vec<u32> = reads.iter().map(|read| read.1).collect();
            assert_eq!(asked.iter().map(|asked| asked.1).collect::<Vec<_>>(), places, "{address:?}");
            for (place, asked) in asked.iter().enumerate() {
                let all = log.1.borrow();
                let (first, then) = (all.iter().position(|e| e == asked), all.iter().position(|e| *e == reads[place]));
                assert!(first < then, "{address:?}: {asked:?} after it was read");
            }
        }
    }

    #[test]
    fn a_walk_finds_errors_where_the_look_up_does() {
        let mem = fixture();
        assert_eq!(walk(&mem, 1, [10, 0, 0, 1]), Err(Internal), "root");
        assert_eq!(walk(&Fixture(mem.0[..1].to_vec()), 0, [10, 0, 0, 1]), Err(Internal), "node");
        assert_eq!(walk(&Fixture(mem.0[..3].to_vec()), 0, [10, 0, 2, 255]), Err(Internal), "second line");
        assert_eq!(walk(&Fixture(mem.0[..5].to_vec()), 0, [10, 0, 210, 255]), Err(Internal), "second line, packed");
        let longer = [mem.0[..2].to_vec(), node(PLAIN, &[(0, PLAIN.0)])].concat();
        assert_eq!(walk(&Fixture(longer), 0, [10, 0, 2, 0]), Err(Internal), "a walk longer than the address");
    }

    #[test]
    fn indices_out_of_range_are_reported() {
        let mem = fixture();
        assert_eq!(lookup(&mem, 1, &[10, 0, 0, 1]), Err(Internal), "root");
        assert_eq!(lookup(&Fixture(mem.0[..1].to_vec()), 0, &[10, 0, 0, 1]), Err(Internal), "node");
        assert_eq!(lookup(&Fixture(mem.0[..3].to_vec()), 0, &[10, 0, 2, 255]), Err(Internal), "second line");
        assert_eq!(lookup(&Fixture(mem.0[..5].to_vec()), 0, &[10, 0, 210, 255]), Err(Internal), "second line, packed");
        let longer = [mem.0[..2].to_vec(), node(PLAIN, &[(0, PLAIN.0)])].concat();
        assert_eq!(lookup(&Fixture(longer), 0, &[10, 0, 2, 0]), Err(Internal), "a walk longer than the address");
    }

    #[test]
    fn leaves_hold_only_leaves() {
        assert_eq!(Leaf::nexthop(0), None);
        assert_eq!(Leaf::nexthop(INDEX_LIMIT), None);
        assert_eq!(Leaf::group(INDEX_LIMIT), None);
        assert_eq!(Leaf::nexthop(7).map(|l| l.word().kind()), Some(Kind::Nexthop(7)));
        assert_eq!(Leaf::group(0).map(|l| l.word().kind()), Some(Kind::Group(0)));
        assert_eq!(Leaf::from_word(Word::NONE), None);
        assert_eq!(Leaf::from_word(Word::node(5)), None);
    }
}
