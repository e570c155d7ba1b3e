//! Flows: what passes although rules or connection tracking are on its way, since it is of a connection that Linux handed
//! over, and Linux has accepted a packet of the same direction, from and to the same ports, since the rules changed.
//!
//! A packet arrives as one of the connection's tuples and leaves as the inverse of the other one. Linux chooses the way
//! between the translation of the destination and that of the source (prerouting, postrouting), and so is the way looked up
//! here. What the flowtable of netfilter leaves to the stack (6.1, net/netfilter/nf_flow_table_ip.c: fragments, options,
//! packets that do not fit, FIN and RST) is an exception here, too, and so is what connection tracking calls invalid by
//! itself (net/netfilter/nf_conntrack_proto_{tcp,udp}.c), but for checksums and windows.

use crate::network::{Network, Part};
use crate::rewrite::fit;
use crate::roots::root_for;
use crate::route::{check_packet, find_hop};
use crate::{Candidate, Entry, Frame, Hop, Parsed, Tables, count_forward, partial};
use core::mem::offset_of;
use towpath_tables::flow::{Direction, Key, acceptance, is_open, is_watched};
use towpath_tables::record::{Family, Flow, flow_state};
use towpath_tables::{Reason, opaque};
use towpath_wire::Change;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::link::{DoubleTagged, Link, Tagged, Untagged};
use towpath_wire::transport::{Ports, Tcp, Udp, protocol};
use zerocopy::native_endian::U64;

/// Goes on with a packet that may pass if it is of a flow: the slot of the interface that transmits it.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    candidate: Candidate,
) -> Result<u32, Reason> {
    match candidate.family {
        Family::V4 => forward_packet::<Ipv4, 1, F, T>(frame, tables, entry, candidate),
        Family::V6 => forward_packet::<Ipv6, 4, F, T>(frame, tables, entry, candidate),
    }
}

#[inline(always)]
fn forward_packet<N: Translated<WORDS>, const WORDS: usize, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    candidate: Candidate,
) -> Result<u32, Reason> {
    let (parsed, key, turn) = parse::<N, WORDS, F>(frame, entry, candidate)?;
    let found = tables.find_flow(&key).ok_or(Reason::FlowNew)?;
    let (flow, direction) = (tables.flow(found.index()).ok_or(Reason::Internal)?, found.direction());
    let way = check_flow::<N, T>(tables, entry, flow, direction, turn)?;
    let leaving = Leaving { flow, direction };
    let hop = route::<N, WORDS, F, T>(frame, tables, entry, &parsed, leaving)?;
    if hop.port.wrapping_add(1) != way {
        return Err(Reason::FlowWaiting);
    }
    hop.check_device(tables, &parsed)?;
    match hop.tags() {
        0 => write::<Untagged, N, WORDS, F>(frame, &parsed, &hop, leaving)?,
        1 => write::<Tagged, N, WORDS, F>(frame, &parsed, &hop, leaving)?,
        2 => write::<DoubleTagged, N, WORDS, F>(frame, &parsed, &hop, leaving)?,
        _ => return Err(Reason::Internal),
    }
    if tables.counts() {
        hop.mark_hit();
        let counters = &flow.counters[place(direction)];
        counters.packets.add(1);
        counters.bytes.add(parsed.packet_len as u64);
    }
    count_forward(tables, entry.slot, &parsed, &hop);
    Ok(hop.device)
}

/// What a verifier can see to be one of two.
#[inline(always)]
fn place(direction: Direction) -> usize {
    opaque(direction as usize) % 2
}

/// How a TCP segment ends or begins a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Turn {
    /// Not at all
    None,
    /// SYN
    Begin,
    /// FIN
    Finish,
    /// RST
    Reset,
}

/// Checks the headers as far as they can be checked by themselves; the packet's tuple.
#[inline(always)]
fn parse<N: Translated<WORDS>, const WORDS: usize, F: Frame>(
    frame: &F,
    entry: &Entry,
    candidate: Candidate,
) -> Result<(Parsed, Key<WORDS>, Turn), Reason> {
    let Candidate { family, offset, reason } = candidate;
    let header = frame.get::<N>(offset).ok_or(Reason::Truncated)?;
    let frame_len = frame.total_len();
    let packet_len = header.packet_len(frame_len.wrapping_sub(offset))?;
    if header.part() != Part::Whole {
        return Err(Reason::Fragment);
    }
    let (at, len) = (offset + size_of::<N>(), packet_len - size_of::<N>());
    let turn = match header.protocol() {
        protocol::TCP => check_tcp(frame.get::<Tcp>(at).ok_or(Reason::Truncated)?, len)?,
        protocol::UDP => check_udp(frame.get::<Udp>(at).ok_or(Reason::Truncated)?, len)?,
        _ => return Err(reason),
    };
    if entry.may_be_partial() {
        partial::check(frame, header, offset, packet_len)?;
    }
    let ports = frame.get::<Ports>(at).ok_or(Reason::Truncated)?.word();
    let key = Key { addresses: header.addresses(), ports, kind: Key::<WORDS>::kind(header.protocol()) };
    Ok((Parsed { family, offset, packet_len, frame_len, several: frame_len != frame.first_len() }, key, turn))
}

