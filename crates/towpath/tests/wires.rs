//! Ports whose wires are no interfaces of Linux's: TAPs and files.
//!
//!     left 192.0.2.2 -- tap0 [wire] lan0 router eth1 -- right 198.51.100.2
//!
//! The wire of the router's port lan0 is the TAP that is left's interface; lan0 itself is a TAP that stands for it in Linux.

mod common;

use common::{LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, eventually};
use serde_json::Value;
use std::path::Path;

/// Whether lan0 has a carrier.
fn carrier(net: &Net) -> bool {
    net.ip("link show lan0").contains("LOWER_UP")
}

fn count(net: &Net, port: &str, what: &str) -> u64 {
    let stats = net.json(&["show", "stats"]);
    let stats = stats["ports"].as_array().expect("ports").iter().find(|stats| stats["port"] == port).cloned();
    stats.expect("the port")[what].as_u64().expect("a count")
}

#[test]
fn a_port_on_a_tap_forwards_and_linux_gets_and_sends_the_rest() {
    let net = Net::wired();
    let daemon = net.up(&["--engine", "user", "lan0=tap:tap0", "eth1"]);
    net.connect_tap();
    eventually("lan0 is ready", || (net.port("lan0")["ready"] == true).then_some(()));
    let modes = |name| (net.port(name)["mode"].clone(), net.port(name)["served_by"].clone());
    assert_eq!(modes("lan0"), ("user".into(), "tap:tap0".into()));
    assert_eq!(modes("eth1"), ("user".into(), "af_xdp".into()));
    // To and fro by workers, in both families.
    for (here, there) in [(LEFT, RIGHT), (LEFT6, RIGHT6)] {
        let before = (count(&net, "lan0", "rx_packets"), count(&net, "lan0", "tx_packets"));
        net.left.run(["ping", "-c20", "-w20", "-i0.01", "-q", "-s1400", there]).expect("answers");
        net.right.run(["ping", "-c20", "-w20", "-i0.01", "-q", "-s1400", here]).expect("answers");
        let after = (count(&net, "lan0", "rx_packets"), count(&net, "lan0", "tx_packets"));
        assert!(after.0 >= before.0 + 40 && after.1 >= before.1 + 40, "{before:?}, {after:?}");
    }
    let stream = Stream::start(&net, RIGHT);
    net.flows(200);
    stream.finish_complete();
    // The router itself, and what only Linux says.
    let before = net.exceptions("local-destination");
    net.left.run(["ping", "-c5", "-w20", "-i0.01", "-q", "192.0.2.1"]).expect("answers");
    net.left.run(["ping", "-c5", "-w20", "-i0.01", "-q", "198.51.100.1"]).expect("answers");
    assert!(net.exceptions("local-destination") >= before + 10);
    let expired = net.left.command("ping").args(["-n", "-c1", "-t1", "-W5", RIGHT]).output().expect("run");
    let text = String::from_utf8_lossy(&expired.stdout);
    assert!(text.contains("From 192.0.2.1") && text.contains("Time to live exceeded"), "{text}");
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "lan0"]);
    assert_eq!((&explained["verdict"]["path"], &explained["verdict"]["port"]), (&"fast".into(), &"eth1".into()));
    // What is down in Linux forwards nothing, and comes back by itself.
    net.ip("link set lan0 down");
    eventually("left is reached no more", || (!net.ping(&net.left, RIGHT)).then_some(()));
    net.ip("link set lan0 up");
    net.ip("address replace 2001:db8:1::1/64 dev lan0 nodad");
    eventually("left is reached again", || net.ping(&net.left, RIGHT).then_some(()));
    eventually("lan0 is ready again", || (net.port("lan0")["ready"] == true).then_some(()));
    eventually("lan0 forwards again", || {
        let before = count(&net, "lan0", "rx_packets");
        net.left.run(["ping", "-c5", "-w20", "-i0.01", "-q", RIGHT]).expect("answers");
        (count(&net, "lan0", "rx_packets") >= before + 5).then_some(())
    });
    assert!(net.towpath(&["down"]).status.success());
    drop(daemon);
    // The twin stays with its addresses, without a carrier.
    assert!(net.ip("address show dev lan0").contains("192.0.2.1/24"));
}

/// Connects left by a wire that is an interface of the router's.
fn connect_left_to_interface(net: &Net) {
    net.ip("link delete tap0");
    // No addresses: neither end says anything by itself, and the wire must have none.
    net.ip(&format!("link add wire0 type veth peer name up0 netns {}", net.left.netns()));
    net.ip("link set wire0 addrgenmode none up");
    net.left
        .sh("ip link set up0 up; ip address add 192.0.2.2/24 dev up0; ip address add 2001:db8:1::2/64 dev up0 nodad; \
             ip route replace default via 192.0.2.1; ip -6 route replace default via 2001:db8:1::1")
        .expect("left's interface");
}

