//! Readers look up as fast as they can while the writer changes routes and next hops and reuses everything it can.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use towpath_tables::backing::{Backing, HeapBacking, PerTable, View, initial_elements};
use towpath_tables::flow::{AnyKey, Direction};
use towpath_tables::grace::{self, Workers};
use towpath_tables::lpm::{Kind, Leaf, lookup};
use towpath_tables::mapping::{self, Service, Way};
use towpath_tables::mappings::{MappingValue, Ports, words};
use towpath_tables::mix::Random;
use towpath_tables::nexthop::{Action, Header, NexthopIdentity, NexthopValue};
use towpath_tables::record::{Family, TableId};
use towpath_tables::rib::Entry;
use towpath_tables::word::W32;
use towpath_tables::writer::{MAIN_ROOT, TableWriter};
use towpath_tables::{Connection, Reason, Tuple};

const READERS: usize = 2;
const DURATION: Duration = Duration::from_millis(if cfg!(miri) { 50 } else { 1500 });
/// How long a busy machine has for what must be seen at least.
const LIMIT: Duration = Duration::from_secs(60);
/// How much readers must meet at least.
const ENOUGH: u64 = 1000;

/// A next hop in which everything is the same number, so that a torn one shows.
fn value(n: u8) -> NexthopValue {
    let header = Header::new([n; 6], [n; 6], &[]).unwrap();
    NexthopValue { action: Action::Forward(header), port: n.into(), device: n.into(), mtu: n.into() }
}

/// Every address in 10.0.0.0/8 is covered at every moment by the /8 or something longer. The leaf of a route says its
/// length: a reader knows which leaves an address can have.
#[test]
fn readers_never_miss_a_route_or_see_a_torn_record() {
    let (readers, mut writer) = hammer(initial_elements(1).with(TableId::Nodes, 1 << 16));

    let identity = |n| NexthopIdentity { ifindex: n, gateway: None, mtu: 0, reason: None };
    let hops: Vec<u32> = (0..40).map(|n| writer.alloc_nexthop(identity(n)).unwrap()).collect();
    hops.iter().for_each(|&hop| writer.set_nexthop(hop, &value(1)));
    let entry = |len: u8| Entry { leaf: Leaf::nexthop(hops[usize::from(len)]).unwrap(), level: 0 };
    writer.route_set(MAIN_ROOT[0], [10, 0, 0, 0].into(), 8, entry(8)).unwrap();
    writer.publish();

    let first = hops[8];
    let readers = readers.start(move |view, random| {
        for _ in 0..32 {
            let address = [10, random.below(4) as u8, random.below(8) as u8, random.below(256) as u8];
            let leaf = lookup(view, MAIN_ROOT[0], &address).expect("an index out of range");
            let Kind::Nexthop(hop) = leaf.kind() else { panic!("{address:?} leads to {leaf:?}") };
            assert!((first..=first + 24).contains(&hop), "{address:?} leads to next hop {hop}");
            if let Some(value) = NexthopValue::read(&view.nexthops()[hop as usize]) {
                let Action::Forward(header) = value.action else { panic!("{value:?}") };
                assert!(value.port == value.mtu && value.port == value.device, "{value:?}");
                assert_eq!(header.bytes(), [value.port as u8; 12], "{value:?}");
            }
        }
        32
    });

    let mut random = Random(99);
    let mut published = 0;
    while readers.go_on(published > 100) {
        for _ in 0..32 {
            let address = [10, random.below(4) as u8, random.below(8) as u8, random.below(256) as u8].into();
            let len = 9 + random.below(24) as u8;
            if random.below(3) > 0 {
                writer.route_set(MAIN_ROOT[0], address, len, entry(len)).unwrap();
            } else {
                writer.route_remove(MAIN_ROOT[0], address, len).unwrap();
            }
        }
        let report = writer.publish();
        assert!(report.full.is_empty(), "{report:?}");
        published += report.words;
        writer.reclaim();
        writer.set_nexthop(hops[8 + random.below(25) as usize], &value(random.below(256) as u8));
    }
    let seen = readers.end();
    assert!(published > 100 || cfg!(miri), "only {published} root words were published");
    assert!(seen > ENOUGH || cfg!(miri), "only {seen} look-ups were made");
    assert_eq!(writer.nexthop(1), Some(NexthopValue::exception(Reason::TableFull)));
}

