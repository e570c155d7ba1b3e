//! The tables' only writer. Ports, next hops and settings change at once and in place; routes change in the writer's
//! own trie and become visible with `publish`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};

use crate::adopt::{AdoptError, scan};
use crate::backing::{Backing, GrowError, View};
use crate::brake::Brake;
use crate::filter::local_filter_bit;
use crate::filtering::{InForce, in_force};
use crate::filters::{self, FilterError, Filters, Plan};
use crate::flow::{Connection, Tuple};
use crate::flows::{self, FlowStates, FlowTotals, FlowView, Flows, Full};
use crate::grace::Grace;
use crate::layout::layout_hash;
use crate::lpm::Leaf;
use crate::mappings::{self, MappingValue, TooMany};
use crate::nexthop::{NexthopIdentity, NexthopValue};
use crate::order;
use crate::policy::Obstacle;
use crate::reason::{REASONS, Reason};
use crate::record::*;
use crate::rib::{Entry, Match, Prefix, Rib};
use crate::sources::{self, SourceRoots};
use crate::store::{Memory, Piece, Store, TABLE_FULL};
use crate::tunnel::{self, TunnelValue};

/// Root of each family's main routes, by `Family`.
pub const MAIN_ROOT: [u32; 2] = [0, 1];

/// A root that is not there, or an address or length that does not fit it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RouteError {
    /// No such root
    #[error("there is no route table {0}")]
    NoRoot(u32),
    /// The root serves the other family
    #[error("route table {root} is not for addresses such as {address}")]
    WrongFamily {
        /// Root asked for
        root: u32,
        /// Address given
        address: IpAddr,
    },
    /// The length does not fit the family
    #[error("{address} has no prefix of {len} bits")]
    BadPrefix {
        /// Address given
        address: IpAddr,
        /// Length given
        len: u8,
    },
}

/// What a publication did.
#[derive(Clone, Default, Debug)]
pub struct Published {
    /// Root words that changed
    pub words: usize,
    /// Nodes written
    pub nodes: usize,
    /// Tables that had no room and could not grow: what did not fit is an exception (`table-full`) until a later
    /// publication finds room
    pub full: Vec<GrowError>,
}

/// A port's settings; see `record::Port`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortValue {
    /// `port_flags` without `PRESENT`
    pub flags: u32,
    /// MAC address
    pub mac: [u8; 6],
    /// Per family: root of the routes to look up in, or with `BY_SOURCE` a list of them
    pub root: [u32; 2],
    /// Per family: why packets that enter here are exceptions, if they are
    pub ingress_policy: [Option<Obstacle>; 2],
    /// Table of VLAN sub-interfaces
    pub vlans: Option<u32>,
    /// VLAN sub-interface: tag protocol and identifier
    pub vlan: Option<(u16, u16)>,
    /// Slot of the interface underneath; the slot itself for a plain port
    pub lower: u32,
    /// IP MTU in bytes
    pub mtu: u32,
    /// Interface index of the VRF whose device stands for it where connections are accepted, or 0
    pub vrf: u32,
    /// Per family: the VRF's number there, `PORT_SLOTS` or more; 0 where the port stands for itself
    pub arrival: [u32; 2],
}

impl PortValue {
    /// A port by itself, with the main tables, in which nothing is on yet.
    pub const fn plain(slot: u32) -> Self {
        let (mac, root, ingress_policy) = ([0; 6], MAIN_ROOT, [None; 2]);
        Self {
            flags: 0,
            mac,
            root,
            ingress_policy,
            vlans: None,
            vlan: None,
            lower: slot,
            mtu: 0,
            vrf: 0,
            arrival: [0; 2],
        }
    }
}

/// A port's counters, summed over CPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortTotals {
    /// Packets that entered here and were forwarded fast
    pub rx_packets: u64,
    /// Their bytes
    pub rx_bytes: u64,
    /// Packets that left here from the fast path
    pub tx_packets: u64,
    /// Their bytes
    pub tx_bytes: u64,
    /// Those of `tx_packets` that were lost for want of room in the transmit ring (user engine)
    pub tx_lost: u64,
    /// Those of `exceptions` that could not be handed over (user engine)
    pub exceptions_lost: u64,
    /// Packets that entered here and were handed to Linux, by `Reason`
    pub exceptions: [u64; REASONS],
}

impl PortTotals {
    /// Packets handed to Linux, for any reason.
    pub fn handed_over(&self) -> u64 {
        self.exceptions.iter().sum::<u64>() - self.exceptions[Reason::Filtered as usize]
    }
}

/// How full a table is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TableUsage {
    /// Which table
    pub table: TableId,
    /// Elements there are
    pub elements: usize,
    /// Elements in use
    pub used: usize,
    /// Bytes the table takes
    pub bytes: usize,
}

enum Routes {
    V4(Rib<4>),
    V6(Rib<16>),
}

macro_rules! routes {
    ($routes:expr, $rib:ident => $do:expr) => {
        match $routes {
            Routes::V4($rib) => $do,
            Routes::V6($rib) => $do,
        }
    };
}