/// TCP both ways at once, with all that stacks leave to their devices: whatever arrives must be what was sent.
fn transfer(net: &Net, bytes: usize) {
    use std::io::{Read, Write};
    let listener = net.right.enter(|| std::net::TcpListener::bind((RIGHT, 5001))).expect("right").expect("listens");
    let pattern = |seed: u8| (0..bytes).map(move |n| (n / 7) as u8 ^ seed).collect::<Vec<u8>>();
    let exchange = |mut stream: std::net::TcpStream, ours: u8, theirs: u8| {
        std::thread::scope(|scope| {
            let mut sender = stream.try_clone().expect("a stream");
            scope.spawn(move || sender.write_all(&pattern(ours)).expect("sent"));
            let mut got = vec![0; bytes];
            stream.read_exact(&mut got).expect("received");
            assert!(got == pattern(theirs), "other bytes arrive");
        });
    };
    std::thread::scope(|scope| {
        scope.spawn(|| exchange(listener.accept().expect("a connection").0, 1, 2));
        let stream = net.left.enter(|| std::net::TcpStream::connect((RIGHT, 5001))).expect("left").expect("connected");
        exchange(stream, 2, 1);
    });
}

#[test]
fn a_port_on_an_interface_by_packet_sockets_forwards_each_packet_once() {
    let net = Net::wired();
    connect_left_to_interface(&net);
    let up = ["--engine", "user", "lan0=af_packet:wire0", "eth1"];
    let mut daemon = net.up(&up);
    eventually("left is reached", || (net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6)).then_some(()));
    eventually("lan0 is ready", || (net.port("lan0")["ready"] == true).then_some(()));
    assert_eq!(net.port("lan0")["served_by"], "af_packet:wire0");
    for (here, there) in [(LEFT, RIGHT), (LEFT6, RIGHT6)] {
        let before = (count(&net, "lan0", "rx_packets"), count(&net, "lan0", "tx_packets"));
        for (from, to) in [(&net.left, there), (&net.right, here)] {
            let text = from.run(["ping", "-c20", "-w20", "-i0.01", "-s1400", to]).expect("answers");
            assert!(!text.contains("DUP"), "{text}");
        }
        let after = (count(&net, "lan0", "rx_packets"), count(&net, "lan0", "tx_packets"));
        assert!(after.0 >= before.0 + 40 && after.1 >= before.1 + 40, "{before:?}, {after:?}");
    }
    // The router itself is reached by the port, and by nothing else.
    let text = net.left.run(["ping", "-c5", "-w20", "-i0.01", "192.0.2.1"]).expect("answers");
    assert!(!text.contains("DUP"), "{text}");
    let stream = Stream::start(&net, RIGHT);
    net.flows(200);
    stream.finish_complete();
    // Offloads on: segments in one go to Linux, which cuts them.
    for (node, device) in [(&net.left, "up0"), (&net.right, "up0")] {
        node.run(["ethtool", "-K", device, "tx", "on", "tso", "on", "gso", "on"]).expect("offloads");
    }
    transfer(&net, 4 << 20);
    assert!(net.exceptions("partial-checksum") > 0);
    let lost: u64 =
        net.json(&["status"])["workers"].as_array().unwrap().iter().map(|w| w["rx_lost"].as_u64().unwrap()).sum();
    assert_eq!(lost, 0);
    // A cable that is pulled is known to Linux.
    net.left.run(["ip", "link", "set", "up0", "down"]).expect("down");
    eventually("lan0 has no carrier", || carrier(&net).eq(&false).then_some(()));
    net.left
        .sh("ip link set up0 up; ip address replace 2001:db8:1::2/64 dev up0 nodad; \
             ip route replace default via 192.0.2.1; ip -6 route replace default via 2001:db8:1::1")
        .expect("up");
    eventually("lan0 has a carrier", || carrier(&net).then_some(()));
    eventually("left is reached once more", || net.ping(&net.left, RIGHT).then_some(()));
    // Nothing of a killed daemon is in the way of the next one, and the twin is what it was.
    daemon.signal(libc::SIGKILL);
    let _daemon = net.up(&up);
    eventually("left is reached again", || (net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6)).then_some(()));
    eventually("lan0 forwards again", || {
        let before = count(&net, "lan0", "rx_packets");
        net.left.run(["ping", "-c5", "-w20", "-i0.01", "-q", RIGHT]).expect("answers");
        (count(&net, "lan0", "rx_packets") >= before + 5).then_some(())
    });
}

