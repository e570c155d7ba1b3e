//! Directed tests: each kind of change, and what the tables say after it. `model` compares long histories with a
//! reference that works everything out from scratch.

mod crash;
mod flows;
mod model;
mod reference;
mod rules;

use super::*;
use reference::Outcome;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use towpath_filter::{Filter, Layer, instruction};
use towpath_fpc::*;
use towpath_tables::backing::{HeapBacking, View, initial_elements};
use towpath_tables::grace::NoReaders;
use towpath_tables::lpm::{self, Kind};
use towpath_tables::nexthop::{Action, NexthopValue};
use towpath_tables::record::{
    NO_VLANS, TUNNEL_BUCKETS, TUNNEL_PROBES, TableId, port_flags, tunnel_bucket, tunnel_flags,
};
use towpath_tables::writer::MAIN_ROOT;
use towpath_tables::{Obstacle, Reason};

type TestFpm = Fpm<HeapBacking, NoReaders>;

fn new_tables() -> TableWriter<HeapBacking, NoReaders> {
    TableWriter::create(HeapBacking::new(initial_elements(1)), NoReaders).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn prefix(text: &str) -> Prefix {
    let (address, len) = text.split_once('/').unwrap();
    Prefix::new(ip(address), len.parse().unwrap()).unwrap()
}

fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

/// An interface that is up and forwards.
fn port(ifindex: u32) -> Port {
    let family = PortFamily { forwarding: true, ignore_linkdown: false };
    Port {
        ifindex,
        name: format!("eth{ifindex}"),
        mac: Some(mac(ifindex as u8)),
        mtu: 1500,
        kind: PortKind::Ethernet,
        up: true,
        carrier: true,
        master: 0,
        vrf: None,
        promiscuous: false,
        family: [family; 2],
        send_redirects: false,
        rp_filter: 0,
        route_localnet: false,
        unsupported: None,
    }
}

fn vlan(ifindex: u32, lower: u32, protocol: u16, id: u16) -> Port {
    Port { kind: PortKind::Vlan { lower, protocol, id }, mtu: 1496, ..port(ifindex) }
}

fn neighbour(ifindex: u32, address: &str, lladdr: Option<u8>) -> Message {
    let key = NeighbourKey { ifindex, address: ip(address) };
    Message::Neighbour(Neighbour { key, lladdr: lladdr.map(mac), state: 2 })
}

fn hop(ifindex: u32, gateway: Option<&str>) -> Hop {
    Hop { ifindex, gateway: gateway.map(ip), weight: 1, flags: 0 }
}

fn key(text: &str) -> RouteKey {
    RouteKey { table: 254, prefix: prefix(text), priority: 0, tos: 0 }
}

fn route(text: &str, hops: &[Hop]) -> Route {
    Route { key: key(text), kind: 1, protocol: 4, via: Via::Hops(hops.to_vec()), mtu: 0, unsupported: false }
}

fn policy(scope: Scope, reason: Reason) -> Message {
    Message::Policy(policy_of(scope, reason))
}

fn policy_of(scope: Scope, reason: Reason) -> Policy {
    Policy::new(PolicySource::Tc, scope, reason, "test")
}

/// Where the published tables send packets to an address, and how many of a group's buckets go each way.
fn shares(view: &View, address: IpAddr) -> BTreeMap<Outcome, usize> {
    shares_in(view, MAIN_ROOT[usize::from(address.is_ipv6())], address)
}

fn shares_in(view: &View, root: u32, address: IpAddr) -> BTreeMap<Outcome, usize> {
    let word = match address {
        IpAddr::V4(address) => lpm::lookup(view, root, &address.octets()),
        IpAddr::V6(address) => lpm::lookup(view, root, &address.octets()),
    };
    let indices: Vec<u32> = match word.unwrap().kind() {
        Kind::None => return [(Outcome::Exception(Reason::NoRoute), 1)].into(),
        Kind::Nexthop(index) => vec![index],
        Kind::Group(group) => view.groups()[group as usize].buckets.iter().map(|bucket| bucket.load()).collect(),
        Kind::Node(_) => panic!("a look-up ended at a node"),
    };
    let mut shares = BTreeMap::new();
    for index in indices {
        *shares.entry(outcome(view, index)).or_default() += 1;
    }
    shares
}

fn outcome(view: &View, index: u32) -> Outcome {
    let value = NexthopValue::read(&view.nexthops()[index as usize]).expect("a next hop in use");
    match value.action {
        Action::Exception(reason) => Outcome::Exception(reason),
        Action::Tunnel => Outcome::Tunnel { port: view.ports()[value.port as usize].ifindex.load(), mtu: value.mtu },
        Action::Forward(header) | Action::Mapped(header) => {
            let ifindex = |slot: u32| view.ports()[slot as usize].ifindex.load();
            Outcome::Forward {
                port: ifindex(value.port),
                device: ifindex(value.device),
                mtu: value.mtu,
                header: header.bytes().to_vec(),
            }
        }
    }
}

fn outcomes(fpm: &TestFpm, address: &str) -> BTreeSet<Outcome> {
    shares(&fpm.tables().view(), ip(address)).into_keys().collect()
}

fn forward(port: u8, device: u8, mtu: u32, to: u8, tags: &[u8]) -> Outcome {
    let header = [&mac(to), &mac(port), tags].concat();
    Outcome::Forward { port: port.into(), device: device.into(), mtu, header }
}

/// A manager that serves interfaces 1 and 2 and knows interface 3; 192.0.2.0/24 and 2001:db8:1::/64 are connected to
/// 1, 198.51.100.0/24 to 2; 203.0.113.0/24 and 2001:db8:9::/48 lie behind the neighbours .1 of those networks.
struct Fixture {
    fpm: TestFpm,
}

impl Fixture {
    fn new() -> Self {
        let mut fixture = Self::unfinished(new_tables());
        fixture.complete();
        fixture
    }

    fn unfinished(tables: TableWriter<HeapBacking, NoReaders>) -> Self {
        let mut fpm = Fpm::new(tables, all_classes());
        fpm.serve(1, true);
        fpm.serve(2, true);
        for class in all_classes() {
            fpm.apply(Message::SnapshotBegin(class));
        }
        for ifindex in 1..=3 {
            fpm.apply(Message::Port(port(ifindex)));
        }
        for route in [
            route("192.0.2.0/24", &[hop(1, None)]),
            route("198.51.100.0/24", &[hop(2, None)]),
            route("2001:db8:1::/64", &[hop(1, None)]),
            route("203.0.113.0/24", &[hop(2, Some("198.51.100.1"))]),
            route("2001:db8:9::/48", &[hop(1, Some("2001:db8:1::1"))]),
        ] {
            fpm.apply(Message::Route(route));
        }
        fpm.apply(neighbour(1, "192.0.2.1", Some(0x11)));
        fpm.apply(neighbour(2, "198.51.100.1", Some(0x21)));
        fpm.apply(neighbour(1, "2001:db8:1::1", Some(0x16)));
        Self { fpm }
    }

    fn complete(&mut self) {
        for class in all_classes() {
            self.fpm.apply(Message::SnapshotEnd(class));
        }
        self.fpm.publish().expect("everything was described");
    }

    /// Applies a batch.
    fn batch(&mut self, messages: impl IntoIterator<Item = Message>) -> &mut Self {
        messages.into_iter().for_each(|message| self.fpm.apply(message));
        self.fpm.publish();
        self
    }

    /// Replaces what is known of a class.
    fn snapshot(&mut self, class: Snapshot, messages: impl IntoIterator<Item = Message>) -> &mut Self {
        let begin = [Message::SnapshotBegin(class)].into_iter();
        self.batch(begin.chain(messages).chain([Message::SnapshotEnd(class)]))
    }

    #[track_caller]
    fn expect(&mut self, address: &str, expected: Outcome) -> &mut Self {
        assert_eq!(outcomes(&self.fpm, address), [expected].into(), "{address}");
        self
    }

    #[track_caller]
    fn exception(&mut self, address: &str, reason: Reason) -> &mut Self {
        self.expect(address, Outcome::Exception(reason))
    }

    fn flags(&self, ifindex: u32) -> u32 {
        let slot = self.fpm.ports().find(|port| port.port.ifindex == ifindex).unwrap().slot;
        self.fpm.tables().view().ports()[slot as usize].flags.load()
    }
}

const VIA_2: &str = "203.0.113.7";

fn via_2() -> Outcome {
    forward(2, 2, 1500, 0x21, &[])
}

#[test]
fn routes_gateways_and_hosts_are_forwarded() {
    Fixture::new()
        .expect(VIA_2, via_2())
        .expect("2001:db8:9::7", forward(1, 1, 1500, 0x16, &[]))
        .expect("192.0.2.1", forward(1, 1, 1500, 0x11, &[]))
        .exception("192.0.2.2", Reason::NoNeighbour)
        .exception("8.8.8.8", Reason::NoRoute);
}

#[test]
fn nothing_is_published_before_everything_was_described() {
    let mut fixture = Fixture::unfinished(new_tables());
    let (last, others) = {
        let mut all: Vec<_> = all_classes().collect();
        (all.pop().unwrap(), all)
    };
    for class in others {
        fixture.fpm.apply(Message::SnapshotEnd(class));
    }
    assert!(fixture.fpm.publish().is_none());
    assert_eq!(fixture.fpm.awaited().collect::<Vec<_>>(), [last]);
    fixture.exception(VIA_2, Reason::NoRoute);
    fixture.batch([Message::SnapshotEnd(last)]).expect(VIA_2, via_2());
    assert!(fixture.fpm.publish().is_none(), "nothing left to do");
}

#[test]
fn a_neighbour_comes_changes_and_goes() {
    Fixture::new()
        .batch([neighbour(2, "198.51.100.1", Some(0x22))])
        .expect(VIA_2, forward(2, 2, 1500, 0x22, &[]))
        .batch([neighbour(2, "198.51.100.1", None)])
        .exception(VIA_2, Reason::NoNeighbour)
        .exception("198.51.100.1", Reason::NoNeighbour)
        .batch([neighbour(2, "198.51.100.1", Some(0x21))])
        .expect(VIA_2, via_2())
        .expect("198.51.100.1", via_2())
        .batch([Message::NeighbourDelete(NeighbourKey { ifindex: 2, address: ip("198.51.100.1") })])
        .exception(VIA_2, Reason::NoNeighbour)
        .exception("198.51.100.1", Reason::NoNeighbour)
        // A group address is no station's.
        .batch([Message::Neighbour(Neighbour {
            key: NeighbourKey { ifindex: 2, address: ip("198.51.100.1") },
            lladdr: Some([1; 6]),
            state: 2,
        })])
        .exception(VIA_2, Reason::NoNeighbour);
}

#[test]
fn a_port_decides_over_what_leaves_by_it() {
    let changed = |change: fn(&mut Port)| {
        let mut port = port(2);
        change(&mut port);
        Message::Port(port)
    };
    let mut fixture = Fixture::new();
    assert_eq!(
        fixture.flags(2),
        port_flags::PRESENT | port_flags::READY | port_flags::FORWARD_V4 | port_flags::FORWARD_V6
    );
    fixture.batch([changed(|p| p.mtu = 1400)]).expect(VIA_2, forward(2, 2, 1400, 0x21, &[]));
    for (change, reason) in [
        (changed(|p| p.up = false), Reason::NexthopDown),
        (changed(|p| p.carrier = false), Reason::NexthopDown),
        (changed(|p| p.master = 9), Reason::EgressNotServed),
        (changed(|p| p.mac = None), Reason::EgressNotServed),
    ] {
        fixture.batch([change]).exception(VIA_2, reason);
        assert_eq!(fixture.flags(2) & port_flags::READY, 0);
        fixture.batch([changed(|_| ())]).expect(VIA_2, via_2());
        assert_ne!(fixture.flags(2) & port_flags::READY, 0);
    }
    fixture.batch([changed(|p| p.unsupported = Some("accept_local".into()))]).exception(VIA_2, Reason::PolicySysctl);
    let state = fixture.fpm.ports().find(|p| p.port.ifindex == 2).unwrap();
    assert_eq!(state.ingress_policy, [Some(Reason::PolicySysctl); 2]);
    let word = fixture.fpm.tables().view().ports()[state.slot as usize].ingress_policy[1].load();
    assert_eq!(word, 1 + Reason::PolicySysctl as u32);
    fixture.batch([changed(|p| {
        p.send_redirects = true;
        p.rp_filter = 2;
        p.route_localnet = true;
        p.family[1].forwarding = false;
        p.kind = PortKind::Virtual
    })]);
    let expected = port_flags::PRESENT
        | port_flags::READY
        | port_flags::FORWARD_V4
        | port_flags::REDIRECTS
        | port_flags::RP_STRICT
        | port_flags::ROUTE_LOCALNET
        | port_flags::PARTIAL_CSUM;
    assert_eq!(fixture.flags(2), expected, "a loose filter is strict on a port without addresses");
    let address = Address { ifindex: 2, address: ip("198.51.100.7"), prefix_len: 24 };
    fixture.batch([Message::Address(Address { address: ip("2001:db8::7"), ..address })]);
    assert_eq!(fixture.flags(2), expected, "IPv6 does not count");
    fixture.batch([Message::Address(address)]);
    let loose = expected & !port_flags::RP_STRICT | port_flags::RP_LOOSE;
    assert_eq!(fixture.flags(2), loose);
    fixture.batch([Message::AddressDelete(address)]);
    assert_eq!(fixture.flags(2), expected);
    fixture.batch([Message::Address(address)]);
    assert_eq!(fixture.flags(2), loose);
    fixture.batch([Message::PortDelete(2)]).exception(VIA_2, Reason::EgressNotServed);
    assert_eq!(fixture.fpm.ports().map(|p| p.port.ifindex).collect::<Vec<_>>(), [1]);
    assert_eq!(fixture.fpm.tables().ports().count(), 1);
    fixture.batch([changed(|_| ())]).expect(VIA_2, via_2());
}

#[test]
fn where_the_engine_sees_what_travels_beside_frames() {
    let mut fixture = Fixture::new();
    let vlan = PortKind::Vlan { lower: 2, protocol: 0x8100, id: 9 };
    fixture.batch([Message::Port(Port { ifindex: 9, kind: vlan, ..port(2) })]);
    let now = |fixture: &mut Fixture| {
        fixture.batch([]);
        [1, 2, 9].map(|ifindex| fixture.flags(ifindex) & port_flags::BESIDE != 0)
    };
    assert_eq!(now(&mut fixture), [false; 3]);
    fixture.fpm.set_beside(2, true);
    assert_eq!(now(&mut fixture), [false, true, true], "of a VLAN sub-interface too");
    fixture.fpm.set_beside(2, false);
    assert_eq!(now(&mut fixture), [false; 3]);
    fixture.fpm.set_beside(2, true);
    fixture.batch([Message::PortDelete(2), Message::Port(port(2))]);
    assert_eq!(now(&mut fixture), [false; 3], "another device of the same index");
}

#[test]
fn what_the_engine_cannot_transmit_is_left_to_linux() {
    let mut fixture = Fixture::new();
    let mut now = |transmit| {
        fixture.fpm.set_transmit(2, transmit);
        fixture.batch([]);
        (outcomes(&fixture.fpm, VIA_2), fixture.flags(2) & port_flags::SINGLE_BUFFER)
    };
    assert_eq!(now(Transmit::Nothing), ([Outcome::Exception(Reason::EgressNotServed)].into(), 0));
    assert_eq!(now(Transmit::SingleBuffer), ([via_2()].into(), port_flags::SINGLE_BUFFER));
    assert_eq!(now(Transmit::Any), ([via_2()].into(), 0));
}

#[test]
fn service_comes_and_goes() {
    let mut fixture = Fixture::new();
    fixture.batch([
        Message::Route(route("10.0.0.0/8", &[hop(3, Some("100.64.0.1"))])),
        neighbour(3, "100.64.0.1", Some(0x31)),
    ]);
    fixture.exception("10.1.1.1", Reason::EgressNotServed);
    fixture.fpm.serve(3, true);
    fixture.batch([]).expect("10.1.1.1", forward(3, 3, 1500, 0x31, &[]));
    fixture.fpm.serve(3, false);
    fixture.fpm.serve(1, false);
    fixture.batch([]).exception("10.1.1.1", Reason::EgressNotServed).exception("192.0.2.1", Reason::EgressNotServed);
}

#[test]
fn vlans_are_ports_over_their_ports() {
    let mut fixture = Fixture::new();
    fixture.batch([
        Message::Port(vlan(5, 4, 0x8100, 7)),
        Message::Port(vlan(4, 1, 0x88a8, 100)),
        Message::Route(route("10.4.0.0/16", &[hop(4, Some("10.4.0.1"))])),
        Message::Route(route("10.5.0.0/16", &[hop(5, Some("10.5.0.1"))])),
        neighbour(4, "10.4.0.1", Some(0x41)),
        neighbour(5, "10.5.0.1", Some(0x51)),
    ]);
    let (outer, both) = (&[0x88, 0xa8, 0, 100], &[0x88, 0xa8, 0, 100, 0x81, 0, 0, 7]);
    fixture.expect("10.4.9.9", forward(4, 1, 1496, 0x41, outer)).expect("10.5.9.9", forward(5, 1, 1496, 0x51, both));
    let view = fixture.fpm.tables().view();
    let slot_of: BTreeMap<u32, u32> = fixture.fpm.tables().ports().map(|(slot, ifindex)| (ifindex, slot)).collect();
    for (ifindex, lower, protocol, id) in [(4, 1, 0x88a8u32, 100usize), (5, 4, 0x8100, 7)] {
        let (record, below) = (&view.ports()[slot_of[&ifindex] as usize], &view.ports()[slot_of[&lower] as usize]);
        assert_eq!((record.lower.load(), record.vlan.load()), (slot_of[&lower], protocol << 16 | id as u32));
        assert_ne!(record.flags.load() & port_flags::VLAN, 0);
        let word = view.vlans()[below.vlans.load() as usize].slots[id / 2].load();
        assert_eq!(word >> (16 * (id % 2)) & 0xffff, 1 + slot_of[&ifindex]);
    }
    // What is underneath decides too: its MTU (the kernel redirects no frame with two tags of full size), its state, its
    // policies.
    fixture
        .batch([Message::Port(Port { mtu: 1498, ..port(1) })])
        .expect("10.4.9.9", forward(4, 1, 1496, 0x41, outer))
        .expect("10.5.9.9", forward(5, 1, 1494, 0x51, both));
    fixture.batch([Message::Port(Port { up: false, ..port(1) })]).exception("10.5.9.9", Reason::NexthopDown);
    fixture
        .batch([Message::Port(port(1)), policy(Scope::Egress(1, None), Reason::PolicyTc)])
        .exception("10.5.9.9", Reason::PolicyTc);
    fixture.snapshot(
        Snapshot::Policies(PolicySource::Tc),
        [policy(Scope::Ingress(4, Some(towpath_tables::record::Family::V6)), Reason::PolicyCapture)],
    );
    let ingress = |ifindex| fixture.fpm.ports().find(|p| p.port.ifindex == ifindex).unwrap().ingress_policy;
    assert_eq!(
        (ingress(1), ingress(4), ingress(5)),
        ([None; 2], [None, Some(Reason::PolicyCapture)], [None, Some(Reason::PolicyCapture)])
    );
    // A third tag, and a sub-interface without its port, are not ports.
    fixture.batch([
        Message::Port(vlan(6, 5, 0x8100, 9)),
        Message::Route(route("10.6.0.0/16", &[hop(6, Some("10.6.0.1"))])),
        neighbour(6, "10.6.0.1", Some(0x61)),
    ]);
    fixture.exception("10.6.9.9", Reason::EgressNotServed);
    fixture.batch([Message::PortDelete(4)]).exception("10.5.9.9", Reason::EgressNotServed);
    assert_eq!(fixture.fpm.tables().ports().count(), 2);
    assert_eq!(
        fixture.fpm.tables().view().ports()[slot_of[&1] as usize].vlans.load(),
        towpath_tables::record::NO_VLANS
    );
}

#[test]
fn ipv4_goes_through_an_ipv6_gateway() {
    Fixture::new()
        .batch([Message::Route(route("10.0.0.0/8", &[hop(1, Some("2001:db8:1::1"))]))])
        .expect("10.1.1.1", forward(1, 1, 1500, 0x16, &[]))
        // A policy on IPv4 that leaves counts from the first route of IPv4 on, and only until the last.
        .batch([policy(Scope::Egress(1, Some(Family::V4)), Reason::PolicyNetfilter)])
        .exception("10.1.1.1", Reason::PolicyNetfilter)
        .batch([Message::RouteDelete(key("10.0.0.0/8"))])
        .expect("2001:db8:9::7", forward(1, 1, 1500, 0x16, &[]));
}

#[test]
fn the_best_candidate_wins() {
    let at = |priority, tos, gateway| {
        Message::Route(Route {
            key: RouteKey { priority, tos, ..key("10.0.0.0/8") },
            ..route("10.0.0.0/8", &[hop(1, Some(gateway))])
        })
    };
    let gone = |priority, tos| Message::RouteDelete(RouteKey { priority, tos, ..key("10.0.0.0/8") });
    Fixture::new()
        .batch([neighbour(1, "192.0.2.2", Some(0x12)), at(20, 0, "192.0.2.2")])
        .expect("10.1.1.1", forward(1, 1, 1500, 0x12, &[]))
        .batch([at(10, 0, "192.0.2.1")])
        .expect("10.1.1.1", forward(1, 1, 1500, 0x11, &[]))
        .batch([at(30, 8, "192.0.2.1")])
        .exception("10.1.1.1", Reason::UnsupportedRoute)
        .batch([gone(30, 8), gone(10, 0)])
        .expect("10.1.1.1", forward(1, 1, 1500, 0x12, &[]))
        .batch([gone(20, 0)])
        .exception("10.1.1.1", Reason::NoRoute);
}

#[test]
fn kinds_tables_and_attributes_make_exceptions() {
    let kind = |table, kind| {
        let mut r = route("203.0.113.0/28", &[hop(1, None)]);
        r.key.table = table;
        r.kind = kind;
        Message::Route(r)
    };
    let gone = |table| Message::RouteDelete(RouteKey { table, ..key("203.0.113.0/28") });
    let mut fixture = Fixture::new();
    for (number, reason) in [
        (2, Reason::LocalDestination),
        (3, Reason::Broadcast),
        (4, Reason::LocalDestination),
        (5, Reason::Multicast),
        (6, Reason::NonUnicastRoute),
        (7, Reason::NonUnicastRoute),
        (8, Reason::NonUnicastRoute),
        (9, Reason::NonUnicastRoute),
        (99, Reason::NonUnicastRoute),
    ] {
        fixture
            .batch([kind(254, number)])
            .exception(VIA_2, reason)
            .batch([gone(254), kind(255, number)])
            .exception(VIA_2, reason);
        fixture.batch([gone(255)]).expect(VIA_2, via_2());
    }
    fixture.batch([kind(255, 1)]).exception(VIA_2, Reason::UnsupportedRoute).batch([gone(255)]);
    fixture.batch([kind(253, 1)]).exception(VIA_2, Reason::UnsupportedRoute).batch([gone(253)]);
    fixture.batch([kind(1000, 6)]).expect(VIA_2, via_2());
    fixture.batch([Message::Route(Route {
        unsupported: true,
        ..route("203.0.113.0/24", &[hop(2, Some("198.51.100.1"))])
    })]);
    fixture.exception(VIA_2, Reason::UnsupportedRoute);
    fixture.batch([Message::Route(Route { mtu: 1300, ..route("203.0.113.0/24", &[hop(2, Some("198.51.100.1"))]) })]);
    fixture.expect(VIA_2, forward(2, 2, 1300, 0x21, &[]));
    fixture.batch([Message::Route(Route { mtu: 1300, ..route("192.0.2.0/24", &[hop(1, None)]) })]);
    fixture.exception("192.0.2.1", Reason::UnsupportedRoute);
}

#[test]
fn table_local_shadows_what_is_longer_in_main() {
    let mut local = route("203.0.0.0/16", &[hop(1, None)]);
    (local.key.table, local.kind) = (255, 2);
    Fixture::new()
        .batch([Message::Route(local.clone())])
        .exception(VIA_2, Reason::LocalDestination)
        .batch([Message::RouteDelete(local.key)])
        .expect(VIA_2, via_2());
}

/// Two ways of equal cost and a third with double weight.
fn multipath() -> Route {
    let hops =
        [hop(1, Some("192.0.2.1")), hop(2, Some("198.51.100.1")), Hop { weight: 2, ..hop(1, Some("192.0.2.2")) }];
    route("10.0.0.0/8", &hops)
}

#[test]
fn groups_follow_weights_and_move_as_little_as_they_must() {
    let mut fixture = Fixture::new();
    fixture.batch([neighbour(1, "192.0.2.2", Some(0x12)), Message::Route(multipath())]);
    let (a, b, c) = (forward(1, 1, 1500, 0x11, &[]), via_2(), forward(1, 1, 1500, 0x12, &[]));
    let shares_of = |fixture: &Fixture| shares(&fixture.fpm.tables().view(), ip("10.1.1.1"));
    let buckets = |fixture: &Fixture| -> Vec<Outcome> {
        let view = fixture.fpm.tables().view();
        view.groups()[0].buckets.iter().map(|bucket| outcome(&view, bucket.load())).collect()
    };
    assert_eq!(shares_of(&fixture), [(a.clone(), 64), (b.clone(), 64), (c.clone(), 128)].into());
    let before = buckets(&fixture);
    // Interface 2 goes down: Linux takes it out, and its flows alone move.
    fixture.batch([Message::Port(Port { up: false, ..port(2) })]);
    assert_eq!(shares_of(&fixture), [(a.clone(), 85), (c.clone(), 171)].into());
    assert!(before.iter().zip(buckets(&fixture)).all(|(old, new)| *old == b || *old == new));
    // Link down alone counts only with ignore_routes_with_linkdown.
    fixture.batch([Message::Port(Port { carrier: false, ..port(2) })]);
    assert_eq!(shares_of(&fixture)[&Outcome::Exception(Reason::NexthopDown)], 64);
    let family = [PortFamily { forwarding: true, ignore_linkdown: true }; 2];
    fixture.batch([Message::Port(Port { carrier: false, family, ..port(2) })]);
    assert_eq!(shares_of(&fixture), [(a.clone(), 85), (c.clone(), 171)].into());
    fixture.batch([Message::Port(Port { up: false, ..port(2) }), Message::Port(Port { up: false, ..port(1) })]);
    assert_eq!(shares_of(&fixture), [(Outcome::Exception(Reason::NexthopDown), 256)].into());
    fixture.batch([Message::Port(port(1)), Message::Port(port(2))]);
    assert_eq!(shares_of(&fixture), [(a.clone(), 64), (b, 64), (c.clone(), 128)].into());
    let mut dead = multipath();
    if let Via::Hops(hops) = &mut dead.via {
        hops[1].flags = 1
    }
    fixture.batch([Message::Route(dead)]);
    assert_eq!(shares_of(&fixture), [(a, 85), (c, 171)].into());
    // Routes with the same next hops share a group; without routes it is free again.
    let groups = |fixture: &mut Fixture| {
        fixture.fpm.tables_mut().reclaim();
        fixture.fpm.tables().usage().iter().find(|usage| usage.table == TableId::Groups).unwrap().used
    };
    fixture.batch([Message::Route(Route { key: key("11.0.0.0/8"), ..multipath() }), Message::Route(multipath())]);
    assert_eq!(groups(&mut fixture), 1);
    fixture.batch([Message::RouteDelete(key("10.0.0.0/8")), Message::RouteDelete(key("11.0.0.0/8"))]);
    assert_eq!(groups(&mut fixture), 0);
}

#[test]
fn a_dead_candidate_leaves_the_prefix_to_the_next() {
    let family = [PortFamily { forwarding: true, ignore_linkdown: true }; 2];
    let backup = Route {
        key: RouteKey { priority: 50, ..key("203.0.113.0/24") },
        ..route("203.0.113.0/24", &[hop(1, Some("192.0.2.1"))])
    };
    Fixture::new()
        .batch([Message::Route(backup)])
        .expect(VIA_2, via_2())
        .batch([Message::Port(Port { carrier: false, ..port(2) })])
        .exception(VIA_2, Reason::NexthopDown)
        .batch([Message::Port(Port { carrier: false, family, ..port(2) })])
        .expect(VIA_2, forward(1, 1, 1500, 0x11, &[]))
        .batch([Message::Port(port(2))])
        .expect(VIA_2, via_2());
}

#[test]
fn nexthop_objects_are_looked_up_late() {
    let object = |id, kind| Message::Nexthop(NexthopObject { id, kind });
    let mut by_object = route("10.0.0.0/8", &[]);
    by_object.via = Via::Object(10);
    let (a, b) = (forward(1, 1, 1500, 0x11, &[]), via_2());
    let mut fixture = Fixture::new();
    fixture
        .batch([Message::Route(by_object)])
        .exception("10.1.1.1", Reason::NoRoute)
        .batch([object(10, NexthopObjectKind::Hop(hop(1, Some("192.0.2.1"))))])
        .expect("10.1.1.1", a.clone())
        .batch([object(10, NexthopObjectKind::Hop(hop(2, Some("198.51.100.1"))))])
        .expect("10.1.1.1", b.clone())
        .batch([object(10, NexthopObjectKind::Blackhole)])
        .exception("10.1.1.1", Reason::NonUnicastRoute)
        .batch([object(10, NexthopObjectKind::Unsupported)])
        .exception("10.1.1.1", Reason::UnsupportedRoute)
        .batch([object(10, NexthopObjectKind::Group(vec![(1, 3), (2, 1)]))])
        .exception("10.1.1.1", Reason::NoRoute)
        .batch([
            object(1, NexthopObjectKind::Hop(hop(1, Some("192.0.2.1")))),
            object(2, NexthopObjectKind::Hop(hop(2, Some("198.51.100.1")))),
        ]);
    assert_eq!(shares(&fixture.fpm.tables().view(), ip("10.1.1.1")), [(a.clone(), 192), (b, 64)].into());
    fixture
        .batch([object(2, NexthopObjectKind::Blackhole)])
        .exception("10.1.1.1", Reason::UnsupportedRoute)
        .batch([Message::NexthopDelete(2)])
        .exception("10.1.1.1", Reason::NoRoute)
        .batch([object(10, NexthopObjectKind::Group(vec![(1, 3)]))])
        .expect("10.1.1.1", a)
        .snapshot(Snapshot::Nexthops, [])
        .exception("10.1.1.1", Reason::NoRoute);
}

#[test]
fn policies_of_a_family_settings_and_own_addresses_reach_the_config() {
    let mut fixture = Fixture::new();
    let address = Address { ifindex: 1, address: ip("192.0.2.9"), prefix_len: 24 };
    fixture.batch([
        policy(Scope::Family(Family::V6), Reason::PolicyXfrm),
        policy(Scope::Family(Family::V6), Reason::PolicyConntrack),
        Message::FamilySettings(FamilySettings { family: Family::V4, hash_policy: 1, flow_labels: false }),
        Message::Address(address),
    ]);
    let bits = |fixture: &Fixture| -> u32 {
        fixture.fpm.tables().view().config().local_filter.iter().map(|word| word.load().count_ones()).sum()
    };
    let is_set = |fixture: &Fixture, octets| {
        let bit = towpath_tables::filter::local_filter_bit(octets) as usize;
        fixture.fpm.tables().view().config().local_filter[bit / 64].load() >> (bit % 64) & 1 == 1
    };
    let config = fixture.fpm.tables().view().config();
    assert_eq!(
        (config.policy[0].load(), config.policy[1].load()),
        (0, 1 + Reason::PolicyConntrack as u32),
        "the lowest number"
    );
    assert_eq!((config.hash_policy[0].load(), config.hash_policy[1].load()), (1, 0));
    assert!(is_set(&fixture, [192, 0, 2, 9]) && bits(&fixture) == 1);
    // `ip route add local`
    let mut any = route("100.64.0.0/30", &[hop(1, None)]);
    (any.key.table, any.kind) = (255, 2);
    fixture.batch([Message::AddressDelete(address), Message::Route(any.clone())]);
    assert!((0..4).all(|last| is_set(&fixture, [100, 64, 0, last])) && bits(&fixture) == 4);
    // Linux may refuse what it has no unicast route to.
    let mut none = route("10.9.0.0/31", &[]);
    none.kind = 6;
    fixture.batch([Message::RouteDelete(any.key), Message::Route(none.clone())]);
    assert!((0..2).all(|last| is_set(&fixture, [10, 9, 0, last])) && bits(&fixture) == 2);
    (none.key.prefix, any.key) = (prefix("0.0.0.0/0"), none.key);
    fixture.batch([Message::Route(none.clone())]);
    assert_eq!(bits(&fixture), towpath_tables::record::LOCAL_FILTER_BITS, "all are suspect");
    fixture
        .snapshot(Snapshot::Policies(PolicySource::Tc), [])
        .batch([Message::RouteDelete(any.key), Message::RouteDelete(none.key)]);
    assert_eq!((fixture.fpm.tables().view().config().policy[1].load(), bits(&fixture)), (0, 0));
}

#[test]
fn a_snapshot_sweeps_what_it_does_not_mention() {
    let mut fixture = Fixture::new();
    fixture
        .snapshot(Snapshot::Routes(Family::V4), [Message::Route(route("198.51.100.0/24", &[hop(2, None)]))])
        .exception(VIA_2, Reason::NoRoute)
        .exception("192.0.2.1", Reason::NoRoute)
        .expect("198.51.100.1", via_2())
        .expect("2001:db8:9::7", forward(1, 1, 1500, 0x16, &[]))
        .snapshot(Snapshot::Neighbours(Family::V4), [])
        .exception("198.51.100.1", Reason::NoNeighbour)
        .expect("2001:db8:9::7", forward(1, 1, 1500, 0x16, &[]))
        .batch([Message::SnapshotEnd(Snapshot::Ports)])
        .expect("2001:db8:9::7", forward(1, 1, 1500, 0x16, &[]))
        .snapshot(Snapshot::Ports, [Message::Port(port(2))])
        .exception("2001:db8:9::7", Reason::EgressNotServed);
    assert_eq!(fixture.fpm.interfaces().count(), 1);
}

#[test]
fn a_restarted_manager_takes_over_without_a_gap() {
    let before = {
        let mut fixture = Fixture::new();
        fixture.batch([neighbour(1, "192.0.2.2", Some(0x12)), Message::Route(multipath())]);
        fixture
    };
    let indices =
        |fixture: &Fixture| -> BTreeMap<_, _> { fixture.fpm.nexthops().map(|n| (n.identity, n.index)).collect() };
    let (old_indices, old_group) = (indices(&before), shares(&before.fpm.tables().view(), ip("10.1.1.1")));
    let adopted = TableWriter::adopt(before.fpm.into_tables().into_backing(), NoReaders).unwrap();
    let mut after = Fixture::unfinished(adopted);
    assert!(after.fpm.publish().is_none());
    after.expect(VIA_2, via_2());
    after.batch([neighbour(1, "192.0.2.2", Some(0x12)), Message::Route(multipath())]);
    assert_eq!(shares(&after.fpm.tables().view(), ip("10.1.1.1")), old_group, "nothing was touched yet");
    for class in all_classes() {
        after.fpm.apply(Message::SnapshotEnd(class));
    }
    let published = after.fpm.publish().unwrap();
    assert_eq!((published.words, published.nodes), (0, 0), "the same routes need no change");
    assert_eq!(indices(&after), old_indices);
    assert_eq!(shares(&after.fpm.tables().view(), ip("10.1.1.1")), old_group);
    after.batch([Message::RouteDelete(key("10.0.0.0/8"))]).exception("10.1.1.1", Reason::NoRoute);
}

/// `ip`
fn ip_filter() -> Filter {
    let code = [
        instruction(0x28, 0, 0, 12),
        instruction(0x15, 0, 1, 0x0800),
        instruction(0x06, 0, 0, 1),
        instruction(0x06, 0, 0, 0),
    ];
    Filter::new(Layer::Link, code.to_vec()).unwrap()
}

fn capture(scope: Scope) -> Policy {
    let (source, reason) = (PolicySource::Capture, Reason::PolicyCapture);
    Policy { filter: Some(ip_filter()), ..Policy::new(source, scope, reason, "test") }
}

/// Why IPv4 packets that come in by a port are exceptions.
fn enters(fixture: &Fixture, ifindex: u32) -> Option<Reason> {
    fixture.fpm.ports().find(|port| port.port.ifindex == ifindex).unwrap().ingress_policy[0]
}

#[test]
fn a_filter_that_the_engine_runs_lets_the_rest_of_a_port_be() {
    let (into, out) = (capture(Scope::Ingress(2, None)), capture(Scope::Egress(2, None)));
    let both = BTreeSet::from([into.clone(), out.clone()]);
    let class = Snapshot::Policies(PolicySource::Capture);
    let reason = Reason::PolicyCapture;
    let mut fixture = Fixture::new();
    fixture.snapshot(class, [&into, &out].map(|policy| Message::Policy(policy.clone())));
    assert_eq!(fixture.fpm.filters(), both);
    assert_eq!(enters(&fixture, 2), Some(reason), "nobody runs it yet");
    fixture.exception(VIA_2, reason);
    fixture.fpm.set_filtered(both.clone());
    fixture.batch([]).expect(VIA_2, via_2());
    assert_eq!(enters(&fixture, 2), None);
    assert!(fixture.fpm.is_filtered(&into) && fixture.fpm.is_filtered(&out));
    // What enters tagged is not what the filter would be run on, wherever that is.
    fixture.batch([Message::Port(vlan(100, 1, 0x8100, 7))]).exception(VIA_2, reason);
    assert_eq!((enters(&fixture, 2), enters(&fixture, 100)), (None, None));
    assert_eq!(fixture.fpm.filters(), BTreeSet::from([into.clone()]));
    fixture.batch([Message::PortDelete(100)]).expect(VIA_2, via_2());
    // A sub-interface's packets pass the port, tagged.
    fixture.batch([Message::Port(vlan(100, 2, 0x8100, 7))]).exception(VIA_2, reason);
    assert_eq!((enters(&fixture, 2), enters(&fixture, 100)), (None, Some(reason)));
    fixture.batch([Message::PortDelete(100)]).expect(VIA_2, via_2());
    // Another that is to see all, and one that the engine runs no longer.
    let whole = Policy { filter: None, ..into.clone() };
    fixture.batch([Message::Policy(whole)]);
    assert_eq!(enters(&fixture, 2), Some(reason));
    fixture.fpm.set_filtered(BTreeSet::new());
    fixture.batch([]).exception(VIA_2, reason);
    fixture.snapshot(class, []).expect(VIA_2, via_2());
    assert!(fixture.fpm.filters().is_empty());
}

#[test]
fn connections_pass_where_every_policy_in_the_way_lets_them() {
    let mut fixture = Fixture::new();
    let rules = |scope, reason, flows| Policy { flows, ..Policy::new(PolicySource::Nftables, scope, reason, "rules") };
    let words = |fixture: &Fixture| {
        let view = fixture.fpm.tables().view();
        let slot = fixture.fpm.ports().find(|port| port.port.ifindex == 1).unwrap().slot;
        [view.config().policy[0].load(), view.ports()[slot as usize].ingress_policy[0].load()]
    };
    let word = |reason: Reason, flows| Obstacle::word(Some(Obstacle { reason, flows }));
    let class = Snapshot::Policies(PolicySource::Nftables);
    let (netfilter, conntrack) = (Reason::PolicyNetfilter, Reason::PolicyConntrack);
    for scope in [Scope::Family(Family::V4), Scope::Ingress(1, None)] {
        let place = usize::from(scope != Scope::Family(Family::V4));
        let of = |policies: &[(Reason, Option<u32>)]| -> Vec<Message> {
            policies.iter().map(|(reason, flows)| Message::Policy(rules(scope, *reason, *flows))).collect()
        };
        for (policies, expected) in [
            (of(&[(netfilter, Some(7))]), word(netfilter, true)),
            (of(&[(conntrack, Some(7)), (netfilter, Some(8))]), word(netfilter, true)),
            // What nothing passes decides, and is what counts.
            (of(&[(netfilter, Some(7)), (conntrack, None)]), word(conntrack, false)),
            (of(&[(netfilter, None), (conntrack, None)]), word(netfilter, false)),
            (of(&[]), 0),
        ] {
            fixture.snapshot(class, policies);
            assert_eq!(words(&fixture)[place], expected, "{scope:?}");
            assert_eq!(words(&fixture)[1 - place], 0, "{scope:?}");
        }
    }
    // An alarm counts as a policy.
    fixture.snapshot(class, [Message::Policy(rules(Scope::Family(Family::V4), netfilter, Some(7)))]);
    fixture.batch([alarm(1, Scope::Family(Family::V4), conntrack)]);
    assert_eq!(words(&fixture)[0], word(conntrack, false));
    // A setting of the port itself is nothing that connections pass.
    let unsupported = Some("accept_local".into());
    fixture.snapshot(class, [Message::Policy(rules(Scope::Ingress(1, None), netfilter, Some(7)))]);
    assert_eq!(words(&fixture)[1], word(netfilter, true));
    fixture.batch([Message::Port(Port { unsupported, ..port(1) })]);
    assert_eq!(words(&fixture)[1], word(Reason::PolicySysctl, false));
}

fn alarm(number: u64, scope: Scope, reason: Reason) -> Message {
    let policies = vec![policy_of(scope, reason)];
    Message::Alarm(Alarm { id: AlarmId { source: PolicySource::Tc, number }, policies })
}

fn alarm_over(source: PolicySource, number: u64) -> Message {
    Message::AlarmOver(AlarmId { source, number })
}

#[test]
fn an_alarm_holds_until_its_own_snapshot_has_come() {
    let (egress, reason) = (Scope::Egress(2, None), Reason::PolicyTc);
    let class = Snapshot::Policies(PolicySource::Tc);
    let mut fixture = Fixture::new();
    fixture
        .batch([alarm(7, egress, reason)])
        .exception(VIA_2, reason)
        // Sent before the alarm, and come after it:
        .snapshot(class, [])
        .batch([alarm_over(PolicySource::Tc, 6), alarm_over(PolicySource::Capture, 9)])
        .exception(VIA_2, reason);
    assert_eq!(fixture.fpm.policies().count(), 1);
    fixture.snapshot(class, [policy(egress, reason)]);
    assert_eq!(fixture.fpm.policies().count(), 1, "the same policy twice");
    fixture.batch([alarm_over(PolicySource::Tc, 7)]).exception(VIA_2, reason);
    fixture.snapshot(class, []).expect(VIA_2, via_2());
    assert_eq!(fixture.fpm.policies().count(), 0);
    // The same once more, and a whole family this time.
    fixture.batch([alarm(8, Scope::Family(Family::V4), reason)]);
    assert_eq!(fixture.fpm.tables().view().config().policy[0].load(), 1 + reason as u32);
    fixture.batch([alarm_over(PolicySource::Tc, 8)]);
    assert_eq!(fixture.fpm.tables().view().config().policy[0].load(), 0);
}

#[test]
fn an_alarm_holds_while_routes_are_being_published() {
    let mut fixture = Fixture::new();
    let many =
        (0..1000).map(|n: u32| Message::Route(route(&format!("10.{}.{}.0/24", n / 256, n % 256), &[hop(1, None)])));
    many.for_each(|message| fixture.fpm.apply(message));
    assert!(matches!(fixture.fpm.publish_while(|| false), Progress::More));
    fixture.fpm.apply(alarm(1, Scope::Ingress(1, Some(Family::V4)), Reason::PolicyTc));
    fixture.fpm.apply(alarm(2, Scope::Egress(2, None), Reason::PolicyCapture));
    assert!(matches!(fixture.fpm.publish_while(|| false), Progress::More));
    fixture.exception(VIA_2, Reason::PolicyCapture).exception("10.3.231.1", Reason::NoRoute);
    let slot = fixture.fpm.ports().find(|port| port.port.ifindex == 1).unwrap().slot;
    let view = fixture.fpm.tables().view();
    assert_eq!(view.ports()[slot as usize].ingress_policy[0].load(), 1 + Reason::PolicyTc as u32);
    let mut slices = 0;
    while matches!(fixture.fpm.publish_while(|| false), Progress::More) {
        slices += 1;
    }
    assert!(slices > 900, "{slices}");
    fixture.exception("10.3.231.1", Reason::NoNeighbour).exception(VIA_2, Reason::PolicyCapture);
}

#[test]
fn policies_restrain_tables_taken_over_before_all_is_known() {
    let before = Fixture::new();
    let adopted = TableWriter::adopt(before.fpm.into_tables().into_backing(), NoReaders).unwrap();
    let mut after = Fixture::unfinished(adopted);
    let words = |fixture: &Fixture| [0, 1].map(|family| fixture.fpm.tables().view().config().policy[family].load());
    after.fpm.restrain();
    assert_eq!(words(&after), [0, 0]);
    after.fpm.apply(alarm(1, Scope::Ingress(2, Some(Family::V6)), Reason::PolicyTc));
    after.fpm.restrain();
    assert_eq!(words(&after), [0, 1 + Reason::PolicyTc as u32], "not as precise as it will be");
    after.complete();
    assert_eq!(words(&after), [0, 0]);
    let slot = after.fpm.ports().find(|port| port.port.ifindex == 2).unwrap().slot;
    let view = after.fpm.tables().view();
    assert_eq!(view.ports()[slot as usize].ingress_policy[1].load(), 1 + Reason::PolicyTc as u32);
}

#[test]
fn hits_name_neighbours_once() {
    let fixture = Fixture::new();
    assert_eq!(fixture.fpm.take_hits(), []);
    let hit = |gateway: &str| {
        let index = fixture.fpm.nexthops().find(|n| n.identity.gateway == Some(ip(gateway))).unwrap().index;
        fixture.fpm.tables().view().nexthops()[index as usize].hit.store(1);
    };
    hit("198.51.100.1");
    hit("2001:db8:1::1");
    let expected = [
        NeighbourKey { ifindex: 1, address: ip("2001:db8:1::1") },
        NeighbourKey { ifindex: 2, address: ip("198.51.100.1") },
    ];
    assert_eq!(fixture.fpm.take_hits(), expected);
    assert_eq!(fixture.fpm.take_hits(), []);
}

#[test]
fn explain_names_what_decides() {
    let mut fixture = Fixture::new();
    let backup = Route {
        key: RouteKey { priority: 50, ..key("203.0.113.0/24") },
        ..route("203.0.113.0/24", &[hop(1, Some("192.0.2.1"))])
    };
    fixture.batch([Message::Route(backup.clone()), Message::Route(route("0.0.0.0/0", &[hop(1, Some("192.0.2.1"))]))]);
    let explained = fixture.fpm.explain(ip(VIA_2));
    assert_eq!(
        explained.prefixes.iter().map(|m| (m.prefix.to_string(), m.decides)).collect::<Vec<_>>(),
        [("203.0.113.0/24".into(), true), ("0.0.0.0/0".into(), false)]
    );
    assert_eq!(explained.prefixes[0].routes, [route("203.0.113.0/24", &[hop(2, Some("198.51.100.1"))]), backup]);
    let [(nexthop, 1)] = &explained.nexthops[..] else { panic!("{:?}", explained.nexthops) };
    assert_eq!((nexthop.identity.ifindex, nexthop.identity.gateway), (2, Some(ip("198.51.100.1"))));
    assert_eq!(explained.neighbours[0].lladdr, Some(mac(0x21)));
    let local = fixture.fpm.explain(ip("192.0.2.1"));
    assert!(local.found.unwrap().host && local.prefixes[0].decides);
    assert_eq!(local.nexthops[0].0.identity.gateway, Some(ip("192.0.2.1")));
}

/// A fixture whose tables have just `spare` next hops, groups and tables of VLANs more than it needs.
fn confined(spare: usize) -> Fixture {
    use TableId::*;
    let usage = Fixture::new().fpm.tables().usage();
    let limits = [Nexthops, NexthopKeys, Groups, Vlans]
        .into_iter()
        .fold(initial_elements(1), |limits, table| limits.with(table, usage[table as usize].used + spare));
    let backing = HeapBacking::with_limits(limits, limits);
    let mut fixture = Fixture::unfinished(TableWriter::create(backing, NoReaders).unwrap());
    fixture.complete();
    fixture
}

impl Fixture {
    /// Checks what waits for room, and which tables are full because of that.
    #[track_caller]
    fn waits(&mut self, waiting: Waiting, full: &[TableId]) -> &mut Self {
        assert_eq!(self.fpm.waiting(), waiting);
        assert_eq!(self.fpm.full().map(|full| full.table).collect::<Vec<_>>(), full);
        self
    }

    /// Tries again as often as that helps, which must be possible exactly if something waits.
    #[track_caller]
    fn retry(&mut self) -> &mut Self {
        let waiting = self.fpm.waiting() != Waiting::default();
        assert_eq!(self.fpm.retry(), waiting);
        while self.fpm.publish().is_some() && self.fpm.finds_room() {
            assert!(self.fpm.retry());
        }
        self
    }
}

const NOTHING: Waiting = Waiting { ports: 0, vias: 0, neighbours: 0, prefixes: 0 };

#[test]
fn next_hops_wait_for_room() {
    let gateways = ["198.51.100.8", "198.51.100.9"];
    let mut fixture = confined(1);
    fixture.retry().waits(NOTHING, &[]);
    fixture
        .batch([neighbour(2, gateways[0], Some(8)), neighbour(2, gateways[1], Some(9))])
        .batch([
            Message::Route(route("11.0.0.0/8", &[hop(2, Some(gateways[0]))])),
            Message::Route(route("12.0.0.0/8", &[hop(2, Some(gateways[1]))])),
            Message::Route(Route { kind: 6, ..route("13.0.0.0/8", &[]) }),
        ])
        .expect("11.0.0.1", forward(2, 2, 1500, 8, &[]))
        .exception("12.0.0.1", Reason::TableFull)
        .exception("13.0.0.1", Reason::TableFull)
        .exception(gateways[1], Reason::NoNeighbour);
    let all = Waiting { vias: 1, neighbours: 1, prefixes: 1, ..NOTHING };
    fixture.waits(all, &[TableId::Nexthops]);
    assert!(fixture.fpm.publish().is_none(), "nothing has changed");
    fixture
        .retry()
        .waits(all, &[TableId::Nexthops])
        // Something goes: its place is for one of those that wait, which here are two for the same next hop.
        .batch([Message::RouteDelete(key("13.0.0.0/8"))])
        .waits(Waiting { prefixes: 0, ..all }, &[TableId::Nexthops])
        .batch([
            Message::RouteDelete(key("11.0.0.0/8")),
            Message::NeighbourDelete(NeighbourKey { ifindex: 2, address: ip(gateways[0]) }),
        ])
        .exception("12.0.0.1", Reason::TableFull)
        .retry()
        .waits(NOTHING, &[])
        .expect("12.0.0.1", forward(2, 2, 1500, 9, &[]))
        .expect(gateways[1], forward(2, 2, 1500, 9, &[]))
        .retry();
    // What waits and goes itself is not waited for any more.
    fixture
        .batch([
            neighbour(2, gateways[0], Some(8)),
            Message::Route(route("11.0.0.0/8", &[hop(2, Some(gateways[0]))])),
            Message::Route(Route { kind: 6, ..route("13.0.0.0/8", &[]) }),
        ])
        .waits(all, &[TableId::Nexthops])
        .batch([
            Message::RouteDelete(key("11.0.0.0/8")),
            Message::RouteDelete(key("13.0.0.0/8")),
            neighbour(2, gateways[0], None),
        ])
        .waits(NOTHING, &[])
        .retry();
}

#[test]
fn an_exception_waits_for_its_own_reason() {
    let mut fixture = confined(0);
    fixture
        .batch([Message::Route(Route { kind: 6, ..route("13.0.0.0/8", &[]) })])
        .exception("13.0.0.1", Reason::TableFull)
        .waits(Waiting { prefixes: 1, ..NOTHING }, &[TableId::Nexthops])
        .batch([neighbour(1, "192.0.2.1", None)])
        .retry()
        .waits(NOTHING, &[])
        .exception("13.0.0.1", Reason::NonUnicastRoute);
}

#[test]
fn groups_and_their_members_wait_for_room() {
    let hops = |ifindex, gateway| [hop(1, Some("192.0.2.1")), hop(ifindex, Some(gateway))];
    let both = [forward(1, 1, 1500, 0x11, &[]), via_2()];
    let mut fixture = confined(1);
    fixture
        .batch([
            Message::Route(route("11.0.0.0/8", &hops(2, "198.51.100.1"))),
            Message::Route(route("12.0.0.0/8", &hops(2, "198.51.100.9"))),
        ])
        .waits(Waiting { vias: 1, ..NOTHING }, &[TableId::Groups])
        .exception("12.0.0.1", Reason::TableFull);
    assert_eq!(outcomes(&fixture.fpm, "11.0.0.1"), both.iter().cloned().collect());
    fixture.batch([Message::RouteDelete(key("11.0.0.0/8"))]).retry().waits(NOTHING, &[]);
    // Its second member is known, not resolved.
    let members = [both[0].clone(), Outcome::Exception(Reason::NoNeighbour)];
    assert_eq!(outcomes(&fixture.fpm, "12.0.0.1"), members.into());
    // Now the next hops are full. The new group finds room when the old one has gone, its third member does not.
    let third = [hop(1, Some("192.0.2.1")), hop(2, Some("198.51.100.9")), hop(2, Some("198.51.100.7"))];
    fixture
        .batch([Message::Route(route("12.0.0.0/8", &third))])
        .waits(Waiting { vias: 1, ..NOTHING }, &[TableId::Nexthops, TableId::Groups])
        .retry()
        .waits(Waiting { vias: 1, ..NOTHING }, &[TableId::Nexthops]);
    let members: BTreeSet<_> = outcomes(&fixture.fpm, "12.0.0.1");
    assert!(members.contains(&both[0]) && members.contains(&Outcome::Exception(Reason::TableFull)), "{members:?}");
}

#[test]
fn ports_wait_for_a_slot() {
    let crowd: Vec<u32> = (0..5).map(|n| 40 + 256 * n).collect();
    let last = *crowd.last().unwrap();
    let header = [mac(0x31), mac(last as u8)].concat();
    let by_last = || Outcome::Forward { port: last, device: last, mtu: 1500, header: header.clone() };
    // Trying again gives them one, and so does whatever else happens to a port.
    let again: [fn(&mut Fixture); 2] =
        [|fixture| _ = fixture.retry(), |fixture| _ = fixture.batch([Message::Port(Port { mtu: 1400, ..port(1) })])];
    for again in again {
        let mut fixture = Fixture::new();
        crowd.iter().for_each(|ifindex| fixture.fpm.serve(*ifindex, true));
        fixture
            .batch(crowd.iter().map(|ifindex| Message::Port(port(*ifindex))))
            .batch([
                neighbour(last, "198.18.0.1", Some(0x31)),
                Message::Route(route("198.18.0.0/24", &[hop(last, None)])),
                Message::Route(route("11.0.0.0/8", &[hop(last, Some("198.18.0.1"))])),
            ])
            .exception("11.0.0.1", Reason::EgressNotServed)
            .waits(Waiting { ports: 1, ..NOTHING }, &[TableId::Ports])
            .retry()
            .waits(Waiting { ports: 1, ..NOTHING }, &[TableId::Ports])
            .batch([Message::PortDelete(crowd[0])]);
        again(&mut fixture);
        fixture.waits(NOTHING, &[]).expect("11.0.0.1", by_last()).expect("198.18.0.1", by_last());
    }
}

#[test]
fn vlan_tables_wait_for_room() {
    let mut fixture = confined(1);
    let vlans = |fixture: &Fixture, ifindex: u32| {
        let slot = fixture.fpm.ports().find(|port| port.port.ifindex == ifindex).unwrap().slot;
        fixture.fpm.tables().view().ports()[slot as usize].vlans.load()
    };
    fixture
        .batch([Message::Port(vlan(10, 1, 0x8100, 7)), Message::Port(vlan(11, 2, 0x8100, 7))])
        .waits(Waiting { ports: 1, ..NOTHING }, &[TableId::Vlans]);
    assert_eq!((vlans(&fixture, 1), vlans(&fixture, 2)), (0, NO_VLANS));
    fixture.batch([Message::PortDelete(10)]).retry().waits(NOTHING, &[]);
    assert_eq!((vlans(&fixture, 1), vlans(&fixture, 2)), (NO_VLANS, 0));
}

#[test]
fn in_vain_little_is_tried_and_with_room_everything() {
    let many = |count: u32| {
        (0..count).map(|n| std::net::Ipv4Addr::from_bits(0xc633_6400 + 100 + n).to_string()).collect::<Vec<_>>()
    };
    let mut fixture = confined(50);
    let (first, second) = (many(50), many(100).split_off(50));
    fixture
        .batch(first.iter().map(|address| neighbour(2, address, Some(1))))
        .waits(NOTHING, &[])
        .batch(second.iter().map(|address| neighbour(2, address, Some(2))))
        .waits(Waiting { neighbours: 50, ..NOTHING }, &[TableId::Nexthops])
        .batch(first.iter().take(30).map(|address| neighbour(2, address, None)))
        .retry()
        .waits(Waiting { neighbours: 20, ..NOTHING }, &[TableId::Nexthops])
        .batch(first.iter().skip(30).map(|address| neighbour(2, address, None)))
        .retry()
        .waits(NOTHING, &[]);
    for address in &second {
        fixture.expect(address, forward(2, 2, 1500, 2, &[]));
    }
}

/// What a million routes cost here, and how fast changes are taken. Run with `--ignored --nocapture` to see figures.
#[test]
#[ignore = "wants a release build; prints figures"]
fn a_million_routes() {
    let mut fixture = Fixture::unfinished(new_tables());
    let gateways = ["192.0.2.1", "198.51.100.1"];
    let resident = || -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let before = resident();
    let many = |count: u32| {
        (0..count).map(|n| {
            let address = std::net::Ipv4Addr::from_bits(0x0b00_0000 + (n << 8));
            let via = (n % 2) as usize;
            Route {
                key: RouteKey { table: 254, prefix: Prefix::new(address.into(), 24).unwrap(), priority: 20, tos: 0 },
                kind: 1,
                protocol: 186,
                via: Via::Hops(vec![hop(1 + via as u32, Some(gateways[via]))]),
                mtu: 0,
                unsupported: false,
            }
        })
    };
    let many6 = |count: u32| {
        (0..count).map(|n| {
            let address = std::net::Ipv6Addr::from_bits(0x2a00 << 112 | u128::from(n) << 80);
            Route {
                key: RouteKey { table: 254, prefix: Prefix::new(address.into(), 48).unwrap(), priority: 20, tos: 0 },
                kind: 1,
                protocol: 186,
                via: Via::Hops(vec![hop(1, Some("2001:db8:1::1"))]),
                mtu: 0,
                unsupported: false,
            }
        })
    };
    let start = std::time::Instant::now();
    many(1_000_000).chain(many6(250_000)).for_each(|route| fixture.fpm.apply(Message::Route(route)));
    let state = resident() - before;
    let collected = start.elapsed();
    fixture.complete();
    println!(
        "state {} MiB in {collected:?}, all {} MiB in {:?}",
        state >> 20,
        (resident() - before) >> 20,
        start.elapsed()
    );
    assert!(state < 120 << 20, "{state} bytes");
    let start = std::time::Instant::now();
    for (n, route) in many(100_000).enumerate() {
        fixture.fpm.apply(if n % 2 == 0 {
            Message::RouteDelete(route.key)
        } else {
            Message::Route(Route { mtu: 1400, ..route })
        });
        if n % 100 == 99 {
            fixture.fpm.publish();
        }
    }
    println!("100,000 changes in batches of 100: {:?}", start.elapsed());
    // What cannot be interrupted, in time of the processor.
    let used = || -> std::time::Duration {
        let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        std::time::Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
    };
    let start = used();
    fixture.fpm.tables_mut().reserve().unwrap();
    println!("reserve: {:?}", used() - start);
    let start = used();
    fixture.batch([Message::Port(Port { up: false, ..port(2) })]).exception("11.0.1.1", Reason::NexthopDown);
    println!("port down: {:?}", used() - start);
    for (what, share) in [("that keeps all", 1_000_000), ("that sweeps half", 500_000)] {
        let class = Snapshot::Routes(Family::V4);
        fixture.fpm.apply(Message::SnapshotBegin(class));
        many(share).for_each(|route| fixture.fpm.apply(Message::Route(route)));
        let start = used();
        fixture.fpm.apply(Message::SnapshotEnd(class));
        println!("end of a snapshot {what}: {:?}", used() - start);
    }
}

const NO_OPTIONS: GreOptions = GreOptions { key: None, checksum: false, sequence: false };
const GRE: Tunnel = Tunnel {
    local: IpAddr::V4(std::net::Ipv4Addr::new(198, 51, 100, 9)),
    remote: IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 7)),
    link: 0,
    input: NO_OPTIONS,
    output: GreOptions { key: Some(5), ..NO_OPTIONS },
    ttl: 64,
    class: None,
    label: Some(0),
    limit: None,
};

