//! Mappings of addresses, or of a TCP or UDP port of an address (`towpath nat`): static translation at a port, as if it happened
//! on the wire outside of it. What leaves by the port with a source inside has a source outside; what comes in with a
//! destination outside has one inside.
//!
//! Packets that go fast are translated where they are rewritten (`forward`). What Linux receives and transmits by the port is
//! translated by tc programs on it (`translate`), which know everything: ICMP errors with the packets that they quote,
//! fragments, options and extension headers. So what a mapping names is translated whichever way it goes, and an exception
//! is still the packet as it arrived.

use crate::network::{Network, Part};
use crate::rewrite::fit;
use crate::roots::root_for;
use crate::route::{check_packet, find_index};
use crate::{Candidate, Entry, Frame, Hop, Parsed, Tables, count_forward, partial};
use towpath_tables::Reason;
use towpath_tables::mapping::{Found, Service, Way, Words};
use towpath_tables::opaque;
use towpath_tables::record::{Family, MAPPINGS};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::link::{DoubleTagged, Link, Tagged, Untagged};
use towpath_wire::transport::{Icmp, protocol};
use towpath_wire::{Change, View, ethernet};
use zerocopy::native_endian::U16;

/// One of a header's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Source
    Source,
    /// Destination
    Destination,
}

impl End {
    /// The address that is translated on this way.
    #[inline(always)]
    const fn of(way: Way) -> Self {
        match way {
            Way::Out => Self::Source,
            Way::In => Self::Destination,
        }
    }

    /// The same in a packet that an ICMP error quotes: it went the other way.
    #[inline(always)]
    const fn quoted(way: Way) -> Self {
        match way {
            Way::Out => Self::Destination,
            Way::In => Self::Source,
        }
    }

    /// Where its port is in a transport header.
    #[inline(always)]
    const fn port(self) -> usize {
        self as usize * size_of::<U16>()
    }
}

/// A header with addresses that can be exchanged.
trait Addressed: Network + Copy {
    fn address(&self, end: End) -> Words;
    fn set_address(&mut self, end: End, address: Words);
    /// Brings the header's own checksum up to date, if it has one.
    fn follow(&mut self, change: Change);
    /// The header's checksum, if it has one, else 0
    fn checksum(&self) -> u16;
    /// Length of the header with its options; None if it is none of this family
    fn header_len(&self) -> Option<usize>;
    /// Length of the packet as it says
    fn said_len(&self) -> usize;
    /// Where the transport header of the packet at `offset` is
    fn transport<P: Passing>(&self, packet: &P, offset: usize) -> Transport;
}

/// Translates one of a header's addresses as was found. No checksum follows. None if what was found is in no table.
#[inline(always)]
fn exchange<N: Addressed, T: Tables>(tables: &T, header: &mut N, found: Found, way: Way, end: End) -> Option<()> {
    header.set_address(end, tables.apply_mapping(found, way, header.address(end))?);
    Some(())
}

/// Protocols with mappings of ports.
#[inline(always)]
fn has_services(proto: u8) -> bool {
    matches!(proto, protocol::TCP | protocol::UDP)
}

/// How addresses changed.
#[inline(always)]
fn change<N: Addressed>(before: &N, after: &N) -> Change {
    [End::Source, End::Destination].into_iter().fold(Change::default(), |change, end| {
        let (before, after) = (before.address(end), after.address(end));
        change.double_word(before[0], after[0]).double_word(before[1], after[1])
    })
}

// ---- what goes fast

/// Goes on with a packet that comes in or leaves by a port with mappings: the slot of the interface that transmits it. An
/// engine may make a function of each of the four steps; what they hand on are numbers.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    candidate: Candidate,
) -> Result<u32, Reason> {
    let inward = inward(frame, tables, entry, candidate);
    let choice = choose(frame, tables, entry, candidate, inward)?;
    let outward = outward(frame, tables, candidate, choice);
    finish(frame, tables, entry, candidate, [outward, inward], choice)
}

/// A next hop that was chosen: its sequence count in the upper half, its index in the lower one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice(pub u64);

