//! The operator's filters (`towpath filter`): what a packet says of itself that they ask for, and whether one matches.
//!
//! Of the filters that match a packet the one with the longest source prefix decides; of those of one source prefix, the one
//! with the longest destination prefix, then the one that asks for more. A look-up of the source leads to the first that may
//! decide, and each says which is the next one.

use crate::mapping::Words;
use crate::order;
use crate::record::{Config, Family, Filter, filter_state};

/// `Subject::transport`: the packet's protocol is known, and in the bits from `PROTOCOL_SHIFT` on
pub const PROTOCOL_KNOWN: u64 = 1 << 40;
/// See `PROTOCOL_KNOWN`
pub const PROTOCOL_SHIFT: u32 = 32;
/// `Subject::transport`: its ports are known, and in the lower half as on the wire
pub const PORTS_KNOWN: u64 = 1 << 41;

/// What filters ask for, besides the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// Index of the interface that the frame came in by
    pub ifindex: u32,
    /// Protocol and ports
    pub transport: u64,
    /// Destination, as on the wire; IPv4 in the first half of the first word
    pub destination: Words,
}

/// A family's filters in force.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InForce {
    /// The root by which they are found
    pub root: u32,
    /// Which half of the records they are in
    pub half: u32,
}

impl InForce {
    /// `Config::filters`
    pub const fn word(self) -> u32 {
        (self.root + 1) << 1 | self.half & 1
    }
}

/// The filters of a family in force.
#[inline(always)]
pub fn in_force(config: &Config, family: Family) -> Option<InForce> {
    let word = order::load(&config.filters[family as usize]);
    (word >> 1).checked_sub(1).map(|root| InForce { root, half: word & 1 })
}

impl Filter {
    /// Whether it matches such a packet.
    #[inline(always)]
    pub fn matches(&self, subject: &Subject) -> bool {
        let [high, low] = &self.destination;
        let [high_mask, low_mask] = &self.destination_mask;
        let ifindex = self.ifindex.load();
        let differs = (self.transport.load() ^ subject.transport) & self.transport_mask.load()
            | (high.load() ^ subject.destination[0]) & high_mask.load()
            | (low.load() ^ subject.destination[1]) & low_mask.load();
        differs == 0 && (ifindex == 0 || ifindex == subject.ifindex)
    }

    /// Whether what it matches is dropped.
    #[inline(always)]
    pub fn drops(&self) -> bool {
        self.state.load() & (filter_state::USED | filter_state::PASS) == filter_state::USED
    }
}
