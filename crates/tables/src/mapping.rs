//! Mappings of addresses (`towpath nat`): how a packet's mapping is found, and what it makes of an address.
//!
//! A mapping belongs to a port. What leaves by the port with a source inside has the source outside that is at the same
//! distance from the prefix's first address; what comes in by it with a destination outside has that destination inside.

use crate::flow::mix;
use crate::opaque;
use crate::order;
use crate::record::PORT_SLOTS;
use crate::record::{Config, Family, MAPPING_LENGTHS, MAPPING_PLACES, MAPPINGS, MappingSet};

/// Names of the tc programs on a port with mappings, by `Way`.
pub const PROGRAMS: [&str; 2] = ["towpath_nat_out", "towpath_nat_in"];

/// An address as on the wire: IPv4 in the first half of the first word.
pub type Words = [u64; 2];

/// Which way a packet passes the port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Way {
    /// It leaves: what is inside becomes what is outside
    Out = 0,
    /// It comes in
    In = 1,
}

impl Way {
    #[inline(always)]
    const fn other(self) -> Self {
        match self {
            Self::Out => Self::In,
            Self::In => Self::Out,
        }
    }
}

/// A mapping that was found: which set, and which of its mappings. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found(pub u32);

impl Found {
    #[inline(always)]
    const fn new(set: u32, mapping: u32) -> Self {
        Self(set * MAPPINGS as u32 + mapping + 1)
    }

    /// Index of the set
    #[inline(always)]
    pub const fn set(self) -> u32 {
        self.0.wrapping_sub(1) / MAPPINGS as u32
    }

    /// Index of the mapping in its set, and of its counters
    #[inline(always)]
    pub const fn mapping(self) -> usize {
        self.0.wrapping_sub(1) as usize % MAPPINGS
    }
}

/// `Mapping::kind`
#[inline(always)]
pub const fn kind(slot: u32, family: Family, len: u32) -> u32 {
    1 << 31 | len << 16 | (family as u32) << 8 | slot
}

/// The bits that a prefix of this length has.
#[inline(always)]
pub const fn mask(len: u32) -> Words {
    const fn half(len: u32) -> u64 {
        if len == 0 { 0 } else { (u64::MAX << ((64 - len) & 63)).to_be() }
    }
    if len > 64 { [u64::MAX, half(len - 64)] } else { [half(len), 0] }
}

/// The two places of the index, in one of which the mapping of this kind with this first address is.
#[inline(always)]
pub fn places(seed: u32, way: Way, kind: u32, first: Words) -> [usize; 2] {
    let hash = first.iter().fold(u64::from(seed) << 1 | way as u64, |hash, word| mix(hash, *word));
    let hash = mix(hash, kind.into());
    [hash as usize % MAPPING_PLACES, (hash >> 32) as usize % MAPPING_PLACES]
}

/// The set in force.
#[inline(always)]
pub fn in_force(config: &Config) -> Option<u32> {
    order::load(&config.mappings).checked_sub(1)
}

/// Finds the mapping that an address of a packet has at the port in a slot. With few branches: a verifier goes through what
/// follows once for each way that leads there.
#[inline(always)]
pub fn find(set: &MappingSet, index: u32, slot: u32, way: Way, family: Family, address: Words) -> Option<Found> {
    let seed = set.seed.load();
    let mut lengths = set.lengths[opaque(slot as usize) % PORT_SLOTS as usize][opaque(family as usize) % 2].load();
    for _ in 0..MAPPING_LENGTHS {
        let len = (lengths as u32 & 0xff).checked_sub(1)?;
        lengths >>= 8;
        let mask = &set.masks[opaque(len as usize) % set.masks.len()];
        let first = [address[0] & mask[0].load(), address[1] & mask[1].load()];
        let kind = kind(slot, family, len);
        let mut found = 0;
        for place in places(seed, way, kind, first) {
            let number = set.places[opaque(place) % MAPPING_PLACES].load();
            // A place that is empty leads to the last one: if that is it, so much the better.
            let number = opaque(number.wrapping_sub(1) as usize) % MAPPINGS;
            let mapping = &set.mappings[number];
            let [high, low] = &mapping.addresses[opaque(way as usize) % 2];
            let differs = u64::from(mapping.kind.load() ^ kind) | high.load() ^ first[0] | low.load() ^ first[1];
            let is_other = opaque(((differs | differs.wrapping_neg()) >> 63) as usize);
            found |= (number + 1) * (1 - is_other);
        }
        if found != 0 {
            return Some(Found::new(index, found as u32 - 1));
        }
    }
    None
}

impl MappingSet {
    /// What becomes of an address that has this mapping.
    #[inline(always)]
    pub fn apply(&self, found: Found, way: Way, address: Words) -> Words {
        let mapping = &self.mappings[opaque(found.mapping()) % MAPPINGS];
        let mask = &self.masks[opaque(mapping.kind.load() as usize >> 16) % self.masks.len()];
        let [high, low] = &mapping.addresses[opaque(way.other() as usize) % 2];
        [high.load() | address[0] & !mask[0].load(), low.load() | address[1] & !mask[1].load()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_as_many_bits_as_the_prefix() {
        for len in 0..=128 {
            let bytes = mask(len).map(u64::to_ne_bytes).concat();
            let bits = u128::from_be_bytes(bytes.try_into().unwrap());
            assert_eq!(bits, u128::MAX.checked_shl(128 - len).unwrap_or(0), "{len}");
        }
    }
}
