//! Whether Linux accepts an IPv4 source on a port (6.1, net/ipv4/fib_frontend.c, fib_validate_source).

use crate::network::words4;
use crate::roots::root_for;
use crate::{Tables, ingress::Entry};
use towpath_tables::Reason;
use towpath_tables::filter::local_filter_bit;
use towpath_tables::lpm::{Kind, Word};
use towpath_tables::order;
use towpath_tables::record::{GROUP_BUCKETS, Nexthop, NexthopKind, port_flags};
use towpath_wire::ipv4::Ipv4;
#[cfg(any(test, feature = "std"))]
use zerocopy::FromZeros;

/// Buckets of a group that are looked at for the port: members with a smaller share may be missed, and their packets
/// take the slow way.
const SAMPLES: usize = 16;

#[inline(always)]
pub fn check<T: Tables>(tables: &T, entry: &Entry, header: &Ipv4, out: u32) -> Result<(), Reason> {
    let filtered = entry.flags & (port_flags::RP_STRICT | port_flags::RP_LOOSE) != 0;
    if !filtered && !is_suspect(tables, header.source)? {
        return Ok(());
    }
    // Linux looks up a packet that comes back: in by the port by which this one is to leave, and from its destination, but in
    // the VRF that this one is in.
    let in_vrf = entry.flags & port_flags::VRF != 0;
    let port = if in_vrf { entry.port } else { tables.port(out).ok_or(Reason::Internal)? };
    let root = root_for::<Ipv4, T>(tables, port, || words4(header.destination))?;
    let word = tables.lookup4(root, &header.source).map_err(|_| Reason::Internal)?;
    check_route(tables, entry, word, filtered)
}

/// As `check`, for whoever has two addresses and no packet.
#[cfg(any(test, feature = "std"))]
pub fn accepts<T: Tables>(
    tables: &T,
    entry: &Entry,
    [source, destination]: [[u8; 4]; 2],
    out: u32,
) -> Result<(), Reason> {
    check(tables, entry, &Ipv4 { source, destination, ..Ipv4::new_zeroed() }, out)
}

/// The filter has no false negatives: false proves that the address is not one of this host's, and that the route to it
/// is a unicast route if there is one.
#[inline(always)]
fn is_suspect<T: Tables>(tables: &T, source: [u8; 4]) -> Result<bool, Reason> {
    let bit = local_filter_bit(source);
    let config = tables.config().ok_or(Reason::Internal)?;
    let word = config.local_filter.get((bit / 64) as usize).ok_or(Reason::Internal)?;
    Ok(word.load() >> (bit % 64) & 1 != 0)
}

/// Judges the route back to the source.
#[inline(always)]
fn check_route<T: Tables>(tables: &T, entry: &Entry, word: Word, filtered: bool) -> Result<(), Reason> {
    let strict = entry.flags & port_flags::RP_STRICT != 0;
    match word.kind() {
        Kind::Nexthop(index) => match way_back(tables, index)? {
            Way::Ours => Err(Reason::MartianSource),
            Way::Unicast(port) if !strict || port == entry.slot => Ok(()),
            _ if filtered => Err(Reason::RpFilter),
            // Whether Linux accepts these without the filter depends on what nothing tells: fib_has_custom_local_routes.
            Way::Other => Err(Reason::MartianSource),
            Way::Unicast(_) => Ok(()),
        },
        Kind::Group(_) if !filtered => Ok(()),
        Kind::Group(_) if !strict => Ok(()),
        Kind::Group(index) if tables.leads_back(index, entry.slot)? => Ok(()),
        Kind::Group(_) => Err(Reason::RpFilter),
        Kind::None if filtered => Err(Reason::RpFilter),
        Kind::None => Ok(()),
        Kind::Node(_) => Err(Reason::Internal),
    }
}

/// Whether one of a group's next hops is by the port in a slot: a route with several accepts a source then
/// (fib_info_nh_uses_dev).
#[inline(always)]
pub fn leads_back<T: Tables>(tables: &T, group: u32, slot: u32) -> Result<bool, Reason> {
    let group = tables.group(group).ok_or(Reason::Internal)?;
    for sample in 0..SAMPLES {
        let bucket = group.buckets.get(sample * (GROUP_BUCKETS / SAMPLES)).ok_or(Reason::Internal)?;
        if let Way::Unicast(port) = way_back(tables, bucket.load())?
            && port == slot
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What a next hop says about a source that it leads back to.
enum Way {
    /// The address is this host's
    Ours,
    /// Linux has a unicast route by the port in this slot
    Unicast(u32),
    /// Anything else
    Other,
}

#[inline(always)]
fn way_back<T: Tables>(tables: &T, index: u32) -> Result<Way, Reason> {
    let hop = tables.nexthop(index).ok_or(Reason::Internal)?;
    let (state, port) = read(hop).ok_or(Reason::TableBusy)?;
    const UNICAST: [u32; 3] = [NexthopKind::Forward as u32, NexthopKind::Tunnel as u32, NexthopKind::Mapped as u32];
    if UNICAST.contains(&(state & 0xff)) {
        return Ok(Way::Unicast(port));
    }
    Ok(match Reason::from_index((state >> 8) as u8) {
        Some(Reason::LocalDestination) => Way::Ours,
        // A unicast route by a served port whose neighbour is not known, or that a policy or the tunnel's settings keep
        // from the fast path
        Some(Reason::NoNeighbour | Reason::PolicyTc | Reason::PolicyCapture | Reason::TunnelSequence) => {
            Way::Unicast(port)
        }
        // A unicast route by some other interface, which has no slot
        Some(Reason::EgressNotServed) => Way::Unicast(u32::MAX),
        _ => Way::Other,
    })
}

#[inline(always)]
fn read(hop: &Nexthop) -> Option<(u32, u32)> {
    order::consistent(&hop.sequence, || (hop.state.load(), hop.port.load()))
}
