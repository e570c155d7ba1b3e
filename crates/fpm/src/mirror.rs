//! The tables brought in line with the state. Everything here can be worked out again from the state alone; what is
//! kept is which slots and indices stand for what.

use crate::Transmit;
use crate::mappings::Mapping;
use crate::missing::Missing;
use crate::rooms::{NOWHERE, Rooms};
use crate::state::{Changes, Choice, Resolved, State};
use crate::via::{ViaId, ViaKey};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::ops::Bound;
use towpath_fpc::{Hop, InVrfs, NeighbourKey, Port, PortKind, Prefix, Scope};
use towpath_tables::backing::{Backing, GrowError};
use towpath_tables::grace::Grace;
use towpath_tables::lpm::Leaf;
use towpath_tables::nexthop::{Action, Header, NexthopIdentity, NexthopValue};
use towpath_tables::record::{Family, PORT_SLOTS, port_flags};
use towpath_tables::rib::Entry;
use towpath_tables::store::TABLE_FULL;
use towpath_tables::writer::{MAIN_ROOT, PortValue, Published, TableWriter};
use towpath_tables::{Obstacle, Reason};

/// A next hop in the tables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub index: u32,
    /// Users by the family of the packets
    pub users: [u32; 2],
}

/// A via in the tables.
#[derive(Debug)]
struct Landed {
    leaf: Leaf,
    group: Option<u32>,
    family: Family,
    members: Vec<NexthopIdentity>,
    /// Some of it found no room
    wanting: bool,
}

pub(crate) struct Mirror<B, G> {
    pub tables: TableWriter<B, G>,
    pub slots: BTreeMap<u32, u32>,
    vlans: HashMap<u32, u32>,
    pub nexthops: BTreeMap<NexthopIdentity, Placed>,
    /// Next hops that lost their last user; freed with the next publication if they do not find another first
    idle: Vec<NexthopIdentity>,
    landed: HashMap<ViaId, Landed>,
    /// Host entries of neighbours, and the glean leaf each is under
    hosts: BTreeMap<NeighbourKey, Leaf>,
    /// Interfaces that look-ups of a family pass over
    dead: HashSet<(u32, Family)>,
    /// How far the routes have been put into the tables for the first time
    filled: Filled,
    /// Prefixes to look at again
    prefixes: VecDeque<Prefix>,
    /// Slots of ports that have gone, to be freed once nothing leads there
    gone: Vec<u32>,
    /// Numbers of VRFs by interface index, as `Flow::accepted` has them. None is used for another one
    pub vrfs: BTreeMap<u32, u32>,
    pub missing: Missing,
    pub rooms: Rooms,
}

/// Progress of putting in all routes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Filled {
    /// Those of a family are being put in; the last prefix that was
    UpTo(Family, Option<Prefix>),
    /// All routes were put in once
    All,
}

/// Why packets of a family that come in by a port are exceptions.
pub(crate) fn ingress_policy(state: &State, chain: &[&Port], family: Family) -> Option<Obstacle> {
    let policy = state.ingress_policy(chain, family);
    match passed_by_none(state, chain[0], family) {
        None => policy,
        Some(reason) => Some(Obstacle::new(policy.map_or(reason, |obstacle| obstacle.reason))),
    }
}

/// Why no flow passes, if none does: connections are not what connection tracking has seen where packets are translated, and
/// in VRFs it takes rules of which it is known that they do not tell ports apart.
fn passed_by_none(state: &State, port: &Port, family: Family) -> Option<Reason> {
    match &port.vrf {
        _ if state.is_mapped(port.ifindex) => Some(Reason::Mapped),
        Some(_) if state.flows_in_vrfs(family) == InVrfs::Stay => state.passed_by_flows(family),
        Some(_) => None,
        None => None,
    }
}

/// Numbers of VRFs end here: with 1 more they fill their half of a word of `Flow::accepted`.
const MAX_ARRIVAL: u32 = 0xffff;

/// Identity of the next hop that stands for everything that is an exception for a reason.
fn special(reason: Reason) -> NexthopIdentity {
    NexthopIdentity { ifindex: 0, gateway: None, mtu: 0, reason: Some(reason) }
}

/// Identity of the next hop of a connected route: its hosts have one each, the rest is for Linux to resolve.
fn glean(ifindex: u32) -> NexthopIdentity {
    NexthopIdentity { ifindex, gateway: None, mtu: 0, reason: None }
}

fn towards(hop: &Hop, mtu: u32) -> NexthopIdentity {
    NexthopIdentity { ifindex: hop.ifindex, gateway: hop.gateway, mtu, reason: None }
}

