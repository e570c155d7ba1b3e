//! Tunnels: GRE over IPv4 and IPv6 (RFC 2784, RFC 7676, keys of RFC 2890), as Linux's tunnel interfaces have it (6.1,
//! net/ipv4/{gre_demux,ip_gre,ip_tunnel,ip_tunnel_core}.c, net/ipv6/{ip6_gre,ip6_tunnel}.c, include/net/gre.h).
//!
//! A packet to the router itself that is one of a tunnel's is looked *through*: what is inside is routed as what came in
//! by the tunnel. Only if that ends in sending it are the outer headers cut off. Otherwise the packet is Linux's as it
//! arrived, and Linux finds out by itself what is inside. In the other direction a next hop may be a tunnel; then the
//! outer headers are made, their destination is looked up, and they are written once all is decided.

mod inner;
mod outer;

use crate::network::Part;
use crate::rewrite::fit;
use crate::stats::{count_into_tunnel, count_out_of_tunnel, count_received};
use crate::{Entry, Frame, Hop, Parsed, Refusal, Stop, Tables, hash, ingress, rewrite, route};
use inner::{ECN, Inner};
use outer::{Outer, limit};
use towpath_tables::lpm::{Kind, Word};
use towpath_tables::record::{
    Config, Family, PORT_SLOTS, TUNNEL_BUCKETS, TUNNEL_PROBES, Tunnel, tunnel_bucket, tunnel_flags,
};
use towpath_tables::{Reason, opaque, order};
use towpath_wire::Sum;
use towpath_wire::ethernet;
use towpath_wire::gre::Gre;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::{EncapsulationLimit, Ipv6};
use towpath_wire::link::{DoubleTagged, Link, Tagged, Untagged};
use zerocopy::{byteorder::network_endian::U16, native_endian};

/// No packet in a tunnel begins farther behind, tags and all.
const FARTHEST: usize = 0x7f;
/// A word of a GRE header, as on the wire
type Word32 = native_endian::U32;

/// Explicit congestion notification (RFC 3168)
const ECT_0: u8 = 2;

/// What was found inside of a packet: bits 8..16 are the slot of the tunnel that it came out of, bits 0..8 the place of its
/// header. One number, so that the ways to it can meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Inside(pub u32);

/// A packet that is to go into a tunnel: bits 0..8 are the place of its header, 8..16 the slot of the port that the frame came in
/// by, 16..24 that of the tunnel that it came out of, or the same again, 24..32 that of the tunnel that it goes into, and 32..48
/// the folded sum over it if packets into that bear one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entering(pub u64);

/// Where a packet is that `route` refused.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// At this router, maybe with another one inside
    Outside(Parsed),
    /// Found inside of another
    Inside(Inside),
    /// Before the tunnel in this slot
    Before(u32, Parsed),
}

/// What a packet in or before a tunnel comes to.
#[derive(Clone, Copy, Debug)]
pub enum Turn {
    /// It was sent by the interface in this slot
    Sent(u32),
    /// It goes into a tunnel over IPv6
    Enters(Entering),
}

impl Place {
    /// Of a packet that was refused so; Err if tunnels have nothing to do with it.
    #[inline(always)]
    pub fn of(refusal: Refusal, parsed: &Parsed) -> Result<Self, Reason> {
        match refusal {
            Refusal::Into(slot) if slot < PORT_SLOTS => Ok(Self::Before(slot, *parsed)),
            Refusal::Into(_) => Err(Reason::Internal),
            Refusal::Exception(Reason::LocalDestination) => Ok(Self::Outside(*parsed)),
            Refusal::Exception(reason) => Err(reason),
        }
    }
}

/// Goes on with a packet that `route` refused, if a tunnel is the cause: the slot of the interface that transmits it. An engine
/// may make the three steps functions of their own.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    parsed: &Parsed,
    refusal: Refusal,
) -> Result<u32, Reason> {
    let place = match Place::of(refusal, parsed)? {
        Place::Outside(outer) if outer.family == Family::V6 => {
            Place::Inside(look_through6(frame, tables, entry, &outer)?)
        }
        place => place,
    };
    match advance(frame, tables, entry, place)? {
        Turn::Sent(device) => Ok(device),
        Turn::Enters(entering) => enter6(frame, tables, entering),
    }
}