impl Choice {
    /// The next hop, as it was when it was chosen.
    #[inline(always)]
    fn hop<T: Tables>(self, tables: &T) -> Result<Hop<'_>, Reason> {
        let hop = Hop::begin(tables.nexthop(self.0 as u32).ok_or(Reason::Internal)?).ok_or(Reason::TableBusy)?;
        if hop.sequence() == (self.0 >> 32) as u32 { Ok(hop) } else { Err(Reason::TableBusy) }
    }
}

macro_rules! by_family {
    ($candidate:expr, $do:ident($($argument:expr),*)) => {
        match $candidate.family {
            Family::V4 => $do::<Ipv4, F, T>($($argument),*),
            Family::V6 => $do::<Ipv6, F, T>($($argument),*),
        }
    };
}

/// First step: the mapping of the destination at the port that the packet came in by (`Found`), or 0.
#[inline(always)]
pub fn inward<F: Frame, T: Tables>(frame: &F, tables: &T, entry: &Entry, candidate: Candidate) -> u32 {
    by_family!(candidate, find_outer(frame, tables, entry.slot, Way::In, candidate.offset))
}

/// Second step: where it goes with that destination, if nothing is in its way.
#[inline(always)]
pub fn choose<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    entry: &Entry,
    candidate: Candidate,
    inward: u32,
) -> Result<Choice, Reason> {
    by_family!(candidate, choose_hop(frame, tables, entry, candidate.offset, inward))
}

/// Third step: the mapping of the source at the port that it leaves by, or 0.
#[inline(always)]
pub fn outward<F: Frame, T: Tables>(frame: &F, tables: &T, candidate: Candidate, choice: Choice) -> u32 {
    match choice.hop(tables) {
        Ok(hop) if hop.is_mapped() => {
            by_family!(candidate, find_outer(frame, tables, hop.port, Way::Out, candidate.offset))
        }
        _ => 0,
    }
}

/// Last step: rewrites the frame with what was found, by `Way`.
#[inline(always)]
pub fn finish<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    candidate: Candidate,
    found: [u32; 2],
    choice: Choice,
) -> Result<u32, Reason> {
    by_family!(candidate, rewrite(frame, tables, entry, candidate.offset, found, choice))
}

#[inline(always)]
fn find_outer<N: Addressed, F: Frame, T: Tables>(frame: &F, tables: &T, slot: u32, way: Way, offset: usize) -> u32 {
    let Some(header) = frame.get::<N>(offset) else { return 0 };
    let proto = header.protocol();
    let service = match frame.get::<U16>(offset + size_of::<N>() + End::of(way).port()) {
        Some(port) if has_services(proto) => Service::new(proto, port.get()),
        _ => Service::NONE,
    };
    tables.find_mapping(slot, way, N::FAMILY, header.address(End::of(way)), service).map_or(0, |found| found.0)
}

/// Exchanges an address if something was found.
#[inline(always)]
fn exchange_found<N: Addressed, T: Tables>(tables: &T, header: &mut N, found: u32, way: Way) -> Result<(), Reason> {
    if found == 0 {
        return Ok(());
    }
    exchange(tables, header, Found(found), way, End::of(way)).ok_or(Reason::Internal)
}

/// Exchanges a port if something was found that says so; adds to what changes. The transport header is at `at`.
#[inline(always)]
fn exchange_port<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    at: usize,
    found: u32,
    way: Way,
    change: Change,
) -> Result<Change, Reason> {
    let new = if found == 0 { 0 } else { tables.mapped_port(Found(found), way) };
    if new == 0 {
        return Ok(change);
    }
    let port = frame.get_mut::<U16>(at + End::of(way).port()).ok_or(Reason::Internal)?;
    let old = port.get();
    port.set(new);
    Ok(change.word(old.into(), new.into()))
}

