//! Mappings of addresses (`towpath nat`): how a packet's mapping is found, and what it makes of an address.
//!
//! A mapping belongs to a port. What leaves by the port with a source inside has the source outside that is at the same
//! distance from the prefix's first address; what comes in by it with a destination outside has that destination inside. Or it
//! does so for one address and one TCP or UDP port (a service).

use crate::flow::mix;
use crate::opaque;
use crate::order;
use crate::record::PORT_SLOTS;
use crate::record::{Config, Family, MAPPING_LENGTHS, MAPPING_PLACES, MAPPING_SERVICE, MAPPINGS, MappingSet};

/// Names of the tc programs on a port with mappings, by `Way`.
pub const PROGRAMS: [&str; 2] = ["towpath_nat_out", "towpath_nat_in"];

/// An address as on the wire: IPv4 in the first half of the first word.
pub type Words = [u64; 2];

/// Which way a packet passes the port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
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

/// What a packet says of its port: as `Mapping::services` in the lower half, and in the upper half the bits of it that are
/// known.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Service(pub u64);

impl Service {
    /// Of a protocol without mappings of ports
    pub const NONE: Self = Self(0xffff_ffff << 32);
    /// Nothing is known
    pub const UNKNOWN: Self = Self(0);

    /// A port, as on the wire
    #[inline(always)]
    pub const fn new(protocol: u8, port: u16) -> Self {
        Self(Self::NONE.0 | (protocol as u64) << 16 | port as u64)
    }

    /// Any port of a protocol
    #[inline(always)]
    pub const fn of_protocol(protocol: u8) -> Self {
        Self(0xff_0000 << 32 | (protocol as u64) << 16)
    }