fn keyed(key: u32) -> GreOptions {
    GreOptions { key: Some(key), ..NO_OPTIONS }
}

fn tunnel(ifindex: u32, tunnel: Tunnel) -> Port {
    Port { kind: PortKind::Tunnel(tunnel), mac: None, mtu: 1472, ..port(ifindex) }
}

fn own(address: &str) -> Address {
    Address { ifindex: 2, address: ip(address), prefix_len: 24 }
}

impl Fixture {
    /// Interface 7 is a tunnel, and 10.7.0.0/16 and 2001:db8:7::/48 are behind it.
    fn with_tunnel() -> Self {
        let mut fixture = Self::new();
        fixture.batch([
            Message::Address(own("198.51.100.9")),
            Message::Port(tunnel(7, GRE)),
            Message::Route(route("10.7.0.0/16", &[hop(7, None)])),
            Message::Route(route("2001:db8:7::/48", &[hop(7, Some("fe80::7"))])),
        ]);
        fixture
    }

    /// Interface of the tunnel that packets with these addresses and this key belong to, and its words.
    fn tunnel_for(&self, tunnel: Tunnel) -> Option<(u32, u32, u32, u32)> {
        let words = |address: IpAddr| match address {
            IpAddr::V4(address) => [u32::from_ne_bytes(address.octets()), 0, 0, 0],
            IpAddr::V6(address) => {
                let word = |at: usize| u32::from_ne_bytes(address.octets()[at..at + 4].try_into().unwrap());
                [word(0), word(4), word(8), word(12)]
            }
        };
        let [local, remote] = [tunnel.local, tunnel.remote].map(words);
        let key = tunnel.input.key.unwrap_or(0).to_be();
        let first = tunnel_bucket(local, remote, key);
        let view = self.fpm.tables().view();
        (first..first + TUNNEL_PROBES).find_map(|place| {
            let slot = view.config().tunnels[place % TUNNEL_BUCKETS].load().checked_sub(1)?;
            let port = &view.ports()[slot as usize];
            let record = &port.tunnel;
            let ends = [&record.local, &record.remote].map(|end| [0, 1, 2, 3].map(|word: usize| end[word].load()));
            let same = (ends, record.input_key.load()) == ([local, remote], key);
            same.then(|| (port.ifindex.load(), record.flags.load(), record.ttl_tos.load(), record.policy.load()))
        })
    }
}