impl<B: Backing, G: Grace> Mirror<B, G> {
    pub fn new(tables: TableWriter<B, G>) -> Self {
        Self {
            tables,
            slots: BTreeMap::new(),
            vlans: HashMap::new(),
            nexthops: BTreeMap::new(),
            idle: Vec::new(),
            landed: HashMap::new(),
            hosts: BTreeMap::new(),
            dead: HashSet::new(),
            filled: Filled::UpTo(Family::V4, None),
            prefixes: VecDeque::new(),
            gone: Vec::new(),
            vrfs: BTreeMap::new(),
            missing: Missing::default(),
            rooms: Rooms::default(),
        }
    }

    /// Makes the tables say what the state says: first everything but routes, at once; then routes, as long as
    /// `go_on` says so. None if there is more to do, which the next call does.
    pub fn sync(&mut self, state: &mut State, mut go_on: impl FnMut() -> bool) -> Option<Published> {
        let mut published = self.bring_in_line(state, &mut go_on)?;
        while self.rooms.publish() {
            // Ports may be led to them now.
            state.rules_changed();
            let more = self.bring_in_line(state, &mut go_on)?;
            published = Published { words: published.words + more.words, nodes: published.nodes + more.nodes, ..more };
        }
        Some(published)
    }

    fn bring_in_line(&mut self, state: &mut State, go_on: &mut impl FnMut() -> bool) -> Option<Published> {
        if self.is_new() {
            state.drop_stale_mappings();
            self.leave_adopted_rooms();
        }
        let mut changes = state.take_changes();
        if !changes.is_empty() || self.is_new() {
            self.follow_rules(state, &mut changes);
            let gone = self.place_ports(state, &mut changes);
            self.gone.extend(gone);
            self.update_nexthops(state, &changes);
            if changes.mappings || !changes.ports.is_empty() {
                self.update_mappings(state);
            }
            let rescan = self.update_vias(state, &changes);
            self.update_hosts(state, &changes);
            if changes.config || self.is_new() {
                self.update_config(state);
            }
            self.prefixes.extend(changes.prefixes);
            self.rescan(state, &rescan);
        }
        if !self.fill(state, go_on) || !self.fill_rooms(state, go_on) {
            return None;
        }
        while let Some(prefix) = self.prefixes.pop_front() {
            self.update_route(state, prefix);
            if !go_on() {
                return None;
            }
        }
        // No route leads any more to what nobody uses now.
        self.reap(state);
        self.free_rooms();
        let published = self.tables.publish_while(&mut *go_on)?;
        self.missing.settle(&published.full);
        std::mem::take(&mut self.gone).into_iter().for_each(|slot| self.tables.free_port(slot));
        Some(published)
    }

    /// Sends to Linux what any policy may touch, whatever of the family it is, until all is known.
    pub fn restrain(&mut self, state: &State) {
        for family in Family::ALL {
            if let Some(Obstacle { reason, .. }) = state.policy(|scope| scope.concerns(family)) {
                self.tables.set_policy(family, Some(Obstacle::new(reason)));
            }
        }
    }

    /// Nothing was put into the tables yet.
    pub(crate) fn is_new(&self) -> bool {
        self.filled == Filled::UpTo(Family::V4, None)
    }

    pub fn is_filled(&self) -> bool {
        self.filled == Filled::All
    }

    fn update_config(&mut self, state: &State) {
        for family in Family::ALL {
            let policy = state.policy(|scope| matches!(scope, Scope::Family(of) if *of == family));
            self.tables.set_policy(family, policy);
            self.tables.set_hash_policy(family, u32::from(state.hash_policy[family as usize]));
        }
        self.tables.set_local_addresses(state.suspect_sources());
    }

    // ---- ports

    /// Gives every port a slot and its settings; returns the slots to free once nothing leads there. What changed
    /// about an interface changed about the VLAN sub-interfaces over it, so `changes` grows by those.
    fn place_ports(&mut self, state: &State, changes: &mut Changes) -> Vec<u32> {
        if self.is_new() {
            // Also ports of a writer that was here before and that are gone.
            changes.ports.extend(state.ports.keys().copied());
            self.slots.extend(self.tables.ports().map(|(slot, ifindex)| (ifindex, slot)));
            changes.ports.extend(self.slots.keys().copied());
        }
        if changes.ports.is_empty() {
            return Vec::new();
        }
        changes.ports.append(&mut self.missing.ports);
        changes.ports = state.with_uppers(&changes.ports);
        let mut chains: Vec<_> = state.ports.keys().filter_map(|ifindex| state.chain(*ifindex)).collect();
        chains.sort_by_key(Vec::len);
        let mut wanted = BTreeSet::new();
        for chain in &chains {
            if let Some(slot) = self.slot_for(chain) {
                self.slots.insert(chain[0].ifindex, slot);
                wanted.insert(chain[0].ifindex);
            }
        }
        let gone: Vec<(u32, u32)> =
            self.slots.iter().filter(|(i, _)| !wanted.contains(i)).map(|(i, s)| (*i, *s)).collect();
        for (ifindex, _) in &gone {
            self.slots.remove(ifindex);
        }
        let children = self.children(&chains);
        for chain in chains.iter().filter(|chain| wanted.contains(&chain[0].ifindex)) {
            self.set_port(state, chain, children.get(&chain[0].ifindex));
        }
        for (ifindex, slot) in &gone {
            self.close_port(*ifindex, *slot);
        }
        self.place_tunnels(state, chains.iter().filter(|chain| wanted.contains(&chain[0].ifindex)));
        gone.into_iter().map(|(_, slot)| slot).collect()
    }

