//! What Linux says and the operator asks for, and how it changes: each change concerns one object, or routes of which none
//! covers another. So whatever a writer has done of a change, a packet goes as before it, or as after it, or to Linux.

use super::super::flows::flow;
use super::super::model::{HOSTS, NETWORKS};
use super::super::*;
use crate::mappings::Mapping;
use std::collections::BTreeMap;
use towpath_tables::backing::Backing;
use towpath_tables::grace::Grace;
use towpath_tables::mix::Random;

const TUNNEL: u32 = 7;
/// Routes of a burst lie in here, one to a network of 16 addresses; so many of them.
const POOL: u32 = 512;
const POOL_BASE: u32 = 0x6440_0000;
pub const COVER: &str = "100.64.0.0/10";

/// One change.
#[derive(Clone, Debug)]
pub enum Step {
    Messages(Vec<Message>),
    Serve(u32, bool),
    Map(u8, bool),
}

/// What there is, by class and key.
#[derive(Clone, Default)]
pub struct World {
    objects: BTreeMap<(u8, String), Message>,
    served: BTreeSet<u32>,
    mapped: BTreeSet<u8>,
}

pub fn pool(which: u32) -> std::net::Ipv4Addr {
    // Scattered, so that many nodes of the tables have some.
    (POOL_BASE + ((which * 0x2_3450) & 0x003f_fff0)).into()
}

fn pool_route(which: u32, way: u32) -> Route {
    let hops = [hop(1, Some(HOSTS[0][2])), hop(2, Some(HOSTS[0][3])), hop(2, None)];
    route(&format!("{}/28", pool(which)), &hops[way as usize..=way as usize])
}

/// What names an object, if this is about one, and whether it is gone.
fn key_of(message: &Message) -> ((u8, String), bool) {
    let key = |class: u8, key: &dyn std::fmt::Debug| (class, format!("{key:?}"));
    match message {
        Message::Port(port) => (key(0, &port.ifindex), false),
        Message::PortDelete(ifindex) => (key(0, ifindex), true),
        Message::Address(address) => (key(1, address), false),
        Message::AddressDelete(address) => (key(1, address), true),
        Message::Neighbour(neighbour) => (key(2, &neighbour.key), false),
        Message::NeighbourDelete(neighbour) => (key(2, neighbour), true),
        Message::Nexthop(object) => (key(3, &object.id), false),
        Message::NexthopDelete(id) => (key(3, id), true),
        Message::Route(route) => (key(4, &route.key), false),
        Message::RouteDelete(route) => (key(4, route), true),
        Message::Flow(connection) => (key(5, &connection.original), false),
        Message::FlowDelete(original) => (key(5, original), true),
        Message::Policy(_) => (key(6, &()), false),
        Message::SnapshotBegin(_) | Message::SnapshotEnd(_) => (key(6, &()), true),
        other => panic!("{other:?} is no part of a history"),
    }
}

pub fn mapping(n: u8) -> Mapping {
    let of = |net: u8| Prefix::new([net, 0, n, 0].into(), 24).expect("a prefix");
    Mapping { ifindex: 2, inside: of(50), outside: of(60), ports: None }
}

fn pick<T: Copy>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len() as u32) as usize]
}

fn tunnel(remote: u8) -> Port {
    let tunnel = Tunnel {
        local: ip("192.0.2.2"),
        remote: [10, 1, 2, remote].into(),
        link: 0,
        input: GreOptions { key: Some(u32::from(remote)), checksum: remote == 1, sequence: false },
        output: GreOptions { key: Some(u32::from(remote)), checksum: remote == 2, sequence: remote == 3 },
        ttl: remote,
        class: Some(0),
        label: Some(0),
        limit: None,
    };
    Port { kind: PortKind::Tunnel(tunnel), mac: None, mtu: 1476, ..port(TUNNEL) }
}