#[inline(always)]
fn choose_hop<N: Addressed, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    entry: &Entry,
    offset: usize,
    inward: u32,
) -> Result<Choice, Reason> {
    let parsed = parse::<N, F>(frame, entry, offset)?;
    let mut header = *frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    exchange_found(tables, &mut header, inward, Way::In)?;
    header.check_scopes(entry.flags)?;
    let root = root_for::<N, T>(tables, entry.port, || header.source_words())?;
    let word = header.lookup(tables, root).map_err(|_| Reason::Internal)?;
    let index = find_index(frame, tables, &header, &parsed, word)?;
    let hop = Hop::begin(tables.nexthop(index).ok_or(Reason::Internal)?).ok_or(Reason::TableBusy)?;
    hop.check_mapped()?;
    check_packet(tables, entry, &header, &parsed, &hop)?;
    Ok(Choice(u64::from(hop.sequence()) << 32 | u64::from(index)))
}

/// Checks the headers as far as they can be checked by themselves.
#[inline(always)]
fn parse<N: Addressed, F: Frame>(frame: &F, entry: &Entry, offset: usize) -> Result<Parsed, Reason> {
    let header = frame.get::<N>(offset).ok_or(Reason::Truncated)?;
    let frame_len = frame.total_len();
    let packet_len = header.packet_len(frame_len.wrapping_sub(offset))?;
    if header.part() != Part::Whole {
        return Err(Reason::Fragment);
    }
    let at = offset + size_of::<N>();
    let proto = header.protocol();
    if proto == N::ICMP && N::icmp_quotes(frame.get::<Icmp>(at).ok_or(Reason::Truncated)?.kind) {
        return Err(Reason::Mapped);
    }
    if N::FAMILY as usize == Family::V6 as usize && is_extension(proto) {
        return Err(Reason::ExtensionHeader);
    }
    if let Some(Covered { place, .. }) = Covered::of::<N>(proto)
        && (packet_len < size_of::<N>() + place + size_of::<U16>() || frame.get::<U16>(at + place).is_none())
    {
        return Err(Reason::Truncated);
    }
    if entry.may_be_partial() {
        partial::check(frame, header, offset, packet_len)?;
    }
    // A verifier has come here by many ways, each with other knowledge of these numbers.
    let forget = |number: usize| F::forget(number as u32) as usize;
    Ok(Parsed {
        family: N::FAMILY,
        offset: opaque(forget(offset)) % 32,
        packet_len: forget(packet_len),
        frame_len: forget(frame_len),
        several: forget(usize::from(frame_len != frame.first_len())) != 0,
    })
}

#[inline(always)]
fn rewrite<N: Addressed, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    offset: usize,
    found: [u32; 2],
    choice: Choice,
) -> Result<u32, Reason> {
    let hop = choice.hop(tables)?;
    let parsed = Parsed::again(frame, offset)?;
    hop.check_device(tables, &parsed)?;
    match hop.tags() {
        0 => write::<Untagged, N, F, T>(frame, tables, &parsed, &hop, found)?,
        1 => write::<Tagged, N, F, T>(frame, tables, &parsed, &hop, found)?,
        2 => write::<DoubleTagged, N, F, T>(frame, tables, &parsed, &hop, found)?,
        _ => return Err(Reason::Internal),
    }
    if tables.counts() {
        hop.mark_hit();
        for (way, found) in [Way::Out, Way::In].into_iter().zip(found) {
            if found != 0 {
                count(tables, Found(found), way, 1, parsed.packet_len as u64);
            }
        }
    }
    count_forward(tables, entry.slot, &parsed, &hop);
    Ok(hop.device)
}

#[inline(always)]
fn write<L: Link, N: Addressed, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    parsed: &Parsed,
    hop: &Hop,
    found: [u32; 2],
) -> Result<(), Reason> {
    let before = *frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    let mut header = before;
    exchange_found(tables, &mut header, found[Way::In as usize], Way::In)?;
    exchange_found(tables, &mut header, found[Way::Out as usize], Way::Out)?;
    let change = change(&before, &header);
    header.follow(change);
    header.decrement();
    let link = hop.link::<L>(N::ETHERTYPE).ok_or(Reason::TableBusy)?;
    if !fit(frame, parsed, size_of::<L>())? {
        return Ok(());
    }
    let at = size_of::<L>() + size_of::<N>();
    if let Some(Covered { place, zero_is_none }) = Covered::of::<N>(header.protocol()) {
        let mut change = change;
        for way in [Way::Out, Way::In] {
            change = exchange_port(frame, tables, at, found[way as usize], way, change)?;
        }
        let checksum = frame.get_mut::<U16>(at + place).ok_or(Reason::Internal)?;
        checksum.set(changed(checksum.get(), change, zero_is_none));
    }
    *frame.get_mut::<N>(size_of::<L>()).ok_or(Reason::Internal)? = header;
    *frame.get_mut::<L>(0).ok_or(Reason::Internal)? = link;
    Ok(())
}

