//! GRE: what the fast path puts into tunnels and takes out of them, byte for byte what Linux did before, and what becomes
//! of a tunnel that changes, vanishes and comes back.
//!
//!     left 192.0.2.2 -- eth0 [router] eth1 -- right 198.51.100.2
//!                             gre1  ==========  10.99.0.0/24, 2001:db8:99::/64
//!                             gre2  ==========  10.98.0.0/24, 2001:db8:98::/64   (with keys)
//!                             gre3  ==========  10.97.0.0/24, 2001:db8:97::/64   (with a key and checksums)
//!                             gre4  ==========  10.96.0.0/24, 2001:db8:96::/64   (over IPv6)
//!                             gre5  ==========  10.95.0.0/24, 2001:db8:95::/64   (over IPv6, with a key and checksums)

mod common;

use common::{DEADLINE, LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, eventually};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use towpath_lab::packet::{checksum, udp};
use towpath_lab::{Frr, PacketSocket, supported, wait_for};

const NEAR: &str = "198.51.100.1";
/// Ends of tunnels over IPv6
const NEAR6: &str = "2001:db8:2::1";
const FAR6: &str = RIGHT6;
const IN_KEY: u32 = 70_000;
const OUT_KEY: u32 = 9;

/// A tunnel of the router's.
#[derive(Debug)]
struct Tunnel {
    name: &'static str,
    /// A host behind it, by both families
    behind: [&'static str; 2],
    /// Key of what comes out of it
    key: Option<u32>,
    /// Whether its packets bear checksums
    checksum: bool,
    /// Over IPv6: whether its packets bear an encapsulation limit
    limit: Option<bool>,
}

static GRE1: Tunnel =
    Tunnel { name: "gre1", behind: ["10.99.0.2", "2001:db8:99::2"], key: None, checksum: false, limit: None };
static GRE2: Tunnel =
    Tunnel { name: "gre2", behind: ["10.98.0.2", "2001:db8:98::2"], key: Some(IN_KEY), checksum: false, limit: None };
static GRE3: Tunnel =
    Tunnel { name: "gre3", behind: ["10.97.0.2", "2001:db8:97::2"], key: Some(3), checksum: true, limit: None };
static GRE4: Tunnel =
    Tunnel { name: "gre4", behind: ["10.96.0.2", "2001:db8:96::2"], key: None, checksum: false, limit: Some(true) };
static GRE5: Tunnel =
    Tunnel { name: "gre5", behind: ["10.95.0.2", "2001:db8:95::2"], key: Some(3), checksum: true, limit: Some(false) };

impl Tunnel {
    /// Bytes before its GRE headers
    fn outer(&self) -> usize {
        match self.limit {
            None => 20,
            Some(false) => 40,
            Some(true) => 48,
        }
    }

    /// The headers before so many bytes from its other end.
    fn outer_header(&self, tos: u8, length: usize) -> Vec<u8> {
        let [high, low] = ((self.outer() + length) as u16).to_be_bytes();
        if self.limit.is_none() {
            let mut outer = vec![0x45, tos, high, low, 0x12, 0x34, 0x40, 0, 64, 47, 0, 0];
            outer.extend([198, 51, 100, 2, 198, 51, 100, 1]);
            fix(&mut outer);
            return outer;
        }
        let limit: &[u8] = if self.limit == Some(true) { &[47, 0, 4, 1, 3, 1, 1, 0] } else { &[] };
        let [high, low] = ((limit.len() + length) as u16).to_be_bytes();
        let next = if limit.is_empty() { 47 } else { 60 };
        let mut outer = vec![0x60 | tos >> 4, tos << 4, 0, 0, high, low, next, 64];
        for end in [FAR6, NEAR6] {
            outer.extend(end.parse::<std::net::Ipv6Addr>().expect("an address").octets());
        }
        [&outer, limit].concat()
    }

    /// Bytes of its GRE headers
    fn header(&self) -> usize {
        4 + [self.key.is_some(), self.checksum].iter().filter(|is| **is).count() * 4
    }

