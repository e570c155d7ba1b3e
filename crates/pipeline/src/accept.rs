//! What Linux transmits of flows. A packet that it forwarded passed the rules as they are: later ones of the same connection
//! and direction, from and to the same ports, may pass without it (`Flow::accepted`).

use crate::{Entry, Tables};
use towpath_tables::flow::{Key, acceptance, is_open};
use towpath_tables::opaque;
use towpath_tables::record::{NO_VLANS, PORT_SLOTS};
use towpath_wire::View;
use towpath_wire::ethernet::{self, Tag};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::transport::{Ports, Tcp, protocol};

/// A packet that Linux hands to an interface to be transmitted.
pub trait Sent {
    /// The bytes at `offset` from the beginning of the IP header; None if there are not so many.
    fn load<T: View>(&self, offset: usize) -> Option<T>;
    /// The EtherType of the packet, behind all tags
    fn ethertype(&self) -> u16;
    /// The tag that the frame is to have: protocol and control information
    fn tag(&self) -> Option<(u16, u16)>;
    /// Index of the interface by which it was received; 0 if it is the host's own
    fn from(&self) -> u32;
    /// Index of the interface that is to transmit it
    fn to(&self) -> u32;
}

/// Notes a packet that Linux transmits.
#[inline(always)]
pub fn accept<S: Sent, T: Tables>(packet: &S, tables: &T) {
    if packet.from() == 0 {
        return;
    }
    match packet.ethertype() {
        ethernet::IPV4 => accept_key(packet, tables, key4(packet)),
        ethernet::IPV6 => accept_key(packet, tables, key6(packet)),
        _ => None,
    };
}

#[inline(always)]
fn key4<S: Sent>(packet: &S) -> Option<Key<1>> {
    let header = packet.load::<Ipv4>(0)?;
    let whole = header.fragment.get() & (Ipv4::MORE_FRAGMENTS | Ipv4::OFFSET) == 0;
    let ports = ports(packet, header.protocol, size_of::<Ipv4>())?;
    let addresses = zerocopy::transmute!([header.source, header.destination]);
    (header.version_ihl == Ipv4::PLAIN && whole).then_some(Key {
        addresses,
        ports,
        kind: Key::<1>::kind(header.protocol),
    })
}

#[inline(always)]
fn key6<S: Sent>(packet: &S) -> Option<Key<4>> {
    let header = packet.load::<Ipv6>(0)?;
    let ports = ports(packet, header.next_header, size_of::<Ipv6>())?;
    let addresses = zerocopy::transmute!([header.source, header.destination]);
    (header.version() == 6).then_some(Key { addresses, ports, kind: Key::<4>::kind(header.next_header) })
}

/// The ports, of a packet that does not begin or end a connection.
#[inline(always)]
fn ports<S: Sent>(packet: &S, protocol: u8, at: usize) -> Option<u32> {
    match protocol {
        protocol::UDP => packet.load::<Ports>(at).map(Ports::word),
        protocol::TCP => {
            let tcp = packet.load::<Tcp>(at)?;
            let turns = Tcp::FIN | Tcp::SYN | Tcp::RST;
            (tcp.control() & (turns | Tcp::ACK) == Tcp::ACK).then(|| tcp.ports.word())
        }
        _ => None,
    }
}

#[inline(always)]
fn accept_key<const WORDS: usize, S: Sent, T: Tables>(packet: &S, tables: &T, key: Option<Key<WORDS>>) -> Option<()> {
    // It leaves as the inverse of what the answers arrive as.
    let found = tables.find_flow(&key?.inverse())?;
    let generation = tables.config()?.flow_generation.load();
    if !is_open(generation) {
        return None;
    }
    let (from, to) = (slot_of(tables, packet.from())?, slot_out(packet, tables)?);
    let accepted = &tables.flow(found.index())?.accepted[opaque(found.direction().other() as usize) % 2];
    let wanted = acceptance(generation, from, to);
    if accepted.load() != wanted {
        accepted.store(wanted);
    }
    Some(())
}

/// The slot of any port.
#[inline(always)]
fn slot_of<T: Tables>(tables: &T, ifindex: u32) -> Option<u32> {
    if let Some(entry) = Entry::find(tables, ifindex) {
        return Some(entry.slot);
    }
    for slot in 0..PORT_SLOTS {
        if tables.port(slot)?.ifindex.load() == ifindex {
            return Some(slot);
        }
    }
    None
}

/// The slot of the port that the packet leaves by: that of the interface that transmits it, or of its VLAN sub-interface.
#[inline(always)]
fn slot_out<S: Sent, T: Tables>(packet: &S, tables: &T) -> Option<u32> {
    let entry = Entry::find(tables, packet.to())?;
    let Some((protocol, control)) = packet.tag() else { return Some(entry.slot) };
    let vlans = entry.port.vlans.load();
    if vlans == NO_VLANS {
        return None;
    }
    let id = usize::from(control & Tag::ID);
    let table = tables.vlan_table(vlans)?;
    let pair = table.slots.get(opaque(id / 2) % table.slots.len())?.load();
    let slot = (if id.is_multiple_of(2) { pair & 0xffff } else { pair >> 16 }).checked_sub(1)?;
    let same = tables.port(slot)?.vlan.load() == u32::from(protocol) << 16 | id as u32;
    same.then_some(slot)
}
