//! Mappings of addresses: what the operator asked for, port by port.

use crate::state::family_of;
use std::collections::BTreeMap;
use std::net::IpAddr;
use towpath_fpc::Prefix;
use towpath_tables::mappings::{MappingValue, TooMany, check};
use towpath_tables::record::MAPPINGS;

/// Addresses inside that are others outside, beyond a port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Mapping {
    /// The port's interface
    pub ifindex: u32,
    /// Inside
    pub inside: Prefix,
    /// Outside, of the same length
    pub outside: Prefix,
}

/// Why there can be no such mapping.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MappingError {
    /// The families differ
    #[error("{0} and {1} are of two families")]
    Families(Prefix, Prefix),
    /// The lengths differ
    #[error("{0} and {1} have different lengths: each address inside needs one outside")]
    Lengths(Prefix, Prefix),
    /// Nothing would change
    #[error("{0} and {1} have addresses in common, which would not be translated to what they are not already")]
    Same(Prefix, Prefix),
    /// No hosts have such addresses
    #[error("{0} is not a prefix of unicast addresses that can be translated ({1})")]
    NoUnicast(Prefix, &'static str),
    /// Another one is in the way
    #[error("{0} overlaps with {2} of the mapping of {1}")]
    Overlap(Prefix, Text, Prefix),
    /// The port is none that can have mappings
    #[error("{0}")]
    Port(&'static str),
    /// Not there
    #[error("there is no mapping of {0}")]
    Absent(Text),
    /// Too many
    #[error(transparent)]
    TooMany(#[from] TooMany),
}

/// A mapping in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Text(Prefix, Prefix);

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.0, self.1)
    }
}

impl Mapping {
    fn text(&self) -> Text {
        Text(self.inside, self.outside)
    }

    /// Checks what can be said of a mapping by itself.
    pub(crate) fn check(&self) -> Result<(), MappingError> {
        let (inside, outside) = (self.inside, self.outside);
        if inside.family() != outside.family() {
            return Err(MappingError::Families(inside, outside));
        }
        if inside.prefix_len() != outside.prefix_len() {
            return Err(MappingError::Lengths(inside, outside));
        }
        if inside == outside {
            return Err(MappingError::Same(inside, outside));
        }
        [inside, outside].into_iter().try_for_each(check_unicast)
    }

    /// The mapping in the tables.
    pub(crate) fn value(&self, slot: u32) -> MappingValue {
        let (inside, outside) = (self.inside.address(), self.outside.address());
        MappingValue { slot, inside, outside, len: self.inside.prefix_len() }
    }

    /// The mapping that the tables have for an interface.
    pub(crate) fn of_value(ifindex: u32, value: &MappingValue) -> Option<Self> {
        let prefix = |address| Prefix::new(address, value.len);
        Some(Self { ifindex, inside: prefix(value.inside)?, outside: prefix(value.outside)? })
    }
}

/// Puts a new mapping among others; gives its number.
pub(crate) fn add(all: &mut BTreeMap<u32, Mapping>, new: Mapping) -> Result<u32, MappingError> {
    new.check()?;
    for old in all.values().filter(|old| old.ifindex == new.ifindex) {
        for (mine, theirs) in [(new.inside, old.inside), (new.outside, old.outside)] {
            if overlap(mine, theirs) {
                return Err(MappingError::Overlap(mine, old.text(), theirs));
            }
        }
    }
    let number = (0..MAPPINGS as u32).find(|number| !all.contains_key(number)).ok_or(TooMany::Mappings)?;
    all.insert(number, new);
    // The port stands for its slot.
    let values = all.iter().map(|(number, mapping)| (*number, mapping.value(mapping.ifindex))).collect();
    check(&values).inspect_err(|_| {
        all.remove(&number);
    })?;
    Ok(number)
}

/// Takes a mapping out.
pub(crate) fn remove(all: &mut BTreeMap<u32, Mapping>, old: &Mapping) -> Result<(), MappingError> {
    let number = all.iter().find(|(_, mapping)| *mapping == old).map(|(number, _)| *number);
    let number = number.ok_or_else(|| MappingError::Absent(old.text()))?;
    all.remove(&number);
    Ok(())
}

fn overlap(a: Prefix, b: Prefix) -> bool {
    let len = a.prefix_len().min(b.prefix_len());
    a.family() == b.family() && Prefix::new(a.address(), len) == Prefix::new(b.address(), len)
}

