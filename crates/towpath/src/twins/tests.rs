use super::*;
use towpath_fpc::{
    Address, Alarm, FamilySettings, GreOptions, Hop, Neighbour, NeighbourKey, NexthopObject, NexthopObjectKind,
    PolicySource, PortFamily, Prefix, Route, RouteKey, Tunnel, Via,
};
use towpath_tables::Reason;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn port(ifindex: u32, name: &str) -> Port {
    Port {
        ifindex,
        name: name.into(),
        mac: Some(MAC),
        mtu: 1500,
        kind: PortKind::Ethernet,
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
    }
}

fn twin(ifindex: u32) -> Twin {
    Twin { ifindex, mac: Some(MAC), mtu: 1500, kind: PortKind::Virtual, obstacle: None }
}

/// eth0 and eth1, here 2 and 3, there 12 and 13, of which 12 is known.
fn interpreter() -> Interpreter {
    let twins = [("eth0", 2), ("eth1", 3)].map(|(name, ifindex)| (name.into(), twin(ifindex)));
    let mut interpreter = Interpreter::new(twins.into());
    assert_eq!(take(&mut interpreter, Message::Port(port(12, "eth0"))), [described(port(2, "eth0"))]);
    interpreter
}

/// What frames are like is known where they are.
fn described(port: Port) -> Message {
    Message::Port(Port { kind: PortKind::Virtual, ..port })
}

fn take(interpreter: &mut Interpreter, message: Message) -> Vec<Message> {
    let mut all = Vec::new();
    interpreter.take(message, &mut all).expect("understood");
    all
}

fn hop(ifindex: u32) -> Hop {
    Hop { ifindex, gateway: None, weight: 1, flags: 0 }
}

fn policy(scope: Scope) -> Policy {
    let (source, reason) = (PolicySource::Tc, Reason::PolicyTc);
    Policy { flows: Some(7), ..Policy::new(source, scope, reason, "it") }
}

#[test]
fn every_message_speaks_of_this_hosts_interfaces() {
    let mut interpreter = interpreter();
    let address = |ifindex| Address { ifindex, address: [192, 0, 2, 1].into(), prefix_len: 24 };
    let key = |ifindex| NeighbourKey { ifindex, address: [192, 0, 2, 2].into() };
    let neighbour = |ifindex| Neighbour { key: key(ifindex), lladdr: None, state: 2 };
    let prefix = Prefix::new([192, 0, 2, 0].into(), 24).expect("a prefix");
    let route_key = RouteKey { table: 254, prefix, priority: 0, tos: 0 };
    let route = |numbers: [u32; 3]| {
        let via = Via::Hops(numbers.map(hop).into());
        Message::Route(Route { key: route_key, kind: 1, protocol: 4, via, mtu: 0, unsupported: false })
    };
    let object = |ifindex| Message::Nexthop(NexthopObject { id: 1, kind: NexthopObjectKind::Hop(hop(ifindex)) });
    let settings = Message::FamilySettings(FamilySettings { family: Family::V4, hash_policy: 1, flow_labels: false });
    for (there, here) in [
        (Message::Address(address(12)), Message::Address(address(2))),
        (Message::AddressDelete(address(12)), Message::AddressDelete(address(2))),
        (Message::Neighbour(neighbour(12)), Message::Neighbour(neighbour(2))),
        (Message::NeighbourDelete(key(12)), Message::NeighbourDelete(key(2))),
        (route([12, 0, 5]), route([2, 0, 5 | ELSEWHERE])),
        (Message::RouteDelete(route_key), Message::RouteDelete(route_key)),
        (object(12), object(2)),
        (Message::PortDelete(12), Message::PortDelete(2)),
        (Message::PortDelete(2), Message::PortDelete(2 | ELSEWHERE)),
        (settings.clone(), settings),
    ] {
        assert_eq!(take(&mut interpreter, there), [here]);
    }
    let vlan = |lower, ifindex| {
        let kind = PortKind::Vlan { lower, protocol: 0x8100, id: 5 };
        Message::Port(Port { kind, master: lower, ..port(ifindex, "eth0.5") })
    };
    assert_eq!(take(&mut interpreter, vlan(12, 14)), [vlan(2, 14 | ELSEWHERE)]);
    let end = [192, 0, 2, 9].into();
    let tunnel = Tunnel {
        local: end,
        remote: end,
        link: 12,
        input: GreOptions::default(),
        output: GreOptions::default(),
        ttl: 0,
        class: None,
        label: None,
        limit: None,
    };
    let of_kind = |ifindex, kind| Message::Port(Port { kind, ..port(ifindex, "gre1") });
    let here = of_kind(15 | ELSEWHERE, PortKind::Other);
    assert_eq!(take(&mut interpreter, of_kind(15, PortKind::Tunnel(tunnel))), [here]);
}