    /// The GRE header before a packet that comes out of it.
    fn gre(&self, ethertype: [u8; 2], packet: &[u8]) -> Vec<u8> {
        let flags = if self.checksum { 0x80 } else { 0 } | if self.key.is_some() { 0x20 } else { 0 };
        let mut header = [[flags, 0], ethertype].concat();
        header.extend([0; 4].iter().filter(|_| self.checksum));
        header.extend(self.key.into_iter().flat_map(u32::to_be_bytes));
        if self.checksum {
            let sum = checksum(&[&header, packet].concat());
            header[4..6].copy_from_slice(&sum.to_be_bytes());
        }
        header
    }
}

fn networks() -> Option<(Net, Wire)> {
    let net = Net::new();
    let probe = "ip tunnel add probe mode gre local 192.0.2.77 remote 192.0.2.78 &&
                 ip link add probe6 type ip6gre local 2001:db8:7::77 remote 2001:db8:7::78 && ip link delete probe6";
    if !supported("GRE", || net.router.sh(probe).map(drop)) {
        return None;
    }
    net.ip("tunnel delete probe");
    make_gre1(&net);
    let other_end = format!("local {RIGHT} remote {NEAR}");
    let other_end6 = format!("local {FAR6} remote {NEAR6}");
    for line in [
        format!("ip link add gre4 type ip6gre {other_end6} && ip link set gre4 up"),
        format!("ip link add gre5 type ip6gre {other_end6} key 3 csum && ip link set gre5 up"),
        "ip address add 10.96.0.2/32 dev lo; ip address add 2001:db8:96::2/128 dev lo".into(),
        "ip address add 10.95.0.2/32 dev lo; ip address add 2001:db8:95::2/128 dev lo".into(),
        format!("ip tunnel add gre1 mode gre {other_end}"),
        format!("ip tunnel add gre2 mode gre {other_end} ikey {OUT_KEY} okey {IN_KEY}"),
        format!("ip tunnel add gre3 mode gre {other_end} key 3 csum"),
        "ip link set gre1 up; ip address add 10.0.1.2/30 dev gre1; ip route add 192.0.2.0/24 via 10.0.1.1".into(),
        "ip link set gre2 up; ip address add 10.0.2.2/30 dev gre2".into(),
        "ip link set gre3 up; ip address add 10.0.3.2/30 dev gre3".into(),
        "ip address add 10.99.0.2/32 dev lo; ip address add 10.98.0.2/32 dev lo".into(),
        "ip address add 2001:db8:99::2/128 dev lo; ip address add 2001:db8:98::2/128 dev lo".into(),
        "ip address add 10.97.0.2/32 dev lo; ip address add 2001:db8:97::2/128 dev lo".into(),
    ] {
        net.right.sh(&line).expect("the other end");
    }
    net.ip(&format!(
        "tunnel add gre2 mode gre local {NEAR} remote {RIGHT} ikey {IN_KEY} okey {OUT_KEY} ttl 33 tos 0x48"
    ));
    make_over_ipv6(&net, "gre4", "");
    make_over_ipv6(&net, "gre5", "key 3 csum encaplimit none hoplimit 0 tclass inherit flowlabel inherit");
    net.ip(&format!("tunnel add gre3 mode gre local {NEAR} remote {RIGHT} key 3 csum ttl 64"));
    for line in [
        "link set gre3 up",
        "address add 10.0.3.1/30 dev gre3",
        "route add 10.97.0.0/24 dev gre3",
        "route add 2001:db8:97::/64 dev gre3",
        "link set gre2 up",
        "address add 10.0.2.1/30 dev gre2",
        "route add 10.98.0.0/24 dev gre2",
        "route add 2001:db8:98::/64 dev gre2",
    ] {
        net.ip(line);
    }
    let wire = Wire::new(&net);
    Some((net, wire))
}

/// Makes the tunnel without keys, and the routes that lead there.
fn make_gre1(net: &Net) {
    net.ip(&format!("tunnel add gre1 mode gre local {NEAR} remote {RIGHT} ttl inherit tos inherit"));
    for line in [
        "link set gre1 up",
        "address add 10.0.1.1/30 dev gre1",
        "route add 10.99.0.0/24 via 10.0.1.2",
        "route add 2001:db8:99::/64 dev gre1",
    ] {
        net.ip(line);
    }
}

/// Makes a tunnel over IPv6, and the routes that lead there.
fn make_over_ipv6(net: &Net, name: &str, options: &str) {
    let third = if name == "gre4" { 96 } else { 95 };
    for line in [
        format!("link add {name} type ip6gre local {NEAR6} remote {FAR6} {options}"),
        format!("link set {name} up"),
        format!("route add 10.{third}.0.0/24 dev {name}"),
        format!("route add 2001:db8:{third}::/64 dev {name}"),
    ] {
        net.ip(&line);
    }
}

/// What the router's neighbours send and see.
struct Wire {
    left: PacketSocket,
    right: PacketSocket,
    /// (host, router), on the left and on the right
    macs: [([u8; 6], [u8; 6]); 2],
    /// So that nobody answers that the port is closed
    _open: [UdpSocket; 2],
}

/// A way through the router.
#[derive(Clone, Copy, Debug)]
struct Path {
    /// Comes in on the right, in the tunnel, and leaves on the left; otherwise the other way
    out_of: bool,
    tunnel: &'static Tunnel,
    ipv6: bool,
    tos: u8,
    /// TOS of what it comes in
    outer_tos: u8,
    ttl: u8,
    /// Don't fragment (IPv4)
    df: bool,
    /// What goes in bears a sequence number
    numbered: bool,
    /// Bytes of the IP packet inside
    length: usize,
    /// None if it is the fast path's
    reason: Option<&'static str>,
}

const INTO: Path = Path {
    out_of: false,
    tunnel: &GRE1,
    ipv6: false,
    tos: 0,
    outer_tos: 0,
    ttl: 64,
    df: true,
    numbered: false,
    length: 100,
    reason: None,
};

static TUNNELS: [&Tunnel; 5] = [&GRE1, &GRE2, &GRE3, &GRE4, &GRE5];

fn paths() -> Vec<Path> {
    let mut paths = Vec::new();
    let ways = [(false, false), (false, true), (true, false), (true, true)];
    for (tunnel, (out_of, ipv6)) in TUNNELS.into_iter().flat_map(|tunnel| ways.map(|way| (tunnel, way))) {
        let path = Path { out_of, tunnel, ipv6, ..INTO };
        // Without the tunnel's headers, what the links carry.
        let largest = 1500 - tunnel.outer() - tunnel.header();
        paths.extend([path, Path { df: false, ..path }, Path { ttl: 2, ..path }, Path { length: largest, ..path }]);
        paths.extend([0xb8, 1, 2, 3].map(|tos| Path { tos, ..path }));
        paths.push(Path { ttl: 255, length: 61, ..path });
        if out_of {
            paths.push(Path { outer_tos: 0xb8, ..path });
            paths.push(Path { outer_tos: 2, tos: 1, ..path });
            paths.push(Path { outer_tos: 3, tos: 2, reason: Some("tunnel"), ..path });
            paths.push(Path { outer_tos: 1, tos: 2, reason: Some("tunnel"), ..path });
        }
    }
    paths
}

impl Wire {
    fn new(net: &Net) -> Self {
        let [left, right] = net.packet_sockets();
        Self {
            left,
            right,
            macs: net.macs(),
            _open: [&net.left, &net.right]
                .map(|host| host.enter(|| UdpSocket::bind("[::]:7")).expect("in the node").expect("bound")),
        }
    }

