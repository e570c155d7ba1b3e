//! The writer's own trie of routes, 16 bits and then 8 at a time, and how what changed in it is published: 16 bits at a
//! time, as one wide node or as nodes of eight bits, whichever the words there ask for.
//!
//! Which route decides is Linux's rule: a route of a table that is consulted earlier (its *level* is higher) wins over every
//! route of lower levels, whatever the lengths; among equals the longest wins. A *host* (resolved neighbour) stands in for the deciding leaf
//! of its address, and only for the leaf it names.

use std::collections::{BTreeMap, VecDeque};

use crate::grace::Grace;
use crate::lpm::{INDEX_LIMIT, Leaf, Word};
use crate::store::{Memory, Published, Store, TABLE_FULL, WideRuns, Words, footprint, wide_footprint, wide_runs};

/// A prefix of an address of `BYTES` bytes; bits beyond its length are zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Prefix<const BYTES: usize> {
    address: [u8; BYTES],
    len: u8,
}

impl<const BYTES: usize> Prefix<BYTES> {
    /// The prefix of `address` (network byte order) with `len` bits; None if there are not as many.
    pub fn new(mut address: [u8; BYTES], len: u8) -> Option<Self> {
        if usize::from(len) > BYTES * 8 {
            return None;
        }
        for (index, byte) in address.iter_mut().enumerate() {
            let kept = usize::from(len).saturating_sub(index * 8).min(8) as u32;
            *byte &= !0xffu8.checked_shr(kept).unwrap_or(0);
        }
        Some(Self { address, len })
    }

    /// First address.
    pub fn address(&self) -> [u8; BYTES] {
        self.address
    }

    /// Length in bits.
    pub fn prefix_len(&self) -> u8 {
        self.len
    }

    /// True if the address lies in the prefix.
    pub fn contains(&self, address: &[u8; BYTES]) -> bool {
        Self::new(*address, self.len) == Some(*self)
    }
}

/// What a prefix leads to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Entry {
    /// Next hop or group
    pub leaf: Leaf,
    /// Hides every longer route beneath it of a lower level (Linux: table local is consulted before main); below `LEVELS`
    pub level: u8,
}

/// What decides over an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Match {
    /// Next hop or group
    pub leaf: Leaf,
    /// Length of the prefix that decides; for a host that of the route it stands in for
    pub prefix_len: u8,
    /// The route's level
    pub level: u8,
    /// A host stands in for the route's leaf
    pub host: bool,
}

/// Levels of routes there can be.
pub const LEVELS: usize = 16;

/// A leaf and its level, or nothing: what a prefix hands down to what lies beneath it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Cover(u32);

impl Cover {
    const NONE: Cover = Cover(0);
    const LEVEL: u32 = (LEVELS as u32 - 1) << Self::SHIFT;
    const SHIFT: u32 = INDEX_LIMIT.ilog2();

    fn new(entry: Entry) -> Self {
        Cover(entry.leaf.word().0 | u32::from(entry.level) << Self::SHIFT & Self::LEVEL)
    }

    fn entry(self) -> Option<Entry> {
        Leaf::from_word(self.word()).map(|leaf| Entry { leaf, level: self.level() })
    }

    fn word(self) -> Word {
        Word(self.0 & !Self::LEVEL)
    }

    fn level(self) -> u8 {
        ((self.0 & Self::LEVEL) >> Self::SHIFT) as u8
    }

    /// What decides beneath a longer prefix with `longer`.
    fn under(self, longer: Cover) -> Cover {
        if longer == Cover::NONE || self.level() > longer.level() { self } else { longer }
    }
}

/// How far a node's published piece can be trusted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum State {
    /// Published as it is
    Clean,
    /// It, or something beneath it, changed
    Dirty,
    /// Nothing is known to be published for it or anything beneath it
    #[default]
    Stale,
}

/// Eight bits of the address.
#[derive(Default)]
struct RibNode {
    /// Routes of 1 to 8 more bits, by position: as in a heap, shorter ones first
    routes: Vec<(u16, Cover)>,
    /// Nodes for the next eight bits
    children: Vec<(u8, u32)>,
    /// What covered the node when it was published
    cover: Cover,
    state: State,
}

