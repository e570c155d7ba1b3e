//! The operator's filters: what is dropped before anything else is done with it, on whatever way it would go.
//!
//! What Linux's own rules match with (nftables at a device's ingress, Linux 6.1) is what these do: addresses wherever there is
//! an IP header to read, in at most two VLAN tags; protocol and ports only in a packet whose headers fit it, ports only where it
//! begins with its transport header. So later fragments and what cannot be read match no filter that asks for ports.

#[cfg(any(test, feature = "std"))]
use crate::Beside;
use crate::network::words4;
use crate::{Entry, Frame, Tables, count_exception};
use towpath_tables::filtering::{PORTS_KNOWN, PROTOCOL_KNOWN, PROTOCOL_SHIFT, Subject, in_force};
use towpath_tables::lpm::{Kind, Word};
use towpath_tables::record::{FILTER_STEPS, FILTERS_COUNTED, Family};
use towpath_tables::{Reason, opaque};
#[cfg(any(test, feature = "std"))]
use towpath_wire::View;
use towpath_wire::ethernet::{self, Ethernet, Tag};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::Ipv6;
use towpath_wire::transport::{Ports, protocol};

/// IPv6 extension headers that are looked behind; what is behind more has a protocol that is not known.
const EXTENSIONS: usize = 6;
/// No frame with an IP header begins its transport header behind this.
const OFFSET: u32 = 0x3fff;

/// A frame that is only looked at.
#[cfg(any(test, feature = "std"))]
pub struct Bytes<'b>(pub &'b [u8]);

#[cfg(any(test, feature = "std"))]
impl Frame for Bytes<'_> {
    fn get<T: View>(&self, offset: usize) -> Option<&T> {
        Some(T::ref_from_prefix(self.0.get(offset..)?).ok()?.0)
    }
    fn get_mut<T: View>(&mut self, _offset: usize) -> Option<&mut T> {
        None
    }
    fn first_len(&self) -> usize {
        self.0.len()
    }
    fn total_len(&self) -> usize {
        self.0.len()
    }
    fn beside(&self) -> Beside {
        Beside::UNKNOWN
    }
    fn move_head(&mut self, _by: i32) -> bool {
        false
    }
    fn trim(&mut self, _by: u32) -> bool {
        false
    }
}

/// Whether the operator has a frame dropped that came in by the interface with this index; it is counted then.
#[inline(always)]
pub fn drops<F: Frame, T: Tables>(frame: &F, tables: &T, ifindex: u32) -> bool {
    let Some(entry) = Entry::find(tables, ifindex) else { return false };
    let Some(index) = decide(frame, tables, ifindex) else { return false };
    count(frame, tables, index);
    let dropped = tables.filter(index).is_some_and(|filter| filter.drops());
    if dropped {
        count_exception(tables, entry.slot, Reason::Filtered);
    }
    dropped
}

/// Whether there are any filters.
#[inline(always)]
pub fn are_there<T: Tables>(tables: &T) -> bool {
    tables.config().is_some_and(|config| config.filters[0].load() | config.filters[1].load() != 0)
}

/// Index of the filter that decides over a frame.
#[inline(always)]
pub fn decide<F: Frame, T: Tables>(frame: &F, tables: &T, ifindex: u32) -> Option<u32> {
    let (ethertype, offset) = behind_tags(frame)?;
    let offset = (F::forget(offset as u32) & OFFSET) as usize;
    let (found, destination, transport) = match ethertype {
        ethernet::IPV4 => {
            let header = frame.get::<Ipv4>(offset)?;
            let root = in_force(tables.config()?, Family::V4)?.root;
            let found = tables.lookup4(root, &header.source).ok()?;
            (found, words4(header.destination), transport4(frame, offset, header))
        }
        ethernet::IPV6 => {
            let header = frame.get::<Ipv6>(offset)?;
            let root = in_force(tables.config()?, Family::V6)?.root;
            let found = tables.lookup6(root, &header.source).ok()?;
            (found, zerocopy::transmute!(header.destination), transport6(frame, offset, header))
        }
        _ => return None,
    };
    let known = F::forget((transport >> 32) as u32);
    let transport = u64::from(known) << 32 | u64::from(F::forget(transport as u32));
    first_match(tables, found, &Subject { ifindex, transport, destination })
}

