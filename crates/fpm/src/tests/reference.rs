//! The dumb reference: it keeps plain lists of what was said and works out from scratch where a packet goes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use towpath_fpc::*;
use towpath_tables::Reason;
use towpath_tables::record::Family;

/// What becomes of a packet.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    Exception(Reason),
    Forward { port: u32, device: u32, mtu: u32, header: Vec<u8> },
    Tunnel { port: u32, mtu: u32 },
}

#[derive(Default)]
pub struct Reference {
    pub served: BTreeSet<u32>,
    ports: BTreeMap<u32, Port>,
    neighbours: BTreeMap<NeighbourKey, Neighbour>,
    routes: BTreeMap<RouteKey, Route>,
    objects: BTreeMap<u32, NexthopObject>,
    policies: BTreeSet<Policy>,
}

fn v4(address: &IpAddr) -> bool {
    address.is_ipv4()
}

fn covers(prefix: &Prefix, address: IpAddr) -> bool {
    Prefix::new(address, prefix.prefix_len()) == Some(*prefix)
}

impl Reference {
    pub fn apply(&mut self, message: &Message) {
        match message.clone() {
            Message::Port(port) => drop(self.ports.insert(port.ifindex, port)),
            Message::PortDelete(ifindex) => drop(self.ports.remove(&ifindex)),
            Message::Neighbour(neighbour) => drop(self.neighbours.insert(neighbour.key, neighbour)),
            Message::NeighbourDelete(key) => drop(self.neighbours.remove(&key)),
            Message::Route(route) => drop(self.routes.insert(route.key, route)),
            Message::RouteDelete(key) => drop(self.routes.remove(&key)),
            Message::Nexthop(object) => drop(self.objects.insert(object.id, object)),
            Message::NexthopDelete(id) => drop(self.objects.remove(&id)),
            Message::Policy(policy) => drop(self.policies.insert(policy)),
            _ => {}
        }
    }

    pub fn forget(&mut self, class: Snapshot) {
        match class {
            Snapshot::Ports => self.ports.clear(),
            Snapshot::Neighbours(family) => self.neighbours.retain(|key, _| v4(&key.address) != (family == Family::V4)),
            Snapshot::Routes(family) => self.routes.retain(|key, _| key.prefix.family() != family),
            Snapshot::Nexthops => self.objects.clear(),
            Snapshot::Policies(source) => self.policies.retain(|policy| policy.source != source),
            Snapshot::Addresses(_) | Snapshot::Flows => {}
        }
    }

    pub fn outcomes(&self, address: IpAddr) -> BTreeSet<Outcome> {
        let exception = |reason| BTreeSet::from([Outcome::Exception(reason)]);
        let longest = |tables: &[u32]| {
            let covering =
                self.routes.values().filter(|r| tables.contains(&r.key.table) && covers(&r.key.prefix, address));
            covering.max_by_key(|route| route.key.prefix.prefix_len()).map(|route| route.key.prefix)
        };
        let of = |table: u32, prefix: Prefix| {
            let mut of: Vec<_> =
                self.routes.values().filter(|r| r.key.table == table && r.key.prefix == prefix).collect();
            of.sort_by_key(|route| (route.key.tos, route.key.priority));
            of
        };
        if let Some(prefix) = longest(&[255]) {
            return exception(by_kind(of(255, prefix)[0].kind).unwrap_or(Reason::UnsupportedRoute));
        }
        let Some(prefix) = longest(&[254, 253]) else { return exception(Reason::NoRoute) };
        let candidates = of(254, prefix);
        if candidates.is_empty() || candidates.iter().any(|route| route.key.tos != 0) {
            return exception(Reason::UnsupportedRoute);
        }
        let usable = candidates.iter().find(|route| {
            route.unsupported
                || route.kind != 1
                || match self.hops(route) {
                    Ok(hops) => hops.iter().any(|hop| self.live(hop, address)),
                    Err(_) => true,
                }
        });
        let route = usable.unwrap_or(&candidates[0]);
        if route.unsupported {
            return exception(Reason::UnsupportedRoute);
        }
        if let Some(reason) = by_kind(route.kind) {
            return exception(reason);
        }
        match self.hops(route) {
            Err(reason) => exception(reason),
            Ok(hops) if hops.len() == 1 && hops[0].flags & 1 != 0 => match self.ports.get(&hops[0].ifindex) {
                Some(_) if !self.live(&Hop { flags: 0, ..hops[0] }, address) => {
                    [self.send(&hops[0], route.mtu, address, true)].into()
                }
                _ => exception(Reason::NexthopDown),
            },
            Ok(hops) if hops.len() == 1 => [self.send(&hops[0], route.mtu, address, true)].into(),
            Ok(hops) => {
                let live: BTreeSet<_> = hops
                    .iter()
                    .filter(|hop| self.live(hop, address))
                    .map(|hop| self.send(hop, route.mtu, address, false))
                    .collect();
                if live.is_empty() { exception(Reason::NexthopDown) } else { live }
            }
        }
    }