fn a_port(random: &mut Random) -> Message {
    let ifindex = 1 + random.below(7);
    // A port's mappings would go with it.
    if ifindex > 2 && random.below(12) == 0 {
        return Message::PortDelete(ifindex);
    }
    let mut port = match ifindex {
        4 => vlan(4, 1, 0x8100, 4),
        5 => vlan(5, 4, 0x8100, 5),
        6 => vlan(6, 2, 0x8100, 6 + random.below(2) as u16),
        TUNNEL => tunnel(random.below(6) as u8),
        _ => port(ifindex),
    };
    match random.below(6) {
        0 => port.mtu -= 100,
        1 => port.up = false,
        2 => port.rp_filter = 1 + random.below(2) as u8,
        3 => port.unsupported = Some("test".into()),
        _ => {}
    }
    Message::Port(port)
}

fn a_hop(random: &mut Random, family: usize) -> Hop {
    let gateway = if random.below(3) > 0 { Some(pick(random, &HOSTS[family])) } else { None };
    Hop { weight: 1 + random.below(3) as u16, ..hop(1 + random.below(7), gateway) }
}

fn a_message(random: &mut Random) -> Message {
    let family = random.below(2) as usize;
    let object = |random: &mut Random| 1 + random.below(4) + 10 * family as u32;
    let network = pick(random, &NETWORKS[family]);
    let host = ip(pick(random, &HOSTS[family]));
    match random.below(12) {
        0..=2 => {
            let via = match random.below(4) {
                0 => Via::Object(object(random)),
                hops => Via::Hops((0..hops).map(|_| a_hop(random, family)).collect()),
            };
            Message::Route(Route { via, kind: if random.below(9) == 0 { 6 } else { 1 }, ..route(network, &[]) })
        }
        3 => Message::RouteDelete(key(network)),
        4 => a_port(random),
        5 => {
            let kind = match random.below(3) {
                0 => NexthopObjectKind::Group((0..3).map(|_| (object(random), 1 + random.below(3) as u16)).collect()),
                _ => NexthopObjectKind::Hop(a_hop(random, family)),
            };
            Message::Nexthop(NexthopObject { id: object(random), kind })
        }
        6 => Message::NexthopDelete(object(random)),
        7 => {
            let key = NeighbourKey { ifindex: 1 + random.below(5), address: host };
            if random.below(4) == 0 { Message::NeighbourDelete(key) } else { a_neighbour(random, key) }
        }
        8 => {
            let address = Address { ifindex: 1 + random.below(2), address: host, prefix_len: 24 };
            if random.below(2) == 0 { Message::Address(address) } else { Message::AddressDelete(address) }
        }
        _ => {
            let one = flow(10 + random.below(4) as u8, random.below(16) as u16);
            if random.below(3) > 0 { Message::Flow(one) } else { Message::FlowDelete(one.original) }
        }
    }
}

fn a_neighbour(random: &mut Random, key: NeighbourKey) -> Message {
    Message::Neighbour(Neighbour { key, lladdr: Some(mac(0x80 + random.below(4) as u8)), state: 2 })
}

/// Change number `number`. Half of them change the same records again and again: that is where most of a writer's time is
/// then spent.
pub fn step(number: u32) -> Step {
    let random = &mut Random(number.into());
    let random = &mut Random(random.bits());
    let one = |message| Step::Messages(vec![message]);
    match number / 64 % 4 {
        0 => {
            let key = NeighbourKey { ifindex: 2, address: ip(HOSTS[0][3]) };
            return one(a_neighbour(random, key));
        }
        1 => return one(Message::Port(tunnel(random.below(6) as u8))),
        _ => {}
    }
    match random.below(40) {
        0..=2 => {
            let (first, way) = (random.below(POOL), random.below(4));
            let some = (first..first + 1 + random.below(200)).map(|which| pool_route(which % POOL, way % 3));
            let change = |route: Route| if way == 3 { Message::RouteDelete(route.key) } else { Message::Route(route) };
            Step::Messages(some.map(change).collect())
        }
        3 => Step::Serve(3, random.below(3) > 0),
        4 | 5 => Step::Map(random.below(6) as u8, random.below(2) == 0),
        6 => {
            let source = Snapshot::Policies(PolicySource::Tc);
            let scope = match random.below(3) {
                0 => Scope::Family(Family::V6),
                1 => Scope::Egress(2, None),
                _ => Scope::Ingress(1, Some(Family::V4)),
            };
            let all = (0..random.below(2)).map(|_| policy(scope, Reason::PolicyTc));
            let begin = std::iter::once(Message::SnapshotBegin(source));
            Step::Messages(begin.chain(all).chain([Message::SnapshotEnd(source)]).collect())
        }
        _ => one(a_message(random)),
    }
}