    /// Makes packets to this host be looked up among its tunnels.
    fn place_tunnels<'s>(&mut self, state: &State, chains: impl Iterator<Item = &'s Vec<&'s Port>>) {
        let tunnels = chains.filter_map(|chain| Some((state.tunnel(chain[0])?, self.slots[&chain[0].ifindex])));
        let tunnels: Vec<_> = tunnels.collect();
        for slot in self.tables.index_tunnels(&tunnels) {
            tracing::warn!(slot, "too many tunnels: packets out of this one are left to Linux");
        }
    }

    fn slot_for(&mut self, chain: &[&Port]) -> Option<u32> {
        let ifindex = chain.first()?.ifindex;
        if let Some(slot) = self.slots.get(&ifindex) {
            return Some(*slot);
        }
        let slot = match chain.get(1) {
            // Without the port underneath there is no way in or out.
            Some(lower) if !self.slots.contains_key(&lower.ifindex) => return None,
            Some(_) => self.tables.alloc_upper_port(ifindex),
            None if is_tunnel(chain) => self.tables.alloc_upper_port(ifindex),
            None => self.tables.alloc_port(ifindex),
        };
        slot.map_err(|error| self.port_refused(ifindex, error)).ok()
    }

    fn port_refused(&mut self, ifindex: u32, error: GrowError) {
        self.missing.ports.insert(ifindex);
        self.missing.refuse(error);
    }

    /// For each port the VLAN identifiers of its sub-interfaces and their slots. Of two with the same identifier (and
    /// different protocols) the first has it: frames of the other then do not match its protocol and go to Linux.
    fn children(&self, chains: &[Vec<&Port>]) -> HashMap<u32, BTreeMap<u16, u32>> {
        let mut children: HashMap<u32, BTreeMap<u16, u32>> = HashMap::new();
        for port in chains.iter().filter_map(|chain| chain.first()) {
            if let (PortKind::Vlan { lower, id, .. }, Some(slot)) = (port.kind, self.slots.get(&port.ifindex)) {
                children.entry(lower).or_default().entry(id).or_insert(*slot);
            }
        }
        children
    }

    /// Why packets of a family that come in by a port are exceptions: also until there is a root for them.
    fn ingress_policy(&self, state: &State, chain: &[&Port], family: Family) -> Option<Obstacle> {
        match self.rooms.way(state, chain[0].ifindex, family) {
            Some(_) => ingress_policy(state, chain, family),
            None => Some(Obstacle::new(Reason::PolicyRule)),
        }
    }

    fn set_port(&mut self, state: &State, chain: &[&Port], children: Option<&BTreeMap<u16, u32>>) {
        let (port, slot) = (chain[0], self.slots[&chain[0].ifindex]);
        let vlans = self.set_vlans(port.ifindex, children);
        let ways = Family::ALL.map(|family| self.rooms.way(state, port.ifindex, family));
        let arrival = Family::ALL.map(|family| self.arrival(state, port, family));
        let value = PortValue {
            flags: flags(state, chain),
            mac: port.mac.unwrap_or_default(),
            root: ways.map(|way| way.unwrap_or(NOWHERE)),
            ingress_policy: Family::ALL.map(|family| self.ingress_policy(state, chain, family)),
            vlans,
            vlan: match port.kind {
                PortKind::Vlan { protocol, id, .. } => Some((protocol, id)),
                _ => None,
            },
            lower: chain.get(1).and_then(|lower| self.slots.get(&lower.ifindex)).copied().unwrap_or(slot),
            mtu: port.mtu,
            vrf: port.vrf.as_ref().filter(|_| arrival != [0; 2]).map_or(0, |vrf| vrf.ifindex),
            arrival,
        };
        self.tables.set_tunnel(slot, state.tunnel(port).as_ref());
        self.tables.set_port(slot, &value);
    }

    /// See `record::Port::arrival`.
    fn arrival(&mut self, state: &State, port: &Port, family: Family) -> u32 {
        let Some(vrf) = port.vrf.as_ref().filter(|_| state.flows_in_vrfs(family) == InVrfs::ByVrf) else { return 0 };
        let next = PORT_SLOTS + self.vrfs.len() as u32;
        match self.vrfs.get(&vrf.ifindex) {
            Some(number) => *number,
            // Nothing is accepted from a VRF by its port.
            None if next >= MAX_ARRIVAL => 0,
            None => *self.vrfs.entry(vrf.ifindex).or_insert(next),
        }
    }

    /// Fills the table of a port's VLAN identifiers; None if it has no sub-interfaces (or there is no room: their
    /// frames go to Linux).
    fn set_vlans(&mut self, ifindex: u32, children: Option<&BTreeMap<u16, u32>>) -> Option<u32> {
        let Some(children) = children else {
            if let Some(vlans) = self.vlans.remove(&ifindex) {
                self.tables.free_vlans(vlans);
            }
            return None;
        };
        let vlans = match self.vlans.get(&ifindex) {
            Some(vlans) => *vlans,
            None => {
                let vlans = self.tables.alloc_vlans().map_err(|error| self.port_refused(ifindex, error)).ok()?;
                self.vlans.insert(ifindex, vlans);
                vlans
            }
        };
        (0..4096).for_each(|id| self.tables.set_vlan(vlans, id, children.get(&id).copied()));
        Some(vlans)
    }

    /// Takes a port out of service; its slot is freed later.
    fn close_port(&mut self, ifindex: u32, slot: u32) {
        let closed =
            PortValue { ingress_policy: [Some(Obstacle::new(Reason::PortNotReady)); 2], ..PortValue::plain(slot) };
        self.tables.set_port(slot, &closed);
        self.tables.set_tunnel(slot, None);
        if let Some(vlans) = self.vlans.remove(&ifindex) {
            self.tables.free_vlans(vlans);
        }
    }

    /// Puts the mappings of ports that have a slot into force.
    fn update_mappings(&mut self, state: &State) {
        let slot = |mapping: &Mapping| self.slots.get(&mapping.ifindex).copied();
        let mapped =
            state.mappings.iter().filter_map(|(number, mapping)| Some((*number, mapping.value(slot(mapping)?))));
        let mapped = mapped.collect();
        if let Err(error) = self.tables.set_mappings(&mapped) {
            tracing::error!("mappings stay what they were: {error}");
        }
    }

    // ---- next hops

    /// The one place where a next hop's content follows from the state.
    fn nexthop_value(&self, state: &State, identity: &NexthopIdentity, users: [u32; 2]) -> NexthopValue {
        if let Some(reason) = identity.reason {
            return NexthopValue::exception(reason);
        }
        let slot = |port: &Port| self.slots.get(&port.ifindex).copied();
        let chain = state.chain(identity.ifindex);
        let slots = chain.as_ref().and_then(|chain| Some((slot(chain.first()?)?, slot(chain.last()?)?)));
        let (Some(chain), Some((port, device))) = (chain, slots) else {
            return NexthopValue::exception(Reason::EgressNotServed);
        };
        let route_mtu = if identity.mtu == 0 { u32::MAX } else { identity.mtu };
        let mtu = chain[0].mtu.min(route_mtu).min(redirectable(&chain));
        let action = self.action(state, identity, users, &chain);
        NexthopValue { action, port, device, mtu }
    }

    fn action(&self, state: &State, identity: &NexthopIdentity, users: [u32; 2], chain: &[&Port]) -> Action {
        let lladdr = identity
            .gateway
            .and_then(|address| usable_lladdr(state, &NeighbourKey { ifindex: identity.ifindex, address }));
        let down = !chain.iter().all(|port| port.up && port.carrier);
        let policies = Family::ALL.into_iter().filter(|family| users[*family as usize] > 0);
        let reasons = [
            // Of a port that is down Linux has no neighbours either, but it may not consider the route at all.
            (lladdr.is_none() && !down && !is_tunnel(chain)).then_some(Reason::NoNeighbour),
            down.then_some(Reason::NexthopDown),
            (!is_ready(chain) || state.transmit(chain) == Transmit::Nothing).then_some(Reason::EgressNotServed),
        ];
        let reason =
            reasons.into_iter().flatten().chain(policies.filter_map(|family| state.egress_policy(chain, family))).min();
        let header = lladdr.zip(chain[0].mac).and_then(|(lladdr, mac)| Header::new(lladdr, mac, &tags(chain)));
        match (reason, header) {
            // The other end is all the neighbour there is (IFF_NOARP).
            (None, _) if is_tunnel(chain) => Action::Tunnel,
            (None, Some(header)) if state.is_mapped(chain[0].ifindex) => Action::Mapped(header),
            (None, Some(header)) => Action::Forward(header),
            (reason, _) => Action::Exception(reason.unwrap_or(Reason::EgressNotServed)),
        }
    }

    /// Recomputes the next hops that depend on what changed.
    fn update_nexthops(&mut self, state: &State, changes: &Changes) {
        let mut affected: BTreeSet<NexthopIdentity> = BTreeSet::new();
        for ifindex in &changes.ports {
            affected.extend(self.over(*ifindex));
        }
        for key in &changes.neighbours {
            affected.extend(self.over(key.ifindex).filter(|identity| identity.gateway == Some(key.address)));
        }
        affected.iter().for_each(|identity| self.write(state, identity));
    }

    /// Next hops by an interface.
    fn over(&self, ifindex: u32) -> impl Iterator<Item = NexthopIdentity> {
        let first = NexthopIdentity { ifindex, gateway: None, mtu: 0, reason: None };
        self.nexthops
            .range(first..)
            .map(|(identity, _)| *identity)
            .take_while(move |identity| identity.ifindex == ifindex)
    }

    fn write(&mut self, state: &State, identity: &NexthopIdentity) {
        if let Some(placed) = self.nexthops.get(identity) {
            let value = self.nexthop_value(state, identity, placed.users);
            self.tables.set_nexthop(placed.index, &value);
        }
    }

    /// The index of a next hop; packets of `family` have one more way to it. None if the table is full.
    fn hold(&mut self, state: &State, identity: NexthopIdentity, family: Family) -> Option<u32> {
        if !self.nexthops.contains_key(&identity) {
            let index = self.tables.alloc_nexthop(identity).map_err(|error| self.missing.refuse(error)).ok()?;
            self.nexthops.insert(identity, Placed { index, users: [0; 2] });
        }
        let placed = self.nexthops.get_mut(&identity)?;
        placed.users[family as usize] += 1;
        let (index, first) = (placed.index, placed.users[family as usize] == 1);
        if first {
            self.write(state, &identity);
        }
        Some(index)
    }

    fn release(&mut self, state: &State, identity: NexthopIdentity, family: Family) {
        let Some(placed) = self.nexthops.get_mut(&identity) else { return };
        placed.users[family as usize] -= 1;
        match placed.users {
            [0, 0] => self.idle.push(identity),
            users if users[family as usize] == 0 => self.write(state, &identity),
            _ => {}
        }
    }

    /// The leaf for everything that is an exception for a reason. These stay.
    fn special(&mut self, state: &State, reason: Reason) -> Leaf {
        let identity = special(reason);
        let index = match self.nexthops.get(&identity) {
            Some(placed) => Some(placed.index),
            None => self.hold(state, identity, Family::V4),
        };
        index.and_then(Leaf::nexthop).unwrap_or(TABLE_FULL)
    }

    /// Frees what found no user.
    fn reap(&mut self, state: &mut State) {
        for id in state.vias.reap() {
            self.missing.vias.remove(&id);
            if let Some(landed) = self.landed.remove(&id) {
                self.lift(state, landed);
            }
        }
        for identity in std::mem::take(&mut self.idle) {
            let idle = self.nexthops.get(&identity).filter(|placed| placed.users == [0, 0]).copied();
            if let Some(placed) = idle {
                self.nexthops.remove(&identity);
                self.tables.free_nexthop(placed.index);
            }
        }
    }

    // ---- vias

    /// The leaf of a via.
    fn land(&mut self, state: &State, id: ViaId) -> Leaf {
        match self.landed.get(&id) {
            Some(landed) => landed.leaf,
            None => self.reland(state, id),
        }
    }

    /// Works out the leaf of a via anew. A group keeps its index, so that only its buckets change.
    fn reland(&mut self, state: &State, id: ViaId) -> Leaf {
        let Some(via) = state.vias.get(id).cloned() else { return self.special(state, Reason::Internal) };
        let old = self.landed.remove(&id);
        let landed = match state.resolve(&via) {
            Resolved::Exception(reason) => self.landed_exception(state, reason, via.family),
            Resolved::Hops(hops) => match hops.as_slice() {
                // Dead by its flag; if its port is down, its own next hop says so.
                [(hop, false)] if state.carries(hop.ifindex, via.family) => {
                    self.landed_exception(state, Reason::NexthopDown, via.family)
                }
                [(hop, _)] => self.landed_hop(state, towards(hop, via.mtu), via.family),
                _ => self.landed_group(state, &via, &hops, old.as_ref().and_then(|old| old.group)),
            },
        };
        let leaf = landed.leaf;
        if landed.wanting {
            self.missing.vias.insert(id);
        } else {
            self.missing.vias.remove(&id);
        }
        if let Some(mut old) = old {
            if old.group == landed.group {
                old.group = None;
            }
            self.lift(state, old);
        }
        self.landed.insert(id, landed);
        leaf
    }

    fn landed_exception(&mut self, state: &State, reason: Reason, family: Family) -> Landed {
        let leaf = self.special(state, reason);
        Landed { leaf, group: None, family, members: Vec::new(), wanting: leaf == TABLE_FULL }
    }

    fn landed_hop(&mut self, state: &State, identity: NexthopIdentity, family: Family) -> Landed {
        match self.hold(state, identity, family).and_then(Leaf::nexthop) {
            Some(leaf) => Landed { leaf, group: None, family, members: vec![identity], wanting: false },
            None => Landed { leaf: TABLE_FULL, group: None, family, members: Vec::new(), wanting: true },
        }
    }

    fn landed_group(&mut self, state: &State, via: &ViaKey, hops: &[(Hop, bool)], group: Option<u32>) -> Landed {
        let (mut members, mut shares) = (Vec::new(), Vec::new());
        for (hop, _) in hops.iter().filter(|(_, live)| *live) {
            let identity = towards(hop, via.mtu);
            let index = self.hold(state, identity, via.family);
            members.extend(index.map(|_| identity));
            shares.push((index.unwrap_or(TABLE_FULL.word().0), u32::from(hop.weight)));
        }
        if shares.is_empty() {
            shares.push((self.special(state, Reason::NexthopDown).word().0, 1));
        }
        let group = match group {
            Some(group) => {
                self.tables.set_group(group, &shares);
                Some(group)
            }
            None => self.tables.alloc_group(&shares).map_err(|error| self.missing.refuse(error)).ok(),
        };
        let leaf = group.and_then(Leaf::group).unwrap_or(TABLE_FULL);
        let wanting = group.is_none() || shares.iter().any(|(index, _)| *index == TABLE_FULL.word().0);
        Landed { leaf, group, family: via.family, members, wanting }
    }

    /// Gives back what a via held.
    fn lift(&mut self, state: &State, landed: Landed) {
        if let Some(group) = landed.group {
            self.tables.free_group(group);
        }
        landed.members.into_iter().for_each(|identity| self.release(state, identity, landed.family));
    }

    /// Works out anew the vias that depend on what changed.
    fn update_vias(&mut self, state: &State, changes: &Changes) -> Rescan {
        let mut rescan = Rescan::default();
        let mut turned: HashSet<(u32, Family)> = HashSet::new();
        for (ifindex, family) in changes.ports.iter().flat_map(|ifindex| Family::ALL.map(|family| (*ifindex, family))) {
            let dead = !state.carries(ifindex, family);
            let changed = if dead { self.dead.insert((ifindex, family)) } else { self.dead.remove(&(ifindex, family)) };
            if changed {
                turned.insert((ifindex, family));
            }
        }
        for id in &changes.vias {
            let Some(before) = self.landed.get(id).map(|landed| landed.leaf) else { continue };
            if self.reland(state, *id) != before {
                rescan.moved.insert(*id);
            }
        }
        if turned.is_empty() && changes.objects.is_empty() {
            return rescan;
        }
        let by_turned = |via: &ViaKey| matches!(state.resolve(via), Resolved::Hops(hops) if hops.iter().any(|(hop, _)| turned.contains(&(hop.ifindex, via.family))));
        for (id, via) in state.vias.iter() {
            let changed = state.is_over(via, &changes.objects);
            if !changed && !by_turned(via) {
                continue;
            }
            rescan.revived.insert(id);
            let Some(before) = self.landed.get(&id).map(|landed| landed.leaf) else { continue };
            if self.reland(state, id) != before {
                rescan.moved.insert(id);
            }
        }
        rescan
    }

    // ---- hosts

    /// Sets and removes host entries of neighbours that changed, or whose ports did.
    fn update_hosts(&mut self, state: &State, changes: &Changes) {
        let mut keys: BTreeSet<NeighbourKey> = changes.neighbours.iter().copied().collect();
        for ifindex in changes.ports.iter().copied() {
            keys.extend(
                state
                    .neighbours
                    .range(first_neighbour(ifindex)..)
                    .map(|(key, _)| *key)
                    .take_while(|key| key.ifindex == ifindex),
            );
            keys.extend(
                self.hosts
                    .range(first_neighbour(ifindex)..)
                    .map(|(key, _)| *key)
                    .take_while(|key| key.ifindex == ifindex),
            );
        }
        for key in keys {
            self.missing.neighbours.remove(&key);
            let wanted =
                self.slots.contains_key(&key.ifindex) && is_host(key.address) && usable_lladdr(state, &key).is_some();
            match (wanted, self.hosts.get(&key).copied()) {
                (true, None) => self.set_host(state, key),
                (false, Some(under)) => self.remove_host(state, key, under),
                _ => {}
            }
        }
    }

    fn set_host(&mut self, state: &State, key: NeighbourKey) {
        let family = Family::of(key.address);
        let own = host(&key);
        let under = self.hold(state, glean(key.ifindex), family).and_then(Leaf::nexthop);
        let leaf = self.hold(state, own, family).and_then(Leaf::nexthop);
        if let (Some(under), Some(leaf)) = (under, leaf) {
            for root in self.roots(family) {
                self.place_host(root, key.address, under, leaf);
            }
            self.hosts.insert(key, under);
        } else {
            // No room: the packets stay exceptions.
            self.missing.neighbours.insert(key);
            under.into_iter().for_each(|_| self.release(state, glean(key.ifindex), family));
            leaf.into_iter().for_each(|_| self.release(state, own, family));
        }
    }

    fn place_host(&mut self, root: u32, address: IpAddr, under: Leaf, leaf: Leaf) {
        if let Err(error) = self.tables.host_set(root, address, under, leaf) {
            tracing::error!(%error, "host entry of a neighbour");
        }
    }

    /// Sets the host entries that there are in another root.
    pub(crate) fn place_hosts(&mut self, root: u32, family: Family) {
        let of_family = self.hosts.iter().filter(|(key, _)| Family::of(key.address) == family);
        let leaf = |key| Leaf::nexthop(self.nexthops.get(&host(key))?.index);
        let hosts: Vec<_> = of_family.filter_map(|(key, under)| Some((key.address, *under, leaf(key)?))).collect();
        hosts.into_iter().for_each(|(address, under, leaf)| self.place_host(root, address, under, leaf));
    }

    /// All roots of a family.
    fn roots(&self, family: Family) -> Vec<u32> {
        self.rooms.of(family).map(|(root, _)| root).chain([MAIN_ROOT[family as usize]]).collect()
    }

    fn remove_host(&mut self, state: &State, key: NeighbourKey, under: Leaf) {
        let family = Family::of(key.address);
        for root in self.roots(family) {
            if let Err(error) = self.tables.host_remove(root, key.address, under) {
                tracing::error!(%error, "host entry of a neighbour");
            }
        }
        self.hosts.remove(&key);
        self.release(state, glean(key.ifindex), family);
        self.release(state, host(&key), family);
    }

    // ---- routes

    /// Puts all routes in, once; false if it stopped before the end.
    fn fill(&mut self, state: &State, go_on: &mut impl FnMut() -> bool) -> bool {
        while let Filled::UpTo(family, last) = self.filled {
            for prefix in state.routes.prefixes(family, last.map_or(Bound::Unbounded, Bound::Excluded)) {
                self.update_route(state, prefix);
                if !go_on() {
                    self.filled = Filled::UpTo(family, Some(prefix));
                    return false;
                }
            }
            self.filled = match family {
                Family::V4 => Filled::UpTo(Family::V6, None),
                Family::V6 => Filled::All,
            };
            if self.is_filled()
                && let Err(error) = self.tables.reserve()
            {
                tracing::debug!(%error, "routes are made room for step by step");
            }
        }
        true
    }

    /// Finds the routes that must be looked at again on account of their vias.
    fn rescan(&mut self, state: &State, rescan: &Rescan) {
        if rescan.revived.is_empty() && rescan.moved.is_empty() {
            return;
        }
        for family in Family::ALL {
            let mut before: Option<(Prefix, bool)> = None;
            let mut affected = Vec::new();
            for (key, candidate) in state.routes.iter(family) {
                let revived = rescan.revived.contains(&candidate.via);
                // Who stands alone is chosen dead or alive.
                let rivals = before.filter(|(prefix, _)| *prefix == key.prefix);
                if rescan.moved.contains(&candidate.via) || rivals.is_some_and(|(_, rival)| rival || revived) {
                    affected.push(key.prefix);
                }
                before = Some((key.prefix, revived || rivals.is_some_and(|(_, rival)| rival)));
            }
            affected.dedup();
            self.prefixes.extend(affected);
        }
    }

    fn update_route(&mut self, state: &State, prefix: Prefix) {
        let family = prefix.family();
        self.missing.prefixes.remove(&prefix);
        self.update_route_in(state, MAIN_ROOT[family as usize], prefix, state.choose(prefix));
        let rooms: Vec<_> = self.rooms.of(family).map(|(root, steps)| (root, state.choose_by(steps, prefix))).collect();
        rooms.into_iter().for_each(|(root, choice)| self.update_route_in(state, root, prefix, choice));
    }

    /// Has a root say what decides over a prefix there.
    pub(crate) fn update_route_in(&mut self, state: &State, root: u32, prefix: Prefix, choice: Option<(Choice, u8)>) {
        let (address, len) = (prefix.address(), prefix.prefix_len());
        let done = match choice {
            None => self.tables.route_remove(root, address, len),
            Some((choice, level)) => {
                let leaf = match choice {
                    Choice::Exception(reason) => {
                        let leaf = self.special(state, reason);
                        if leaf == TABLE_FULL {
                            self.missing.prefixes.insert(prefix);
                        }
                        leaf
                    }
                    Choice::Via(id) => self.land(state, id),
                };
                self.tables.route_set(root, address, len, Entry { leaf, level })
            }
        };
        if let Err(error) = done {
            tracing::error!(%prefix, %error, "route");
        }
    }
}

