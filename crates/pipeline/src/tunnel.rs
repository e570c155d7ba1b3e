//! Tunnels: GRE over IPv4 (RFC 2784, keys of RFC 2890), as Linux's tunnel interfaces have it (6.1,
//! net/ipv4/{gre_demux,ip_gre,ip_tunnel,ip_tunnel_core}.c, include/net/gre.h).
//!
//! A packet to the router itself that is one of a tunnel's is looked *through*: what is inside is routed as what came in
//! by the tunnel. Only if that ends in sending it are the outer headers cut off. Otherwise the packet is Linux's as it
//! arrived, and Linux finds out by itself what is inside. In the other direction a next hop may be a tunnel; then the
//! outer headers are made, their destination is looked up, and they are written once all is decided.

use crate::network::Network;
use crate::rewrite::fit;
use crate::stats::{count_into_tunnel, count_out_of_tunnel, count_received};
use crate::{Entry, Frame, Hop, Parsed, Refusal, Stop, Tables, hash, ingress, rewrite, route};
use towpath_tables::lpm::{Kind, Word};
use towpath_tables::record::{Family, TUNNEL_BUCKETS, TUNNEL_PROBES, Tunnel, tunnel_bucket, tunnel_flags};
use towpath_tables::{Reason, opaque, order};
use towpath_wire::Sum;
use towpath_wire::ethernet;
use towpath_wire::gre::Gre;
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::link::{DoubleTagged, Link, Tagged, Untagged};
use towpath_wire::transport::protocol;
use zerocopy::{byteorder::network_endian::U16, native_endian};

/// No packet in a tunnel begins farther behind, tags and all.
const FARTHEST: usize = 0x7f;
/// A word of a GRE header, as on the wire
type Word32 = native_endian::U32;

/// Explicit congestion notification: both bits of TOS, and the values (RFC 3168)
const ECN: u8 = 3;
const ECT_0: u8 = 2;
const CONGESTED: u8 = 3;
/// The lowest bit of a tunnel's TOS: inherited
const INHERIT: u8 = 1;

/// Goes on with a packet that `route` refused, if a tunnel is the cause: the slot of the interface that transmits it.
#[inline(always)]
pub fn forward<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    entry: &Entry,
    parsed: &Parsed,
    refusal: Refusal,
) -> Result<u32, Reason> {
    let into = match refusal {
        Refusal::Into(slot) => Some(slot),
        Refusal::Exception(Reason::LocalDestination) if parsed.family == Family::V4 => None,
        Refusal::Exception(reason) => return Err(reason),
    };
    let (from, inner) = match into {
        Some(_) => (*entry, *parsed),
        None => {
            let (from, inner) = look_through(frame, tables, entry, parsed)?;
            resume(frame, tables, &from, &inner)?
        }
    };
    let routed = match into {
        Some(slot) => Err(Refusal::Into(slot)),
        None => route(frame, tables, &from, &inner),
    };
    match routed {
        // Out of a tunnel, since what goes into one was routed before.
        Ok(hop) => {
            rewrite(frame, &inner, &hop)?;
            hop.mark_hit();
            count_out_of_tunnel(tables, entry.slot, &inner, &hop, from.slot);
            Ok(hop.device)
        }
        Err(Refusal::Into(slot)) => {
            let device = encapsulate(frame, tables, slot, entry.slot, &inner)?;
            if into.is_none() {
                count_received(tables, from.slot, inner.packet_len);
            }
            Ok(device)
        }
        Err(Refusal::Exception(reason)) => Err(reason),
    }
}

/// What is known of the packet, found again where the verifier is to have forgotten it.
#[inline(always)]
fn resume<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
) -> Result<(Entry<'t>, Parsed), Reason> {
    let what = F::forget(entry.slot << 8 | parsed.offset as u32);
    let slot = what >> 8;
    let entry = Entry::new(slot, tables.port(slot).ok_or(Reason::Internal)?);
    Ok((entry, Parsed::again(frame, (what & 0xff) as usize)?))
}

