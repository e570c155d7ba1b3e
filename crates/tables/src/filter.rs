//! The filter of IPv4 sources to look at: this host's own addresses and those without unicast route
//! (`Config::local_filter`).

use crate::record::LOCAL_FILTER_BITS;

/// The bit of the filter for an address (network byte order): the top bits of a product with 2^32 divided by the
/// golden ratio (Knuth, The Art of Computer Programming, volume 3, 6.4).
#[inline(always)]
pub const fn local_filter_bit(address: [u8; 4]) -> u32 {
    const SHIFT: u32 = 32 - LOCAL_FILTER_BITS.trailing_zeros();
    u32::from_ne_bytes(address).wrapping_mul(0x9e37_79b9) >> SHIFT
}
