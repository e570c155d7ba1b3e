//! What Linux says: everything CM described, and what of it changed since the tables were last brought in line.
//! Questions that the messages alone answer are answered here; nothing here knows the tables.

use crate::Transmit;
use crate::filters::FilterRefused;
use crate::mappings::{self, Mapping, MappingError};
use crate::routes::{Candidate, DEFAULT, LOCAL, MAIN, Routes, kind};
use crate::rules::{self, Step, Steps};
use crate::snapshot::{Generations, Marked};
use crate::via::{RTNH_F_DEAD, Target, ViaId, ViaKey, Vias};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use towpath_fpc::*;
use towpath_tables::tunnel::{Label, TunnelValue};
use towpath_tables::{Connection, Obstacle, Reason, record::Family};

/// A frame carries at most this many VLAN tags on the fast path.
const MAX_TAGS: usize = 2;

/// What changed since the last `State::take_changes`.
#[derive(Default, Debug)]
pub(crate) struct Changes {
    /// Interfaces whose settings, service or policies changed
    pub ports: BTreeSet<u32>,
    pub neighbours: HashSet<NeighbourKey>,
    pub objects: HashSet<u32>,
    pub prefixes: Vec<Prefix>,
    /// Vias to land anew
    pub vias: HashSet<ViaId>,
    /// Policies of a family, own addresses, hash policy
    pub config: bool,
    pub mappings: bool,
    /// Rules, or what they came to
    pub rules: bool,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty()
            && self.neighbours.is_empty()
            && self.objects.is_empty()
            && self.prefixes.is_empty()
            && self.vias.is_empty()
            && !self.config
            && !self.mappings
            && !self.rules
    }
}

/// Whether no connection passes the policy, and it may change packets, decide about them, or hold them.
fn shapes(policy: &Policy) -> bool {
    use PolicySource::{Nftables, Tc, Xfrm, Xtables};
    policy.flows.is_none() && matches!(policy.source, Nftables | Tc | Xfrm | Xtables)
}

/// Everything known.
#[derive(Default)]
pub(crate) struct State {
    pub generations: Generations,
    pub served: BTreeSet<u32>,
    transmit: BTreeMap<u32, Transmit>,
    /// Interfaces where the engine sees what travels beside frames
    beside: BTreeSet<u32>,
    /// Interfaces by which no packet arrives with a mark
    unmarked: BTreeSet<u32>,
    pub ports: BTreeMap<u32, Marked<Port>>,
    pub addresses: BTreeMap<Address, u8>,
    /// The same without interfaces
    own: HashSet<IpAddr>,
    pub neighbours: BTreeMap<NeighbourKey, Marked<Neighbour>>,
    pub objects: HashMap<u32, Marked<NexthopObject>>,
    pub routes: Routes,
    pub vias: Vias,
    policies: BTreeMap<Policy, u8>,
    alarms: BTreeMap<AlarmId, Vec<Policy>>,
    /// Those whose filter the engine runs
    filtered: BTreeSet<Policy>,
    pub hash_policy: [u8; 2],
    /// Whether Linux makes flow labels for its tunnels' packets, per family
    flow_labels: [bool; 2],
    /// By their numbers in the tables
    pub mappings: BTreeMap<u32, Mapping>,
    /// Nobody follows Linux's rules
    deaf: bool,
    /// IPv4 prefixes from which Linux may refuse packets whatever rp_filter says: those with routes that are not unicast
    refused_sources: BTreeSet<Prefix>,
    /// Per family: the rules that the tables repeat, if they are not the usual ones
    applied: [Option<Vec<Rule>>; 2],
    /// Per family: rules ask for marks
    by_mark: [bool; 2],
    changes: Changes,
    /// See `take_freed`
    freed: bool,
}

/// Why a via leads nowhere, or its next hops.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Resolved {
    /// Always Linux's
    Exception(Reason),
    /// One or several next hops, and whether Linux would use each of them now
    Hops(Vec<(Hop, bool)>),
}

/// What decides over a prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Choice {
    Exception(Reason),
    Via(ViaId),
}

impl State {
    pub fn awaiting(classes: impl IntoIterator<Item = Snapshot>) -> Self {
        Self { generations: Generations::awaiting(classes), ..Self::default() }
    }

    pub fn apply(&mut self, message: Message) {
        match message {
            Message::SnapshotBegin(class) => {
                self.generations.begin(class);
                self.changes.config |= matches!(class, Snapshot::Neighbours(_));
            }
            Message::SnapshotEnd(class) => self.end(class),
            Message::Port(port) => self.set_port(port),
            Message::PortDelete(ifindex) => self.remove_port(ifindex),
            Message::Address(address) => self.set_address(address),
            Message::AddressDelete(address) => self.remove_address(address),
            Message::Neighbour(neighbour) => self.set_neighbour(neighbour),
            Message::NeighbourDelete(key) => self.remove_neighbour(key),
            Message::Route(route) => self.set_route(route),
            Message::RouteDelete(key) => self.remove_route(key),
            Message::Nexthop(object) => self.set_object(object),
            Message::NexthopDelete(id) => self.remove_object(id),
            // These go right into the tables: see `flows`, and `Config::heartbeat`.
            Message::Flow(_) | Message::FlowDelete(_) | Message::Heartbeat(_) => {}
            // To be counted, by who asks for it.
            Message::Lost(_) => {}
            Message::Policy(policy) => self.set_policy(policy),
            Message::Alarm(alarm) => self.alarm(alarm),
            Message::AlarmOver(id) => self.end_alarms(id),
            Message::FamilySettings(settings) => {
                self.hash_policy[settings.family as usize] = settings.hash_policy;
                self.changes.config = true;
                if self.flow_labels[settings.family as usize] != settings.flow_labels {
                    self.flow_labels[settings.family as usize] = settings.flow_labels;
                    self.tunnels_changed();
                }
            }
        }
    }