const INTO_7: Outcome = Outcome::Tunnel { port: 7, mtu: 1472 };
const FLAGS: u32 = tunnel_flags::GRE | tunnel_flags::OUTPUT_KEY | tunnel_flags::INHERIT_CLASS;

#[test]
fn tunnels_are_ports_and_next_hops() {
    let mut fixture = Fixture::with_tunnel();
    let found = Some((7, FLAGS, 0x40, 0));
    fixture.expect("10.7.1.1", INTO_7).expect("2001:db8:7::1", INTO_7);
    assert_eq!(fixture.tunnel_for(GRE), found);
    assert_eq!(fixture.flags(7) & (port_flags::TUNNEL | port_flags::READY), port_flags::TUNNEL | port_flags::READY);
    // It changes.
    let changed = Tunnel { input: keyed(8), output: NO_OPTIONS, ttl: 0, class: Some(0), ..GRE };
    fixture.batch([Message::Port(tunnel(7, changed))]).expect("10.7.1.1", INTO_7);
    assert_eq!((fixture.tunnel_for(GRE), fixture.tunnel_for(changed).map(|found| found.0)), (None, Some(7)));
    fixture.batch([Message::Port(tunnel(7, GRE))]);
    // It is down, has policies of its own, and goes.
    fixture.batch([Message::Port(Port { up: false, ..tunnel(7, GRE) })]).exception("10.7.1.1", Reason::NexthopDown);
    assert_eq!(fixture.flags(7) & port_flags::READY, 0);
    fixture
        .batch([Message::Port(tunnel(7, GRE)), policy(Scope::Egress(7, None), Reason::PolicyTc)])
        .exception("10.7.1.1", Reason::PolicyTc);
    fixture.snapshot(Snapshot::Policies(PolicySource::Tc), []).expect("10.7.1.1", INTO_7);
    fixture.batch([Message::PortDelete(7)]).exception("10.7.1.1", Reason::EgressNotServed);
    assert_eq!(fixture.tunnel_for(GRE), None);
    fixture.batch([Message::Port(tunnel(7, GRE))]).expect("10.7.1.1", INTO_7);
    assert_eq!(fixture.tunnel_for(GRE), found);
}

