//! The decoders on recorded bytes: each `tests/recorded/<name>.hex` holds the messages of one dump (a line each: type,
//! then payload), `<name>.txt` what they mean. `TOWPATH_RECORD=1 cargo test -p towpath-cm --test decode` makes the
//! latter anew.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use towpath_cm::decode::{self, rtm};

fn meaning(kind: u16, payload: &[u8]) -> String {
    match kind {
        rtm::NEWLINK => format!("{:?}", decode::link::parse(payload)),
        rtm::NEWADDR => format!("{:?}", decode::address::parse(payload)),
        rtm::NEWROUTE => format!("{:?}", decode::route::parse(payload)),
        rtm::NEWNEIGH => format!("{:?}", decode::neighbour::parse(payload)),
        rtm::NEWNETCONF => format!("{:?}", decode::netconf::parse(payload)),
        rtm::NEWNEXTHOP => format!("{:?}", decode::nexthop::parse(payload)),
        other => panic!("message type {other} in a recording"),
    }
}

/// Type and payload of each recorded message.
fn messages(text: &str) -> Vec<(u16, Vec<u8>)> {
    let message = |line: &str| {
        let (kind, hex) = line.split_once(' ').expect("type and bytes");
        let digit = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).expect("hexadecimal");
        (kind.parse().expect("type"), hex.as_bytes().chunks(2).map(digit).collect())
    };
    text.lines().map(message).collect()
}

fn recordings() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded");
    let files = std::fs::read_dir(folder).expect("recordings").map(|entry| entry.expect("file").path());
    let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|ext| ext == "hex")).collect();
    files.sort();
    files
}

#[test]
fn recorded_messages_mean_what_they_meant() {
    let files = recordings();
    assert!(files.len() >= 6, "recordings are missing");
    for file in files {
        let mut text = String::new();
        for (kind, payload) in messages(&std::fs::read_to_string(&file).unwrap()) {
            writeln!(text, "{}", meaning(kind, &payload)).unwrap();
        }
        let expected = file.with_extension("txt");
        if std::env::var_os("TOWPATH_RECORD").is_some() {
            std::fs::write(&expected, &text).unwrap();
        }
        let expected = std::fs::read_to_string(&expected).unwrap();
        for (now, then) in text.lines().zip(expected.lines()) {
            assert_eq!(now, then, "{}", file.display());
        }
        assert_eq!(text.lines().count(), expected.lines().count(), "{}", file.display());
    }
}

/// Every truncation and every changed byte gives an answer or an error, never a panic.
#[test]
fn damaged_messages_do_no_harm() {
    for file in recordings() {
        for (kind, payload) in messages(&std::fs::read_to_string(&file).unwrap()) {
            for len in 0..payload.len() {
                meaning(kind, &payload[..len]);
            }
            for at in 0..payload.len() {
                for value in [0, 1, 3, 0x7f, 0xff] {
                    let mut damaged = payload.clone();
                    damaged[at] = value;
                    meaning(kind, &damaged);
                }
            }
        }
    }
}

fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::from((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A VLAN as Linux describes it (net/8021q/vlan_netlink.c, vlan_fill_info), put together by hand.
#[test]
fn vlans() {
    use towpath_fpc::PortKind;
    let vlan = |extra: &[u8], flags: u32, more: &[u8]| {
        let flags = [flags.to_ne_bytes(), [0xff; 4]].concat();
        let mut data = [attr(5, &0x88a8u16.to_be_bytes()), attr(1, &100u16.to_ne_bytes()), attr(2, &flags)].concat();
        data.extend(more);
        let info = [attr(1, b"vlan\0"), attr(2, &data)].concat();
        let mut message = vec![0, 0, 1, 0, 9, 0, 0, 0, 0x43, 0, 1, 0, 0, 0, 0, 0];
        message.extend([attr(3, b"v0.100\0"), attr(5, &4u32.to_ne_bytes()), attr(18, &info)].concat());
        message.extend(extra);
        decode::link::parse(&message).unwrap().unwrap()
    };
    let plain = vlan(&[], 1, &[]);
    assert_eq!(plain.kind, PortKind::Vlan { lower: 4, protocol: 0x88a8, id: 100 });
    assert_eq!((plain.ifindex, plain.name.as_str(), plain.up, plain.carrier), (9, "v0.100", true, true));
    assert_eq!(plain.unsupported, None);
    assert_eq!(vlan(&attr(37, &[0; 4]), 1, &[]).kind, PortKind::Other, "its lower device is in another namespace");
    assert_eq!(vlan(&[], 3, &[]).unsupported.as_deref(), Some("VLAN flags 0x3"));
    let qos = attr(3, &attr(1, &[0, 0, 0, 0, 5, 0, 0, 0]));
    assert_eq!(vlan(&[], 1, &qos).unsupported.as_deref(), Some("VLAN egress-qos-map"));
}

/// A GRE tunnel as Linux describes it (net/ipv4/ip_gre.c, ipgre_fill_info), put together by hand.
#[test]
fn tunnels() {
    use towpath_fpc::{GreOptions, PortKind, Tunnel};
    let gre = |flags: [u16; 2], more: &[u8]| {
        let ends = [attr(6, &[192, 0, 2, 1]), attr(7, &[198, 51, 100, 2])].concat();
        let flags = [attr(2, &flags[0].to_be_bytes()), attr(3, &flags[1].to_be_bytes())].concat();
        let keys = [attr(4, &7u32.to_be_bytes()), attr(5, &9u32.to_be_bytes())].concat();
        let rest = [attr(1, &3u32.to_ne_bytes()), attr(8, &[64]), attr(9, &[1]), attr(10, &[1])].concat();
        let info = [attr(1, b"gre\0"), attr(2, &[&ends, &flags, &keys, &rest, more].concat())].concat();
        // ARPHRD_IPGRE, interface 9
        let mut message = vec![0, 0, 0x0a, 3, 9, 0, 0, 0, 0xd1, 0, 1, 0, 0, 0, 0, 0];
        message.extend([attr(3, b"gre1\0"), attr(18, &info)].concat());
        decode::link::parse(&message).unwrap().unwrap()
    };
    let tunnel = |input, output| {
        let [local, remote] = ["192.0.2.1", "198.51.100.2"].map(|address| address.parse().unwrap());
        PortKind::Tunnel(Tunnel {
            local,
            remote,
            link: 3,
            input,
            output,
            ttl: 64,
            class: None,
            label: Some(0),
            limit: None,
        })
    };
    let none = GreOptions::default();
    let cases = [
        ([0, 0], none, none),
        ([0x2000, 0x2000], GreOptions { key: Some(7), ..none }, GreOptions { key: Some(9), ..none }),
        ([0x8000, 0x1000], GreOptions { checksum: true, ..none }, GreOptions { sequence: true, ..none }),
        (
            [0x1000, 0xb000],
            GreOptions { sequence: true, ..none },
            GreOptions { key: Some(9), checksum: true, sequence: true },
        ),
    ];
    for (flags, input, output) in cases {
        let link = gre(flags, &[]);
        assert_eq!((link.kind, link.unsupported), (tunnel(input, output), None), "{flags:x?}");
    }
    assert_eq!(gre([0, 0x4000], &[]).unsupported.as_deref(), Some("GRE flags 0x4000"));
    for (more, what) in [
        (attr(10, &[0]), "GRE with nopmtudisc"),
        (attr(14, &1u16.to_ne_bytes()), "GRE in UDP"),
        (attr(19, &[1]), "GRE with ignore-df"),
        (attr(20, &1u32.to_ne_bytes()), "GRE with fwmark"),
        (attr(99, &[]), "GRE attribute 99"),
    ] {
        assert_eq!(gre([0, 0], &more).unsupported.as_deref(), Some(what));
    }
    assert_eq!(gre([0, 0], &attr(18, &[])).kind, PortKind::Other, "its ends are its packets'");
}

/// A GRE tunnel over IPv6 as Linux describes it (net/ipv6/ip6_gre.c, ip6gre_fill_info), put together by hand.
#[test]
fn tunnels_over_ipv6() {
    use towpath_fpc::{GreOptions, PortKind, Tunnel};
    let ends = ["2001:db8::1", "2001:db8::2"].map(|address| address.parse::<std::net::Ipv6Addr>().unwrap());
    let gre = |settings: u32, more: &[u8]| {
        let ends = [attr(6, &ends[0].octets()), attr(7, &ends[1].octets())].concat();
        let flags = [attr(2, &0x2000u16.to_be_bytes()), attr(3, &0x8000u16.to_be_bytes())].concat();
        let keys = [attr(4, &7u32.to_be_bytes()), attr(5, &0u32.to_be_bytes())].concat();
        let rest = [attr(1, &3u32.to_ne_bytes()), attr(8, &[64]), attr(11, &[4])].concat();
        let six = [attr(12, &0x0b8_54321u32.to_be_bytes()), attr(13, &settings.to_ne_bytes())].concat();
        let others = [attr(20, &0u32.to_ne_bytes()), attr(14, &0u16.to_ne_bytes()), attr(16, &[0; 2])].concat();
        let data = [&ends, &flags, &keys, &rest, &six, &others, more].concat();
        let info = [attr(1, b"ip6gre\0"), attr(2, &data)].concat();
        // ARPHRD_IP6GRE, interface 9
        let mut message = vec![0, 0, 0x37, 3, 9, 0, 0, 0, 0xd1, 0, 1, 0, 0, 0, 0, 0];
        message.extend([attr(3, b"gre6\0"), attr(18, &info)].concat());
        decode::link::parse(&message).unwrap().unwrap()
    };
    let none = GreOptions::default();
    let tunnel = Tunnel {
        local: ends[0].into(),
        remote: ends[1].into(),
        link: 3,
        input: GreOptions { key: Some(7), ..none },
        output: GreOptions { checksum: true, ..none },
        ttl: 64,
        class: Some(0xb8),
        label: Some(0x54321),
        limit: Some(4),
    };
    for (settings, expected) in [
        (0, tunnel),
        (0x3_0000, tunnel),
        (0x4_0040, tunnel),
        (1, Tunnel { limit: None, ..tunnel }),
        (2, Tunnel { class: None, ..tunnel }),
        (4, Tunnel { label: None, ..tunnel }),
        (7, Tunnel { class: None, label: None, limit: None, ..tunnel }),
    ] {
        let link = gre(settings, &[]);
        assert_eq!((link.kind, link.unsupported), (PortKind::Tunnel(expected), None), "{settings:x}");
    }
    for (settings, more, what) in [
        (0x10, vec![], "GRE with dscp inherit"),
        (0x20, vec![], "GRE with fwmark inherit"),
        (0x8, vec![], "GRE with flags 0x8"),
        (0, attr(20, &1u32.to_ne_bytes()), "GRE with fwmark"),
        (0, attr(14, &1u16.to_ne_bytes()), "GRE in UDP"),
        (0, attr(9, &[1]), "GRE attribute 9"),
    ] {
        assert_eq!(gre(settings, &more).unsupported.as_deref(), Some(what));
    }
    assert_eq!(gre(0, &attr(18, &[])).kind, PortKind::Other, "its ends are its packets'");
}
