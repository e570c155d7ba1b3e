use super::*;
use proptest::prelude::*;
use towpath_filter::instruction;

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
}

fn hop() -> impl Strategy<Value = Hop> {
    (any::<u32>(), proptest::option::of(ip()), any::<u16>(), any::<u32>())
        .prop_map(|(ifindex, gateway, weight, flags)| Hop { ifindex, gateway, weight, flags })
}

fn neighbour_key() -> impl Strategy<Value = NeighbourKey> {
    (any::<u32>(), ip()).prop_map(|(ifindex, address)| NeighbourKey { ifindex, address })
}

fn source() -> impl Strategy<Value = PolicySource> {
    use PolicySource::*;
    prop::sample::select(vec![Nftables, Xtables, Xfrm, Rules, Tc, Capture, Sysctl, Ports, Tunnels])
}

fn snapshot() -> impl Strategy<Value = Snapshot> {
    prop_oneof![
        Just(Snapshot::Ports),
        family().prop_map(Snapshot::Addresses),
        family().prop_map(Snapshot::Neighbours),
        Just(Snapshot::Nexthops),
        family().prop_map(Snapshot::Routes),
        Just(Snapshot::Flows),
        source().prop_map(Snapshot::Policies),
    ]
}

fn listener() -> impl Strategy<Value = Listener> {
    prop_oneof![
        Just(Listener::Interfaces),
        Just(Listener::Routes),
        Just(Listener::Connections),
        source().prop_map(Listener::Policies),
    ]
}

fn gre_options() -> impl Strategy<Value = GreOptions> {
    any::<(Option<u32>, bool, bool)>().prop_map(|(key, checksum, sequence)| GreOptions { key, checksum, sequence })
}

fn tunnel() -> impl Strategy<Value = Tunnel> {
    let outside = any::<(u32, u8, Option<u8>, Option<u32>, Option<u8>)>();
    (ip(), ip(), gre_options(), gre_options(), outside).prop_map(
        |(local, remote, input, output, (link, ttl, class, label, limit))| Tunnel {
            local,
            remote,
            link,
            input,
            output,
            ttl,
            class,
            label,
            limit,
        },
    )
}

fn port() -> impl Strategy<Value = Port> {
    let kind = prop_oneof![
        Just(PortKind::Ethernet),
        Just(PortKind::Virtual),
        any::<(u32, u16, u16)>().prop_map(|(lower, protocol, id)| PortKind::Vlan { lower, protocol, id }),
        Just(PortKind::Loopback),
        Just(PortKind::Other),
        tunnel().prop_map(PortKind::Tunnel),
    ];
    let settings =
        any::<(bool, bool)>().prop_map(|(forwarding, ignore_linkdown)| PortFamily { forwarding, ignore_linkdown });
    let text = proptest::option::of(".{0,20}");
    let vrf = (any::<u32>(), ".{0,15}", any::<u32>()).prop_map(|(ifindex, name, table)| Vrf { ifindex, name, table });
    let vrf = proptest::option::of(vrf);
    (
        any::<(u32, Option<[u8; 6]>, u32, u32, u8)>(),
        ".{0,15}",
        kind,
        any::<[bool; 5]>(),
        [settings.clone(), settings],
        text,
        vrf,
    )
        .prop_map(|((ifindex, mac, mtu, master, rp_filter), name, kind, b, family, unsupported, vrf)| Port {
            ifindex,
            name,
            mac,
            mtu,
            kind,
            up: b[0],
            carrier: b[1],
            master,
            vrf,
            promiscuous: b[2],
            family,
            send_redirects: b[3],
            rp_filter,
            route_localnet: b[4],
            unsupported,
        })
}

fn route_key() -> impl Strategy<Value = RouteKey> {
    (any::<u32>(), ip(), 0u8..=128, any::<u32>(), any::<u8>()).prop_map(|(table, address, len, priority, tos)| {
        let len = if address.is_ipv4() { len % 33 } else { len };
        RouteKey { table, prefix: Prefix::new(address, len).unwrap(), priority, tos }
    })
}

