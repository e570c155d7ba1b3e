//! What Linux transmits of flows. A packet that it forwarded passed the rules as they are: later ones of the same connection
//! and direction, from and to the same ports, may pass without it (`Flow::accepted`).
//!
//! But for one that waited for its neighbour: it may have passed rules of long ago. Linux sends what waits before it tells
//! anyone that the neighbour is resolved (6.1, net/core/neighbour.c, `__neigh_update`). So a packet counts only if it goes to
//! a neighbour that the tables know already.

use crate::network::Network;
use crate::route::Hop;
use crate::{Entry, Tables};
use towpath_tables::flow::{Key, acceptance, is_open};
use towpath_tables::lpm::Kind;
use towpath_tables::opaque;
use towpath_tables::record::{BY_SOURCE, PORT_SLOTS, Port};
use towpath_wire::View;
use towpath_wire::ethernet::{self, Tag};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::transport::{Ports, Tcp, protocol};

/// A packet that Linux hands to an interface to be transmitted.
pub trait Sent {
    /// The bytes at `offset` from the beginning of the IP header; None if there are not so many.
    fn load<T: View>(&self, offset: usize) -> Option<T>;
    /// The first eight bytes of its link header, as in `Nexthop::l2`
    fn link(&self) -> Option<u64>;
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
        ethernet::IPV4 => key4(packet).and_then(|(header, key)| accept_key(packet, tables, &header, &key)),
        ethernet::IPV6 => key6(packet).and_then(|(header, key)| accept_key(packet, tables, &header, &key)),
        _ => None,
    };
}

#[inline(always)]
fn key4<S: Sent>(packet: &S) -> Option<(Ipv4, Key<1>)> {
    let header = packet.load::<Ipv4>(0)?;
    let whole = header.fragment.get() & (Ipv4::MORE_FRAGMENTS | Ipv4::OFFSET) == 0;
    let ports = ports(packet, header.protocol, size_of::<Ipv4>())?;
    let addresses = zerocopy::transmute!([header.source, header.destination]);
    let key = Key { addresses, ports, kind: Key::<1>::kind(header.protocol) };
    (header.version_ihl == Ipv4::PLAIN && whole).then_some((header, key))
}

