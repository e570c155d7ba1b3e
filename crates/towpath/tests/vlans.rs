//! VLAN sub-interfaces as ports, 802.1Q and 802.1ad: what the fast path does with tagged frames, byte for byte what Linux
//! did before, and what becomes of a sub-interface that goes down, vanishes and comes back.
//!
//! Beside the untagged networks there are these, each with .1 and ::1 for the router and .2 and ::2 for the host:
//!
//!     left  up0.10     198.18.10.0/24  eth0.10    [router]  eth1.40     198.18.40.0/24  up0.40     right
//!           up0.20.30  198.18.30.0/24  eth0.20.30           eth1.50.60  198.18.60.0/24  up0.50.60
//!                                                           (20 and 50 are 802.1ad)

mod common;

use common::{DEADLINE, Net, RIGHT, eventually};
use towpath_lab::packet::udp;
use towpath_lab::{PacketSocket, supported};

type Tags = &'static [(u16, u16)];

const CUSTOMER: u16 = 0x8100;
const SERVICE: u16 = 0x88a8;

/// A network behind a sub-interface.
struct Vlan {
    /// The router's port
    port: &'static str,
    /// From the outside in
    tags: Tags,
    /// Third byte of its IPv4, third word of its IPv6 addresses
    number: &'static str,
}

const LEFT_ONE: Vlan = Vlan { port: "eth0", tags: &[(CUSTOMER, 10)], number: "10" };
const LEFT_TWO: Vlan = Vlan { port: "eth0", tags: &[(SERVICE, 20), (CUSTOMER, 30)], number: "30" };
const RIGHT_ONE: Vlan = Vlan { port: "eth1", tags: &[(CUSTOMER, 40)], number: "40" };
const RIGHT_TWO: Vlan = Vlan { port: "eth1", tags: &[(SERVICE, 50), (CUSTOMER, 60)], number: "60" };

impl Vlan {
    /// Makes it at one end.
    fn make(&self, net: &Net, router: bool) {
        let host = if self.port == "eth0" { &net.left } else { &net.right };
        let (node, mut lower, number) =
            if router { (&net.router, self.port.into(), 1) } else { (host, "up0".into(), 2) };
        for (protocol, id) in self.tags {
            let name = format!("{lower}.{id}");
            let protocol = if *protocol == SERVICE { "802.1ad" } else { "802.1Q" };
            let line = format!("ip link add link {lower} name {name} type vlan protocol {protocol} id {id}");
            node.sh(&format!("[ -e /sys/class/net/{name} ] || {line}; ip link set {name} up")).expect("a VLAN");
            lower = name;
        }
        node.sh(&format!("ip address add 198.18.{}.{number}/24 dev {lower}", self.number)).expect("an address");
        node.sh(&format!("ip address add 2001:db8:f:{}::{number}/64 dev {lower} nodad", self.number))
            .expect("an address");
    }

    /// Waits until the router knows the host by this family.
    fn resolve(&self, net: &Net, ipv6: bool) {
        let host = if self.port == "eth0" { &net.left } else { &net.right };
        let address = if ipv6 { format!("2001:db8:f:{}::1", self.number) } else { format!("198.18.{}.1", self.number) };
        eventually("the host reaches the router", || net.ping(host, &address).then_some(()));
    }
}

/// The networks, and a packet socket at each end; None where the kernel has no VLANs.
fn networks() -> Option<(Net, Wire)> {
    let net = Net::new();
    let probe = ["ip", "link", "add", "link", "eth0", "name", "probe", "type", "vlan", "id", "99"];
    if !supported("802.1Q", || net.router.run(probe).map(drop)) {
        return None;
    }
    net.ip("link delete probe");
    for vlan in [LEFT_ONE, LEFT_TWO, RIGHT_ONE, RIGHT_TWO] {
        vlan.make(&net, true);
        vlan.make(&net, false);
        vlan.resolve(&net, false);
        vlan.resolve(&net, true);
    }
    let wire = Wire::new(&net);
    Some((net, wire))
}

