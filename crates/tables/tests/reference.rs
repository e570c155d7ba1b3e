//! The trie, its publication and the look-up against the dumbest thing that does the same: a list of routes, searched
//! from end to end. Random histories, with adoption in the middle and with tables too small.

use proptest::prelude::*;
use std::collections::BTreeMap;
use towpath_tables::backing::{HeapBacking, PerTable, initial_elements};
use towpath_tables::grace::NoReaders;
use towpath_tables::lpm::{Kind, Leaf, LpmRead, Word, lookup};
use towpath_tables::record::{NODE_REACH, TableId, WIDE_HEAD};
use towpath_tables::rib::{Entry, Prefix, Rib};
use towpath_tables::store::{Store, TABLE_FULL};

type Tables = Store<HeapBacking, NoReaders>;

#[derive(Default)]
struct Reference<const N: usize> {
    routes: BTreeMap<Prefix<N>, Entry>,
    hosts: BTreeMap<([u8; N], Leaf), Leaf>,
}

impl<const N: usize> Reference<N> {
    /// The leaf for an address and the length of the prefix that decides.
    fn lookup(&self, address: &[u8; N]) -> Option<(Leaf, u8)> {
        let (prefix, entry) = self
            .routes
            .iter()
            .filter(|(prefix, _)| prefix.contains(address))
            .max_by_key(|(prefix, entry)| (entry.level, prefix.prefix_len()))?;
        Some((*self.hosts.get(&(*address, entry.leaf)).unwrap_or(&entry.leaf), prefix.prefix_len()))
    }
}

#[derive(Clone, Debug)]
enum Step<const N: usize> {
    Set([u8; N], u8, u32, u8),
    Remove(prop::sample::Index),
    Host([u8; N], u32, u32),
    RemoveHost(prop::sample::Index),
    Publish,
    /// A new writer takes over
    Restart,
}

/// Addresses that collide often: few values for each byte, with both ends among them.
fn address<const N: usize>() -> impl Strategy<Value = [u8; N]> {
    prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(127), Just(128), Just(255)], N)
        .prop_map(|bytes| bytes.try_into().unwrap())
}

/// Leaves, nearly all of which fit into a byte of a packed node.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![12 => 2u32..6, 1 => 190u32..194]
}

fn step<const N: usize>() -> impl Strategy<Value = Step<N>> {
    prop_oneof![
        12 => (address(), 0..=8 * N as u8, number(), prop_oneof![6 => Just(0u8), 1 => Just(1), 1 => Just(7), 1 => Just(15)]).prop_map(|(a, l, leaf, s)| Step::Set(a, l, leaf, s)),
        // Longer prefixes in one place, so that there are nodes enough to grow and too many words for a wide one
        8 => (any::<[u8; 2]>(), number()).prop_map(|(random, leaf)| {
            let mut a = [0; N];
            a[0] = 10;
            a[N - 2..].copy_from_slice(&random);
            Step::Set(a, 8 * N as u8 - 1, leaf, 0)
        }),
        8 => any::<prop::sample::Index>().prop_map(Step::Remove),
        4 => (address(), 2u32..6, 6u32..9).prop_map(|(a, under, leaf)| Step::Host(a, under, leaf)),
        2 => any::<prop::sample::Index>().prop_map(Step::RemoveHost),
        4 => Just(Step::Publish),
        1 => Just(Step::Restart),
    ]
}

fn leaf(n: u32) -> Leaf {
    // Half of the leaves are groups.
    if n.is_multiple_of(2) { Leaf::nexthop(n).unwrap() } else { Leaf::group(n).unwrap() }
}

struct Subject<const N: usize> {
    rib: Rib<N>,
    store: Tables,
    reference: Reference<N>,
    probes: Vec<[u8; N]>,
}

impl<const N: usize> Subject<N> {
    fn new(backing: HeapBacking) -> Self {
        Self {
            rib: Rib::new(0),
            store: Store::new(backing, NoReaders),
            reference: Reference::default(),
            probes: vec![[0; N], [255; N]],
        }
    }

    fn probe_around(&mut self, prefix: Prefix<N>) {
        let first = prefix.address();
        let mut last = first;
        for bit in usize::from(prefix.prefix_len())..8 * N {
            last[bit / 8] |= 0x80 >> (bit % 8);
        }
        let shift = |mut address: [u8; N], up: bool| {
            for byte in address.iter_mut().rev() {
                *byte = if up { byte.wrapping_add(1) } else { byte.wrapping_sub(1) };
                if *byte != if up { 0 } else { 255 } {
                    break;
                }
            }
            address
        };
        self.probes.extend([first, last, shift(first, false), shift(last, true)]);
    }

