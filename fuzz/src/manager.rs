//! The fast path manager, told whatever a peer may say: the tables stay sound.

use crate::small_tables;
use towpath_fpc::codec::{Packet, decode};
use towpath_fpm::Fpm;
use towpath_tables::grace::NoReaders;
use towpath_tables::writer::TableWriter;

/// Interfaces from 1 on that are served
const SERVED: u32 = 4;

/// Frames of FPC; after each that asks for an acknowledgement, the tables are made to say what was applied.
pub fn run(mut bytes: &[u8]) {
    let tables = TableWriter::create(small_tables(), NoReaders).expect("tables");
    let mut manager = Fpm::new(tables, []);
    (1..=SERVED).for_each(|ifindex| manager.serve(ifindex, true));
    while let Ok(Some((frame, len))) = decode(bytes) {
        bytes = &bytes[len..];
        if let Packet::Message(message) = frame.packet {
            manager.apply(message);
        }
        if frame.report {
            manager.publish();
        }
    }
    manager.publish();
    let backing = manager.into_tables().into_backing();
    TableWriter::adopt(backing, NoReaders).expect("what was written can be taken over");
}