impl RibNode {
    /// The 256 words' covers under what is handed down.
    fn paint(&self, cover: Cover) -> [Cover; 256] {
        let mut covers = [cover; 256];
        for &(position, route) in &self.routes {
            let len = position.ilog2();
            let first = (usize::from(position) << (8 - len)) & 0xff;
            for slot in &mut covers[first..first + (256 >> len)] {
                *slot = slot.under(route);
            }
        }
        covers
    }

    fn child(&self, byte: u8) -> Option<u32> {
        let at = self.children.binary_search_by_key(&byte, |child| child.0).ok()?;
        Some(self.children[at].1)
    }
}

/// Position of the prefix with `len` bits of `bits` in heap order.
fn position(bits: usize, width: u32, len: u32) -> usize {
    1 << len | bits >> (width - len)
}

const NO_NODE: u32 = u32::MAX;
const SLOTS: usize = 1 << 16;

/// The routes of one table.
pub struct Rib<const BYTES: usize> {
    /// Index of the root they are published in
    root: u32,
    /// Routes of at most 16 bits, in heap order: /0 at 1
    short: Vec<Cover>,
    /// Node under each root slot, or `NO_NODE`
    slots: Vec<u32>,
    nodes: Vec<RibNode>,
    free: Vec<u32>,
    /// By address and the leaf they stand in for
    hosts: BTreeMap<([u8; BYTES], Leaf), Leaf>,
    /// Slots whose piece may differ from the published one, and the same as a bitmap
    dirty: VecDeque<u16>,
    is_dirty: Vec<u64>,
    /// Slots whose piece did not find room
    refused: Vec<u16>,
    routes: usize,
}

impl<const BYTES: usize> Rib<BYTES> {
    /// No routes. Whatever is published in `root` is replaced by the first `publish`.
    pub fn new(root: u32) -> Self {
        let mut rib = Self {
            root,
            short: vec![Cover::NONE; 2 * SLOTS],
            slots: vec![NO_NODE; SLOTS],
            nodes: Vec::new(),
            free: Vec::new(),
            hosts: BTreeMap::new(),
            dirty: VecDeque::new(),
            is_dirty: vec![0; SLOTS / 64],
            refused: Vec::new(),
            routes: 0,
        };
        rib.mark_slots(0..SLOTS);
        rib
    }

    /// Number of routes, hosts not counted.
    pub fn len(&self) -> usize {
        self.routes
    }

    /// True if there is no route.
    pub fn is_empty(&self) -> bool {
        self.routes == 0
    }

    /// True if `publish` has something to do.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Sets what a prefix leads to; returns what it led to before.
    pub fn set(&mut self, prefix: Prefix<BYTES>, entry: Entry) -> Option<Entry> {
        let new = Cover::new(entry);
        let old = if prefix.len <= 16 {
            let old = std::mem::replace(&mut self.short[Self::short_position(prefix)], new);
            self.touch_short(prefix, old, new);
            old
        } else {
            let (depth, position) = Self::place(prefix);
            let node = self.reach(&prefix.address, depth);
            let routes = &mut self.nodes[node as usize].routes;
            let old = match routes.binary_search_by_key(&position, |route| route.0) {
                Ok(at) => std::mem::replace(&mut routes[at].1, new),
                Err(at) => {
                    routes.insert(at, (position, new));
                    Cover::NONE
                }
            };
            if old != new {
                self.mark_path(&prefix.address, depth);
            }
            old
        };
        self.routes += usize::from(old == Cover::NONE);
        old.entry()
    }

    /// Removes a prefix; returns what it led to.
    pub fn remove(&mut self, prefix: Prefix<BYTES>) -> Option<Entry> {
        let old = if prefix.len <= 16 {
            let old = std::mem::take(&mut self.short[Self::short_position(prefix)]);
            self.touch_short(prefix, old, Cover::NONE);
            old
        } else {
            let (depth, position) = Self::place(prefix);
            let node = self.find(&prefix.address, depth)?;
            let routes = &mut self.nodes[node as usize].routes;
            let at = routes.binary_search_by_key(&position, |route| route.0).ok()?;
            let (_, old) = routes.remove(at);
            self.mark_path(&prefix.address, depth);
            self.prune(&prefix.address, depth);
            old
        };
        self.routes -= usize::from(old != Cover::NONE);
        old.entry()
    }