#[test]
fn hits_speak_of_the_other_hosts() {
    let mut interpreter = interpreter();
    take(&mut interpreter, Message::Port(port(14, "other")));
    let hits = |numbers: &[u32]| {
        let key = |ifindex: &u32| NeighbourKey { ifindex: *ifindex, address: [192, 0, 2, 2].into() };
        Packet::Feedback(Feedback::Hits(numbers.iter().map(key).collect()))
    };
    assert_eq!(interpreter.numbers().outbound(hits(&[2, 3, 14 | ELSEWHERE])), hits(&[12, 14]));
    assert_eq!(interpreter.numbers().outbound(Packet::Ack(2)), Packet::Ack(2));
}

#[test]
fn policies_of_what_is_not_known_yet_are_of_all() {
    let mut interpreter = interpreter();
    let here = |scope| Message::Policy(Policy { flows: None, ..policy(scope) });
    let mut of = |scope| take(&mut interpreter, Message::Policy(policy(scope)));
    assert_eq!(of(Scope::Egress(12, None)), [here(Scope::Egress(2, None))]);
    assert_eq!(of(Scope::Ingress(12, Some(Family::V6))), [here(Scope::Ingress(2, Some(Family::V6)))]);
    assert_eq!(of(Scope::Local(Family::V4)), [here(Scope::Local(Family::V4))]);
    assert_eq!(of(Scope::Egress(13, None)), Family::ALL.map(|family| here(Scope::Family(family))));
    assert_eq!(of(Scope::Ingress(13, Some(Family::V6))), [here(Scope::Family(Family::V6))]);
}

#[test]
fn alarms_are_numbered_by_this_hosts_clock() {
    let mut interpreter = interpreter();
    let id = |number| AlarmId { source: PolicySource::Tc, number };
    let mut raise = |number| {
        let alarm = Alarm { id: id(number), policies: vec![policy(Scope::Egress(13, None))] };
        match take(&mut interpreter, Message::Alarm(alarm)).as_slice() {
            [Message::Alarm(Alarm { id, policies })] => {
                assert_eq!(policies.len(), 2, "of both families");
                *id
            }
            other => panic!("{other:?}"),
        }
    };
    let before = id(clock::exact());
    let (first, second) = (raise(u64::MAX - 1), raise(u64::MAX));
    assert!(before < first && first < second && second <= id(clock::exact() + 2));
    assert_eq!(take(&mut interpreter, Message::AlarmOver(id(5))), [], "of none");
    assert_eq!(take(&mut interpreter, Message::AlarmOver(id(u64::MAX))), [Message::AlarmOver(second)]);
    assert_eq!(take(&mut interpreter, Message::AlarmOver(id(u64::MAX))), [], "they are over");
}

#[test]
fn heartbeats_are_of_the_time_when_they_come() {
    let before = clock::now();
    let taken = take(&mut interpreter(), Message::Heartbeat(u64::MAX));
    let [Message::Heartbeat(at)] = taken[..] else { panic!("{taken:?}") };
    assert!((before..=clock::now()).contains(&at), "{at}");
}

#[test]
fn connections_are_left_out() {
    let mut interpreter = interpreter();
    for message in [Message::SnapshotBegin(Snapshot::Flows), Message::SnapshotEnd(Snapshot::Flows)] {
        assert_eq!(take(&mut interpreter, message), []);
    }
}

#[test]
fn an_interface_that_is_another_one_ends_the_session() {
    for (message, words) in [
        (port(12, "eth1"), "eth1 is another interface"),
        (port(12, "renamed"), "renamed is another interface"),
        (port(22, "eth0"), "eth0 is another interface"),
        (port(ELSEWHERE, "eth7"), "which is none of Linux's"),
    ] {
        let error = interpreter().take(Message::Port(message), &mut Vec::new()).expect_err("the end").to_string();
        assert!(error.contains(words), "{words:?} is missing in {error}");
    }
    assert_eq!(take(&mut interpreter(), Message::Port(port(12, "eth0"))), [described(port(2, "eth0"))]);
}

#[test]
fn a_port_that_is_not_the_same_is_left_to_the_other_host() {
    let of = |there: Port, here: Twin| {
        let mut interpreter = Interpreter::new([("eth0".into(), here)].into());
        match take(&mut interpreter, Message::Port(there)).as_slice() {
            [Message::Port(port)] => port.unsupported.clone().unwrap_or_default(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(of(port(12, "eth0"), twin(2)), "");
    let obstacle = Some("it forwards".to_string());
    for (there, here, words) in [
        (port(12, "eth0"), Twin { obstacle, ..twin(2) }, "it forwards"),
        (port(12, "eth0"), Twin { mtu: 9000, ..twin(2) }, "MTU of 9000"),
        (port(12, "eth0"), Twin { mac: None, ..twin(2) }, "eth0 is "),
        (Port { mac: None, ..port(12, "eth0") }, twin(2), "02:00:00:00:00:01"),
        (Port { kind: PortKind::Other, ..port(12, "eth0") }, twin(2), "no Ethernet interface"),
        (Port { unsupported: Some("own".into()), ..port(12, "eth0") }, Twin { mtu: 9000, ..twin(2) }, "own"),
    ] {
        let why = of(there, here);
        assert!(why.contains(words), "{words:?} is missing in {why}");
    }
}