#[cfg(feature = "dpdk")]
#[test]
fn a_port_on_a_device_of_dpdks_forwards_and_linux_gets_and_sends_the_rest() {
    let net = Net::wired();
    connect_left_to_interface(&net);
    let mut daemon = net.up(&["--engine", "user", "lan0=dpdk:net_tap0,iface=tap0", "eth1"]);
    // DPDK's TAP is the device itself. What is beyond it comes and goes by wire0.
    net.router.run(["nft", BRIDGE]).expect("joined");
    net.ip("link set tap0 up");
    eventually("left is reached", || (net.ping(&net.left, RIGHT) && net.ping(&net.left, RIGHT6)).then_some(()));
    eventually("lan0 is ready", || (net.port("lan0")["ready"] == true).then_some(()));
    assert_eq!(net.port("lan0")["served_by"], "dpdk:net_tap0,iface=tap0");
    for (here, there) in [(LEFT, RIGHT), (LEFT6, RIGHT6)] {
        let before = (count(&net, "lan0", "rx_packets"), count(&net, "lan0", "tx_packets"));
        net.left.run(["ping", "-c20", "-w20", "-i0.01", "-q", "-s1400", there]).expect("answers");
        net.right.run(["ping", "-c20", "-w20", "-i0.01", "-q", "-s1400", here]).expect("answers");
        let after = (count(&net, "lan0", "rx_packets"), count(&net, "lan0", "tx_packets"));
        assert!(after.0 >= before.0 + 40 && after.1 >= before.1 + 40, "{before:?}, {after:?}");
    }
    let before = net.exceptions("local-destination");
    net.left.run(["ping", "-c5", "-w20", "-i0.01", "-q", "192.0.2.1"]).expect("answers");
    assert!(net.exceptions("local-destination") >= before + 5);

    // The device is what Linux says of lan0, and lan0 has the device's carrier.
    let device = || net.ip("-d link show tap0");
    let is = |what: &str| eventually(what, || device().contains(what).then_some(()));
    is(&format!(
        "link/ether {} ",
        net.ip("link show lan0").split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap()
    ));
    assert!(!device().contains("PROMISC"), "{}", device());
    let steps = [
        ("link set lan0 mtu 1300", " mtu 1300 "),
        ("link set lan0 address 02:00:00:00:00:77", "link/ether 02:00:00:00:00:77 "),
        ("link set lan0 promisc on", "PROMISC"),
    ];
    for (command, what) in steps {
        net.ip(command);
        is(what);
    }
    // A device that refuses an MTU keeps its own, and so does lan0.
    net.ip("link set lan0 mtu 2900");
    daemon.await_log("lan0 has an MTU of 1300 again: its wire cannot have 2900");
    assert!(net.ip("link show lan0").contains(" mtu 1300 ") && device().contains(" mtu 1300 "));
    eventually("the MTU is known", || (net.port("lan0")["mtu"] == 1300).then_some(()));
    let ordinary = |why: &str| eventually(why, || (!device().contains("PROMISC")).then_some(()));
    net.ip("link set lan0 promisc off");
    ordinary("it is promiscuous no more");
    // This is not announced for lan0.
    net.ip("link add link lan0 name other0 address 02:00:00:00:00:78 type macvlan");
    net.ip("link set other0 up");
    is("PROMISC");
    net.ip("link delete other0");
    ordinary("nobody has another address");
    net.left.run(["ip", "neigh", "flush", "all"]).expect("flushed");
    eventually("left is reached with the other address", || net.ping(&net.left, RIGHT).then_some(()));
    net.ip("link set tap0 down");
    eventually("lan0 has no carrier", || carrier(&net).eq(&false).then_some(()));
    net.ip("link set tap0 up");
    eventually("lan0 has a carrier", || carrier(&net).then_some(()));
    eventually("left is reached again", || net.ping(&net.left, RIGHT).then_some(()));
    assert!(net.towpath(&["down"]).status.success());
}

/// Has wire0 and tap0 be the two ends of one cable.
#[cfg(feature = "dpdk")]
const BRIDGE: &str = "table netdev cable {
    chain to { type filter hook ingress device wire0 priority 0; fwd to tap0; };
    chain fro { type filter hook ingress device tap0 priority 0; fwd to wire0; }; };";

#[cfg(not(feature = "dpdk"))]
#[test]
fn without_dpdk_its_devices_are_refused_with_what_helps() {
    let net = Net::wired();
    let message = net.refused(&["up", "--engine", "user", "lan0=dpdk:net_tap0", "eth1"]);
    assert!(message.contains("built without DPDK") && message.contains("--features dpdk"), "{message}");
}

