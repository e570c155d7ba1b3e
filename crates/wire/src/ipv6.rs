//! IPv6 (RFC 8200).

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

impl Ipv6 {
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
    use zerocopy::FromBytes;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let mut bytes = [0u8; 40];
        bytes[..8].copy_from_slice(&[0x6a, 0xbc, 0xde, 0xf1, 0x12, 0x34, 17, 63]);
        bytes[8] = 0x20;
        bytes[39] = 7;
        let header = Ipv6::ref_from_bytes(&bytes).unwrap();
        assert_eq!((header.version(), header.flow_label()), (6, 0xcdef1));
        assert_eq!((header.payload_len.get(), header.next_header, header.hop_limit), (0x1234, 17, 63));
        assert_eq!((header.source[0], header.destination[15]), (0x20, 7));
        assert_eq!(header.address_sum().fold(), 0x2007u16.to_be());
    }
}
