//! Makes the frame that `explain` sends through the pipeline: an ordinary UDP or TCP packet with right checksums.

use crate::cli::Protocol;
use crate::control::Packet;
use std::net::IpAddr;
use towpath_fpc::{GreOptions, Tunnel};
use towpath_wire::gre::Gre;
use towpath_wire::transport::protocol;

/// Frames are padded to this length, as on a wire without the checksum.
const SHORTEST: usize = 60;

/// Where a frame enters.
pub struct Link {
    /// MAC address of the port
    pub mac: [u8; 6],
    /// Tags in front of the packet, outermost first: protocol and VLAN identifier
    pub tags: Vec<(u16, u16)>,
}

/// The frame as it arrives in a tunnel from its other end.
pub fn tunnelled(packet: &Packet, link: &Link, tunnel: &Tunnel) -> Vec<u8> {
    let header = 14 + 4 * link.tags.len();
    let mut frame = build(packet, link);
    let inner = frame.split_off(header);
    let ethertype = frame.split_off(header - 2);
    let gre = gre(&tunnel.input, &ethertype, &inner);
    frame[..6].copy_from_slice(&link.mac);
    let length = (gre.len() + inner.len()) as u16;
    match (tunnel.remote, tunnel.local) {
        (IpAddr::V4(remote), IpAddr::V4(local)) => {
            frame.extend(0x0800u16.to_be_bytes());
            frame.extend(ipv4_header(20 + length, [64, protocol::GRE], remote.octets(), local.octets()));
        }
        (remote, local) => {
            frame.extend(0x86ddu16.to_be_bytes());
            frame.extend(ipv6_header(length, [protocol::GRE, 64], octets(remote), octets(local)));
        }
    }
    frame.extend(gre);
    frame.extend(inner);
    frame
}

/// The header before a packet, padding and all.
fn gre(options: &GreOptions, ethertype: &[u8], inner: &[u8]) -> Vec<u8> {
    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    let flags = flag(options.checksum, Gre::CHECKSUM)
        | flag(options.key.is_some(), Gre::KEY)
        | flag(options.sequence, Gre::SEQUENCE);
    let mut header = [&flags.to_be_bytes(), ethertype].concat();
    header.extend([0; 4].iter().filter(|_| options.checksum));
    header.extend(options.key.into_iter().flat_map(u32::to_be_bytes));
    header.extend([0; 4].iter().filter(|_| options.sequence));
    if options.checksum {
        let sum = checksum(&[&header, inner].concat());
        header[4..6].copy_from_slice(&sum.to_be_bytes());
    }
    header
}

/// The frame as it arrives. Lengths are those of the request: at least 48 bytes for IPv4, 60 for IPv6 with TCP.
pub fn build(packet: &Packet, link: &Link) -> Vec<u8> {
    let mut frame = receiver(packet.destination, link.mac).to_vec();
    frame.extend([2, 0, 0, 0, 0, 1]); // any neighbour
    for (protocol, id) in &link.tags {
        frame.extend(protocol.to_be_bytes());
        frame.extend(id.to_be_bytes());
    }
    match (packet.source, packet.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.extend(0x0800u16.to_be_bytes());
            frame.extend(ipv4(packet, source.octets(), destination.octets()));
        }
        (source, destination) => {
            frame.extend(0x86ddu16.to_be_bytes());
            frame.extend(ipv6(packet, octets(source), octets(destination)));
        }
    }
    frame.resize(frame.len().max(SHORTEST), 0);
    frame
}

/// An address of IPv6
fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The MAC address a neighbour sends to: the port's, or that of a group (RFC 1112, section 6.4; RFC 2464, section 7).
fn receiver(destination: IpAddr, port: [u8; 6]) -> [u8; 6] {
    match destination {
        IpAddr::V4(address) if address.is_broadcast() => [0xff; 6],
        IpAddr::V4(address) if address.is_multicast() => {
            let [_, b, c, d] = address.octets();
            [1, 0, 0x5e, b & 0x7f, c, d]
        }
        IpAddr::V6(address) if address.is_multicast() => {
            let [.., a, b, c, d] = address.octets();
            [0x33, 0x33, a, b, c, d]
        }
        _ => port,
    }
}

fn ipv4(packet: &Packet, source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let mut bytes = ipv4_header(packet.length, [packet.ttl, packet.protocol.number()], source, destination);
    bytes.extend(transport(packet, &source, &destination, usize::from(packet.length).saturating_sub(20)));
    bytes
}