    /// What exactly this prefix leads to.
    pub fn get(&self, prefix: Prefix<BYTES>) -> Option<Entry> {
        if prefix.len <= 16 {
            return self.short[Self::short_position(prefix)].entry();
        }
        let (depth, position) = Self::place(prefix);
        let routes = &self.nodes[self.find(&prefix.address, depth)? as usize].routes;
        let at = routes.binary_search_by_key(&position, |route| route.0).ok()?;
        routes[at].1.entry()
    }

    /// Lets `leaf` stand in for the leaf `under` at one address; returns what did so before.
    pub fn set_host(&mut self, address: [u8; BYTES], under: Leaf, leaf: Leaf) -> Option<Leaf> {
        self.reach(&address, BYTES - 1);
        let old = self.hosts.insert((address, under), leaf);
        if old != Some(leaf) {
            self.mark_path(&address, BYTES - 1);
        }
        old
    }

    /// Ends that; returns the leaf that stood in.
    pub fn remove_host(&mut self, address: [u8; BYTES], under: Leaf) -> Option<Leaf> {
        let old = self.hosts.remove(&(address, under))?;
        self.mark_path(&address, BYTES - 1);
        self.prune(&address, BYTES - 1);
        Some(old)
    }

    /// What decides over an address.
    pub fn lookup(&self, address: &[u8; BYTES]) -> Option<Match> {
        let slot = Self::slot(address);
        let mut best = (Cover::NONE, 0);
        let mut consider = |cover: Cover, len: u32| {
            let decides = best.0.under(cover);
            if cover != Cover::NONE && decides == cover {
                best = (cover, len as u8);
            }
        };
        for len in 0..=16 {
            consider(self.short[position(slot, 16, len)], len);
        }
        let mut next = Some(self.slots[slot]).filter(|&node| node != NO_NODE);
        for (depth, &byte) in address.iter().enumerate().skip(2) {
            let Some(node) = next.map(|index| &self.nodes[index as usize]) else { break };
            for len in 1..=8 {
                let position = position(byte.into(), 8, len) as u16;
                if let Ok(at) = node.routes.binary_search_by_key(&position, |route| route.0) {
                    consider(node.routes[at].1, depth as u32 * 8 + len);
                }
            }
            next = node.child(byte);
        }
        let (cover, prefix_len) = best;
        let leaf = Leaf::from_word(cover.word())?;
        let host = self.hosts.get(&(*address, leaf));
        Some(Match { leaf: *host.unwrap_or(&leaf), prefix_len, level: cover.level(), host: host.is_some() })
    }

    /// Lines of nodes that publishing all this takes in empty tables.
    pub fn required(&self) -> usize {
        let mut total = 0;
        for (slot, &child) in self.slots.iter().enumerate().filter(|(_, child)| **child != NO_NODE) {
            let mut address = Self::slot_address(slot);
            self.count(child, self.slot_cover(slot), 2, &mut address, &mut total);
        }
        total
    }

    /// Adds up what 16 bits from a node on take; returns a word that differs from those of its neighbours as the published
    /// one will.
    fn count(&self, index: u32, cover: Cover, depth: usize, address: &mut [u8; BYTES], total: &mut usize) -> Word {
        let node = &self.nodes[index as usize];
        let covers = node.paint(cover);
        let mut words = covers.map(Cover::word);
        let mut parts = Vec::with_capacity(node.children.len());
        for &(byte, child) in &node.children {
            address[depth] = byte;
            parts.push((byte, child, self.count_part(child, covers[usize::from(byte)], depth + 1, address, total)));
        }
        let mut add = |lines: usize| {
            *total += lines;
            lines > 0
        };
        if let Some(runs) = wide_runs(&words, parts.iter().map(|(byte, _, part)| (*byte, *part))) {
            add(wide_footprint(&runs));
            return Word::node(index);
        }
        for (byte, child, part) in parts {
            words[usize::from(byte)] = if add(footprint(&part)) { Word::node(child) } else { part[0] };
        }
        if add(footprint(&words)) { Word::node(index) } else { words[0] }
    }