    /// What changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Has what found no room worked in again with what changed since.
    pub fn work_in_again(&mut self, missing: Changes) {
        self.changes.ports.extend(missing.ports);
        self.changes.neighbours.extend(missing.neighbours);
        self.changes.prefixes.extend(missing.prefixes);
        self.changes.vias.extend(missing.vias);
    }

    pub fn is_changed(&self) -> bool {
        !self.changes.is_empty()
    }

    fn end(&mut self, class: Snapshot) {
        let Some(keep) = self.generations.end(class) else {
            tracing::warn!(?class, "end of a snapshot that was not begun");
            return;
        };
        match class {
            Snapshot::Ports => {
                let gone = self.ports.iter().filter(|(_, port)| port.generation != keep).map(|(ifindex, _)| *ifindex);
                gone.collect::<Vec<_>>().into_iter().for_each(|ifindex| self.remove_port(ifindex));
            }
            Snapshot::Addresses(family) => {
                let gone = self.addresses.iter().filter(|(a, g)| Family::of(a.address) == family && **g != keep);
                gone.map(|(a, _)| *a).collect::<Vec<_>>().into_iter().for_each(|address| self.remove_address(address));
            }
            Snapshot::Neighbours(family) => {
                self.changes.config = true;
                let gone =
                    self.neighbours.iter().filter(|(k, n)| Family::of(k.address) == family && n.generation != keep);
                gone.map(|(key, _)| *key).collect::<Vec<_>>().into_iter().for_each(|key| self.remove_neighbour(key));
            }
            Snapshot::Nexthops => {
                let gone = self.objects.iter().filter(|(_, object)| object.generation != keep).map(|(id, _)| *id);
                gone.collect::<Vec<_>>().into_iter().for_each(|id| self.remove_object(id));
            }
            Snapshot::Routes(family) => {
                let gone = self.routes.iter(family).filter(|(_, route)| route.generation != keep).map(|(key, _)| key);
                gone.collect::<Vec<_>>().into_iter().for_each(|key| self.remove_route(key));
            }
            Snapshot::Flows => {}
            Snapshot::Policies(source) => {
                let gone = self.policies.iter().filter(|(p, g)| p.source == source && **g != keep);
                gone.map(|(p, _)| p.clone()).collect::<Vec<_>>().iter().for_each(|policy| self.remove_policy(policy));
            }
        }
    }

    // ---- objects

    /// Serves an interface, or no longer.
    pub fn serve(&mut self, ifindex: u32, on: bool) {
        let changed = if on { self.served.insert(ifindex) } else { self.served.remove(&ifindex) };
        if changed {
            self.changes.ports.insert(ifindex);
        }
    }

    /// Notes whether the engine can transmit by an interface.
    pub fn set_transmit(&mut self, ifindex: u32, transmit: Transmit) {
        if self.transmit.insert(ifindex, transmit).unwrap_or(Transmit::Any) != transmit {
            self.changes.ports.insert(ifindex);
        }
    }

    /// Whether the engine can transmit by the interface underneath a port.
    pub fn transmit(&self, chain: &[&Port]) -> Transmit {
        let device = chain.last().and_then(|device| self.transmit.get(&device.ifindex));
        device.copied().unwrap_or(Transmit::Any)
    }

    /// Notes whether the engine sees what travels beside frames that come in by an interface.
    pub fn set_beside(&mut self, ifindex: u32, seen: bool) {
        let changed = if seen { self.beside.insert(ifindex) } else { self.beside.remove(&ifindex) };
        if changed {
            self.changes.ports.insert(ifindex);
        }
    }

    /// Whether it does at the interface underneath a port.
    pub fn sees_beside(&self, chain: &[&Port]) -> bool {
        chain.last().is_some_and(|device| self.beside.contains(&device.ifindex))
    }

    /// Notes whether packets that come in by an interface have no mark.
    pub fn set_unmarked(&mut self, ifindex: u32, on: bool) {
        let changed = if on { self.unmarked.insert(ifindex) } else { self.unmarked.remove(&ifindex) };
        if changed {
            self.changes.ports.insert(ifindex);
        }
    }

    /// Whether what rules say of packets without a mark holds for all that come in by a port.
    pub fn rules_hold(&self, ifindex: u32, family: Family) -> bool {
        let is_unmarked =
            |chain: Vec<&Port>| chain.last().is_some_and(|device| self.unmarked.contains(&device.ifindex));
        !self.by_mark[family as usize] || self.chain(ifindex).is_some_and(is_unmarked)
    }

    fn set_port(&mut self, port: Port) {
        let marked = Marked { generation: self.generations.current(Snapshot::Ports), value: port };
        let ifindex = marked.value.ifindex;
        let old = self.ports.get(&ifindex).map(|old| &old.value);
        if old != Some(&marked.value) {
            self.changes.ports.insert(ifindex);
        }
        // Its packets come in by another device, for Linux's rules.
        self.freed |= old.and_then(|old| old.vrf.as_ref()) != marked.value.vrf.as_ref();
        self.ports.insert(ifindex, marked);
    }

