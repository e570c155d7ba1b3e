//! What is sent after a step: to fixed addresses in and about every prefix that steps may change, from every port, one short
//! frame and one of any length and time to live to each.

use crate::generate::Case;
use crate::random::Random;
use crate::router::{HOST_MACS, PORTS, ROUTER_MACS};
use etherparse::PacketBuilder;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const DESTINATIONS: &[&str] = &[
    "198.17.255.255",
    "198.18.0.0",
    "198.18.0.1",
    "198.18.0.9",
    "198.18.0.255",
    "198.18.1.0",
    "198.18.1.127",
    "198.18.1.128",
    "198.18.1.129",
    "198.18.1.255",
    "198.18.2.0",
    "198.18.3.7",
    "198.18.4.7",
    "198.18.5.7",
    "198.18.6.7",
    "198.18.7.7",
    "198.18.8.1",
    "198.18.9.9",
    "198.18.11.255",
    "198.18.12.0",
    "198.18.200.0",
    "198.18.200.1",
    "198.18.200.9",
    "198.18.200.127",
    "198.18.200.128",
    "198.18.200.255",
    "198.18.201.9",
    "198.18.202.9",
    "198.18.210.9",
    "198.18.211.1",
    "198.18.212.9",
    "198.18.255.255",
    "198.20.0.1",
    "192.0.2.1",
    "192.0.2.10",
    "192.0.2.11",
    "192.0.2.77",
    "192.0.2.128",
    "192.0.2.255",
    "198.51.100.10",
    "198.51.100.11",
    "198.51.100.64",
    "198.51.100.77",
    "198.51.100.128",
    "203.0.113.10",
    "203.0.113.11",
    "203.0.113.77",
    "203.0.113.78",
    "8.8.8.8",
    "2001:db8:ff:ffff:ffff:ffff:ffff:ffff",
    "2001:db8:100::",
    "2001:db8:100::1",
    "2001:db8:100::2",
    "2001:db8:100:ffff:ffff:ffff:ffff:ffff",
    "2001:db8:101::",
    "2001:db8:101:7fff:ffff:ffff:ffff:ffff",
    "2001:db8:101:8000::",
    "2001:db8:101:8000::1",
    "2001:db8:101:8000::2",
    "2001:db8:102::7",
    "2001:db8:104::7",
    "2001:db8:108::7",
    "2001:db8:1ff::7",
    "2001:db8:200::1",
    "2001:db8:200::7",
    "2001:db8:200:0:8000::",
    "2001:db8:201::7",
    "2001:db8::1",
    "2001:db8::10",
    "2001:db8::11",
    "2001:db8:1::10",
    "2001:db8:1::11",
    "2001:db8:1::77",
    "2001:db8:1::1:0:0",
    "2001:db8:2::10",
    "2001:db8:2::11",
    "2001:db8:2::77",
    "2001:db8:2::78",
    "2600::1",
];

/// Frames that enter by a port of this MTU, to these destinations.
pub fn burst(random: &mut Random, port: usize, mtu: usize, destinations: &[IpAddr]) -> Vec<Case> {
    let each = |destination: &IpAddr| [probe(port, *destination, FIRST), any(random, port, mtu, *destination)];
    destinations.iter().flat_map(each).collect()
}

/// Ends of the sources of probes: in a burst, and beside a command.
pub const FIRST: u8 = 1;
pub const BESIDE: u8 = 250;

/// A short frame that nothing but routes decides over, from a source that ends so.
pub fn probe(port: usize, destination: IpAddr, last: u8) -> Case {
    let ip = ip(source(port, port, last, destination), destination, 64);
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(HOST_MACS[port], ROUTER_MACS[port])
        .ip(ip)
        .udp(7, 9)
        .write(&mut bytes, &[port as u8; 24])
        .expect("writing to memory");
    Case { port, bytes, plain: true }
}