#[test]
fn checksums_of_tunnels_are_made_and_asked_for() {
    let mut fixture = Fixture::with_tunnel();
    let summed = |options: GreOptions| GreOptions { checksum: true, ..options };
    for (changed, flag) in [
        (Tunnel { input: summed(GRE.input), ..GRE }, tunnel_flags::INPUT_CHECKSUM),
        (Tunnel { output: summed(GRE.output), ..GRE }, tunnel_flags::OUTPUT_CHECKSUM),
    ] {
        fixture.batch([Message::Port(tunnel(7, changed))]).expect("10.7.1.1", INTO_7);
        assert_eq!(fixture.tunnel_for(GRE), Some((7, FLAGS | flag, 0x40, 0)));
    }
}

#[test]
fn numbers_of_tunnels_are_linuxs_in_their_direction() {
    let mut fixture = Fixture::with_tunnel();
    let numbered = |options: GreOptions| GreOptions { sequence: true, ..options };
    let ingress = |fixture: &Fixture| {
        let view = fixture.fpm.tables().view();
        let port = view.ports().iter().find(|port| port.ifindex.load() == 7).expect("a slot");
        port.ingress_policy.each_ref().map(|word| Obstacle::of(word.load()))
    };
    let out = Tunnel { output: numbered(GRE.output), ..GRE };
    fixture.batch([Message::Port(tunnel(7, out))]).exception("10.7.1.1", Reason::TunnelSequence);
    fixture.exception("2001:db8:7::1", Reason::TunnelSequence);
    assert_eq!((fixture.tunnel_for(GRE), ingress(&fixture)), (Some((7, FLAGS, 0x40, 0)), [None; 2]));
    let into = Tunnel { input: numbered(GRE.input), ..GRE };
    fixture.batch([Message::Port(tunnel(7, into))]).expect("10.7.1.1", INTO_7).expect("2001:db8:7::1", INTO_7);
    assert_eq!(ingress(&fixture), [Some(Obstacle::new(Reason::TunnelSequence)); 2]);
    fixture.batch([Message::Port(tunnel(7, GRE))]).expect("10.7.1.1", INTO_7);
    assert_eq!(ingress(&fixture), [None; 2]);
}

