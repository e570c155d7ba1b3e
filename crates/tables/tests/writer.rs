//! The writer as the manager uses it: settings, ports, next hops, groups, growth, and taking over from another.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use towpath_tables::adopt::AdoptError;
use towpath_tables::backing::{HeapBacking, PerTable, View, initial_elements};
use towpath_tables::filter::local_filter_bit;
use towpath_tables::grace::NoReaders;
use towpath_tables::layout::layout_hash;
use towpath_tables::lpm::{Kind, Leaf, Word, lookup};
use towpath_tables::nexthop::{Action, Header, NexthopIdentity, NexthopValue};
use towpath_tables::record::*;
use towpath_tables::rib::Entry;
use towpath_tables::tunnel::{Label, TunnelValue};
use towpath_tables::writer::{MAIN_ROOT, PortValue, RouteError, TableWriter};
use towpath_tables::{Obstacle, Reason};

type Writer = TableWriter<HeapBacking, NoReaders>;

fn writer() -> Writer {
    TableWriter::create(HeapBacking::new(initial_elements(2)), NoReaders).unwrap()
}

fn identity(n: u32) -> NexthopIdentity {
    NexthopIdentity { ifindex: n, gateway: Some(Ipv4Addr::from(0xc000_0200 + n).into()), mtu: 0, reason: None }
}

fn forward(n: u8) -> NexthopValue {
    let header = Header::new([n; 6], [2; 6], &[]).unwrap();
    NexthopValue { action: Action::Forward(header), port: 1, device: 1, mtu: 1500 }
}