/// Of a probe that was forwarded, by which port it entered, and its destination, if its source ends so.
pub fn forwarded(frame: &[u8], last: u8) -> Option<(usize, IpAddr)> {
    let (source, destination): (IpAddr, IpAddr) = match frame.get(12..14)? {
        [8, 0] => (
            Ipv4Addr::from(*frame.get(26..)?.first_chunk()?).into(),
            Ipv4Addr::from(*frame.get(30..)?.first_chunk()?).into(),
        ),
        [0x86, 0xdd] => (
            Ipv6Addr::from(*frame.get(22..)?.first_chunk()?).into(),
            Ipv6Addr::from(*frame.get(38..)?.first_chunk()?).into(),
        ),
        _ => return None,
    };
    let port = (0..PORTS).find(|port| self::source(*port, *port, last, destination) == source)?;
    Some((port, destination))
}

/// A frame of any length up to the MTU, of a few protocols and times to live.
fn any(random: &mut Random, port: usize, mtu: usize, destination: IpAddr) -> Case {
    let ttl = random.pick(&[1, 2, 64, 64, 64, 255]);
    // Some sources are reached by another port.
    let behind = random.below(3);
    let source = source(port, if random.percent(20) { behind } else { port }, 2 + random.below(200) as u8, destination);
    let header = if destination.is_ipv4() { 20 } else { 40 };
    let length = match random.percent(40) {
        true => header + 20 + random.pick(&[0, 1, 200, 1000]),
        false => random.pick(&[1279, 1280, 1281, 1290, 1300, 1301, 1400, 1401, 1500, 1500]),
    };
    // An echo that the router must answer in fragments would have a random identification.
    let kind = random.below(4);
    let length = length.min(if kind == 0 { 1200 } else { mtu });
    let payload = random.bytes(length - header - 8);
    let ethernet = PacketBuilder::ethernet2(HOST_MACS[port], ROUTER_MACS[port]).ip(ip(source, destination, ttl));
    let mut bytes = Vec::new();
    match (kind, destination) {
        (0, IpAddr::V4(_)) => ethernet.icmpv4(etherparse::Icmpv4Type::EchoRequest(echo())).write(&mut bytes, &payload),
        (0, IpAddr::V6(_)) => ethernet.icmpv6(etherparse::Icmpv6Type::EchoRequest(echo())).write(&mut bytes, &payload),
        (1, _) => ethernet.tcp(1000, 80, random.next() as u32, 1000).write(&mut bytes, &payload[12..]),
        _ => ethernet.udp(1000 + random.below(1000) as u16, 53).write(&mut bytes, &payload),
    }
    .expect("writing to memory");
    let tagged = random.percent(8);
    if tagged {
        bytes.splice(12..12, [0x81, 0, 0, random.pick(&[0, 7, 7, 8])]);
    }
    Case { port, bytes, plain: ttl == 64 && length < 1280 && !tagged }
}

fn echo() -> etherparse::IcmpEchoHeader {
    etherparse::IcmpEchoHeader { id: 7, seq: 1 }
}

/// An address behind a port.
fn source(port: usize, behind: usize, last: u8, destination: IpAddr) -> IpAddr {
    match destination {
        IpAddr::V4(_) => Ipv4Addr::new(198, 19, behind as u8 * 64 + port as u8, last).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0x2001, 0xdb8, 0xf00 | behind as u16, port as u16, 0, 0, 0, last.into()).into(),
    }
}

fn ip(source: IpAddr, destination: IpAddr, ttl: u8) -> etherparse::IpHeaders {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut header = etherparse::Ipv4Header {
                time_to_live: ttl,
                dont_fragment: source.octets()[3] % 3 == 0,
                source: source.octets(),
                destination: destination.octets(),
                ..Default::default()
            };
            header.header_checksum = header.calc_header_checksum();
            etherparse::IpHeaders::Ipv4(header, Default::default())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => etherparse::IpHeaders::Ipv6(
            etherparse::Ipv6Header {
                hop_limit: ttl,
                source: source.octets(),
                destination: destination.octets(),
                ..Default::default()
            },
            Default::default(),
        ),
        _ => unreachable!("both are of one family"),
    }
}