#[test]
fn policies_of_the_hosts_own_packets_hold_for_tunnels() {
    let mut fixture = Fixture::with_tunnel();
    let policy_of = |fixture: &Fixture| fixture.tunnel_for(GRE).map(|found| found.3);
    fixture.batch([policy(Scope::Local(Family::V4), Reason::PolicyNetfilter)]).expect(VIA_2, via_2());
    assert_eq!(policy_of(&fixture), Some(1 + Reason::PolicyNetfilter as u32));
    fixture.snapshot(Snapshot::Policies(PolicySource::Tc), [policy(Scope::Local(Family::V6), Reason::PolicyNetfilter)]);
    assert_eq!(policy_of(&fixture), Some(0), "nothing of this tunnel's is IPv6 outside");
}

#[test]
fn tunnels_that_linux_might_mistake_are_its_own() {
    let any = ip("0.0.0.0");
    let others: [(Tunnel, bool); 9] = [
        (Tunnel { input: keyed(1), link: 1, ..GRE }, true),
        (Tunnel { remote: ip("203.0.113.8"), link: 1, ..GRE }, true),
        (Tunnel { local: any, remote: any, ..GRE }, true),
        (Tunnel { local: any, ..GRE }, true),
        (Tunnel { link: 1, ..GRE }, false),
        (Tunnel { local: any, link: 1, ..GRE }, false),
        (Tunnel { remote: any, link: 1, ..GRE }, false),
        (Tunnel { local: any, remote: any, link: 1, ..GRE }, false),
        (Tunnel { local: any, remote: any, link: 1, input: keyed(0), ..GRE }, false),
    ];
    for (other, clear) in others {
        let mut fixture = Fixture::with_tunnel();
        fixture.batch([Message::Port(tunnel(8, other))]);
        let expected = if clear { INTO_7 } else { Outcome::Exception(Reason::EgressNotServed) };
        fixture.expect("10.7.1.1", expected);
        assert_eq!(fixture.tunnel_for(GRE).is_some(), clear, "{other:?}");
        fixture.batch([Message::PortDelete(8)]).expect("10.7.1.1", INTO_7);
    }
    // Two bound to the same interface cannot be mistaken.
    let mut fixture = Fixture::with_tunnel();
    fixture.batch([
        Message::Port(tunnel(7, Tunnel { link: 1, ..GRE })),
        Message::Port(tunnel(8, Tunnel { local: any, link: 1, ..GRE })),
    ]);
    fixture.expect("10.7.1.1", INTO_7);
}

