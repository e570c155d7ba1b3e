//! Random histories against the reference: after every publication each probe address goes the same way in both.

use super::reference::Reference;
use super::*;
use proptest::prelude::*;
use proptest::sample::select;

pub const NETWORKS: [[&str; 7]; 2] = [
    ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "192.0.2.0/24", "192.0.2.128/25"],
    [
        "::/0",
        "2001:db8::/32",
        "2001:db8:1::/48",
        "2001:db8:1::/64",
        "2001:db8:1::5/128",
        "2001:db8:2::/47",
        "2001:db8:2::/120",
    ],
];
pub const HOSTS: [[&str; 4]; 2] = [
    ["10.1.2.3", "10.1.2.9", "192.0.2.1", "192.0.2.129"],
    ["2001:db8:1::5", "2001:db8:1::9", "2001:db8:2::1", "fe80::1"],
];
pub const PROBES: [&str; 14] = [
    "8.8.8.8",
    "10.9.9.9",
    "10.1.9.9",
    "10.1.2.3",
    "10.1.2.9",
    "10.1.2.10",
    "192.0.2.1",
    "192.0.2.129",
    "192.0.2.200",
    "2001:db8:1::5",
    "2001:db8:1::9",
    "2001:db8:2::1",
    "2001:db8:3::1",
    "2400::1",
];

#[derive(Clone, Debug)]
enum Step {
    Batch(Vec<Message>),
    Resync(Snapshot, Vec<Message>),
    Serve(u32, bool),
}

fn a_port() -> impl Strategy<Value = Port> {
    let bits = prop::array::uniform6(prop::bool::weighted(0.15));
    (1u32..=6, bits, select(vec![1400, 1500])).prop_map(|(ifindex, bits, mtu)| {
        let [down, no_carrier, enslaved, no_mac, unsupported, ignore_linkdown] = bits;
        let kind = match ifindex {
            4 => PortKind::Vlan { lower: 1, protocol: 0x88a8, id: 4 },
            5 => PortKind::Vlan { lower: 4, protocol: 0x8100, id: 5 },
            6 => PortKind::Vlan { lower: 5, protocol: 0x8100, id: 6 },
            _ => PortKind::Virtual,
        };
        Port {
            kind,
            mtu,
            up: !down,
            carrier: !no_carrier,
            master: if enslaved && ifindex < 4 { 9 } else { 0 },
            mac: (!no_mac).then(|| mac(ifindex as u8)),
            unsupported: unsupported.then(|| "test".into()),
            family: [PortFamily { forwarding: true, ignore_linkdown }; 2],
            ..port(ifindex)
        }
    })
}

fn a_hop(family: usize) -> impl Strategy<Value = Hop> {
    (
        prop_oneof![9 => 1u32..=6, 1 => Just(0)],
        proptest::option::weighted(0.7, select(&HOSTS[family][..])),
        1u16..4,
        prop::bool::weighted(0.1),
    )
        .prop_map(|(ifindex, gateway, weight, dead)| Hop { weight, flags: dead.into(), ..hop(ifindex, gateway) })
}

fn a_route_key(family: usize) -> impl Strategy<Value = RouteKey> {
    let table = prop_oneof![12 => Just(254), 1 => Just(255), 1 => Just(253), 1 => Just(77)];
    (table, select(&NETWORKS[family][..]), select(vec![0, 10, 20]), prop_oneof![15 => Just(0), 1 => Just(8u8)])
        .prop_map(|(table, network, priority, tos)| RouteKey { table, prefix: prefix(network), priority, tos })
}

/// Objects 1 to 4 are IPv4's, 11 to 14 are IPv6's.
fn an_object_id(family: usize) -> impl Strategy<Value = u32> {
    (1u32..=4).prop_map(move |id| id + 10 * family as u32)
}

fn a_route(family: usize) -> impl Strategy<Value = Message> {
    let via = prop_oneof![3 => prop::collection::vec(a_hop(family), 0..4).prop_map(Via::Hops), 1 => an_object_id(family).prop_map(Via::Object)];
    let kind = prop_oneof![15 => Just(1u8), 1 => 2u8..10];
    (a_route_key(family), via, kind, prop_oneof![6 => Just(0), 1 => Just(1300)], prop::bool::weighted(0.05)).prop_map(
        |(key, via, kind, mtu, unsupported)| Message::Route(Route { key, kind, protocol: 3, via, mtu, unsupported }),
    )
}

fn an_object(family: usize) -> impl Strategy<Value = Message> {
    let kind = prop_oneof![
        5 => a_hop(family).prop_map(NexthopObjectKind::Hop),
        1 => Just(NexthopObjectKind::Blackhole),
        3 => prop::collection::vec((an_object_id(family), 1u16..4), 0..4).prop_map(NexthopObjectKind::Group),
        1 => Just(NexthopObjectKind::Unsupported),
    ];
    (an_object_id(family), kind).prop_map(|(id, kind)| Message::Nexthop(NexthopObject { id, kind }))
}

fn a_neighbour(family: usize) -> impl Strategy<Value = Message> {
    (1u32..=5, select(&HOSTS[family][..]), proptest::option::weighted(0.8, 0x80u8..0x84))
        .prop_map(|(ifindex, address, lladdr)| neighbour(ifindex, address, lladdr))
}

