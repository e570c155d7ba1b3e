//! FPC frames: what decodes is what would have been written.

use std::net::IpAddr;
use towpath_filter::{Filter, Layer, instruction};
use towpath_fpc::codec::{Frame, Hello, Packet, decode, encode};
use towpath_fpc::*;
use towpath_tables::flow::{Connection, Tuple};
use towpath_tables::{Reason, record::Family};

pub fn run(mut bytes: &[u8]) {
    while let Ok(Some((frame, len))) = decode(bytes) {
        let mut again = Vec::new();
        encode(&frame, &mut again).expect("what was decoded can be encoded");
        let (taken, rest) = bytes.split_at(len);
        assert_eq!(again, taken, "{frame:?} has one form");
        bytes = rest;
    }
}

/// A router's description, and changes of it.
pub fn seeds() -> Vec<Vec<u8>> {
    let whole = [router(), policies()].concat();
    let ended = [
        Message::PortDelete(2),
        Message::NeighbourDelete(key(2, "198.51.100.1")),
        Message::RouteDelete(route("203.0.113.0/24", via(&[hop(2, "198.51.100.1")])).key),
        Message::NexthopDelete(10),
        Message::FlowDelete(connection().original),
        Message::AddressDelete(address()),
        Message::AlarmOver(ALARM),
        Message::Heartbeat(1),
        Message::Lost(Listener::Policies(PolicySource::Tc)),
    ];
    let hello = [Packet::Hello(Hello { magic: codec::MAGIC, version: codec::VERSION })];
    let rest = [
        Packet::Ack(1),
        Packet::Bye("done".into()),
        Packet::Feedback(Feedback::Hits(vec![key(1, "2001:db8::2")])),
        Packet::Feedback(Feedback::FlowsUsed(vec![connection().original])),
        Packet::Feedback(Feedback::Resync("lost".into())),
    ];
    let of = |messages: &[Message]| written(messages.iter().cloned().map(Packet::Message));
    let again = |class, messages: Vec<Message>| {
        of(&[vec![Message::SnapshotBegin(class)], messages, vec![Message::SnapshotEnd(class)]].concat())
    };
    vec![
        of(&whole),
        of(&[whole.clone(), ended.to_vec()].concat()),
        [of(&whole), again(Snapshot::Routes(Family::V4), vec![])].concat(),
        [of(&whole), again(Snapshot::Flows, vec![])].concat(),
        [of(&whole), again(Snapshot::Ports, ports()[..1].to_vec())].concat(),
        again(Snapshot::Policies(PolicySource::Nftables), policies()),
        written(hello.into_iter().chain(rest)),
    ]
}

/// A router without policies.
pub fn router() -> Vec<Message> {
    [ports(), neighbours(), routes(), nexthops(), flows()].concat()
}