/// The tuple that packets of a flow's direction leave with. It is read word by word where it is wanted: as a whole it would
/// take much of a BPF program's stack.
#[derive(Clone, Copy)]
struct Leaving<'t> {
    flow: &'t Flow,
    direction: Direction,
}

impl Leaving<'_> {
    /// Of the addresses, of which there are so many words.
    #[inline(always)]
    fn word<const WORDS: usize>(&self, at: usize) -> u64 {
        let word = self.flow.addresses[place(self.direction.other())][(at + WORDS / 2) % WORDS].load();
        if WORDS == 1 { word.rotate_left(32) } else { word }
    }

    #[inline(always)]
    fn ports(&self) -> u32 {
        self.flow.ports[place(self.direction.other())].load().rotate_left(16)
    }
}

#[inline(always)]
fn check_tcp(tcp: &Tcp, len: usize) -> Result<Turn, Reason> {
    if tcp.header_len() < Tcp::MIN || tcp.header_len() > len {
        return Err(Reason::Truncated);
    }
    let control = tcp.control();
    if control & Tcp::RST != 0 {
        return Ok(Turn::Reset);
    }
    if control & Tcp::FIN != 0 {
        return Ok(Turn::Finish);
    }
    match control & (Tcp::SYN | Tcp::ACK) {
        Tcp::ACK => Ok(Turn::None),
        0 => Err(Reason::FlowNew),
        _ => Ok(Turn::Begin),
    }
}

#[inline(always)]
fn check_udp(udp: &Udp, len: usize) -> Result<Turn, Reason> {
    let said = usize::from(udp.len.get());
    if said < size_of::<Udp>() || said > len { Err(Reason::Truncated) } else { Ok(Turn::None) }
}

/// What `Flow::accepted` has for packets of a family that come in here.
#[inline(always)]
fn arrival<N: Network>(entry: &Entry) -> u32 {
    match entry.port.arrival[N::FAMILY as usize].load() {
        0 => entry.slot,
        vrf => vrf,
    }
}

/// Whether a flow's packet may pass; 1 + the slot of the port that it must leave by.
#[inline(always)]
fn check_flow<N: Network, T: Tables>(
    tables: &T,
    entry: &Entry,
    flow: &Flow,
    direction: Direction,
    turn: Turn,
) -> Result<u32, Reason> {
    let seen = match turn {
        Turn::None | Turn::Begin => 0,
        Turn::Reset => flow_state::CLOSED,
        Turn::Finish => flow_state::CLOSED | flow_state::FINISHED,
    };
    if seen != 0 && tables.counts() {
        flow.state.set(seen);
    }
    if turn != Turn::None || flow.state.load() & flow_state::CLOSED != 0 {
        return Err(Reason::FlowClosing);
    }
    let config = tables.config().ok_or(Reason::Internal)?;
    let generation = config.flow_generation.load();
    let accepted = flow.accepted[place(direction)].load();
    if !is_open(generation) || accepted >> 16 != acceptance(generation, arrival::<N>(entry), 0) >> 16 {
        return Err(Reason::FlowWaiting);
    }
    if !is_watched(config.heartbeat.load(), tables.now()) {
        return Err(Reason::FlowUnwatched);
    }
    Ok(accepted as u32 & 0xffff)
}

/// The way of a packet whose destination is translated already, and whose source is not yet.
#[inline(always)]
fn route<'t, N: Translated<WORDS>, const WORDS: usize, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
    leaving: Leaving,
) -> Result<Hop<'t>, Reason> {
    let mut header = *frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    header.set_destination(leaving);
    header.check_scopes(entry.flags)?;
    let root = root_for::<N, T>(tables, entry.port, || header.source_words())?;
    let word = header.lookup(tables, root).map_err(|_| Reason::Internal)?;
    let hop = find_hop(frame, tables, &header, parsed, word)?;
    hop.check()?;
    if hop.is_tunnel() {
        return Err(Reason::Tunnel);
    }
    check_packet(tables, entry, &header, parsed, &hop)?;
    Ok(hop)
}

