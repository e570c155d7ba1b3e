//! Packets in GRE (RFC 2784, RFC 2890): made, spoilt, and found again.

use crate::generate::Draft;
use crate::random::Random;
use crate::router::{NEIGHBOURS_V4, ROUTER_V4, Tunnel, end_v6};
use towpath_lab::packet::checksum;

/// In IP headers
pub const PROTOCOL: u8 = 47;
const CHECKSUM: u16 = 0x8000;
const KEY: u16 = 0x2000;
const SEQUENCE: u16 = 0x1000;
const PROTOCOLS: &[u16] = &[0x0800, 0x86dd, 0x6558, 0x8847, 0x0000, 0xffff];

/// IPv6 destination options
const OPTIONS: u8 = 60;
/// Bytes of the outer header, with IPv6's an encapsulation limit
const OUTER: [usize; 2] = [20, 48];

/// Bytes in front of a packet in this tunnel at most.
pub fn overhead(tunnel: &Tunnel) -> usize {
    let optional = [tunnel.key.is_some(), tunnel.checksum, true];
    OUTER[usize::from(tunnel.six)] + 4 + 4 * optional.iter().filter(|is| **is).count()
}

/// What is in `draft`, sent through the tunnel by its other end; some with a number, for which no tunnel asks.
pub fn carried(random: &mut Random, tunnel: &Tunnel, mut draft: Draft) -> Draft {
    draft.complete();
    let number = random.percent(15).then(|| u32::from(random.word()));
    let gre = header(tunnel, number, draft.ethertype, &draft.packet);
    let length = gre.len() + draft.packet.len();
    let mut headers = if tunnel.six { outer6(random, tunnel, length) } else { outer4(random, tunnel, length) };
    headers.extend(gre);
    draft.carried(&headers)
}

fn outer4(random: &mut Random, tunnel: &Tunnel, length: usize) -> Vec<u8> {
    let length = (20 + length) as u16;
    let mut headers = vec![0x45, random.pick(&[0, 0, 0, 0xb8, 1, 2, 3])];
    headers.extend(length.to_be_bytes());
    headers.extend(random.word().to_be_bytes());
    headers.extend(random.pick(&[0u16, 0x4000]).to_be_bytes());
    headers.extend([random.pick(&[1, 2, 64, 255]), PROTOCOL, 0, 0]);
    headers.extend(NEIGHBOURS_V4[tunnel.port]);
    headers.extend(ROUTER_V4[tunnel.port]);
    headers
}

/// Half of them with a limit, which may be 0; some of those with something wrong about it.
fn outer6(random: &mut Random, tunnel: &Tunnel, length: usize) -> Vec<u8> {
    let mut limit = Vec::new();
    if random.percent(50) {
        limit.extend([PROTOCOL, 0, 4, 1, random.pick(&[0, 1, 4, 255]), 1, 1, 0]);
        if random.percent(10) {
            limit[random.below(8)] = random.pick(&[0, 1, 2, 5, 44, 0xc2]);
        }
    }
    let class = u32::from(random.pick(&[0u8, 0, 0, 0xb8, 1, 2, 3]));
    let mut headers = (6 << 28 | class << 20 | random.pick(&[0, 0x54321])).to_be_bytes().to_vec();
    headers.extend(((limit.len() + length) as u16).to_be_bytes());
    let next = if limit.is_empty() { PROTOCOL } else { OPTIONS };
    headers.extend([next, random.pick(&[1, 2, 64, 255])]);
    headers.extend([10, 1].map(|last| end_v6(tunnel.port, last).octets()).concat());
    headers.extend(limit);
    headers
}

/// Where the GRE header of a packet begins that may have one.
pub fn place(packet: &[u8]) -> Option<usize> {
    match (packet.first()? >> 4, *packet.get(6)?, *packet.get(9)?) {
        (4, _, PROTOCOL) => Some(usize::from(packet[0] & 15) * 4),
        (6, PROTOCOL, _) => Some(40),
        (6, OPTIONS, _) if packet.get(40..42) == Some(&[PROTOCOL, 0]) => Some(48),
        _ => None,
    }
}

/// The GRE header before a packet.
fn header(tunnel: &Tunnel, number: Option<u32>, ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let flag = |is: bool, flag| if is { flag } else { 0 };
    let flags = flag(tunnel.checksum, CHECKSUM) | flag(tunnel.key.is_some(), KEY) | flag(number.is_some(), SEQUENCE);
    let mut header = [flags.to_be_bytes(), ethertype.to_be_bytes()].concat();
    header.extend([0; 4].iter().filter(|_| tunnel.checksum));
    header.extend([tunnel.key, number].into_iter().flatten().flat_map(u32::to_be_bytes));
    if tunnel.checksum {
        let sum = checksum(&[&header, packet].concat());
        header[4..6].copy_from_slice(&sum.to_be_bytes());
    }
    header
}

/// A packet in GRE that is wrong, or belongs to no tunnel.
pub fn spoil(random: &mut Random, packet: &mut Vec<u8>) {
    let six = packet[0] >> 4 == 6;
    let outer = place(packet).unwrap_or(if six { 40 } else { 20 });
    let length = if six { (4, outer - 40) } else { (2, outer) };
    let mut word = |at: usize, value: u16| {
        packet.iter_mut().skip(at).zip(value.to_be_bytes()).for_each(|(place, byte)| *place = byte);
    };
    match random.below(8) {
        0 => word(outer, random.pick(&[0, KEY, CHECKSUM, SEQUENCE, KEY | SEQUENCE, 0x4000, 1, 0x0800])),
        1 => word(outer, random.word()),
        2 => word(outer + 2, random.pick(PROTOCOLS)),
        3 => word(outer + 4, random.word()),
        4 => word(outer + 6, random.word()),
        5 => word(outer + 8, random.word()),
        6 => word(length.0, length.1 as u16 + random.below(12) as u16),
        _ => packet.truncate(outer + random.below(12)),
    }
}

/// Where a packet begins that lies behind this GRE header, and its EtherType.
pub fn inside(gre: &[u8]) -> Option<(usize, [u8; 2])> {
    let (flags, rest) = gre.split_first_chunk()?;
    let flags = u16::from_be_bytes(*flags);
    let optional = [CHECKSUM, KEY, SEQUENCE].iter().filter(|flag| flags & **flag != 0).count();
    let at = 4 + 4 * optional;
    (at <= gre.len()).then_some((at, *rest.first_chunk()?))
}
