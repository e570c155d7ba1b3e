//! Mappings as values, and how a set of them is written and read.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::collections::{BTreeMap, BTreeSet};

use crate::backing::View;
use crate::mapping::{Service, Way, Words, in_force, kind, mask, places};
use crate::order;
use crate::record::*;

/// Seeds that are tried until every mapping has a place; one in thousands does not do.
const SEEDS: u32 = 64;
/// Mappings that one drives out at most.
const PATIENCE: usize = 100;

/// A mapping. Both addresses are of one family, and the first ones of prefixes of this length.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct MappingValue {
    /// Slot of the port
    pub slot: u32,
    /// First address inside
    pub inside: IpAddr,
    /// First address outside
    pub outside: IpAddr,
    /// Length of both prefixes
    pub len: u8,
    /// The ports, if it is of these only; then the prefixes are single addresses
    pub ports: Option<Ports>,
}

/// What a mapping of one address and port is of, besides the addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ports {
    /// TCP's or UDP's number
    pub protocol: u8,
    /// Inside, and outside
    pub numbers: [u16; 2],
}

impl Ports {
    fn record(&self, way: Way) -> u32 {
        u32::from(self.protocol) << 16 | u32::from(self.numbers[way as usize].to_be())
    }

    /// What records say; None if they are of no port.
    fn read(inside: u32, outside: u32) -> Option<Self> {
        let numbers = [inside, outside].map(|record| u16::from_be(record as u16));
        (inside != 0).then_some(Self { protocol: (inside >> 16) as u8, numbers })
    }
}

/// What passed of a mapping, over all CPUs: out, and in.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct MappingTotals {
    /// Packets translated
    pub packets: [u64; 2],
    /// Their bytes, from the IP header on
    pub bytes: [u64; 2],
    /// Packets dropped, since they could not be translated as a whole
    pub dropped: [u64; 2],
}

/// Why a set of mappings cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TooMany {
    /// In all
    #[error("there is room for {MAPPINGS} mappings")]
    Mappings,
    /// Of one port and family
    #[error(
        "mappings of a port and family may have {MAPPING_LENGTHS} different prefix lengths (address and port count as one), \
         and these have more"
    )]
    Lengths,
}

impl MappingValue {
    fn family(&self) -> Family {
        Family::of(self.inside)
    }

    /// The length by which it is looked for
    fn kind_len(&self) -> u8 {
        if self.ports.is_some() { MAPPING_SERVICE as u8 } else { self.len }
    }

    fn kind(&self) -> u32 {
        kind(self.slot, self.family(), self.kind_len().into())
    }

    /// What packets may tell of their ports that it is found by.
    fn services(&self, way: Way) -> Vec<Service> {
        let of_port = |ports: Ports| {
            let known = Service(Service::NONE.0 | u64::from(ports.record(way)));
            vec![known, Service::of_protocol(ports.protocol), Service::UNKNOWN]
        };
        self.ports.map_or(vec![Service::UNKNOWN], of_port)
    }

    fn first(&self, way: Way) -> Words {
        words(match way {
            Way::Out => self.inside,
            Way::In => self.outside,
        })
    }

    /// What a record says; None if it is not in use.
    fn read(record: &Mapping) -> Option<Self> {
        let [slot, family, len, used] = record.kind.load().to_le_bytes();
        let family = if family == Family::V4 as u8 { Family::V4 } else { Family::V6 };
        let address = |way: Way| address(family, record.addresses[way as usize].each_ref().map(|word| word.load()));
        let [inside, outside] = record.services.each_ref().map(|word| word.load());
        let len = if u32::from(len) != MAPPING_SERVICE {
            len
        } else if family == Family::V4 {
            32
        } else {
            128
        };
        (used != 0).then(|| Self {
            slot: slot.into(),
            inside: address(Way::Out),
            outside: address(Way::In),
            len,
            ports: Ports::read(inside, outside),
        })
    }
}

/// An address as mappings have it.
pub fn words(address: IpAddr) -> Words {
    let bytes = match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96).to_be_bytes(),
        IpAddr::V6(address) => address.octets(),
    };
    let (halves, _) = bytes.as_chunks::<8>();
    [u64::from_ne_bytes(halves[0]), u64::from_ne_bytes(halves[1])]
}

/// The address that such words are.
pub fn address(family: Family, words: Words) -> IpAddr {
    let [high, low] = words.map(|word| u128::from(u64::from_be(word)));
    let bits = high << 64 | low;
    if family == Family::V4 {
        Ipv4Addr::from_bits((bits >> 96) as u32).into()
    } else {
        Ipv6Addr::from_bits(bits).into()
    }
}

/// Whether a set of these could be written.
pub fn check(mappings: &BTreeMap<u32, MappingValue>) -> Result<(), TooMany> {
    if mappings.len() > MAPPINGS || mappings.keys().any(|number| *number as usize >= MAPPINGS) {
        return Err(TooMany::Mappings);
    }
    lengths(mappings).map(drop)
}

/// The lengths of each port's and family's mappings, longest first.
fn lengths(mappings: &BTreeMap<u32, MappingValue>) -> Result<BTreeMap<(u32, usize), u64>, TooMany> {
    let mut all: BTreeMap<_, BTreeSet<u8>> = BTreeMap::new();
    for mapping in mappings.values() {
        all.entry((mapping.slot, mapping.family() as usize)).or_default().insert(mapping.kind_len() + 1);
    }
    if all.values().any(|lengths| lengths.len() > MAPPING_LENGTHS) {
        return Err(TooMany::Lengths);
    }
    let word = |lengths: BTreeSet<u8>| lengths.into_iter().fold(0, |word, len| word << 8 | u64::from(len));
    Ok(all.into_iter().map(|(of, lengths)| (of, word(lengths))).collect())
}

