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
    /// A MAC address in two words as they are on the wire, which is how it is compared and stored.
    Mac {
        /// The first four bytes
        hi: native_endian::U32,
        /// The last two bytes
        lo: native_endian::U16,
    }
}

impl Mac {
    /// The group bit: multicast or broadcast.
    #[inline(always)]
    pub fn is_group(&self) -> bool {
        self.hi.to_bytes()[0] & 1 != 0
    }
}

impl From<[u8; 6]> for Mac {
    fn from(mac: [u8; 6]) -> Self {
        zerocopy::transmute!(mac)
    }
}

view! {
    /// The Ethernet header, 14 bytes.
    Ethernet {
        /// Destination
        destination: Mac,
        /// Source
        source: Mac,
        /// EtherType, or the protocol of the first tag
        ethertype: U16,
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
        assert_eq!(ethernet.destination, Mac::from([1, 2, 3, 4, 5, 6]));
        assert_eq!(ethernet.source, Mac::from([7, 8, 9, 10, 11, 12]));
        assert_eq!(ethernet.ethertype.get(), VLAN);
        assert!(ethernet.destination.is_group() && ethernet.source.is_group());
        assert!(!Mac::from([0xfe, 1, 1, 1, 1, 1]).is_group());
        let tag = Tag::ref_from_bytes(rest).unwrap();
        assert_eq!((tag.id(), tag.ethertype.get()), (100, IPV4));
    }
}
