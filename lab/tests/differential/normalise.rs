//! What two equal Linux routers may do differently. Everything else is compared byte for byte.

use crate::generate::{is_router_v4, marker_batch};
use crate::gre;
use crate::router::{PORTS, end_v6};
use std::borrow::Cow;
use std::collections::HashSet;
use towpath_lab::Frame;
use towpath_lab::packet::checksum;

/// What came out of each port.
pub type Outputs = [Vec<Frame>; PORTS];

/// To whom a router has sent what Linux sends at a limited rate: the first is always sent, further ones depend on the
/// time, so only the first can be compared.
#[derive(Clone, Default)]
pub struct Limited {
    redirected: HashSet<Vec<u8>>,
    /// who was told of an IPv4 route that forbids (ip_error() in net/ipv4/route.c; its rate is not a namespace's own)
    refused: HashSet<Vec<u8>>,
}

impl Limited {
    /// Whether this frame can be compared: it is not limited, or it is the first of its kind.
    fn compares(&mut self, bytes: &[u8]) -> bool {
        if let Some(host) = redirected(bytes) {
            return self.redirected.insert(host);
        }
        // A redirect spends what a later refusal to the same host would need, but not the other way round.
        refused(bytes).is_none_or(|host| !self.redirected.contains(&host) && self.refused.insert(host))
    }
}

/// Outputs without markers and without what depends on the time.
pub fn normalise(raw: &Outputs, limited: &mut Limited) -> Outputs {
    std::array::from_fn(|port| {
        let frames = raw[port].iter().filter(|f| marker_batch(&f.bytes).is_none());
        let compared = frames.filter(|f| {
            let unpacked = unpacked(&f.bytes);
            !unprompted(&unpacked) && limited.compares(&unpacked)
        });
        compared.cloned().map(without_identification).collect()
    })
}

/// The frame as it would be had the router not put its packet into a tunnel.
fn unpacked(bytes: &[u8]) -> Cow<'_, [u8]> {
    match carried(bytes) {
        Some((at, ethertype)) => [&bytes[..12], &ethertype, &bytes[at..]].concat().into(),
        None => bytes.into(),
    }
}

/// Where the packet begins that the router has put into a tunnel, and its EtherType.
fn carried(bytes: &[u8]) -> Option<(usize, [u8; 2])> {
    let packet = from_router(bytes).or_else(|| from_router_v6(bytes))?;
    let place = gre::place(packet)?;
    let (at, ethertype) = gre::inside(packet.get(place..)?)?;
    Some((bytes.len() - packet.len() + place + at, ethertype))
}

/// Outputs whose order does not matter.
pub fn sorted(mut outputs: Outputs) -> Outputs {
    outputs.iter_mut().for_each(|frames| frames.sort());
    outputs
}

/// What a router says of itself when it likes: ARP, and multicast of the link's scope from its own address (MLD,
/// neighbour and router discovery); and redirects of IPv6, which are counted before Linux knows whether it may send
/// them, so that not even the first is certain.
fn unprompted(bytes: &[u8]) -> bool {
    let own = |source: &[u8]| source[..2] == [0xfe, 0x80] || source.iter().all(|b| *b == 0);
    match bytes.get(12..14) {
        Some([8, 6]) => true,
        Some([0x86, 0xdd]) if bytes.len() >= 55 && own(&bytes[22..38]) => {
            bytes[38..40] == [0xff, 2] || is_redirect(bytes)
        }
        _ => false,
    }
}

/// A redirect, of either family.
pub fn is_redirect(bytes: &[u8]) -> bool {
    redirected(bytes).is_some()
        || bytes.get(12..14) == Some(&[0x86, 0xdd]) && bytes.get(20) == Some(&58) && bytes.get(54) == Some(&137)
}

/// For a redirect of IPv4, to whom it goes.
fn redirected(bytes: &[u8]) -> Option<Vec<u8>> {
    let (host, [kind, _]) = icmp_error(bytes)?;
    (kind == 5).then_some(host)
}

/// For the news that a route forbids (net or host unreachable, prohibited), to whom it goes.
fn refused(bytes: &[u8]) -> Option<Vec<u8>> {
    let (host, message) = icmp_error(bytes)?;
    matches!(message, [3, 0 | 1 | 13]).then_some(host)
}

/// Of an IPv4 ICMP message from the router: to whom, and its type and code.
fn icmp_error(bytes: &[u8]) -> Option<(Vec<u8>, [u8; 2])> {
    let packet = from_router(bytes)?;
    let message = packet.get(header_length(packet)..)?;
    (packet[9] == 1).then(|| Some((packet[16..20].to_vec(), message.get(..2)?.try_into().ok()?)))?
}

/// The IPv4 packet in this frame, if its source is the router.
fn from_router(bytes: &[u8]) -> Option<&[u8]> {
    let packet = bytes.get(start_of_ipv4(bytes)?..)?;
    is_router_v4(packet.get(12..16)?).then_some(packet).filter(|packet| packet.len() >= 20)
}

/// The same for IPv6.
fn from_router_v6(bytes: &[u8]) -> Option<&[u8]> {
    let packet = bytes.get(14..).filter(|_| bytes[12..14] == [0x86, 0xdd])?;
    let source = packet.get(8..24)?;
    (0..PORTS).any(|port| source == end_v6(port, 1).octets()).then_some(packet)
}

fn start_of_ipv4(bytes: &[u8]) -> Option<usize> {
    let at = if bytes.get(12..14)? == [0x81, 0] { 18 } else { 14 };
    (bytes.get(at - 2..at)? == [8, 0]).then_some(at)
}

fn header_length(packet: &[u8]) -> usize {
    usize::from(packet[0] & 15) * 4
}

/// The router's own IPv4 packets carry identifications from a counter that runs with the time; and the header's
/// checksum with them, which must be right nevertheless.
pub fn without_identification(mut frame: Frame) -> Frame {
    let inside = carried(&frame.bytes).filter(|(_, ethertype)| *ethertype == [8, 0]).map(|(at, _)| at);
    for at in [start_of_ipv4(&frame.bytes), inside].into_iter().flatten() {
        blot_out_identification(&mut frame.bytes[at..]);
    }
    frame
}

fn blot_out_identification(packet: &mut [u8]) {
    let own = packet.len() >= 20 && is_router_v4(&packet[12..16]);
    if own && packet.get(..header_length(packet)).is_some_and(|header| checksum(header) == 0) {
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
}
