//! Roots by source: what rules of `ip rule` with `from` come to for a port.

use core::net::IpAddr;

use crate::mapping::mask;
use crate::mappings::words;
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
            Some((address, len, root)) => (words(*address), mask(u32::from(*len)), *root),
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
