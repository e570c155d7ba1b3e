//! IPv4 (RFC 791).

use crate::{checksum::Sum, view};
use zerocopy::{byteorder::network_endian, native_endian};

view! {
    /// The IPv4 header without options, 20 bytes.
    Ipv4 {
        /// Version (4 bits) and header length in words (4 bits)
        version_ihl: u8,
        /// Differentiated services and ECN
        tos: u8,
        /// Length of the packet in bytes, this header included
        total_len: network_endian::U16,
        /// Identification
        id: network_endian::U16,
        /// Flags (3 bits: reserved, don't fragment, more fragments) and fragment offset in eight bytes (13 bits)
        fragment: network_endian::U16,
        /// Time to live
        ttl: u8,
        /// Protocol of the payload
        protocol: u8,
        /// Header checksum, as on the wire
        checksum: native_endian::U16,
        /// Source
        source: [u8; 4],
        /// Destination
        destination: [u8; 4],
    }
}

impl Ipv4 {
    /// `version_ihl` of a header without options
    pub const PLAIN: u8 = 0x45;
    /// Don't fragment
    pub const DONT_FRAGMENT: u16 = 0x4000;
    /// More fragments follow
    pub const MORE_FRAGMENTS: u16 = 0x2000;
    /// Bits of `fragment` that hold the offset
    pub const OFFSET: u16 = 0x1fff;

    /// Whether the checksum over these 20 bytes is right. Covers the header only if it has no options.
    #[inline(always)]
    pub fn checksum_ok(&self) -> bool {
        let words: &[native_endian::U32; 5] = zerocopy::transmute_ref!(self);
        Sum::default().words(words).folds_to(0xffff)
    }

    /// Sets the checksum over these 20 bytes.
    pub fn set_checksum(&mut self) {
        self.checksum.set(0);
        let words: &[native_endian::U32; 5] = zerocopy::transmute_ref!(self);
        self.checksum.set(!Sum::default().words(words).fold());
    }

    /// Sum of the two addresses, for pseudo headers.
    #[inline(always)]
    pub fn address_sum(&self) -> Sum {
        let words: &[native_endian::U32; 5] = zerocopy::transmute_ref!(self);
        let [_, _, _, source, destination] = *words;
        Sum::default().words(&[source, destination])
    }

    /// Takes one from the time to live (which is not 0) and brings the checksum up to date (RFC 1624), with the same
    /// choice between the two zeros as Linux makes (6.1, include/net/ip.h, ip_decrease_ttl).
    #[inline(always)]
    pub fn decrement_ttl(&mut self) {
        let sum = u32::from(self.checksum.get()) + u32::from(0x0100u16.to_be());
        self.checksum.set((sum + u32::from(sum >= 0xffff)) as u16);
        self.ttl = self.ttl.wrapping_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    /// Every checksum stays right through a decrement, for every value of the field that a right header can have.
    #[test]
    fn decrement_keeps_the_checksum_right() {
        for id in 0..=u16::MAX {
            for ttl in [1, 2, 64, 255] {
                let mut header =
                    Ipv4::read_from_bytes(&[0x45, 0, 0, 28, 0, 0, 0, 0, 0, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1])
                        .unwrap();
                header.id.set(id);
                header.ttl = ttl;
                header.set_checksum();
                assert!(header.checksum_ok());
                header.decrement_ttl();
                assert_eq!(header.ttl, ttl - 1);
                assert!(header.checksum_ok(), "id {id} ttl {ttl}");
                assert_ne!(header.checksum.get(), 0xffff, "Linux never leaves this form of zero");
            }
        }
    }

    #[test]
    fn one_wrong_bit_is_seen() {
        let good = [0x45, 0, 0, 28, 1, 2, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 1];
        let mut header = Ipv4::read_from_bytes(&good).unwrap();
        header.set_checksum();
        let good: [u8; 20] = zerocopy::transmute!(header);
        for bit in 0..160 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!Ipv4::read_from_bytes(&bytes).unwrap().checksum_ok(), "bit {bit}");
        }
    }
}