/// A pcap file (draft-ietf-opsawg-pcap) of UDP from left to right, made without the code under test.
fn write_frames(path: &Path, mac: [u8; 6], count: u16) -> Vec<Vec<u8>> {
    let ips = (LEFT.parse().unwrap(), RIGHT.parse().unwrap());
    let frame = |n| towpath_lab::packet::udp(([2, 0, 0, 0, 0, 9], mac), ips, (n, 9), b"from a file");
    let frames: Vec<_> = (1..=count).map(frame).collect();
    let mut bytes = [0xa1b2_c3d4u32, 2 | 4 << 16, 0, 0, 65535, 1].map(u32::to_ne_bytes).concat();
    for frame in &frames {
        bytes.extend([0, 0, frame.len() as u32, frame.len() as u32].map(u32::to_ne_bytes).concat());
        bytes.extend(frame);
    }
    std::fs::write(path, bytes).expect("a file");
    frames
}

#[test]
fn frames_of_a_file_are_forwarded_and_what_leaves_is_written() {
    let net = Net::wired();
    let (input, output) = (net.router.folder("in.pcap"), net.router.folder("out.pcap"));
    let mac = net.router.mac("lan0").expect("a MAC address");
    net.ip("neighbour add 192.0.2.2 lladdr 02:00:00:00:00:09 dev lan0 nud permanent");
    let frames = write_frames(&input, mac, 1000);
    let capture = net.right.packet_socket("up0").expect("a socket");
    let wire = format!("lan0=pcap:{},{}", input.display(), output.display());
    let _daemon = net.up(&["--engine", "user", &wire, "eth1"]);
    let mut arrived = Vec::new();
    eventually("all of the file arrives at right", || {
        let new = capture.drain().expect("frames").into_iter().map(|frame| frame.bytes);
        arrived.extend(new.filter(|frame| frame.get(42..53) == Some(b"from a file")));
        (arrived.len() >= frames.len()).then_some(())
    });
    // The first ones may have come before the tables were ready, and taken Linux's way.
    arrived.sort_by_key(|frame| frame[34..36].to_vec());
    assert_eq!(arrived.len(), frames.len());
    for (arrived, sent) in arrived.iter().zip(&frames) {
        assert_eq!((&arrived[26..], arrived[22]), (&sent[26..], 63));
    }
    // What goes back is written.
    eventually("lan0 is ready", || (net.port("lan0")["ready"] == true).then_some(()));
    net.right.command("ping").args(["-c3", "-i0.01", "-W1", "-q", "-p", "a5", LEFT]).output().expect("run");
    let written = || {
        let text = net.router.command("tcpdump").args(["-enr", &output.to_string_lossy()]).output().expect("tcpdump");
        String::from_utf8_lossy(&text.stdout).into_owned()
    };
    eventually("what leaves is written", || {
        (written().matches("198.51.100.2 > 192.0.2.2: ICMP echo request").count() == 3).then_some(())
    });
    assert!(count(&net, "lan0", "tx_packets") >= 3);
    assert!(written().contains("> 02:00:00:00:00:09, ethertype IPv4"), "{}", written());
}

#[test]
fn a_wire_ends_with_the_daemon_and_detach_after_says_so() {
    let net = Net::wired();
    let mut daemon = net.up(&["--detach-after", "3", "--engine", "user", "lan0=tap:tap0", "eth1"]);
    net.connect_tap();
    let status = net.json(&["status"]);
    let notices = status["notices"].as_array().expect("notices").iter().filter_map(|notice| notice.as_str());
    let of_no_use: Vec<_> = notices.filter(|notice| notice.contains("--detach-after is of no use")).collect();
    assert!(matches!(of_no_use.as_slice(), [notice] if notice.starts_with("lan0: ")), "{status}");
    daemon.signal(libc::SIGKILL);
    assert!(net.ip("link show lan0").contains("NO-CARRIER"));
    assert!(!net.ping(&net.left, RIGHT) && !net.ping(&net.left, "192.0.2.1"), "nobody takes what left sends");
}

/// Runs `towpath trace` for so many packets while `packets` sends them; what is told of each.
fn traced(net: &Net, count: usize, filter: &[&str], packets: impl FnOnce()) -> Vec<Value> {
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["trace", "--json", "--count", &count.to_string()]).args(filter);
    let mut trace = net.start(command);
    trace.await_log("tracing");
    packets();
    let status = trace.wait();
    assert!(status.success(), "{}", trace.log());
    let log = trace.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|line| line.get("packet").cloned()).collect()
}

