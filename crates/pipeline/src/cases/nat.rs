//! Cases of mappings: addresses that are others beyond a port.

use super::*;
use std::net::IpAddr;
use towpath_tables::Obstacle;
use towpath_tables::mapping::Way;
use towpath_tables::mappings::{self, MappingValue, Ports};

/// Packets that a mapping counts: its number, the way, and their length.
pub type Mapped = (u32, Way, usize);

pub(super) const FAMILIES: [(&str, bool); 2] = [("IPv4", false), ("IPv6", true)];
const PROTOCOLS: [(&str, u8, Option<usize>); 8] = [
    ("TCP", TCP, Some(16)),
    ("UDP", UDP, Some(6)),
    ("UDP-Lite", 136, Some(6)),
    ("DCCP", 33, Some(6)),
    ("UDP without checksum", UDP, None),
    ("ESP", 50, None),
    ("SCTP", 132, None),
    ("nothing known", 253, None),
];

/// By family: a client behind `IN` and as it is seen beyond `OUT`; a server as it is seen from `IN`'s side, and as it is.
pub(super) fn addresses(six: bool) -> [IpAddr; 4] {
    if six {
        ["2001:db8::63", "2001:db8:77::63", "2001:db8:88:1:2:3:4:7", "2001:db8:1::2:3:4:7"]
    } else {
        ["192.0.2.99", "100.64.7.99", "203.0.113.7", "198.51.100.7"]
    }
    .map(|address| address.parse().expect("an address"))
}

pub(super) fn bare(from: IpAddr, to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ipv4(from.octets(), to.octets(), protocol, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => ipv6(from.octets(), to.octets(), protocol, payload),
        _ => panic!("two families"),
    }
}

/// A packet with ports and a right checksum at a place of its payload, or none.
pub(super) fn packet_of_ports(from: (IpAddr, u16), to: (IpAddr, u16), protocol: u8, at: Option<usize>) -> Vec<u8> {
    let mut payload = udp(from.1, to.1, &data(31));
    payload[12] = 0x50;
    let packet = bare(from.0, to.0, protocol, &payload);
    at.map_or(packet.clone(), |at| complete(packet, protocol, at))
}

fn packet(from: IpAddr, to: IpAddr, protocol: u8, at: Option<usize>) -> Vec<u8> {
    packet_of_ports((from, 4000), (to, 80), protocol, at)
}

/// An ICMP or ICMPv6 message of this type that says to be about a packet.
pub(super) fn icmp(from: IpAddr, to: IpAddr, kind: u8, rest: &[u8]) -> Vec<u8> {
    let message = [&[kind, 0, 0, 0, 0, 1, 2, 3], rest].concat();
    let packet = bare(from, to, if from.is_ipv4() { 1 } else { 58 }, &message);
    if from.is_ipv4() { complete_icmp(packet) } else { complete(packet, 58, 2) }
}

/// Completes an ICMP message's checksum, which covers no addresses.
fn complete_icmp(mut packet: Vec<u8>) -> Vec<u8> {
    packet[22..24].fill(0);
    let mut sum: u32 = packet[20..].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[22..24].copy_from_slice(&(!sum as u16).to_be_bytes());
    packet
}

/// The client's mapping at the port it leaves by (number 0) and the server's at `IN` (number 1), as prefixes or hosts.
fn mapped(six: bool, whole: bool) -> impl Fn(&mut World) + Clone {
    move |world: &mut World| {
        let [client, seen, outside, server] = addresses(six);
        let len = match (whole, six) {
            (true, false) => 24,
            (true, true) => 48,
            (false, false) => 32,
            (false, true) => 128,
        };
        world.map(OUT, client, seen, len);
        world.map(IN, server, outside, len.max(if six { 64 } else { 0 }));
    }
}

impl World {
    /// Adds a mapping at the port in a slot.
    pub fn map(&mut self, slot: u32, inside: IpAddr, outside: IpAddr, len: u8) {
        let first = |address| towpath_tables::mappings::first(address, len);
        self.add_mapping(MappingValue { slot, inside: first(inside), outside: first(outside), len, ports: None });
    }

    /// Adds one of a port of an address.
    pub fn map_port(&mut self, slot: u32, protocol: u8, inside: (IpAddr, u16), outside: (IpAddr, u16)) {
        let ports = Some(Ports { protocol, numbers: [inside.1, outside.1] });
        let len = if inside.0.is_ipv4() { 32 } else { 128 };
        self.add_mapping(MappingValue { slot, inside: inside.0, outside: outside.0, len, ports });
    }