    fn apply(&mut self, step: &Step<N>) {
        match step {
            Step::Set(address, len, n, level) => {
                let prefix = Prefix::new(*address, *len).unwrap();
                let entry = Entry { leaf: leaf(*n), level: *level };
                assert_eq!(self.rib.set(prefix, entry), self.reference.routes.insert(prefix, entry));
                assert_eq!(self.rib.get(prefix), Some(entry));
                self.probe_around(prefix);
            }
            Step::Remove(which) => {
                if !self.reference.routes.is_empty() {
                    let prefix = *which.get(&self.reference.routes.keys().collect::<Vec<_>>()).to_owned();
                    assert_eq!(self.rib.remove(prefix), self.reference.routes.remove(&prefix));
                    assert_eq!(self.rib.remove(prefix), None);
                }
            }
            Step::Host(address, under, n) => {
                let (under, leaf) = (leaf(*under), Leaf::nexthop(*n).unwrap());
                assert_eq!(
                    self.rib.set_host(*address, under, leaf),
                    self.reference.hosts.insert((*address, under), leaf)
                );
                self.probes.push(*address);
            }
            Step::RemoveHost(which) => {
                if !self.reference.hosts.is_empty() {
                    let key = *which.get(&self.reference.hosts.keys().collect::<Vec<_>>()).to_owned();
                    assert_eq!(self.rib.remove_host(key.0, key.1), self.reference.hosts.remove(&key));
                }
            }
            Step::Publish | Step::Restart => {
                self.rib.publish(&mut self.store);
            }
        }
        assert_eq!(self.rib.len(), self.reference.routes.len());
    }

    /// A writer that knows nothing but what is published, told all routes again.
    fn restart(&mut self) {
        self.rib = Rib::new(0);
        for (prefix, entry) in &self.reference.routes {
            self.rib.set(*prefix, *entry);
        }
        for ((address, under), leaf) in &self.reference.hosts {
            self.rib.set_host(*address, *under, *leaf);
        }
    }

    /// Every probe's published leaf; `full` allows those that found no room.
    fn check(&self, full: bool) {
        for address in &self.probes {
            let wanted = self.reference.lookup(address);
            let published = lookup(&self.store.mem, 0, address).expect("no index is out of range");
            if !full || published != TABLE_FULL.word() {
                assert_eq!(published, wanted.map_or(Word::NONE, |(leaf, _)| leaf.word()), "published for {address:?}");
            }
            let found = self.rib.lookup(address);
            assert_eq!(found.map(|found| (found.leaf, found.prefix_len)), wanted, "trie for {address:?}");
        }
    }

    fn empty(&mut self) {
        for prefix in std::mem::take(&mut self.reference.routes).into_keys() {
            self.rib.remove(prefix);
        }
        for (address, under) in std::mem::take(&mut self.reference.hosts).into_keys() {
            self.rib.remove_host(address, under);
        }
        self.rib.publish(&mut self.store);
        self.store.reclaim();
    }

    fn check_nothing_leaked(&self) {
        assert_eq!(self.store.used(TableId::Nodes), Some(0), "nodes");
        assert_eq!(self.store.limbo(), 0, "limbo");
        assert_eq!(self.rib.required(), 0, "nodes of the trie");
    }
}

fn small() -> PerTable {
    initial_elements(1).with(TableId::Roots, 1).with(TableId::Nodes, NODE_REACH + 4).with(TableId::Nexthops, 16)
}

fn history<const N: usize>(steps: &[Step<N>]) {
    let mut subject = Subject::<N>::new(HeapBacking::new(small()));
    for step in steps {
        if matches!(step, Step::Restart) {
            subject.apply(&Step::Publish);
            subject.restart();
            let before = subject.store.used(TableId::Nodes);
            assert_eq!(subject.rib.publish(&mut subject.store), 0, "a restart changes nothing");
            subject.store.reclaim();
            assert!(subject.store.used(TableId::Nodes) <= before);
        } else {
            subject.apply(step);
        }
        if matches!(step, Step::Publish | Step::Restart) {
            subject.check(false);
            subject.store.reclaim();
            let used = subject.store.used(TableId::Nodes);
            assert_eq!(Some(subject.rib.required()), used, "what is required is what is used");
        }
    }
    subject.apply(&Step::Publish);
    subject.check(false);
    subject.empty();
    subject.check_nothing_leaked();
}