    fn remove_port(&mut self, ifindex: u32) {
        self.transmit.remove(&ifindex);
        self.beside.remove(&ifindex);
        self.unmarked.remove(&ifindex);
        self.keep_mappings(|of| of != ifindex);
        if self.ports.remove(&ifindex).is_some() {
            self.changes.ports.insert(ifindex);
        }
    }

    /// See `Fpm::add_mapping`.
    pub fn add_mapping(&mut self, mapping: Mapping) -> Result<(), MappingError> {
        match self.chain(mapping.ifindex).as_deref() {
            None => return Err(MappingError::Port("it is no port: only what passes a port can be translated")),
            Some([Port { kind: PortKind::Tunnel(_), .. }, ..]) => {
                return Err(MappingError::Port("it is a tunnel: what passes tunnels cannot be translated"));
            }
            Some(_) => {}
        }
        mappings::add(&mut self.mappings, mapping)?;
        self.mappings_changed(mapping.ifindex);
        Ok(())
    }

    /// See `Fpm::remove_mapping`.
    pub fn remove_mapping(&mut self, mapping: &Mapping) -> Result<(), MappingError> {
        mappings::remove(&mut self.mappings, mapping)?;
        self.mappings_changed(mapping.ifindex);
        Ok(())
    }

    /// Whether a filter may be of an interface; 0 is any.
    pub fn check_filter_port(&self, ifindex: u32) -> Result<(), FilterRefused> {
        let Some(chain) = self.chain(ifindex).filter(|_| ifindex != 0) else {
            let why = "it is no port: only what comes in by a port can be filtered";
            return if ifindex == 0 { Ok(()) } else { Err(FilterRefused::Port(why)) };
        };
        match chain.first().map(|port| &port.kind) {
            Some(PortKind::Ethernet | PortKind::Virtual) => Ok(()),
            _ => Err(FilterRefused::Port(
                "no frames come in by it itself: name the port underneath, filters look into tags",
            )),
        }
    }

    /// Whether a port has mappings
    pub fn is_mapped(&self, ifindex: u32) -> bool {
        self.mappings.values().any(|mapping| mapping.ifindex == ifindex)
    }

    /// Ends the mappings of interfaces that are not there any more.
    pub fn drop_stale_mappings(&mut self) {
        let ports: BTreeSet<u32> = self.ports.keys().copied().collect();
        self.keep_mappings(|of| ports.contains(&of));
    }

    /// See `Fpm::keep_mappings`.
    pub fn keep_mappings(&mut self, of: impl Fn(u32) -> bool) {
        let ended = self.mappings.extract_if(.., |_, mapping| !of(mapping.ifindex)).map(|(_, mapping)| mapping.ifindex);
        let ended: BTreeSet<u32> = ended.collect();
        ended.into_iter().for_each(|ifindex| self.mappings_changed(ifindex));
    }

    fn mappings_changed(&mut self, ifindex: u32) {
        self.changes.mappings = true;
        self.changes.ports.insert(ifindex);
    }

    fn set_address(&mut self, address: Address) {
        let generation = self.generations.current(Snapshot::Addresses(Family::of(address.address)));
        if self.addresses.insert(address, generation).is_none() {
            self.own.insert(address.address);
            self.address_changed(address);
        }
    }

    fn remove_address(&mut self, address: Address) {
        if self.addresses.remove(&address).is_some() {
            if !self.addresses.keys().any(|other| other.address == address.address) {
                self.own.remove(&address.address);
            }
            self.address_changed(address);
        }
    }

    /// Whether this host is one of a connection's ends: nothing of it is forwarded.
    pub fn is_end_of(&self, connection: &Connection) -> bool {
        [connection.original, connection.reply].iter().any(|tuple| self.own.contains(&tuple.source))
    }

    fn address_changed(&mut self, address: Address) {
        self.changes.config = true;
        // A loose reverse path filter depends on whether the port has addresses.
        self.changes.ports.insert(address.ifindex);
    }

    fn set_neighbour(&mut self, neighbour: Neighbour) {
        let generation = self.generations.current(Snapshot::Neighbours(Family::of(neighbour.key.address)));
        let old = self.neighbours.insert(neighbour.key, Marked { value: neighbour, generation });
        if old.and_then(|old| old.value.lladdr) != neighbour.lladdr {
            self.changes.neighbours.insert(neighbour.key);
        }
    }

    fn remove_neighbour(&mut self, key: NeighbourKey) {
        if self.neighbours.remove(&key).is_some() {
            self.changes.neighbours.insert(key);
        }
    }

    fn set_object(&mut self, object: NexthopObject) {
        let marked = Marked { generation: self.generations.current(Snapshot::Nexthops), value: object };
        let id = marked.value.id;
        if self.objects.get(&id).is_none_or(|old| old.value != marked.value) {
            self.changes.objects.insert(id);
        }
        self.objects.insert(id, marked);
    }

    fn remove_object(&mut self, id: u32) {
        if self.objects.remove(&id).is_some() {
            self.changes.objects.insert(id);
        }
    }

