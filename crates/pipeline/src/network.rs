//! What IPv4 and IPv6 differ in. The checks are those that Linux makes before and while it forwards (6.1,
//! net/ipv4/{ip_input,route,ip_forward}.c, net/ipv6/{ip6_input,ip6_output}.c); where Linux answers, drops or delivers,
//! the packet is an exception.

use crate::{Frame, Tables, ingress::Entry, source};
use towpath_tables::record::{Family, port_flags};
use towpath_tables::{Reason, lpm, opaque};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::{EncapsulationLimit, Ipv6};
use towpath_wire::transport::protocol;
use towpath_wire::{Sum, View, ethernet};

/// Which part of a datagram a packet carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// All of it
    Whole,
    /// The fragment that begins with the transport header
    First,
    /// A later fragment
    Later,
}

/// A network header, IPv4 or IPv6.
pub trait Network: View {
    /// The family
    const FAMILY: Family;
    /// Its EtherType
    const ETHERTYPE: u16;
    /// The `port_flags` bit that says that packets entering there may be forwarded
    const FORWARDING: u32;
    /// Protocol number of the family's ICMP
    const ICMP: u8;

    /// Checks the header against the bytes that the frame has from it on; the length of the packet.
    fn packet_len(&self, available: usize) -> Result<usize, Reason>;
    /// Checks what can be said of the addresses without a table.
    fn check_scopes(&self, flags: u32) -> Result<(), Reason>;
    /// Checks the source against the tables, for a packet that is to leave by the port in slot `out`.
    fn check_source<T: Tables>(&self, tables: &T, entry: &Entry, out: u32) -> Result<(), Reason>;
    /// The source as on the wire; IPv4 in the first half of the first word
    fn source_words(&self) -> [u64; 2];
    /// The route to the destination
    fn lookup<T: Tables>(&self, tables: &T, root: u32) -> Result<lpm::Word, lpm::Internal>;
    /// Whether Linux may send a redirect for a packet that leaves by the port that it entered by
    fn redirects(flags: u32) -> bool;
    /// Time to live or hop limit
    fn hops_left(&self) -> u8;
    /// Takes one from it
    fn decrement(&mut self);
    /// Protocol of the payload
    fn protocol(&self) -> u8;
    /// What part of a datagram the payload is
    fn part(&self) -> Part;
    /// Where the GRE header of a packet that has one begins, if this header is at `offset`. It may lie behind an encapsulation
    /// limit (RFC 2473), and behind nothing else.
    fn gre<F: Frame>(&self, frame: &F, offset: usize) -> Option<usize>;
    /// Whether an ICMP message of this type quotes the packet that it is about
    fn icmp_quotes(kind: u8) -> bool;
    /// Sum of the addresses for a pseudo header
    fn address_sum(&self) -> Sum;
    /// What the flow hash takes from the addresses, the same for both directions
    fn flow_words(&self) -> [u64; 4];
    /// What it takes besides the addresses if ports are not asked for
    fn flow_extra(&self) -> u64;
}

impl Network for Ipv4 {
    const FAMILY: Family = Family::V4;
    const ETHERTYPE: u16 = ethernet::IPV4;
    const FORWARDING: u32 = port_flags::FORWARD_V4;
    const ICMP: u8 = protocol::ICMP;

    #[inline(always)]
    fn packet_len(&self, available: usize) -> Result<usize, Reason> {
        if self.version_ihl != Ipv4::PLAIN {
            let plain = self.version_ihl >> 4 == 4 && self.version_ihl & 15 > 5;
            return Err(if plain { Reason::IpOptions } else { Reason::BadHeader });
        }
        let len = usize::from(self.total_len.get());
        if len < size_of::<Self>() {
            return Err(Reason::BadHeader);
        }
        if len > available {
            return Err(Reason::Truncated);
        }
        if !self.checksum_ok() {
            return Err(Reason::BadChecksum);
        }
        Ok(len)
    }

