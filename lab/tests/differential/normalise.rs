//! What two equal Linux routers may do differently. Everything else is compared byte for byte.

use crate::generate::{is_router_v4, marker_batch};
use crate::router::PORTS;
use std::collections::HashSet;
use towpath_lab::Frame;
use towpath_lab::packet::checksum;

/// What came out of each port.
pub type Outputs = [Vec<Frame>; PORTS];

/// Destinations to which a router has sent a redirect. Linux sends the first one always and further ones at
/// intervals, so only the first can be compared.
pub type Redirected = HashSet<Vec<u8>>;

/// Outputs without markers and without what depends on the time.
pub fn normalise(raw: &Outputs, redirected: &mut Redirected) -> Outputs {
    std::array::from_fn(|port| {
        let frames = raw[port].iter().filter(|f| marker_batch(&f.bytes).is_none() && !unprompted(&f.bytes));
        let frames = frames.filter(|f| redirect_target(&f.bytes).is_none_or(|target| redirected.insert(target)));
        frames.cloned().map(without_identification).collect()
    })
}

/// Outputs whose order does not matter.
pub fn sorted(mut outputs: Outputs) -> Outputs {
    outputs.iter_mut().for_each(|frames| frames.sort());
    outputs
}

/// What a router says of itself when it likes: ARP, and multicast of the link's scope from its own address (MLD,
/// neighbour and router discovery).
fn unprompted(bytes: &[u8]) -> bool {
    let own = |source: &[u8]| source[..2] == [0xfe, 0x80] || source.iter().all(|b| *b == 0);
    match bytes.get(12..14) {
        Some([8, 6]) => true,
        Some([0x86, 0xdd]) => bytes.len() >= 54 && bytes[38..40] == [0xff, 2] && own(&bytes[22..38]),
        _ => false,
    }
}

/// For a redirect, whom (IPv4) or what destination (IPv6) Linux counts it for.
fn redirect_target(bytes: &[u8]) -> Option<Vec<u8>> {
    match bytes.get(12..14)? {
        [8, 0] if bytes.get(23) == Some(&1) && bytes.get(34) == Some(&5) && is_router_v4(bytes.get(26..30)?) => {
            Some(bytes[30..34].to_vec())
        }
        [0x86, 0xdd] if bytes.get(20) == Some(&58) && bytes.get(54) == Some(&137) => Some(bytes.get(78..94)?.to_vec()),
        _ => None,
    }
}

/// The router's own IPv4 packets carry identifications from a counter that runs with the time; and the header's
/// checksum with them, which must be right nevertheless.
fn without_identification(mut frame: Frame) -> Frame {
    let bytes = &mut frame.bytes;
    let at = if bytes.get(12..14) == Some(&[0x81, 0]) { 18 } else { 14 };
    if bytes.get(at - 2..at) == Some(&[8, 0]) && bytes.len() >= at + 20 {
        let header = at + usize::from(bytes[at] & 15) * 4;
        if is_router_v4(&bytes[at + 12..at + 16]) && header <= bytes.len() && checksum(&bytes[at..header]) == 0 {
            bytes[at + 4..at + 6].fill(0);
            bytes[at + 10..at + 12].fill(0);
        }
    }
    frame
}