/// The tunnel that a packet to this host comes out of, and what is inside, checked as far as `parse` checks a packet.
#[inline(always)]
fn look_through<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
) -> Result<(Entry<'t>, Parsed), Reason> {
    let outer = frame.get::<Ipv4>(parsed.offset).ok_or(Reason::Truncated)?;
    if outer.protocol != protocol::GRE {
        return Err(Reason::LocalDestination);
    }
    if outer.fragment.get() & (Ipv4::MORE_FRAGMENTS | Ipv4::OFFSET) != 0 {
        return Err(Reason::Fragment);
    }
    let place = parsed.offset + size_of::<Ipv4>();
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
    // INET_ECN_decapsulate (6.1, include/net/inet_ecn.h) changes the packet inside, or drops it, unless:
    let inner_ecn = match inner.family {
        Family::V4 => frame.get::<Ipv4>(offset).ok_or(Reason::Truncated)?.class(),
        Family::V6 => frame.get::<Ipv6>(offset).ok_or(Reason::Truncated)?.class(),
    } & ECN;
    match outer.tos & ECN {
        0 => Ok((from, inner)),
        ECT_0 if inner_ecn != 0 => Ok((from, inner)),
        _ => Err(Reason::Tunnel),
    }
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
fn asked_for(gre: u16) -> u32 {
    const _: () = assert!(Gre::KEY == 1 << 13 && tunnel_flags::INPUT_KEY == 1 << 1);
    const _: () = assert!(Gre::CHECKSUM == 1 << 15 && tunnel_flags::INPUT_CHECKSUM == 1 << 3);
    let bits = gre & (Gre::KEY | Gre::CHECKSUM);
    u32::from(bits >> 12) | tunnel_flags::GRE
}

/// The tunnel that a packet with a GRE header with these flags belongs to (ip_tunnel_lookup); the writer indexes only those
/// that Linux could not mistake for another.
#[inline(always)]
fn find<'t, T: Tables>(tables: &'t T, outer: &Ipv4, gre: u16, key: u32) -> Result<Entry<'t>, Reason> {
    const FOUND_BY: u32 = tunnel_flags::GRE | tunnel_flags::INPUT_KEY;
    let asked = asked_for(gre);
    let (local, remote) = (u32::from_ne_bytes(outer.destination), u32::from_ne_bytes(outer.source));
    let config = tables.config().ok_or(Reason::Internal)?;
    let first = tunnel_bucket(local, remote, key);
    for probe in 0..TUNNEL_PROBES {
        let place = opaque(first + probe) % TUNNEL_BUCKETS;
        let Some(slot) = config.tunnels.get(place).ok_or(Reason::Internal)?.load().checked_sub(1) else { continue };
        let port = tables.port(slot).ok_or(Reason::Internal)?;
        let tunnel = &port.tunnel;
        let sequence = order::begin(&tunnel.sequence).ok_or(Reason::TableBusy)?;
        let flags = tunnel.flags.load();
        let same = tunnel.local[0].load() == local
            && tunnel.remote[0].load() == remote
            && flags & FOUND_BY == asked & FOUND_BY
            && tunnel.input_key.load() == key;
        let policy = tunnel.policy.load();
        if !order::unchanged(&tunnel.sequence, sequence) {
            return Err(Reason::TableBusy);
        }
        if same {
            ingress::strict_policy(policy)?;
            // ip_tunnel_rcv drops what has a checksum that is not asked for, too.
            if flags & tunnel_flags::INPUT_CHECKSUM != asked & tunnel_flags::INPUT_CHECKSUM {
                return Err(Reason::Tunnel);
            }
            return Ok(Entry::new(slot, port));
        }
    }
    Err(Reason::LocalDestination)
}

/// What is written before a packet that goes into a tunnel, without the link header.
struct Outer {
    ip: Ipv4,
    gre: Gre,
    /// The key, if there is one
    key: u32,
    /// The word with the checksum, if there is one
    checksum: u32,
}

impl Outer {
    /// Whether the GRE header has this
    #[inline(always)]
    fn has(&self, flag: u16) -> bool {
        self.gre.flags.get() & flag != 0
    }

    #[inline(always)]
    fn len(&self) -> usize {
        size_of::<Ipv4>() + Gre::len(self.gre.flags.get()).unwrap_or(0)
    }