    /// ip_route_input_slow: 0.0.0.0 alone is special of 0.0.0.0/8, and of 240.0.0.0/4 only the broadcast address.
    #[inline(always)]
    fn check_scopes(&self, flags: u32) -> Result<(), Reason> {
        if is_plain(self.source) && is_plain(self.destination) {
            return Ok(());
        }
        let (source, destination) = (u32::from_be_bytes(self.source), u32::from_be_bytes(self.destination));
        let loopback_ok = flags & port_flags::ROUTE_LOCALNET != 0;
        if is_multicast(destination) {
            return Err(Reason::Multicast);
        }
        if destination == u32::MAX {
            return Err(Reason::Broadcast);
        }
        if destination == 0 || destination >> 24 == 127 && !loopback_ok {
            return Err(Reason::MartianDestination);
        }
        if source == 0 || is_multicast(source) || source == u32::MAX || source >> 24 == 127 && !loopback_ok {
            return Err(Reason::MartianSource);
        }
        Ok(())
    }

    #[inline(always)]
    fn check_source<T: Tables>(&self, tables: &T, entry: &Entry, out: u32) -> Result<(), Reason> {
        source::check(tables, entry, self, out)
    }

    #[inline(always)]
    fn source_words(&self) -> [u64; 2] {
        words4(self.source)
    }

    #[inline(always)]
    fn lookup<T: Tables>(&self, tables: &T, root: u32) -> Result<lpm::Word, lpm::Internal> {
        tables.lookup4(root, &self.destination)
    }

    #[inline(always)]
    fn redirects(flags: u32) -> bool {
        flags & port_flags::REDIRECTS != 0
    }

    #[inline(always)]
    fn hops_left(&self) -> u8 {
        self.ttl
    }

    #[inline(always)]
    fn decrement(&mut self) {
        self.decrement_ttl();
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.protocol
    }

    #[inline(always)]
    fn part(&self) -> Part {
        match self.fragment.get() & (Ipv4::MORE_FRAGMENTS | Ipv4::OFFSET) {
            0 => Part::Whole,
            Ipv4::MORE_FRAGMENTS => Part::First,
            _ => Part::Later,
        }
    }

    #[inline(always)]
    fn gre<F: Frame>(&self, _frame: &F, offset: usize) -> Option<usize> {
        (self.protocol == protocol::GRE).then_some(offset + size_of::<Self>())
    }

    /// icmp_is_err (6.1, include/linux/icmp.h)
    #[inline(always)]
    fn icmp_quotes(kind: u8) -> bool {
        matches!(kind, 3 | 4 | 5 | 11 | 12)
    }

    #[inline(always)]
    fn address_sum(&self) -> Sum {
        Ipv4::address_sum(self)
    }

    #[inline(always)]
    fn flow_words(&self) -> [u64; 4] {
        let (a, b) = (u32::from_ne_bytes(self.source), u32::from_ne_bytes(self.destination));
        [u64::from(a ^ b) << 32 | u64::from(a.wrapping_add(b)), 0, 0, 0]
    }

    #[inline(always)]
    fn flow_extra(&self) -> u64 {
        0
    }
}

/// An IPv4 address in the first half of the first of two words.
#[inline(always)]
pub(crate) fn words4([a, b, c, d]: [u8; 4]) -> [u64; 2] {
    [u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0]), 0]
}

/// 1.0.0.0 to 223.255.255.255 without 127.0.0.0/8: nothing special about it.
#[inline(always)]
fn is_plain([first, ..]: [u8; 4]) -> bool {
    first.wrapping_sub(1) < 223 && first != 127
}

#[inline(always)]
fn is_multicast(address: u32) -> bool {
    address >> 28 == 0xe
}

impl Network for Ipv6 {
    const FAMILY: Family = Family::V6;
    const ETHERTYPE: u16 = ethernet::IPV6;
    const FORWARDING: u32 = port_flags::FORWARD_V6;
    const ICMP: u8 = protocol::ICMPV6;

    /// Of the extension headers a router looks at hop-by-hop options only (RFC 8200, section 4), which is also what
    /// may say that the packet is a jumbogram. Any other payload length of zero means what it says.
    #[inline(always)]
    fn packet_len(&self, available: usize) -> Result<usize, Reason> {
        if self.version() != 6 {
            return Err(Reason::BadHeader);
        }
        let len = size_of::<Self>() + usize::from(self.payload_len.get());
        if len > available {
            return Err(Reason::Truncated);
        }
        if self.next_header == protocol::HOP_BY_HOP {
            return Err(Reason::ExtensionHeader);
        }
        Ok(len)
    }

