//! The root that a packet is looked up in: that of the port that it came in by, or, where rules ask for sources, one chosen
//! by the packet's.

use crate::Tables;
use crate::network::Network;
use towpath_tables::Reason;
use towpath_tables::record::{BY_SOURCE, Port};

/// The root for a packet from this address, as on the wire (IPv4 in the first half of the first word).
#[inline(always)]
pub fn root_for<N: Network, T: Tables>(
    tables: &T,
    port: &Port,
    source: impl FnOnce() -> [u64; 2],
) -> Result<u32, Reason> {
    choose(tables, port.root[N::FAMILY as usize].load(), source)
}

/// What a port's `root` comes to for this source.
#[inline(always)]
pub fn choose<T: Tables>(tables: &T, root: u32, source: impl FnOnce() -> [u64; 2]) -> Result<u32, Reason> {
    if root & BY_SOURCE == 0 {
        return Ok(root);
    }
    tables.root_by_source(root & !BY_SOURCE, source()).ok_or(Reason::Internal)
}

/// What a list of roots says for this source.
#[inline(always)]
pub fn by_source<T: Tables>(tables: &T, list: u32, source: [u64; 2]) -> Option<u32> {
    let list = tables.sources(list)?;
    let mut root = list.root.load();
    for prefix in &list.prefixes {
        let outside = (source[0] & prefix.mask[0].load() ^ prefix.address[0].load())
            | (source[1] & prefix.mask[1].load() ^ prefix.address[1].load());
        if outside == 0 {
            root = prefix.root.load();
        }
    }
    Some(root)
}