/// More connections than records: each record is another connection's again and again, and one stays.
#[test]
fn readers_never_meet_another_connections_record() {
    let (readers, mut writer) = hammer(initial_elements(1).with_flows(8));
    let connection = |n: u32| {
        let tuple = |from: [u8; 4], to: [u8; 4], port: u32| Tuple {
            source: from.into(),
            destination: to.into(),
            source_port: port as u16,
            destination_port: 1000 + n as u16,
            protocol: 6,
        };
        let [client, server, ours] = [[10, 0, 0, n as u8], [20, 0, 0, 1], [30, 0, 0, 1]];
        Connection::new(tuple(client, server, n), tuple(server, ours, 2000 + n)).unwrap()
    };
    const STAYS: u32 = 64;
    writer.set_flow(&connection(STAYS)).unwrap();
    let readers = readers.start(move |view, random| {
        let seed = view.config().flow_seed.load();
        let find = |tuple: &Tuple| AnyKey::from(tuple).find(view, seed);
        assert!(find(&connection(STAYS).original).is_some() && find(&connection(STAYS).reply).is_some());
        let mut found = 0;
        for _ in 0..32 {
            let wanted = connection(random.below(STAYS));
            let tuple = if random.below(2) == 0 { wanted.original } else { wanted.reply };
            let Some(index) = find(&tuple) else { continue };
            let flow = &view.flows()[index.index() as usize];
            let keys = [Direction::Original, Direction::Reply].map(|d| AnyKey::of(flow, d));
            // One that was removed meanwhile is in no use.
            let [Some(original), Some(reply)] = keys else { continue };
            assert_eq!([Tuple::from(&original), Tuple::from(&reply)], [wanted.original, wanted.reply]);
            found += 1;
        }
        found
    });
    let mut random = Random(7);
    while readers.go_on(true) {
        let one = connection(random.below(STAYS));
        if random.below(2) == 0 {
            let _full = writer.set_flow(&one);
        } else {
            writer.remove_flow(&one.original);
        }
    }
    let found = readers.end();
    assert!(found > ENOUGH || cfg!(miri), "only {found} flows were found");
}

/// Mapping n, and what it makes of an address of its own: even ones of prefixes, odd ones of ports.
fn mapping(n: u8) -> MappingValue {
    let ports = (n % 2 == 1).then(|| Ports { protocol: 6, numbers: [1000 + u16::from(n), 2000 + u16::from(n)] });
    let [inside, outside] = [10, 20].map(|net| IpAddr::from([net, 0, n, 0]));
    MappingValue { slot: 3, inside, outside, len: if ports.is_some() { 32 } else { 24 }, ports }
}

/// Looks mapping n up both ways; whether it was there, as a whole.
fn meets_mapping(view: &View<'_>, n: u8) -> bool {
    let Some(index) = mapping::in_force(view.config()) else { return false };
    let (set, wanted) = (&view.mapping_sets()[index as usize], mapping(n));
    let host = |first: IpAddr| match first {
        IpAddr::V4(first) if wanted.ports.is_none() => words((first.to_bits() | 77).to_be_bytes().into()),
        first => words(first),
    };
    let ends = [host(wanted.inside), host(wanted.outside)];
    let numbers = wanted.ports.map_or([0; 2], |ports| ports.numbers.map(u16::to_be));
    [Way::Out, Way::In].into_iter().all(|way| {
        let (from, to) = (way as usize, 1 - way as usize);
        let service = Service::new(6, numbers[from]);
        let Some(found) = mapping::find(set, index, 3, way, Family::V4, ends[from], service) else { return false };
        let got = (set.apply(found, way, ends[from]), set.port(found, way));
        assert_eq!(got, (ends[to], numbers[to]), "{n} {way:?}");
        assert!(!found.is_guess());
        true
    })
}