fn route() -> impl Strategy<Value = Route> {
    let via = prop_oneof![prop::collection::vec(hop(), 0..5).prop_map(Via::Hops), any::<u32>().prop_map(Via::Object)];
    (route_key(), any::<(u8, u8, u32, bool)>(), via).prop_map(|(key, (kind, protocol, mtu, unsupported), via)| Route {
        key,
        kind,
        protocol,
        via,
        mtu,
        unsupported,
    })
}

fn object() -> impl Strategy<Value = NexthopObject> {
    let kind = prop_oneof![
        hop().prop_map(NexthopObjectKind::Hop),
        Just(NexthopObjectKind::Blackhole),
        prop::collection::vec(any::<(u32, u16)>(), 0..5).prop_map(NexthopObjectKind::Group),
        Just(NexthopObjectKind::Unsupported),
    ];
    (any::<u32>(), kind).prop_map(|(id, kind)| NexthopObject { id, kind })
}

fn rule() -> impl Strategy<Value = Rule> {
    let prefix = || proptest::option::of(route_key().prop_map(|key| key.prefix));
    let action = prop_oneof![
        any::<u32>().prop_map(RuleAction::Lookup),
        any::<(u32, u8)>().prop_map(|(table, len)| RuleAction::LookupBeyond(table, len)),
        Just(RuleAction::Vrf),
        Just(RuleAction::Skip),
        Just(RuleAction::Unknown),
    ];
    (any::<u32>(), proptest::option::of(".{0,15}"), prefix(), prefix(), any::<bool>(), action)
        .prop_map(|(priority, iif, from, to, by_mark, action)| Rule { priority, iif, from, to, by_mark, action })
}

fn policy() -> impl Strategy<Value = Policy> {
    let scope = prop_oneof![
        family().prop_map(Scope::Family),
        (any::<u32>(), proptest::option::of(family())).prop_map(|(i, f)| Scope::Ingress(i, f)),
        (any::<u32>(), proptest::option::of(family())).prop_map(|(i, f)| Scope::Egress(i, f)),
    ];
    let filter = (any::<bool>(), prop::collection::vec(any::<u32>(), 0..4)).prop_map(|(network, numbers)| {
        // A = number, over and over; then the end.
        let code = numbers.into_iter().map(u64::from).chain([instruction(0x16, 0, 0, 0)]).collect();
        let layer = if network { Layer::Network } else { Layer::Link };
        Filter::new(layer, code).expect("a filter that can be run")
    });
    let reason = prop::sample::select(Reason::ALL);
    let rules = proptest::option::of(prop::collection::vec(rule(), 0..4));
    let told = (source(), scope, reason, ".{0,40}", proptest::option::of(filter), any::<Option<u32>>(), rules);
    let in_vrfs = prop::sample::select(vec![InVrfs::Stay, InVrfs::ByPort, InVrfs::ByVrf]);
    (told, in_vrfs, any::<bool>()).prop_map(
        |((source, scope, reason, detail, filter, flows, rules), in_vrfs, momentary)| Policy {
            source,
            scope,
            reason,
            detail,
            filter,
            flows,
            in_vrfs,
            rules,
            momentary,
        },
    )
}

fn tuple() -> impl Strategy<Value = Tuple> {
    (ip(), ip(), any::<(u16, u16, u8)>()).prop_map(
        |(source, destination, (source_port, destination_port, protocol))| Tuple {
            source,
            destination,
            source_port,
            destination_port,
            protocol,
        },
    )
}

fn connection() -> impl Strategy<Value = Connection> {
    let ends = prop_oneof![
        any::<[[u8; 4]; 4]>().prop_map(|addresses| addresses.map(IpAddr::from)),
        any::<[[u8; 16]; 4]>().prop_map(|addresses| addresses.map(IpAddr::from)),
    ];
    (ends, any::<[u16; 4]>(), prop::sample::select(vec![6, 17])).prop_map(|([a, b, c, d], ports, protocol)| {
        let [source_port, destination_port, from, to] = ports;
        let original = Tuple { source: a, destination: b, source_port, destination_port, protocol };
        let reply = Tuple { source: c, destination: d, source_port: from, destination_port: to, protocol };
        Connection::new(original, reply).expect("one family and protocol")
    })
}