/// Takes a packet on to where it leaves the router, unless that is a tunnel over IPv6. Such are looked through before.
#[inline(always)]
pub fn advance<F: Frame, T: Tables>(frame: &mut F, tables: &T, entry: &Entry, place: Place) -> Result<Turn, Reason> {
    let inside = match place {
        Place::Before(..) => None,
        Place::Inside(inside) => Some(inside),
        Place::Outside(outer) => Some(look_through::<Ipv4, F, T>(frame, tables, entry, &outer)?),
    };
    let (from, inner) = match (inside, place) {
        (Some(inside), _) => resume(frame, tables, inside)?,
        (None, Place::Before(_, parsed)) => (*entry, parsed),
        (None, _) => return Err(Reason::Internal),
    };
    let routed = match place {
        Place::Before(into, _) => Err(Refusal::Into(into)),
        _ => route(frame, tables, &from, &inner),
    };
    match routed {
        // Out of a tunnel, since what goes into one was routed before.
        Ok(hop) => {
            rewrite(frame, &inner, &hop)?;
            hop.mark_hit();
            count_out_of_tunnel(tables, entry.slot, &inner, &hop, from.slot);
            Ok(Turn::Sent(hop.device))
        }
        Err(Refusal::Into(into)) if into < PORT_SLOTS => {
            enter(frame, tables, Entering::new(into, from.slot, entry.slot, &inner), &inner)
        }
        Err(Refusal::Into(_)) => Err(Reason::Internal),
        Err(Refusal::Exception(reason)) => Err(reason),
    }
}

impl Entering {
    /// A packet before a tunnel, of slots that there are. One number, which takes less room while nobody asks for them.
    #[inline(always)]
    fn new(into: u32, from: u32, device: u32, parsed: &Parsed) -> Self {
        Self((into << 24 | from << 16 | device << 8 | parsed.offset as u32).into())
    }

    #[inline(always)]
    fn with_sum(self, sum: Sum) -> Self {
        Self(self.0 | u64::from(sum.fold()) << 32)
    }

    #[inline(always)]
    fn into(self) -> u32 {
        self.0 as u32 >> 24
    }

    #[inline(always)]
    fn sum(self) -> Sum {
        Sum::default().folded((self.0 >> 32) as u16)
    }

    /// The slots of the port that the frame came in by, of the tunnel that the packet came out of, and of the other one
    #[inline(always)]
    fn slots(self) -> [u32; 3] {
        let what = opaque(self.0 as usize) as u32;
        [what >> 8 & 0xff, what >> 16 & 0xff, what >> 24]
    }
}

/// Sends a packet into the tunnel in a slot, unless that is over IPv6.
#[inline(always)]
fn enter<F: Frame, T: Tables>(frame: &mut F, tables: &T, entering: Entering, parsed: &Parsed) -> Result<Turn, Reason> {
    let flags = tables.port(entering.into()).ok_or(Reason::Internal)?.tunnel.flags.load();
    let entering = match flags & tunnel_flags::OUTPUT_CHECKSUM {
        0 => entering,
        _ => entering.with_sum(frame.sum(parsed.offset, parsed.packet_len).ok_or(Reason::Tunnel)?),
    };
    if flags & tunnel_flags::V6 != 0 {
        return Ok(Turn::Enters(entering));
    }
    encapsulate::<Ipv4, F, T>(frame, tables, entering, parsed).map(Turn::Sent)
}

/// Sends a packet into a tunnel over IPv6: the slot of the interface that transmits it.
#[inline(always)]
pub fn enter6<F: Frame, T: Tables>(frame: &mut F, tables: &T, entering: Entering) -> Result<u32, Reason> {
    let parsed = Parsed::again(frame, (entering.0 & 0xff) as usize)?;
    encapsulate::<Ipv6, F, T>(frame, tables, entering, &parsed)
}

