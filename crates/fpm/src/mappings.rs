//! Mappings of addresses, or of a TCP or UDP port of an address: what the operator asked for, port by port.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use towpath_fpc::Prefix;
use towpath_tables::mapping::Way;
use towpath_tables::mappings::{MappingValue, Ports, TooMany, check};
use towpath_tables::record::{Family, MAPPINGS};

/// Addresses inside that are others outside, beyond a port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Mapping {
    /// The port's interface
    pub ifindex: u32,
    /// Inside
    pub inside: Prefix,
    /// Outside, of the same length
    pub outside: Prefix,
    /// The ports, if it is of these only; then the prefixes are single addresses
    pub ports: Option<Ports>,
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
    #[error("{0} and {0} are the same: nothing would be translated")]
    Same(End),
    /// No hosts have such addresses
    #[error("{0} is not a prefix of unicast addresses that can be translated ({1})")]
    NoUnicast(Prefix, &'static str),
    /// Another one is in the way
    #[error("{0} overlaps with {2} of the mapping of {1}")]
    Overlap(End, Text, End),
    /// No packets are sent to it
    #[error("{0} is of port 0, which nobody has")]
    NoPort(End),
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
pub struct Text(End, End);

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.0, self.1)
    }
}

/// One side of a mapping: a prefix, or an address and a protocol's port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    prefix: Prefix,
    port: Option<(u8, u16)>,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.port {
            None => self.prefix.fmt(f),
            Some((_, port)) => SocketAddr::new(self.prefix.address(), port).fmt(f),
        }
    }
}

impl End {
    /// A prefix has all ports of its addresses.
    fn overlaps(&self, other: &Self) -> bool {
        overlap(self.prefix, other.prefix) && (self.port.is_none() || other.port.is_none() || self.port == other.port)
    }
}

impl Mapping {
    fn text(&self) -> Text {
        Text(self.inside(), self.outside())
    }

    fn end(&self, prefix: Prefix, way: Way) -> End {
        End { prefix, port: self.ports.map(|ports| (ports.protocol, ports.numbers[way as usize])) }
    }

    /// What is translated of what leaves by the port
    pub fn inside(&self) -> End {
        self.end(self.inside, Way::Out)
    }

    /// What is translated of what comes in by it
    pub fn outside(&self) -> End {
        self.end(self.outside, Way::In)
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
        let ends = [self.inside(), self.outside()];
        if ends[0] == ends[1] {
            return Err(MappingError::Same(ends[0]));
        }
        if let Some(end) = ends.iter().find(|end| matches!(end.port, Some((_, 0)))) {
            return Err(MappingError::NoPort(*end));
        }
        [inside, outside].into_iter().try_for_each(check_unicast)
    }

    /// The mapping in the tables.
    pub(crate) fn value(&self, slot: u32) -> MappingValue {
        let (inside, outside) = (self.inside.address(), self.outside.address());
        MappingValue { slot, inside, outside, len: self.inside.prefix_len(), ports: self.ports }
    }

    /// The mapping that the tables have for an interface.
    pub(crate) fn of_value(ifindex: u32, value: &MappingValue) -> Option<Self> {
        let prefix = |address| Prefix::new(address, value.len);
        Some(Self { ifindex, inside: prefix(value.inside)?, outside: prefix(value.outside)?, ports: value.ports })
    }
}

