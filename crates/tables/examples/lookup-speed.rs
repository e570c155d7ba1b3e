//! How long building, changing and looking up take at a million IPv4 and a quarter of a million IPv6 routes.
//! `cargo run --release -p towpath-tables --features std --example lookup-speed`

use std::hint::black_box;
use std::time::Instant;
use towpath_tables::backing::{HeapBacking, View, initial_elements};
use towpath_tables::grace::NoReaders;
use towpath_tables::lpm::{Leaf, lookup};
use towpath_tables::mix::{self, Random};
use towpath_tables::rib::Entry;
use towpath_tables::writer::{MAIN_ROOT, TableWriter};

const LOOKUPS: usize = 1 << 20;

fn entry(n: u32) -> Entry {
    Entry { leaf: Leaf::nexthop(2 + n % 64).expect("small and not zero"), level: 0 }
}

/// Nanoseconds for one look-up: independent ones, and each waiting for the one before.
fn measure<const N: usize>(view: &View<'_>, root: u32, addresses: &[[u8; N]]) -> (f64, f64) {
    let time = |chained: bool| {
        let mut best = f64::MAX;
        for _ in 0..7 {
            let start = Instant::now();
            let mut last = 0;
            for address in addresses {
                let mut address = *address;
                // Adds nothing to the address, but the processor cannot know.
                address[N - 1] ^= if chained { (last >> 30) as u8 } else { 0 };
                last = black_box(lookup(view, root, &address)).map_or(0, |word| word.0);
            }
            best = best.min(start.elapsed().as_nanos() as f64 / addresses.len() as f64);
        }
        best
    };
    (time(false), time(true))
}

fn inside<const N: usize>(routes: &[([u8; N], u8)], random: &mut Random) -> Vec<[u8; N]> {
    let one = |random: &mut Random| {
        let (mut address, len) = routes[random.below(routes.len() as u32) as usize];
        for bit in usize::from(len)..8 * N {
            address[bit / 8] |= (0x80 >> (bit % 8)) * (random.bits() & 1) as u8;
        }
        address
    };
    (0..LOOKUPS).map(|_| one(random)).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (v4, v6) = (mix::ipv4(1_000_000, 1), mix::ipv6(250_000, 1));
    let mut random = Random(2);
    let mut writer = TableWriter::create(HeapBacking::new(initial_elements(2)), NoReaders)?;

    let start = Instant::now();
    for &(address, len) in &v4 {
        writer.route_set(MAIN_ROOT[0], address.into(), len, entry(random.below(64)))?;
    }
    for &(address, len) in &v6 {
        writer.route_set(MAIN_ROOT[1], address.into(), len, entry(random.below(64)))?;
    }
    println!("set      {:?}", start.elapsed());
    writer.reserve()?;
    println!("reserved {:?}", start.elapsed());
    let published = writer.publish();
    println!("publish  {:?}, {} nodes", start.elapsed(), published.nodes);

    for batch in [1, 100, 10_000] {
        let changes = 200_000;
        let start = Instant::now();
        for n in 0..changes {
            let (address, len) = v4[random.below(v4.len() as u32) as usize];
            match n % 2 {
                0 => writer.route_remove(MAIN_ROOT[0], address.into(), len)?,
                _ => writer.route_set(MAIN_ROOT[0], address.into(), len, entry(random.below(64)))?,
            };
            if n % batch == 0 {
                writer.publish();
            }
        }
        writer.publish();
        println!("changes, {batch} to a batch: {:.0} a second", f64::from(changes) / start.elapsed().as_secs_f64());
    }

    let view = writer.view();
    let uniform: Vec<[u8; 4]> = (0..LOOKUPS).map(|_| (random.bits() as u32).to_be_bytes()).collect();
    let (v4, v6) = (inside(&v4, &mut random), inside(&v6, &mut random));
    let one = vec![v4[0]; LOOKUPS];
    for (name, (independent, chained)) in [
        ("IPv4, one destination", measure(&view, MAIN_ROOT[0], &one)),
        ("IPv4, inside random routes", measure(&view, MAIN_ROOT[0], &v4)),
        ("IPv4, random destinations", measure(&view, MAIN_ROOT[0], &uniform)),
        ("IPv6, inside random routes", measure(&view, MAIN_ROOT[1], &v6)),
    ] {
        println!("{name}: {independent:.1} ns, one after another {chained:.1} ns");
    }
    Ok(())
}