#[inline(always)]
fn key6<S: Sent>(packet: &S) -> Option<(Ipv6, Key<4>)> {
    let header = packet.load::<Ipv6>(0)?;
    let ports = ports(packet, header.next_header, size_of::<Ipv6>())?;
    let addresses = zerocopy::transmute!([header.source, header.destination]);
    let key = Key { addresses, ports, kind: Key::<4>::kind(header.next_header) };
    (header.version() == 6).then_some((header, key))
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
fn accept_key<const WORDS: usize, N: Network, S: Sent, T: Tables>(
    packet: &S,
    tables: &T,
    header: &N,
    key: &Key<WORDS>,
) -> Option<()> {
    // It leaves as the inverse of what the answers arrive as.
    let found = tables.find_flow(&key.inverse())?;
    let generation = tables.config()?.flow_generation.load();
    if !is_open(generation) {
        return None;
    }
    let (from, port) = arrived::<N, T>(tables, packet.from())?;
    let to = slot_out(packet, tables)?;
    let accepted = &tables.flow(found.index())?.accepted[opaque(found.direction().other() as usize) % 2];
    let wanted = acceptance(generation, from, to);
    if accepted.load() != wanted && is_known(packet, tables, header, port, to)? {
        accepted.store(wanted);
    }
    Some(())
}

/// Whether it goes to a neighbour that is a next hop for its destination.
#[inline(always)]
fn is_known<N: Network, S: Sent, T: Tables>(packet: &S, tables: &T, header: &N, port: &Port, to: u32) -> Option<bool> {
    let link = packet.link()?;
    let root = port.root[N::FAMILY as usize].load();
    // What it came from may be translated by now: nobody can say by which rule it was routed.
    if root & BY_SOURCE != 0 {
        return None;
    }
    let word = header.lookup(tables, root).ok()?;
    let goes_there =
        |index| tables.nexthop(index).and_then(Hop::begin).is_some_and(|hop| hop.port == to && hop.is_at(link));
    Some(match word.kind() {
        Kind::Nexthop(index) => goes_there(index),
        // Which of them Linux has chosen, its header says.
        Kind::Group(index) => tables.group(index)?.buckets.iter().any(|bucket| goes_there(bucket.load())),
        Kind::None | Kind::Node(_) => false,
    })
}

/// What `Flow::accepted` has for packets that Linux says came in by an interface, and a port that they may have come in by:
/// of what comes in by a VRF's port Linux says the VRF's device (drivers/net/vrf.c, `vrf_ip_rcv`, `vrf_ip6_rcv`).
#[inline(always)]
fn arrived<N: Network, T: Tables>(tables: &T, ifindex: u32) -> Option<(u32, &Port)> {
    if let Some(entry) = Entry::find(tables, ifindex) {
        return Some((entry.slot, entry.port));
    }
    for slot in 0..PORT_SLOTS {
        let port = tables.port(slot)?;
        if port.ifindex.load() == ifindex {
            return Some((slot, port));
        }
        if port.vrf.load() == ifindex {
            let number = port.arrival[N::FAMILY as usize].load();
            return (number >= PORT_SLOTS).then_some((number, port));
        }
    }
    None
}

/// The slot of any port.
#[inline(always)]
pub(crate) fn slot_of<T: Tables>(tables: &T, ifindex: u32) -> Option<u32> {
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
    let (slot, _) = entry.sub_interface(tables, protocol, control & Tag::ID).ok()?;
    Some(slot)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases::frames::{ipv4, ipv6, udp};
    use crate::cases::world::{
        GROUP, HOP, HOP_BACK, IN, IN_DOUBLE, IN_VLAN, OTHER, OUT, OUT_DOUBLE, OUT_VLAN, TUNNEL, World, mac, neighbour,
    };
    use std::net::IpAddr;
    use towpath_tables::lpm::Leaf;
    use towpath_tables::record::NexthopKind;
    use towpath_tables::{Connection, Tuple};

    const GENERATION: u32 = 8;
    const ACK: u8 = 0x10;

    /// A packet that leaves, and what travels beside it.
    struct Leaving {
        packet: Vec<u8>,
        link: u64,
        tag: Option<(u16, u16)>,
        from: u32,
        to: u32,
    }

    impl Sent for Leaving {
        fn load<T: View>(&self, offset: usize) -> Option<T> {
            T::read_from_prefix(self.packet.get(offset..)?).ok().map(|(view, _)| view)
        }
        fn link(&self) -> Option<u64> {
            Some(self.link)
        }
        fn ethertype(&self) -> u16 {
            match self.packet[0] >> 4 {
                4 => ethernet::IPV4,
                6 => ethernet::IPV6,
                _ => 0x0806,
            }
        }
        fn tag(&self) -> Option<(u16, u16)> {
            self.tag
        }
        fn from(&self) -> u32 {
            self.from
        }
        fn to(&self) -> u32 {
            self.to
        }
    }

    /// A connection through masquerade and a forwarded port at once.
    fn connection(six: bool, protocol: u8) -> Connection {
        let [client, inner, outer, server] = match six {
            false => ["192.0.2.99", "192.0.2.1", "198.51.100.1", "198.51.100.7"],
            true => ["2001:db8::63", "2001:db8::1", "2001:db8:1::1:1", "2001:db8:1::7"],
        }
        .map(|address| address.parse::<IpAddr>().unwrap());
        let tuple = |source, source_port, destination, destination_port| Tuple {
            source,
            destination,
            source_port,
            destination_port,
            protocol,
        };
        Connection::new(tuple(client, 4000, inner, 8080), tuple(server, 80, outer, 61_000)).unwrap()
    }

    fn packet(tuple: Tuple, flags: u8) -> Vec<u8> {
        let (source, destination) = (tuple.source_port, tuple.destination_port);
        let mut payload = udp(source, destination, &[0; 20]);
        if tuple.protocol == protocol::TCP {
            payload[4..14].copy_from_slice(&[0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags]);
        }
        match (tuple.source, tuple.destination) {
            (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from.octets(), to.octets(), tuple.protocol, &payload),
            (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(from.octets(), to.octets(), tuple.protocol, &payload),
            _ => panic!("two families"),
        }
    }

    /// What is accepted, per direction, after a packet left a router where the connection is a flow.
    fn accepted(connection: &Connection, leaving: &Leaving, change: impl Fn(&mut World)) -> [u64; 2] {
        let mut world = World::new();
        world.add_flow(connection);
        world.config().flow_generation.store(GENERATION);
        change(&mut world);
        accept(leaving, &world.slices());
        let flow = &world.flows()[0];
        assert!(flow.counters.iter().all(|counters| counters.packets.load() == 0 && counters.bytes.load() == 0));
        assert_eq!(flow.state.load() & towpath_tables::record::flow_state::CLOSED, 0);
        flow.accepted.each_ref().map(|word| word.load())
    }

    /// The first bytes of what goes to the neighbour behind a port.
    fn link(slot: u32) -> u64 {
        let bytes = [neighbour(slot), mac(slot)].concat();
        u64::from_ne_bytes(bytes[..8].try_into().unwrap())
    }

    fn leaving(packet: Vec<u8>) -> Leaving {
        Leaving { packet, link: link(OUT), tag: None, from: IN, to: OUT }
    }

    fn nothing(_: &mut World) {}

    #[test]
    fn a_packet_is_accepted_as_what_leaves_translated() {
        for (six, protocol) in [(false, 6), (false, 17), (true, 6), (true, 17)] {
            let connection = connection(six, protocol);
            let [original, reply] = [connection.original, connection.reply];
            let wanted = acceptance(GENERATION, IN, OUT);
            let there = leaving(packet(reply.inverse(), ACK));
            assert_eq!(accepted(&connection, &there, nothing), [wanted, 0]);
            let back =
                Leaving { packet: packet(original.inverse(), ACK), link: link(IN), tag: None, from: OUT, to: IN };
            assert_eq!(accepted(&connection, &back, nothing), [0, acceptance(GENERATION, OUT, IN)]);
            for before in [original, reply] {
                let untranslated = leaving(packet(before, ACK));
                assert_eq!(accepted(&connection, &untranslated, nothing), [0; 2], "as it arrived");
            }
            let others = leaving(packet(Tuple { source_port: 1, ..reply.inverse() }, ACK));
            assert_eq!(accepted(&connection, &others, nothing), [0; 2], "another's");
        }
    }

    #[test]
    fn what_says_nothing_is_not_accepted() {
        let connection = connection(false, 6);
        let good = || packet(connection.reply.inverse(), ACK);
        let not = |leaving: Leaving, why: &str| assert_eq!(accepted(&connection, &leaving, nothing), [0; 2], "{why}");
        for flags in [0x11, 0x14, 0x04, 0x12, 0x02, 0x00, 0x08, 0x01] {
            not(leaving(packet(connection.reply.inverse(), flags)), &format!("TCP flags {flags:x}"));
        }
        not(Leaving { from: 0, ..leaving(good()) }, "the host's own");
        not(Leaving { from: 77, ..leaving(good()) }, "from no port");
        not(Leaving { to: 77, ..leaving(good()) }, "to no port");
        for (at, value, why) in
            [(6, 0x20, "first fragment"), (7, 1, "later fragment"), (0, 0x46, "options"), (9, 1, "ICMP")]
        {
            let mut packet = good();
            packet[at] = value;
            not(leaving(packet), why);
        }
        for len in [0, 19, 20, 37] {
            let mut packet = good();
            packet.truncate(len.max(1));
            not(leaving(packet), "cut off");
        }
        let mut arp = good();
        arp[0] = 0;
        not(leaving(arp), "no IP");
        for generation in [GENERATION + 1, 1, u32::MAX] {
            let closed = |world: &mut World| world.config().flow_generation.store(generation);
            assert_eq!(accepted(&connection, &leaving(good()), closed), [0; 2], "generation {generation}");
        }
        let next = |world: &mut World| {
            world.flows()[0].accepted[0].store(acceptance(GENERATION - 2, OTHER, OTHER));
            world.flows()[0].accepted[1].store(7);
        };
        let wanted = acceptance(GENERATION, IN, OUT);
        assert_eq!(accepted(&connection, &leaving(good()), next), [wanted, 7], "in place of an older one");
    }

    #[test]
    fn what_goes_to_a_neighbour_that_was_not_known_is_not_accepted() {
        let wanted = acceptance(GENERATION, IN, OUT);
        for six in [false, true] {
            let connection = connection(six, 6);
            let there = || leaving(packet(connection.reply.inverse(), ACK));
            let by = |leaving: &Leaving, change: &dyn Fn(&mut World)| accepted(&connection, leaving, change)[0];
            let unresolved = |world: &mut World| {
                let exception = NexthopKind::Exception as u32 | (towpath_tables::Reason::NoNeighbour as u32) << 8;
                world.nexthop(HOP).state.store(exception);
            };
            assert_eq!(by(&there(), &unresolved), 0, "not resolved");
            assert_eq!(by(&there(), &|world| world.nexthop(HOP).sequence.store(9)), 0, "being changed");
            assert_eq!(by(&there(), &|world| world.nexthop(HOP).port.store(OTHER)), 0, "another port");
            assert_eq!(by(&Leaving { link: link(OTHER), ..there() }, &nothing), 0, "another neighbour");
            // The other member of the group is by another port.
            let prefix: &[u8] = if six { &[0x20, 1, 0xd, 0xb8, 0, 1, 0] } else { &[198, 51, 100] };
            let grouped = |world: &mut World| world.route(u32::from(six), prefix, Leaf::group(GROUP).unwrap());
            assert_eq!(by(&there(), &grouped), wanted);
            let other = Leaving { link: link(OTHER), to: OTHER, ..there() };
            assert_eq!(by(&other, &grouped), acceptance(GENERATION, IN, OTHER));
            assert_eq!(by(&Leaving { to: OTHER, ..there() }, &grouped), 0, "of none of its members");
            let none_left = |world: &mut World| {
                grouped(world);
                unresolved(world);
            };
            assert_eq!(by(&there(), &none_left), 0);
            let elsewhere = |world: &mut World| world.route(u32::from(six), prefix, Leaf::nexthop(HOP_BACK).unwrap());
            assert_eq!(by(&there(), &elsewhere), 0, "routed elsewhere meanwhile");
        }
    }

    #[test]
    fn ports_are_known_by_interface_and_tag() {
        let connection = connection(true, 17);
        let by = |from, to, tag| {
            let leaving = Leaving { tag, from, to, ..leaving(packet(connection.reply.inverse(), 0)) };
            let way = if tag.is_some_and(|(_, control)| control & 0xfff == 200) { OUT_VLAN } else { to };
            accepted(&connection, &leaving, |world| {
                world.nexthop(HOP).port.store(way);
                world.port(OUT).vlans.store(0);
                world.set_vlan(0, 200, OUT_VLAN);
            })[0]
        };
        let way = |from, to| acceptance(GENERATION, from, to);
        for from in [IN, OTHER, IN_VLAN, IN_DOUBLE, TUNNEL] {
            assert_eq!(by(from, OUT, None), way(from, OUT));
        }
        assert_eq!(by(IN, OUT, Some((0x8100, 200))), way(IN, OUT_VLAN));
        assert_eq!(by(IN, OUT, Some((0x8100, 0xe000 | 200))), way(IN, OUT_VLAN), "with priority");
        assert_eq!(by(IN, OUT, Some((0x88a8, 200))), 0, "another protocol");
        assert_eq!(by(IN, OUT, Some((0x8100, 201))), 0, "no such VLAN");
        assert_eq!(by(IN, OUT, Some((0x8100, 0))), 0, "a priority only");
        assert_eq!(by(IN, OTHER, Some((0x8100, 200))), 0, "no VLANs there");
        assert_eq!(by(IN, OUT_DOUBLE, None), way(IN, OUT_DOUBLE), "its slot follows from its index here");
    }

    #[test]
    fn what_came_in_by_a_vrf_is_accepted_for_all_its_ports() {
        const VRF: u32 = 77;
        for six in [false, true] {
            let connection = connection(six, 17);
            let from = |from, numbers: [u32; 2]| {
                let leaving = Leaving { from, ..leaving(packet(connection.reply.inverse(), 0)) };
                accepted(&connection, &leaving, |world| {
                    for (slot, port) in [(OTHER, VRF + 1), (IN, VRF)] {
                        world.port(slot).vrf.store(port);
                        let numbers = numbers.map(|number| number + u32::from(number > 0 && slot == OTHER));
                        let arrival = &world.port(slot).arrival;
                        arrival.iter().zip(numbers).for_each(|(arrival, number)| arrival.store(number));
                    }
                })[0]
            };
            let of = |own, other| if six { [other, own] } else { [own, other] };
            let number = PORT_SLOTS + 3;
            assert_eq!(from(VRF, of(number, 0)), acceptance(GENERATION, number, OUT));
            assert_eq!(from(VRF + 1, of(number, 0)), acceptance(GENERATION, number + 1, OUT));
            assert_eq!(from(VRF, of(0, number)), 0, "stands for its ports in the other family only");
            assert_eq!(from(VRF + 2, of(number, 0)), 0, "another's");
        }
    }
}