impl World {
    /// Two ports, a tunnel, and a route that covers the pool's and stays.
    pub fn new() -> Self {
        let mut world = Self { served: [1, 2].into(), ..Self::default() };
        let ports = [port(1), port(2), port(3), vlan(4, 1, 0x8100, 4), tunnel(3)].map(Message::Port);
        let cover = Message::Route(route(COVER, &[hop(3, None)]));
        let inside = Message::Route(route("10.77.0.0/16", &[hop(TUNNEL, None)]));
        let neighbour = neighbour(2, HOSTS[0][3], Some(0x80));
        let step = Step::Messages(ports.into_iter().chain([cover, inside, neighbour]).collect());
        world.apply(&step);
        world
    }

    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Messages(messages) => {
                for message in messages {
                    let (key, gone) = key_of(message);
                    if gone {
                        self.objects.remove(&key)
                    } else {
                        self.objects.insert(key, message.clone())
                    };
                }
                if let [Message::SnapshotBegin(_), Message::Policy(policy), _] = &messages[..] {
                    let message = Message::Policy(policy.clone());
                    self.objects.insert(key_of(&message).0, message);
                }
            }
            Step::Serve(ifindex, true) => drop(self.served.insert(*ifindex)),
            Step::Serve(ifindex, false) => drop(self.served.remove(ifindex)),
            Step::Map(n, true) => drop(self.mapped.insert(*n)),
            Step::Map(n, false) => drop(self.mapped.remove(n)),
        }
    }

    pub fn flows(&self) -> BTreeSet<towpath_tables::Connection> {
        let flow = |message: &Message| if let Message::Flow(connection) = message { Some(*connection) } else { None };
        self.objects.values().filter_map(flow).collect()
    }

    pub fn mappings(&self) -> BTreeSet<Mapping> {
        self.mapped.iter().copied().map(mapping).collect()
    }

    /// A daemon that starts with these tables and learns everything.
    pub fn daemon<B: Backing, G: Grace>(&self, tables: TableWriter<B, G>) -> Fpm<B, G> {
        let mut fpm = Fpm::new(tables, all_classes());
        self.served.iter().for_each(|ifindex| fpm.serve(*ifindex, true));
        let classes = || all_classes().chain([Snapshot::Flows]);
        classes().for_each(|class| fpm.apply(Message::SnapshotBegin(class)));
        self.objects.values().for_each(|message| fpm.apply(message.clone()));
        classes().for_each(|class| fpm.apply(Message::SnapshotEnd(class)));
        fpm.publish();
        // The operator looks whether what was asked for is there.
        let there: BTreeSet<_> = fpm.mappings().map(|(mapping, _)| mapping).collect();
        let wanted = self.mappings();
        there.difference(&wanted).for_each(|mapping| fpm.remove_mapping(mapping).expect("it is there"));
        wanted.difference(&there).for_each(|mapping| fpm.add_mapping(*mapping).expect("it is sound"));
        fpm.publish();
        fpm
    }
}

/// Has a daemon do what changed.
pub fn follow<B: Backing, G: Grace>(fpm: &mut Fpm<B, G>, step: &Step) {
    match step {
        Step::Messages(messages) => messages.iter().for_each(|message| fpm.apply(message.clone())),
        Step::Serve(ifindex, on) => fpm.serve(*ifindex, *on),
        // One that is there, or is not, already is refused.
        Step::Map(n, true) => drop(fpm.add_mapping(mapping(*n))),
        Step::Map(n, false) => drop(fpm.remove_mapping(&mapping(*n))),
    }
    fpm.publish();
}
