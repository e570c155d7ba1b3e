//! The seam between CM's event loop and the watchers that find policies (netfilter, XFRM, rules, tc, captures,
//! sysctls): the loop wakes a watcher, the watcher tells its whole current set, the loop sends what changed.

use crate::error::CmError;
use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Duration;
use towpath_filter::Filter;
use towpath_fpc::{InVrfs, PolicySource, Port, Rule, Scope};
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// The interfaces of the namespace as CM knows them at the moment.
#[derive(Default, Debug)]
pub struct PortIndex {
    ports: BTreeMap<u32, Port>,
    /// The other ends of veth pairs with both ends in the namespace, by interface
    peers: BTreeMap<u32, u32>,
}

impl PortIndex {
    /// The interface with this index.
    pub fn get(&self, ifindex: u32) -> Option<&Port> {
        self.ports.get(&ifindex)
    }

    /// The interface of this name.
    pub fn by_name(&self, name: &str) -> Option<&Port> {
        self.ports.values().find(|port| port.name == name)
    }

    /// All interfaces by index.
    pub fn iter(&self) -> impl Iterator<Item = &Port> {
        self.ports.values()
    }

    /// Whether it is one end of a veth pair whose other end is in the namespace, too.
    pub fn is_near(&self, ifindex: u32) -> bool {
        // An end says so when it comes; the other one tells nothing of that.
        self.peers.values().any(|peer| *peer == ifindex) || self.peers.contains_key(&ifindex)
    }

    /// Learns the other end of an interface, if it has one in the namespace.
    pub fn set_peer(&mut self, ifindex: u32, peer: Option<u32>) {
        match peer {
            Some(peer) => self.peers.insert(ifindex, peer),
            None => self.peers.remove(&ifindex),
        };
    }

    /// Learns or replaces an interface; gives what was known before.
    pub fn insert(&mut self, port: Port) -> Option<Port> {
        self.ports.insert(port.ifindex, port)
    }

    /// Forgets an interface.
    pub fn remove(&mut self, ifindex: u32) -> Option<Port> {
        self.peers.retain(|own, peer| *own != ifindex && *peer != ifindex);
        self.ports.remove(&ifindex)
    }
}

/// Something that stands in the way: a policy, but for whose it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What it touches
    pub scope: Scope,
    /// The reason counted
    pub reason: Reason,
    /// For people: the object that stands in the way
    pub detail: String,
    /// See `Policy`
    pub filter: Option<Filter>,
    /// See `Policy`
    pub flows: Option<u32>,
    /// See `Policy`
    pub in_vrfs: InVrfs,
    /// See `Policy`
    pub rules: Option<Vec<Rule>>,
    /// See `Policy`
    pub momentary: bool,
}

impl Finding {
    /// A finding of any scope.
    pub fn new(scope: Scope, reason: Reason, detail: impl Into<String>) -> Self {
        let (filter, flows, in_vrfs, rules) = (None, None, InVrfs::Stay, None);
        Self { scope, reason, detail: detail.into(), filter, flows, in_vrfs, rules, momentary: false }
    }

    /// The same, but that it is there for a moment only.
    pub fn for_a_moment(self) -> Self {
        Self { momentary: true, ..self }
    }

    /// The same, but that connections which Linux handed over may pass it, by the rules of this generation.
    pub fn passed_by(self, flows: Option<u32>) -> Self {
        Self { flows, ..self }
    }

    /// One that touches every forwarded packet of the family.
    pub fn family(family: Family, reason: Reason, detail: impl Into<String>) -> Self {
        Self::new(Scope::Family(family), reason, detail)
    }
}

/// What rules may ask for that is no rule, and has changed. What comes in pairs is by family (`Family`).
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Moved {
    /// The name or the group of an interface
    pub links: bool,
    /// Routes, or what they depend on
    pub routes: [bool; 2],
}

impl Moved {
    /// Routes of both families.
    pub const ROUTES: Self = Self { links: false, routes: [true; 2] };

    /// Routes of a family.
    pub fn routes_of(family: Family) -> Self {
        let mut moved = Self::default();
        moved.routes[family as usize] = true;
        moved
    }

    /// Takes in what else has.
    pub fn add(&mut self, other: Self) {
        self.links |= other.links;
        self.routes.iter_mut().zip(other.routes).for_each(|(own, other)| *own |= other);
    }
}

/// Finds the policies of one source. Made in the network namespace it watches, and used by one thread.
pub trait Watcher {
    /// Short name for logs.
    fn name(&self) -> &'static str;

    /// Whose policies these are. Several watchers must not share a source: a snapshot replaces its whole set.
    fn source(&self) -> PolicySource;

    /// Descriptors that wake it when they become readable (level-triggered; it must read them empty in `poll`). Asked
    /// for once, after creation; they must stay open until the watcher is dropped.
    fn fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Longest time between polls when nothing wakes it; None if its descriptors tell everything. Asked after each poll.
    fn interval(&self) -> Option<Duration>;

    /// Called once at the start, then when a descriptor is readable, when the interval has passed, and when the set of
    /// interfaces changed. Gives the full current set, in any order.
    ///
    /// After an error the loop declares everything unknown (`Reason::PolicyUnknown`, both families) and polls again
    /// soon; the watcher must then start afresh.
    fn findings(&mut self, ports: &PortIndex) -> Result<Vec<Finding>, CmError>;

    /// Whether notifications were lost since this was asked last. Those that wake a watcher have no content that it uses, so
    /// nothing is missing from what it found since.
    fn has_lost(&mut self) -> bool {
        false
    }

    /// Told what has changed beside its own. By family, `uneven`: two packets of a connection may be routed differently.
    /// True if it must be polled for that.
    fn moved(&mut self, _moved: Moved, _uneven: [bool; 2]) -> bool {
        false
    }
}
