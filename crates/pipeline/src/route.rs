//! Second stage: is the source acceptable, where does the packet go, and may it.

use crate::network::Network;
use crate::{Entry, Frame, Parsed, Tables, hash};
use towpath_tables::Reason;
use towpath_tables::lpm::{self, Kind, Word};
use towpath_tables::order;
use towpath_tables::record::{Family, Nexthop, NexthopKind, port_flags};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::link::Link;

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
    fn begin(record: &'t Nexthop) -> Option<Self> {
        let sequence = order::begin(&record.sequence)?;
        Some(Self {
            record,
            sequence,
            state: record.state.load(),
            port: record.port.load(),
            device: record.device.load(),
        })
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

    /// Ok if packets may be sent to it.
    #[inline(always)]
    fn check(&self) -> Result<(), Reason> {
        const FORWARD: u32 = NexthopKind::Forward as u32;
        const EXCEPTION: u32 = NexthopKind::Exception as u32;
        match self.state & 0xff {
            FORWARD => Ok(()),
            EXCEPTION => Err(Reason::from_index((self.state >> 8) as u8).unwrap_or(Reason::Internal)),
            _ => Err(Reason::Internal),
        }
    }

    /// Sets the hit flag; the line is only written if that changes something.
    #[inline(always)]
    pub fn mark_hit(&self) {
        if self.record.hit.load() == 0 {
            self.record.hit.store(1);
        }
    }
}

/// A look-up of a packet's route that engines take a step at a time, with each packet of a batch in turn: memory comes
/// while the others are worked on.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    root: u32,
    walk: lpm::Walk,
}

impl Search {
    /// Begins.
    #[inline(always)]
    pub fn new<F: Frame, T: Tables>(frame: &F, tables: &T, entry: &Entry, parsed: &Parsed) -> Result<Self, Reason> {
        let root = entry.port.root[parsed.family as usize].load();
        let walk = match parsed.family {
            Family::V4 => frame.get::<Ipv4>(parsed.offset).ok_or(Reason::Truncated)?.walk(tables, root),
            Family::V6 => frame.get::<Ipv6>(parsed.offset).ok_or(Reason::Truncated)?.walk(tables, root),
        };
        Ok(Self { root, walk })
    }

    /// Takes a step if there is one to take; true if more are to come.
    #[inline(always)]
    pub fn step<F: Frame, T: Tables>(&mut self, frame: &F, tables: &T, parsed: &Parsed) -> bool {
        let Self { root, walk } = self;
        match parsed.family {
            Family::V4 => frame.get::<Ipv4>(parsed.offset).is_some_and(|header| header.step(tables, *root, walk)),
            Family::V6 => frame.get::<Ipv6>(parsed.offset).is_some_and(|header| header.step(tables, *root, walk)),
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
) -> Result<Hop<'t>, Reason> {
    route_family(frame, tables, entry, parsed, None)
}

/// As `route`, by a search that has taken all its steps.
#[inline(always)]
pub fn route_found<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
    search: &Search,
) -> Result<Hop<'t>, Reason> {
    route_family(frame, tables, entry, parsed, Some(search.walk.found()))
}

#[inline(always)]
fn route_family<'t, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
    found: Option<Result<Word, lpm::Internal>>,
) -> Result<Hop<'t>, Reason> {
    match parsed.family {
        Family::V4 => route_packet::<Ipv4, F, T>(frame, tables, entry, parsed, found),
        Family::V6 => route_packet::<Ipv6, F, T>(frame, tables, entry, parsed, found),
    }
}

#[inline(always)]
fn route_packet<'t, N: Network, F: Frame, T: Tables>(
    frame: &F,
    tables: &'t T,
    entry: &Entry,
    parsed: &Parsed,
    found: Option<Result<Word, lpm::Internal>>,
) -> Result<Hop<'t>, Reason> {
    let header = frame.get::<N>(parsed.offset).ok_or(Reason::Truncated)?;
    let root = entry.port.root[N::FAMILY as usize].load();
    let word = found.unwrap_or_else(|| header.lookup(tables, root)).map_err(|_| Reason::Internal)?;
    let index = match word.kind() {
        Kind::Nexthop(index) => index,
        Kind::Group(index) => {
            let config = tables.config().ok_or(Reason::Internal)?;
            let bucket = hash::bucket(frame, config, header, parsed)?;
            let group = tables.group(index).ok_or(Reason::Internal)?;
            group.buckets.get(bucket).ok_or(Reason::Internal)?.load()
        }
        Kind::None => return Err(Reason::NoRoute),
        Kind::Node(_) => return Err(Reason::Internal),
    };
    let hop = Hop::begin(tables.nexthop(index).ok_or(Reason::Internal)?).ok_or(Reason::TableBusy)?;
    hop.check()?;
    header.check_source(tables, entry)?;
    if header.hops_left() <= 1 {
        return Err(Reason::TtlExpired);
    }
    if hop.port == entry.slot && N::redirects(entry.flags) {
        return Err(Reason::Redirect);
    }
    if parsed.packet_len > hop.record.mtu.load() as usize {
        return Err(Reason::MtuExceeded);
    }
    if parsed.several {
        let device = tables.port(hop.device).ok_or(Reason::EgressNotServed)?;
        if device.flags.load() & port_flags::SINGLE_BUFFER != 0 {
            return Err(Reason::EgressNotServed);
        }
    }
    if !tables.transmitter(hop.device) {
        return Err(Reason::EgressNotServed);
    }
    Ok(hop)
}
