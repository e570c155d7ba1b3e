//! What tunnels over IPv4 and over IPv6 differ in outside (Linux 6.1 and 6.18, net/ipv4/{ip_tunnel,ip_tunnel_core}.c,
//! net/ipv6/{ip6_gre,ip6_tunnel}.c).

use super::inner::{ECN, Inner};
use crate::{Frame, Parsed, hash};
use towpath_tables::record::{Config, Family, Tunnel, tunnel_flags};
use towpath_tables::word::W32;
use towpath_tables::{Reason, opaque};
use towpath_wire::ipv4::Ipv4;
use towpath_wire::ipv6::{EncapsulationLimit, Ipv6};
use towpath_wire::transport::protocol;
use zerocopy::{byteorder::network_endian::U16, native_endian};

/// Explicit congestion notification (RFC 3168)
const ECT_0: u8 = 2;
const CONGESTED: u8 = 3;

/// A header that a tunnel's packets have outside.
pub trait Outer: Inner + Copy {
    /// What of `tunnel_flags` such a tunnel has
    const FLAGS: u32 = match Self::FAMILY {
        Family::V4 => tunnel_flags::GRE,
        Family::V6 => tunnel_flags::GRE | tunnel_flags::V6,
    };
    /// Words of an address
    const WORDS: usize = match Self::FAMILY {
        Family::V4 => 1,
        Family::V6 => 4,
    };

    /// Our end and the other one, of a packet to us, as in `Tunnel`
    fn ends(&self) -> [[u32; 4]; 2];
    /// The header of a packet that goes into the tunnel, which has these flags, with this packet inside. Its length is still
    /// to be set.
    fn new<N: Inner, F: Frame>(
        frame: &F,
        inner: &N,
        parsed: &Parsed,
        config: &Config,
        tunnel: &Tunnel,
        flags: u32,
    ) -> Result<Self, Reason>;
    /// Sets the length of the whole packet.
    fn set_len(&mut self, len: u16);
}

impl Outer for Ipv4 {
    #[inline(always)]
    fn ends(&self) -> [[u32; 4]; 2] {
        [self.destination, self.source].map(|address| [u32::from_ne_bytes(address), 0, 0, 0])
    }

    /// ip_tunnel_xmit, iptunnel_xmit. The packet always says "don't fragment", since tunnels that do not are Linux's; so its
    /// identification means nothing (RFC 6864), and is 0 where Linux's cannot be foretold.
    #[inline(always)]
    fn new<N: Inner, F: Frame>(
        _: &F,
        inner: &N,
        _: &Parsed,
        _: &Config,
        tunnel: &Tunnel,
        flags: u32,
    ) -> Result<Self, Reason> {
        let [ttl, tos, ..] = tunnel.ttl_tos.load().to_le_bytes();
        let class = inner.class();
        let tos = if flags & tunnel_flags::INHERIT_CLASS != 0 { class } else { tos };
        let ecn = if class & ECN == CONGESTED { ECT_0 } else { class & ECN };
        Ok(Self {
            version_ihl: Self::PLAIN,
            tos: tos & !ECN | ecn,
            total_len: U16::new(0),
            id: U16::new(0),
            fragment: U16::new(Self::DONT_FRAGMENT),
            ttl: if ttl == 0 { inner.hops_left().wrapping_sub(1) } else { ttl },
            protocol: protocol::GRE,
            checksum: native_endian::U16::new(0),
            source: tunnel.local[0].load().to_ne_bytes(),
            destination: tunnel.remote[0].load().to_ne_bytes(),
        })
    }

    #[inline(always)]
    fn set_len(&mut self, len: u16) {
        self.total_len.set(len);
        self.set_checksum();
    }
}

impl Outer for Ipv6 {
    #[inline(always)]
    fn ends(&self) -> [[u32; 4]; 2] {
        [zerocopy::transmute!(self.destination), zerocopy::transmute!(self.source)]
    }

    /// prepare_ip6gre_xmit_ipv4, prepare_ip6gre_xmit_ipv6, ip6_tnl_xmit. ECN of what is inside counts only where the class is
    /// inherited. Where there is no flow label Linux makes one (ip6_make_flowlabel) from a hash that its driver or a secret of
    /// this boot gave the packet; so it is any that is always the same for the same ends.
    #[inline(always)]
    fn new<N: Inner, F: Frame>(
        frame: &F,
        inner: &N,
        parsed: &Parsed,
        config: &Config,
        tunnel: &Tunnel,
        flags: u32,
    ) -> Result<Self, Reason> {
        let [hops, class, ..] = tunnel.ttl_tos.load().to_le_bytes();
        let has = |flag| flags & flag != 0;
        let destination = address(&tunnel.remote);
        inner.check_enters(frame, parsed, &destination)?;
        let class = if has(tunnel_flags::INHERIT_CLASS) { inner.class() } else { class };
        let inherited = if has(tunnel_flags::INHERIT_LABEL) { inner.label() } else { 0 };
        let label = match flags >> tunnel_flags::LABEL_SHIFT | inherited {
            0 if has(tunnel_flags::MAKE_LABEL) => hash::flow_label(config, inner),
            label => label,
        };
        let next_header = if has(tunnel_flags::LIMIT) { protocol::DESTINATION_OPTIONS } else { protocol::GRE };
        Ok(Self {
            version_class_flow: Self::first_word(class, label),
            payload_len: U16::new(0),
            next_header,
            hop_limit: if hops == 0 { inner.hops_left().wrapping_sub(1) } else { hops },
            source: address(&tunnel.local),
            destination,
        })
    }

    #[inline(always)]
    fn set_len(&mut self, len: u16) {
        self.payload_len.set(len.wrapping_sub(size_of::<Self>() as u16));
    }
}

/// An IPv6 address in a tunnel's record. As two numbers it takes less of a program's stack than as four.
#[inline(always)]
fn address([a, b, c, d]: &[W32; 4]) -> [u8; 16] {
    let pair = |first: &W32, second: &W32| {
        let pair: u64 = zerocopy::transmute!([first.load(), second.load()]);
        opaque(pair as usize) as u64
    };
    zerocopy::transmute!([pair(a, b), pair(c, d)])
}

/// What is behind the outer IP header: the encapsulation limit, if the tunnel with these flags has one.
#[inline(always)]
pub fn limit<O: Outer>(tunnel: &Tunnel, flags: u32) -> Option<EncapsulationLimit> {
    if O::FAMILY == Family::V4 || flags & tunnel_flags::LIMIT == 0 {
        return None;
    }
    let [_, _, limit, _] = tunnel.ttl_tos.load().to_le_bytes();
    Some(EncapsulationLimit::new(limit, protocol::GRE))
}