/// What is known of the packet, found again where the verifier is to have forgotten it.
#[inline(always)]
fn resume<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    Inside(what): Inside,
) -> Result<(Entry<'t>, Parsed), Reason> {
    let what = F::forget(what);
    let slot = what >> 8;
    let entry = Entry::new(slot, tables.port(slot).ok_or(Reason::Internal)?);
    Ok((entry, Parsed::again(frame, (what & 0xff) as usize)?))
}

/// The tunnel over IPv6 that a packet to this host comes out of, and where what is inside begins.
#[inline(always)]
pub fn look_through6<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    entry: &Entry,
    parsed: &Parsed,
) -> Result<Inside, Reason> {
    look_through::<Ipv6, F, T>(frame, tables, entry, parsed)
}

/// The tunnel that a packet to this host comes out of, and what is inside, checked as far as `parse` checks a packet.
#[inline(always)]
fn look_through<O: Outer, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    entry: &Entry,
    parsed: &Parsed,
) -> Result<Inside, Reason> {
    let outer = frame.get::<O>(parsed.offset).ok_or(Reason::Truncated)?;
    let place = outer.gre(frame, parsed.offset).ok_or(Reason::LocalDestination)?;
    if outer.part() != Part::Whole {
        return Err(Reason::Fragment);
    }
    let gre = frame.get::<Gre>(place).ok_or(Reason::Truncated)?;
    let flags = gre.flags.get();
    let (len, key) = match flags {
        0 => (size_of::<Gre>(), 0),
        _ => options(frame, place, flags)?,
    };
    let (offset, end) = (place + len, parsed.offset + parsed.packet_len);
    if offset > end {
        return Err(Reason::Truncated);
    }
    let from = find(tables, outer, flags, key)?;
    from.ready()?;
    if flags & Gre::CHECKSUM != 0 && !frame.sum(place, end - place).is_some_and(|sum| sum.folds_to(0xffff)) {
        return Err(Reason::Tunnel);
    }
    // Where rules would ask for the interface, tunnels are not ready: any port's routes are the same.
    outer.check_source(tables, entry, entry.slot)?;
    let inner = match gre.protocol.get() {
        ethernet::IPV4 => ingress::parse_packet::<Ipv4, F, _>(frame, tables, &from, offset, end),
        ethernet::IPV6 => ingress::parse_packet::<Ipv6, F, _>(frame, tables, &from, offset, end),
        _ => return Err(Reason::Tunnel),
    }
    .map_err(Stop::reason)?;
    let inner_ecn = match inner.family {
        Family::V4 => frame.get::<Ipv4>(offset).ok_or(Reason::Truncated)?.class(),
        Family::V6 => frame.get::<Ipv6>(offset).ok_or(Reason::Truncated)?.class(),
    } & ECN;
    // INET_ECN_decapsulate (6.1, include/net/inet_ecn.h) changes the packet inside, or drops it, unless:
    match outer.class() & ECN {
        0 => {}
        outer_ecn if outer_ecn == inner_ecn => {}
        ECT_0 if inner_ecn != 0 => {}
        _ => return Err(Reason::Tunnel),
    }
    Ok(Inside(from.slot << 8 | inner.offset as u32))
}

/// Length of the GRE header at `place`, which has these flags, and its key.
#[inline(always)]
fn options<F: Frame>(frame: &F, place: usize, flags: u16) -> Result<(usize, u32), Reason> {
    let len = Gre::len(flags).ok_or(Reason::Tunnel)?;
    let key = match flags & Gre::KEY {
        0 => 0,
        _ => frame.get::<Word32>(place + Gre::key_place(flags)).ok_or(Reason::Truncated)?.get(),
    };
    Ok((len, key))
}