/// Numbers are other mappings' with every change, and the two sets take turns. Two mappings are always there.
#[test]
fn readers_never_meet_a_torn_mapping() {
    let (readers, mut writer) = hammer(initial_elements(1));
    const STAY: [u8; 2] = [64, 65];
    writer.set_mappings(&(0..).zip(STAY.map(mapping)).collect()).unwrap();
    let readers = readers.start(|view, random| {
        let found = (0..32).filter(|_| meets_mapping(view, random.below(64) as u8)).count();
        assert!(STAY.iter().all(|n| meets_mapping(view, *n)));
        found as u64
    });
    let mut random = Random(5);
    let mut changes = 0;
    while readers.go_on(changes > 20) {
        let some = (0..64).filter(|_| random.below(2) == 0).chain(STAY).map(mapping);
        let (some, shift) = (some.collect::<Vec<_>>(), random.below(66));
        let number = |at: usize| (at as u32 + shift) % 66;
        writer.set_mappings(&some.iter().enumerate().map(|(at, value)| (number(at), *value)).collect()).unwrap();
        changes += 1;
    }
    let found = readers.end();
    assert!(changes > 20 || cfg!(miri), "only {changes} changes were made");
    assert!(found > ENOUGH || cfg!(miri), "only {found} mappings were found");
}

/// Who reads the tables as workers do, one word each, and who writes them.
fn hammer(elements: PerTable) -> (Readers, TableWriter<SharedTables, Workers<[Arc<W32>; READERS]>>) {
    let tables = Arc::new(HeapBacking::new(elements));
    let words: [Arc<W32>; READERS] = std::array::from_fn(|_| Arc::new(W32::new(0)));
    let writer = TableWriter::create(SharedTables(tables.clone()), Workers(words.clone())).unwrap();
    (Readers { tables, words }, writer)
}

struct Readers {
    tables: Arc<HeapBacking>,
    words: [Arc<W32>; READERS],
}

impl Readers {
    /// Each reads one batch after another, of which `read` says how much it met.
    fn start(self, read: impl Fn(&View<'_>, &mut Random) -> u64 + Copy + Send + 'static) -> Running {
        let (stop, met) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..).zip(self.words).map(|(n, word)| {
            let (tables, stop, met) = (self.tables.clone(), stop.clone(), met.clone());
            thread::spawn(move || {
                let mut random = Random(n);
                while !stop.load(Relaxed) {
                    let _batch = Batch::begin(&word);
                    met.fetch_add(read(&tables.view(), &mut random), Relaxed);
                }
            })
        });
        Running { threads: threads.collect(), stop, met, begun: Instant::now() }
    }
}

/// A reader that fails ends its batch, too: the writer would wait for it for ever.
struct Batch<'a>(&'a W32);

impl<'a> Batch<'a> {
    fn begin(word: &'a W32) -> Self {
        grace::enter(word);
        Self(word)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        grace::leave(self.0);
    }
}

struct Running {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
    met: Arc<AtomicU64>,
    begun: Instant,
}

impl Running {
    /// Whether the writer is to go on: for some time, and then until it has done enough and the readers have met enough.
    fn go_on(&self, enough: bool) -> bool {
        let enough = cfg!(miri) || enough && self.met.load(Relaxed) > ENOUGH;
        let failed = self.threads.iter().any(JoinHandle::is_finished);
        !failed && self.begun.elapsed() < if enough { DURATION } else { LIMIT }
    }

    /// How much all of them met.
    fn end(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.threads.into_iter().for_each(|reader| reader.join().expect("a reader failed"));
        self.met.load(Relaxed)
    }
}

/// Tables that readers hold as well; they do not grow.
struct SharedTables(Arc<HeapBacking>);

// SAFETY: the memory lives as long as the `Arc`, and never moves because it never grows.
unsafe impl Backing for SharedTables {
    fn tables(&self) -> &towpath_tables::backing::RawTables {
        self.0.tables()
    }
    fn grow(&mut self, table: TableId, elements: usize) -> Result<(), towpath_tables::backing::GrowError> {
        Err(towpath_tables::backing::GrowError { table, elements, cause: "readers hold the tables".into() })
    }
    fn brake(&self) -> towpath_tables::brake::Brake {
        self.0.brake()
    }
}