    #[inline(always)]
    fn check_scopes(&self, _flags: u32) -> Result<(), Reason> {
        let destination = halves(&self.destination);
        if is_multicast6(destination) {
            return Err(Reason::Multicast);
        }
        if is_unspecified_or_loopback(destination) {
            return Err(Reason::MartianDestination);
        }
        let source = halves(&self.source);
        if is_multicast6(source) || is_unspecified_or_loopback(source) || is_v4_mapped(source) {
            return Err(Reason::MartianSource);
        }
        if is_link_local(source) || is_link_local(destination) {
            return Err(Reason::LinkLocal);
        }
        Ok(())
    }

    /// Linux has no reverse path filter for IPv6 outside netfilter, and forwards packets with a source of its own.
    #[inline(always)]
    fn check_source<T: Tables>(&self, _tables: &T, _entry: &Entry, _out: u32) -> Result<(), Reason> {
        Ok(())
    }

    #[inline(always)]
    fn source_words(&self) -> [u64; 2] {
        zerocopy::transmute!(self.source)
    }

    #[inline(always)]
    fn lookup<T: Tables>(&self, tables: &T, root: u32) -> Result<lpm::Word, lpm::Internal> {
        tables.lookup6(root, &self.destination)
    }

    /// ip6_forward asks no sysctl.
    #[inline(always)]
    fn redirects(_flags: u32) -> bool {
        true
    }

    #[inline(always)]
    fn hops_left(&self) -> u8 {
        self.hop_limit
    }

    #[inline(always)]
    fn decrement(&mut self) {
        self.hop_limit = self.hop_limit.wrapping_sub(1);
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        self.next_header
    }

    #[inline(always)]
    fn part(&self) -> Part {
        if self.next_header == protocol::FRAGMENT { Part::Later } else { Part::Whole }
    }

    /// Linux passes over an option that it does not know, as this one is to it (ip6_parse_tlv, net/ipv6/exthdrs.c), if sysctls
    /// let it (`max_dst_opts_number`).
    #[inline(always)]
    fn gre<F: Frame>(&self, frame: &F, offset: usize) -> Option<usize> {
        /// No GRE header lies farther behind.
        const FARTHEST: usize = 0x7f;
        let place = offset + size_of::<Self>();
        let place = match self.next_header {
            protocol::GRE => place,
            protocol::DESTINATION_OPTIONS => {
                let options = frame.get::<EncapsulationLimit>(place)?;
                let limit = EncapsulationLimit::new(options.limit, protocol::GRE);
                (*options == limit).then_some(place + size_of::<EncapsulationLimit>())?
            }
            _ => return None,
        };
        Some(opaque(place) & FARTHEST)
    }

    /// icmpv6_is_err (6.1, include/linux/icmpv6.h)
    #[inline(always)]
    fn icmp_quotes(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    #[inline(always)]
    fn address_sum(&self) -> Sum {
        Ipv6::address_sum(self)
    }

    #[inline(always)]
    fn flow_words(&self) -> [u64; 4] {
        let ((a, b), (c, d)) = (halves(&self.source), halves(&self.destination));
        [a ^ c, b ^ d, a.wrapping_add(c), b.wrapping_add(d)]
    }

    #[inline(always)]
    fn flow_extra(&self) -> u64 {
        u64::from(self.flow_label()) << 8 | u64::from(self.next_header)
    }
}

/// An IPv6 address as two numbers.
#[inline(always)]
fn halves(address: &[u8; 16]) -> (u64, u64) {
    let [hi, lo]: [zerocopy::byteorder::network_endian::U64; 2] = zerocopy::transmute!(*address);
    (hi.get(), lo.get())
}

#[inline(always)]
fn is_multicast6((hi, _): (u64, u64)) -> bool {
    hi >> 56 == 0xff
}

#[inline(always)]
fn is_unspecified_or_loopback((hi, lo): (u64, u64)) -> bool {
    hi == 0 && lo <= 1
}

/// ::ffff:0:0/96: kernels have disagreed on whether such a source is forwarded.
#[inline(always)]
fn is_v4_mapped((hi, lo): (u64, u64)) -> bool {
    hi == 0 && lo >> 32 == 0xffff
}

#[inline(always)]
fn is_link_local((hi, _): (u64, u64)) -> bool {
    hi >> 54 == 0xfe80 >> 6
}