    /// The words of the last eight of 16 bits, after adding up what is beneath them.
    fn count_part(
        &self,
        index: u32,
        cover: Cover,
        depth: usize,
        address: &mut [u8; BYTES],
        total: &mut usize,
    ) -> Words {
        let node = &self.nodes[index as usize];
        let covers = node.paint(cover);
        let mut words = covers.map(Cover::word);
        for &(byte, child) in &node.children {
            address[depth] = byte;
            words[usize::from(byte)] = self.count(child, covers[usize::from(byte)], depth + 1, address, total);
        }
        if depth == BYTES - 1 {
            self.place_hosts(address, &covers, &mut words);
        }
        words
    }

    /// Publishes what changed: afterwards the tables say what this trie says, except that pieces without room lead to
    /// `TABLE_FULL`; those are tried again next time. Returns the number of root words that changed.
    pub fn publish<M: Memory, G: Grace>(&mut self, store: &mut Store<M, G>) -> usize {
        let mut words = 0;
        self.publish_while(store, &mut words, &mut || true);
        self.retry();
        words
    }

    /// Publishes what changed as long as `go_on` says so, and adds up in `words` how many root words changed; true if
    /// nothing is left but what did not find room.
    pub fn publish_while<M: Memory, G: Grace>(
        &mut self,
        store: &mut Store<M, G>,
        words: &mut usize,
        go_on: &mut impl FnMut() -> bool,
    ) -> bool {
        let default = self.default_cover().word();
        let published = store.mem.root_default(self.root).expect("the root is in the table");
        // A new default comes before what it replaces goes; an old one goes after what replaces it has come.
        if default != Word::NONE && published != default.0 {
            store.mem.publish_default(self.root, default.0);
            *words += 1;
        }
        while let Some(slot) = self.dirty.pop_front() {
            self.is_dirty[usize::from(slot) / 64] &= !(1 << (slot % 64));
            *words += usize::from(self.publish_slot(slot, store));
            if !go_on() {
                return false;
            }
        }
        if default == Word::NONE && published != 0 {
            store.mem.publish_default(self.root, 0);
            *words += 1;
        }
        true
    }

    /// Lets the next publication try again what did not find room.
    pub fn retry(&mut self) {
        for slot in std::mem::take(&mut self.refused) {
            self.mark_slots(slot.into()..usize::from(slot) + 1);
        }
    }

    fn publish_slot<M: Memory, G: Grace>(&mut self, slot: u16, store: &mut Store<M, G>) -> bool {
        let old = Word(store.mem.root_word(self.root, slot).expect("the root is in the table"));
        let cover = self.slot_cover(slot.into());
        let child = self.slots[usize::from(slot)];
        let word = if child == NO_NODE {
            store.retire_tree(old);
            cover.word()
        } else if self.needs_build(child, cover) {
            let word = self.build(child, cover, 2, &mut Self::slot_address(slot.into()), old, false, store);
            if self.nodes[child as usize].state != State::Clean {
                self.refused.push(slot);
            }
            word
        } else {
            old
        };
        if word != old {
            store.mem.publish_root(self.root, slot, word.0);
        }
        store.settle();
        word != old
    }

    fn needs_build(&self, index: u32, cover: Cover) -> bool {
        let node = &self.nodes[index as usize];
        node.state != State::Clean || node.cover != cover
    }

