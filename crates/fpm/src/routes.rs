//! Routes as Linux has them, a million and more: ordered maps with small keys and values, hops by reference.

use crate::via::ViaId;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Bound;
pub(crate) use towpath_fpc::table::{DEFAULT, LOCAL, MAIN};
use towpath_fpc::{Prefix, RouteKey};
use towpath_tables::record::Family;

/// RTN_* of include/uapi/linux/rtnetlink.h
pub(crate) mod kind {
    pub const UNICAST: u8 = 1;
    pub const LOCAL: u8 = 2;
    pub const BROADCAST: u8 = 3;
    pub const ANYCAST: u8 = 4;
    pub const MULTICAST: u8 = 5;
}

/// A number for each table: those that are consulted without rules come first, in their order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Rank(u32);

impl Rank {
    const FIRST: Rank = Rank(0);
    const LAST: Rank = Rank(u32::MAX);

    fn of(table: u32) -> Self {
        Self(LOCAL.wrapping_sub(table))
    }

    fn table(self) -> u32 {
        LOCAL.wrapping_sub(self.0)
    }
}

/// Sorted so that the candidates for a prefix lie side by side, the first choice first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Key<const BYTES: usize> {
    address: [u8; BYTES],
    len: u8,
    rank: Rank,
    tos: u8,
    priority: u32,
}

const _: () = assert!(size_of::<Key<4>>() == 16 && size_of::<Key<16>>() == 28);

/// One route, without its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Candidate {
    pub via: ViaId,
    pub kind: u8,
    pub protocol: u8,
    pub unsupported: bool,
    pub generation: u8,
}

const _: () = assert!(size_of::<Candidate>() == 8);

#[derive(Default)]
struct Fib<const BYTES: usize>(BTreeMap<Key<BYTES>, Candidate>);

/// What `Fib` needs to know about addresses.
trait Octets: Copy {
    fn ip(self) -> IpAddr;
    /// None if the address is of the other family.
    fn of(address: IpAddr) -> Option<Self>;
}

impl Octets for [u8; 4] {
    fn ip(self) -> IpAddr {
        self.into()
    }
    fn of(address: IpAddr) -> Option<Self> {
        if let IpAddr::V4(address) = address { Some(address.octets()) } else { None }
    }
}

impl Octets for [u8; 16] {
    fn ip(self) -> IpAddr {
        self.into()
    }
    fn of(address: IpAddr) -> Option<Self> {
        if let IpAddr::V6(address) = address { Some(address.octets()) } else { None }
    }
}

impl<const BYTES: usize> Fib<BYTES>
where
    [u8; BYTES]: Octets,
{
    /// Routes for a prefix in the tables of these ranks.
    fn candidates(
        &self,
        address: [u8; BYTES],
        len: u8,
        (first, last): (Rank, Rank),
    ) -> impl Iterator<Item = (RouteKey, Candidate)> {
        let first = Key { address, len, rank: first, tos: 0, priority: 0 };
        let last = Key { rank: last, tos: u8::MAX, priority: u32::MAX, ..first };
        self.0.range(first..=last).filter_map(|(key, candidate)| Some((key.name()?, *candidate)))
    }

    fn prefixes(&self, start: Bound<Prefix>) -> impl Iterator<Item = Prefix> {
        let octets = |prefix: Prefix| <[u8; BYTES]>::of(prefix.address());
        let from = match start {
            Bound::Included(first) => octets(first).map(|address| {
                Bound::Included(Key { address, len: first.prefix_len(), rank: Rank::FIRST, tos: 0, priority: 0 })
            }),
            Bound::Excluded(last) => octets(last).map(|address| {
                let (len, rank) = (last.prefix_len(), Rank::LAST);
                Bound::Excluded(Key { address, len, rank, tos: u8::MAX, priority: u32::MAX })
            }),
            Bound::Unbounded => None,
        };
        let from = from.unwrap_or(Bound::Unbounded);
        let mut before = None;
        self.0.range((from, Bound::Unbounded)).filter_map(move |(key, _)| {
            let prefix = (key.address, key.len);
            let new = before.replace(prefix) != Some(prefix);
            new.then(|| Prefix::new(key.address.ip(), key.len)).flatten()
        })
    }

    fn iter(&self) -> impl Iterator<Item = (RouteKey, Candidate)> {
        self.0.iter().filter_map(|(key, candidate)| Some((key.name()?, *candidate)))
    }
}