/// What of a tunnel's flags a packet to us must agree with, by the flags of its GRE header. Sequence numbers Linux passes over
/// where none are asked for; tunnels that ask for them let nothing in.
#[inline(always)]
fn asked_for<O: Outer>(gre: u16) -> u32 {
    const _: () = assert!(Gre::KEY == 1 << 13 && tunnel_flags::INPUT_KEY == 1 << 1);
    const _: () = assert!(Gre::CHECKSUM == 1 << 15 && tunnel_flags::INPUT_CHECKSUM == 1 << 3);
    let bits = gre & (Gre::KEY | Gre::CHECKSUM);
    u32::from(bits >> 12) | O::FLAGS
}

/// The tunnel that a packet with a GRE header with these flags belongs to (ip_tunnel_lookup, ip6gre_tunnel_lookup); the writer
/// indexes only those that Linux could not mistake for another.
#[inline(always)]
fn find<'t, O: Outer, T: Tables>(tables: &'t T, outer: &O, gre: u16, key: u32) -> Result<Entry<'t>, Reason> {
    const FOUND_BY: u32 = tunnel_flags::GRE | tunnel_flags::V6 | tunnel_flags::INPUT_KEY;
    let asked = asked_for::<O>(gre);
    let [local, remote] = outer.ends();
    let config = tables.config().ok_or(Reason::Internal)?;
    let first = tunnel_bucket(local, remote, key);
    for probe in 0..TUNNEL_PROBES {
        let place = opaque(first + probe) % TUNNEL_BUCKETS;
        let Some(slot) = config.tunnels.get(place).ok_or(Reason::Internal)?.load().checked_sub(1) else { continue };
        let port = tables.port(slot).ok_or(Reason::Internal)?;
        let tunnel = &port.tunnel;
        let sequence = order::begin(&tunnel.sequence).ok_or(Reason::TableBusy)?;
        let flags = tunnel.flags.load();
        let same = (0..O::WORDS).all(|word| tunnel.local[word].load() == local[word])
            && (0..O::WORDS).all(|word| tunnel.remote[word].load() == remote[word])
            && flags & FOUND_BY == asked & FOUND_BY
            && tunnel.input_key.load() == key;
        let policy = tunnel.policy.load();
        if !order::unchanged(&tunnel.sequence, sequence) {
            return Err(Reason::TableBusy);
        }
        if same {
            ingress::strict_policy(policy)?;
            // ip_tunnel_rcv and __ip6_tnl_rcv drop what has a checksum that is not asked for, too.
            if flags & tunnel_flags::INPUT_CHECKSUM != asked & tunnel_flags::INPUT_CHECKSUM {
                return Err(Reason::Tunnel);
            }
            return Ok(Entry::new(slot, port));
        }
    }
    Err(Reason::LocalDestination)
}

/// What is written before a packet that goes into a tunnel, without the link header.
struct Headers<O> {
    ip: O,
    /// What lies between both headers, if something does
    limit: Option<EncapsulationLimit>,
    gre: Gre,
    /// The key, if there is one
    key: u32,
    /// The word with the checksum, if there is one
    checksum: u32,
}

impl<O: Outer> Headers<O> {
    /// Whether the GRE header has this
    #[inline(always)]
    fn has(&self, flag: u16) -> bool {
        self.gre.flags.get() & flag != 0
    }

    /// Where the GRE header begins
    #[inline(always)]
    fn place(&self) -> usize {
        size_of::<O>() + if self.limit.is_some() { size_of::<EncapsulationLimit>() } else { 0 }
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.place() + Gre::len(self.gre.flags.get()).unwrap_or(0)
    }

    /// Makes the checksum, if there is to be one, for a packet with this sum that goes in with one hop less.
    #[inline(always)]
    fn set_checksum<N: Inner>(&mut self, sum: Sum) {
        if !self.has(Gre::CHECKSUM) {
            return;
        }
        let (first, key) = (zerocopy::transmute!(self.gre), self.key.into());
        let sum = N::sum_of_sent(sum).words(&[first, key]);
        // Of the two zeros Linux takes this one (CSUM_MANGLED_0 in skb_checksum_help, net/core/dev.c).
        let checksum = match !sum.fold() {
            0 => 0xffff,
            checksum => checksum,
        };
        self.checksum = zerocopy::transmute!([checksum, 0u16]);
    }
}