    /// The frame that comes in by a path.
    fn frame(&self, path: &Path, payload: u8) -> Vec<u8> {
        let behind = path.tunnel.behind[usize::from(path.ipv6)];
        let left = if path.ipv6 { LEFT6 } else { LEFT };
        let (source, destination) = if path.out_of { (behind, left) } else { (left, behind) };
        let address = |text: &str| text.parse::<IpAddr>().expect("an address");
        let payload = vec![payload; path.length - if path.ipv6 { 48 } else { 28 }];
        let macs = self.macs[usize::from(path.out_of)];
        let mut frame = udp(macs, (address(source), address(destination)), (7, 7), &payload);
        if path.ipv6 {
            frame[14] |= path.tos >> 4;
            frame[15] |= path.tos << 4;
            frame[21] = path.ttl;
        } else {
            (frame[15], frame[22]) = (path.tos, path.ttl);
            frame[20] = if path.df { 0x40 } else { 0 };
            fix(&mut frame[14..34]);
        }
        if !path.out_of {
            return frame;
        }
        let ethertype = [frame[12], frame[13]];
        let gre = path.tunnel.gre(ethertype, &frame[14..]);
        let outer = path.tunnel.outer_header(path.outer_tos, gre.len() + frame.len() - 14);
        let ethertype = if path.tunnel.limit.is_some() { [0x86, 0xdd] } else { [8, 0] };
        [&frame[..12], &ethertype, &outer, &gre, &frame[14..]].concat()
    }