fn a_policy() -> impl Strategy<Value = Message> {
    let family = proptest::option::of(select(&Family::ALL[..]));
    let source = select(vec![PolicySource::Tc, PolicySource::Nftables]);
    (1u32..=4, family, source, select(vec![Reason::PolicyTc, Reason::PolicyNetfilter])).prop_map(
        |(ifindex, family, source, reason)| {
            Message::Policy(Policy::new(source, Scope::Egress(ifindex, family), reason, ""))
        },
    )
}

fn a_message() -> impl Strategy<Value = Message> {
    (0usize..2).prop_flat_map(|family| prop_oneof![
        6 => a_route(family),
        3 => a_route_key(family).prop_map(Message::RouteDelete),
        3 => a_neighbour(family),
        1 => (1u32..=5, select(&HOSTS[family][..])).prop_map(|(ifindex, address)| Message::NeighbourDelete(NeighbourKey { ifindex, address: ip(address) })),
        3 => a_port().prop_map(Message::Port),
        1 => (1u32..=6).prop_map(Message::PortDelete),
        3 => an_object(family),
        1 => an_object_id(family).prop_map(Message::NexthopDelete),
        1 => a_policy(),
    ])
}

fn class_of(message: &Message) -> Option<Snapshot> {
    Some(match message {
        Message::Port(_) => Snapshot::Ports,
        Message::Neighbour(neighbour) => Snapshot::Neighbours(Family::of(neighbour.key.address)),
        Message::Route(route) => Snapshot::Routes(route.key.prefix.family()),
        Message::Nexthop(_) => Snapshot::Nexthops,
        Message::Policy(policy) => Snapshot::Policies(policy.source),
        _ => return None,
    })
}

fn a_step() -> impl Strategy<Value = Step> {
    let messages = || prop::collection::vec(a_message(), 1..6);
    let classes: Vec<_> = all_classes().collect();
    prop_oneof![
        8 => messages().prop_map(Step::Batch),
        1 => (select(classes), prop::collection::vec(a_message(), 0..20)).prop_map(|(class, mut messages)| {
            messages.retain(|message| class_of(message) == Some(class));
            Step::Resync(class, messages)
        }),
        1 => (1u32..=3, any::<bool>()).prop_map(|(ifindex, on)| Step::Serve(ifindex, on)),
    ]
}

struct Pair {
    fpm: TestFpm,
    reference: Reference,
}

impl Pair {
    fn apply(&mut self, message: Message) {
        self.reference.apply(&message);
        self.fpm.apply(message);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Batch(messages) => messages.into_iter().for_each(|message| self.apply(message)),
            Step::Resync(class, messages) => {
                self.reference.forget(class);
                self.fpm.apply(Message::SnapshotBegin(class));
                messages.into_iter().for_each(|message| self.apply(message));
                self.fpm.apply(Message::SnapshotEnd(class));
            }
            Step::Serve(ifindex, on) => {
                if on {
                    self.reference.served.insert(ifindex)
                } else {
                    self.reference.served.remove(&ifindex)
                };
                self.fpm.serve(ifindex, on);
            }
        }
        // In the smallest slices, which must come to the same.
        while matches!(self.fpm.publish_while(|| false), Progress::More) {}
    }

    fn compare(&self) -> Result<(), TestCaseError> {
        for probe in PROBES {
            prop_assert_eq!(outcomes(&self.fpm, probe), self.reference.outcomes(ip(probe)), "{}", probe);
        }
        Ok(())
    }

    fn used(&mut self, table: TableId) -> usize {
        self.fpm.tables_mut().reclaim();
        self.fpm.tables().usage().iter().find(|usage| usage.table == table).map_or(0, |usage| usage.used)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn histories(first in prop::collection::vec(a_message(), 0..40), steps in prop::collection::vec(a_step(), 1..40)) {
        let mut pair = Pair { fpm: Fpm::new(new_tables(), all_classes()), reference: Reference::default() };
        let unused = pair.used(TableId::Nexthops);
        pair.step(Step::Serve(1, true));
        pair.step(Step::Serve(2, true));
        for ifindex in 1..=3 {
            pair.apply(Message::Port(port(ifindex)));
        }
        pair.step(Step::Batch(first));
        for class in all_classes() {
            pair.fpm.apply(Message::SnapshotEnd(class));
        }
        pair.fpm.publish();
        pair.compare()?;
        for step in steps {
            pair.step(step);
            pair.compare()?;
        }
        // Nothing is left of it when everything goes.
        for class in all_classes() {
            pair.step(Step::Resync(class, Vec::new()));
        }
        let specials = pair.fpm.nexthops().filter(|nexthop| nexthop.identity.reason.is_some()).count();
        prop_assert_eq!(pair.fpm.nexthops().count(), specials);
        prop_assert_eq!(pair.used(TableId::Nexthops), specials + unused);
        for table in [TableId::Groups, TableId::Nodes, TableId::Ports, TableId::Vlans] {
            prop_assert_eq!(pair.used(table), 0, "{:?}", table);
        }
    }
}