#[test]
fn tunnels_that_cannot_be_served_are_linuxs() {
    let cases: [(&str, Port); 6] = [
        ("no other end", tunnel(7, Tunnel { remote: ip("0.0.0.0"), ..GRE })),
        ("multicast", tunnel(7, Tunnel { remote: ip("224.0.0.9"), ..GRE })),
        ("no end of ours", tunnel(7, Tunnel { local: ip("0.0.0.0"), ..GRE })),
        ("another's end", tunnel(7, Tunnel { local: ip("198.51.100.10"), ..GRE })),
        ("two families", tunnel(7, Tunnel { local: ip("2001:db8::1"), ..GRE })),
        ("unsupported", Port { unsupported: Some("GRE in UDP".into()), ..tunnel(7, GRE) }),
    ];
    for (name, port) in cases {
        let mut fixture = Fixture::with_tunnel();
        fixture.batch([Message::Port(port)]);
        assert_eq!(fixture.tunnel_for(GRE), None, "{name}");
        fixture.exception("10.7.1.1", Reason::EgressNotServed);
    }
    let mut fixture = Fixture::with_tunnel();
    fixture.batch([Message::AddressDelete(own("198.51.100.9"))]).exception("10.7.1.1", Reason::EgressNotServed);
    assert_eq!(fixture.tunnel_for(GRE), None);
    fixture.batch([Message::Address(own("198.51.100.9"))]).expect("10.7.1.1", INTO_7);
    assert!(fixture.tunnel_for(GRE).is_some());
}