/// Sends a packet into a tunnel: `route` has found that it may go there.
#[inline(always)]
fn encapsulate<O: Outer, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entering: Entering,
    parsed: &Parsed,
) -> Result<u32, Reason> {
    match parsed.family {
        Family::V4 => encapsulate_packet::<O, Ipv4, F, T>(frame, tables, entering, parsed),
        Family::V6 => encapsulate_packet::<O, Ipv6, F, T>(frame, tables, entering, parsed),
    }
}

#[inline(always)]
fn encapsulate_packet<O: Outer, N: Inner, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entering: Entering,
    parsed: &Parsed,
) -> Result<u32, Reason> {
    let config = tables.config().ok_or(Reason::Internal)?;
    ingress::strict_policy(config.policy[O::FAMILY as usize].load())?;
    let tunnel = &tables.port(entering.into()).ok_or(Reason::Internal)?.tunnel;
    let sequence = order::begin(&tunnel.sequence).ok_or(Reason::TableBusy)?;
    let mut headers = headers::<O, N, F>(frame, config, parsed, tunnel)?;
    let (link, way) = (tunnel.link.load(), Word(tunnel.way.load()));
    // Orders what the way leads to behind it, too.
    if !order::unchanged(&tunnel.sequence, sequence) {
        return Err(Reason::TableBusy);
    }
    let hop = way_out(tables, &headers.ip, way, link)?;
    let sent = Parsed { packet_len: headers.len() + parsed.packet_len, ..*parsed };
    hop.check_len(sent.packet_len)?;
    headers.set_checksum::<N>(entering.sum());
    hop.check_device(tables, parsed)?;
    match hop.tags() {
        0 => write::<Untagged, O, N, F>(frame, parsed, &hop, &headers)?,
        1 => write::<Tagged, O, N, F>(frame, parsed, &hop, &headers)?,
        2 => write::<DoubleTagged, O, N, F>(frame, parsed, &hop, &headers)?,
        _ => return Err(Reason::Internal),
    }
    hop.mark_hit();
    let [device, from, into] = entering.slots();
    count_into_tunnel(tables, device, &sent, &hop, into, parsed.packet_len);
    if from != device {
        count_received(tables, from, parsed.packet_len);
    }
    Ok(hop.device)
}

/// The outer headers.
#[inline(always)]
fn headers<O: Outer, N: Inner, F: Frame>(
    frame: &F,
    config: &Config,
    parsed: &Parsed,
    tunnel: &Tunnel,
) -> Result<Headers<O>, Reason> {
    let header = frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    let flags = tunnel.flags.load();
    if flags & (tunnel_flags::GRE | tunnel_flags::V6) != O::FLAGS {
        return Err(Reason::TableBusy);
    }
    ingress::strict_policy(tunnel.policy.load())?;
    let ip = O::new(frame, header, parsed, config, tunnel, flags)?;
    let gre = Gre { flags: U16::new(header_flags(flags)), protocol: U16::new(N::ETHERTYPE) };
    let mut headers = Headers { ip, limit: limit::<O>(tunnel, flags), gre, key: tunnel.output_key.load(), checksum: 0 };
    let len = headers.len() + parsed.packet_len;
    headers.ip.set_len(u16::try_from(len).map_err(|_| Reason::MtuExceeded)?);
    Ok(headers)
}

/// Flags of the GRE header of what goes into a tunnel with these.
#[inline(always)]
fn header_flags(tunnel: u32) -> u16 {
    const _: () = assert!(Gre::KEY == 1 << 13 && tunnel_flags::OUTPUT_KEY == 1 << 2);
    const _: () = assert!(Gre::CHECKSUM == 1 << 15 && tunnel_flags::OUTPUT_CHECKSUM == 1 << 4);
    let bits = tunnel & (tunnel_flags::OUTPUT_KEY | tunnel_flags::OUTPUT_CHECKSUM);
    (bits << 11) as u16
}

