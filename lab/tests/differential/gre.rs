//! Packets in GRE (RFC 2784, RFC 2890): made, spoilt, and found again.

use crate::generate::Draft;
use crate::random::Random;
use crate::router::{NEIGHBOURS_V4, ROUTER_V4, Tunnel};

/// In IPv4 headers
pub const PROTOCOL: u8 = 47;
const CHECKSUM: u16 = 0x8000;
const KEY: u16 = 0x2000;
const SEQUENCE: u16 = 0x1000;
const PROTOCOLS: &[u16] = &[0x0800, 0x86dd, 0x6558, 0x8847, 0x0000, 0xffff];

/// Bytes of the outer IPv4 header.
const OUTER: usize = 20;

/// Bytes in front of a packet in this tunnel.
pub fn overhead(tunnel: &Tunnel) -> usize {
    OUTER + 4 + tunnel.key.map_or(0, |_| 4)
}

/// What is in `draft`, sent through the tunnel by its other end.
pub fn carried(random: &mut Random, tunnel: &Tunnel, draft: Draft) -> Draft {
    let length = (draft.packet.len() + overhead(tunnel)) as u16;
    let mut headers = vec![0x45, random.pick(&[0, 0, 0, 0xb8, 1, 2, 3])];
    headers.extend(length.to_be_bytes());
    headers.extend(random.word().to_be_bytes());
    headers.extend(random.pick(&[0u16, 0x4000]).to_be_bytes());
    headers.extend([random.pick(&[1, 2, 64, 255]), PROTOCOL, 0, 0]);
    headers.extend(NEIGHBOURS_V4[tunnel.port]);
    headers.extend(ROUTER_V4[tunnel.port]);
    headers.extend(tunnel.key.map_or(0, |_| KEY).to_be_bytes());
    headers.extend(draft.ethertype.to_be_bytes());
    headers.extend(tunnel.key.map(u32::to_be_bytes).into_iter().flatten());
    draft.carried(&headers)
}

/// A packet in GRE that is wrong, or belongs to no tunnel.
pub fn spoil(random: &mut Random, packet: &mut Vec<u8>) {
    let mut word = |at: usize, value: u16| packet[at..at + 2].copy_from_slice(&value.to_be_bytes());
    match random.below(7) {
        0 => word(OUTER, random.pick(&[0, KEY, CHECKSUM, SEQUENCE, KEY | SEQUENCE, 0x4000, 1, 0x0800])),
        1 => word(OUTER, random.word()),
        2 => word(OUTER + 2, random.pick(PROTOCOLS)),
        3 => word(OUTER + 4, random.word()),
        4 => word(OUTER + 6, random.word()),
        5 => word(2, OUTER as u16 + random.below(12) as u16),
        _ => packet.truncate(OUTER + random.below(12)),
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