#[test]
fn what_comes_in_by_a_wire_is_traced_and_in_the_sample() {
    let net = Net::wired();
    let _daemon = net.up(&["--engine", "user", "lan0=tap:tap0", "eth1"]);
    net.connect_tap();
    eventually("lan0 is ready", || (net.port("lan0")["ready"] == true).then_some(()));
    let ping = |count: &str, to: &str| drop(net.left.run(["ping", "-c", count, "-w20", "-i0.01", "-q", to]));
    // Of what comes in by both ports the filter takes what left sends to right.
    let packets = traced(&net, 5, &["src", "host", LEFT, "and", "dst", "host", RIGHT], || {
        ping("3", "198.51.100.1");
        ping("5", RIGHT);
    });
    assert_eq!(packets.len(), 5);
    for packet in &packets {
        assert_eq!(packet["became"], serde_json::json!({"path": "fast", "port": "eth1"}), "{packet}");
        assert_eq!((&packet["port"], &packet["agrees"]), (&"lan0".into(), &true.into()), "{packet}");
        let what = packet["packet"].as_str().expect("text");
        assert!(what.contains(LEFT) && what.contains(RIGHT), "{packet}");
    }
    // Those that are Linux's, and those that the operator has dropped.
    let packets = traced(&net, 2, &["--reason", "local-destination", "icmp"], || {
        ping("5", RIGHT);
        ping("2", "198.51.100.1");
    });
    assert!(packets.iter().all(|packet| packet["verdict"]["reason"] == "local-destination"), "{packets:?}");
    assert!(net.towpath(&["filter", "add", "--port", "lan0", "--from", LEFT, "--protocol", "icmp"]).status.success());
    let dropped = net.exceptions("filtered");
    let packets = traced(&net, 2, &["icmp"], || {
        let _none = net.left.run(["ping", "-c", "2", "-W1", "-i0.01", "-q", RIGHT]);
    });
    assert!(packets.iter().all(|packet| packet["became"]["reason"] == "filtered"), "{packets:?}");
    assert_eq!(net.exceptions("filtered"), dropped + 2, "each is counted once");
    // The busiest prefix is where the stream goes.
    let stream = Stream::start(&net, RIGHT);
    let top = net.towpath(&["top", "--prefixes", "-n", "2", "--json"]);
    stream.finish_complete();
    let top = String::from_utf8(top.stdout).expect("text");
    let last: Value = serde_json::from_str(top.lines().last().expect("lines")).expect("JSON");
    let busiest = &last["prefixes"]["busiest"][0];
    assert_eq!((&busiest["prefix"], &busiest["fast"]), (&"198.51.100.0/24".into(), &1.0.into()), "{last}");
    assert!(busiest["seen"].as_u64() > Some(5), "{last}");
}

#[test]
fn wires_that_cannot_be_are_refused_and_nothing_changes() {
    let net = Net::wired();
    net.ip("tuntap add dev big0 mode tap");
    net.ip("link set big0 mtu 9000");
    let [failure, usage] = [1, 2];
    let cases: [(&[&str], i32, &[&str]); 11] = [
        (&["--engine", "user", "lan0=ring:0", "eth1"], usage, &["no wire \"ring\"", "tap:NAME"]),
        (&["--engine", "user", "lan0=tap", "eth1"], usage, &["tap:tap1"]),
        (&["lan0=tap:tap0", "eth1"], usage, &["lan0=", "--engine user"]),
        (&["--engine", "user", "lan0=tap:tap0", "lan0"], usage, &["lan0 was named twice"]),
        (&["--detach-after=9", "--engine=user", "lan0=tap:tap0"], usage, &["--detach-after", "all ports have wires"]),
        (&["--engine", "user", "lan1=tap:tap0", "eth1"], failure, &["ip tuntap add dev lan1 mode tap", "lan0"]),
        (&["--engine", "user", "lan0=tap:lan0", "eth1"], failure, &["lan0 cannot be its own wire"]),
        (&["--engine", "user", "eth1=tap:tap0"], failure, &["eth1 cannot stand for a wire", "it is no TAP"]),
        (&["--engine", "user", "lan0=af_packet:eth1"], failure, &["eth1 cannot be a wire", "ip address flush"]),
        (&["--engine", "user", "lan0=tap:tap9", "eth1"], failure, &["ip tuntap add dev tap9 mode tap"]),
        (&["--engine", "user", "big0=tap:tap0", "eth1"], failure, &["MTU of 9000", "ip link set big0 mtu 3050"]),
    ];
    for (arguments, status, words) in cases {
        net.up_refused(arguments, status, words);
    }
}