/// Each asks for an acknowledgement.
fn written(packets: impl IntoIterator<Item = Packet>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (sequence, packet) in (1..).zip(packets) {
        encode(&Frame { sequence, report: true, packet }, &mut bytes).expect("a short message");
    }
    bytes
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn key(ifindex: u32, address: &str) -> NeighbourKey {
    NeighbourKey { ifindex, address: ip(address) }
}

fn port(ifindex: u32, kind: PortKind) -> Message {
    Message::Port(Port {
        ifindex,
        name: format!("port{ifindex}"),
        mac: Some([2, 0, 0, 0, 0, ifindex as u8]),
        mtu: 1500,
        kind,
        up: true,
        carrier: true,
        master: 0,
        vrf: None,
        promiscuous: false,
        family: [PortFamily { forwarding: true, ignore_linkdown: false }; 2],
        send_redirects: false,
        rp_filter: 0,
        route_localnet: false,
        unsupported: None,
    })
}

fn ports() -> Vec<Message> {
    let tunnel = Tunnel {
        local: ip("198.51.100.2"),
        remote: ip("203.0.113.9"),
        link: 0,
        input: GreOptions { key: Some(7), checksum: true, sequence: false },
        output: GreOptions { sequence: true, ..GreOptions::default() },
        ttl: 64,
        class: None,
        label: Some(1),
        limit: Some(4),
    };
    vec![
        port(1, PortKind::Ethernet),
        port(2, PortKind::Virtual),
        port(3, PortKind::Vlan { lower: 1, protocol: 0x8100, id: 10 }),
        port(4, PortKind::Tunnel(tunnel)),
        port(5, PortKind::Loopback),
        port(6, PortKind::Other),
    ]
}

fn address() -> Address {
    Address { ifindex: 1, address: ip("192.0.2.1"), prefix_len: 24 }
}

fn neighbours() -> Vec<Message> {
    let neighbour = |ifindex, address| {
        Message::Neighbour(Neighbour { key: key(ifindex, address), lladdr: Some([2, 0, 0, 0, 1, 1]), state: 2 })
    };
    vec![Message::Address(address()), neighbour(2, "198.51.100.1"), neighbour(1, "2001:db8::2")]
}

fn hop(ifindex: u32, gateway: &str) -> Hop {
    Hop { ifindex, gateway: (!gateway.is_empty()).then(|| ip(gateway)), weight: 1, flags: 0 }
}

fn via(hops: &[Hop]) -> Via {
    Via::Hops(hops.to_vec())
}

fn route(prefix: &str, via: Via) -> Route {
    let (address, len) = prefix.split_once('/').expect("a prefix");
    let prefix = Prefix::new(ip(address), len.parse().expect("a length")).expect("a prefix");
    let key = RouteKey { table: 254, prefix, priority: 0, tos: 0 };
    Route { key, kind: 1, protocol: 3, via, mtu: 0, unsupported: false }
}

fn routes() -> Vec<Message> {
    [
        route("192.0.2.0/24", via(&[hop(1, "")])),
        route("198.51.100.0/24", via(&[hop(2, "")])),
        route("203.0.113.0/24", via(&[hop(2, "198.51.100.1"), hop(1, "192.0.2.9")])),
        route("10.0.0.0/8", Via::Object(11)),
        route("10.1.0.0/16", via(&[hop(4, "")])),
        route("2001:db8:9::/48", via(&[hop(1, "2001:db8::2")])),
    ]
    .map(Message::Route)
    .to_vec()
}

fn nexthops() -> Vec<Message> {
    [
        (10, NexthopObjectKind::Hop(hop(2, "198.51.100.1"))),
        (11, NexthopObjectKind::Group(vec![(10, 1), (12, 3)])),
        (12, NexthopObjectKind::Blackhole),
        (13, NexthopObjectKind::Unsupported),
    ]
    .map(|(id, kind)| Message::Nexthop(NexthopObject { id, kind }))
    .to_vec()
}

fn connection() -> Connection {
    let tuple = |source, destination, source_port, destination_port| Tuple {
        source: ip(source),
        destination: ip(destination),
        source_port,
        destination_port,
        protocol: 6,
    };
    Connection {
        original: tuple("192.0.2.7", "203.0.113.5", 40000, 80),
        reply: tuple("203.0.113.5", "198.51.100.2", 80, 1024),
    }
}

fn flows() -> Vec<Message> {
    vec![Message::Flow(connection()), Message::Heartbeat(0)]
}

const ALARM: AlarmId = AlarmId { source: PolicySource::Nftables, number: 5 };

fn policies() -> Vec<Message> {
    let matching = Filter::new(Layer::Link, vec![instruction(6, 0, 0, 1)]).expect("a filter");
    let policy = |scope, filter, flows| Policy {
        filter,
        flows,
        ..Policy::new(PolicySource::Nftables, scope, Reason::PolicyNetfilter, "a chain")
    };
    vec![
        Message::Policy(policy(Scope::Ingress(1, Some(Family::V4)), None, Some(3))),
        Message::Policy(policy(Scope::Egress(2, None), Some(matching), None)),
        Message::Alarm(Alarm { id: ALARM, policies: vec![policy(Scope::Family(Family::V6), None, None)] }),
        Message::FamilySettings(FamilySettings { family: Family::V4, hash_policy: 1, flow_labels: false }),
    ]
}
