//! What tools see: ports, routes, neighbours, next hops, policies, and why a packet to an address goes where it goes.

use crate::Fpm;
use crate::mirror::ingress_policy;
use crate::state::{Choice, Resolved};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::Bound;
use towpath_fpc::*;
use towpath_tables::backing::Backing;
use towpath_tables::grace::Grace;
use towpath_tables::lpm::{self, Kind, Leaf, Word};
use towpath_tables::nexthop::{NexthopIdentity, NexthopValue};
use towpath_tables::record::{Family, port_flags};
use towpath_tables::rib::Match;
use towpath_tables::writer::{MAIN_ROOT, PortTotals};
use towpath_tables::{Obstacle, Reason};

/// A port as it stands in the tables.
#[derive(Clone, Debug)]
pub struct PortState<'a> {
    /// What Linux says
    pub port: &'a Port,
    /// Its slot
    pub slot: u32,
    /// Packets may enter by it
    pub ready: bool,
    /// Per family: why packets that enter here are exceptions, if they all are
    pub ingress_policy: [Option<Reason>; 2],
    /// Per family: why packets that leave here are exceptions, if they all are
    pub egress_policy: [Option<Reason>; 2],
    /// Its counters, summed over CPUs
    pub totals: PortTotals,
}

/// How many vias and hosts use a next hop, by family of the packets, IPv4 first.
pub type NexthopUsers = [u32; 2];

/// A next hop as it stands in the tables.
#[derive(Clone, Debug)]
pub struct NexthopState {
    /// Index in the table
    pub index: u32,
    /// What it is
    pub identity: NexthopIdentity,
    /// What it does
    pub value: Option<NexthopValue>,
    /// Who uses it
    pub users: NexthopUsers,
    /// A packet took it since hit flags were last read
    pub hit: bool,
}

/// A prefix that covers an address, with all routes for it.
#[derive(Clone, Debug)]
pub struct Matched {
    /// The prefix
    pub prefix: Prefix,
    /// Its routes, in Linux's order of preference
    pub routes: Vec<Route>,
    /// This prefix decides
    pub decides: bool,
    /// What the prefix leads to whatever the packet: None if to next hops
    pub exception: Option<Reason>,
}

/// Why packets to an address go where they go.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The address
    pub address: IpAddr,
    /// Every prefix that covers it, longest first
    pub prefixes: Vec<Matched>,
    /// What the tables' trie says; None without a route
    pub found: Option<Match>,
    /// The next hops it leads to, with their weights; several if a flow's hash chooses
    pub nexthops: Vec<(NexthopState, u32)>,
    /// Neighbours of these next hops as Linux has them
    pub neighbours: Vec<Neighbour>,
    /// Policies that apply to every packet of the family
    pub policies: Vec<Policy>,
}