fn to(leaf: Option<Leaf>) -> Entry {
    Entry { leaf: leaf.unwrap(), level: 0 }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn used(writer: &Writer, table: TableId) -> usize {
    writer.usage().into_iter().find(|usage| usage.table == table).unwrap().used
}

#[test]
fn ports_lie_where_programs_look_for_them() {
    let mut writer = writer();
    let slots = writer.view().ports().len() as u32;
    let placed: Vec<u32> = (0..PORT_PROBES).map(|n| writer.alloc_port(5 + n * slots).unwrap()).collect();
    assert_eq!(placed, [5, 6, 7, 8]);
    assert_eq!(writer.alloc_port(5 + slots).unwrap(), 6, "a port keeps its slot");
    let error = writer.alloc_port(5 + PORT_PROBES * slots).unwrap_err().to_string();
    assert!(error.contains("ports") && error.contains(&format!("interface {}", 5 + PORT_PROBES * slots)), "{error}");
    assert_eq!(writer.alloc_upper_port(77).unwrap(), slots - 1);

    let stats = writer.view().stats();
    stats[6].rx_packets.store(3);
    stats[6 + slots as usize].rx_packets.store(4);
    stats[6 + slots as usize].exceptions[Reason::NoRoute as usize].store(9);
    let totals = writer.port_totals(6);
    assert_eq!((totals.rx_packets, totals.exceptions[Reason::NoRoute as usize]), (7, 9));
    writer.free_port(6);
    assert_eq!(writer.alloc_port(5 + PORT_PROBES * slots).unwrap(), 6, "a freed slot is used again");
    assert_eq!(writer.port_totals(6).rx_packets, 0, "with counters from zero");

    let value = PortValue {
        flags: port_flags::READY | port_flags::FORWARD_V4,
        mac: [2, 3, 4, 5, 6, 7],
        root: MAIN_ROOT,
        ingress_policy: [None, Some(Obstacle::new(Reason::PolicyTc))],
        vlans: None,
        vlan: Some((0x8100, 12)),
        lower: 5,
        mtu: 1400,
        vrf: 9,
        arrival: [0, PORT_SLOTS],
    };
    writer.set_port(6, &value);
    let port = &writer.view().ports()[6];
    assert_eq!(port.flags.load(), port_flags::PRESENT | port_flags::READY | port_flags::FORWARD_V4);
    assert_eq!(port.mac.load(), destination_word(u64::from_ne_bytes([2, 3, 4, 5, 6, 7, 8, 9])));
    assert_ne!(port.mac.load(), destination_word(u64::from_ne_bytes([2, 3, 4, 5, 6, 8, 8, 9])));
    assert_eq!([port.ingress_policy[0].load(), port.ingress_policy[1].load()], [0, 1 + Reason::PolicyTc as u32]);
    assert_eq!(
        (port.vlans.load(), port.vlan.load(), port.lower.load(), port.mtu.load()),
        (NO_VLANS, 0x8100_000c, 5, 1400)
    );
    assert_eq!((port.vrf.load(), port.arrival.each_ref().map(|number| number.load())), (9, [0, PORT_SLOTS]));
}

#[test]
fn vlans_are_two_to_a_word() {
    let mut writer = writer();
    let vlans = writer.alloc_vlans().unwrap();
    writer.set_vlan(vlans, 10, Some(3));
    writer.set_vlan(vlans, 11, Some(4));
    assert_eq!(writer.view().vlans()[vlans as usize].slots[5].load(), 5 << 16 | 4);
    writer.set_vlan(vlans, 10, None);
    assert_eq!(writer.view().vlans()[vlans as usize].slots[5].load(), 5 << 16);
    writer.free_vlans(vlans);
    writer.publish();
    writer.reclaim();
    assert_eq!(used(&writer, TableId::Vlans), 0);
}

#[test]
fn the_filter_knows_every_local_address() {
    let mut writer = writer();
    let addresses: Vec<Ipv4Addr> = (0..200u32).map(|n| Ipv4Addr::from(0x0a00_0001 + n * 0x0101)).collect();
    let set = |writer: &Writer, a: &Ipv4Addr| {
        let bit = local_filter_bit(a.octets());
        writer.view().config().local_filter[bit as usize / 64].load() >> (bit % 64) & 1 == 1
    };
    writer.set_local_addresses(addresses.iter().copied());
    assert!(addresses.iter().all(|a| set(&writer, a)));
    let others = (0..2000u32).filter(|n| set(&writer, &Ipv4Addr::from(0xc633_6400 + n * 77))).count();
    assert!(others < 400, "{others} of 2000 foreign addresses pass for local");
    writer.set_local_addresses([]);
    assert!(!addresses.iter().any(|a| set(&writer, a)));
}

#[test]
fn groups_follow_weights_and_move_few_flows() {
    let mut writer = writer();
    let group = writer.alloc_group(&[(2, 1), (3, 2), (4, 1)]).unwrap();
    let buckets =
        |writer: &Writer| writer.view().groups()[group as usize].buckets.iter().map(W32Load::get).collect::<Vec<_>>();
    let shares = |buckets: &[u32]| {
        buckets.iter().fold(BTreeMap::new(), |mut map, hop| {
            *map.entry(*hop).or_insert(0) += 1;
            map
        })
    };
    let before = buckets(&writer);
    assert_eq!(shares(&before), BTreeMap::from([(2, 64), (3, 128), (4, 64)]));
    writer.set_group(group, &[(2, 1), (3, 2)]);
    let after = buckets(&writer);
    assert_eq!(shares(&after), BTreeMap::from([(2, 85), (3, 171)]));
    assert!(
        before.iter().zip(&after).all(|(old, new)| old == new || *old == 4),
        "only flows of the one that left move"
    );
}

use towpath_tables::word::W32;
trait W32Load {
    fn get(&self) -> u32;
}
impl W32Load for W32 {
    fn get(&self) -> u32 {
        self.load()
    }
}

#[test]
fn next_hops_come_back_only_after_publication() {
    let mut writer = writer();
    let hop = writer.alloc_nexthop(identity(1)).unwrap();
    assert_eq!(writer.nexthop(hop), Some(NexthopValue::exception(Reason::NoNeighbour)));
    writer.set_nexthop(hop, &forward(9));
    let sequence = writer.view().nexthops()[hop as usize].sequence.load();
    writer.set_nexthop(hop, &forward(9));
    assert_eq!(writer.view().nexthops()[hop as usize].sequence.load(), sequence, "no change, no write");
    writer.view().nexthops()[hop as usize].hit.store(1);
    assert!(writer.take_hit(hop) && !writer.take_hit(hop));

    writer.free_nexthop(hop);
    assert_ne!(writer.alloc_nexthop(identity(2)).unwrap(), hop);
    writer.publish();
    assert_eq!(writer.nexthop(hop), None);
    writer.reclaim();
    assert_eq!(writer.alloc_nexthop(identity(3)).unwrap(), hop);
}

#[test]
fn tables_grow_until_they_cannot() {
    let limits = PerTable([usize::MAX; TableId::ALL.len()]).with(TableId::Nexthops, 16);
    let sizes = initial_elements(1).with(TableId::Nexthops, 4).with(TableId::NexthopKeys, 4).with(TableId::Groups, 0);
    let mut writer = TableWriter::create(HeapBacking::with_limits(sizes, limits), NoReaders).unwrap();
    let hops: Vec<u32> = std::iter::from_fn(|| writer.alloc_nexthop(identity(9)).ok()).take(100).collect();
    assert_eq!(hops, (2..16).collect::<Vec<_>>());
    let error = writer.alloc_nexthop(identity(9)).unwrap_err().to_string();
    assert_eq!(error, "table nexthops cannot grow to 32 elements: the limit is 16");
    assert_eq!(writer.alloc_group(&[(2, 1)]).unwrap(), 0, "an empty table grows too");
}

#[test]
fn routes_go_to_the_root_they_belong_to() {
    let mut writer = writer();
    let entry = to(Leaf::nexthop(7));
    assert_eq!(writer.route_set(5, address("192.0.2.0"), 24, entry), Err(RouteError::NoRoot(5)));
    assert!(matches!(
        writer.route_set(0, address("2001:db8::"), 32, entry),
        Err(RouteError::WrongFamily { root: 0, .. })
    ));
    assert!(matches!(writer.route_set(0, address("192.0.2.0"), 33, entry), Err(RouteError::BadPrefix { len: 33, .. })));
    let other = writer.alloc_root(Family::V4).unwrap();
    writer.route_set(other, address("192.0.2.0"), 24, entry).unwrap();
    writer.publish();
    assert_eq!(lookup(&writer.view(), other, &[192, 0, 2, 1]).unwrap().kind(), Kind::Nexthop(7));
    assert_eq!(lookup(&writer.view(), MAIN_ROOT[0], &[192, 0, 2, 1]).unwrap().kind(), Kind::None);
    writer.free_root(other);
    assert_eq!(writer.view().roots()[other as usize].family.load(), 0);
    writer.reclaim();
    assert_eq!((used(&writer, TableId::Roots), used(&writer, TableId::Nodes)), (2, 0));
}

/// Routes of every kind over three next hops and a group.
fn populate(writer: &mut Writer) -> (Vec<u32>, u32) {
    let hops: Vec<u32> = (1..4).map(|n| writer.alloc_nexthop(identity(n)).unwrap()).collect();
    hops.iter().for_each(|&hop| writer.set_nexthop(hop, &forward(hop as u8)));
    let group = writer.alloc_group(&[(hops[0], 3), (hops[1], 1)]).unwrap();
    for n in 0..40 {
        let leaf = if n % 3 == 0 { Leaf::group(group) } else { Leaf::nexthop(hops[n as usize % 2]) };
        writer.route_set(MAIN_ROOT[0], [192, 0, 2 * n, 0].into(), 24, to(leaf)).unwrap();
        writer.route_set(MAIN_ROOT[1], [0x2001, 0xdb8, n.into(), 0, 0, 0, 0, 0].into(), 48, to(leaf)).unwrap();
    }
    writer.route_set(MAIN_ROOT[0], [0, 0, 0, 0].into(), 0, to(Leaf::nexthop(hops[2]))).unwrap();
    writer
        .host_set(MAIN_ROOT[0], [192, 0, 2, 9].into(), Leaf::nexthop(hops[1]).unwrap(), Leaf::nexthop(hops[2]).unwrap())
        .unwrap();
    (hops, group)
}

#[test]
fn a_new_writer_changes_only_what_differs() {
    let mut writer = writer();
    let (hops, group) = populate(&mut writer);
    let unclaimed = writer.alloc_nexthop(identity(50)).unwrap();
    writer.route_set(MAIN_ROOT[0], [198, 51, 100, 0].into(), 24, to(Leaf::nexthop(unclaimed))).unwrap();
    writer.publish();
    writer.reclaim();
    let nodes = used(&writer, TableId::Nodes);
    assert!(nodes > 3);

    let mut writer = TableWriter::adopt(writer.into_backing(), NoReaders).unwrap();
    assert_eq!(writer.view().config().epoch.load(), 2);
    assert_eq!(used(&writer, TableId::Nodes), nodes);
    assert_eq!(
        lookup(&writer.view(), MAIN_ROOT[0], &[192, 0, 2, 9]).unwrap().kind(),
        Kind::Nexthop(hops[2]),
        "still published"
    );
    assert_eq!(populate(&mut writer), (hops.clone(), group), "the same next hops and group are claimed");
    let sequence = writer.view().nexthops()[hops[0] as usize].sequence.load();
    assert_eq!(sequence, 4, "set once when new, once to forward, not again");
    let published = writer.publish();
    assert_eq!(published.words, 1, "only the route that is gone: {published:?}");
    assert_eq!(writer.nexthop(unclaimed), None, "nobody claimed it");
    writer.reclaim();
    assert_eq!(lookup(&writer.view(), MAIN_ROOT[0], &[198, 51, 100, 1]).unwrap().kind(), Kind::Nexthop(hops[2]));
    assert_eq!(writer.alloc_nexthop(identity(60)).unwrap(), unclaimed);

    let mut writer = TableWriter::adopt(writer.into_backing(), NoReaders).unwrap();
    writer.publish();
    writer.reclaim();
    for table in [TableId::Nodes, TableId::Groups] {
        assert_eq!(used(&writer, table), 0, "{}: all is free if nothing is claimed", table.name());
    }
    assert_eq!(used(&writer, TableId::Nexthops), 2, "0 and table-full");
}

#[test]
fn tables_of_another_layout_are_refused() {
    let refused = |spoil: fn(&Config)| {
        let backing = writer().into_backing();
        spoil(towpath_tables::backing::Backing::view(&backing).config());
        TableWriter::adopt(backing, NoReaders).err().expect("adopted all the same")
    };
    let different = |what, found, expected| AdoptError::Different { what, found, expected };
    assert_eq!(refused(|config| config.magic.store(0)), different("magic number", 0, MAGIC));
    assert_eq!(refused(|config| config.version.store(77)), different("layout version", 77, LAYOUT_VERSION));
    assert_eq!(
        refused(|config| config.layout.store(!layout_hash())),
        different("layout hash", !layout_hash(), layout_hash())
    );
}

#[test]
fn damaged_tables_are_refused() {
    fn refused_with(spoil: impl Fn(&View), part: &str) {
        let mut writer = writer();
        populate(&mut writer);
        writer.publish();
        spoil(&writer.view());
        let error =
            TableWriter::adopt(writer.into_backing(), NoReaders).err().expect("adopted all the same").to_string();
        assert!(error.contains(part), "{error}");
    }
    let refused = |spoil: fn(&Root), part| refused_with(|view| spoil(&view.roots()[0]), part);
    refused(|root| root.family.store(9), "family 9");
    refused(|root| root.direct[0].store(1 << 31), "node 0");
    refused(|root| root.direct[0].store(u32::MAX), "is not there");
    refused(|root| root.direct[0].store(1 << 29), "next hop 536870912");
    refused(|root| root.direct[0].store(1 << 30 | 1 << 29), "group 536870912");
    refused(|root| root.direct[0].store(root.direct[0xc000].load()), "two routes");
    refused(|root| root.direct[0xc000].store(root.direct[0xc000].load() | 1 << 30), "contradicts itself");
    refused(|root| root.default.store(1 << 31 | 1), "deeper");
    refused_with(|view| [5, 9].iter().for_each(|slot| view.ports()[*slot].ifindex.store(77)), "interface 77");
}

#[test]
fn a_tunnels_way_is_that_of_its_other_end() {
    way_of_a_tunnel(Family::V4, ["192.0.2.1", "198.51.100.7", "198.51.100.8"], ("198.51.100.0", 24, 32), "0.0.0.0");
    way_of_a_tunnel(Family::V6, ["2001:db8::1", "2001:db8:1::7", "2001:db8:1::8"], ("2001:db8:1::", 48, 128), "::");
}

/// Our end and two others, a prefix with its length and that of an address, and the family's first address
fn way_of_a_tunnel(family: Family, ends: [&str; 3], (prefix, len, whole): (&str, u8, u8), zero: &str) {
    let [near, far, other] = ends.map(|end| end.parse::<IpAddr>().unwrap());
    let [prefix, zero] = [prefix, zero].map(|address| address.parse::<IpAddr>().unwrap());
    let root = MAIN_ROOT[family as usize];
    let mut writer = writer();
    let slot = writer.alloc_upper_port(9).unwrap();
    let [first, second] = [1, 2].map(|n| writer.alloc_nexthop(identity(n)).unwrap());
    let way = |writer: &Writer| Word(writer.view().ports()[slot as usize].tunnel.way.load()).kind();
    let tunnel = |remote: IpAddr| TunnelValue {
        local: near,
        remote,
        input_key: None,
        output_key: None,
        input_checksum: false,
        output_checksum: false,
        ttl: 64,
        class: Some(0),
        label: Label::NONE,
        limit: None,
        link: 0,
        policy: None,
    };
    writer.set_port(slot, &PortValue::plain(slot));
    writer.set_tunnel(slot, Some(&tunnel(far)));
    assert_eq!(way(&writer), Kind::None);
    let leaf = |index| to(Leaf::nexthop(index));
    writer.route_set(root, prefix, len, leaf(first)).unwrap();
    assert_eq!(way(&writer), Kind::None, "nothing is published yet");
    writer.publish();
    assert_eq!(way(&writer), Kind::Nexthop(first));
    writer.route_set(root, far, whole, leaf(second)).unwrap();
    writer.publish();
    assert_eq!(way(&writer), Kind::Nexthop(second), "the longest match");
    writer.set_tunnel(slot, Some(&tunnel(other)));
    assert_eq!(way(&writer), Kind::Nexthop(first), "another end");
    writer.route_remove(root, prefix, len).unwrap();
    writer.free_nexthop(first);
    let group = writer.alloc_group(&[(second, 1)]).unwrap();
    writer.route_set(root, zero, 0, to(Leaf::group(group))).unwrap();
    writer.publish();
    assert_eq!(way(&writer), Kind::Group(group), "the default route");

    // The last writer died between a route and the way.
    writer.view().ports()[slot as usize].tunnel.way.store(Leaf::nexthop(first).unwrap().word().0);
    let mut writer = TableWriter::adopt(writer.into_backing(), NoReaders).unwrap();
    assert_eq!(way(&writer), Kind::Group(group), "what is published still");
    writer.publish();
    assert_eq!(way(&writer), Kind::None, "no route was set");
    writer.set_tunnel(slot, None);
    writer.route_set(root, prefix, len, leaf(second)).unwrap();
    writer.publish();
    assert_eq!(way(&writer), Kind::None, "no tunnel any more");
}