/// A checksum that covers the addresses of the IP header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Covered {
    /// Where it is in the transport header
    place: usize,
    /// There is none if it is 0
    zero_is_none: bool,
}

impl Covered {
    /// Of a protocol: TCP, UDP, UDP-Lite, DCCP and ICMPv6 have one (RFC 9293, 768, 3828, 4340, 4443).
    #[inline(always)]
    fn of<N: Network>(proto: u8) -> Option<Self> {
        let place = match proto {
            protocol::TCP => 16,
            protocol::UDP | protocol::UDP_LITE | protocol::DCCP => 6,
            protocol::ICMPV6 if N::FAMILY as usize == Family::V6 as usize => 2,
            _ => return None,
        };
        Some(Self { place, zero_is_none: proto == protocol::UDP })
    }
}

/// What becomes of a checksum.
#[inline(always)]
pub(crate) fn changed(checksum: u16, change: Change, zero_is_none: bool) -> u16 {
    if !zero_is_none {
        return change.apply(checksum);
    }
    match (checksum, change.apply(checksum)) {
        (0, _) => 0,
        (_, 0) => 0xffff,
        (_, changed) => changed,
    }
}

#[inline(always)]
fn is_extension(proto: u8) -> bool {
    use protocol::*;
    matches!(proto, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | MOBILITY)
}

/// Counts translated packets.
#[inline(always)]
fn count<T: Tables>(tables: &T, found: Found, way: Way, packets: u64, bytes: u64) {
    if let Some(all) = tables.mapping_stats(tables.cpu()) {
        let counters = &all[opaque(found.mapping()) % MAPPINGS];
        counters.packets[way as usize].add(packets);
        counters.bytes[way as usize].add(bytes);
    }
}

#[inline(always)]
fn count_dropped<T: Tables>(tables: &T, found: Found, way: Way) {
    if let Some(all) = tables.mapping_stats(tables.cpu()) {
        all[opaque(found.mapping()) % MAPPINGS].dropped[way as usize].add(1);
    }
}

// ---- what Linux receives and transmits

/// A view read out of a packet, where a BPF program's stack can have it: that knows no access out of line.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Held<T>(pub T);

/// A packet that Linux has received by an interface, or is to transmit by one. Offsets count from its IP header.
pub trait Passing {
    /// The bytes there; None if there are not so many.
    fn load<T: View>(&self, offset: usize) -> Option<Held<T>>;
    /// Puts other bytes there; false if that could not be done.
    fn store<T: View>(&mut self, offset: usize, bytes: &T) -> bool;
    /// Brings a transport checksum up to date after a change of addresses that it covers, whether it is complete or left to
    /// a device; `zero_is_none`: there is none if it is 0. False if it could not be done.
    fn cover(&mut self, offset: usize, change: Change, zero_is_none: bool) -> bool;
    /// Puts another port, as on the wire, there, and brings up to date the transport checksum at `checksum`, which covers
    /// it: not if it is left to a device, nor if there is none. False if that could not be done.
    fn set_port(&mut self, offset: usize, port: u16, checksum: usize, zero_is_none: bool) -> bool;
    /// The EtherType of the packet
    fn ethertype(&self) -> u16;
    /// Whether it is of a VLAN, and so passes another port
    fn is_tagged(&self) -> bool;
    /// Index of the interface
    fn interface(&self) -> u32;
    /// Packets that this is made of
    fn segments(&self) -> u64;
    /// As `Frame::forget`
    #[inline(always)]
    fn forget(number: u32) -> u32 {
        number
    }
}

/// What becomes of a packet of Linux's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It goes on
    Pass,
    /// It cannot be translated as a whole
    Drop,
}

