//! Frames for the cases, and what becomes of them when they are forwarded, written down without the packet path.

use super::world::{IN, mac, neighbour};

/// Source and destination of most IPv4 cases
pub const SOURCE4: [u8; 4] = [192, 0, 2, 99];
/// See `SOURCE4`
pub const DESTINATION4: [u8; 4] = [198, 51, 100, 7];

/// An IPv6 address in 2001:db8::/32: group 2, group 3 and the last group.
pub fn address6(third: u16, fourth: u16, last: u16) -> [u8; 16] {
    std::net::Ipv6Addr::new(0x2001, 0xdb8, third, fourth, 0, 0, 0, last).octets()
}

/// An Ethernet header for the port in `slot`, with tags (protocol and control) and EtherType.
pub fn link(slot: u32, tags: &[(u16, u16)], ethertype: u16) -> Vec<u8> {
    let mut link = [mac(slot), neighbour(IN)].concat();
    for (protocol, control) in tags {
        link.extend(protocol.to_be_bytes());
        link.extend(control.to_be_bytes());
    }
    link.extend(ethertype.to_be_bytes());
    link
}

/// An IPv4 packet with a right checksum.
pub fn ipv4(source: [u8; 4], destination: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let len = (20 + payload.len()) as u16;
    let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0, 0, 64, protocol, 0, 0];
    packet[2..4].copy_from_slice(&len.to_be_bytes());
    packet.extend(source);
    packet.extend(destination);
    fix4(&mut packet);
    packet.extend(payload);
    packet
}

/// An IPv6 packet.
pub fn ipv6(source: [u8; 16], destination: [u8; 16], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([protocol, 64]);
    packet.extend(source);
    packet.extend(destination);
    packet.extend(payload);
    packet
}

/// Sum of 16-bit words, folded, as a number.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2)).map(|word| match word {
        [a, b] => u32::from(u16::from_be_bytes([*a, *b])),
        [a] => u32::from(*a) << 8,
        _ => 0,
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Makes an IPv4 header's checksum right; the header may have options.
pub fn fix4(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let len = usize::from(packet[0] & 15) * 4;
    let checksum = !sum(&[&packet[..len.min(packet.len())]]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// The addresses of a packet of either family, as they stand.
fn addresses(packet: &[u8]) -> &[u8] {
    if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] }
}

/// What a sender that leaves the checksum to the device writes: the sum of the pseudo header.
pub fn seed(packet: &[u8], protocol: u8) -> u16 {
    let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let len = (packet.len() - header) as u16;
    sum(&[addresses(packet), &[0, protocol], &len.to_be_bytes()])
}

/// A UDP datagram without checksum.
pub fn udp(source: u16, destination: u16, data: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::new();
    for field in [source, destination, (8 + data.len()) as u16, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.extend(data);
    datagram
}

/// Completes the transport checksum at `at` in the payload.
pub fn complete(mut packet: Vec<u8>, protocol: u8, at: usize) -> Vec<u8> {
    let header = if packet[0] >> 4 == 4 { 20 } else { 40 };
    packet[header + at..header + at + 2].fill(0);
    let checksum = !sum(&[&seed(&packet, protocol).to_be_bytes(), &packet[header..]]);
    packet[header + at..header + at + 2].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The frame of an IPv4 or IPv6 `packet` after it was forwarded out of the port in `slot`.
pub fn forwarded(slot: u32, tags: &[(u16, u16)], packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let four = packet[0] >> 4 == 4;
    let mut frame = [neighbour(slot), mac(slot)].concat();
    let link = link(slot, tags, if four { 0x0800 } else { 0x86dd });
    frame.extend(&link[12..]);
    if four {
        packet[8] -= 1;
        fix4(&mut packet);
    } else {
        packet[7] -= 1;
    }
    frame.extend(packet);
    frame
}