/// All by which a mapping is found: the way, `Mapping::kind`, the first address, and the service.
type Key = (Way, u32, Words, Service);

/// Which mapping each key leads to. Of those that only differ by their ports, the first stands for what does not tell its own.
fn keys(mappings: &BTreeMap<u32, MappingValue>) -> BTreeMap<Key, u32> {
    let mut keys = BTreeMap::new();
    for (number, mapping) in mappings {
        for way in [Way::Out, Way::In] {
            for service in mapping.services(way) {
                keys.entry((way, mapping.kind(), mapping.first(way), service)).or_insert(*number);
            }
        }
    }
    keys
}

/// The index of these keys for a seed; None if there is none in which each has one of its places. Whoever finds both of
/// its places taken drives one out to its other one (Pagh and Rodler, Cuckoo hashing).
fn index(keys: &BTreeMap<Key, u32>, seed: u32) -> Option<BTreeMap<usize, u32>> {
    let mut index: BTreeMap<usize, ([usize; 2], u32)> = BTreeMap::new();
    for ((way, kind, first, service), number) in keys {
        let mut homeless = (places(seed, *way, *kind, *first, *service), number + 1);
        let mut at = homeless.0[0];
        for _ in 0..PATIENCE {
            let Some(driven_out) = index.insert(at, homeless) else { break };
            homeless = driven_out;
            at = homeless.0.into_iter().find(|place| *place != at).unwrap_or(at);
        }
    }
    (index.len() == keys.len()).then(|| index.into_iter().map(|(place, (_, number))| (place, number)).collect())
}

/// Writes a set that no reader looks at.
pub fn write(set: &MappingSet, mappings: &BTreeMap<u32, MappingValue>) -> Result<(), TooMany> {
    check(mappings)?;
    let lengths = lengths(mappings)?;
    let keys = keys(mappings);
    let (seed, places) = (0..SEEDS).find_map(|seed| Some((seed, index(&keys, seed)?))).ok_or(TooMany::Mappings)?;
    set.seed.store(seed);
    for (len, words) in (0..).zip(&set.masks) {
        words.iter().zip(mask(u32::min(len, 128))).for_each(|(word, mask)| word.store(mask));
    }
    for (slot, families) in set.lengths.iter().enumerate() {
        for (family, word) in families.iter().enumerate() {
            word.store(lengths.get(&(slot as u32, family)).copied().unwrap_or(0));
        }
    }
    set.places.iter().enumerate().for_each(|(at, place)| place.store(places.get(&at).copied().unwrap_or(0)));
    for (number, record) in (0..).zip(&set.mappings) {
        let mapping = mappings.get(&number);
        record.kind.store(mapping.map_or(0, MappingValue::kind));
        for way in [Way::Out, Way::In] {
            let first = mapping.map_or([0; 2], |mapping| mapping.first(way));
            record.addresses[way as usize].iter().zip(first).for_each(|(word, value)| word.store(value));
            let ports = mapping.and_then(|mapping| mapping.ports);
            record.services[way as usize].store(ports.map_or(0, |ports| ports.record(way)));
        }
    }
    Ok(())
}

/// The mappings in force, by number.
pub fn read(view: &View<'_>) -> BTreeMap<u32, MappingValue> {
    let set = in_force(view.config()).and_then(|index| view.mapping_sets().get(index as usize));
    set.map(in_set).unwrap_or_default()
}

/// The mappings of a set, by number.
pub fn in_set(set: &MappingSet) -> BTreeMap<u32, MappingValue> {
    (0..).zip(&set.mappings).filter_map(|(number, record)| Some((number, MappingValue::read(record)?))).collect()
}

/// The first address of the prefix of this length that an address is in.
pub fn first(of: IpAddr, len: u8) -> IpAddr {
    let (words, mask) = (words(of), mask(len.into()));
    address(Family::of(of), [words[0] & mask[0], words[1] & mask[1]])
}

/// Puts a set into force; nobody may look at the other one any more. Counters of mappings that are new start at 0.
pub(crate) fn publish(view: &View<'_>, mappings: &BTreeMap<u32, MappingValue>) -> Result<(), TooMany> {
    let before = read(view);
    let other = in_force(view.config()).map_or(0, |index| 1 - index % 2);
    write(&view.mapping_sets()[other as usize], mappings)?;
    for number in mappings.keys().filter(|number| !before.contains_key(number)) {
        for counters in counters(view, *number) {
            let all = counters.packets.iter().chain(&counters.bytes).chain(&counters.dropped);
            all.for_each(|counter| counter.store(0));
        }
    }
    order::publish(&view.config().mappings, if mappings.is_empty() { 0 } else { other + 1 });
    Ok(())
}

fn counters<'a>(view: &View<'a>, number: u32) -> impl Iterator<Item = &'a MappingCounters> + use<'a> {
    view.mapping_stats().iter().skip(number as usize).step_by(MAPPINGS)
}

/// What passed of a mapping.
pub fn totals(view: &View<'_>, number: u32) -> MappingTotals {
    let mut totals = MappingTotals::default();
    for counters in counters(view, number) {
        for way in 0..2 {
            totals.packets[way] += counters.packets[way].load();
            totals.bytes[way] += counters.bytes[way].load();
            totals.dropped[way] += counters.dropped[way].load();
        }
    }
    totals
}