/// Where a packet's transport header is: the protocol in the third byte and the place in the two below, and one of those beneath.
/// A number, of which a verifier need not know anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Transport(u32);

impl Transport {
    /// The rest of it is in other fragments
    const FRAGMENT: u32 = 1 << 29;
    /// In another fragment, or cut off: there is no place
    const ELSEWHERE: u32 = 1 << 30;
    /// Behind more extension headers than are looked at
    const UNKNOWN: Self = Self(1 << 31);

    #[inline(always)]
    const fn new(proto: u8, at: usize, flags: u32) -> Self {
        Self(flags | (proto as u32) << 16 | at as u32 & 0xffff)
    }

    /// Flags for a fragment header's field, or IPv4's, by its parts.
    #[inline(always)]
    const fn flags(more: bool, is_first: bool) -> u32 {
        match (more, is_first) {
            (_, false) => Self::FRAGMENT | Self::ELSEWHERE,
            (true, true) => Self::FRAGMENT,
            (false, true) => 0,
        }
    }

    /// The protocol and the place, if they are known.
    #[inline(always)]
    fn at(self) -> Option<(u8, usize)> {
        (self.0 >> 30 == 0).then_some(((self.0 >> 16) as u8, opaque(self.0 as usize) % 0x1_0000))
    }

    /// What is known of a packet's port at an end.
    #[inline(always)]
    fn service<P: Passing>(self, packet: &P, end: End) -> Service {
        let proto = (self.0 >> 16) as u8;
        if self == Self::UNKNOWN || is_extension(proto) {
            return Service::UNKNOWN;
        }
        if !has_services(proto) {
            return Service::NONE;
        }
        match self.at().and_then(|(_, at)| packet.load::<U16>(at + end.port())) {
            Some(port) => Service::new(proto, port.0.get()),
            None => Service::of_protocol(proto),
        }
    }

    /// As `service`, of a packet that passes itself: of its fragments, none is translated if one could not be.
    #[inline(always)]
    fn service_of_whole<P: Passing>(self, packet: &P, end: End) -> Service {
        let elsewhere = if self.0 & Self::FRAGMENT != 0 { Self::ELSEWHERE } else { 0 };
        Self(self.0 | elsewhere).service(packet, end)
    }
}

/// Translates a packet that passes an interface, if there are mappings for it.
#[inline(always)]
pub fn translate<P: Passing, T: Tables>(packet: &mut P, tables: &T, way: Way) -> Fate {
    let slot = match packet.is_tagged() {
        true => None,
        false => crate::accept::slot_of(tables, packet.interface()),
    };
    let Some(slot) = slot.map(P::forget) else { return Fate::Pass };
    match packet.ethertype() {
        ethernet::IPV4 => translate_packet::<Ipv4, P, T>(packet, tables, slot, way),
        ethernet::IPV6 => translate_packet::<Ipv6, P, T>(packet, tables, slot, way),
        _ => Fate::Pass,
    }
}

#[inline(always)]
fn translate_packet<N: Addressed, P: Passing, T: Tables>(packet: &mut P, tables: &T, slot: u32, way: Way) -> Fate {
    let Some(header) = packet.load::<N>(0).filter(|header| header.0.header_len().is_some()) else { return Fate::Pass };
    let bytes = header.0.said_len() as u64;
    let transport = Transport(P::forget(header.0.transport(packet, 0).0));
    let message = transport.at().filter(|(proto, _)| *proto == N::ICMP).map_or(0, |(_, at)| at);
    let quoted = if message == 0 { 0 } else { find_quoted::<N, P, T>(packet, tables, slot, way, message) };
    let address = header.0.address(End::of(way));
    // An error about a mapping of a port concerns its address; nothing else in it would say so.
    let outer = if quoted != 0 && tables.maps(Found(quoted), way, address) {
        quoted
    } else {
        let service = transport.service_of_whole(packet, End::of(way));
        tables.find_mapping(slot, way, N::FAMILY, address, service).map_or(0, |found| found.0)
    };
    let outer = P::forget(outer);
    let mut done = outer == 0 || write_outer::<N, P, T>(packet, tables, Found(outer), transport, way);
    if quoted != 0 && done {
        done = translate_quoted::<N, P, T>(packet, tables, Found(quoted), way, message);
    }
    let found = P::forget(if outer != 0 { outer } else { quoted });
    if found == 0 {
        return Fate::Pass;
    }
    if !done {
        count_dropped(tables, Found(found), way);
        return Fate::Drop;
    }
    count(tables, Found(found), way, packet.segments(), bytes);
    Fate::Pass
}

