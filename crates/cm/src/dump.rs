//! A dump under way. Notifications are handled while it runs, so each object they speak of is *touched*: what the dump
//! says about it may be older and is ignored. A dump that may have missed something is made again, and the union of
//! its passes counts: what was deleted meanwhile was notified or makes the class be read anew.

use crate::decode::route::KernelRoute;
use crate::netlink::Request;
use std::collections::{HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;
use towpath_fpc::{Address, NeighbourKey, RouteKey, Snapshot};
use towpath_tables::clock;
use towpath_tables::record::Family;

/// Passes after which a dump is taken for complete although objects were deleted during each. A pass misses at most
/// as many objects as were deleted during it, and hardly ever the same ones.
const MAX_PASSES: u32 = 8;

/// A class of objects that is dumped as a whole. The order is the one at start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Class {
    /// Settings per interface
    Netconf(Family),
    /// Interfaces
    Links,
    /// Addresses of the host
    Addresses(Family),
    /// Neighbours
    Neighbours(Family),
    /// Nexthop objects
    Nexthops,
    /// Routes of all tables
    Routes(Family),
}

impl Class {
    /// Every class, in the order they are read at start.
    pub const ALL: [Class; 10] = [
        Class::Netconf(Family::V4),
        Class::Netconf(Family::V6),
        Class::Links,
        Class::Addresses(Family::V4),
        Class::Addresses(Family::V6),
        Class::Neighbours(Family::V4),
        Class::Neighbours(Family::V6),
        Class::Nexthops,
        Class::Routes(Family::V4),
        Class::Routes(Family::V6),
    ];

    /// The snapshot that FPM sees; none for what goes into ports.
    pub fn snapshot(self) -> Option<Snapshot> {
        match self {
            Class::Netconf(_) => None,
            Class::Links => Some(Snapshot::Ports),
            Class::Addresses(family) => Some(Snapshot::Addresses(family)),
            Class::Neighbours(family) => Some(Snapshot::Neighbours(family)),
            Class::Nexthops => Some(Snapshot::Nexthops),
            Class::Routes(family) => Some(Snapshot::Routes(family)),
        }
    }

    fn requests(self) -> VecDeque<Request> {
        match self {
            Class::Netconf(family) => [Request::Netconf(family)].into(),
            Class::Links => [Request::Links].into(),
            Class::Addresses(family) => [Request::Addresses(family)].into(),
            Class::Neighbours(family) => [Request::Neighbours(family)].into(),
            Class::Nexthops => [Request::Nexthops].into(),
            Class::Routes(family) => [Request::Routes(family)].into(),
        }
    }
}

/// What names an object of any class.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Key {
    /// Settings of an interface
    Netconf(Family, i32),
    /// Interface by index
    Link(u32),
    /// Address
    Address(Address),
    /// Neighbour
    Neighbour(NeighbourKey),
    /// Nexthop object by id
    Nexthop(u32),
    /// Route
    Route(RouteKey),
}

impl Key {
    fn class(&self) -> Class {
        let family = |address: &IpAddr| Family::of(*address);
        match self {
            Key::Netconf(family, _) => Class::Netconf(*family),
            Key::Link(_) => Class::Links,
            Key::Address(address) => Class::Addresses(family(&address.address)),
            Key::Neighbour(key) => Class::Neighbours(family(&key.address)),
            Key::Nexthop(_) => Class::Nexthops,
            Key::Route(key) => Class::Routes(key.prefix.family()),
        }
    }
}

/// The state of a dump.
pub struct Dump {
    /// What is read
    pub class: Class,
    /// How many dumps of the class were begun, this one included
    pub run: u64,
    /// `clock::worked` when it began
    pub begun: Duration,
    /// Sequence number of the request under way
    pub sequence: u32,
    /// The kernel has shown everything; what is left is to look at the notifications that came meanwhile
    pub finished: bool,
    /// The kernel says that this pass is not consistent
    pub interrupted: bool,
    /// Routes of one key, until the next key shows that they are all
    pub pending: Vec<KernelRoute>,
    request: Option<Request>,
    requests: VecDeque<Request>,
    passes: u32,
    /// Objects touched; true if one was removed by a notification of this pass
    touched: HashMap<Key, bool>,
    seen: HashSet<Key>,
    /// Address of the route shown last
    last: Option<IpAddr>,
    /// Addresses of IPv4 routes at which the kernel interrupted its walk
    boundaries: HashSet<IpAddr>,
}

impl Dump {
    /// A dump of a class.
    pub fn new(class: Class, run: u64) -> Self {
        Self {
            class,
            run,
            begun: clock::worked(),
            sequence: 0,
            finished: false,
            interrupted: false,
            pending: Vec::new(),
            request: None,
            requests: class.requests(),
            passes: 1,
            touched: HashMap::new(),
            seen: HashSet::new(),
            last: None,
            boundaries: HashSet::new(),
        }
    }

    /// The next request to send, if there is one left.
    pub fn next_request(&mut self) -> Option<Request> {
        self.request = self.requests.pop_front();
        self.request
    }

    /// The request that is being answered.
    pub fn request(&self) -> Option<Request> {
        self.request
    }

    /// A notification spoke of an object.
    pub fn touch(&mut self, key: Key, removed: bool) {
        if key.class() == self.class {
            *self.touched.entry(key).or_default() |= removed;
        }
    }

    /// The dump shows an object; true if that is news.
    pub fn shows(&mut self, key: Key) -> bool {
        if let Key::Route(key) = key {
            self.last = Some(key.prefix.address());
        }
        if key.class() != self.class || self.touched.contains_key(&key) {
            return false;
        }
        if !matches!(key, Key::Address(_) | Key::Neighbour(_) | Key::Route(_)) {
            self.seen.insert(key);
        }
        true
    }

    /// Whether an object was touched, or (interfaces, their settings and nexthop objects only) shown.
    pub fn mentioned(&self, key: Key) -> bool {
        self.seen.contains(&key) || self.touched.contains_key(&key)
    }

    /// The kernel interrupted its walk here.
    pub fn boundary(&mut self) {
        if self.class == Class::Routes(Family::V4) {
            self.boundaries.extend(self.last);
        }
    }

    /// Whether this pass may have missed objects. The kernel finds its place again by counting (IPv6 routes,
    /// neighbours: net/ipv6/ip6_fib.c, fib6_dump_table; IPv4 routes: within one address, net/ipv4/fib_trie.c,
    /// fn_trie_dump_leaf), so that a deletion before it makes it skip.
    fn doubtful(&self) -> bool {
        let mut removed = self.touched.iter().filter(|(_, removed)| **removed).map(|(key, _)| key);
        self.interrupted
            || match self.class {
                Class::Routes(Family::V6) | Class::Neighbours(_) => removed.next().is_some(),
                Class::Routes(Family::V4) => removed.any(|key| match key {
                    Key::Route(key) => self.boundaries.contains(&key.prefix.address()),
                    _ => false,
                }),
                _ => false,
            }
    }

    /// Begins another pass if this one may have missed objects; false if the dump is complete.
    pub fn again(&mut self) -> bool {
        if !self.doubtful() {
            return false;
        }
        if self.passes >= MAX_PASSES {
            tracing::warn!(class = ?self.class, passes = self.passes, "state kept changing while it was read");
            return false;
        }
        self.passes += 1;
        self.interrupted = false;
        self.finished = false;
        self.touched.values_mut().for_each(|removed| *removed = false);
        self.boundaries.clear();
        self.requests = self.class.requests();
        true
    }
}