    fn send(&self, path: &Path, payload: u8) {
        let from = if path.out_of { &self.right } else { &self.left };
        from.send(&self.frame(path, payload)).expect("sent");
    }

    /// The frame with this payload that comes out at the other side. The identification of packets into tunnels and the flow
    /// label that they are given, which nobody can foretell, are blotted out, as is what follows from them.
    fn arrival(&self, path: &Path, payload: u8) -> Vec<u8> {
        let at = if path.out_of { &self.left } else { &self.right };
        // Not what hosts answer, which quotes it
        let (outer, numbered) = (path.tunnel.outer(), if path.numbered { 4 } else { 0 });
        let headers = if path.out_of { 14 } else { 14 + outer + path.tunnel.header() + numbered };
        let ours = |bytes: &[u8]| bytes.len() == headers + path.length && bytes.ends_with(&[payload; 9]);
        let found = at.receive_matching(DEADLINE, |frame| ours(&frame.bytes)).expect("frames");
        let mut bytes = found.unwrap_or_else(|| panic!("a frame in time: {path:?}")).bytes;
        if !path.out_of && path.tunnel.limit.is_some() {
            let label = u32::from_be_bytes([0, bytes[15] & 15, bytes[16], bytes[17]]);
            assert!(label != 0, "a flow label that was made: {bytes:x?}");
            bytes[15] &= 0xf0;
            bytes[16..18].fill(0);
        } else if !path.out_of {
            assert_eq!((bytes[20] & 0x40, bytes[23]), (0x40, 47), "don't fragment, GRE: {bytes:x?}");
            assert_eq!(checksum(&bytes[14..34]), 0, "header checksum: {bytes:x?}");
            bytes[18..20].fill(0);
            bytes[24..26].fill(0);
        }
        bytes
    }
}

/// Makes an IPv4 header's checksum right.
fn fix(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = checksum(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// What the ports have counted, as `show stats` tells it.
struct Counts(serde_json::Value);

impl Counts {
    fn of(net: &Net) -> Self {
        Self(net.json(&["show", "stats"]))
    }

    /// Packets and bytes that came in by a port and were forwarded, and that left by it.
    fn of_port(&self, port: &str) -> [u64; 4] {
        let rows = self.0["ports"].as_array().expect("ports");
        let row = rows.iter().find(|row| row["port"] == port).unwrap_or_else(|| panic!("{port} in {}", self.0));
        ["rx_packets", "rx_bytes", "tx_packets", "tx_bytes"].map(|name| row[name].as_u64().expect("a count"))
    }
}

#[test]
fn packets_pass_tunnels_as_linux_sends_them() {
    let Some((net, wire)) = networks() else { return };
    let paths = paths();
    let by_linux: Vec<_> = paths
        .iter()
        .zip(1..)
        .map(|(path, number)| {
            wire.send(path, number);
            wire.arrival(path, number)
        })
        .collect();
    let _daemon = net.up(&["eth0", "eth1"]);
    for ((path, number), by_linux) in paths.iter().zip(1..).zip(by_linux) {
        let (tunnel, port) = (path.tunnel.name, if path.out_of { "eth1" } else { "eth0" });
        let reason = |net: &Net| path.reason.map_or(0, |reason| net.exceptions(reason));
        let (before, excepted) = (Counts::of(&net), reason(&net));
        wire.send(path, number);
        assert_eq!(wire.arrival(path, number), by_linux, "{path:?}");
        let (after, fast) = (Counts::of(&net), u64::from(path.reason.is_none()));
        let mut expected = before.of_port(tunnel);
        expected[if path.out_of { 0 } else { 2 }] += fast;
        expected[if path.out_of { 1 } else { 3 }] += fast * path.length as u64;
        assert_eq!(after.of_port(tunnel), expected, "{path:?}");
        assert_eq!(after.of_port(port)[0], before.of_port(port)[0] + fast, "{path:?}");
        assert_eq!(reason(&net) - excepted, 1 - fast, "{path:?}");
    }
}

/// Waits until `explain` says this of packets from left to what is behind gre1.
fn becomes(net: &Net, reason: Option<&str>) {
    let verdict = || net.json(&["explain", LEFT, "10.99.0.2"])["verdict"].clone();
    eventually(&format!("{reason:?}"), || {
        let now = verdict();
        (now["reason"].as_str() == reason && (reason.is_some() || now["path"] == "fast")).then_some(())
    });
}

/// Whether packets into gre1 and out of it are forwarded by the fast path.
fn is_fast(net: &Net, wire: &Wire) -> [bool; 2] {
    are_fast(net, wire, INTO)
}

/// The same of those into any tunnel, and out of it.
fn are_fast(net: &Net, wire: &Wire, into: Path) -> [bool; 2] {
    [into, Path { out_of: true, ..into }].map(|path| {
        let counts = || Counts::of(net).0["ports"].as_array().expect("ports").iter().map(rx_packets).sum::<u64>();
        let before = counts();
        wire.send(&path, 5);
        wire.arrival(&path, 5);
        counts() > before
    })
}

fn rx_packets(row: &serde_json::Value) -> u64 {
    row["rx_packets"].as_u64().expect("a count")
}

#[test]
fn a_tunnel_changes_vanishes_and_comes_back() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    becomes(&net, None);
    assert_eq!(is_fast(&net, &wire), [true; 2]);

    // What is in the tunnel, for people
    let said = |arguments: &[&str]| net.json(arguments)["steps"].to_string();
    let into = said(&["explain", LEFT, "10.99.0.2"]);
    assert!(into.contains("into gre1: in GRE from 198.51.100.1 to 198.51.100.2"), "{into}");
    let out = net.json(&["explain", "10.98.0.2", LEFT, "in", "gre2"]);
    assert_eq!(out["verdict"]["path"], "fast", "{out}");
    assert!(out["steps"].to_string().contains("out of gre2: in GRE from 198.51.100.2"), "{out}");
    let ports = net.json(&["show", "ports"]).to_string();
    assert!(ports.contains("\"tunnel\""), "{ports}");

    // Rules for the router's own packets are on the way of those that carry a tunnel's.
    net.exec("nft add table ip own");
    net.exec("nft add chain ip own in { type filter hook input priority 0 ; }");
    net.exec("nft add rule ip own in ip protocol gre counter accept");
    becomes(&net, Some("policy-netfilter"));
    assert_eq!(is_fast(&net, &wire), [false; 2]);
    net.exec("nft delete table ip own");
    becomes(&net, None);

    // Linux learns that less fits through: its word counts.
    let path_mtu = "ip route get 198.51.100.2 | grep -c expires || true";
    assert_eq!(net.router.sh(path_mtu).expect("a route").trim(), "0");
    wire.right.send(&fragmentation_needed(&wire, 1300)).expect("sent");
    becomes(&net, Some("tunnel"));
    assert_eq!(is_fast(&net, &wire), [false, true]);
    net.ip("route flush cache");
    becomes(&net, None);
    assert_eq!(is_fast(&net, &wire), [true; 2]);

    // Somebody else listens.
    let listener = net.router.enter(raw_gre_socket).expect("in the router");
    eventually("a raw socket is seen", || net.json(&["status"]).to_string().contains("raw socket").then_some(()));
    assert_eq!(is_fast(&net, &wire), [true, false]);
    drop(listener);
    eventually("it is gone", || (!net.json(&["status"]).to_string().contains("raw socket")).then_some(()));

    // What the fast path does not repeat
    net.ip("link set gre1 type gre local 198.51.100.1 remote 198.51.100.2 ttl 64 nopmtudisc");
    becomes(&net, Some("egress-not-served"));
    assert_eq!(is_fast(&net, &wire), [false; 2]);
    net.ip("link set gre1 type gre local 198.51.100.1 remote 198.51.100.2 ttl 64 pmtudisc");
    becomes(&net, None);
    assert_eq!(is_fast(&net, &wire), [true; 2]);

    // It goes down, vanishes, and comes back.
    net.ip("link set gre1 down");
    becomes(&net, Some("no-route"));
    net.ip("tunnel delete gre1");
    eventually("it is gone", || (!net.json(&["show", "ports"]).to_string().contains("gre1")).then_some(()));
    let local = net.exceptions("local-destination");
    wire.send(&Path { out_of: true, ..INTO }, 6);
    eventually("its packets are Linux's", || (net.exceptions("local-destination") > local).then_some(()));
    make_gre1(&net);
    becomes(&net, None);
    assert_eq!(is_fast(&net, &wire), [true; 2]);
}

/// The number in a GRE packet without checksum and key that leaves for the right.
fn number(bytes: &[u8]) -> u32 {
    assert_eq!(bytes[34..36], [0x10, 0], "a number and nothing else: {bytes:x?}");
    u32::from_be_bytes(bytes[38..42].try_into().expect("four bytes"))
}

/// Linux counts what it sends into a tunnel with `oseq`, its own packets and those it forwards, and drops what comes out of one
/// with `iseq` if its number is old. So each has the direction for itself.
#[test]
fn numbers_of_a_tunnel_have_one_writer_and_one_reader() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    becomes(&net, None);
    // With an MTU, or Linux makes one of the options and does not tell IPv6 (ipgre_link_update).
    let set = |options: &str| {
        net.ip(&format!("link set gre1 mtu 1400 type gre local {NEAR} remote {RIGHT} ttl 64 {options}"));
    };
    // Sent by Linux alone, without a gap; what comes out is fast, whether it has numbers or not.
    set("oseq");
    becomes(&net, Some("tunnel-sequence"));
    let numbered = Path { numbered: true, ..INTO };
    assert_eq!(are_fast(&net, &wire, numbered), [false, true]);
    let number_of = |payload| {
        wire.send(&numbered, payload);
        number(&wire.arrival(&numbered, payload))
    };
    let first = number_of(1);
    net.router.sh("ping -c 1 -W 1 10.0.1.2 || true").expect("one of the router's own");
    assert!(number_of(2) >= first + 2, "one count for both");
    let told = net.json(&["status"]).to_string();
    assert!(told.contains("gre1 numbers what it sends (oseq)"), "{told}");
    let why = net.json(&["explain", LEFT, "10.99.0.2"])["verdict"].to_string();
    assert!(why.contains("gre1 numbers what it sends (oseq)"), "{why}");

    // Received by Linux alone, which drops what has no number.
    set("nooseq iseq");
    becomes(&net, None);
    let dropped = || net.router.sh("cat /sys/class/net/gre1/statistics/rx_fifo_errors").expect("a count");
    let (before, excepted) = (dropped(), net.exceptions("tunnel-sequence"));
    wire.send(&Path { out_of: true, ..INTO }, 3);
    eventually("Linux has dropped it", || (dropped() != before).then_some(()));
    assert_eq!(net.exceptions("tunnel-sequence"), excepted + 1);
    assert!(net.json(&["status"]).to_string().contains("gre1 wants numbers in order (iseq)"));
    set("noiseq");
    eventually("as before", || (!net.json(&["status"]).to_string().contains("numbers")).then_some(()));
    becomes(&net, None);
    assert_eq!(is_fast(&net, &wire), [true; 2]);
}

/// What Linux does not take out of a tunnel, and how it counts that.
#[test]
fn wrong_and_unwanted_checksums_are_linuxs() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    becomes(&net, None);
    let errors = |tunnel: &str| -> u64 {
        let count = net.router.sh(&format!("cat /sys/class/net/{tunnel}/statistics/rx_crc_errors")).expect("a count");
        count.trim().parse().expect("a number")
    };
    let [without, with] = [&GRE1, &GRE3].map(|tunnel| Path { out_of: true, tunnel, ..INTO });
    let mut unwanted = wire.frame(&without, 1);
    let bare = Tunnel { checksum: true, ..GRE1 };
    let gre = bare.gre([8, 0], &unwanted[38..]);
    unwanted.splice(34..38, gre);
    let length = (unwanted.len() - 14) as u16;
    unwanted[16..18].copy_from_slice(&length.to_be_bytes());
    fix(&mut unwanted[14..34]);
    let mut missing = wire.frame(&with, 1);
    missing[34] = 0x20;
    missing.drain(38..42);
    let length = (missing.len() - 14) as u16;
    missing[16..18].copy_from_slice(&length.to_be_bytes());
    fix(&mut missing[14..34]);
    for (tunnel, frame) in [("gre1", unwanted), ("gre3", missing)] {
        let (before, excepted) = (errors(tunnel), net.exceptions("tunnel") + net.exceptions("partial-checksum"));
        wire.right.send(&frame).expect("sent");
        eventually("Linux has counted it", || (errors(tunnel) == before + 1).then_some(()));
        assert_eq!(net.exceptions("tunnel") + net.exceptions("partial-checksum"), excepted + 1, "{tunnel}");
    }
}