/// The next hop of a packet that is the router's own and goes this way. `link`: the only interface it may leave by, if not 0; Linux then
/// passes over other routes, which come to the same if the first is one of that interface.
#[inline(always)]
fn way_out<'t, O: Outer, T: Tables>(tables: &'t T, outer: &O, way: Word, link: u32) -> Result<Hop<'t>, Reason> {
    let index = match way.kind() {
        Kind::Nexthop(index) => index,
        Kind::Group(_) if link != 0 => return Err(Reason::Tunnel),
        Kind::Group(index) => {
            let config = tables.config().ok_or(Reason::Internal)?;
            let group = tables.group(index).ok_or(Reason::Internal)?;
            group.buckets.get(hash::bucket_of_tunnel(config, outer)).ok_or(Reason::Internal)?.load()
        }
        Kind::None => return Err(Reason::NoRoute),
        Kind::Node(_) => return Err(Reason::Internal),
    };
    let hop = Hop::begin(tables.nexthop(index).ok_or(Reason::Internal)?).ok_or(Reason::TableBusy)?;
    hop.check()?;
    if hop.is_tunnel() {
        return Err(Reason::Tunnel);
    }
    if link != 0 && tables.port(hop.port).ok_or(Reason::Internal)?.ifindex.load() != link {
        return Err(Reason::Tunnel);
    }
    Ok(hop)
}

#[inline(always)]
fn write<L: Link, O: Outer, N: Inner, F: Frame>(
    frame: &mut F,
    parsed: &Parsed,
    hop: &Hop,
    headers: &Headers<O>,
) -> Result<(), Reason> {
    let link = hop.link::<L>(O::ETHERTYPE).ok_or(Reason::TableBusy)?;
    if !fit(frame, parsed, size_of::<L>() + headers.len())? {
        return Ok(());
    }
    let place = size_of::<L>() + size_of::<O>();
    if headers.limit.is_none() && headers.gre.flags.get() == 0 {
        // With what is farthest in the frame at a place that is known, nothing else need be asked for.
        frame.get_mut::<N>(place + size_of::<Gre>()).ok_or(Reason::Internal)?.decrement();
        write_ip(frame, link, headers).ok_or(Reason::Internal)?;
        *frame.get_mut::<Gre>(place).ok_or(Reason::Internal)? = headers.gre;
        return Ok(());
    }
    write_ip(frame, link, headers).ok_or(Reason::Internal)?;
    let place = match headers.limit {
        None => place,
        Some(limit) => {
            *frame.get_mut::<EncapsulationLimit>(place).ok_or(Reason::Internal)? = limit;
            opaque(place + size_of::<EncapsulationLimit>()) & FARTHEST
        }
    };
    write_gre(frame, place, headers).ok_or(Reason::Internal)?;
    // Last, since that it is in the frame tells a compiler of all that lies before it, but no verifier.
    let inner = opaque(size_of::<L>() + headers.len()) & FARTHEST;
    frame.get_mut::<N>(inner).ok_or(Reason::Internal)?.decrement();
    Ok(())
}

#[inline(always)]
fn write_ip<L: Link, O: Outer, F: Frame>(frame: &mut F, link: L, headers: &Headers<O>) -> Option<()> {
    *frame.get_mut::<L>(0)? = link;
    *frame.get_mut::<O>(size_of::<L>())? = headers.ip;
    Some(())
}

/// The GRE header at `at`, with all its options.
#[inline(always)]
fn write_gre<O: Outer, F: Frame>(frame: &mut F, at: usize, headers: &Headers<O>) -> Option<()> {
    *frame.get_mut::<Gre>(at)? = headers.gre;
    if headers.has(Gre::CHECKSUM) {
        frame.get_mut::<Word32>(at + size_of::<Gre>())?.set(headers.checksum);
    }
    if headers.has(Gre::KEY) {
        frame.get_mut::<Word32>(at + Gre::key_place(headers.gre.flags.get()))?.set(headers.key);
    }
    Some(())
}