/// Calls `$do` with the trie of a root and the octets of an address of the same family.
macro_rules! with_rib {
    ($self:ident, $get:ident, $root:expr, $address:expr, ($rib:ident, $octets:ident) => $do:expr) => {
        match ($self.routes.$get(&$root).ok_or(RouteError::NoRoot($root))?, $address) {
            (Routes::V4($rib), IpAddr::V4(address)) => {
                let $octets = address.octets();
                $do
            }
            (Routes::V6($rib), IpAddr::V6(address)) => {
                let $octets = address.octets();
                $do
            }
            (_, address) => Err(RouteError::WrongFamily { root: $root, address }),
        }
    };
}

/// The writer.
pub struct TableWriter<B, G> {
    store: Store<B, G>,
    brake: Brake,
    routes: BTreeMap<u32, Routes>,
    /// Adopted next hops and groups that nobody has asked for yet
    unclaimed_nexthops: HashMap<NexthopIdentity, Vec<u32>>,
    unclaimed_groups: Vec<u32>,
    /// Adopted pieces that nobody can ask for
    leaving: Vec<Piece>,
    /// Root words changed so far by a publication that is under way
    words: Option<usize>,
    /// Slots of tunnels
    tunnels: BTreeSet<u32>,
    flows: Flows,
    /// Roots of filters, by family and half
    filter_roots: [[Option<u32>; 2]; 2],
    filter_count: usize,
}

impl<B: Backing, G: Grace> TableWriter<B, G> {
    /// Starts with zeroed tables: a root for each family, no routes.
    pub fn create(backing: B, grace: G) -> Result<Self, GrowError> {
        let mut writer = Self::over(Store::new(backing, grace));
        for family in Family::ALL {
            writer.alloc_root(family)?;
        }
        let view = writer.view();
        NexthopValue::exception(Reason::TableFull).write(&view.nexthops()[TABLE_FULL.word().0 as usize]);
        let identity = NexthopIdentity { ifindex: 0, gateway: None, mtu: 0, reason: Some(Reason::TableFull) };
        identity.write(&view.nexthop_keys()[TABLE_FULL.word().0 as usize]);
        let config = view.config();
        config.version.store(LAYOUT_VERSION);
        config.layout.store(layout_hash());
        config.epoch.store(1);
        writer.flows.begin(&writer.store.mem.view());
        let config = writer.view().config();
        order::publish(&config.magic, MAGIC);
        Ok(writer)
    }

    /// Takes over tables that another writer left. What they say stays published until the first `publish`, which
    /// makes them say what has been set by then: set all routes first. Next hops and groups are claimed by asking for
    /// them (`alloc_nexthop`, `alloc_group`) under the identity or weights they have; the first publication frees
    /// those that were not.
    pub fn adopt(backing: B, grace: G) -> Result<Self, AdoptError> {
        let used = scan(&backing.view())?;
        let (nexthops, groups) = (used.nexthops.clone(), used.groups.clone());
        let (roots, vlans, sources) = (used.roots.clone(), used.vlans.clone(), used.sources.clone());
        let store =
            Store::with_used(backing, grace, used).ok_or(AdoptError::Damaged("pieces of routes overlap".into()))?;
        let mut writer = Self::over(store);
        let ports = (0..).zip(writer.view().ports());
        writer.tunnels = ports.filter(|(_, port)| port.tunnel.flags.load() != 0).map(|(slot, _)| slot).collect();
        writer.find_ways();
        // Flows are not taken over: Linux describes them anew.
        flows::end(&writer.store.mem.view());
        // Readers may still hold what the last writer had in limbo, or a way that was not the routes' any more, or a flow: that
        // counts as free from now on.
        writer.store.wait();
        writer.flows.begin(&writer.store.mem.view());
        let (of_filters, roots): (Vec<u32>, Vec<u32>) =
            roots.into_iter().partition(|root| writer.view().roots()[*root as usize].family.load() >= FILTER_ROOT);
        writer.adopt_filters(&of_filters)?;
        for root in roots {
            let family = writer.view().roots()[root as usize].family.load();
            writer.routes.insert(root, new_routes(root, if family == 1 { Family::V4 } else { Family::V6 }));
        }
        writer.unclaimed_groups = groups;
        writer.leaving.extend(vlans.into_iter().map(Piece::Vlans));
        writer.leaving.extend(sources.into_iter().map(Piece::Sources));
        for index in nexthops.into_iter().filter(|index| *index != TABLE_FULL.word().0) {
            match NexthopIdentity::read(&writer.view().nexthop_keys()[index as usize]) {
                Some(identity) => writer.unclaimed_nexthops.entry(identity).or_default().push(index),
                None => writer.leaving.push(Piece::Nexthop(index)),
            }
        }
        let epoch = &writer.view().config().epoch;
        epoch.store(epoch.load().wrapping_add(1));
        Ok(writer)
    }

    fn over(store: Store<B, G>) -> Self {
        Self {
            brake: store.mem.brake(),
            store,
            routes: BTreeMap::new(),
            unclaimed_nexthops: HashMap::new(),
            unclaimed_groups: Vec::new(),
            leaving: Vec::new(),
            words: None,
            tunnels: BTreeSet::new(),
            flows: Flows::default(),
            filter_roots: [[None; 2]; 2],
            filter_count: 0,
        }
    }