/// The first filter that matches, from the one that a look-up came to.
#[inline(always)]
fn first_match<T: Tables>(tables: &T, found: Word, subject: &Subject) -> Option<u32> {
    let Kind::Nexthop(mut index) = found.kind() else { return None };
    for _ in 0..FILTER_STEPS {
        let filter = tables.filter(index)?;
        if filter.matches(subject) {
            return Some(index);
        }
        index = filter.next.load();
        if index == 0 {
            return None;
        }
    }
    None
}

/// Number of the filter with this index.
#[inline(always)]
pub const fn number(index: u32) -> u32 {
    index / 2
}

/// Counts a frame over which a filter decided.
#[inline(always)]
fn count<F: Frame, T: Tables>(frame: &F, tables: &T, index: u32) {
    let number = number(index);
    if let Some(line) = tables.filter_stats(number / FILTERS_COUNTED as u32, tables.cpu()) {
        let place = opaque(number as usize) % FILTERS_COUNTED;
        let (packets, bytes) = (&line.packets[place], &line.bytes[place]);
        packets.store(packets.load().wrapping_add(1));
        bytes.store(bytes.load().wrapping_add(frame.total_len() as u64));
    }
}

/// EtherType and place of what is behind the tags.
#[inline(always)]
fn behind_tags<F: Frame>(frame: &F) -> Option<(u16, usize)> {
    let mut offset = size_of::<Ethernet>();
    let mut ethertype = frame.get::<Ethernet>(0)?.ethertype.get();
    for _ in 0..2 {
        if !matches!(ethertype, ethernet::VLAN | ethernet::SERVICE_VLAN) {
            break;
        }
        ethertype = frame.get::<Tag>(offset)?.ethertype.get();
        offset += size_of::<Tag>();
    }
    Some((ethertype, offset))
}

/// `Subject::transport` of a packet with this protocol's header at a place.
#[inline(always)]
fn transport<F: Frame>(frame: &F, protocol: u8, at: usize) -> u64 {
    let known = of_protocol(protocol);
    frame.get::<Ports>(at).map_or(known, |ports| known | PORTS_KNOWN | u64::from(ports.word()))
}

/// The same of one of which only that is known.
#[inline(always)]
const fn of_protocol(protocol: u8) -> u64 {
    PROTOCOL_KNOWN | (protocol as u64) << PROTOCOL_SHIFT
}

/// nft_set_pktinfo_ipv4_validate (include/net/netfilter/nf_tables_ipv4.h)
#[inline(always)]
fn transport4<F: Frame>(frame: &F, offset: usize, header: &Ipv4) -> u64 {
    let (len, total) = (usize::from(header.version_ihl & 15) * 4, usize::from(header.total_len.get()));
    if header.version_ihl >> 4 != 4 || len < size_of::<Ipv4>() || total < len || offset + total > frame.total_len() {
        return 0;
    }
    if header.fragment.get() & Ipv4::OFFSET != 0 {
        return of_protocol(header.protocol);
    }
    transport(frame, header.protocol, offset + len)
}

/// nft_set_pktinfo_ipv6_validate (include/net/netfilter/nf_tables_ipv6.h), and ipv6_find_hdr (net/ipv6/exthdrs_core.c)
#[inline(always)]
fn transport6<F: Frame>(frame: &F, offset: usize, header: &Ipv6) -> u64 {
    let mut at = offset + size_of::<Ipv6>();
    if header.version() != 6 || at + usize::from(header.payload_len.get()) > frame.total_len() {
        return 0;
    }
    let mut protocol = header.next_header;
    for _ in 0..EXTENSIONS {
        if !is_extension(protocol) {
            return transport(frame, protocol, at);
        }
        let Some([next, len, high, low]) = frame.get::<[u8; 4]>(at).copied() else { return 0 };
        if protocol == protocol::FRAGMENT && u16::from_be_bytes([high, low]) & !7 != 0 {
            return if is_extension(next) { 0 } else { of_protocol(next) };
        }
        let len = if protocol == protocol::FRAGMENT { 8 } else { (usize::from(len) + 1) * 8 };
        // What follows is looked at once, however it was come to.
        at = (F::forget((at + len) as u32) & OFFSET) as usize;
        protocol = F::forget(next.into()) as u8;
    }
    0
}

/// What is authenticated (AH) is taken for a protocol of its own there, as in IPv4.
#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, protocol::HOP_BY_HOP | protocol::ROUTING | protocol::FRAGMENT | protocol::DESTINATION_OPTIONS)
}