    fn hops(&self, route: &Route) -> Result<Vec<Hop>, Reason> {
        let single = |id: &u32| self.objects.get(id).map(|object| object.kind.clone()).ok_or(Reason::NoRoute);
        let hops = match &route.via {
            Via::Hops(hops) => hops.clone(),
            Via::Object(id) => match single(id)? {
                NexthopObjectKind::Hop(hop) => vec![hop],
                NexthopObjectKind::Blackhole => return Err(Reason::NonUnicastRoute),
                NexthopObjectKind::Unsupported => return Err(Reason::UnsupportedRoute),
                NexthopObjectKind::Group(ids) => {
                    let mut hops = Vec::new();
                    for (id, weight) in ids {
                        match single(&id)? {
                            NexthopObjectKind::Hop(hop) => hops.push(Hop { weight, ..hop }),
                            _ => return Err(Reason::UnsupportedRoute),
                        }
                    }
                    hops
                }
            },
        };
        let odd = |hop: &Hop| hop.ifindex == 0 || hop.gateway.is_none() && route.mtu != 0;
        if hops.is_empty() || hops.iter().any(odd) { Err(Reason::UnsupportedRoute) } else { Ok(hops) }
    }

    fn live(&self, hop: &Hop, packet: IpAddr) -> bool {
        let ignore = |port: &Port| port.family[usize::from(!v4(&packet))].ignore_linkdown;
        let gone = |port: &Port| !port.up || (!port.carrier && ignore(port));
        hop.flags & 1 == 0 && !self.ports.get(&hop.ifindex).is_some_and(gone)
    }

    fn chain(&self, ifindex: u32) -> Option<Vec<&Port>> {
        let port = self.ports.get(&ifindex)?;
        match port.kind {
            PortKind::Ethernet | PortKind::Virtual => self.served.contains(&ifindex).then(|| vec![port]),
            PortKind::Vlan { lower, .. } => {
                let below = self.chain(lower)?;
                (below.len() < 3).then(|| [vec![port], below].concat())
            }
            _ => None,
        }
    }

    /// `alone`: the only next hop, so that neighbours of a connected network are reached by their own addresses.
    fn send(&self, hop: &Hop, mtu: u32, packet: IpAddr, alone: bool) -> Outcome {
        let Some(chain) = self.chain(hop.ifindex) else { return Outcome::Exception(Reason::EgressNotServed) };
        let lladdr =
            |address| self.neighbours.get(&NeighbourKey { ifindex: hop.ifindex, address }).and_then(|n| n.lladdr);
        let lladdr = hop.gateway.or(alone.then_some(packet)).and_then(lladdr);
        let mut reasons: Vec<Reason> = Vec::new();
        let works = chain.iter().all(|port| port.up && port.carrier);
        reasons.extend((lladdr.is_none() && works).then_some(Reason::NoNeighbour));
        for port in &chain {
            reasons.extend((!port.up || !port.carrier).then_some(Reason::NexthopDown));
            reasons.extend((port.master != 0 || port.mac.is_none()).then_some(Reason::EgressNotServed));
            reasons.extend(port.unsupported.as_ref().map(|_| Reason::PolicySysctl));
            for policy in &self.policies {
                if let Scope::Egress(ifindex, family) = policy.scope
                    && ifindex == port.ifindex
                    && applies(family, packet)
                {
                    reasons.push(policy.reason);
                }
            }
        }
        if let Some(reason) = reasons.into_iter().min() {
            return Outcome::Exception(reason);
        }
        let mut header = [lladdr.unwrap(), chain[0].mac.unwrap()].concat();
        for port in chain.iter().rev() {
            if let PortKind::Vlan { protocol, id, .. } = port.kind {
                header.extend([protocol.to_be_bytes(), id.to_be_bytes()].concat());
            }
        }
        let mtu = if mtu == 0 { chain[0].mtu } else { chain[0].mtu.min(mtu) };
        // As a frame it must not be longer than a tagged one of the device's MTU.
        let mtu = mtu.min(chain.last().unwrap().mtu + 18 - (header.len() as u32 + 2));
        Outcome::Forward { port: hop.ifindex, device: chain.last().unwrap().ifindex, mtu, header }
    }
}

/// (Histories do not let packets of both families share a gateway; a policy on one would touch the other.)
fn applies(policy: Option<Family>, packet: IpAddr) -> bool {
    policy.is_none_or(|family| (family == Family::V4) == v4(&packet))
}

fn by_kind(kind: u8) -> Option<Reason> {
    Some(match kind {
        1 => return None,
        2 | 4 => Reason::LocalDestination,
        3 => Reason::Broadcast,
        5 => Reason::Multicast,
        _ => Reason::NonUnicastRoute,
    })
}