/// A path through the router.
struct Path {
    /// Tags of the frame that comes in
    enters: Tags,
    /// and of the one that leaves
    leaves: Tags,
    source: &'static str,
    destination: &'static str,
    /// Bytes of the IP packet
    length: usize,
    /// The rows of `show stats` that count it; None if it is Linux's, because of this
    fast: Result<(&'static str, &'static str), &'static str>,
}

const ONE_TO_ONE: Path = Path {
    enters: LEFT_ONE.tags,
    leaves: RIGHT_ONE.tags,
    source: "198.18.10.2",
    destination: "198.18.40.2",
    length: 100,
    fast: Ok(("eth0.10", "eth1.40")),
};
const TO_UNTAGGED: Path = Path { leaves: &[], destination: RIGHT, fast: Ok(("eth0.10", "eth1")), ..ONE_TO_ONE };
const ONE_TO_TWO: Path =
    Path { leaves: RIGHT_TWO.tags, destination: "198.18.60.2", fast: Ok(("eth0.10", "eth1.50.60")), ..ONE_TO_ONE };
const TWO_TO_ONE: Path =
    Path { enters: LEFT_TWO.tags, source: "198.18.30.2", fast: Ok(("eth0.20.30", "eth1.40")), ..ONE_TO_ONE };

const PATHS: &[Path] = &[
    ONE_TO_ONE,
    TO_UNTAGGED,
    ONE_TO_TWO,
    TWO_TO_ONE,
    Path { enters: &[], source: common::LEFT, fast: Ok(("eth0", "eth1.40")), ..ONE_TO_ONE },
    Path { source: "2001:db8:f:10::2", destination: "2001:db8:f:40::2", ..ONE_TO_ONE },
    Path { source: "2001:db8:f:30::2", destination: "2001:db8:f:40::2", ..TWO_TO_ONE },
    Path { length: 1500, ..ONE_TO_ONE },
    Path { length: 1496, ..ONE_TO_TWO },
    // With both tags in it, the frame would be too long to be redirected.
    Path { length: 1497, fast: Err("mtu-exceeded"), ..ONE_TO_TWO },
    Path { length: 1500, fast: Err("mtu-exceeded"), ..ONE_TO_TWO },
];

/// What the router's neighbours send and see.
struct Wire {
    left: PacketSocket,
    right: PacketSocket,
    /// (host, router) on the left, and on the right
    macs: [([u8; 6], [u8; 6]); 2],
}

impl Wire {
    fn new(net: &Net) -> Self {
        let [left, right] = net.packet_sockets();
        Self { left, right, macs: net.macs() }
    }

    fn send(&self, path: &Path, payload: u8) {
        self.left.send(&tagged(&self.frame(path, payload), path.enters)).expect("sent");
    }

    /// The frame without its tags.
    fn frame(&self, path: &Path, payload: u8) -> Vec<u8> {
        let address = |text: &str| text.parse().expect("an address");
        let headers = if path.source.contains(':') { 48 } else { 28 };
        let payload = vec![payload; path.length - headers];
        udp(self.macs[0], (address(path.source), address(path.destination)), (7, 7), &payload)
    }

    /// The frame with this payload that comes out on the right; None if one with payload `end` comes instead.
    fn arrival(&self, payload: u8, end: u8) -> Option<Vec<u8>> {
        let ours = |bytes: &[u8]| bytes.ends_with(&[payload; 40]) || bytes.ends_with(&[end; 40]);
        let found = self.right.receive_matching(DEADLINE, |frame| ours(&frame.bytes)).expect("frames");
        let bytes = found.expect("a frame in time").bytes;
        bytes.ends_with(&[payload; 40]).then_some(bytes)
    }
}

fn tagged(frame: &[u8], tags: Tags) -> Vec<u8> {
    let tags: Vec<u8> = tags.iter().flat_map(|(kind, id)| [kind.to_be_bytes(), id.to_be_bytes()].concat()).collect();
    [&frame[..12], &tags, &frame[12..]].concat()
}

/// Packets that came in and were forwarded, and those that left, by the ports that are meant.
fn counts(net: &Net, meant: impl Fn(&str) -> bool) -> (u64, u64) {
    let stats = net.json(&["show", "stats"]);
    let rows = stats["ports"].as_array().expect("ports").iter();
    let counts = rows.filter(|row| meant(row["port"].as_str().expect("a name"))).map(|row| {
        let count = |name| row[name].as_u64().expect("a count");
        (count("rx_packets"), count("tx_packets"))
    });
    counts.fold((0, 0), |sum, row| (sum.0 + row.0, sum.1 + row.1))
}

