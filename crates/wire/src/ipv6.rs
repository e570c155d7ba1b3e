//! IPv6 (RFC 8200), and the limit of RFC 2473 to how often a packet is put into another.

use crate::{checksum::Sum, view};
use zerocopy::{byteorder::network_endian, native_endian};

view! {
    /// The IPv6 header, 40 bytes.
    Ipv6 {
        /// Version (4 bits), traffic class (8 bits), flow label (20 bits)
        version_class_flow: network_endian::U32,
        /// Length of what follows this header
        payload_len: network_endian::U16,
        /// What follows this header
        next_header: u8,
        /// Hop limit
        hop_limit: u8,
        /// Source
        source: [u8; 16],
        /// Destination
        destination: [u8; 16],
    }
}

view! {
    /// Destination options with a tunnel encapsulation limit (RFC 2473, section 4.1.1) and nothing else, 8 bytes.
    EncapsulationLimit {
        /// What follows
        next_header: u8,
        /// Length, in eight bytes beyond the first eight
        len: u8,
        /// Type and length of the option
        option: [u8; 2],
        /// How often the packet may be put into another yet
        limit: u8,
        /// The option PadN
        padding: [u8; 3],
    }
}

impl EncapsulationLimit {
    /// That limit, before what has this protocol.
    #[inline(always)]
    pub const fn new(limit: u8, next_header: u8) -> Self {
        Self { next_header, len: 0, option: [4, 1], limit, padding: [1, 1, 0] }
    }
}

impl Ipv6 {
    /// `version_class_flow` of a header with this traffic class and flow label.
    #[inline(always)]
    pub fn first_word(class: u8, label: u32) -> network_endian::U32 {
        network_endian::U32::new(6 << 28 | u32::from(class) << 20 | label)
    }

    /// The version, 6 if this is IPv6
    #[inline(always)]
    pub fn version(&self) -> u8 {
        self.version_class_flow.to_bytes()[0] >> 4
    }

    /// The flow label
    #[inline(always)]
    pub fn flow_label(&self) -> u32 {
        self.version_class_flow.get() & 0x000f_ffff
    }

    /// The traffic class
    #[inline(always)]
    pub fn class(&self) -> u8 {
        (self.version_class_flow.get() >> 20) as u8
    }

    /// Sum of the two addresses, for pseudo headers.
    #[inline(always)]
    pub fn address_sum(&self) -> Sum {
        let words: &[native_endian::U32; 10] = zerocopy::transmute_ref!(self);
        let [_, _, a, b, c, d, e, f, g, h] = *words;
        Sum::default().words(&[a, b, c, d, e, f, g, h])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::protocol;
    use zerocopy::FromBytes;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let mut bytes = [0u8; 40];
        bytes[..8].copy_from_slice(&[0x6a, 0xbc, 0xde, 0xf1, 0x12, 0x34, 17, 63]);
        bytes[8] = 0x20;
        bytes[39] = 7;
        let header = Ipv6::ref_from_bytes(&bytes).unwrap();
        assert_eq!((header.version(), header.class(), header.flow_label()), (6, 0xab, 0xcdef1));
        assert_eq!(Ipv6::first_word(0xab, 0xcdef1), header.version_class_flow);
        assert_eq!((header.payload_len.get(), header.next_header, header.hop_limit), (0x1234, 17, 63));
        assert_eq!((header.source[0], header.destination[15]), (0x20, 7));
        assert_eq!(header.address_sum().fold(), 0x2007u16.to_be());
    }

    /// RFC 2473, section 4.1.1, and PadN of RFC 8200, section 4.2
    #[test]
    fn a_limit_is_an_option_and_its_padding() {
        let bytes: [u8; 8] = zerocopy::transmute!(EncapsulationLimit::new(9, protocol::GRE));
        assert_eq!(bytes, [47, 0, 4, 1, 9, 1, 1, 0]);
    }
}