/// Puts a new mapping among others; gives its number.
pub(crate) fn add(all: &mut BTreeMap<u32, Mapping>, new: Mapping) -> Result<u32, MappingError> {
    new.check()?;
    for old in all.values().filter(|old| old.ifindex == new.ifindex) {
        for (mine, theirs) in [(new.inside(), old.inside()), (new.outside(), old.outside())] {
            if mine.overlaps(&theirs) {
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
        if let Some(of) = of.filter(|of| Family::of(*of) == prefix.family()).and_then(|of| Prefix::new(of, *len))
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
        Mapping { ifindex: 7, inside: prefix(inside), outside: prefix(outside), ports: None }
    }

    fn of_ports(protocol: u8, inside: &str, outside: &str) -> Mapping {
        let [inside, outside]: [SocketAddr; 2] = [inside, outside].map(|text| text.parse().unwrap());
        let alone = |ip: IpAddr| Prefix::new(ip, if ip.is_ipv4() { 32 } else { 128 }).unwrap();
        let ports = Some(Ports { protocol, numbers: [inside.port(), outside.port()] });
        Mapping { ifindex: 7, inside: alone(inside.ip()), outside: alone(outside.ip()), ports }
    }

    #[test]
    fn an_address_may_have_mappings_of_many_ports() {
        let mut all = BTreeMap::new();
        for (protocol, inside, outside) in [
            (6, "10.0.0.5:80", "192.0.2.1:8080"),
            (17, "10.0.0.5:80", "192.0.2.1:8080"),
            (6, "10.0.0.6:80", "192.0.2.1:8081"),
            (6, "10.0.0.5:22", "192.0.2.2:22"),
            (6, "10.0.0.7:22", "10.0.0.7:2222"),
            (6, "[2001:db8::5]:80", "[2001:db8:1::1]:8080"),
        ] {
            add(&mut all, of_ports(protocol, inside, outside)).unwrap();
        }
        add(&mut all, mapping("10.1.0.0/24", "192.0.3.0/24")).unwrap();
        let before = all.clone();
        let refused = |all: &mut _, new, why: &str| {
            let error = add(all, new).unwrap_err().to_string();
            assert!(error.contains(why), "{why}: {error}");
            assert_eq!(*all, before);
        };
        for (protocol, inside, outside, why) in [
            (
                6,
                "10.0.0.5:80",
                "192.0.2.9:80",
                "10.0.0.5:80 overlaps with 10.0.0.5:80 of the mapping of 10.0.0.5:80 to 192",
            ),
            (6, "10.0.0.9:80", "192.0.2.1:8080", "192.0.2.1:8080 overlaps with 192.0.2.1:8080"),
            (6, "10.1.0.9:80", "192.0.2.1:9090", "10.1.0.9:80 overlaps with 10.1.0.0/24"),
            (6, "10.0.0.9:80", "[2001:db8::1]:80", "two families"),
            (6, "10.0.0.9:80", "10.0.0.9:80", "the same"),
            (17, "10.0.0.9:0", "192.0.2.1:80", "10.0.0.9:0 is of port 0"),
            (17, "10.0.0.9:1", "192.0.2.1:0", "192.0.2.1:0 is of port 0"),
            (17, "[fe80::1]:80", "[2001:db8::1]:80", "link-local"),
        ] {
            refused(&mut all, of_ports(protocol, inside, outside), why);
        }
        refused(&mut all, mapping("10.0.0.5/32", "192.0.2.77/32"), "10.0.0.5/32 overlaps with 10.0.0.5:80");
        refused(&mut all, mapping("10.7.0.0/24", "192.0.2.0/24"), "192.0.2.0/24 overlaps with 192.0.2.1:8080");
        assert!(remove(&mut all, &of_ports(17, "10.0.0.6:80", "192.0.2.1:8081")).is_err(), "that is TCP's");
        remove(&mut all, &of_ports(6, "10.0.0.6:80", "192.0.2.1:8081")).unwrap();
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
            ("10.1.0.0/24", "10.1.0.0/24", "the same"),
            ("10.0.0.7/32", "192.0.9.7/32", "10.0.0.7/32 overlaps with 10.0.0.0/24"),
            ("10.0.0.0/8", "11.0.0.0/8", "overlaps"),
            ("10.9.0.7/32", "192.0.2.7/32", "192.0.2.7/32 overlaps with 192.0.2.0/24 of the mapping of 10.0.0.0/24 to"),
            ("2001:db8:a:1::/64", "2001:db8:c:1::/64", "overlaps"),
            ("224.0.0.1/32", "10.8.0.1/32", "multicast"),
            ("10.8.0.1/32", "127.0.0.1/32", "loopback"),
            ("0.0.0.0/0", "0.0.0.0/0", "the same"),
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