    fn set_route(&mut self, route: Route) {
        let family = route.key.prefix.family();
        let candidate = Candidate {
            via: self.vias.hold(ViaKey::new(family, &route.via, route.mtu)),
            kind: route.kind,
            protocol: route.protocol,
            unsupported: route.unsupported,
            generation: self.generations.current(Snapshot::Routes(family)),
        };
        let old = self.routes.set(route.key, candidate);
        if let Some(old) = old {
            self.vias.release(old.via);
        }
        let same = |old: Candidate| Candidate { generation: candidate.generation, ..old } == candidate;
        if !old.is_some_and(same) {
            self.route_changed(route.key);
        }
    }

    fn remove_route(&mut self, key: RouteKey) {
        if let Some(old) = self.routes.remove(key) {
            self.vias.release(old.via);
            self.route_changed(key);
        }
    }

    fn route_changed(&mut self, key: RouteKey) {
        if key.prefix.family() == Family::V4 {
            // Of a table that only rules lead to, a look-up that fails refuses nobody.
            let refuses = |(key, candidate): (RouteKey, Candidate)| {
                candidate.kind != kind::UNICAST
                    && ([LOCAL, MAIN, DEFAULT].contains(&key.table) || candidate.kind <= kind::MULTICAST)
            };
            let refused = self.routes.candidates(key.prefix).any(refuses);
            self.changes.config |= if refused {
                self.refused_sources.insert(key.prefix)
            } else {
                self.refused_sources.remove(&key.prefix)
            };
        }
        // Until everything was described once, the tables are not filled, and then from all routes.
        if self.generations.complete() {
            self.changes.prefixes.push(key.prefix);
        }
    }

    fn set_policy(&mut self, policy: Policy) {
        let generation = self.generations.current(Snapshot::Policies(policy.source));
        let scope = policy.scope;
        if self.policies.insert(policy, generation).is_none() {
            self.policy_changed(scope);
        }
    }

    fn remove_policy(&mut self, policy: &Policy) {
        if self.policies.remove(policy).is_some() {
            self.policy_gone(policy);
        }
    }

    fn policy_gone(&mut self, policy: &Policy) {
        self.freed |= shapes(policy) && !self.policies().any(|other| other == policy);
        self.policy_changed(policy.scope);
    }

    /// Whether something that no connection passes, and that may have had a say in what Linux's rules accepted, has gone since
    /// the last call.
    pub fn take_freed(&mut self) -> bool {
        std::mem::take(&mut self.freed)
    }

    fn alarm(&mut self, alarm: Alarm) {
        let scopes: Vec<_> = alarm.policies.iter().map(|policy| policy.scope).collect();
        self.alarms.insert(alarm.id, alarm.policies);
        scopes.into_iter().for_each(|scope| self.policy_changed(scope));
    }

    fn end_alarms(&mut self, last: AlarmId) {
        let ended = |id: &AlarmId| id.source == last.source && *id <= last;
        let over = self.alarms.extract_if(.., |id, _| ended(id)).flat_map(|(_, policies)| policies);
        over.collect::<Vec<_>>().iter().for_each(|policy| self.policy_gone(policy));
    }

    /// The policies in force: those of snapshots and those of alarms.
    pub fn policies(&self) -> impl Iterator<Item = &Policy> {
        self.policies.keys().chain(self.alarms.values().flatten())
    }

    /// The policies that touch less if the engine runs their filters. It runs them on frames as they arrive; so what enters
    /// or leaves tagged or through a tunnel must not be their concern.
    pub fn filters(&self) -> BTreeSet<Policy> {
        self.policies().filter(|policy| policy.filter.is_some() && self.can_filter(policy.scope)).cloned().collect()
    }

    fn can_filter(&self, scope: Scope) -> bool {
        match scope {
            Scope::Ingress(ifindex, _) => self.is_plain(ifindex) == Some(true),
            Scope::Egress(ifindex, _) => {
                self.is_plain(ifindex) == Some(true)
                    && self.ports.keys().all(|port| self.is_plain(*port) != Some(false))
            }
            Scope::Family(_) | Scope::Local(_) => false,
        }
    }

    /// Whether the port's packets are frames of its own driver without tags; None if the interface is no port.
    fn is_plain(&self, ifindex: u32) -> Option<bool> {
        let chain = self.chain(ifindex)?;
        Some(chain.len() == 1 && !matches!(chain[0].kind, PortKind::Tunnel(_)))
    }

    /// See `Fpm::set_filtered`.
    pub fn set_filtered(&mut self, filtered: BTreeSet<Policy>) {
        let before = std::mem::replace(&mut self.filtered, filtered);
        let changed: Vec<_> = before.symmetric_difference(&self.filtered).map(|policy| policy.scope).collect();
        changed.into_iter().for_each(|scope| self.policy_changed(scope));
    }

    /// Whether the engine tells the policy's packets from others.
    pub fn is_filtered(&self, policy: &Policy) -> bool {
        self.filtered.contains(policy) && self.can_filter(policy.scope)
    }

    fn policy_changed(&mut self, scope: Scope) {
        match scope {
            Scope::Family(family) => {
                let by_mark = |policy: &Policy| policy.rules.iter().flatten().any(|rule| rule.by_mark);
                let any = self.policies().any(|policy| policy.scope == scope && by_mark(policy));
                self.by_mark[family as usize] = any;
                self.changes.config = true;
                self.changes.rules = true;
                // Whether connections pass the family's policies makes a difference there.
                let in_vrfs = self.ports.values().filter(|port| port.value.vrf.is_some());
                self.changes.ports.extend(in_vrfs.map(|port| port.value.ifindex));
            }
            Scope::Local(_) => self.tunnels_changed(),
            Scope::Ingress(ifindex, _) | Scope::Egress(ifindex, _) => {
                self.changes.ports.insert(ifindex);
            }
        }
    }