/// Vias on account of which routes must be looked at again.
#[derive(Default)]
struct Rescan {
    /// Their leaf is another one: all their routes
    moved: HashSet<ViaId>,
    /// They may have come alive or died: routes that have rivals for their prefix
    revived: HashSet<ViaId>,
}

fn host(key: &NeighbourKey) -> NexthopIdentity {
    NexthopIdentity { ifindex: key.ifindex, gateway: Some(key.address), mtu: 0, reason: None }
}

fn first_neighbour(ifindex: u32) -> NeighbourKey {
    NeighbourKey { ifindex, address: IpAddr::from([0, 0, 0, 0]) }
}

/// Addresses that the pipeline looks up at all: those with another scope go to Linux before.
fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !address.is_multicast() && !address.is_broadcast(),
        IpAddr::V6(address) => !address.is_multicast() && !address.is_unicast_link_local(),
    }
}

/// The link-layer address of a neighbour if Linux itself would use it and it is one station's.
fn usable_lladdr(state: &State, key: &NeighbourKey) -> Option<[u8; 6]> {
    state.neighbours.get(key)?.value.lladdr.filter(|lladdr| lladdr[0] & 1 == 0 && *lladdr != [0; 6])
}

fn is_tunnel(chain: &[&Port]) -> bool {
    chain.iter().any(|port| matches!(port.kind, PortKind::Tunnel(_)))
}