/// Packets that came in on the left, with whatever tags, and were forwarded by the fast path.
fn entered(net: &Net) -> u64 {
    counts(net, |port| port.starts_with("eth0")).0
}

#[test]
fn tagged_frames_leave_as_linux_sends_them() {
    let Some((net, wire)) = networks() else { return };
    // So that Linux itself can send frames with two tags of full size over a veth: the outer travels beside them.
    net.exec("ethtool -K eth1 tx-vlan-stag-hw-insert on");
    let by_linux: Vec<_> = PATHS
        .iter()
        .map(|path| {
            wire.send(path, 1);
            let frame = wire.arrival(1, 1).expect("forwarded by Linux");
            let (host, router) = wire.macs[1];
            let header = tagged(&[host, router].concat(), path.leaves);
            assert!(frame.starts_with(&header), "tags {:x?}: {frame:x?}", path.leaves);
            frame
        })
        .collect();
    let _daemon = net.up(&["eth0", "eth1"]);
    for (path, by_linux) in PATHS.iter().zip(by_linux) {
        let what = format!("{} bytes from {} to {}", path.length, path.source, path.destination);
        let counted = || match path.fast {
            Ok((ingress, egress)) => (counts(&net, |port| port == ingress).0, counts(&net, |port| port == egress).1),
            Err(reason) => (net.exceptions(reason), 0),
        };
        let (before, forwarded) = (counted(), entered(&net));
        wire.send(path, 1);
        assert_eq!(wire.arrival(1, 1), Some(by_linux), "{what}");
        let fast = u64::from(path.fast.is_ok());
        assert_eq!(counted(), (before.0 + 1, before.1 + fast), "{what}");
        assert_eq!(entered(&net), forwarded + fast, "{what}");
    }
}

/// The outer tag of what the left host's own sub-interfaces send is left to its device.
#[test]
fn a_tag_beside_a_frame_counts_like_one_in_it() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    if net.json(&["status"])["notices"].to_string().contains("cannot be seen") {
        return println!("SKIP: this kernel does not tell what travels beside frames");
    }
    net.left.run(["ethtool", "-K", "up0", "txvlan", "on", "tx-vlan-stag-hw-insert", "on"]).expect("switched");
    for path in [ONE_TO_ONE, TO_UNTAGGED, ONE_TO_TWO, TWO_TO_ONE] {
        let ingress = path.fast.expect("a path for the fast path").0;
        let device = path.enters.iter().fold("up0".to_owned(), |lower, (_, id)| format!("{lower}.{id}"));
        wire.send(&path, 1);
        let expected = wire.arrival(1, 1);
        let before = counts(&net, |port| port == ingress).0;
        net.left.packet_socket(&device).expect("a packet socket").send(&wire.frame(&path, 1)).expect("sent");
        assert_eq!(wire.arrival(1, 1), expected, "{device}");
        assert_eq!(counts(&net, |port| port == ingress).0, before + 1, "{device}");
    }
}

/// What becomes of a packet of the path: whether it comes out, and whether the fast path has forwarded it.
fn fate(net: &Net, wire: &Wire, path: &Path) -> (bool, bool) {
    let forwarded = entered(net);
    wire.send(path, 2);
    // A packet without tags that follows it comes out in any case.
    wire.send(&Path { enters: &[], source: common::LEFT, ..TO_UNTAGGED }, 3);
    let arrived = wire.arrival(2, 3).is_some();
    if arrived {
        wire.arrival(3, 3);
    }
    (arrived, entered(net) - forwarded == 2)
}

const FAST: (bool, bool) = (true, true);
const NOWHERE: (bool, bool) = (false, false);