fn ipv4_header(length: u16, [ttl, protocol]: [u8; 2], source: [u8; 4], destination: [u8; 4]) -> Vec<u8> {
    let [high, low] = length.to_be_bytes();
    let mut bytes = vec![0x45, 0, high, low, 0, 0, 0, 0, ttl, protocol, 0, 0];
    bytes.extend(source.into_iter().chain(destination));
    let sum = checksum(&bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn ipv6(packet: &Packet, source: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
    let payload = packet.length.saturating_sub(40);
    let mut bytes = ipv6_header(payload, [packet.protocol.number(), packet.ttl], source, destination);
    bytes.extend(transport(packet, &source, &destination, payload.into()));
    bytes
}

fn ipv6_header(payload: u16, [protocol, hops]: [u8; 2], source: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
    let [high, low] = payload.to_be_bytes();
    let mut bytes = vec![0x60, 0, 0, 0, high, low, protocol, hops];
    bytes.extend(source.into_iter().chain(destination));
    bytes
}

/// The transport header and zeros after it, `length` bytes or as many as the header takes.
fn transport(packet: &Packet, source: &[u8], destination: &[u8], length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = packet.sport.to_be_bytes().into_iter().chain(packet.dport.to_be_bytes()).collect();
    let place = match packet.protocol {
        Protocol::Udp => {
            bytes.extend((length as u16).to_be_bytes());
            bytes.extend([0; 2]);
            6
        }
        Protocol::Tcp => {
            bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x10, 0, 0, 0, 0, 0]); // sequence numbers; ACK
            16
        }
    };
    bytes.resize(bytes.len().max(length), 0);
    let mut covered = [source, destination].concat();
    covered.extend((length as u32).to_be_bytes());
    covered.extend([0, 0, 0, packet.protocol.number()]);
    covered.extend(&bytes);
    let sum = match checksum(&covered) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// RFC 1071
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(source: &str, destination: &str, protocol: Protocol) -> Packet {
        Packet {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            port: None,
            protocol,
            sport: 1024,
            dport: 9,
            length: 100,
            ttl: 7,
        }
    }

    const LINK: Link = Link { mac: [2, 0, 0, 0, 0, 9], tags: Vec::new() };

    #[test]
    fn an_ipv4_packet_is_right_in_every_byte_that_matters() {
        let frame = build(&packet("192.0.2.1", "198.51.100.2", Protocol::Udp), &LINK);
        assert_eq!(frame.len(), 114);
        assert_eq!(frame[..14], [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0]);
        assert_eq!(frame[14..24], [0x45, 0, 0, 100, 0, 0, 0, 0, 7, 17]);
        assert_eq!(frame[26..38], [192, 0, 2, 1, 198, 51, 100, 2, 4, 0, 0, 9]);
        assert_eq!(checksum(&frame[14..34]), 0, "header checksum");
        let pseudo = [&frame[26..34], &[0, 17, 0, 80], &frame[34..]].concat();
        assert_eq!(checksum(&pseudo), 0, "UDP checksum");
    }

    #[test]
    fn an_ipv6_packet_with_tags_is_too() {
        let link = Link { tags: vec![(0x8100, 100)], ..LINK };
        let frame = build(&packet("2001:db8::1", "2001:db8::2", Protocol::Tcp), &link);
        assert_eq!(frame.len(), 118);
        assert_eq!(frame[12..18], [0x81, 0, 0, 100, 0x86, 0xdd]);
        assert_eq!(frame[18..26], [0x60, 0, 0, 0, 0, 60, 6, 7]);
        let pseudo = [&frame[26..58], &[0, 6, 0, 60], &frame[58..]].concat();
        assert_eq!(checksum(&pseudo), 0, "TCP checksum");
    }

    #[test]
    fn groups_have_addresses_of_their_own() {
        let to = |source, destination| build(&packet(source, destination, Protocol::Udp), &LINK)[..6].to_vec();
        assert_eq!(to("192.0.2.1", "239.129.2.3"), [1, 0, 0x5e, 1, 2, 3]);
        assert_eq!(to("192.0.2.1", "255.255.255.255"), [0xff; 6]);
        assert_eq!(to("2001:db8::1", "ff0e::1:2"), [0x33, 0x33, 0, 1, 0, 2]);
    }

    #[test]
    fn short_frames_are_padded() {
        let short = Packet { length: 28, ..packet("192.0.2.1", "198.51.100.2", Protocol::Udp) };
        assert_eq!(build(&short, &LINK).len(), SHORTEST);
    }
}