/// What a router on the tunnel's way would say of a packet that is too large for it.
fn fragmentation_needed(wire: &Wire, mtu: u16) -> Vec<u8> {
    let [high, low] = mtu.to_be_bytes();
    let mut quoted = vec![0x45, 0, 5, 0, 0, 0, 0x40, 0, 64, 47, 0, 0, 198, 51, 100, 1, 198, 51, 100, 2];
    fix(&mut quoted);
    quoted.extend([0, 0, 8, 0, 0x45, 0, 4, 0xe8]);
    let mut icmp = vec![3, 4, 0, 0, 0, 0, high, low];
    icmp.extend(quoted);
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let length = (20 + icmp.len()) as u8;
    let mut ip = vec![0x45, 0, 0, length, 0, 0, 0, 0, 64, 1, 0, 0, 198, 51, 100, 2, 198, 51, 100, 1];
    fix(&mut ip);
    let (host, router) = wire.macs[1];
    [&router[..], &host, &[8, 0], &ip, &icmp].concat()
}

fn raw_gre_socket() -> OwnedFd {
    // SAFETY: the call takes numbers only, and gives a new descriptor or none.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 47);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    }
}

/// OSPF with hellos each second through gre1.
fn ospf(node: &towpath_lab::Node, id: &str, networks: &[&str]) -> Frr {
    let networks: String = networks.iter().map(|prefix| format!(" network {prefix} area 0\n")).collect();
    let interface =
        "interface gre1\n ip ospf network point-to-point\n ip ospf hello-interval 1\n ip ospf dead-interval 4\n";
    Frr::start_ospf(node, &format!("{interface}router ospf\n ospf router-id {id}\n{networks}")).expect("ospfd")
}