/// Translates a packet's header, and its port if the mapping is of one. False if that could not be done.
#[inline(always)]
fn write_outer<N: Addressed, P: Passing, T: Tables>(
    packet: &mut P,
    tables: &T,
    found: Found,
    transport: Transport,
    way: Way,
) -> bool {
    if found.is_guess() || transport == Transport::UNKNOWN {
        return false;
    }
    let (Some(before), end) = (packet.load::<N>(0), End::of(way)) else { return false };
    let mut header = before;
    if exchange(tables, &mut header.0, found, way, end).is_none() {
        return false;
    }
    let change = change(&before.0, &header.0);
    header.0.follow(change);
    let covered = transport.at().and_then(|(proto, at)| Some((proto, at, Covered::of::<N>(proto)?)));
    if let Some((proto, at, Covered { place, zero_is_none })) = covered {
        if packet.load::<U16>(at + place).is_some() && !packet.cover(at + place, change, zero_is_none) {
            return false;
        }
        let port = tables.mapped_port(found, way);
        let has_port = port != 0 && has_services(proto);
        if has_port && !packet.set_port(at + end.port(), port, at + place, zero_is_none) {
            return false;
        }
    }
    packet.store(0, &header.0)
}

/// The mapping that a packet has that an ICMP error quotes: `Found`, or 0. The ICMP header is at `icmp`.
#[inline(always)]
fn find_quoted<N: Addressed, P: Passing, T: Tables>(packet: &P, tables: &T, slot: u32, way: Way, icmp: usize) -> u32 {
    let quoted = match packet.load::<Icmp>(icmp) {
        Some(header) if N::icmp_quotes(header.0.kind) => packet.load::<N>(icmp + size_of::<Icmp>()),
        _ => None,
    };
    let Some(header) = quoted.filter(|header| header.0.header_len().is_some()) else { return 0 };
    let end = End::quoted(way);
    let transport = Transport(P::forget(header.0.transport(packet, icmp + size_of::<Icmp>()).0));
    let service = transport.service(packet, end);
    P::forget(tables.find_mapping(slot, way, N::FAMILY, header.0.address(end), service).map_or(0, |found| found.0))
}

/// Translates the packet that an ICMP error quotes: its header, its port if the mapping is of one, its transport's checksum if
/// that is quoted, and the ICMP checksum over all. False if that could not be done.
#[inline(always)]
fn translate_quoted<N: Addressed, P: Passing, T: Tables>(
    packet: &mut P,
    tables: &T,
    found: Found,
    way: Way,
    icmp: usize,
) -> bool {
    let offset = icmp + size_of::<Icmp>();
    let (Some(before), end) = (packet.load::<N>(offset), End::quoted(way)) else { return false };
    let mut header = before;
    if found.is_guess() || exchange(tables, &mut header.0, found, way, end).is_none() {
        return false;
    }
    let mut covered = change(&before.0, &header.0);
    header.0.follow(covered);
    let transport = Transport(P::forget(before.0.transport(packet, offset).0));
    let mut change = covered.word(before.0.checksum().into(), header.0.checksum().into());
    let port = tables.mapped_port(found, way);
    if port != 0 {
        let place = transport.at().map_or(0, |(_, at)| at) + end.port();
        let Some(old) = packet.load::<U16>(place) else { return false };
        covered = covered.word(old.0.get().into(), port.into());
        change = change.word(old.0.get().into(), port.into());
        if !packet.store(place, &Held(U16::new(port)).0) {
            return false;
        }
    }
    if let Some((proto, at)) = transport.at()
        && let Some(Covered { place, zero_is_none }) = Covered::of::<N>(proto)
        && let Some(old) = packet.load::<U16>(at + place)
    {
        let new = changed(old.0.get(), covered, zero_is_none);
        change = change.word(old.0.get().into(), new.into());
        if !packet.store(at + place, &Held(U16::new(new)).0) {
            return false;
        }
    }
    if !packet.store(offset, &header.0) {
        return false;
    }
    let Some(mut message) = packet.load::<Icmp>(icmp) else { return false };
    message.0.checksum.set(change.apply(message.0.checksum.get()));
    packet.store(icmp, &message.0)
}