    fn add_mapping(&mut self, mapping: MappingValue) {
        let set = &self.mapping_sets()[1];
        let mut all = mappings::in_set(set);
        all.insert(all.len() as u32, mapping);
        mappings::write(set, &all).expect("few mappings");
        self.config().mappings.store(2);
        self.show_mappings(mapping.slot);
    }
}

impl Cases {
    fn map(
        &mut self,
        name: impl Into<String>,
        configure: impl Fn(&mut World) + 'static,
        (before, after): (&[u8], &[u8]),
        mapped: &[Mapped],
    ) {
        let frame = forwarded(OUT, &[], after);
        let expect = Expect::Forward { frame, from: IN, to: OUT, device: OUT, hop: HOP };
        self.add(name, configure, arrive(before), expect);
        self.0.last_mut().expect("just added").mapped = mapped.to_vec();
    }

    pub(super) fn mappings(&mut self) {
        for (family, six) in FAMILIES {
            let [client, seen, outside, server] = addresses(six);
            for whole in [true, false] {
                let router = mapped(six, whole);
                let what = if whole { "prefixes" } else { "hosts" };
                let name = |what: &str, name: &str| format!("mapping, {family}, {what}, {name}");
                for (proto, protocol, at) in PROTOCOLS {
                    let before = packet(client, outside, protocol, at);
                    let after = packet(seen, server, protocol, at);
                    let both = [(0, Way::Out, before.len()), (1, Way::In, before.len())];
                    self.map(name(what, &format!("{proto}, both ends")), router.clone(), (&before, &after), &both);
                    let before = packet(client, server, protocol, at);
                    let after = packet(seen, server, protocol, at);
                    self.map(name(what, &format!("{proto}, source")), router.clone(), (&before, &after), &both[..1]);
                }
                let (echo, after) = (
                    icmp(client, outside, if six { 128 } else { 8 }, &data(9)),
                    icmp(seen, server, if six { 128 } else { 8 }, &data(9)),
                );
                let both = [(0, Way::Out, echo.len()), (1, Way::In, echo.len())];
                self.map(name(what, "echo"), router.clone(), (&echo, &after), &both);
            }
            self.edges_of_mappings(family, six);
            self.mapped_ports(family, six);
        }
        self.options_and_fragments();
        self.mapped_vlans();
    }

    /// Port 4000 of the client is 7000 beyond `OUT` (numbers 0 and 1), and port 80 of the server 8080 beyond `IN` (2 and 3).
    fn mapped_ports(&mut self, family: &str, six: bool) {
        let [client, seen, outside, server] = addresses(six);
        let router = move |world: &mut World| {
            for protocol in [TCP, UDP] {
                world.map_port(OUT, protocol, (client, 4000), (seen, 7000));
            }
            for protocol in [TCP, UDP] {
                world.map_port(IN, protocol, (server, 80), (outside, 8080));
            }
        };
        for (number, (proto, protocol, at)) in PROTOCOLS.into_iter().enumerate() {
            let name = |what: &str| format!("mapping of ports, {family}, {proto}, {what}");
            let packet = |from, to| packet_of_ports(from, to, protocol, at);
            let untold = packet((client, 4001), (server, 80));
            self.map(name("another port"), router, (&untold, &untold), &[]);
            if number > 1 && protocol != UDP {
                let plain = packet((client, 4000), (server, 8080));
                self.map(name("no such protocol"), router, (&plain, &plain), &[]);
                continue;
            }
            let tcp_or_udp = u32::from(protocol == UDP);
            let before = packet((client, 4000), (outside, 8080));
            let after = packet((seen, 7000), (server, 80));
            let both = [(tcp_or_udp, Way::Out, before.len()), (2 + tcp_or_udp, Way::In, before.len())];
            self.map(name("both ends"), router, (&before, &after), &both);
            let (before, after) = (packet((client, 4000), (server, 9)), packet((seen, 7000), (server, 9)));
            self.map(name("source"), router, (&before, &after), &both[..1]);
            let (before, after) = (packet((client, 5), (outside, 8080)), packet((client, 5), (server, 80)));
            self.map(name("destination"), router, (&before, &after), &both[1..]);
        }
    }

