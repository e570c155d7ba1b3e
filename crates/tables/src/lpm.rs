//! Longest-prefix match: what a word means, and the look-up. Compiled for BPF and natively; it allocates nothing,
//! cannot panic and walks at most one node per address byte after the second, or one wide node per two.

use crate::opaque;
use crate::record::{LINE_WORDS, Line, NODE_HEAD, Node, WIDE_FOURS, WIDE_HEAD, Wide};

const NODE: u32 = 1 << 31;
const GROUP: u32 = 1 << 30;
const WIDE: u32 = 1 << 30;

/// Indices of next hops, groups and nodes are below this.
pub const INDEX_LIMIT: u32 = 1 << 30;

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
            Kind::Node(self.0 & !(NODE | WIDE))
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
    pub const MAX: Leaf = Leaf(!NODE);

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
            word = wide_step(mem, node, u16::from_be_bytes([high, low])).ok_or(Internal)?;
            continue;
        }
        word = step(mem, node, high).ok_or(Internal)?;
        let Kind::Node(index) = word.kind() else { break };
        word = step(mem, mem.node(index).ok_or(Internal)?, low).ok_or(Internal)?;
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
    /// The line that holds the next word
    line: u32,
    /// The word's place in that line
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
            self.line = line.wrapping_add(position / LINE_WORDS as u32);
            self.place = (position % LINE_WORDS as u32) as u8;
            mem.prefetch_line(self.line);
        } else {
            self.bytes = ASTRAY;
        }
        position.is_some()
    }

    /// Where in the node the word for the address lies.
    #[inline(always)]
    fn position<const BYTES: usize>(&mut self, mem: &impl LpmRead, line: u32, addr: &[u8; BYTES]) -> Option<u32> {
        let at = usize::from(self.bytes);
        if self.word.is_wide() {
            self.bytes = self.bytes.saturating_add(2);
            let value = u16::from_be_bytes([*addr.get(at)?, *addr.get(at + 1)?]);
            return Some(WIDE_HEAD as u32 + wide_rank(mem.line(line)?.as_wide(), value)?);
        }
        self.bytes = self.bytes.saturating_add(1);
        Some(NODE_HEAD as u32 + rank(mem.line(line)?.as_node(), *addr.get(at)?)?)
    }

    /// Reads the word that `locate` found, if it did.
    #[inline(always)]
    pub fn follow(&mut self, mem: &impl LpmRead) {
        if !self.word.is_node() || self.bytes == ASTRAY {
            return;
        }
        match mem.line(self.line).and_then(|line| line.words.get(usize::from(self.place))) {
            Some(word) => self.come_to(mem, Word(*word)),
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

/// The word for `byte` in a node: the last stored one at or before it.
#[inline(always)]
fn step(mem: &impl LpmRead, node: FirstLine, byte: u8) -> Option<Word> {
    mem.stored(node, NODE_HEAD as u32 + rank(node.line.as_node(), byte)?)
}

/// The word for two bytes in a wide node.
#[inline(always)]
fn wide_step(mem: &impl LpmRead, node: FirstLine, value: u16) -> Option<Word> {
    mem.stored(node, WIDE_HEAD as u32 + wide_rank(node.line.as_wide(), value)?)
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
fn wide_rank(node: &Wide, value: u16) -> Option<u32> {
    // Bit 16 is set exactly if the value is greater than the end.
    let greater = opaque(usize::from(value) + 0xffff) as u32;
    let behind = |end: u16| greater.wrapping_sub(end.into()) >> 16;
    let fours: u32 = node.ends[..WIDE_FOURS - 1].iter().map(|[.., last]| behind(*last)).sum();
    let [ends @ .., _] = node.ends.get(fours as usize)?;
    Some(fours * 4 + ends.iter().map(|end| behind(*end)).sum::<u32>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::WIDE_ENDS;

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

    /// The lines of a node that has these words from these values on.
    fn node(runs: &[(u8, u32)]) -> Vec<Line> {
        let mut node = Node { bitmap: [0; 4], counts: [0; 4], words: [0; 7] };
        for (value, _) in runs {
            node.bitmap[usize::from(value >> 6)] |= 1 << (value & 63);
        }
        for quarter in 1..4 {
            node.counts[quarter] = node.counts[quarter - 1] + node.bitmap[quarter - 1].count_ones() as u8;
        }
        with_words(node.to_line(), NODE_HEAD, &runs.iter().map(|run| run.1).collect::<Vec<_>>())
    }

    fn with_words(first: Line, head: usize, words: &[u32]) -> Vec<Line> {
        let mut all = first.words[..head].to_vec();
        all.extend(words);
        all.resize(all.len().next_multiple_of(LINE_WORDS), 0);
        all.chunks_exact(LINE_WORDS).map(|words| Line { words: words.try_into().unwrap() }).collect()
    }

    fn fixture() -> Fixture {
        // 10.0.0/24: default; 10.0.1/24: next hop 2; 10.0.2 to 10.0.199: the node at line 2; from 10.0.200: group 3
        let first = node(&[(0, 0), (1, 2), (2, Word::node(2).0), (200, GROUP | 3)]);
        // Eight words, one more than the first line holds
        let second = node(&[0, 63, 64, 127, 128, 191, 192, 255].map(|value| (value, 100 + u32::from(value))));
        assert_eq!((first.len(), second.len()), (1, 2));
        Fixture([vec![Line::ZERO], first, second].concat())
    }

    #[test]
    fn walks_words_in_and_behind_the_first_line() {
        let mem = fixture();
        let at = |a: [u8; 4]| lookup(&mem, 0, &a).map(Word::kind);
        assert_eq!(at([11, 0, 0, 1]), Ok(Kind::Nexthop(9)), "empty slot: default");
        assert_eq!(at([10, 0, 0, 1]), Ok(Kind::Nexthop(9)), "empty word: default");
        assert_eq!(at([10, 0, 1, 1]), Ok(Kind::Nexthop(2)));
        assert_eq!(at([10, 0, 200, 1]), Ok(Kind::Group(3)));
        assert_eq!(at([10, 0, 255, 255]), Ok(Kind::Group(3)));
        let last = [(0, 0), (62, 0), (63, 63), (64, 64), (126, 64), (127, 127), (128, 128), (191, 191), (192, 192)];
        for (last, stored) in last.into_iter().chain([(254, 192), (255, 255)]) {
            assert_eq!(at([10, 0, 2, last]), Ok(Kind::Nexthop(100 + stored)), "last byte {last}");
            assert_eq!(at([10, 0, 199, last]), Ok(Kind::Nexthop(100 + stored)), "last byte {last}");
        }
    }

    #[test]
    fn walks_wide_nodes() {
        // The ends of every number of runs, far apart and side by side, with the greatest there can be.
        for ends in (0..=WIDE_ENDS as u16).flat_map(|count| {
            [(0..count).map(|n| n * 2341).collect::<Vec<_>>(), (0..count).map(|n| 0xffff - count + n).collect()]
        }) {
            let mut wide = Wide { ends: [[u16::MAX; 4]; WIDE_FOURS], words: [0; 2] };
            wide.ends.as_flattened_mut()[..ends.len()].copy_from_slice(&ends);
            let words: Vec<u32> = (100..).take(ends.len() + 1).collect();
            let mem = Fixture([vec![Line::ZERO], with_words(wide.to_line(), WIDE_HEAD, &words)].concat());
            let near = ends.iter().flat_map(|&end| [end.saturating_sub(1), end, end + 1]);
            for value in near.chain([0, 1, 0x00ff, 0x0100, 0x7fff, 0x8000, 0xfffe, 0xffff]) {
                let rank = ends.iter().filter(|&&end| end < value).count() as u32;
                assert_eq!(
                    wide_step(&mem, mem.node(1).unwrap(), value),
                    Some(Word(100 + rank)),
                    "{value} among {ends:?}"
                );
            }
            assert_eq!(mem.0[1].as_wide().ends().collect::<Vec<_>>(), ends);
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
        for address in [[11, 0, 0, 1], [10, 0, 1, 1], [10, 0, 2, 64], [10, 0, 2, 255], [10, 0, 200, 0]] {
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
        let longer = [mem.0[..2].to_vec(), node(&[(0, Word::node(2).0)])].concat();
        assert_eq!(walk(&Fixture(longer), 0, [10, 0, 2, 0]), Err(Internal), "a walk longer than the address");
    }

    #[test]
    fn indices_out_of_range_are_reported() {
        let mem = fixture();
        assert_eq!(lookup(&mem, 1, &[10, 0, 0, 1]), Err(Internal), "root");
        assert_eq!(lookup(&Fixture(mem.0[..1].to_vec()), 0, &[10, 0, 0, 1]), Err(Internal), "node");
        assert_eq!(lookup(&Fixture(mem.0[..3].to_vec()), 0, &[10, 0, 2, 255]), Err(Internal), "second line");
        let longer = [mem.0[..2].to_vec(), node(&[(0, Word::node(2).0)])].concat();
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