/// How often the neighbour's state has changed, if it is full.
fn full_after(frr: &Frr) -> Option<String> {
    let detail = frr.vtysh_all(&["show ip ospf neighbor detail"]).ok()?;
    let full = detail.lines().any(|line| line.contains("State is Full"));
    detail.lines().find(|line| line.contains("state changes")).filter(|_| full).map(str::to_owned)
}

#[test]
fn ospf_comes_up_and_stays_up_beside_the_fast_paths_traffic() {
    let Some((net, _)) = networks() else { return };
    net.ip("route delete 10.99.0.0/24");
    net.right.sh("ip route delete 192.0.2.0/24").expect("no route");
    let _daemon = net.up(&["eth0", "eth1"]);
    let router = ospf(&net.router, "10.0.1.1", &["10.0.1.0/30", "192.0.2.0/24"]);
    let _far = ospf(&net.right, "10.0.1.2", &["10.0.1.0/30", "10.99.0.2/32"]);
    let changes = wait_for(Duration::from_secs(60), "an adjacency", || full_after(&router)).expect("in time");
    let route = || net.ip("route show 10.99.0.2").contains("dev gre1 proto ospf").then_some(());
    wait_for(Duration::from_secs(60), "the route by OSPF", route).expect("in time");
    becomes(&net, None);
    // Longer than it takes to give a silent neighbour up
    let (before, since) = (Counts::of(&net).of_port("gre1")[2], Instant::now());
    let stream = Stream::start(&net, "10.99.0.2");
    while since.elapsed() < Duration::from_secs(10) {
        stream.advance(100);
    }
    let (sent, lost) = stream.finish();
    let fast = Counts::of(&net).of_port("gre1")[2] - before;
    assert!(lost.is_empty() && sent > 100, "{} of {sent} lost", lost.len());
    assert!(fast >= sent, "{fast} of {sent} by the fast path");
    assert_eq!(full_after(&router), Some(changes), "the adjacency is the same");
    assert!(net.exceptions("multicast") > 10, "hellos reach Linux");
}