    /// The tables, as a reader sees them.
    pub fn view(&self) -> View<'_> {
        self.store.mem.view()
    }

    /// Whoever owns the memory.
    pub fn backing(&self) -> &B {
        &self.store.mem
    }

    /// Whoever owns the memory, to be acted on; tables must keep their content.
    pub fn backing_mut(&mut self) -> &mut B {
        &mut self.store.mem
    }

    /// The memory back; what is published stays published.
    pub fn into_backing(self) -> B {
        self.store.mem
    }

    // ---- settings of the region

    /// Makes packets of a family exceptions, or no longer.
    pub fn set_policy(&mut self, family: Family, obstacle: Option<Obstacle>) {
        self.brake.set(self.view().config(), family, obstacle);
    }

    /// Sets which fields choose among a group's next hops.
    pub fn set_hash_policy(&mut self, family: Family, policy: u32) {
        self.view().config().hash_policy[family as usize].store(policy);
    }

    /// Sets the seed of the multipath hash.
    pub fn set_hash_seed(&mut self, seed: u32) {
        self.view().config().hash_seed.store(seed);
    }

    /// Sets this host's own IPv4 addresses.
    pub fn set_local_addresses(&mut self, addresses: impl IntoIterator<Item = Ipv4Addr>) {
        let mut filter = [0u64; LOCAL_FILTER_BITS as usize / 64];
        for address in addresses {
            let bit = local_filter_bit(address.octets());
            filter[bit as usize / 64] |= 1 << (bit % 64);
        }
        self.view().config().local_filter.iter().zip(filter).for_each(|(word, value)| word.store(value));
    }

    // ---- flows

    /// Makes a connection a flow: a new one, of which Linux has accepted nothing yet, or one that is no longer closed. What
    /// cannot be at the same time, because a tuple is the same, is no flow any more.
    pub fn set_flow(&mut self, connection: &Connection) -> Result<(), Full> {
        if self.flows.wants_grace(&self.store.mem.view()) {
            self.store.wait();
            self.flows.reclaim();
        }
        self.flows.set(&self.store.mem.view(), connection)
    }

    /// Ends the flow with this original tuple; gives what has passed of it.
    pub fn remove_flow(&mut self, original: &Tuple) -> Option<FlowTotals> {
        self.flows.remove(&self.store.mem.view(), original)
    }

    /// Forgets what Linux accepted of a flow: nothing of it passes until Linux accepts it anew.
    pub fn reject_flow(&mut self, index: u32) {
        if let Some(flow) = self.view().flows().get(index as usize) {
            flow.accepted.iter().for_each(|word| word.store(0));
        }
    }

    /// No flow passes any more, and none is accepted, until `open_flows`. Packets that are on their way may still pass for a
    /// grace period.
    pub fn close_flows(&mut self) {
        flows::close(self.view().config());
    }

    /// Flows pass again as soon as Linux has accepted them anew.
    pub fn open_flows(&mut self) {
        flows::open(self.view().config());
    }

    /// All flows.
    pub fn flows(&self) -> impl Iterator<Item = FlowView> {
        flows::views_in(&self.store.mem.view(), 0..self.flows.end() as u32)
    }

    /// The records of flows that were ever in use.
    pub fn flow_records(&self) -> &[Flow] {
        &self.view().flows()[..self.flows.end()]
    }

    /// How many flows are in which state. This looks at all of them. `passes` says of a family's flows that Linux accepted whether
    /// they pass from one slot to another.
    pub fn flow_states(&self, passes: impl Fn(Family, (u32, u32)) -> bool) -> FlowStates {
        flows::count(self.flow_records(), self.view().config().flow_generation.load(), passes)
    }

    /// Begins to make the records of flows that were ended reusable: `reclaim_flows` with this number is to be called after a
    /// grace period that begins now. None if there are none, or somebody waits for others.
    pub fn seal_flows(&mut self) -> Option<u64> {
        self.flows.seal()
    }

    /// See `seal_flows`.
    pub fn reclaim_flows(&mut self, seal: u64) {
        self.flows.reclaim_sealed(seal);
    }

    /// Number of flows.
    pub fn flow_count(&self) -> usize {
        self.flows.count()
    }

    // ---- mappings

    /// Puts these mappings into force, by their numbers, in place of all others: at once, for every packet. Nothing changes
    /// if they cannot be.
    pub fn set_mappings(&mut self, all: &BTreeMap<u32, MappingValue>) -> Result<(), TooMany> {
        mappings::check(all)?;
        if *all == self.mappings() {
            return Ok(());
        }
        // Until then somebody may look at the set that was in force before this one.
        self.store.wait();
        mappings::publish(&self.view(), all)
    }

    /// The mappings in force, by number.
    pub fn mappings(&self) -> BTreeMap<u32, MappingValue> {
        mappings::read(&self.view())
    }

    // ---- filters

    /// Puts these filters into force in place of all others: at once, for every packet. Nothing changes if they cannot be.
    pub fn set_filters(&mut self, all: &Filters) -> Result<(), FilterError> {
        let plan = Plan::new(all)?;
        let before = self.filters().unwrap_or_default();
        self.make_filter_room(all)?;
        // Until then somebody may look at the half that was in force before this one.
        self.store.wait();
        let half = self.filter_half().map_or(0, |half| 1 - half);
        self.write_filters(&plan, half);
        let words = Family::ALL.map(|family| {
            let root = self.filter_roots[family as usize][half as usize]?;
            all.keys().any(|value| value.family() == family).then_some(InForce { root, half }.word())
        });
        self.publish_filters(&plan, half)?;
        let known: BTreeSet<u32> = before.values().map(|decision| decision.number).collect();
        for number in all.values().map(|decision| decision.number).filter(|number| !known.contains(number)) {
            filters::counters(&self.view(), number).flatten().for_each(|counter| counter.store(0));
        }
        let config = self.view().config();
        words.into_iter().zip(&config.filters).for_each(|(word, place)| order::publish(place, word.unwrap_or(0)));
        self.filter_count = all.len();
        Ok(())
    }

    /// The filters in force; None if what is there are none.
    pub fn filters(&self) -> Option<Filters> {
        filters::read(&self.view())
    }

    fn filter_half(&self) -> Option<u32> {
        let config = self.view().config();
        Family::ALL.into_iter().find_map(|family| in_force(config, family)).map(|force| force.half)
    }

    /// Room for filters, their counters, and both roots of each family that has some.
    fn make_filter_room(&mut self, all: &Filters) -> Result<(), FilterError> {
        let Some(most) = all.values().map(|decision| decision.number).max() else { return Ok(()) };
        let numbers = (most as usize + 1).next_power_of_two().max(64);
        let cpus = self.view().cpus();
        for family in Family::ALL {
            let has = all.keys().any(|value| value.family() == family);
            for half in (0..2).filter(|_| has) {
                if self.filter_roots[family as usize][half].is_none() {
                    let root = self.take(&[TableId::Roots], |store, room| store.roots.take(room))?;
                    order::publish(&self.view().roots()[root as usize].family, FILTER_ROOT + family as u32);
                    self.filter_roots[family as usize][half] = Some(root);
                }
            }
        }
        self.grow_to(TableId::FilterStats, numbers / FILTERS_COUNTED * cpus)?;
        self.grow_to(TableId::FilterKeys, 2 * numbers)?;
        Ok(self.grow_to(TableId::Filters, 2 * numbers)?)
    }

    /// Writes a half that nobody looks at.
    fn write_filters(&mut self, plan: &Plan, half: u32) {
        let view = self.view();
        for record in view.filters().iter().skip(half as usize).step_by(2) {
            record.state.store(0);
        }
        for placed in &plan.filters {
            let at = filters::index(placed.decision.number, half);
            let (record, key) = (&view.filters()[at as usize], &view.filter_keys()[at as usize]);
            placed.value.write(placed.decision, filters::index(placed.next, half), record, key);
        }
    }

    /// Has sources lead to the filters of a half that nobody looks at.
    fn publish_filters(&mut self, plan: &Plan, half: u32) -> Result<(), FilterError> {
        for family in Family::ALL {
            let Some(root) = self.filter_roots[family as usize][half as usize] else { continue };
            let mut routes = new_routes(root, family);
            for (block, number) in &plan.firsts {
                let Some(leaf) = Leaf::nexthop(filters::index(*number, half)) else { continue };
                let entry = Entry { leaf, level: 0 };
                match (&mut routes, block.first) {
                    (Routes::V4(rib), IpAddr::V4(first)) => {
                        Prefix::new(first.octets(), block.len).map(|prefix| rib.set(prefix, entry));
                    }
                    (Routes::V6(rib), IpAddr::V6(first)) => {
                        Prefix::new(first.octets(), block.len).map(|prefix| rib.set(prefix, entry));
                    }
                    _ => {}
                }
            }
            self.store.begin();
            let needed = routes!(&routes, rib => rib.required()) + self.store.used(TableId::Nodes).unwrap_or(0);
            self.grow_to(TableId::Nodes, needed + 1 + NODE_REACH)?;
            routes!(&mut routes, rib => rib.publish(&mut self.store));
            if let Some(error) = self.store.outcome().1.pop() {
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Takes filters over, and writes them anew.
    fn adopt_filters(&mut self, roots: &[u32]) -> Result<(), AdoptError> {
        let damaged = |what: &str| AdoptError::Damaged(format!("filters: {what}"));
        for family in Family::ALL {
            let of_family =
                |root: &&u32| self.view().roots()[**root as usize].family.load() == FILTER_ROOT + family as u32;
            let mut of_family = roots.iter().filter(of_family).copied().collect::<Vec<_>>();
            let force = in_force(self.view().config(), family);
            if force.is_some_and(|force| !of_family.contains(&force.root) || Some(force.half) != self.filter_half()) {
                return Err(damaged("they are found by another table"));
            }
            // The one in force has its half; the other one, if there is one, the other.
            let first = force.map_or(0, |force| force.half as usize);
            of_family.sort_by_key(|root| force.is_none_or(|force| force.root != *root));
            if of_family.len() > 2 {
                return Err(damaged("more than two tables"));
            }
            for (root, half) in of_family.into_iter().zip([first, 1 - first]) {
                self.filter_roots[family as usize][half] = Some(root);
            }
        }
        let all = self.filters().ok_or_else(|| damaged("a record is none"))?;
        if roots.is_empty() {
            return Ok(());
        }
        self.set_filters(&all).map_err(|error| damaged(&error.to_string()))
    }

    // ---- ports

    /// The slot for an interface with a program: the one it has, or a free one of those where its programs look.
    /// Ports do not grow, because the slot follows from their number.
    pub fn alloc_port(&mut self, ifindex: u32) -> Result<u32, GrowError> {
        let slots = self.view().ports().len() as u32;
        self.place_port(ifindex, (0..PORT_PROBES.min(slots)).map(|probe| (ifindex % slots + probe) % slots))
    }

    /// The slot for a VLAN sub-interface or a tunnel: the one it has, or any that is free (from the end, away from the
    /// others).
    pub fn alloc_upper_port(&mut self, ifindex: u32) -> Result<u32, GrowError> {
        let slots = self.view().ports().len() as u32;
        self.place_port(ifindex, (0..slots).rev())
    }

    fn place_port(&mut self, ifindex: u32, candidates: impl Iterator<Item = u32> + Clone) -> Result<u32, GrowError> {
        let view = self.view();
        let with = |wanted: u32| candidates.clone().find(|slot| view.ports()[*slot as usize].ifindex.load() == wanted);
        if let Some(slot) = with(ifindex) {
            return Ok(slot);
        }
        let slot = with(0).ok_or_else(|| GrowError {
            table: TableId::Ports,
            elements: view.ports().len() + 1,
            cause: format!("no slot is left for interface {ifindex}, and ports cannot move while programs use them"),
        })?;
        for stats in self.stats_of(slot) {
            let lost = [&stats.tx_lost, &stats.exceptions_lost];
            let fast = [&stats.rx_packets, &stats.rx_bytes, &stats.tx_packets, &stats.tx_bytes];
            fast.into_iter().chain(lost).chain(&stats.exceptions).for_each(|counter| counter.store(0));
        }
        let port = &view.ports()[slot as usize];
        port.vlans.store(NO_VLANS);
        port.lower.store(slot);
        port.tunnel.set(None);
        port.flags.store(port_flags::PRESENT);
        order::publish(&port.ifindex, ifindex);
        Ok(slot)
    }

    /// Slots in use and their interfaces.
    pub fn ports(&self) -> impl Iterator<Item = (u32, u32)> {
        let ports = self.view().ports().iter().map(|port| port.ifindex.load());
        (0..).zip(ports).filter(|(_, ifindex)| *ifindex != 0)
    }

    /// Sets a port. While what identifies it changes, it is not ready.
    pub fn set_port(&mut self, slot: u32, value: &PortValue) {
        let port = &self.view().ports()[slot as usize];
        let mac = mac_word(value.mac);
        let identity = [
            (&port.vlan, value.vlan.map_or(0, |(protocol, id)| u32::from(protocol) << 16 | u32::from(id))),
            (&port.lower, value.lower),
        ];
        if port.mac.load() != mac || identity.iter().any(|(word, value)| word.load() != *value) {
            port.flags.store(port.flags.load() & !port_flags::READY);
        }
        order::publish(&port.mac, mac);
        identity.iter().for_each(|(word, value)| order::publish(*word, *value));
        for family in 0..2 {
            port.ingress_policy[family].store(Obstacle::word(value.ingress_policy[family]));
            port.root[family].store(value.root[family]);
            port.arrival[family].store(value.arrival[family]);
        }
        port.vlans.store(value.vlans.unwrap_or(NO_VLANS));
        port.mtu.store(value.mtu);
        port.vrf.store(value.vrf);
        order::publish(&port.flags, value.flags | port_flags::PRESENT);
        self.find_way(slot);
    }

    /// Makes a port a tunnel, or none.
    pub fn set_tunnel(&mut self, slot: u32, value: Option<&TunnelValue>) {
        self.view().ports()[slot as usize].tunnel.set(value);
        match value {
            Some(_) => self.tunnels.insert(slot),
            None => self.tunnels.remove(&slot),
        };
        self.find_way(slot);
    }

    /// Has a tunnel's packets go where the published routes lead to.
    fn find_way(&self, slot: u32) {
        tunnel::find_way(&self.store.mem, &self.view().ports()[slot as usize]);
    }

    fn find_ways(&self) {
        self.tunnels.iter().for_each(|slot| self.find_way(*slot));
    }

    /// Makes packets to these tunnels be found in these slots, and no others; gives the slots of tunnels for which there
    /// is no place.
    pub fn index_tunnels(&mut self, tunnels: &[(TunnelValue, u32)]) -> Vec<u32> {
        tunnel::index(self.view().config(), tunnels)
    }

    /// Frees a slot. No next hop may lead to it any more.
    pub fn free_port(&mut self, slot: u32) {
        self.view().ports()[slot as usize].flags.store(0);
        self.store.wait();
        self.view().ports()[slot as usize].ifindex.store(0);
    }

    fn stats_of(&self, slot: u32) -> impl Iterator<Item = &PortStats> {
        self.view().stats().iter().skip(slot as usize).step_by(self.view().ports().len().max(1))
    }

    /// A port's counters.
    pub fn port_totals(&self, slot: u32) -> PortTotals {
        port_totals(&self.view(), slot)
    }

    // ---- VLAN tables

    /// An empty table of VLAN sub-interfaces.
    pub fn alloc_vlans(&mut self) -> Result<u32, GrowError> {
        let index = self.take(&[TableId::Vlans], |store, room| store.vlans.take(room))?;
        self.view().vlans()[index as usize].slots.iter().for_each(|word| word.store(0));
        Ok(index)
    }

    /// Sets the slot for a VLAN identifier (its low 12 bits count).
    pub fn set_vlan(&mut self, vlans: u32, id: u16, slot: Option<u32>) {
        let id = usize::from(id & 0xfff);
        let word = &self.view().vlans()[vlans as usize].slots[id / 2];
        let shift = 16 * (id % 2);
        let half = slot.map_or(0, |slot| slot + 1) << shift;
        order::publish(word, word.load() & !(0xffff << shift) | half);
    }

    /// Frees a table that no port leads to any more; it is reused after the next publication.
    pub fn free_vlans(&mut self, vlans: u32) {
        self.leaving.push(Piece::Vlans(vlans));
    }

    // ---- roots by source

    /// A list that chooses roots by source.
    pub fn alloc_sources(&mut self, list: &SourceRoots) -> Result<u32, GrowError> {
        let index = self.take(&[TableId::Sources], |store, room| store.sources.take(room))?;
        sources::write(&self.view().sources()[index as usize], list);
        Ok(index)
    }

    /// Frees a list that no port leads to any more; it is reused after the next publication.
    pub fn free_sources(&mut self, list: u32) {
        self.leaving.push(Piece::Sources(list));
    }

    /// Has packets of a family that come in by a port looked up in this root, or by this list (`BY_SOURCE`).
    pub fn set_root(&mut self, slot: u32, family: Family, root: u32) {
        order::publish(&self.view().ports()[slot as usize].root[family as usize], root);
        self.find_way(slot);
    }

    // ---- next hops and groups

    /// A next hop of this identity: an adopted one if there is one that nobody has claimed, else a new one, which
    /// leaves everything to Linux until it is set.
    pub fn alloc_nexthop(&mut self, identity: NexthopIdentity) -> Result<u32, GrowError> {
        if let Some(index) = self.unclaimed_nexthops.get_mut(&identity).and_then(Vec::pop) {
            return Ok(index);
        }
        let tables = [TableId::NexthopKeys, TableId::Nexthops];
        let index = self.take(&tables, |store, room| store.nexthops.take(room))?;
        identity.write(&self.view().nexthop_keys()[index as usize]);
        self.set_nexthop(index, &NexthopValue::exception(identity.reason.unwrap_or(Reason::NoNeighbour)));
        self.view().nexthops()[index as usize].hit.store(0);
        Ok(index)
    }

    /// Sets a next hop; nothing is written if it is so already.
    pub fn set_nexthop(&mut self, index: u32, value: &NexthopValue) {
        let record = &self.view().nexthops()[index as usize];
        if NexthopValue::read(record) != Some(*value) {
            value.write(record);
        }
    }

    /// A next hop's content.
    pub fn nexthop(&self, index: u32) -> Option<NexthopValue> {
        NexthopValue::read(self.view().nexthops().get(index as usize)?)
    }

    /// Frees a next hop that no route, host or group leads to any more; it is reused some time after the next
    /// publication.
    pub fn free_nexthop(&mut self, index: u32) {
        self.leaving.push(Piece::Nexthop(index));
    }

    /// True if a packet took this next hop since the last call.
    pub fn take_hit(&self, index: u32) -> bool {
        take_hit(&self.view(), index)
    }

    /// A group of next hops with weights: an adopted one with the same shares if nobody has claimed it, else a new one.
    pub fn alloc_group(&mut self, members: &[(u32, u32)]) -> Result<u32, GrowError> {
        let wanted = shares(members);
        let claimed = self.unclaimed_groups.iter().position(|&group| self.group_shares(group) == wanted);
        if let Some(at) = claimed {
            return Ok(self.unclaimed_groups.swap_remove(at));
        }
        let index = self.take(&[TableId::Groups], |store, room| store.groups.take(room))?;
        self.set_group(index, members);
        Ok(index)
    }

    /// Sets a group's next hops and weights. Buckets change one by one, and only as many as must: flows whose next hop
    /// stays within its share keep it.
    pub fn set_group(&mut self, group: u32, members: &[(u32, u32)]) {
        let mut missing = shares(members);
        let buckets = &self.view().groups()[group as usize].buckets;
        let mut moving = Vec::new();
        for bucket in buckets {
            match missing.get_mut(&bucket.load()) {
                Some(count) if *count > 0 => *count -= 1,
                _ => moving.push(bucket),
            }
        }
        let fill = missing.iter().flat_map(|(nexthop, count)| std::iter::repeat_n(*nexthop, *count));
        moving.into_iter().zip(fill).for_each(|(bucket, nexthop)| order::publish(bucket, nexthop));
    }

    /// Frees a group that no route leads to any more; it is reused some time after the next publication.
    pub fn free_group(&mut self, group: u32) {
        self.leaving.push(Piece::Group(group));
    }

    fn group_shares(&self, group: u32) -> BTreeMap<u32, usize> {
        let mut shares = BTreeMap::new();
        for bucket in &self.view().groups()[group as usize].buckets {
            *shares.entry(bucket.load()).or_default() += 1;
        }
        shares
    }

    // ---- routes

    /// A root without routes.
    pub fn alloc_root(&mut self, family: Family) -> Result<u32, GrowError> {
        let root = self.take(&[TableId::Roots], |store, room| store.roots.take(room))?;
        order::publish(&self.view().roots()[root as usize].family, 1 + family as u32);
        self.routes.insert(root, new_routes(root, family));
        Ok(root)
    }

    /// Frees a root that no port leads to any more, with its routes.
    pub fn free_root(&mut self, root: u32) {
        let Some(mut routes) = self.routes.remove(&root) else { return };
        let family = if matches!(routes, Routes::V4(_)) { Family::V4 } else { Family::V6 };
        routes = new_routes(root, family);
        routes!(&mut routes, rib => rib.publish(&mut self.store));
        self.view().roots()[root as usize].family.store(0);
        self.store.retire(Piece::Root(root));
        self.store.settle();
    }

    /// Roots there are and their families.
    pub fn roots(&self) -> impl Iterator<Item = (u32, Family)> {
        self.routes
            .iter()
            .map(|(root, routes)| (*root, if matches!(routes, Routes::V4(_)) { Family::V4 } else { Family::V6 }))
    }

    /// Sets what a prefix leads to; returns what it led to before.
    pub fn route_set(
        &mut self,
        root: u32,
        address: IpAddr,
        len: u8,
        entry: Entry,
    ) -> Result<Option<Entry>, RouteError> {
        with_rib!(self, get_mut, root, address, (rib, octets) => {
            Ok(rib.set(Prefix::new(octets, len).ok_or(RouteError::BadPrefix { address, len })?, entry))
        })
    }

    /// Removes a prefix; returns what it led to.
    pub fn route_remove(&mut self, root: u32, address: IpAddr, len: u8) -> Result<Option<Entry>, RouteError> {
        with_rib!(self, get_mut, root, address, (rib, octets) => {
            Ok(rib.remove(Prefix::new(octets, len).ok_or(RouteError::BadPrefix { address, len })?))
        })
    }

    /// Lets `leaf` stand in at one address as long as the leaf that decides there is `under`.
    pub fn host_set(
        &mut self,
        root: u32,
        address: IpAddr,
        under: Leaf,
        leaf: Leaf,
    ) -> Result<Option<Leaf>, RouteError> {
        with_rib!(self, get_mut, root, address, (rib, octets) => Ok(rib.set_host(octets, under, leaf)))
    }

    /// Ends that; returns the leaf that stood in.
    pub fn host_remove(&mut self, root: u32, address: IpAddr, under: Leaf) -> Result<Option<Leaf>, RouteError> {
        with_rib!(self, get_mut, root, address, (rib, octets) => Ok(rib.remove_host(octets, under)))
    }

    /// What decides over an address, by the writer's own trie.
    pub fn lookup(&self, root: u32, address: IpAddr) -> Result<Option<Match>, RouteError> {
        with_rib!(self, get, root, address, (rib, octets) => Ok(rib.lookup(&octets)))
    }

    /// Number of routes in a root, hosts not counted.
    pub fn route_count(&self, root: u32) -> usize {
        self.routes.get(&root).map_or(0, |routes| routes!(routes, rib => rib.len()))
    }

    /// Makes room at once for all routes set so far and a quarter more, instead of growing step by step.
    pub fn reserve(&mut self) -> Result<(), GrowError> {
        let needed: usize = self.routes.values().map(|routes| routes!(routes, rib => rib.required())).sum();
        let published = self.store.used(TableId::Nodes).unwrap_or(0);
        self.grow_to(TableId::Nodes, (needed + needed / 4).max(published + needed / 4) + 1 + NODE_REACH)
    }

    fn grow_to(&mut self, table: TableId, elements: usize) -> Result<(), GrowError> {
        if elements <= self.store.mem.elements(table) {
            Ok(())
        } else {
            Memory::grow(&mut self.store.mem, table, elements)
        }
    }

    /// True if `publish` has something to do.
    pub fn is_dirty(&self) -> bool {
        self.routes.values().any(|routes| routes!(routes, rib => rib.is_dirty()))
    }

    /// Makes the tables say what was set.
    pub fn publish(&mut self) -> Published {
        self.publish_while(|| true).unwrap_or_default()
    }

    /// Makes the tables say what was set, as long as `go_on`, asked after each piece, says so; None if there is more to
    /// do. What is freed is out of use only when all is done.
    pub fn publish_while(&mut self, mut go_on: impl FnMut() -> bool) -> Option<Published> {
        if self.words.is_none() {
            self.store.begin();
        }
        let mut words = self.words.take().unwrap_or(0);
        let mut done = true;
        for routes in self.routes.values_mut() {
            routes!(routes, rib => done = done && rib.publish_while(&mut self.store, &mut words, &mut go_on));
        }
        // Before what the routes no longer lead to is out of use
        self.find_ways();
        self.store.tidy();
        if !done {
            self.words = Some(words);
            return None;
        }
        self.routes.values_mut().for_each(|routes| routes!(routes, rib => rib.retry()));
        self.release();
        self.store.tidy();
        let (nodes, full) = self.store.outcome();
        Some(Published { words, nodes, full })
    }

    /// Sends to limbo what was freed, or adopted and never claimed; routes no longer lead there.
    fn release(&mut self) {
        let unclaimed = std::mem::take(&mut self.unclaimed_nexthops).into_values().flatten().map(Piece::Nexthop);
        self.leaving.extend(unclaimed);
        self.leaving.extend(self.unclaimed_groups.drain(..).map(Piece::Group));
        for piece in std::mem::take(&mut self.leaving) {
            if let Piece::Nexthop(index) = piece {
                // A packet still on its way here becomes an exception.
                self.view().nexthops()[index as usize].state.store(NexthopKind::Free as u32);
            }
            self.store.retire(piece);
        }
        self.store.settle();
    }

    /// Waits for a grace period and makes reusable everything that was taken out of use; for quiet moments.
    pub fn reclaim(&mut self) {
        if self.flows.limbo() > 0 {
            self.store.wait();
            self.flows.reclaim();
        }
        self.store.reclaim();
    }

    /// How full each table is.
    pub fn usage(&self) -> [TableUsage; TableId::ALL.len()] {
        let view = self.view();
        TableId::ALL.map(|table| {
            let elements = view.elements(table);
            let used = match table {
                TableId::Config => 1,
                TableId::Flows => self.flows.count(),
                TableId::FlowLines => (2 * self.flows.count()).div_ceil(FLOW_PLACES),
                TableId::Mappings => usize::from(view.config().mappings.load() != 0),
                TableId::MappingStats => self.mappings().len() * (elements / MAPPINGS),
                TableId::Filters | TableId::FilterKeys => 2 * self.filter_count,
                TableId::FilterStats => self.filter_count.div_ceil(FILTERS_COUNTED) * view.cpus(),
                TableId::Ports => self.ports().count(),
                TableId::Stats => self.ports().count() * (elements / view.ports().len().max(1)),
                _ => self.store.used(table).unwrap_or(0),
            };
            TableUsage { table, elements, used, bytes: elements * table.element_size() }
        })
    }

    /// Takes an element that all of `tables` have room for.
    fn take(
        &mut self,
        tables: &[TableId],
        take: impl Fn(&mut Store<B, G>, u32) -> Option<u32>,
    ) -> Result<u32, GrowError> {
        self.store.begin();
        for table in tables {
            let taken = self.store.allocate(*table, |store, _| {
                let room = tables.iter().map(|table| store.mem.elements(*table)).min().unwrap_or(0);
                take(store, u32::try_from(room).unwrap_or(u32::MAX))
            });
            if let Some(index) = taken {
                return Ok(index);
            }
        }
        let table = *tables.last().unwrap_or(&TableId::Config);
        let elements = self.store.mem.elements(table) + 1;
        let refused = self.store.outcome().1.pop();
        Err(refused.unwrap_or_else(|| GrowError { table, elements, cause: "no larger index can be named".into() }))
    }
}

fn new_routes(root: u32, family: Family) -> Routes {
    match family {
        Family::V4 => Routes::V4(Rib::new(root)),
        Family::V6 => Routes::V6(Rib::new(root)),
    }
}

/// Buckets for each next hop: its weight's share, largest remainders first.
fn shares(members: &[(u32, u32)]) -> BTreeMap<u32, usize> {
    let total: u64 = members.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let buckets = GROUP_BUCKETS as u64;
    let exact = |weight: u32| u64::from(weight) * buckets;
    let mut shares: Vec<(u32, usize, u64)> = members
        .iter()
        .filter(|_| total > 0)
        .map(|&(nexthop, weight)| (nexthop, (exact(weight) / total) as usize, exact(weight) % total))
        .collect();
    shares.sort_by_key(|&(nexthop, _, remainder)| (std::cmp::Reverse(remainder), nexthop));
    let rest = GROUP_BUCKETS.saturating_sub(shares.iter().map(|share| share.1).sum());
    shares.iter_mut().take(rest).for_each(|share| share.1 += 1);
    let mut merged = BTreeMap::new();
    for (nexthop, count, _) in shares {
        *merged.entry(nexthop).or_default() += count;
    }
    merged.retain(|_, count| *count > 0);
    merged
}

/// A port's counters, for readers without a writer.
pub fn port_totals(view: &View<'_>, slot: u32) -> PortTotals {
    let mut totals = PortTotals {
        rx_packets: 0,
        rx_bytes: 0,
        tx_packets: 0,
        tx_bytes: 0,
        tx_lost: 0,
        exceptions_lost: 0,
        exceptions: [0; REASONS],
    };
    for stats in view.stats().iter().skip(slot as usize).step_by(view.ports().len().max(1)) {
        totals.rx_packets += stats.rx_packets.load();
        totals.rx_bytes += stats.rx_bytes.load();
        totals.tx_packets += stats.tx_packets.load();
        totals.tx_bytes += stats.tx_bytes.load();
        totals.tx_lost += stats.tx_lost.load();
        totals.exceptions_lost += stats.exceptions_lost.load();
        totals.exceptions.iter_mut().zip(&stats.exceptions).for_each(|(sum, counter)| *sum += counter.load());
    }
    totals
}

/// True if a packet took this next hop since the last call; for readers without a writer.
pub fn take_hit(view: &View<'_>, index: u32) -> bool {
    let Some(record) = view.nexthops().get(index as usize) else { return false };
    // An engine may set the flag again between the two accesses; that hit is part of the one reported now.
    let hit = record.hit.load() != 0;
    if hit {
        record.hit.store(0);
    }
    hit
}