#[inline(always)]
fn write<L: Link, N: Translated<WORDS>, const WORDS: usize, F: Frame>(
    frame: &mut F,
    parsed: &Parsed,
    hop: &Hop,
    leaving: Leaving,
) -> Result<(), Reason> {
    let link = hop.link::<L>(N::ETHERTYPE).ok_or(Reason::TableBusy)?;
    if !fit(frame, parsed, size_of::<L>())? {
        return Ok(());
    }
    translate::<N, WORDS, F>(frame, size_of::<L>(), leaving)?;
    frame.get_mut::<N>(size_of::<L>()).ok_or(Reason::Internal)?.decrement();
    *frame.get_mut::<L>(0).ok_or(Reason::Internal)? = link;
    Ok(())
}

/// Changes addresses and ports, and brings checksums up to date as Linux does (6.1, net/netfilter/nf_nat_proto.c).
#[inline(always)]
fn translate<N: Translated<WORDS>, const WORDS: usize, F: Frame>(
    frame: &mut F,
    at: usize,
    leaving: Leaving,
) -> Result<(), Reason> {
    let mut change = Change::default();
    let mut differs = 0;
    let addresses = frame.get_mut::<[U64; WORDS]>(at + N::ADDRESSES).ok_or(Reason::Internal)?;
    for (word, address) in addresses.iter_mut().enumerate() {
        let (old, new) = (address.get(), leaving.word::<WORDS>(word));
        change = change.double_word(old, new);
        differs |= old ^ new;
        address.set(new);
    }
    let header = frame.get_mut::<N>(at).ok_or(Reason::Internal)?;
    if differs != 0 {
        header.follow(change);
    }
    let (protocol, at) = (header.protocol(), at + size_of::<N>());
    let ports = frame.get_mut::<Ports>(at).ok_or(Reason::Internal)?;
    let (old, new) = (ports.word(), leaving.ports());
    *ports = Ports::of(new);
    if differs == 0 && old == new {
        return Ok(());
    }
    let change = change.word(old, new);
    match protocol {
        protocol::TCP => {
            let tcp = frame.get_mut::<Tcp>(at).ok_or(Reason::Internal)?;
            tcp.checksum.set(change.apply(tcp.checksum.get()));
        }
        _ => {
            let udp = frame.get_mut::<Udp>(at).ok_or(Reason::Internal)?;
            match (udp.checksum.get(), change.apply(udp.checksum.get())) {
                (0, _) => {}
                (_, 0) => udp.checksum.set(0xffff),
                (_, changed) => udp.checksum.set(changed),
            }
        }
    }
    Ok(())
}

/// A header with addresses of so many words, source and destination together.
trait Translated<const WORDS: usize>: Network + Copy {
    /// Where they begin in it
    const ADDRESSES: usize;
    fn addresses(&self) -> [u64; WORDS];
    /// Sets the destination; no checksum follows.
    fn set_destination(&mut self, leaving: Leaving);
    /// Brings the header's own checksum up to date, if it has one.
    fn follow(&mut self, change: Change);
}

impl Translated<1> for Ipv4 {
    const ADDRESSES: usize = offset_of!(Self, source);

    #[inline(always)]
    fn addresses(&self) -> [u64; 1] {
        zerocopy::transmute!([self.source, self.destination])
    }

    #[inline(always)]
    fn set_destination(&mut self, leaving: Leaving) {
        let [_, destination]: [[u8; 4]; 2] = zerocopy::transmute!(leaving.word::<1>(0));
        self.destination = destination;
    }

    #[inline(always)]
    fn follow(&mut self, change: Change) {
        self.checksum.set(change.apply(self.checksum.get()));
    }
}

impl Translated<4> for Ipv6 {
    const ADDRESSES: usize = offset_of!(Self, source);

    #[inline(always)]
    fn addresses(&self) -> [u64; 4] {
        let words: &[U64; 5] = zerocopy::transmute_ref!(self);
        let [_, a, b, c, d] = words;
        [a.get(), b.get(), c.get(), d.get()]
    }

    #[inline(always)]
    fn set_destination(&mut self, leaving: Leaving) {
        let words: &mut [U64; 5] = zerocopy::transmute_mut!(self);
        let [_, _, _, c, d] = words;
        c.set(leaving.word::<4>(2));
        d.set(leaving.word::<4>(3));
    }

    #[inline(always)]
    fn follow(&mut self, _: Change) {}
}