/// The same over IPv6
fn gre6() -> Tunnel {
    let outside = Tunnel { class: Some(0xb8), label: Some(0x54321), limit: Some(4), ..GRE };
    Tunnel { local: ip("2001:db8:5::9"), remote: ip("2001:db8:6::7"), ..outside }
}

fn own6() -> Address {
    Address { ifindex: 2, address: ip("2001:db8:5::9"), prefix_len: 64 }
}

/// `auto_flowlabels`
fn flow_labels(family: Family, flow_labels: bool) -> Message {
    Message::FamilySettings(FamilySettings { family, hash_policy: 0, flow_labels })
}

#[test]
fn tunnels_over_ipv6_are_ports_and_next_hops() {
    let mut fixture = Fixture::with_tunnel();
    fixture.batch([Message::Address(own6()), Message::Port(tunnel(7, gre6()))]);
    let flags = FLAGS & !tunnel_flags::INHERIT_CLASS | tunnel_flags::V6 | tunnel_flags::LIMIT;
    let found = |more: u32, policy: Option<Reason>| {
        let policy = policy.map_or(0, |reason| 1 + reason as u32);
        Some((7, flags | 0x54321 << tunnel_flags::LABEL_SHIFT | more, 0x4_b840, policy))
    };
    fixture.expect("10.7.1.1", INTO_7).expect("2001:db8:7::1", INTO_7);
    assert_eq!(fixture.tunnel_for(gre6()), found(0, None));
    assert_eq!(fixture.tunnel_for(GRE), None);

    // Labels are made if Linux makes some, of IPv6.
    fixture.batch([flow_labels(Family::V4, true)]);
    assert_eq!(fixture.tunnel_for(gre6()), found(0, None));
    fixture.batch([flow_labels(Family::V6, true)]);
    assert_eq!(fixture.tunnel_for(gre6()), found(tunnel_flags::MAKE_LABEL, None));
    fixture.batch([flow_labels(Family::V6, false)]);

    // What is in the way of the router's own packets is so by family.
    fixture.batch([policy(Scope::Local(Family::V4), Reason::PolicyNetfilter)]);
    assert_eq!(fixture.tunnel_for(gre6()), found(0, None));
    fixture.batch([policy(Scope::Local(Family::V6), Reason::PolicyXfrm)]);
    assert_eq!(fixture.tunnel_for(gre6()), found(0, Some(Reason::PolicyXfrm)));

    let mut fixture = Fixture::with_tunnel();
    fixture.batch([Message::Address(own6()), Message::Port(tunnel(8, gre6()))]).expect("10.7.1.1", INTO_7);
    assert!(fixture.tunnel_for(GRE).is_some() && fixture.tunnel_for(gre6()).is_some(), "beside each other");
    fixture.batch([Message::AddressDelete(own6())]);
    assert!(fixture.tunnel_for(GRE).is_some() && fixture.tunnel_for(gre6()).is_none(), "not ours any more");
}

