//! Roots by source: what rules of `ip rule` with `from` come to for a port.

use core::net::IpAddr;

use crate::record::SourceList;

/// Prefixes of sources, address and length, and the root for each; of several that have a source the longest counts.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SourceRoots {
    /// Of one family, at most `record::SOURCES`, the shortest first; bits beyond the lengths are zero
    pub prefixes: Vec<(IpAddr, u8, u32)>,
    /// The root for all other sources
    pub other: u32,
}

/// Writes a list that nobody looks at yet.
pub fn write(record: &SourceList, list: &SourceRoots) {
    for (number, place) in record.prefixes.iter().enumerate() {
        // Without a prefix: no address has bits where none decides.
        let (address, mask, root) = match list.prefixes.get(number) {
            Some((address, len, root)) => (words(*address), mask(address.is_ipv4(), *len), *root),
            None => ([u64::MAX; 2], [0; 2], 0),
        };
        for half in 0..2 {
            place.address[half].store(address[half]);
            place.mask[half].store(mask[half]);
        }
        place.root.store(root);
    }
    record.root.store(list.other);
}

/// An address as a list's prefixes have it.
pub fn words(address: IpAddr) -> [u64; 2] {
    match address {
        // Its bytes are the first ones.
        IpAddr::V4(address) => halves(u128::from(address.to_bits()) << 96),
        IpAddr::V6(address) => halves(address.to_bits()),
    }
}

fn mask(v4: bool, len: u8) -> [u64; 2] {
    let bits = u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0);
    halves(if v4 { bits & u128::MAX << 96 } else { bits })
}

/// As on the wire.
fn halves(bits: u128) -> [u64; 2] {
    let (first, last) = ((bits >> 64) as u64, bits as u64);
    [u64::from_ne_bytes(first.to_be_bytes()), u64::from_ne_bytes(last.to_be_bytes())]
}