/// Whether a port takes part: its own settings and those of what is underneath.
fn is_ready(chain: &[&Port]) -> bool {
    let sound = |port: &&Port| if is_tunnel(chain) { port.vrf.is_none() } else { port.mac.is_some() };
    chain.iter().all(|port| port.master == 0 && sound(port))
}

/// The largest packet that the kernel redirects to the device underneath, with its tags: a frame may be longer than the
/// device's MTU by the Ethernet header and one tag (`xdp_ok_fwd_dev` in include/linux/filter.h, 6.1 and 6.18).
fn redirectable(chain: &[&Port]) -> u32 {
    const TAG: u32 = 4;
    let tags = tags(chain).len() as u32;
    chain.last().map_or(0, |device| device.mtu.saturating_add(TAG).saturating_sub(tags * TAG))
}

/// The VLAN tags that packets leave with, from the outside in.
fn tags(chain: &[&Port]) -> Vec<(u16, u16)> {
    let tag = |port: &&Port| match port.kind {
        PortKind::Vlan { protocol, id, .. } => Some((protocol, id)),
        _ => None,
    };
    chain.iter().rev().filter_map(tag).collect()
}

fn flags(state: &State, chain: &[&Port]) -> u32 {
    let port = chain[0];
    // Without an address the loose filter is a strict one: `no_addr` in __fib_validate_source, net/ipv4/fib_frontend.c.
    let strict = port.rp_filter == 1 || port.rp_filter == 2 && !state.has_ipv4(port.ifindex);
    let virtual_below = chain.iter().any(|port| port.kind == PortKind::Virtual);
    [
        (is_ready(chain) && chain.iter().all(|port| port.up && port.carrier), port_flags::READY),
        (port.family[0].forwarding, port_flags::FORWARD_V4),
        (port.family[1].forwarding, port_flags::FORWARD_V6),
        (port.send_redirects, port_flags::REDIRECTS),
        (port.vrf.is_some(), port_flags::VRF),
        (strict, port_flags::RP_STRICT),
        (port.rp_filter == 2 && !strict, port_flags::RP_LOOSE),
        (port.route_localnet, port_flags::ROUTE_LOCALNET),
        (virtual_below, port_flags::PARTIAL_CSUM),
        (state.sees_beside(chain), port_flags::BESIDE),
        (matches!(port.kind, PortKind::Vlan { .. }), port_flags::VLAN),
        (is_tunnel(chain), port_flags::TUNNEL),
        (state.transmit(chain) == Transmit::SingleBuffer, port_flags::SINGLE_BUFFER),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .fold(0, |all, (_, flag)| all | flag)
}
