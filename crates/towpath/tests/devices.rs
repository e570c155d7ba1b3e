//! What Linux changes about the devices of ports while packets flow: MTU, promiscuous mode, up and down, and the program
//! itself.

mod common;

use common::{LEFT, Net, RIGHT, Stream, eventually};
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;
use towpath_lab::packet;

/// A payload for which an IPv4 packet of this size is sent.
fn payload(size: usize) -> Vec<u8> {
    vec![0x5a; size - 28]
}

/// Sends IPv4 packets of `size` bytes, which may be fragmented, from left to right, one at a time; each must arrive
/// whole.
fn all_arrive(net: &Net, count: usize, size: usize) {
    let inbound = net.right.enter(|| UdpSocket::bind((RIGHT, 7001))).expect("in the node").expect("bound");
    inbound.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    let outbound = net.left.enter(|| UdpSocket::bind((LEFT, 0))).expect("in the node").expect("bound");
    // IP_PMTUDISC_DONT: the sender leaves it to the router to fragment.
    let never: libc::c_int = libc::IP_PMTUDISC_DONT;
    let socket = std::os::fd::AsRawFd::as_raw_fd(&outbound);
    // SAFETY: the option is an integer, which outlives the call; the socket is open.
    let set = unsafe {
        let length = size_of_val(&never) as u32;
        libc::setsockopt(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, (&raw const never).cast(), length)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    let sent = payload(size);
    let mut buffer = vec![0; 65536];
    for number in 0..count {
        outbound.send_to(&sent, (RIGHT, 7001)).expect("sent");
        let length = inbound.recv(&mut buffer).unwrap_or_else(|error| panic!("packet {number} of {size}: {error}"));
        assert!(buffer[..length] == sent, "packet {number} of {size} is whole");
    }
}

#[test]
fn a_changed_mtu_is_followed_while_packets_flow() {
    let net = Net::new();
    for (node, device) in [(&net.left, "up0"), (&net.right, "up0"), (&net.router, "eth0")] {
        node.run(["ip", "link", "set", device, "mtu", "9000"]).expect("set");
    }
    let _daemon = net.up(&["eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    // Each MTU, and whether packets of 1456 and of 3028 bytes fit.
    for (mtu, fits) in [(9000, [true, true]), (1400, [false, false]), (1500, [true, false]), (9000, [true, true])] {
        net.ip(&format!("link set eth1 mtu {mtu}"));
        eventually("the MTU is known", || (net.port("eth1")["mtu"] == mtu).then_some(()));
        assert_eq!(net.port("eth1")["ready"], true);
        for (size, fits) in [1456, 3028].into_iter().zip(fits) {
            let before = net.exceptions("mtu-exceeded");
            all_arrive(&net, 50, size);
            let exceeded = net.exceptions("mtu-exceeded") - before;
            assert_eq!(exceeded, if fits { 0 } else { 50 }, "packets of {size} with an MTU of {mtu}");
        }
        net.flows(100);
    }
    stream.finish_complete();
}

#[test]
fn frames_for_others_are_not_forwarded_in_promiscuous_mode_either() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let inbound = net.right.enter(|| UdpSocket::bind((RIGHT, 7001))).expect("in the node").expect("bound");
    inbound.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    let source = net.left.mac("up0").expect("a MAC");
    let router = net.router.mac("eth0").expect("a MAC");
    let addresses = (LEFT.parse().expect("an address"), RIGHT.parse().expect("an address"));
    let frame = |to, text: &[u8]| packet::udp((source, to), addresses, (7001, 7001), text);
    let socket = net.left.packet_socket("up0").expect("a socket");
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    for promiscuous in [false, true, false] {
        net.ip(&format!("link set eth0 promisc {}", if promiscuous { "on" } else { "off" }));
        eventually("the mode is known", || (net.port("eth0")["promiscuous"] == promiscuous).then_some(()));
        let before = net.exceptions("not-for-us");
        for _ in 0..20 {
            socket.send(&frame([0x02, 0, 0x5e, 0, 0x53, 1], b"for others")).expect("sent");
        }
        socket.send(&frame(router, b"for the router")).expect("sent");
        let mut buffer = [0; 100];
        let length = inbound.recv(&mut buffer).expect("a packet");
        assert_eq!(&buffer[..length], b"for the router", "what was for others is not forwarded");
        assert_eq!(net.exceptions("not-for-us") - before, 20);
    }
    net.flows(100);
    stream.finish_complete();
}

#[test]
fn a_program_that_was_taken_off_is_noticed_and_comes_back_with_the_next_mtu() {
    let net = Net::new();
    let mut daemon = net.up(&["eth0", "eth1"]);
    let link = |name: &str| net.ip(&format!("-d link show {name}"));
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    let ifindex = net.router.ifindex("eth0").expect("an index");
    let pin = format!("/sys/fs/bpf/towpath/{}/link_{ifindex}", net.inode());
    let detached = Command::new("bpftool").args(["link", "detach", "pinned", &pin]).status().expect("bpftool");
    assert!(detached.success());
    assert!(!link("eth0").contains("xdp"));
    let seen = net.port("eth0");
    assert_eq!((&seen["mode"], &seen["ready"]), (&"none".into(), &false.into()), "{seen}");
    net.ip("link set eth0 mtu 1600");
    eventually("the program is back", || (net.port("eth0")["mode"] == "native").then_some(()));
    assert!(link("eth0").contains("xdp"));
    net.flows(100);
    // It is the engine's own again: it stays when the daemon dies, and goes with it.
    daemon.signal(libc::SIGKILL);
    assert!(link("eth0").contains("xdp"));
    assert!(net.towpath(&["down"]).status.success());
    assert_eq!(net.traces(), "[], 0 pins");
    stream.finish_complete();
}

#[test]
fn a_port_that_is_down_at_the_start_is_told_and_comes_up() {
    let net = Net::new();
    net.ip("link set eth1 down");
    let mut daemon = net.up(&["eth0", "eth1"]);
    assert!(daemon.log().contains("port eth1 is down"), "{}", daemon.log());
    assert_eq!(net.port("eth1")["why_not"], "down");
    net.ip("link set eth1 up");
    daemon.await_log("port eth1 is up");
    // Linux forgot it when the interface went down.
    net.ip("address replace 2001:db8:2::1/64 dev eth1 nodad");
    eventually("the neighbour resolves", || net.ping(&net.left, RIGHT).then_some(()));
    let stream = Stream::start(&net, RIGHT);
    net.flows(100);
    stream.finish_complete();
}

/// What a sender leaves to a veth's device travels beside the frame.
#[test]
fn what_is_left_to_a_device_is_not_overlooked() {
    let net = Net::new();
    // A bridge on the left hands tagged frames to its port with the tag beside them.
    net.left
        .sh("ip link add name bridge up type bridge; ip link add name in type veth peer name out
             ip link set out up master bridge; ip link set in up
             ethtool -K in txvlan off; ethtool -K up0 tx on txvlan on")
        .expect("a bridge");
    let _daemon = net.up(&["eth0", "eth1"]);
    let status = net.json(&["status"]);
    let notices = status["notices"].as_array().expect("notices").iter().filter_map(|notice| notice.as_str());
    let warned = notices.filter(|notice| notice.contains("txvlan off")).count();
    let told = warned == 0;
    assert!(told || warned == 2, "{status}");

    // UDP of the left host, whose checksum Linux has to complete.
    let inbound = net.right.enter(|| UdpSocket::bind((RIGHT, 7001))).expect("in the node").expect("bound");
    inbound.set_read_timeout(Some(common::DEADLINE)).expect("timeout");
    let outbound = net.left.enter(|| UdpSocket::bind((LEFT, 0))).expect("in the node").expect("bound");
    let (forwarded, partial) = (net.forwarded(), net.exceptions("partial-checksum"));
    for number in 0..10 {
        outbound.send_to(&[number; 9], (RIGHT, 7001)).expect("sent");
        let mut buffer = [0; 10];
        assert_eq!(inbound.recv(&mut buffer).expect("it arrives"), 9);
        assert_eq!(buffer[..9], [number; 9]);
    }
    assert_eq!((net.forwarded(), net.exceptions("partial-checksum")), (forwarded, partial + 10));

    // Without a checksum there is nothing to complete; who is not told cannot know.
    let wire = net.left.packet_socket("up0").expect("a packet socket");
    let macs = (net.left.mac("up0").expect("MAC"), net.router.mac("eth0").expect("MAC"));
    let addresses = (LEFT.parse().expect("an address"), RIGHT.parse().expect("an address"));
    let mut frame = packet::udp(macs, addresses, (7001, 7001), &[77; 9]);
    frame[40..42].fill(0);
    wire.send(&frame).expect("sent");
    assert_eq!(inbound.recv(&mut [0; 10]).expect("it arrives"), 9);
    let one = u64::from(told);
    assert_eq!((net.forwarded(), net.exceptions("partial-checksum")), (forwarded + one, partial + 11 - one));
    if !told {
        return;
    }

    // No interface has this VLAN: the frame is nobody's, though it looks like the one before.
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "eth0"])["verdict"].clone();
    assert_eq!(explained["path"], "fast");
    net.left.run(["ip", "link", "set", "up0", "master", "bridge"]).expect("a port of the bridge");
    let bridged = net.left.packet_socket("in").expect("a packet socket");
    let sink = net.right.packet_socket("up0").expect("a packet socket");
    bridged.send(&[&frame[..12], &[0x81, 0, 0, 9], &frame[12..]].concat()).expect("sent");
    eventually("the tagged frame to be an exception", || (net.exceptions("unsupported-encap") > 0).then_some(()));
    frame[42..].fill(78);
    bridged.send(&frame).expect("sent");
    let ours = |bytes: &[u8]| bytes.ends_with(&[77; 9]) || bytes.ends_with(&[78; 9]);
    let first = sink.receive_matching(common::DEADLINE, |frame| ours(&frame.bytes)).expect("frames");
    assert!(first.expect("the untagged one").bytes.ends_with(&[78; 9]), "Linux drops the tagged one too");
}