#[test]
fn tunnels_over_ipv6_that_cannot_be_served_are_linuxs() {
    let any = ip("::");
    let with = |change: fn(&mut Tunnel)| {
        let mut tunnel = gre6();
        change(&mut tunnel);
        tunnel
    };
    for (name, other) in [
        ("no other end", Tunnel { remote: any, ..gre6() }),
        ("no end of ours", Tunnel { local: any, ..gre6() }),
        ("multicast", with(|tunnel| tunnel.remote = ip("ff02::1"))),
        ("link-local", with(|tunnel| tunnel.remote = ip("fe80::1"))),
        ("loopback", with(|tunnel| tunnel.remote = ip("::1"))),
        ("IPv4 in IPv6", with(|tunnel| tunnel.remote = ip("::ffff:1.2.3.4"))),
        ("two families", with(|tunnel| tunnel.remote = ip("203.0.113.7"))),
    ] {
        let mut fixture = Fixture::with_tunnel();
        fixture.batch([Message::Address(own6()), Message::Port(tunnel(7, other))]);
        fixture.exception("10.7.1.1", Reason::EgressNotServed);
        assert_eq!(fixture.tunnel_for(other), None, "{name}");
    }
    for (other, clear) in [
        (Tunnel { link: 1, ..gre6() }, false),
        (Tunnel { local: any, link: 1, ..gre6() }, false),
        (Tunnel { local: any, remote: any, link: 1, ..gre6() }, false),
        (Tunnel { input: keyed(1), link: 1, ..gre6() }, true),
        (Tunnel { local: ip("0.0.0.0"), remote: ip("0.0.0.0"), link: 1, ..gre6() }, true),
    ] {
        let mut fixture = Fixture::with_tunnel();
        fixture.batch([Message::Address(own6()), Message::Port(tunnel(7, gre6())), Message::Port(tunnel(8, other))]);
        assert_eq!(fixture.tunnel_for(gre6()).is_some_and(|found| found.0 == 7), clear, "{other:?}");
    }
}
