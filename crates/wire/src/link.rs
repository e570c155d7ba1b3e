//! Link headers as they are written: from prepared bytes (MAC addresses and tags) and an EtherType.

use crate::{View, view};
use zerocopy::{byteorder::network_endian::U16, native_endian::U32, native_endian::U64};

/// A link header of a fixed shape.
pub trait Link: View {
    /// The header whose bytes before the EtherType are the first of three words as on the wire, which `l2` gives one by
    /// one.
    fn new(l2: impl Fn(usize) -> u64, ethertype: u16) -> Self;
}

view! {
    /// No tags, 14 bytes
    Untagged {
        /// First eight bytes
        first: U64,
        /// Rest of the source address
        second: U32,
        /// EtherType
        ethertype: U16,
    }
}

view! {
    /// One tag, 18 bytes
    Tagged {
        /// First eight bytes
        first: U64,
        /// Rest of the source address, tag
        second: U64,
        /// EtherType
        ethertype: U16,
    }
}

view! {
    /// Two tags, 22 bytes
    DoubleTagged {
        /// First eight bytes
        first: U64,
        /// Rest of the source address, outer tag
        second: U64,
        /// Inner tag
        third: U32,
        /// EtherType
        ethertype: U16,
    }
}

/// The half of a word that comes first on the wire.
#[inline(always)]
fn first_half(word: u64) -> U32 {
    U32::new(if cfg!(target_endian = "little") { word as u32 } else { (word >> 32) as u32 })
}

impl Link for Untagged {
    #[inline(always)]
    fn new(l2: impl Fn(usize) -> u64, ethertype: u16) -> Self {
        Self { first: U64::new(l2(0)), second: first_half(l2(1)), ethertype: U16::new(ethertype) }
    }
}

impl Link for Tagged {
    #[inline(always)]
    fn new(l2: impl Fn(usize) -> u64, ethertype: u16) -> Self {
        Self { first: U64::new(l2(0)), second: U64::new(l2(1)), ethertype: U16::new(ethertype) }
    }
}

impl Link for DoubleTagged {
    #[inline(always)]
    fn new(l2: impl Fn(usize) -> u64, ethertype: u16) -> Self {
        let (first, second) = (U64::new(l2(0)), U64::new(l2(1)));
        Self { first, second, third: first_half(l2(2)), ethertype: U16::new(ethertype) }
    }
}