    fn edges_of_mappings(&mut self, family: &str, six: bool) {
        let [client, _, outside, server] = addresses(six);
        let router = mapped(six, true);
        let name = |name: &str| format!("mapping, {family}, {name}");
        let plain = || packet(client, outside, TCP, Some(16));
        let other: IpAddr = if six { "2001:db8:0:1::5" } else { "192.0.3.5" }.parse().expect("an address");
        let unmapped = packet(other, server, UDP, Some(6));
        let hosts = mapped(six, false);
        self.map(name("neither end has one"), hosts, (&unmapped, &unmapped), &[]);
        let short = bare(client, outside, TCP, &[0; 17]);
        self.except(name("no room for a checksum"), router.clone(), arrive(&short), Reason::Truncated);
        let error = icmp(client, outside, if six { 1 } else { 3 }, &packet(outside, client, UDP, Some(6)));
        self.except(name("an ICMP error"), router.clone(), arrive(&error), Reason::Mapped);
        let last_hop = with(plain(), |packet| {
            packet[if six { 7 } else { 8 }] = 1;
            if !six {
                fix4(packet);
            }
        });
        self.except(name("TTL 1"), router.clone(), arrive(&last_hop), Reason::TtlExpired);
        let policies =
            [("rules", Reason::PolicyNetfilter, false), ("rules that connections pass", Reason::PolicyConntrack, true)];
        for (what, reason, flows) in policies {
            let router = router.clone();
            let ruled = move |world: &mut World| {
                router(world);
                let word = Obstacle::word(Some(Obstacle { reason, flows }));
                world.config().policy.iter().for_each(|policy| policy.store(word));
            };
            self.except(name(what), ruled, arrive(&plain()), reason);
        }
        let table: IpAddr = if six { "2001:db8:1::1:1" } else { "198.51.100.1" }.parse().expect("an address");
        let router = router.clone();
        let own = move |world: &mut World| {
            router(world);
            let octets = match table {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            world.local(six.into(), &octets);
        };
        let to: IpAddr = if six { "2001:db8:88:1::1:1" } else { "203.0.113.1" }.parse().expect("an address");
        let to_router = packet(client, to, UDP, Some(6));
        self.except(name("to what is the router's own then"), own, arrive(&to_router), Reason::LocalDestination);
    }

    fn options_and_fragments(&mut self) {
        let [client, _, outside, _] = addresses(false);
        for (name, fragment) in [("first fragment", 0x2000u16), ("later fragment", 0x0003)] {
            let packet = with(packet(client, outside, UDP, Some(6)), |packet| {
                packet[6..8].copy_from_slice(&fragment.to_be_bytes());
                fix4(packet);
            });
            self.except(format!("mapping, {name}"), mapped(false, true), arrive(&packet), Reason::Fragment);
        }
        let [client, _, outside, _] = addresses(true);
        for header in [43, 60, 135] {
            let packet = bare(client, outside, header, &[UDP, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            let name = format!("mapping, extension header {header}");
            self.except(name, mapped(true, true), arrive(&packet), Reason::ExtensionHeader);
        }
        let fragment = bare(client, outside, 44, &[UDP, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        self.except("mapping, IPv6 fragment", mapped(true, true), arrive(&fragment), Reason::Fragment);
    }

    /// In and out by VLAN sub-interfaces, which have mappings of their own.
    fn mapped_vlans(&mut self) {
        let [from, seen, outside, to] = ["192.0.2.99", "100.64.7.99", "198.51.9.9", "203.0.113.9"]
            .map(|address| address.parse::<IpAddr>().expect("an address"));
        let router = move |world: &mut World| {
            world.map(OUT_VLAN, from, seen, 32);
            world.map(IN_VLAN, to, outside, 32);
            world.map(IN, from, outside, 32);
            world.map(OUT, from, outside, 32);
        };
        let (before, after) = (packet(from, outside, TCP, Some(16)), packet(seen, to, TCP, Some(16)));
        let frame = [link(IN_VLAN, &[(0x8100, 100)], 0x0800), before.clone()].concat();
        let expect = Expect::Forward {
            frame: forwarded(OUT_VLAN, &[(0x8100, 200)], &after),
            from: IN_VLAN,
            to: OUT_VLAN,
            device: OUT,
            hop: HOP_VLAN,
        };
        self.add("mapping, from VLAN to VLAN", router, frame, expect);
        let len = before.len();
        self.0.last_mut().expect("just added").mapped = vec![(0, Way::Out, len), (1, Way::In, len)];
    }
}
