//! Second stage: is the source acceptable, where does the packet go, and may it.

use crate::network::Network;
use crate::roots::root_for;
use crate::{Entry, Frame, Parsed, Tables, hash};
use towpath_tables::Reason;
use towpath_tables::lpm::{Kind, Word};
use towpath_tables::order;
use towpath_tables::record::{Family, Nexthop, NexthopKind, port_flags};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::link::Link;

/// Why a packet has no next hop that a frame could be sent to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It is Linux's for this reason
    Exception(Reason),
    /// It goes into the tunnel in this slot
    Into(u32),
}

impl From<Reason> for Refusal {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self::Exception(reason)
    }
}

/// A next hop that is being read. What was read is known to belong together once `link` has said so.
pub struct Hop<'t> {
    record: &'t Nexthop,
    sequence: u32,
    state: u32,
    /// Slot of the port that the packet leaves by
    pub port: u32,
    /// Slot of the interface that transmits it
    pub device: u32,
}

impl<'t> Hop<'t> {
    #[inline(always)]
    pub(crate) fn begin(record: &'t Nexthop) -> Option<Self> {
        let sequence = order::begin(&record.sequence)?;
        Some(Self {
            record,
            sequence,
            state: record.state.load(),
            port: record.port.load(),
            device: record.device.load(),
        })
    }

    /// The record's sequence count when it was begun to be read
    #[inline(always)]
    pub(crate) fn sequence(&self) -> u32 {
        self.sequence
    }

    /// The link header of packets to it; None if it was changed since it was begun to be read.
    #[inline(always)]
    pub fn link<L: Link>(&self, ethertype: u16) -> Option<L> {
        let link = L::new(|word| self.record.l2[word].load(), ethertype);
        order::unchanged(&self.record.sequence, self.sequence).then_some(link)
    }

    /// Number of VLAN tags in `l2`
    #[inline(always)]
    pub fn tags(&self) -> u32 {
        self.state >> 16 & 0xff
    }

    /// Whether packets to it go into the tunnel that its port is
    #[inline(always)]
    pub(crate) fn is_tunnel(&self) -> bool {
        self.state & 0xff == NexthopKind::Tunnel as u32
    }

    /// Ok if packets are sent to it; otherwise they go into a tunnel, once all was read of it that is to be known.
    #[inline(always)]
    fn check_kind(&self) -> Result<(), Refusal> {
        if !self.is_tunnel() {
            return Ok(());
        }
        Err(if self.is_current() { Refusal::Into(self.port) } else { Reason::TableBusy.into() })
    }

    /// Whether a packet of this length fits.
    #[inline(always)]
    pub(crate) fn check_len(&self, packet_len: usize) -> Result<(), Reason> {
        if packet_len > self.record.mtu.load() as usize { Err(Reason::MtuExceeded) } else { Ok(()) }
    }

    /// Ok if packets may be sent to it or, if it is a tunnel, into it.
    #[inline(always)]
    pub(crate) fn check(&self) -> Result<(), Reason> {
        const FORWARD: u32 = NexthopKind::Forward as u32;
        const EXCEPTION: u32 = NexthopKind::Exception as u32;
        const MAPPED: u32 = NexthopKind::Mapped as u32;
        // Which of the two it is matters later; a verifier that knew it now would look at what is between twice.
        const EITHER: u32 = !(FORWARD ^ NexthopKind::Tunnel as u32) & 0xff;
        const _: () =
            assert!(EXCEPTION & EITHER != FORWARD & EITHER && NexthopKind::Free as u32 & EITHER != FORWARD & EITHER);
        const _: () = assert!(MAPPED & EITHER != FORWARD & EITHER);
        if self.state & EITHER == FORWARD & EITHER {
            return Ok(());
        }
        match self.state & 0xff {
            MAPPED => Err(Reason::Mapped),
            EXCEPTION => Err(Reason::from_index((self.state >> 8) as u8).unwrap_or(Reason::Internal)),
            _ => Err(Reason::Internal),
        }
    }

    /// Whether packets to it leave by a port with mappings
    #[inline(always)]
    pub(crate) fn is_mapped(&self) -> bool {
        self.state & 0xff == NexthopKind::Mapped as u32
    }

    /// As `check`, where mappings are looked at and packets go into no tunnel.
    #[inline(always)]
    pub(crate) fn check_mapped(&self) -> Result<(), Reason> {
        if self.is_mapped() {
            return Ok(());
        }
        self.check()?;
        if self.is_tunnel() { Err(Reason::Tunnel) } else { Ok(()) }
    }

    /// Whether frames can be handed to the interface that transmits to it.
    #[inline(always)]
    pub(crate) fn check_device<T: Tables>(&self, tables: &T, parsed: &Parsed) -> Result<(), Reason> {
        if parsed.several {
            let device = tables.port(self.device).ok_or(Reason::EgressNotServed)?;
            if device.flags.load() & port_flags::SINGLE_BUFFER != 0 {
                return Err(Reason::EgressNotServed);
            }
        }
        if tables.transmitter(self.device) { Ok(()) } else { Err(Reason::EgressNotServed) }
    }

