//! GRE (RFC 2784) with the key and sequence number of RFC 2890.

use crate::view;
use zerocopy::byteorder::network_endian::U16;

view! {
    /// What every GRE header begins with, 4 bytes. Behind it lie, each if its flag is set and in this order: the checksum
    /// with two bytes that mean nothing, the key, the sequence number (4 bytes each).
    Gre {
        /// Flags and version
        flags: U16,
        /// EtherType of the payload
        protocol: U16,
    }
}

impl Gre {
    /// A checksum over this header and the payload
    pub const CHECKSUM: u16 = 0x8000;
    /// A key
    pub const KEY: u16 = 0x2000;
    /// A sequence number
    pub const SEQUENCE: u16 = 0x1000;

    /// Length of a header with these flags, if they say nothing else.
    #[inline(always)]
    pub const fn len(flags: u16) -> Option<usize> {
        if flags & !(Self::CHECKSUM | Self::KEY | Self::SEQUENCE) != 0 {
            return None;
        }
        Some(Self::key_place(flags) + word_if(flags, Self::KEY) + word_if(flags, Self::SEQUENCE))
    }

    /// Where the key lies in a header that has one.
    #[inline(always)]
    pub const fn key_place(flags: u16) -> usize {
        size_of::<Self>() + word_if(flags, Self::CHECKSUM)
    }
}

/// A word's length if the flag is set, without a branch: a verifier would go both ways.
#[inline(always)]
const fn word_if(flags: u16, flag: u16) -> usize {
    (flags >> (flag.trailing_zeros() - 2) & 4) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let header = Gre::read_from_bytes(&[0x20, 0, 0x86, 0xdd]).unwrap();
        assert_eq!((header.flags.get(), header.protocol.get()), (Gre::KEY, 0x86dd));
        let places = |flags| (Gre::len(flags), Gre::key_place(flags));
        assert_eq!(places(0), (Some(4), 4));
        assert_eq!(places(Gre::KEY), (Some(8), 4));
        assert_eq!(places(Gre::CHECKSUM), (Some(8), 8));
        assert_eq!(places(Gre::SEQUENCE), (Some(8), 4));
        assert_eq!(places(Gre::CHECKSUM | Gre::KEY), (Some(12), 8));
        assert_eq!(places(Gre::CHECKSUM | Gre::KEY | Gre::SEQUENCE), (Some(16), 8));
        for other in (0..16).map(|bit| 1 << bit).filter(|flag| ![Gre::CHECKSUM, Gre::KEY, Gre::SEQUENCE].contains(flag))
        {
            assert_eq!(Gre::len(Gre::KEY | other), None, "{other:x}");
        }
    }
}