    /// Builds the piece for 16 bits from a node on where `old` is published, reusing of it what is still right and
    /// retiring the rest. With `force`, pieces of clean nodes are not taken to be published either.
    #[allow(clippy::too_many_arguments)]
    fn build<M: Memory, G: Grace>(
        &mut self,
        index: u32,
        cover: Cover,
        depth: usize,
        address: &mut [u8; BYTES],
        old: Word,
        force: bool,
        store: &mut Store<M, G>,
    ) -> Word {
        let node = &mut self.nodes[index as usize];
        let force = force || node.state == State::Stale;
        let covers = node.paint(cover);
        let children = std::mem::take(&mut node.children);
        let published = store.published(old);
        retire_unanswered(&published, &children, store);
        let mut parts = Vec::with_capacity(children.len());
        for &(byte, child) in &children {
            let covering = covers[usize::from(byte)];
            let words = (force || self.needs_build(child, covering)).then(|| {
                address[depth] = byte;
                self.build_part(child, covering, depth + 1, address, &store.words_of(&published, byte), force, store)
            });
            parts.push(Part { byte, child, words });
        }
        let words = covers.map(Cover::word);
        let wide = wide_runs(&words, parts.iter().map(|part| (part.byte, part.wanted(&published, store))));
        let word = match wide {
            Some(runs) => seal_wide(&runs, &published, old, &children, store),
            None => self.seal_bytes(words, &parts, &published, old, store),
        };
        let clean = children.iter().all(|&(_, child)| self.nodes[child as usize].state == State::Clean);
        let node = &mut self.nodes[index as usize];
        node.children = children;
        node.cover = cover;
        node.state = if word.is_none() {
            State::Stale
        } else if clean {
            State::Clean
        } else {
            State::Dirty
        };
        word.unwrap_or(TABLE_FULL.word())
    }

    /// The words for the last eight of 16 bits where `old` is published, after building what is beneath them.
    #[allow(clippy::too_many_arguments)]
    fn build_part<M: Memory, G: Grace>(
        &mut self,
        index: u32,
        cover: Cover,
        depth: usize,
        address: &mut [u8; BYTES],
        old: &Words,
        force: bool,
        store: &mut Store<M, G>,
    ) -> Words {
        let node = &mut self.nodes[index as usize];
        let force = force || node.state == State::Stale;
        let covers = node.paint(cover);
        let children = std::mem::take(&mut node.children);
        let mut words = covers.map(Cover::word);
        // Where something is published that no child answers for
        let mut leftover = *old;
        let mut state = State::Clean;
        for &(byte, child) in &children {
            let at = usize::from(byte);
            leftover[at] = Word::NONE;
            words[at] = if force || self.needs_build(child, covers[at]) {
                address[depth] = byte;
                self.build(child, covers[at], depth + 1, address, old[at], force, store)
            } else {
                old[at]
            };
            if self.nodes[child as usize].state != State::Clean {
                state = State::Dirty;
            }
        }
        if depth == BYTES - 1 {
            self.place_hosts(address, &covers, &mut words);
        }
        leftover.iter().for_each(|&word| store.retire_tree(word));
        let node = &mut self.nodes[index as usize];
        node.children = children;
        node.cover = cover;
        node.state = state;
        words
    }

    /// Publishes 16 bits as a node for the first eight and nodes beneath it; None if there is no room for the first.
    fn seal_bytes<M: Memory, G: Grace>(
        &mut self,
        mut words: Words,
        parts: &[Part],
        published: &Published,
        old: Word,
        store: &mut Store<M, G>,
    ) -> Option<Word> {
        for part in parts {
            let at = usize::from(part.byte);
            let there = match published {
                Published::Bytes(words) => Some(words[at]),
                Published::Wide(_) => None,
            };
            words[at] = match (part.words, there) {
                (None, Some(there)) => there,
                (wanted, there) => {
                    let was = store.words_of(published, part.byte);
                    let sealed = seal(&wanted.unwrap_or(was), &was, there, store);
                    if sealed.is_none() {
                        self.nodes[part.child as usize].state = State::Stale;
                    }
                    sealed.unwrap_or(TABLE_FULL.word())
                }
            };
        }
        match published {
            Published::Bytes(was) => seal(&words, was, Some(old), store),
            Published::Wide(_) => {
                store.retire_node(old);
                seal(&words, &words, None, store)
            }
        }
    }

    /// Puts the hosts of a last-level node in the places of the leaves they stand in for.
    fn place_hosts(&self, address: &[u8; BYTES], covers: &[Cover; 256], words: &mut Words) {
        let default = self.default_cover().word();
        for ((host, under), leaf) in self.hosts_of(address) {
            let at = usize::from(host[BYTES - 1]);
            let covering = if covers[at] == Cover::NONE { default } else { covers[at].word() };
            if covering == under.word() {
                words[at] = leaf.word();
            }
        }
    }