/// Waits until the daemon has taken a change in, and asserts what becomes of packets then.
fn becomes(net: &Net, wire: &Wire, path: &Path, reason: Option<&str>, expected: (bool, bool)) {
    let ingress = path.fast.expect("a path for the fast path").0;
    let verdict = || net.json(&["explain", path.source, path.destination, "in", ingress])["verdict"].clone();
    eventually(&format!("{reason:?} from {} to {}", path.source, path.destination), || {
        let now = verdict();
        (now["reason"].as_str() == reason && (reason.is_some() || now["path"] == "fast")).then_some(())
    });
    assert_eq!(fate(net, wire, path), expected, "{reason:?} from {} to {}", path.source, path.destination);
}

#[test]
fn a_capture_underneath_sees_a_sub_interfaces_frames() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    becomes(&net, &wire, &ONE_TO_ONE, None, FAST);
    let mut capture = net.router.spawn(["tcpdump", "-i", "eth0", "-n", "-l", "vlan", "10"]).expect("tcpdump");
    becomes(&net, &wire, &ONE_TO_ONE, Some("policy-capture"), (true, false));
    capture.wait_for_output(DEADLINE, ONE_TO_ONE.destination).expect("it is seen");
    let explained = net.json(&["explain", ONE_TO_ONE.source, ONE_TO_ONE.destination, "in", "eth0.10"]);
    let detail = explained["verdict"]["detail"].to_string();
    assert_eq!(detail.matches("packet socket").count(), 1, "it is named, once: {detail}");
    drop(capture);
    becomes(&net, &wire, &ONE_TO_ONE, None, FAST);
}

#[test]
fn a_sub_interface_goes_down_vanishes_and_comes_back() {
    let Some((net, wire)) = networks() else { return };
    let _daemon = net.up(&["eth0", "eth1"]);
    becomes(&net, &wire, &ONE_TO_ONE, None, FAST);

    // Linux drops what comes for a sub-interface that is down, and takes the packets of others.
    net.ip("link set eth0.10 down");
    becomes(&net, &wire, &ONE_TO_ONE, Some("port-not-ready"), NOWHERE);
    becomes(&net, &wire, &TWO_TO_ONE, None, FAST);
    net.ip("link set eth0.10 up");
    becomes(&net, &wire, &ONE_TO_ONE, None, FAST);

    // The route goes with the port it leaves by, and the sender is told.
    net.ip("link set eth1.40 down");
    wire.left.drain().expect("frames");
    becomes(&net, &wire, &ONE_TO_ONE, Some("no-route"), NOWHERE);
    let unreachable = |bytes: &[u8]| {
        let ip = bytes.get(18..).unwrap_or_default();
        bytes.get(12..16) == Some(&[0x81, 0, 0, 10]) && ip.get(9) == Some(&1) && ip.get(20) == Some(&3)
    };
    let answer = wire.left.receive_matching(DEADLINE, |frame| unreachable(&frame.bytes)).expect("frames");
    assert!(answer.is_some(), "ICMP destination unreachable, by the VLAN it came from");
    net.ip("link set eth1.40 up");
    RIGHT_ONE.resolve(&net, false);
    becomes(&net, &wire, &ONE_TO_ONE, None, FAST);

    // Frames of a VLAN that does not exist are nobody's.
    net.ip("link delete eth0.10");
    let gone = || net.json(&["show", "ports"]).to_string();
    eventually("the sub-interface is gone", || (!gone().contains("eth0.10")).then_some(()));
    let unknown = net.exceptions("unsupported-encap");
    assert_eq!(fate(&net, &wire, &ONE_TO_ONE), NOWHERE);
    assert!(net.exceptions("unsupported-encap") > unknown);
    LEFT_ONE.make(&net, true);
    becomes(&net, &wire, &ONE_TO_ONE, None, FAST);

    // The tag in the middle carries those above it.
    net.ip("link set eth0.20 down");
    becomes(&net, &wire, &TWO_TO_ONE, Some("port-not-ready"), NOWHERE);
    net.ip("link set eth0.20 up");
    net.ip("link set eth0.20.30 up");
    becomes(&net, &wire, &TWO_TO_ONE, None, FAST);
    net.ip("link delete eth0.20");
    eventually("both are gone", || (!gone().contains("eth0.20")).then_some(()));
    assert_eq!(fate(&net, &wire, &TWO_TO_ONE), NOWHERE);
    LEFT_TWO.make(&net, true);
    becomes(&net, &wire, &TWO_TO_ONE, None, FAST);
}