/// Prefixes that no host has addresses of.
fn check_unicast(prefix: Prefix) -> Result<(), MappingError> {
    let none: &[(&str, u8, &'static str)] = &[
        ("0.0.0.0", 8, "this network"),
        ("127.0.0.0", 8, "loopback"),
        ("224.0.0.0", 4, "multicast"),
        ("240.0.0.0", 4, "reserved"),
        ("::", 127, "unspecified and loopback"),
        ("::ffff:0:0", 96, "IPv4-mapped"),
        ("fe80::", 10, "link-local"),
        ("ff00::", 8, "multicast"),
    ];
    for (address, len, why) in none {
        let of: Option<IpAddr> = address.parse().ok();
        if let Some(of) = of.filter(|of| family_of(*of) == prefix.family()).and_then(|of| Prefix::new(of, *len))
            && overlap(prefix, of)
        {
            return Err(MappingError::NoUnicast(prefix, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(inside: &str, outside: &str) -> Mapping {
        let prefix = |text: &str| {
            let (address, len) = text.split_once('/').unwrap();
            Prefix::new(address.parse().unwrap(), len.parse().unwrap()).unwrap()
        };
        Mapping { ifindex: 7, inside: prefix(inside), outside: prefix(outside) }
    }

    #[test]
    fn what_is_no_mapping_is_refused_and_changes_nothing() {
        let mut all = BTreeMap::new();
        add(&mut all, mapping("10.0.0.0/24", "192.0.2.0/24")).unwrap();
        add(&mut all, mapping("2001:db8:a::/48", "2001:db8:b::/48")).unwrap();
        let before = all.clone();
        for (inside, outside, why) in [
            ("10.1.0.0/24", "192.0.3.0/25", "different lengths"),
            ("10.1.0.0/24", "2001:db8::/24", "two families"),
            ("10.1.0.0/24", "10.1.0.0/24", "in common"),
            ("10.0.0.7/32", "192.0.9.7/32", "10.0.0.7/32 overlaps with 10.0.0.0/24"),
            ("10.0.0.0/8", "11.0.0.0/8", "overlaps"),
            ("10.9.0.7/32", "192.0.2.7/32", "192.0.2.7/32 overlaps with 192.0.2.0/24 of the mapping of 10.0.0.0/24 to"),
            ("2001:db8:a:1::/64", "2001:db8:c:1::/64", "overlaps"),
            ("224.0.0.1/32", "10.8.0.1/32", "multicast"),
            ("10.8.0.1/32", "127.0.0.1/32", "loopback"),
            ("0.0.0.0/0", "0.0.0.0/0", "in common"),
            ("fe80::1/128", "2001:db8::1/128", "link-local"),
            ("::1/128", "2001:db8::1/128", "loopback"),
        ] {
            let error = add(&mut all, mapping(inside, outside)).unwrap_err().to_string();
            assert!(error.contains(why), "{inside} {outside}: {error}");
            assert_eq!(all, before);
        }
        let other_port = Mapping { ifindex: 8, ..mapping("10.0.0.0/24", "192.0.2.0/24") };
        assert_eq!(add(&mut all, other_port), Ok(2), "another port's is another matter");
        assert!(remove(&mut all, &mapping("10.0.0.0/25", "192.0.2.0/25")).is_err());
        remove(&mut all, &mapping("10.0.0.0/24", "192.0.2.0/24")).unwrap();
        assert_eq!(add(&mut all, mapping("10.3.0.0/24", "192.0.3.0/24")), Ok(0), "the free number");
    }

    #[test]
    fn there_is_room_for_so_many() {
        let mut all = BTreeMap::new();
        for n in 0..MAPPINGS {
            let host = |net: u8| format!("10.{net}.{}.{}/32", n / 256, n % 256);
            add(&mut all, mapping(&host(1), &host(2))).unwrap();
        }
        assert_eq!(add(&mut all, mapping("10.9.0.1/32", "10.8.0.1/32")), Err(TooMany::Mappings.into()));
        let mut all = BTreeMap::new();
        for len in 9..17 {
            add(&mut all, mapping(&format!("{len}.0.0.0/{len}"), &format!("{}.0.0.0/{len}", len + 100))).unwrap();
        }
        assert_eq!(add(&mut all, mapping("50.0.0.0/24", "51.0.0.0/24")), Err(TooMany::Lengths.into()));
        assert_eq!(all.len(), 8);
    }
}