    /// Hosts that differ from `address` at most in the last byte.
    fn hosts_of(&self, address: &[u8; BYTES]) -> impl Iterator<Item = (&([u8; BYTES], Leaf), &Leaf)> {
        let (mut first, mut last) = (*address, *address);
        first[BYTES - 1] = 0;
        last[BYTES - 1] = 255;
        self.hosts.range((first, Leaf::MIN)..=(last, Leaf::MAX))
    }

    fn slot(address: &[u8; BYTES]) -> usize {
        usize::from(u16::from_be_bytes([address[0], address[1]]))
    }

    fn slot_address(slot: usize) -> [u8; BYTES] {
        let mut address = [0; BYTES];
        address[..2].copy_from_slice(&(slot as u16).to_be_bytes());
        address
    }

    fn short_position(prefix: Prefix<BYTES>) -> usize {
        position(Self::slot(&prefix.address), 16, prefix.len.into())
    }

    /// Depth (index of the address byte) and position there of a prefix longer than 16 bits.
    fn place(prefix: Prefix<BYTES>) -> (usize, u16) {
        let depth = (usize::from(prefix.len) - 1) / 8;
        let len = usize::from(prefix.len) - depth * 8;
        (depth, position(prefix.address[depth].into(), 8, len as u32) as u16)
    }

    fn default_cover(&self) -> Cover {
        self.short[1]
    }

    /// What decides over a root slot by routes of at most 16 bits. A default route of level 0 is left to
    /// `Root::default`.
    fn slot_cover(&self, slot: usize) -> Cover {
        let default = Some(self.default_cover()).filter(|cover| cover.level() > 0).unwrap_or(Cover::NONE);
        (1..=16).fold(default, |cover, len| cover.under(self.short[position(slot, 16, len)]))
    }

    fn touch_short(&mut self, prefix: Prefix<BYTES>, old: Cover, new: Cover) {
        if old == new {
            return;
        }
        if prefix.len > 0 || old.level() > 0 || new.level() > 0 {
            let first = Self::slot(&prefix.address);
            self.mark_slots(first..first + (SLOTS >> prefix.len));
        }
        if prefix.len == 0 {
            // Hosts that stand in for the default route's leaf come or go with it.
            let affected: Vec<_> = self
                .hosts
                .keys()
                .filter(|(_, under)| [old.word(), new.word()].contains(&under.word()))
                .map(|key| key.0)
                .collect();
            affected.iter().for_each(|address| self.mark_path(address, BYTES - 1));
        }
    }

    fn mark_slots(&mut self, slots: std::ops::Range<usize>) {
        for slot in slots {
            let bit = 1 << (slot % 64);
            if self.is_dirty[slot / 64] & bit == 0 {
                self.is_dirty[slot / 64] |= bit;
                self.dirty.push_back(slot as u16);
            }
        }
    }

    /// Marks the nodes on the way to `depth`, as far as there are any.
    fn mark_path(&mut self, address: &[u8; BYTES], depth: usize) {
        let slot = Self::slot(address);
        self.mark_slots(slot..slot + 1);
        let mut next = Some(self.slots[slot]).filter(|&node| node != NO_NODE);
        for &byte in &address[2..=depth] {
            let Some(index) = next else { break };
            let node = &mut self.nodes[index as usize];
            if node.state == State::Clean {
                node.state = State::Dirty;
            }
            next = node.child(byte);
        }
    }

    fn find(&self, address: &[u8; BYTES], depth: usize) -> Option<u32> {
        let first = Some(self.slots[Self::slot(address)]).filter(|&node| node != NO_NODE)?;
        address[2..depth].iter().try_fold(first, |index, &byte| self.nodes[index as usize].child(byte))
    }