    /// Whether frames to it begin with these eight bytes.
    #[inline(always)]
    pub(crate) fn is_at(&self, link: u64) -> bool {
        self.state & 0xff == NexthopKind::Forward as u32 && self.record.l2[0].load() == link && self.is_current()
    }

    /// Whether the record is what it was when it was begun to be read.
    #[inline(always)]
    pub(crate) fn is_current(&self) -> bool {
        order::unchanged(&self.record.sequence, self.sequence)
    }

    /// Sets the hit flag; the line is only written if that changes something.
    #[inline(always)]
    pub fn mark_hit(&self) {
        if self.record.hit.load() == 0 {
            self.record.hit.store(1);
        }
    }
}

/// Finds the next hop and checks that Linux would forward the packet there without a word.
#[inline(always)]
pub fn route<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
) -> Result<Hop<'t>, Refusal> {
    match parsed.family {
        Family::V4 => route_packet::<Ipv4, F, T>(frame, tables, entry, parsed),
        Family::V6 => route_packet::<Ipv6, F, T>(frame, tables, entry, parsed),
    }
}

#[inline(always)]
fn route_packet<'t, N: Network, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
) -> Result<Hop<'t>, Refusal> {
    let header = frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    let root = root_for::<N, T>(tables, entry.port, || header.source_words())?;
    let word = header.lookup(tables, root).map_err(|_| Reason::Internal)?;
    let hop = find_hop(frame, tables, header, parsed, word)?;
    hop.check()?;
    check_packet(tables, entry, header, parsed, &hop)?;
    hop.check_kind()?;
    hop.check_device(tables, parsed)?;
    Ok(hop)
}

/// The next hop that a look-up came to.
#[inline(always)]
pub(crate) fn find_hop<'t, N: Network, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    header: &N,
    parsed: &Parsed,
    word: Word,
) -> Result<Hop<'t>, Reason> {
    let index = find_index(frame, tables, header, parsed, word)?;
    Hop::begin(tables.nexthop(index).ok_or(Reason::Internal)?).ok_or(Reason::TableBusy)
}

/// Its index.
#[inline(always)]
pub(crate) fn find_index<N: Network, F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    header: &N,
    parsed: &Parsed,
    word: Word,
) -> Result<u32, Reason> {
    match word.kind() {
        Kind::Nexthop(index) => Ok(index),
        Kind::Group(index) => {
            let config = tables.config().ok_or(Reason::Internal)?;
            let bucket = hash::bucket(frame, config, header, parsed)?;
            let group = tables.group(index).ok_or(Reason::Internal)?;
            Ok(group.buckets.get(bucket).ok_or(Reason::Internal)?.load())
        }
        Kind::None => Err(Reason::NoRoute),
        Kind::Node(_) => Err(Reason::Internal),
    }
}

/// What depends on the packet as well as on the next hop.
#[inline(always)]
pub(crate) fn check_packet<N: Network, T: Tables>(
    tables: &T,
    entry: &Entry,
    header: &N,
    parsed: &Parsed,
    hop: &Hop,
) -> Result<(), Reason> {
    header.check_source(tables, entry, hop.port)?;
    if header.hops_left() <= 1 {
        return Err(Reason::TtlExpired);
    }
    if hop.port == entry.slot && N::redirects(entry.flags) {
        return Err(Reason::Redirect);
    }
    hop.check_len(parsed.packet_len)
}

#[cfg(any(test, feature = "std"))]
/// The next hop that the packet before took, if that was the only thing in its way, and the word that leads there; none if a
/// group did.
pub(crate) struct Last<'t>(Option<(Option<Word>, Hop<'t>)>);

#[cfg(any(test, feature = "std"))]
impl<'t> Last<'t> {
    /// There was none.
    pub const NONE: Self = Self(None);

    /// As `route_packet`, for a packet whose look-up came to this word.
    #[inline(always)]
    pub fn route<N: Network, F: Frame, T: Tables>(
        &mut self,
        frame: &F,
        tables: &'t T,
        entry: &Entry,
        parsed: &Parsed,
        word: Word,
    ) -> Result<&Hop<'t>, Refusal> {
        let header = frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
        // What was found of a single next hop still holds, as long as its record does.
        let same = matches!(&self.0, Some((Some(last), hop)) if *last == word && hop.is_current()) && !parsed.several;
        if !same {
            let hop = find_hop(frame, tables, header, parsed, word)?;
            hop.check()?;
            check_packet(tables, entry, header, parsed, &hop)?;
            hop.check_kind()?;
            hop.check_device(tables, parsed)?;
            // A group may lead the next packet elsewhere.
            let word = matches!(word.kind(), Kind::Nexthop(_)).then_some(word);
            return Ok(&self.0.insert((word, hop)).1);
        }
        let Some((_, hop)) = &self.0 else { return Err(Reason::Internal.into()) };
        check_packet(tables, entry, header, parsed, hop)?;
        Ok(hop)
    }
}