impl Addressed for Ipv4 {
    #[inline(always)]
    fn address(&self, end: End) -> Words {
        let address = match end {
            End::Source => self.source,
            End::Destination => self.destination,
        };
        let words: [u8; 8] = zerocopy::transmute!([address, [0; 4]]);
        [u64::from_ne_bytes(words), 0]
    }

    #[inline(always)]
    fn set_address(&mut self, end: End, [address, _]: Words) {
        let [address, _]: [[u8; 4]; 2] = zerocopy::transmute!(address);
        match end {
            End::Source => self.source = address,
            End::Destination => self.destination = address,
        }
    }

    #[inline(always)]
    fn follow(&mut self, change: Change) {
        self.checksum.set(change.apply(self.checksum.get()));
    }

    #[inline(always)]
    fn checksum(&self) -> u16 {
        self.checksum.get()
    }

    #[inline(always)]
    fn header_len(&self) -> Option<usize> {
        let len = usize::from(self.version_ihl & 15) * 4;
        (self.version_ihl >> 4 == 4 && len >= size_of::<Self>()).then_some(len)
    }

    #[inline(always)]
    fn said_len(&self) -> usize {
        self.total_len.get().into()
    }

    #[inline(always)]
    fn transport<P: Passing>(&self, _packet: &P, offset: usize) -> Transport {
        let at = offset + usize::from(self.version_ihl & 15) * 4;
        let fragment = self.fragment.get();
        let flags = Transport::flags(fragment & Ipv4::MORE_FRAGMENTS != 0, fragment & Ipv4::OFFSET == 0);
        Transport::new(self.protocol, at, flags)
    }
}

/// Extension headers of a packet that are looked at.
const EXTENSIONS: usize = 6;

impl Addressed for Ipv6 {
    #[inline(always)]
    fn address(&self, end: End) -> Words {
        match end {
            End::Source => zerocopy::transmute!(self.source),
            End::Destination => zerocopy::transmute!(self.destination),
        }
    }

    #[inline(always)]
    fn set_address(&mut self, end: End, address: Words) {
        match end {
            End::Source => self.source = zerocopy::transmute!(address),
            End::Destination => self.destination = zerocopy::transmute!(address),
        }
    }

    #[inline(always)]
    fn follow(&mut self, _: Change) {}

    #[inline(always)]
    fn checksum(&self) -> u16 {
        0
    }

    #[inline(always)]
    fn header_len(&self) -> Option<usize> {
        (self.version() == 6).then_some(size_of::<Self>())
    }

    #[inline(always)]
    fn said_len(&self) -> usize {
        size_of::<Self>() + usize::from(self.payload_len.get())
    }

    #[inline(always)]
    fn transport<P: Passing>(&self, packet: &P, offset: usize) -> Transport {
        let mut transport = Transport::new(self.next_header, offset + size_of::<Self>(), 0);
        for _ in 0..EXTENSIONS {
            // A verifier would go on from here once for each kind of header.
            transport = Transport(P::forget(transport.0));
            let Some((proto, at)) = transport.at().filter(|(proto, _)| is_extension(*proto)) else { return transport };
            let Some(Held([next, len, high, low])) = packet.load::<[u8; 4]>(at) else {
                return Transport(transport.0 | Transport::ELSEWHERE);
            };
            let is_fragment = proto == protocol::FRAGMENT;
            let place = u16::from_be_bytes([high, low]);
            let flags = if is_fragment { Transport::flags(place & 1 != 0, place >> 3 == 0) } else { 0 };
            let len = if is_fragment { 8 } else { (usize::from(len) + 1) * 8 };
            transport = Transport::new(next, at + len, flags | transport.0 & Transport::FRAGMENT);
        }
        Transport::UNKNOWN
    }
}
