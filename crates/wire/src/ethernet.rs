//! Ethernet II and VLAN tags (IEEE 802.3, 802.1Q, 802.1ad).

use crate::view;
use zerocopy::{byteorder::network_endian::U16, native_endian};

/// EtherType of IPv4
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6
pub const IPV6: u16 = 0x86dd;
/// Tag protocol of 802.1Q customer tags
pub const VLAN: u16 = 0x8100;
/// Tag protocol of 802.1ad service tags
pub const SERVICE_VLAN: u16 = 0x88a8;

view! {
    /// The Ethernet header, 14 bytes.
    Ethernet {
        /// Destination, and the first two bytes of the source
        first: native_endian::U64,
        /// The rest of the source
        second: native_endian::U32,
        /// EtherType, or the protocol of the first tag
        ethertype: U16,
    }
}

impl Ethernet {
    /// The destination's group bit: multicast or broadcast
    #[inline(always)]
    pub fn is_group(&self) -> bool {
        self.first.to_bytes()[0] & 1 != 0
    }
}

view! {
    /// What follows a tag protocol: the tag's control information, then the next EtherType. Four bytes.
    Tag {
        /// Priority, drop eligible and VLAN identifier
        control: U16,
        /// EtherType of what follows, or the protocol of the next tag
        ethertype: U16,
    }
}

impl Tag {
    /// The VLAN identifier's bits in the tag control information
    pub const ID: u16 = 0x0fff;

    /// VLAN identifier, 0 to 4095
    #[inline(always)]
    pub fn id(&self) -> u16 {
        self.control.get() & Self::ID
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromBytes;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let frame = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0x81, 0x00, 0xe0, 0x64, 0x08, 0x00];
        let (ethernet, rest) = Ethernet::ref_from_prefix(&frame).unwrap();
        assert_eq!(ethernet.first.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(ethernet.second.to_bytes(), [9, 10, 11, 12]);
        assert_eq!(ethernet.ethertype.get(), VLAN);
        assert!(ethernet.is_group());
        let single = [&[0xfe, 1], &frame[2..]].concat();
        assert!(!Ethernet::ref_from_prefix(&single).unwrap().0.is_group());
        let tag = Tag::ref_from_bytes(rest).unwrap();
        assert_eq!((tag.id(), tag.ethertype.get()), (100, IPV4));
    }
}