/// What decides over tunnels over IPv6 and is no setting of theirs.
#[test]
fn a_tunnel_over_ipv6_is_linuxs_while_something_is_in_its_way() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    let verdict = || net.json(&["explain", LEFT, "10.96.0.2"])["verdict"].clone();
    let becomes = |reason: Option<&str>| {
        eventually(&format!("{reason:?}"), || {
            let now = verdict();
            (now["reason"].as_str() == reason && (reason.is_some() || now["path"] == "fast")).then_some(())
        });
    };
    let into = Path { tunnel: &GRE4, ..INTO };
    becomes(None);
    assert_eq!(are_fast(&net, &wire, into), [true; 2]);
    let said = net.json(&["explain", "10.96.0.2", LEFT, "in", "gre4"]);
    assert_eq!(said["verdict"]["path"], "fast", "{said}");
    assert!(said["steps"].to_string().contains("out of gre4: in GRE from 2001:db8:2::2 to 2001:db8:2::1"), "{said}");

    // Rules for the router's own packets count by family, and are named.
    for (family, slow) in [("ip", false), ("ip6", true)] {
        net.exec(&format!("nft add table {family} own"));
        net.exec(&format!("nft add chain {family} own out {{ type filter hook output priority 0 ; }}"));
        net.exec(&format!("nft add rule {family} own out counter accept"));
        let rule = format!("table {family} own");
        let told = || net.json(&["status"]).to_string().contains(&rule);
        eventually("the rule is seen", || told().then_some(()));
        becomes(slow.then_some("policy-netfilter"));
        assert_eq!(are_fast(&net, &wire, into), [!slow; 2], "{family}");
        if slow {
            let detail = verdict()["detail"].to_string();
            assert!(detail.contains(&rule) && !detail.contains("table ip own"), "{detail}");
        }
        net.exec(&format!("nft delete table {family} own"));
        eventually("it is gone", || (!told()).then_some(()));
    }
    becomes(None);

    // Linux drops limits if it is told to accept no options.
    net.router.sysctl("net.ipv6.max_dst_opts_number", "0").expect("set");
    eventually("options are refused", || net.json(&["status"]).to_string().contains("max_dst_opts").then_some(()));
    let refused = net.exceptions("policy-sysctl");
    wire.send(&Path { out_of: true, ..into }, 7);
    eventually("Linux has it", || (net.exceptions("policy-sysctl") > refused).then_some(()));
    net.router.sysctl("net.ipv6.max_dst_opts_number", "8").expect("set");
    eventually("accepted", || (!net.json(&["status"]).to_string().contains("max_dst_opts")).then_some(()));

    // What the fast path does not repeat
    net.ip(&format!("link set gre4 type ip6gre local {NEAR6} remote {FAR6} dscp inherit"));
    becomes(Some("egress-not-served"));
    assert_eq!(are_fast(&net, &wire, into), [false; 2]);
    net.ip("link delete gre4");
    make_over_ipv6(&net, "gre4", "");
    becomes(None);
    assert_eq!(are_fast(&net, &wire, into), [true; 2]);
}