    fn tunnels_changed(&mut self) {
        let tunnels: Vec<_> = self.tunnels().collect();
        self.changes.ports.extend(tunnels);
    }

    // ---- answers

    /// A port and the interfaces underneath it down to the one with a driver, or a tunnel alone; None if the interface is
    /// not a port: not served, nor a VLAN sub-interface (of at most two tags) of one that is, nor a tunnel that the fast
    /// path can serve.
    pub fn chain(&self, ifindex: u32) -> Option<Vec<&Port>> {
        let mut chain = vec![&self.ports.get(&ifindex)?.value];
        loop {
            let bottom = *chain.last()?;
            match bottom.kind {
                PortKind::Vlan { lower, .. } if chain.len() <= MAX_TAGS => chain.push(&self.ports.get(&lower)?.value),
                PortKind::Tunnel(_) if self.tunnel(bottom).is_some() => return Some(chain),
                PortKind::Ethernet | PortKind::Virtual if self.served.contains(&bottom.ifindex) => return Some(chain),
                _ => return None,
            }
        }
    }

    /// The tunnel that an interface is, if the fast path can serve it: between two addresses, one of them ours, and not to
    /// be mistaken for another.
    pub fn tunnel(&self, port: &Port) -> Option<TunnelValue> {
        let PortKind::Tunnel(own) = port.kind else { return None };
        let family = own.family();
        // Without it Linux finds no way out (ip_route_output_key_hash_rcu, net/ipv4/route.c; ip6_tnl_xmit_ctl,
        // net/ipv6/ip6_tunnel.c).
        let ours = self.own.contains(&own.local);
        let clear =
            !self.ports.values().any(|other| other.value.ifindex != port.ifindex && is_rival(&own, &other.value));
        let ends = Family::of(own.local) == family && is_host(own.local) && is_host(own.remote);
        let sound = port.unsupported.is_none() && ends && ours && clear;
        (sound && !self.served.is_empty()).then(|| TunnelValue {
            local: own.local,
            remote: own.remote,
            input_key: own.input.key,
            output_key: own.output.key,
            input_checksum: own.input.checksum,
            output_checksum: own.output.checksum,
            ttl: own.ttl,
            class: own.class,
            label: Label { fixed: own.label, made: self.flow_labels[family as usize] },
            limit: own.limit,
            link: own.link,
            policy: self.tunnel_policy(family),
        })
    }

    /// Why packets of tunnels over a family are exceptions. Those to the other end are looked up as packets of this host: by
    /// other rules.
    fn tunnel_policy(&self, family: Family) -> Option<Reason> {
        let policy = self.policy(|scope| *scope == Scope::Local(family)).map(|obstacle| obstacle.reason);
        let own_are_usual = match self.rules_of(family) {
            Some(None) => true,
            Some(Some(rules)) => !self.has_vrfs() && rules::are_usual_beside_vrfs(rules),
            None => false,
        };
        policy.or((!own_are_usual).then_some(Reason::PolicyRule))
    }

    /// Whether an interface belongs to a VRF.
    fn has_vrfs(&self) -> bool {
        self.ports.values().any(|port| port.value.vrf.is_some())
    }

    /// The given interfaces, those that belong to them as VRFs, and all VLAN sub-interfaces over them; and all tunnels,
    /// since what one may be depends on the others and on addresses of any interface; and where filters are run, since
    /// that depends on what other ports are.
    pub fn with_uppers(&self, interfaces: &BTreeSet<u32>) -> BTreeSet<u32> {
        let mut all = interfaces.clone();
        all.extend(self.tunnels());
        all.extend(self.filtered.iter().filter_map(|policy| interface(policy.scope)));
        for _ in 0..=MAX_TAGS {
            for (ifindex, Marked { value: port, .. }) in &self.ports {
                let in_vrf = port.vrf.as_ref().is_some_and(|vrf| all.contains(&vrf.ifindex));
                if in_vrf || matches!(port.kind, PortKind::Vlan { lower, .. } if all.contains(&lower)) {
                    all.insert(*ifindex);
                }
            }
        }
        all
    }

    fn tunnels(&self) -> impl Iterator<Item = u32> {
        self.ports
            .iter()
            .filter(|(_, port)| matches!(port.value.kind, PortKind::Tunnel(_)))
            .map(|(ifindex, _)| *ifindex)
    }

    /// Generations of the rules that connections may pass now; none if nobody would see them change.
    pub fn rules(&self) -> BTreeSet<u32> {
        self.policies().filter_map(|policy| self.flows(policy)).collect()
    }

    /// Generation of the rules by which connections pass a policy. Where rules of routing ask for marks, none pass: the
    /// packets of one may get theirs on the way.
    fn flows(&self, policy: &Policy) -> Option<u32> {
        let by_mark = Family::ALL.into_iter().any(|of| self.by_mark[of as usize] && policy.scope.concerns(of));
        policy.flows.filter(|_| !self.deaf && !by_mark)
    }

    /// Whether connections stay in Linux for the rules of a family.
    pub fn keeps_flows(&self, family: Family) -> bool {
        self.by_mark[family as usize]
            && self.policies().any(|policy| policy.flows.is_some() && policy.scope.concerns(family))
    }