impl<const BYTES: usize> Key<BYTES>
where
    [u8; BYTES]: Octets,
{
    fn name(&self) -> Option<RouteKey> {
        let prefix = Prefix::new(self.address.ip(), self.len)?;
        Some(RouteKey { table: self.rank.table(), prefix, priority: self.priority, tos: self.tos })
    }
}

/// The routes of both families.
#[derive(Default)]
pub(crate) struct Routes {
    v4: Fib<4>,
    v6: Fib<16>,
}

/// Calls `$do` with the map and key of the family of a route's prefix.
macro_rules! with_key {
    ($self:ident, $name:expr, ($map:ident, $key:ident) => $do:expr) => {
        match $name.prefix.address() {
            IpAddr::V4(address) => {
                let $map = &mut $self.v4.0;
                let $key = Key {
                    address: address.octets(),
                    len: $name.prefix.prefix_len(),
                    rank: Rank::of($name.table),
                    tos: $name.tos,
                    priority: $name.priority,
                };
                $do
            }
            IpAddr::V6(address) => {
                let $map = &mut $self.v6.0;
                let $key = Key {
                    address: address.octets(),
                    len: $name.prefix.prefix_len(),
                    rank: Rank::of($name.table),
                    tos: $name.tos,
                    priority: $name.priority,
                };
                $do
            }
        }
    };
}

impl Routes {
    /// Sets a route; returns the one it replaces.
    pub fn set(&mut self, name: RouteKey, candidate: Candidate) -> Option<Candidate> {
        with_key!(self, name, (map, key) => map.insert(key, candidate))
    }

    pub fn remove(&mut self, name: RouteKey) -> Option<Candidate> {
        with_key!(self, name, (map, key) => map.remove(&key))
    }

    /// Routes for exactly this prefix in any table, the first choice without rules first.
    pub fn candidates(&self, prefix: Prefix) -> Box<dyn Iterator<Item = (RouteKey, Candidate)> + '_> {
        self.within(prefix, (Rank::FIRST, Rank::LAST))
    }

    /// Routes for exactly this prefix in a table, the first choice first.
    pub fn candidates_in(&self, table: u32, prefix: Prefix) -> Box<dyn Iterator<Item = (RouteKey, Candidate)> + '_> {
        self.within(prefix, (Rank::of(table), Rank::of(table)))
    }

    fn within(&self, prefix: Prefix, ranks: (Rank, Rank)) -> Box<dyn Iterator<Item = (RouteKey, Candidate)> + '_> {
        match prefix.address() {
            IpAddr::V4(address) => Box::new(self.v4.candidates(address.octets(), prefix.prefix_len(), ranks)),
            IpAddr::V6(address) => Box::new(self.v6.candidates(address.octets(), prefix.prefix_len(), ranks)),
        }
    }

    /// All routes of a family in the order of their prefixes.
    pub fn iter(&self, family: Family) -> Box<dyn Iterator<Item = (RouteKey, Candidate)> + '_> {
        match family {
            Family::V4 => Box::new(self.v4.iter()),
            Family::V6 => Box::new(self.v6.iter()),
        }
    }

    /// The prefixes of a family that have routes, by address and then length, from `start` (of the same family) on.
    pub fn prefixes(&self, family: Family, start: Bound<Prefix>) -> Box<dyn Iterator<Item = Prefix> + '_> {
        match family {
            Family::V4 => Box::new(self.v4.prefixes(start)),
            Family::V6 => Box::new(self.v6.prefixes(start)),
        }
    }

    /// Number of routes of a family.
    pub fn len(&self, family: Family) -> usize {
        match family {
            Family::V4 => self.v4.0.len(),
            Family::V6 => self.v6.0.len(),
        }
    }
}