    #[inline(always)]
    const fn known(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// A mapping that was found: which set, and which of its mappings. Never 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found(pub u32);

impl Found {
    /// Of a port, and the packet did not tell its own
    const GUESS: u32 = 1 << 31;

    #[inline(always)]
    const fn number(self) -> u32 {
        (self.0 & !Self::GUESS).wrapping_sub(1)
    }

    /// Index of the set
    #[inline(always)]
    pub const fn set(self) -> u32 {
        self.number() / MAPPINGS as u32
    }

    /// Index of the mapping in its set, and of its counters
    #[inline(always)]
    pub const fn mapping(self) -> usize {
        self.number() as usize % MAPPINGS
    }

    /// Whether it may be another of the address's ports that is meant, or none.
    #[inline(always)]
    pub const fn is_guess(self) -> bool {
        self.0 & Self::GUESS != 0
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

/// The two places of the index, in one of which the mapping of this kind with this first address and service is; of a prefix
/// the service is `UNKNOWN`.
#[inline(always)]
pub fn places(seed: u32, way: Way, kind: u32, first: Words, service: Service) -> [usize; 2] {
    let hash = first.iter().fold(u64::from(seed) << 1 | way as u64, |hash, word| mix(hash, *word));
    let hash = mix(mix(hash, kind.into()), service.0);
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
pub fn find(
    set: &MappingSet,
    index: u32,
    slot: u32,
    way: Way,
    family: Family,
    address: Words,
    service: Service,
) -> Option<Found> {
    let seed = set.seed.load();
    let mut lengths = set.lengths[opaque(slot as usize) % PORT_SLOTS as usize][opaque(family as usize) % 2].load();
    for _ in 0..MAPPING_LENGTHS {
        let len = (lengths as u32 & 0xff).checked_sub(1)?;
        lengths >>= 8;
        let mask = &set.masks[opaque(len as usize) % set.masks.len()];
        let first = [address[0] & mask[0].load(), address[1] & mask[1].load()];
        let kind = kind(slot, family, len);
        let is_service = opaque((len == MAPPING_SERVICE) as usize) as u64;
        let service = Service(service.0 & 0u64.wrapping_sub(is_service));
        let mut found = 0;
        for place in places(seed, way, kind, first, service) {
            let number = set.places[opaque(place) % MAPPING_PLACES].load();
            // A place that is empty leads to the last one: if that is it, so much the better.
            let number = opaque(number.wrapping_sub(1) as usize) % MAPPINGS;
            let mapping = &set.mappings[number];
            let [high, low] = &mapping.addresses[opaque(way as usize) % 2];
            let other = (mapping.services[opaque(way as usize) % 2].load() ^ service.0 as u32) & service.known();
            let differs =
                u64::from(mapping.kind.load() ^ kind | other) | high.load() ^ first[0] | low.load() ^ first[1];
            let is_other = opaque(((differs | differs.wrapping_neg()) >> 63) as usize);
            // A guess may fit at both places: the first is it.
            let is_first = opaque((found == 0) as usize);
            found |= (number + 1) * (1 - is_other) * is_first;
        }
        if found != 0 {
            let is_guess = is_service as u32 & u32::from(service.known() != u32::MAX);
            return Some(Found((is_guess << 31) + index * MAPPINGS as u32 + found as u32));
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

    /// The port that such a packet gets, as on the wire; 0 if it keeps its own.
    #[inline(always)]
    pub fn port(&self, found: Found, way: Way) -> u16 {
        self.mappings[opaque(found.mapping()) % MAPPINGS].services[opaque(way.other() as usize) % 2].load() as u16
    }

    /// Whether an address is one of those that this mapping translates.
    #[inline(always)]
    pub fn has(&self, found: Found, way: Way, address: Words) -> bool {
        let mapping = &self.mappings[opaque(found.mapping()) % MAPPINGS];
        let mask = &self.masks[opaque(mapping.kind.load() as usize >> 16) % self.masks.len()];
        let [high, low] = &mapping.addresses[opaque(way as usize) % 2];
        (high.load() ^ address[0] & mask[0].load()) | (low.load() ^ address[1] & mask[1].load()) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::{HeapBacking, initial_elements};
    use crate::grace::NoReaders;
    use crate::mappings::{MappingValue, Ports, words};
    use crate::writer::TableWriter;
    use std::net::IpAddr;

    #[test]
    fn masks_have_as_many_bits_as_the_prefix() {
        for len in 0..=128 {
            let bytes = mask(len).map(u64::to_ne_bytes).concat();
            let bits = u128::from_be_bytes(bytes.try_into().unwrap());
            assert_eq!(bits, u128::MAX.checked_shl(128 - len).unwrap_or(0), "{len}");
        }
    }

    /// What leads to the first mapping of an address and another of its mappings may stand at the two places of one guess.
    #[test]
    fn a_guess_is_a_mapping_of_the_address() {
        let mut writer = TableWriter::create(HeapBacking::new(initial_elements(1)), NoReaders).expect("tables");
        for net in 0..100 {
            let end = |side: u8, host: u8| IpAddr::from([side, net, 0, host]);
            let all = (0..MAPPINGS as u16).map(|number| {
                // Numbers with bits in common are of different addresses.
                let host = (number.wrapping_mul(40_503) >> 9) as u8;
                let ports = Some(Ports { protocol: 6, numbers: [number, 2000 + number] });
                (
                    u32::from(number),
                    MappingValue { slot: 3, inside: end(10, host), outside: end(20, host), len: 32, ports },
                )
            });
            writer.set_mappings(&all.collect()).expect("room");
            let (view, all) = (writer.view(), writer.mappings());
            let index = in_force(view.config()).expect("a set");
            for (way, side, host) in (0..128).flat_map(|host| [(Way::Out, 10, host), (Way::In, 20, host)]) {
                let (set, address) = (&view.mapping_sets()[index as usize], end(side, host));
                let found = find(set, index, 3, way, Family::V4, words(address), Service::UNKNOWN).expect("a guess");
                let mapping = &all[&(found.mapping() as u32)];
                let of_way = [mapping.inside, mapping.outside][way as usize];
                assert!(found.is_guess() && of_way == address, "{address}: {mapping:?}");
            }
        }
    }
}