    /// Makes the checksum, if there is to be one, for a packet that goes in with one hop less.
    #[inline(always)]
    fn set_checksum<N: Inner, F: Frame>(&mut self, frame: &F, parsed: &Parsed) -> Result<(), Reason> {
        if !self.has(Gre::CHECKSUM) {
            return Ok(());
        }
        let packet = frame.sum(parsed.offset, parsed.packet_len).ok_or(Reason::Tunnel)?;
        let (first, key) = (zerocopy::transmute!(self.gre), self.key.into());
        let sum = N::sum_of_sent(packet).words(&[first, key]);
        // Of the two zeros Linux takes this one (CSUM_MANGLED_0 in skb_checksum_help, net/core/dev.c).
        let checksum = match !sum.fold() {
            0 => 0xffff,
            checksum => checksum,
        };
        self.checksum = zerocopy::transmute!([checksum, 0u16]);
        Ok(())
    }
}

/// Sends a packet, in a frame that came in by the port in slot `device`, into the tunnel in slot `into`: `route` has found
/// that it may go there.
#[inline(always)]
fn encapsulate<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    into: u32,
    device: u32,
    parsed: &Parsed,
) -> Result<u32, Reason> {
    match parsed.family {
        Family::V4 => encapsulate_packet::<Ipv4, F, T>(frame, tables, into, device, parsed),
        Family::V6 => encapsulate_packet::<Ipv6, F, T>(frame, tables, into, device, parsed),
    }
}

#[inline(always)]
fn encapsulate_packet<N: Inner, F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    into: u32,
    device: u32,
    parsed: &Parsed,
) -> Result<u32, Reason> {
    let header = frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    let config = tables.config().ok_or(Reason::Internal)?;
    ingress::strict_policy(config.policy[Family::V4 as usize].load())?;
    let tunnel = &tables.port(into).ok_or(Reason::Internal)?.tunnel;
    let sequence = order::begin(&tunnel.sequence).ok_or(Reason::TableBusy)?;
    let mut outer = outer(header, parsed, tunnel)?;
    let (link, way) = (tunnel.link.load(), Word(tunnel.way.load()));
    // Orders what the way leads to behind it, too.
    if !order::unchanged(&tunnel.sequence, sequence) {
        return Err(Reason::TableBusy);
    }
    let hop = way_out(tables, &outer.ip, way, link)?;
    let sent = Parsed { packet_len: outer.len() + parsed.packet_len, ..*parsed };
    hop.check_len(sent.packet_len)?;
    outer.set_checksum::<N, F>(frame, parsed)?;
    hop.check_device(tables, parsed)?;
    match hop.tags() {
        0 => write::<Untagged, N, F>(frame, parsed, &hop, &outer)?,
        1 => write::<Tagged, N, F>(frame, parsed, &hop, &outer)?,
        2 => write::<DoubleTagged, N, F>(frame, parsed, &hop, &outer)?,
        _ => return Err(Reason::Internal),
    }
    hop.mark_hit();
    count_into_tunnel(tables, device, &sent, &hop, into, parsed.packet_len);
    Ok(hop.device)
}

