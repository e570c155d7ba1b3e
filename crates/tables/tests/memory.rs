//! What a million IPv4 and a quarter of a million IPv6 routes take: every byte allocated, counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use towpath_tables::backing::{HeapBacking, initial_elements};
use towpath_tables::grace::NoReaders;
use towpath_tables::lpm::{Leaf, lookup};
use towpath_tables::mix;
use towpath_tables::rib::Entry;
use towpath_tables::writer::{MAIN_ROOT, TableWriter};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grown(bytes: usize) {
    PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: as promised to us.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: as promised to us.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as promised to us.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SCALE: usize = if cfg!(miri) { 1000 } else { 1 };
const V4: usize = 1_000_000 / SCALE;
const V6: usize = 250_000 / SCALE;
/// Of the 512 MiB that the whole project may take, with room for the manager's own list of routes.
const BUDGET: usize = 100 << 20;

#[test]
fn a_full_table_stays_within_its_budget() {
    let (v4, v6) = (mix::ipv4(V4, 1), mix::ipv6(V6, 1));
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);

    let start = Instant::now();
    let mut writer = TableWriter::create(HeapBacking::new(initial_elements(2)), NoReaders).unwrap();
    let mut set = |root, address: IpAddr, len, n: usize| {
        let entry = Entry { leaf: Leaf::nexthop(2 + n as u32 % 64).unwrap(), level: 0 };
        assert_eq!(writer.route_set(root, address, len, entry), Ok(None));
    };
    v4.iter().enumerate().for_each(|(n, &(address, len))| set(MAIN_ROOT[0], address.into(), len, n));
    v6.iter().enumerate().for_each(|(n, &(address, len))| set(MAIN_ROOT[1], address.into(), len, n));
    let filled = start.elapsed();
    let trie = LIVE.load(Relaxed) - before - writer.usage().iter().map(|usage| usage.bytes).sum::<usize>();

    writer.reserve().unwrap();
    let published = writer.publish();
    let total = start.elapsed();
    assert!(published.full.is_empty(), "{published:?}");

    let tables: usize = writer.usage().iter().map(|usage| usage.bytes).sum();
    let live = LIVE.load(Relaxed) - before;
    let peak = PEAK.load(Relaxed) - before;
    println!(
        "{} + {} routes: trie {} KiB, tables {} KiB, all {} KiB, peak {} KiB",
        V4,
        V6,
        trie >> 10,
        tables >> 10,
        live >> 10,
        peak >> 10
    );
    println!("filled in {filled:?}, published after {total:?}: {} nodes", published.nodes);
    for usage in writer.usage() {
        println!(
            "{:13} {:8} of {:8} elements, {:6} KiB",
            usage.table.name(),
            usage.used,
            usage.elements,
            usage.bytes >> 10
        );
    }
    assert!(peak <= BUDGET, "{peak} bytes");

    // The tables say what the trie says.
    for (address, _) in v4.iter().step_by(97) {
        let wanted = writer.lookup(MAIN_ROOT[0], (*address).into()).unwrap().unwrap();
        assert_eq!(lookup(&writer.view(), MAIN_ROOT[0], address), Ok(wanted.leaf.word()));
    }
    for (address, _) in v6.iter().step_by(97) {
        let wanted = writer.lookup(MAIN_ROOT[1], (*address).into()).unwrap().unwrap();
        assert_eq!(lookup(&writer.view(), MAIN_ROOT[1], address), Ok(wanted.leaf.word()));
    }
}