fn cramped_history<const N: usize>(steps: &[Step<N>], nodes: usize) {
    let lines = NODE_REACH + nodes;
    let limits = PerTable([usize::MAX; TableId::ALL.len()]).with(TableId::Nodes, lines);
    let mut subject = Subject::<N>::new(HeapBacking::with_limits(small().with(TableId::Nodes, lines), limits));
    for step in steps {
        if matches!(step, Step::Restart) {
            subject.restart();
        }
        subject.apply(step);
        if matches!(step, Step::Publish | Step::Restart) {
            subject.check(true);
        }
    }
    // Room is found again as soon as there is some.
    while subject.reference.routes.len() > 1 {
        let prefix = *subject.reference.routes.keys().next().unwrap();
        subject.reference.routes.remove(&prefix);
        subject.rib.remove(prefix);
    }
    for (address, under) in std::mem::take(&mut subject.reference.hosts).into_keys() {
        subject.rib.remove_host(address, under);
    }
    for _ in 0..2 {
        subject.rib.publish(&mut subject.store);
        subject.store.reclaim();
    }
    // One route takes at most a wide node of two lines for each two bytes, and a new version stands beside the old one.
    subject.check(nodes < 2 + 2 * N);
    subject.empty();
    subject.check_nothing_leaked();
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: if cfg!(miri) { 1 } else { 48 }, failure_persistence: None, ..ProptestConfig::default() }
}

const STEPS: usize = if cfg!(miri) { 20 } else { 150 };

proptest! {
    #![proptest_config(config())]

    #[test]
    fn ipv4_histories(steps in prop::collection::vec(step::<4>(), 1..STEPS)) {
        history(&steps);
    }

    #[test]
    fn ipv6_histories(steps in prop::collection::vec(step::<16>(), 1..STEPS)) {
        history(&steps);
    }

    #[test]
    fn ipv4_histories_without_room(steps in prop::collection::vec(step::<4>(), 1..STEPS), nodes in 4usize..12) {
        cramped_history(&steps, nodes);
    }

    #[test]
    fn ipv6_histories_without_room(steps in prop::collection::vec(step::<16>(), 1..STEPS), nodes in 4usize..40) {
        cramped_history(&steps, nodes);
    }
}

#[test]
fn routes_under_one_slot_fill_the_table() {
    let limits = PerTable([usize::MAX; TableId::ALL.len()]).with(TableId::Nodes, NODE_REACH + 72);
    let mut subject = Subject::<4>::new(HeapBacking::with_limits(small(), limits));
    for third in 0..8 {
        for last in 0..=255 {
            // Too large to be packed
            subject.apply(&Step::Set([10, 0, third, last], 32, 1000 + u32::from(last % 2), 0));
        }
    }
    subject.apply(&Step::Publish);
    subject.check(true);
    let full = subject.probes.iter().filter(|a| lookup(&subject.store.mem, 0, a) == Ok(TABLE_FULL.word())).count();
    assert!(full > 0, "72 lines cannot hold 8 nodes of 17");
    for third in 4..8 {
        for last in 0..=255 {
            let prefix = Prefix::new([10, 0, third, last], 32).unwrap();
            subject.reference.routes.remove(&prefix);
            subject.rib.remove(prefix);
        }
    }
    for third in 0..2 {
        for last in 0..=255 {
            let prefix = Prefix::new([10, 0, third, last], 32).unwrap();
            subject.reference.routes.remove(&prefix);
            subject.rib.remove(prefix);
        }
    }
    subject.apply(&Step::Publish);
    subject.store.reclaim();
    subject.apply(&Step::Publish);
    subject.check(false);
    subject.empty();
    subject.check_nothing_leaked();
}