fn alarm_id() -> impl Strategy<Value = AlarmId> {
    (source(), any::<u64>()).prop_map(|(source, number)| AlarmId { source, number })
}

fn packet() -> impl Strategy<Value = Packet> {
    let address = (any::<u32>(), ip(), any::<u8>())
        .prop_map(|(ifindex, address, prefix_len)| Address { ifindex, address, prefix_len })
        .boxed();
    let neighbour = (neighbour_key(), any::<(Option<[u8; 6]>, u16)>()).prop_map(|(key, (lladdr, state))| Neighbour {
        key,
        lladdr,
        state,
    });
    let message = prop_oneof![
        snapshot().prop_map(Message::SnapshotBegin),
        snapshot().prop_map(Message::SnapshotEnd),
        port().prop_map(Message::Port),
        any::<u32>().prop_map(Message::PortDelete),
        address.clone().prop_map(Message::Address),
        address.prop_map(Message::AddressDelete),
        neighbour.prop_map(Message::Neighbour),
        neighbour_key().prop_map(Message::NeighbourDelete),
        route().prop_map(Message::Route),
        route_key().prop_map(Message::RouteDelete),
        object().prop_map(Message::Nexthop),
        any::<u32>().prop_map(Message::NexthopDelete),
        connection().prop_map(Message::Flow),
        tuple().prop_map(Message::FlowDelete),
        policy().prop_map(Message::Policy),
        (alarm_id(), prop::collection::vec(policy(), 0..4))
            .prop_map(|(id, policies)| Message::Alarm(Alarm { id, policies })),
        alarm_id().prop_map(Message::AlarmOver),
        any::<u64>().prop_map(Message::Heartbeat),
        listener().prop_map(Message::Lost),
        (family(), any::<(u8, bool)>()).prop_map(|(family, (hash_policy, flow_labels))| Message::FamilySettings(
            FamilySettings { family, hash_policy, flow_labels }
        )),
    ];
    prop_oneof![
        1 => any::<(u32, u16)>().prop_map(|(magic, version)| Packet::Hello(Hello { magic, version })),
        1 => ".{0,30}".prop_map(Packet::Bye),
        1 => any::<u32>().prop_map(Packet::Ack),
        8 => message.prop_map(Packet::Message),
        1 => prop::collection::vec(neighbour_key(), 0..5).prop_map(|keys| Packet::Feedback(Feedback::Hits(keys))),
        1 => prop::collection::vec(tuple(), 0..5).prop_map(|used| Packet::Feedback(Feedback::FlowsUsed(used))),
        1 => prop::collection::vec(tuple(), 0..5).prop_map(|ahead| Packet::Feedback(Feedback::FlowsAhead(ahead))),
        1 => ".{0,30}".prop_map(|why| Packet::Feedback(Feedback::Resync(why))),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    (any::<(u32, bool)>(), packet()).prop_map(|((sequence, report), packet)| Frame { sequence, report, packet })
}

fn bytes_of(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(frame, &mut bytes).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn round_trip(frame in frame(), rest in any::<[u8; 3]>()) {
        let mut bytes = bytes_of(&frame);
        let length = bytes.len();
        bytes.extend(rest);
        prop_assert_eq!(decode(&bytes), Ok(Some((frame, length))));
    }

    #[test]
    fn every_truncation_is_seen(frame in frame()) {
        let bytes = bytes_of(&frame);
        for end in 0..bytes.len() {
            prop_assert_eq!(decode(&bytes[..end]), Ok(None), "an incomplete frame is waited for");
            if end >= HEADER {
                let mut short = bytes[..end].to_vec();
                short[4..8].copy_from_slice(&((end - HEADER) as u32).to_be_bytes());
                let truncated = matches!(decode(&short), Err(DecodeError::Truncated { offset, .. }) if offset <= end - HEADER);
                prop_assert!(truncated, "{:?}", decode(&short));
            }
        }
    }

    /// Whatever decodes is what `encode` would have written: there is one form of each message.
    #[test]
    fn mutated_frames_never_panic_and_have_one_form(frame in frame(), at in any::<prop::sample::Index>(), value in any::<u8>()) {
        let mut bytes = bytes_of(&frame);
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(Some((decoded, length))) = decode(&bytes) {
            prop_assert_eq!(bytes_of(&decoded), &bytes[..length]);
        }
    }

    #[test]
    fn random_bodies_never_panic(kind in prop_oneof![0u16..4, 14u16..36, 63u16..68], body in prop::collection::vec(any::<u8>(), 0..80)) {
        let mut bytes = Vec::new();
        kind.put(&mut bytes);
        0u16.put(&mut bytes);
        (body.len() as u32).put(&mut bytes);
        7u32.put(&mut bytes);
        bytes.extend(&body);
        if let Ok(Some((decoded, length))) = decode(&bytes) {
            prop_assert_eq!(bytes_of(&decoded), &bytes[..length]);
        }
    }
}

fn raw(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = [kind.to_be_bytes(), flags.to_be_bytes()].concat();
    bytes.extend((body.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, 9]);
    bytes.extend(body);
    bytes
}

#[test]
fn the_layout_is_as_documented() {
    let key = RouteKey { table: 254, prefix: Prefix::new([192, 0, 2, 0].into(), 24).unwrap(), priority: 20, tos: 0 };
    let frame = Frame { sequence: 9, report: true, packet: Packet::Message(Message::RouteDelete(key)) };
    let body = [0, 0, 0, 254, 4, 192, 0, 2, 0, 24, 0, 0, 0, 20, 0];
    assert_eq!(bytes_of(&frame), raw(25, 1, &body));
}

#[test]
fn errors_name_field_and_offset() {
    let failed = |kind, flags, body: &[u8]| decode(&raw(kind, flags, body)).unwrap_err();
    assert_eq!(failed(999, 0, &[]), DecodeError::UnknownType(999));
    assert_eq!(failed(3, 2, &[0; 4]), DecodeError::UnknownFlags(2));
    assert_eq!(failed(3, 0, &[0; 6]), DecodeError::Trailing { offset: 4, excess: 2 });
    assert_eq!(
        failed(23, 0, &[0, 0, 0, 1, 5]),
        DecodeError::BadValue { field: "NeighbourKey.address", offset: 4, value: 5 }
    );
    assert_eq!(failed(23, 0, &[0, 0, 0, 1, 4, 1]), DecodeError::Truncated { field: "NeighbourKey.address", offset: 5 });
    assert_eq!(failed(16, 0, &[9]), DecodeError::BadValue { field: "Snapshot", offset: 0, value: 9 });
    let host_bits = [0, 0, 0, 254, 4, 192, 0, 2, 1, 24, 0, 0, 0, 20, 0];
    assert_eq!(failed(25, 0, &host_bits), DecodeError::BadValue { field: "RouteKey.prefix", offset: 9, value: 24 });
    let original = [4, 192, 0, 2, 1, 4, 192, 0, 2, 2, 0, 80, 0, 81, 6];
    let reply = |protocol| [4, 192, 0, 2, 2, 4, 192, 0, 2, 1, 0, 81, 0, 80, protocol];
    assert!(decode(&raw(32, 0, &[original, reply(6)].concat())).is_ok());
    assert_eq!(
        failed(32, 0, &[original, reply(17)].concat()),
        DecodeError::BadValue { field: "Message::Flow", offset: 29, value: 17 }
    );
    let huge_count = [0xff; 4];
    assert_eq!(failed(64, 0, &huge_count), DecodeError::Truncated { field: "Feedback::Hits", offset: 4 });
    let mut long = raw(2, 0, &[]);
    long[4] = 0xff;
    assert_eq!(decode(&long), Err(DecodeError::TooLong(0xff00_0000)));
    let frame = Frame { sequence: 0, report: false, packet: Packet::Bye("x".repeat(MAX_BODY)) };
    assert_eq!(encode(&frame, &mut Vec::new()), Err(EncodeError(MAX_BODY + 4)));
}
