//! Tables that a daemon left damaged: they are refused, or the next one makes them say what new ones would.

use crate::{messages, small_tables, take};
use std::collections::BTreeMap;
use std::net::IpAddr;
use towpath_fpc::Message;
use towpath_fpm::Fpm;
use towpath_tables::backing::{Backing, HeapBacking};
use towpath_tables::grace::NoReaders;
use towpath_tables::record::TableId;
use towpath_tables::writer::TableWriter;

type Manager = Fpm<HeapBacking, NoReaders>;

const PROBES: [&str; 8] = [
    "192.0.2.1",
    "192.0.2.77",
    "198.51.100.1",
    "203.0.113.5",
    "10.1.2.3",
    "10.2.0.1",
    "2001:db8:9::1",
    "2001:db8:8::1",
];

/// Damage of eight bytes each: the table, where in it (modulo its size, in words of 32 bits), and the word to be there.
pub fn run(mut bytes: &[u8]) {
    let mut backing =
        described(TableWriter::create(small_tables(), NoReaders).expect("tables")).into_tables().into_backing();
    while let (Some([table]), Some([a, b, c]), Some(word)) = (take(&mut bytes), take(&mut bytes), take(&mut bytes)) {
        let at = u32::from_le_bytes([a, b, c, 0]) as usize;
        damage(&mut backing, TableId::ALL[usize::from(table) % TableId::ALL.len()], at, u32::from_le_bytes(word));
    }
    let Ok(writer) = TableWriter::adopt(backing, NoReaders) else { return };
    let (new, adopted) =
        (described(TableWriter::create(small_tables(), NoReaders).expect("tables")), described(writer));
    for probe in PROBES {
        let address = probe.parse().expect("an address");
        assert_eq!(leads_to(&adopted, address), leads_to(&new, address), "the way to {probe}");
    }
    TableWriter::adopt(adopted.into_tables().into_backing(), NoReaders).expect("what was written can be taken over");
}

fn described(tables: TableWriter<HeapBacking, NoReaders>) -> Manager {
    let mut manager = Fpm::new(tables, []);
    (1..=4).for_each(|ifindex| manager.serve(ifindex, true));
    messages::router().into_iter().for_each(|message: Message| manager.apply(message));
    manager.publish();
    manager
}

/// What is done with packets to an address: interfaces by their index, since slots may be others.
fn leads_to(manager: &Manager, address: IpAddr) -> Vec<String> {
    let ports: BTreeMap<u32, u32> = manager.tables().ports().collect();
    let ifindex = |wanted: u32| ports.iter().find(|(_, slot)| **slot == wanted).map(|(ifindex, _)| *ifindex);
    let ways = manager.leads_to(address).unwrap_or_default().into_iter().map(|(identity, value)| {
        let value = value.map(|value| (ifindex(value.port), ifindex(value.device), value.mtu, value.action));
        format!("{identity:?} {value:?}")
    });
    let mut ways: Vec<_> = ways.collect();
    ways.sort();
    ways
}

fn damage(backing: &mut HeapBacking, table: TableId, at: usize, word: u32) {
    let raw = backing.tables()[table as usize];
    let words = raw.elements() * table.element_size() / size_of::<u32>();
    if words > 0 {
        // SAFETY: inside the table, which is aligned for any of its words; nobody reads it meanwhile.
        unsafe { raw.base().cast::<u32>().add(at % words).write(word) };
    }
}

/// One word of each table, and none.
pub fn seeds() -> Vec<Vec<u8>> {
    let word = |table: u8, at: u8, value: u8| vec![table, at, 0, 0, value, 0, 0, 0];
    let each =
        (0..TableId::ALL.len() as u8).flat_map(|table| [word(table, 0, 0), word(table, 3, 1), word(table, 17, 255)]);
    each.chain([vec![]]).collect()
}