    /// The node at `depth`, made with those above it if it is not there.
    fn reach(&mut self, address: &[u8; BYTES], depth: usize) -> u32 {
        let slot = Self::slot(address);
        let mut index = self.slots[slot];
        if index == NO_NODE {
            index = self.new_node();
            self.slots[slot] = index;
        }
        for &byte in &address[2..depth] {
            index = match self.nodes[index as usize].children.binary_search_by_key(&byte, |child| child.0) {
                Ok(at) => self.nodes[index as usize].children[at].1,
                Err(at) => {
                    let child = self.new_node();
                    self.nodes[index as usize].children.insert(at, (byte, child));
                    child
                }
            };
        }
        index
    }

    fn new_node(&mut self) -> u32 {
        if let Some(index) = self.free.pop() {
            return index;
        }
        self.nodes.push(RibNode::default());
        (self.nodes.len() - 1) as u32
    }

    /// Removes nodes without anything in them from `depth` upwards.
    fn prune(&mut self, address: &[u8; BYTES], depth: usize) {
        for depth in (2..=depth).rev() {
            let Some(index) = self.find(address, depth) else { continue };
            let node = &self.nodes[index as usize];
            let in_use = !node.routes.is_empty() || !node.children.is_empty();
            if in_use || (depth == BYTES - 1 && self.hosts_of(address).next().is_some()) {
                return;
            }
            self.nodes[index as usize] = RibNode::default();
            self.free.push(index);
            if depth == 2 {
                self.slots[Self::slot(address)] = NO_NODE;
            } else if let Some(parent) = self.find(address, depth - 1) {
                self.nodes[parent as usize].children.retain(|child| child.1 != index);
            }
        }
    }
}

/// The last eight of 16 bits beneath one value of the first.
struct Part {
    byte: u8,
    child: u32,
    /// None if they are as published
    words: Option<Words>,
}

impl Part {
    fn wanted<M: Memory, G: Grace>(&self, published: &Published, store: &Store<M, G>) -> Words {
        self.words.unwrap_or_else(|| store.words_of(published, self.byte))
    }
}

/// Retires what is published beneath 16 bits where no child answers for it.
fn retire_unanswered<M: Memory, G: Grace>(published: &Published, children: &[(u8, u32)], store: &mut Store<M, G>) {
    let mut answered = [false; 256];
    children.iter().for_each(|child| answered[usize::from(child.0)] = true);
    match published {
        Published::Wide(runs) => {
            runs.iter().filter(|run| !answered[usize::from(run.0 >> 8)]).for_each(|run| store.retire_tree(run.1))
        }
        Published::Bytes(words) => {
            words.iter().zip(answered).filter(|(_, answered)| !answered).for_each(|(&word, _)| store.retire_tree(word))
        }
    }
}

/// The wide node for 16 bits: the old one if nothing changed, or a new one. None if there is no room; then everything
/// beneath is retired.
fn seal_wide<M: Memory, G: Grace>(
    runs: &WideRuns,
    published: &Published,
    old: Word,
    children: &[(u8, u32)],
    store: &mut Store<M, G>,
) -> Option<Word> {
    match published {
        Published::Wide(was) if was == runs => return Some(old),
        Published::Wide(_) => {}
        Published::Bytes(was) => children.iter().for_each(|child| store.retire_node(was[usize::from(child.0)])),
    }
    let word = store.add_wide(runs);
    if word.is_none() {
        runs.iter().for_each(|run| store.retire_tree(run.1));
    }
    store.retire_node(old);
    word
}

/// The word for 256 words where `old` (which expands to `old_words`) is published, or nothing of this kind: the only
/// word there is, the old node if nothing changed, or a new node. None if there is no room; then everything beneath is
/// retired.
fn seal<M: Memory, G: Grace>(
    words: &Words,
    old_words: &Words,
    old: Option<Word>,
    store: &mut Store<M, G>,
) -> Option<Word> {
    let old = old.filter(|old| old.is_node());
    if old.is_some() && words == old_words {
        return old;
    }
    let word = if words.iter().all(|word| *word == words[0]) { Some(words[0]) } else { store.add(words) };
    if word.is_none() {
        words.iter().for_each(|&word| store.retire_tree(word));
    }
    old.into_iter().for_each(|old| store.retire_node(old));
    word
}