/// The outer headers (ip_tunnel_xmit, iptunnel_xmit). The packet always says "don't fragment", since tunnels that do not
/// are Linux's; so its identification means nothing (RFC 6864), and is 0 where Linux's cannot be foretold.
#[inline(always)]
fn outer<N: Inner>(header: &N, parsed: &Parsed, tunnel: &Tunnel) -> Result<Outer, Reason> {
    let flags = tunnel.flags.load();
    if flags & tunnel_flags::GRE == 0 {
        return Err(Reason::TableBusy);
    }
    ingress::strict_policy(tunnel.policy.load())?;
    let [ttl, tos, ..] = tunnel.ttl_tos.load().to_le_bytes();
    let class = header.class();
    let tos = if tos & INHERIT != 0 { class } else { tos };
    let ecn = if class & ECN == CONGESTED { ECT_0 } else { class & ECN };
    let ip = Ipv4 {
        version_ihl: Ipv4::PLAIN,
        tos: tos & !ECN | ecn,
        total_len: U16::new(0),
        id: U16::new(0),
        fragment: U16::new(Ipv4::DONT_FRAGMENT),
        ttl: if ttl == 0 { header.hops_left().wrapping_sub(1) } else { ttl },
        protocol: protocol::GRE,
        checksum: native_endian::U16::new(0),
        source: tunnel.local[0].load().to_ne_bytes(),
        destination: tunnel.remote[0].load().to_ne_bytes(),
    };
    let gre = Gre { flags: U16::new(header_flags(flags)), protocol: U16::new(N::ETHERTYPE) };
    let mut outer = Outer { ip, gre, key: tunnel.output_key.load(), checksum: 0 };
    let len = outer.len() + parsed.packet_len;
    outer.ip.total_len.set(u16::try_from(len).map_err(|_| Reason::MtuExceeded)?);
    outer.ip.set_checksum();
    Ok(outer)
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
fn way_out<'t, T: Tables>(tables: &'t T, outer: &Ipv4, way: Word, link: u32) -> Result<Hop<'t>, Reason> {
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
fn write<L: Link, N: Network, F: Frame>(
    frame: &mut F,
    parsed: &Parsed,
    hop: &Hop,
    outer: &Outer,
) -> Result<(), Reason> {
    let link = hop.link::<L>(ethernet::IPV4).ok_or(Reason::TableBusy)?;
    if !fit(frame, parsed, size_of::<L>() + outer.len())? {
        return Ok(());
    }
    if outer.gre.flags.get() == 0 {
        // With what is farthest in the frame at a place that is known, nothing else need be asked for.
        let inner = size_of::<L>() + size_of::<Ipv4>() + size_of::<Gre>();
        frame.get_mut::<N>(inner).ok_or(Reason::Internal)?.decrement();
        return write_headers(frame, link, outer).ok_or(Reason::Internal);
    }
    write_headers(frame, link, outer).ok_or(Reason::Internal)?;
    write_options(frame, size_of::<L>() + size_of::<Ipv4>(), outer).ok_or(Reason::Internal)?;
    // Last, since that it is in the frame tells a compiler of all that lies before it, but no verifier.
    let inner = opaque(size_of::<L>() + outer.len()) & FARTHEST;
    frame.get_mut::<N>(inner).ok_or(Reason::Internal)?.decrement();
    Ok(())
}

#[inline(always)]
fn write_headers<L: Link, F: Frame>(frame: &mut F, link: L, outer: &Outer) -> Option<()> {
    *frame.get_mut::<L>(0)? = link;
    *frame.get_mut::<Ipv4>(size_of::<L>())? = outer.ip;
    *frame.get_mut::<Gre>(size_of::<L>() + size_of::<Ipv4>())? = outer.gre;
    Some(())
}

/// What lies behind the first word of the GRE header at `at`.
#[inline(always)]
fn write_options<F: Frame>(frame: &mut F, at: usize, outer: &Outer) -> Option<()> {
    if outer.has(Gre::CHECKSUM) {
        frame.get_mut::<Word32>(at + size_of::<Gre>())?.set(outer.checksum);
    }
    if outer.has(Gre::KEY) {
        frame.get_mut::<Word32>(at + Gre::key_place(outer.gre.flags.get()))?.set(outer.key);
    }
    Some(())
}

/// What tunnels ask of a packet's header besides.
trait Inner: Network {
    /// TOS or traffic class
    fn class(&self) -> u8;
    /// What the sum over a packet becomes when it is sent on, with one hop less
    fn sum_of_sent(sum: Sum) -> Sum;
}

impl Inner for Ipv4 {
    #[inline(always)]
    fn class(&self) -> u8 {
        self.tos
    }

    /// A right header's sum is zero, before and after.
    #[inline(always)]
    fn sum_of_sent(sum: Sum) -> Sum {
        sum
    }
}

impl Inner for Ipv6 {
    #[inline(always)]
    fn class(&self) -> u8 {
        (self.version_class_flow.get() >> 20) as u8
    }

    /// The hop limit is the low byte of a pair.
    #[inline(always)]
    fn sum_of_sent(sum: Sum) -> Sum {
        sum.number(!1)
    }
}