impl<B: Backing, G: Grace> Fpm<B, G> {
    /// The ports, by interface index.
    pub fn ports(&self) -> impl Iterator<Item = PortState<'_>> {
        self.mirror.slots.iter().filter_map(|(ifindex, &slot)| {
            let chain = self.state.chain(*ifindex)?;
            let record = self.mirror.tables.view().ports().get(slot as usize)?;
            let families = Family::ALL;
            Some(PortState {
                port: chain[0],
                slot,
                ready: record.flags.load() & port_flags::READY != 0,
                ingress_policy: families.map(|family| self.ingress_reason(&chain, family)),
                egress_policy: families.map(|family| self.state.egress_policy(&chain, family)),
                totals: self.mirror.tables.port_totals(slot),
            })
        })
    }

    fn ingress_reason(&self, chain: &[&Port], family: Family) -> Option<Reason> {
        match self.mirror.rooms.way(&self.state, chain[0].ifindex, family) {
            Some(_) => Some(ingress_policy(&self.state, chain, family)?.reason),
            None => Some(Reason::PolicyRule),
        }
    }

    /// Says of connections of a family that Linux accepted whether they pass from one slot (or VRF, by its number) to another:
    /// not if something that no connection passes is in the way of all packets.
    pub fn passes(&self) -> impl Fn(Family, (u32, u32)) -> bool {
        let view = self.mirror.tables.view();
        let is_shut = |word: u32| Obstacle::of(word).is_some_and(|obstacle| !obstacle.flows);
        // By slot and family: whether they pass it on the way in, and on the way out.
        let mut open = vec![[[false; 2]; 2]; view.ports().len() + self.mirror.vrfs.len()];
        for PortState { slot, ready, egress_policy, .. } in self.ports() {
            let port = &view.ports()[slot as usize];
            for family in 0..2 {
                let words = [&view.config().policy[family], &port.ingress_policy[family]];
                let enters = ready && !words.into_iter().any(|word| is_shut(word.load()));
                open[slot as usize][family] = [enters, egress_policy[family].is_none()];
                let vrf = port.arrival[family].load() as usize;
                if vrf != 0
                    && let Some(open) = open.get_mut(vrf)
                {
                    open[family][0] |= enters;
                }
            }
        }
        let is_open = move |slot: u32, family: Family, way: usize| {
            open.get(slot as usize).is_some_and(|of| of[family as usize][way])
        };
        move |family, (from, to)| is_open(from, family, 0) && is_open(to, family, 1)
    }

    /// The VRFs that flows come in by, by their numbers in `FlowView::accepted`: interface indices.
    pub fn vrfs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.mirror.vrfs.iter().map(|(ifindex, number)| (*number, *ifindex))
    }

    /// Every interface Linux has, port or not.
    pub fn interfaces(&self) -> impl Iterator<Item = &Port> {
        self.state.ports.values().map(|port| &port.value)
    }

    /// The prefixes of a family that have routes, by address and then length, from `start` (of the same family) on.
    pub fn prefixes(&self, family: Family, start: Bound<Prefix>) -> impl Iterator<Item = Prefix> {
        self.state.routes.prefixes(family, start)
    }

    /// Routes for exactly this prefix, in Linux's order of preference.
    pub fn routes_for(&self, prefix: Prefix) -> Vec<Route> {
        self.state.routes.candidates(prefix).map(|(key, candidate)| self.route(key, candidate)).collect()
    }

    /// Number of routes of a family.
    pub fn route_count(&self, family: Family) -> usize {
        self.state.routes.len(family)
    }

    fn route(&self, key: RouteKey, candidate: crate::routes::Candidate) -> Route {
        let via = self.state.vias.get(candidate.via);
        Route {
            key,
            kind: candidate.kind,
            protocol: candidate.protocol,
            via: via.map_or(Via::Hops(Vec::new()), |via| via.via()),
            mtu: via.map_or(0, |via| via.mtu),
            unsupported: candidate.unsupported,
        }
    }

    /// Neighbours by interface and address.
    pub fn neighbours(&self) -> impl Iterator<Item = &Neighbour> {
        self.state.neighbours.values().map(|neighbour| &neighbour.value)
    }

    /// Nexthop objects.
    pub fn objects(&self) -> impl Iterator<Item = &NexthopObject> {
        self.state.objects.values().map(|object| &object.value)
    }

    /// This host's addresses.
    pub fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.state.addresses.keys()
    }

    /// Policies in force, each once. Rules that the tables repeat are none, unless some leave packets to Linux.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> {
        let in_force =
            self.state.policies().filter(|policy| !self.state.is_applied(policy) || self.leaves_some(policy));
        in_force.collect::<BTreeSet<_>>().into_iter()
    }

    /// Whether a policy about an interface is about the packets of a port: the same, one over it, or in a VRF that it is.
    pub fn is_about(&self, interface: u32, port: u32) -> bool {
        self.state.is_about(interface, port)
    }

    /// Whether rules leave packets to Linux: by what they say, by what they ask of connections, or because there is no room
    /// for all of a port's.
    fn leaves_some(&self, policy: &Policy) -> bool {
        let Scope::Family(family) = policy.scope else { return false };
        let is_stopped = |ifindex: &u32| self.mirror.rooms.way(&self.state, *ifindex, family).is_none();
        let refuses = policy.rules.iter().flatten().any(Rule::refuses) || self.state.keeps_flows(family);
        refuses || self.mirror.slots.keys().any(is_stopped)
    }

    /// Next hops in the tables.
    pub fn nexthops(&self) -> impl Iterator<Item = NexthopState> {
        self.mirror.nexthops.iter().map(|(identity, placed)| NexthopState {
            index: placed.index,
            identity: *identity,
            value: self.mirror.tables.nexthop(placed.index),
            users: placed.users,
            hit: self.mirror.tables.view().nexthops().get(placed.index as usize).is_some_and(|n| n.hit.load() != 0),
        })
    }

    /// Why packets to `address` go where they go.
    pub fn explain(&self, address: IpAddr) -> Explanation {
        let family = Family::of(address);
        let found = self.mirror.tables.lookup(MAIN_ROOT[family as usize], address).ok().flatten();
        let nexthops = found.map(|found| self.nexthops_of(found.leaf)).unwrap_or_default();
        let of = |nexthop: &NexthopState| {
            let key = NeighbourKey {
                ifindex: nexthop.identity.ifindex,
                address: nexthop.identity.gateway.unwrap_or(address),
            };
            self.state.neighbours.get(&key).map(|neighbour| neighbour.value)
        };
        Explanation {
            address,
            prefixes: self.covering(address, found),
            found,
            neighbours: nexthops.iter().filter_map(|(nexthop, _)| of(nexthop)).collect(),
            nexthops,
            policies: self.policies().filter(|policy| policy.scope == Scope::Family(family)).cloned().collect(),
        }
    }

    fn covering(&self, address: IpAddr, found: Option<Match>) -> Vec<Matched> {
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let matched = |len| {
            let prefix = Prefix::new(address, len)?;
            let routes = self.routes_for(prefix);
            let (choice, level) = self.state.choose(prefix)?;
            let exception = match choice {
                Choice::Exception(reason) => Some(reason),
                Choice::Via(id) => match self.state.vias.get(id).map(|via| self.state.resolve(via)) {
                    Some(Resolved::Exception(reason)) => Some(reason),
                    _ => None,
                },
            };
            let decides = found.is_some_and(|found| found.prefix_len == len && found.level == level);
            Some(Matched { prefix, routes, decides, exception })
        };
        (0..=longest).rev().filter_map(matched).collect()
    }

    /// What the tables do with packets to an address that come in by no port and from no particular address: the next hops,
    /// and what each of them does; none without a route. Where the tables do not have the rules for such packets: why.
    /// A leaf in use names records that stay as they are while the writer looks.
    pub fn leads_to(&self, address: IpAddr) -> Result<Vec<(NexthopIdentity, Option<NexthopValue>)>, Reason> {
        let root = self.mirror.rooms.own(&self.state, Family::of(address)).ok_or(Reason::PolicyRule)?;
        self.leads_to_by(root, address)
    }

    /// The same for packets that are looked up in this root, as a port says; there is none where the rules are not repeated.
    pub fn leads_to_by(
        &self,
        root: u32,
        address: IpAddr,
    ) -> Result<Vec<(NexthopIdentity, Option<NexthopValue>)>, Reason> {
        let tables = &self.mirror.tables;
        let word = match address {
            IpAddr::V4(address) => lpm::lookup(&tables.view(), root, &address.octets()),
            IpAddr::V6(address) => lpm::lookup(&tables.view(), root, &address.octets()),
        };
        let shares = self.shares(word.map_err(|_| Reason::PolicyRule)?);
        let named = |(index, _)| {
            let identity = NexthopIdentity::read(tables.view().nexthop_keys().get(index as usize)?)?;
            Some((identity, tables.nexthop(index)))
        };
        Ok(shares.into_iter().filter_map(named).collect())
    }

    fn nexthops_of(&self, leaf: Leaf) -> Vec<(NexthopState, u32)> {
        let named = |(index, share)| Some((self.nexthops().find(|nexthop| nexthop.index == index)?, share));
        self.shares(leaf.word()).into_iter().filter_map(named).collect()
    }

    /// The indices of the next hops that a word leads to, and their shares.
    fn shares(&self, word: Word) -> Vec<(u32, u32)> {
        match word.kind() {
            Kind::Nexthop(index) => vec![(index, 1)],
            Kind::Group(group) => {
                let mut shares = std::collections::BTreeMap::new();
                for bucket in
                    self.mirror.tables.view().groups().get(group as usize).into_iter().flat_map(|group| &group.buckets)
                {
                    *shares.entry(bucket.load()).or_default() += 1;
                }
                shares.into_iter().collect()
            }
            Kind::None | Kind::Node(_) => Vec::new(),
        }
    }
}