    /// Whether neighbours are known as they were when the rules in force began, or later: CM tells rules, but for alarms,
    /// behind all that Linux told before.
    pub fn knows_neighbours(&self) -> bool {
        let told: BTreeSet<u32> = self.policies.keys().filter_map(|policy| policy.flows).collect();
        let read_anew = Family::ALL.into_iter().any(|family| self.generations.is_open(Snapshot::Neighbours(family)));
        self.rules().is_subset(&told) && !read_anew
    }

    /// See `Fpm::follow_rules`.
    pub fn follow_rules(&mut self, on: bool) {
        if std::mem::replace(&mut self.deaf, !on) == on {
            let scopes: Vec<_> = self.policies().filter(|policy| policy.flows.is_some()).map(|p| p.scope).collect();
            scopes.into_iter().for_each(|scope| self.policy_changed(scope));
        }
    }

    /// What the policies that `applies` picks come to.
    pub fn policy(&self, applies: impl Fn(&Scope) -> bool) -> Option<Obstacle> {
        let touching = self.policies().filter(|policy| applies(&policy.scope) && !self.is_applied(policy));
        sum(touching.map(|policy| self.obstacle(policy)))
    }

    /// Which packets of a family's connections stand for others in VRFs.
    pub fn flows_in_vrfs(&self, family: Family) -> InVrfs {
        let passed = self.policies().filter(|policy| self.flows(policy).is_some() && policy.scope.concerns(family));
        passed.map(|policy| policy.in_vrfs).min().unwrap_or_default()
    }

    /// Why packets of a family are exceptions of which connections pass, if they do.
    pub fn passed_by_flows(&self, family: Family) -> Option<Reason> {
        let obstacle = self.policy(|scope| *scope == Scope::Family(family))?;
        obstacle.flows.then_some(obstacle.reason)
    }

    /// Whether a policy touches nothing, since the tables repeat its rules.
    pub fn is_applied(&self, policy: &Policy) -> bool {
        let Scope::Family(family) = policy.scope else { return false };
        policy.rules.is_some() && policy.rules == self.applied[family as usize]
    }

    /// Whether there are rules of a family that the tables do not repeat (yet).
    pub fn has_unapplied_rules(&self, family: Family) -> bool {
        let of_rules = |policy: &&Policy| policy.reason == Reason::PolicyRule && policy.scope == Scope::Family(family);
        self.policies().filter(of_rules).any(|policy| !self.is_applied(policy))
    }

    /// The rules of a family, if they are not the usual ones and are known; None while there are two descriptions.
    pub fn rules_of(&self, family: Family) -> Option<Option<&Vec<Rule>>> {
        let told = self.policies.keys().filter(|policy| policy.scope == Scope::Family(family));
        let mut told = told.filter_map(|policy| policy.rules.as_ref());
        match (told.next(), told.next()) {
            (first, None) => Some(first),
            _ => None,
        }
    }

    /// Notes that the tables repeat these rules; false if that is known.
    pub fn set_applied(&mut self, family: Family, rules: Option<Vec<Rule>>) -> bool {
        let changed = self.applied[family as usize] != rules;
        self.applied[family as usize] = rules;
        changed
    }

    /// Has the rules worked in again.
    pub fn rules_changed(&mut self) {
        self.changes.rules = true;
    }

    /// Whether what is about an interface is about the packets of a port.
    pub fn is_about(&self, on: u32, port: u32) -> bool {
        on == port || self.chain(port).is_some_and(|chain| is_about(&chain, on))
    }

    /// The same for the policies for all packets of a port in a direction.
    fn port_policy(&self, chain: &[&Port], applies: impl Fn(&Scope) -> bool) -> Option<Obstacle> {
        let (touching, plain) = (self.policies().filter(|policy| applies(&policy.scope)), chain.len() == 1);
        let whole = touching.filter(|policy| !(plain && self.is_filtered(policy)));
        sum(whole.map(|policy| self.obstacle(policy)).chain(unsupported(chain).map(Obstacle::new)))
    }

    fn obstacle(&self, policy: &Policy) -> Obstacle {
        Obstacle { reason: policy.reason, flows: self.flows(policy).is_some() }
    }

    /// Why packets of a family that come in by a port are exceptions.
    pub fn ingress_policy(&self, chain: &[&Port], family: Family) -> Option<Obstacle> {
        let enters = |scope: &Scope| matches!(scope, Scope::Ingress(on, of) if touches(chain, *on, *of, family));
        sum(self.port_policy(chain, enters).into_iter().chain(numbered(chain, |tunnel| tunnel.input)))
    }

    /// Why packets of a family that leave by a port are exceptions, connections or not.
    pub fn egress_policy(&self, chain: &[&Port], family: Family) -> Option<Reason> {
        let leaves = |scope: &Scope| matches!(scope, Scope::Egress(on, of) if touches(chain, *on, *of, family));
        let obstacles = self.port_policy(chain, leaves).into_iter().chain(numbered(chain, |tunnel| tunnel.output));
        sum(obstacles).map(|obstacle| obstacle.reason)
    }