/// 16 bits in the middle of an address, with something beneath one value of them, gain routes and lose them again.
#[test]
fn words_too_many_for_a_wide_node_go_to_ordinary_ones_and_come_back() {
    let mut subject = Subject::<16>::new(HeapBacking::new(small()));
    let route = |n: u8| Prefix::new([0x20, 1, 0xd, 0xb8, n * 8, n, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 48).unwrap();
    let beneath = [0x20, 1, 0xd, 0xb8, 8, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9];
    let is_wide = |subject: &Subject<16>| {
        let first = Word(subject.store.mem.root_word(0, 0x2001).unwrap());
        let Kind::Node(index) = first.kind() else { panic!("{first:?}") };
        assert!(first.is_wide(), "one route of 32 bits and more beneath it");
        // Values below 0d:b8, then 0d:b8 itself.
        subject.store.mem.stored(subject.store.mem.node(index).unwrap(), WIDE_HEAD as u32 + 1).unwrap().is_wide()
    };
    subject.apply(&Step::Set(beneath, 128, 5, 0));
    let check = |subject: &mut Subject<16>, routes: u8| {
        subject.apply(&Step::Publish);
        subject.check(false);
        // Two words to a route, and one more
        assert_eq!(is_wide(subject), routes <= 13, "{routes} routes");
        subject.store.reclaim();
        let used = subject.store.used(TableId::Nodes);
        assert_eq!(Some(subject.rib.required()), used, "{routes} routes");
        subject.restart();
        assert_eq!(
            subject.rib.publish(&mut subject.store),
            0,
            "{routes} routes: a new writer finds them as it wants them"
        );
        assert_eq!(subject.store.limbo(), 0, "{routes} routes: it replaces nothing");
    };
    for n in 1..30 {
        subject.apply(&Step::Set(route(n).address(), 48, 2 + u32::from(n % 2), 0));
        check(&mut subject, n);
    }
    for n in (2..30).rev() {
        subject.reference.routes.remove(&route(n));
        subject.rib.remove(route(n));
        check(&mut subject, n - 1);
    }
    subject.empty();
    subject.check_nothing_leaked();
}

/// Routes of 48 bits beneath one of 32, and then leaves that do not fit into a byte.
#[test]
fn nodes_are_packed_while_their_leaves_allow_it() {
    let mut subject = Subject::<16>::new(HeapBacking::new(small()));
    let route = |n: u8| [0x20, 1, n, 0, n, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // The words that lead to the wide node of 2001:n00::/32 and to the node of 2001::/16's first eight bits
    let packed = |subject: &Subject<16>, n: u8| {
        let root = Word(subject.store.mem.root_word(0, 0x2001).unwrap());
        let Kind::Node(index) = root.kind() else { panic!("{root:?}") };
        assert!(root.is_wide() && !root.is_packed(), "it leads to nodes");
        let word =
            subject.store.mem.stored(subject.store.mem.node(index).unwrap(), WIDE_HEAD as u32 + 2 * u32::from(n) - 1);
        word.filter(|word| word.is_node() && word.is_wide()).expect("a route beneath").is_packed()
    };
    for n in [1, 2, 3] {
        subject.apply(&Step::Set(route(n), 48, 2, 0));
    }
    subject.apply(&Step::Publish);
    subject.check(false);
    assert_eq!([1, 2, 3].map(|n| packed(&subject, n)), [true; 3]);
    assert_eq!(subject.store.used(TableId::Nodes), Some(5), "the node of words takes two lines, the others one");
    for (n, leaf) in [(1, 192), (2, 190), (3, 65)] {
        subject.apply(&Step::Set(route(n), 48, leaf, 0));
    }
    subject.apply(&Step::Publish);
    subject.check(false);
    assert_eq!([1, 2, 3].map(|n| packed(&subject, n)), [false, true, false]);
    subject.restart();
    assert_eq!(subject.rib.publish(&mut subject.store), 0, "a restart changes nothing");
    subject.empty();
    subject.check_nothing_leaked();
}

#[test]
fn table_local_shadows_and_hosts_yield_to_it() {
    let mut subject = Subject::<4>::new(HeapBacking::new(small()));
    subject.apply(&Step::Set([192, 0, 2, 0], 24, 2, 0));
    subject.apply(&Step::Host([192, 0, 2, 9], 2, 7));
    subject.apply(&Step::Set([192, 0, 2, 128], 25, 4, 1));
    subject.apply(&Step::Set([192, 0, 2, 200], 32, 3, 0));
    subject.apply(&Step::Set([192, 0, 2, 255], 32, 5, 1));
    subject.apply(&Step::Host([192, 0, 2, 130], 2, 7));
    subject.apply(&Step::Publish);
    let at = |last| lookup(&subject.store.mem, 0, &[192, 0, 2, last]).unwrap().kind();
    assert_eq!(at(1), Kind::Nexthop(2));
    assert_eq!(at(9), Kind::Nexthop(7), "the host stands in for the glean leaf");
    assert_eq!(at(130), Kind::Nexthop(4), "the host does not stand in for a local route");
    assert_eq!(at(200), Kind::Nexthop(4), "the longer route of table main is hidden");
    assert_eq!(at(255), Kind::Group(5), "the longer route of table local is not");
    let found = subject.rib.lookup(&[192, 0, 2, 9]).unwrap();
    assert!(found.host && found.prefix_len == 24 && found.level == 0);
}
