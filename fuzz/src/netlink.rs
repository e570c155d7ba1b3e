//! Decoders of what netlink tells.

use crate::{from_hex, take};
use towpath_cm::conntrack::entry::Entry;
use towpath_cm::decode::{self, rtm};

/// Stands for a connection of nfnetlink's, which has no number of its own among rtnetlink's
const CONNECTION: u16 = 0x100;

/// A message's type and its payload; what a decoder finds can be shown.
pub fn run(mut bytes: &[u8]) {
    let Some(kind) = take(&mut bytes).map(u16::from_le_bytes) else { return };
    let _ = match kind {
        rtm::NEWLINK => format!("{:?}", decode::link::parse(bytes)),
        rtm::NEWADDR => format!("{:?}", decode::address::parse(bytes)),
        rtm::NEWROUTE => format!("{:?}", decode::route::parse(bytes)),
        rtm::NEWNEIGH => format!("{:?}", decode::neighbour::parse(bytes)),
        rtm::NEWNETCONF => format!("{:?}", decode::netconf::parse(bytes)),
        rtm::NEWNEXTHOP => format!("{:?}", decode::nexthop::parse(bytes)),
        CONNECTION => format!("{:?}", Entry::parse(bytes)),
        _ => return,
    };
}

/// What kernels said.
pub fn seeds() -> Vec<Vec<u8>> {
    let recorded = [
        include_str!("../../crates/cm/tests/recorded/links.hex"),
        include_str!("../../crates/cm/tests/recorded/addresses.hex"),
        include_str!("../../crates/cm/tests/recorded/routes.hex"),
        include_str!("../../crates/cm/tests/recorded/neighbours.hex"),
        include_str!("../../crates/cm/tests/recorded/netconf.hex"),
        include_str!("../../crates/cm/tests/recorded/nexthops.hex"),
        include_str!("../connections.hex"),
    ];
    let message = |line: &str| {
        let (kind, payload) = line.split_once(' ').expect("type and payload");
        let kind: u16 = kind.parse().expect("type");
        [&kind.to_le_bytes()[..], &from_hex(payload).expect("hexadecimal digits")].concat()
    };
    recorded.into_iter().flat_map(str::lines).map(message).collect()
}