    /// Addresses for the filter of IPv4 sources: this host's own, and all to which there is no unicast route. Linux
    /// refuses the latter as soon as there ever was an `ip route add local`, which nothing tells afterwards
    /// (fib_has_custom_local_routes in fib_validate_source, net/ipv4/fib_frontend.c).
    pub fn suspect_sources(&self) -> impl Iterator<Item = Ipv4Addr> {
        // So many consecutive addresses reach every bit of the filter.
        const ENOUGH: u32 = 1 << 16;
        let own = self.addresses.keys().filter_map(|address| match address.address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        let refused = self.refused_sources.iter().filter_map(|prefix| match prefix.address() {
            // The loopback net is martian as a source unless route_localnet allows it.
            IpAddr::V4(first) if !first.is_loopback() => Some((first, prefix.prefix_len())),
            _ => None,
        });
        let refused = refused.map(|(first, len)| (first, 1u32.checked_shl(32 - u32::from(len)).unwrap_or(u32::MAX)));
        // If they are many, all are suspect; to list them would take longer than it is worth.
        let total = refused.clone().fold(0, |sum: u32, (_, count)| sum.saturating_add(count));
        let all = (total >= ENOUGH).then_some((Ipv4Addr::UNSPECIFIED, ENOUGH));
        let listed = refused.filter(move |_| all.is_none()).chain(all);
        own.chain(listed.flat_map(|(first, count)| {
            (0..count).map(move |offset| Ipv4Addr::from_bits(first.to_bits().wrapping_add(offset)))
        }))
    }

    /// Whether an interface has an IPv4 address.
    pub fn has_ipv4(&self, ifindex: u32) -> bool {
        self.addresses.keys().any(|address| address.ifindex == ifindex && address.address.is_ipv4())
    }

    /// Where a via leads now.
    pub fn resolve(&self, via: &ViaKey) -> Resolved {
        let hops = match &via.target {
            Target::Hops(hops) => Ok(hops.to_vec()),
            Target::Object(id) => self.object_hops(*id),
        };
        let hops = match hops {
            Ok(hops) if !hops.is_empty() => hops,
            Ok(_) => return Resolved::Exception(Reason::UnsupportedRoute),
            Err(reason) => return Resolved::Exception(reason),
        };
        // A connected route with an MTU of its own would give its hosts another MTU than the port's.
        let plain = |hop: &Hop| hop.ifindex != 0 && (hop.gateway.is_some() || via.mtu == 0);
        if !hops.iter().all(plain) {
            return Resolved::Exception(Reason::UnsupportedRoute);
        }
        Resolved::Hops(hops.into_iter().map(|hop| (hop, self.is_live(&hop, via.family))).collect())
    }

    fn object_hops(&self, id: u32) -> Result<Vec<Hop>, Reason> {
        match &self.objects.get(&id).ok_or(Reason::NoRoute)?.value.kind {
            NexthopObjectKind::Hop(hop) => Ok(vec![*hop]),
            NexthopObjectKind::Blackhole => Err(Reason::NonUnicastRoute),
            NexthopObjectKind::Unsupported => Err(Reason::UnsupportedRoute),
            NexthopObjectKind::Group(members) => members
                .iter()
                .map(|&(member, weight)| match self.objects.get(&member).ok_or(Reason::NoRoute)?.value.kind {
                    NexthopObjectKind::Hop(hop) => Ok(Hop { weight, ..hop }),
                    _ => Err(Reason::UnsupportedRoute),
                })
                .collect(),
        }
    }

    /// Whether a look-up in Linux considers the next hop (fib_table_lookup, net/ipv4/fib_trie.c; rt6_score_route,
    /// net/ipv6/route.c).
    fn is_live(&self, hop: &Hop, family: Family) -> bool {
        hop.flags & RTNH_F_DEAD == 0 && self.carries(hop.ifindex, family)
    }

    /// Whether look-ups consider next hops by an interface at all. Link down is read from the port: Linux sets and
    /// clears the flag of the next hop without a message.
    pub fn carries(&self, ifindex: u32, family: Family) -> bool {
        let down = |port: &Port| !port.up || !port.carrier && port.family[family as usize].ignore_linkdown;
        !self.ports.get(&ifindex).is_some_and(|port| down(&port.value))
    }

    /// Whether a via is, or is a group that holds, one of these nexthop objects.
    pub fn is_over(&self, via: &ViaKey, objects: &HashSet<u32>) -> bool {
        let Target::Object(id) = via.target else { return false };
        let members = match self.objects.get(&id).map(|object| &object.value.kind) {
            Some(NexthopObjectKind::Group(members)) => members.as_slice(),
            _ => &[],
        };
        objects.contains(&id) || members.iter().any(|(member, _)| objects.contains(member))
    }

    /// What decides over a prefix without rules, and its level: everything beneath it of a lower one (table local before
    /// main) is hidden. None if there is no route.
    pub fn choose(&self, prefix: Prefix) -> Option<(Choice, u8)> {
        let of = |table, level| Some((self.choose_of(table, prefix)?, level));
        // Linux comes to table default only if main has no answer at all.
        let last = || self.routes.candidates_in(DEFAULT, prefix).next();
        let default = || last().map(|_| (Choice::Exception(Reason::UnsupportedRoute), 0));
        of(LOCAL, 1).or_else(|| of(MAIN, 0)).or_else(default)
    }

    /// The same where these steps are taken.
    pub fn choose_by(&self, steps: &Steps, prefix: Prefix) -> Option<(Choice, u8)> {
        let by = |step: &Step| match step {
            Step::Refuse(whole) => (*whole == prefix).then_some(Choice::Exception(Reason::PolicyRule)),
            Step::Table(table, Some(beyond)) if prefix.prefix_len() <= *beyond => {
                self.choose_of(*table, prefix).filter(|choice| self.is_refusal(*choice))
            }
            Step::Table(table, _) => self.choose_of(*table, prefix),
        };
        steps.iter().zip((0..steps.len() as u8).rev()).find_map(|(step, level)| Some((by(step)?, level)))
    }

    /// Whether a look-up that ends here may fail: such a route counts, however short (fib_rules_lookup suppresses only what was
    /// found).
    fn is_refusal(&self, choice: Choice) -> bool {
        match choice {
            Choice::Exception(_) => true,
            Choice::Via(id) => self.vias.get(id).is_none_or(|via| matches!(self.resolve(via), Resolved::Exception(_))),
        }
    }

    /// What decides over a prefix in a table.
    fn choose_of(&self, table: u32, prefix: Prefix) -> Option<Choice> {
        let candidates = || self.routes.candidates_in(table, prefix);
        let (_, first) = candidates().next()?;
        // Nothing in table local is forwarded.
        if table == LOCAL {
            return Some(Choice::Exception(kind_reason(first.kind).unwrap_or(Reason::UnsupportedRoute)));
        }
        if candidates().any(|(key, _)| key.tos != 0) {
            return Some(Choice::Exception(Reason::UnsupportedRoute));
        }
        for (_, candidate) in candidates() {
            if candidate.unsupported {
                return Some(Choice::Exception(Reason::UnsupportedRoute));
            }
            if let Some(reason) = kind_reason(candidate.kind) {
                return Some(Choice::Exception(reason));
            }
            let via = self.vias.get(candidate.via)?;
            if !matches!(self.resolve(via), Resolved::Hops(hops) if hops.iter().all(|(_, live)| !live)) {
                return Some(Choice::Via(candidate.via));
            }
        }
        // All are dead. Linux goes on with a shorter prefix; here the first stands, and its next hops say that they are
        // down, so that a link that fails changes next hops instead of all its routes.
        Some(Choice::Via(first.via))
    }
}

/// Why routes of this kind are exceptions; None for unicast.
fn kind_reason(kind: u8) -> Option<Reason> {
    match kind {
        kind::UNICAST => None,
        kind::LOCAL | kind::ANYCAST => Some(Reason::LocalDestination),
        kind::BROADCAST => Some(Reason::Broadcast),
        kind::MULTICAST => Some(Reason::Multicast),
        _ => Some(Reason::NonUnicastRoute),
    }
}

/// Whether an address is one that a tunnel over it can be between: link-local ones are told apart by interface.
fn is_host(address: IpAddr) -> bool {
    let other = match address {
        IpAddr::V4(address) => address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local() || address.to_ipv4_mapped().is_some(),
    };
    !(other || address.is_unspecified() || address.is_multicast() || address.is_loopback())
}

/// Whether Linux might take a packet of the one tunnel for one of the other (ip_tunnel_lookup, net/ipv4/ip_tunnel.c;
/// ip6gre_tunnel_lookup, net/ipv6/ip6_gre.c): one for any address goes before if it is bound to the interface that the packet
/// came in by, and so may one for the same addresses.
fn is_rival(own: &Tunnel, other: &Port) -> bool {
    let PortKind::Tunnel(other) = other.kind else { return false };
    if other.family() != own.family() {
        return false;
    }
    let (same_local, same_remote) = (other.local == own.local, other.remote == own.remote);
    other.input.key.unwrap_or(0) == own.input.key.unwrap_or(0)
        && (same_local || other.local.is_unspecified())
        && (same_remote || other.remote.is_unspecified())
        && other.link != own.link
        && (other.link != 0 || same_local && same_remote)
}

/// What several obstacles come to: connections pass if they pass each of them. The reason that counts is the lowest, of
/// those that nothing passes if there are any.
fn sum(obstacles: impl Iterator<Item = Obstacle>) -> Option<Obstacle> {
    obstacles.min_by_key(|obstacle| (obstacle.flows, obstacle.reason))
}

/// The interface that a scope is about.
fn interface(scope: Scope) -> Option<u32> {
    match scope {
        Scope::Ingress(ifindex, _) | Scope::Egress(ifindex, _) => Some(ifindex),
        Scope::Family(_) | Scope::Local(_) => None,
    }
}

fn touches(chain: &[&Port], on: u32, of: Option<Family>, family: Family) -> bool {
    of.is_none_or(|of| of == family) && is_about(chain, on)
}

/// Whether what is about an interface is about a port's packets: they pass what is underneath and, in Linux, the VRF.
fn is_about(chain: &[&Port], on: u32) -> bool {
    let in_vrf = chain.first().and_then(|port| port.vrf.as_ref()).is_some_and(|vrf| vrf.ifindex == on);
    in_vrf || chain.iter().any(|port| port.ifindex == on)
}

fn unsupported(chain: &[&Port]) -> Option<Reason> {
    chain.iter().any(|port| port.unsupported.is_some()).then_some(Reason::PolicySysctl)
}

/// Whether a tunnel's packets bear numbers: what is to come is in Linux's memory, where its own packets go on from it. (The
/// watcher of tunnels tells that as a policy, too, for people.)
fn numbered(chain: &[&Port], direction: impl Fn(&Tunnel) -> GreOptions) -> Option<Obstacle> {
    let numbered = |port: &&Port| matches!(&port.kind, PortKind::Tunnel(tunnel) if direction(tunnel).sequence);
    chain.iter().any(numbered).then_some(Obstacle::new(Reason::TunnelSequence))
}
