//! Static mappings of addresses from end to end: the left is seen by other addresses on the right, fast or by Linux.

mod common;

use common::{DEADLINE, Daemon, LEFT, LEFT6, Net, RIGHT, RIGHT6, at, datagrams, eventually};
use serde_json::Value;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use towpath_lab::{Node, supported};

/// What the left is outside.
const OUTSIDE: &str = "203.0.113.2";
const OUTSIDE6: &str = "2001:db8:99::2";

const PREFIXES: [[&str; 2]; 2] = [["192.0.2.0/24", "203.0.113.0/24"], ["2001:db8:1::/64", "2001:db8:99::/64"]];

fn nat(net: &Net, what: &str, mapping: [&str; 2]) {
    let output = net.towpath(&["nat", what, "--port", "eth1", mapping[0], mapping[1]]);
    assert!(output.status.success(), "{what} {mapping:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn mapped(net: &Net) -> Daemon {
    let daemon = net.up(&["eth0", "eth1"]);
    PREFIXES.into_iter().for_each(|mapping| nat(net, "add", mapping));
    daemon
}

fn list(net: &Net) -> Vec<Value> {
    net.json(&["nat", "list"])["mappings"].as_array().expect("mappings").clone()
}

/// Packets that a mapping counted, out and in.
fn counted(net: &Net, number: usize) -> [u64; 2] {
    let all = list(net);
    ["out", "in"].map(|way| all[number][way]["packets"].as_u64().expect("a count"))
}

/// Sends a datagram and has it answered: by whom it seemed to come, and by whom the answer.
fn talk(from: &UdpSocket, to: (&UdpSocket, SocketAddr), len: usize) -> [IpAddr; 2] {
    let (word, mut buffer) = (vec![7; len], vec![0; 65_536]);
    from.send_to(&word, to.1).expect("sent");
    let (came, source) = to.0.recv_from(&mut buffer).expect("it comes");
    assert_eq!(buffer[..came], word);
    to.0.send_to(&word, source).expect("answered");
    let (came, answerer) = from.recv_from(&mut buffer).expect("the answer comes");
    assert_eq!(buffer[..came], word);
    [source.ip(), answerer.ip()]
}

/// Connects, has so many bytes echoed; who it seemed to be.
fn transfer(from: &Node, server: (&Node, &str), to: SocketAddr, bytes: usize) -> IpAddr {
    transfer_to((from, to), (server.0, at(server.1, to.port())), bytes)
}

/// As `transfer`, to a server that listens at an address of its own.
fn transfer_to((from, to): (&Node, SocketAddr), server: (&Node, SocketAddr), bytes: usize) -> IpAddr {
    let listener = server.0.enter(|| TcpListener::bind(server.1)).expect("in the node").expect("bound");
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let (mut stream, client) = listener.accept().expect("a client");
            let mut data = vec![0; bytes];
            stream.read_exact(&mut data).expect("all of it");
            stream.write_all(&data).expect("sent back");
            client.ip()
        });
        let connect = || TcpStream::connect_timeout(&to, DEADLINE);
        let mut stream = from.enter(connect).expect("in the node").expect("connected");
        let data: Vec<u8> = (0..bytes as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u8).collect();
        stream.write_all(&data).expect("sent");
        let mut came = vec![0; bytes];
        stream.read_exact(&mut came).expect("all of it");
        assert!(came == data, "the bytes are the same");
        serving.join().expect("it served")
    })
}

#[test]
fn both_ends_talk_through_mappings_and_mostly_fast() {
    let net = Net::new();
    let _daemon = mapped(&net);
    for (number, left, outside, right) in [(0, LEFT, OUTSIDE, RIGHT), (1, LEFT6, OUTSIDE6, RIGHT6)] {
        let seen: IpAddr = outside.parse().expect("an address");
        assert!(net.ping(&net.left, right) && net.ping(&net.right, outside));
        let (here, there) = (datagrams(&net.left, left, 4000), datagrams(&net.right, right, 5000));
        let (forwarded, before) = (net.forwarded(), counted(&net, number));
        for _ in 0..50 {
            assert_eq!(talk(&here, (&there, at(right, 5000)), 99), [seen, right.parse().expect("an address")]);
            assert_eq!(talk(&there, (&here, at(outside, 4000)), 99)[1], seen);
        }
        assert!(net.forwarded() >= forwarded + 200, "fast");
        let after = counted(&net, number);
        assert!((0..2).all(|way| after[way] >= before[way] + 100), "{before:?} {after:?}");
        assert_eq!(talk(&here, (&there, at(right, 5000)), 4000)[0], seen, "in fragments");
        assert_eq!(talk(&there, (&here, at(outside, 4000)), 4000)[1], seen, "in fragments");
        assert_eq!(transfer(&net.left, (&net.right, right), at(right, 6000), 1 << 20), seen);
        let client = transfer(&net.right, (&net.left, left), at(outside, 6001), 1 << 20);
        assert_eq!(client, right.parse::<IpAddr>().expect("an address"));
    }
    assert!(list(&net).iter().all(|mapping| mapping["out"]["dropped"] == 0 && mapping["in"]["dropped"] == 0));
}

fn nat_port(net: &Net, what: &str, protocol: &str, ends: [&str; 2]) {
    let output = net.towpath(&["nat", what, "--port", "eth1", "--protocol", protocol, ends[0], ends[1]]);
    assert!(output.status.success(), "{what} {ends:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Two services behind one address outside, and all else as it is.
#[test]
fn ports_of_an_address_are_others_outside() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    for (base, left, outside, right) in [(0, LEFT, OUTSIDE, RIGHT), (3, LEFT6, OUTSIDE6, RIGHT6)] {
        for (protocol, inside, public) in [("udp", 4000, 8000), ("tcp", 4000, 8000), ("tcp", 4001, 8001)] {
            nat_port(&net, "add", protocol, [&at(left, inside).to_string(), &at(outside, public).to_string()]);
        }
        let (here, there) = (datagrams(&net.left, left, 4000), datagrams(&net.right, right, 5000));
        let seen = at(outside, 8000);
        let (forwarded, before) = (net.forwarded(), counted(&net, base));
        let mut buffer = [0; 99];
        for _ in 0..50 {
            here.send_to(&[1], at(right, 5000)).expect("sent");
            assert_eq!(there.recv_from(&mut buffer).expect("it comes").1, seen);
            there.send_to(&[2], seen).expect("sent");
            assert_eq!(here.recv_from(&mut buffer).expect("it comes").1, at(right, 5000));
        }
        assert!(net.forwarded() >= forwarded + 80, "fast");
        let after = counted(&net, base);
        assert!((0..2).all(|way| after[way] == before[way] + 50), "{before:?} {after:?}");
        let other = datagrams(&net.left, left, 4444);
        assert_eq!(talk(&other, (&there, at(right, 5000)), 9)[0], at(left, 0).ip(), "another port of it");
        // Then the hosts leave checksums to their devices, and so to Linux.
        for checksums in ["off", "on"] {
            for node in [&net.left, &net.right] {
                node.run(["ethtool", "-K", "up0", "tx", checksums]).expect("switched");
            }
            for (inside, public) in [(4000, 8000), (4001, 8001)] {
                let client = transfer_to((&net.right, at(outside, public)), (&net.left, at(left, inside)), 1 << 20);
                assert_eq!(client, at(right, 0).ip());
            }
            here.send_to(&[1], at(right, 5000)).expect("sent");
            assert_eq!(there.recv_from(&mut buffer).expect("it comes").1, seen);
            there.send_to(&[2], seen).expect("sent");
            assert_eq!(here.recv_from(&mut buffer).expect("it comes").1, at(right, 5000));
        }
        net.left.run(["ethtool", "-K", "up0", "tx", "off"]).expect("switched");
        net.right.run(["ethtool", "-K", "up0", "tx", "off"]).expect("switched");
        // Nobody listens there any more: the answer is an error that quotes what was translated.
        drop(here);
        there.connect(seen).expect("connected");
        eventually("an error comes back", || {
            let _ = there.send(&[1]);
            there.set_read_timeout(Some(std::time::Duration::from_millis(200))).expect("set");
            matches!(there.recv(&mut [0; 9]), Err(error) if error.kind() == ErrorKind::ConnectionRefused).then_some(())
        });
        // Of a datagram in fragments, only the first would tell its port.
        assert!(counted_dropped(&net, base) == [0, 0]);
        let big = datagrams(&net.left, left, 4000);
        eventually("fragments are dropped, and counted", || {
            let _ = big.send_to(&[7; 4000], at(right, 5000));
            (counted_dropped(&net, base)[0] >= 3).then_some(())
        });
        let text = net.json(&["explain", left, right, "--sport", "4000", "in", "eth0"]).to_string();
        assert!(text.contains(&format!("source {} becomes {} at eth1", at(left, 4000), at(outside, 8000))), "{text}");
    }
    let first = &list(&net)[0];
    assert_eq!([&first["protocol"], &first["inside"]], ["udp", "192.0.2.2:4000"]);
    nat_port(&net, "del", "tcp", ["192.0.2.2:4001", "203.0.113.2:8001"]);
    assert_eq!(list(&net).len(), 5);
}

fn counted_dropped(net: &Net, number: usize) -> [u64; 2] {
    let all = list(net);
    ["out", "in"].map(|way| all[number][way]["dropped"].as_u64().expect("a count"))
}

#[test]
fn errors_about_translated_packets_reach_who_sent_them() {
    let net = Net::new();
    let _daemon = mapped(&net);
    for (left, outside, right) in [(LEFT, OUTSIDE, RIGHT), (LEFT6, OUTSIDE6, RIGHT6)] {
        for (node, from, to) in [(&net.left, left, right), (&net.right, right, outside)] {
            let socket = datagrams(node, from, 0);
            socket.connect(at(to, 9)).expect("connected");
            eventually(&format!("{from} hears that nobody listens at {to}"), || {
                let _ = socket.send(&[1]);
                socket.set_read_timeout(Some(std::time::Duration::from_millis(200))).expect("set");
                matches!(socket.recv(&mut [0; 9]), Err(error) if error.kind() == ErrorKind::ConnectionRefused)
                    .then_some(())
            });
        }
        // The router's own errors, about a packet that is translated already.
        let output = net.right.command("ping").args(["-c1", "-W2", "-t1", outside]).output().expect("ping");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("exceeded"), "{text}");
    }
}

#[test]
fn mappings_come_and_go_and_outlast_the_daemon() {
    let net = Net::new();
    let mut daemon = mapped(&net);
    let (here, there) = (datagrams(&net.left, LEFT, 4000), datagrams(&net.right, RIGHT, 5000));
    let seen = || talk(&here, (&there, at(RIGHT, 5000)), 9)[0].to_string();
    assert_eq!(seen(), OUTSIDE);
    let before = counted(&net, 0);
    daemon.signal(libc::SIGKILL);
    assert_eq!(seen(), OUTSIDE, "without the daemon");
    let mut daemon = net.up(&["eth0", "eth1"]);
    assert_eq!(seen(), OUTSIDE);
    assert_eq!(list(&net).len(), 2);
    assert!(counted(&net, 0)[0] > before[0], "counters go on");
    nat(&net, "del", PREFIXES[0]);
    assert_eq!(seen(), LEFT);
    nat(&net, "add", [LEFT, "203.0.113.77"]);
    assert_eq!(seen(), "203.0.113.77");
    let all = list(&net);
    assert_eq!(all[0]["inside"], "192.0.2.2/32");
    assert_eq!(all[0]["out"]["packets"], 1, "what it counted as another was forgotten");
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "eth0"]).to_string();
    assert!(explained.contains("source 192.0.2.2 becomes 203.0.113.77 at eth1"), "{explained}");
    daemon.signal(libc::SIGTERM);
    assert_eq!(seen(), LEFT, "nothing is left");
}

/// Nothing is translated, until there is a mapping again.
fn begins_anew(net: &Net) {
    let (here, there) = (datagrams(&net.left, LEFT, 4000), datagrams(&net.right, RIGHT, 5000));
    let seen = || talk(&here, (&there, at(RIGHT, 5000)), 9)[0].to_string();
    assert_eq!(seen(), LEFT);
    nat(net, "add", PREFIXES[0]);
    assert_eq!(seen(), OUTSIDE);
}

#[test]
fn another_interface_inherits_no_mappings() {
    let net = Net::new();
    let mut daemon = mapped(&net);
    let index = net.router.ifindex("eth1").expect("an index");
    daemon.signal(libc::SIGKILL);
    net.ip("link del eth1");
    net.connect_right_by_index(index);
    let daemon = net.up(&["eth0", "eth1"]);
    assert!(list(&net).is_empty() && daemon.log().contains("its mappings are ended"), "{}", daemon.log());
    begins_anew(&net);
}

#[test]
fn where_linux_cannot_translate_there_is_no_mapping() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let index = net.router.ifindex("eth1").expect("an index");
    // A marker of a filter whose qdisc is gone.
    let marker = format!("/sys/fs/bpf/towpath/{}/natoutfilter_{index}", net.inode());
    std::fs::create_dir(&marker).expect("a marker");
    let message = net.refused(&["nat", "add", "--port", "eth1", LEFT, OUTSIDE]);
    assert!(message.contains("put the tc program on interface"), "{message}");
    assert!(list(&net).is_empty() && net.ping(&net.left, RIGHT));
    nat(&net, "add", [LEFT, OUTSIDE]);
    assert!(net.ping(&net.right, OUTSIDE), "the marker is gone");
}

#[test]
fn workers_translate_too() {
    let net = Net::new();
    let _daemon = net.up(&["--engine", "user", "eth0", "eth1"]);
    nat(&net, "add", PREFIXES[0]);
    nat_port(&net, "add", "udp", ["[2001:db8:1::2]:4000", "[2001:db8:99::2]:8000"]);
    for (number, left, right, seen) in [(0, LEFT, RIGHT, at(OUTSIDE, 4000)), (1, LEFT6, RIGHT6, at(OUTSIDE6, 8000))] {
        let (here, there) = (datagrams(&net.left, left, 4000), datagrams(&net.right, right, 5000));
        let (forwarded, before) = (net.forwarded(), counted(&net, number));
        for _ in 0..50 {
            let [source, answerer] = talk(&here, (&there, at(right, 5000)), 99);
            assert_eq!([source, answerer], [seen.ip(), at(right, 0).ip()]);
            there.send_to(&[2], seen).expect("sent");
            assert_eq!(here.recv_from(&mut [0; 9]).expect("it comes").1, at(right, 5000));
        }
        assert!(net.forwarded() >= forwarded + 120, "fast");
        let after = counted(&net, number);
        assert_eq!([after[0] - before[0], after[1] - before[1]], [50, 100]);
    }
    let status = net.json(&["status"]);
    assert_eq!(status["engine"], "user");
}

/// What belongs to a sub-interface is translated there only, whether Linux carries it or not.
#[test]
fn a_vlan_sub_interface_has_mappings_of_its_own() {
    let net = Net::new();
    let probe = ["ip", "link", "add", "link", "eth0", "name", "probe", "type", "vlan", "id", "99"];
    if !supported("802.1Q", || net.router.run(probe).map(drop)) {
        return;
    }
    for (node, lower, number) in [(&net.router, "eth1", 1), (&net.right, "up0", 2)] {
        let link = format!("ip link add link {lower} name {lower}.40 type vlan id 40; ip link set {lower}.40 up");
        node.sh(&format!("{link}; ip address add 198.18.40.{number}/24 dev {lower}.40")).expect("a VLAN");
    }
    net.right.sh("ip route add 203.0.113.40 via 198.18.40.1").expect("a route");
    let _daemon = net.up(&["eth0", "eth1"]);
    let output = net.towpath(&["nat", "add", "--port", "eth1.40", LEFT, "203.0.113.40"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    nat_port(&net, "add", "udp", [&format!("{LEFT}:4000"), &format!("{OUTSIDE}:8000")]);
    let here = datagrams(&net.left, LEFT, 4000);
    for (right, seen) in [("198.18.40.2", at("203.0.113.40", 4000)), (RIGHT, at(OUTSIDE, 8000))] {
        let there = datagrams(&net.right, right, 5000);
        let both_ways = |len: usize| {
            here.send_to(&vec![1; len], at(right, 5000)).expect("sent");
            assert_eq!(there.recv_from(&mut [0; 4000]).expect("it comes").1, seen);
            there.send_to(&vec![2; len], seen).expect("sent");
            assert_eq!(here.recv_from(&mut [0; 4000]).expect("it comes").1, at(right, 5000));
        };
        eventually("it goes fast", || {
            let before = net.forwarded();
            both_ways(9);
            (net.forwarded() >= before + 2).then_some(())
        });
        if right != RIGHT {
            let before = net.forwarded();
            both_ways(3000);
            assert_eq!(net.forwarded(), before, "fragments are Linux's");
        }
    }
    assert!(list(&net).iter().all(|mapping| mapping["out"]["packets"].as_u64() > Some(0)));
    assert!(list(&net).iter().all(|mapping| mapping["in"]["packets"].as_u64() > Some(0)));
}

/// A filter of tc's beside the mappings makes the port's traffic Linux's, which translates it all the same.
#[test]
fn filters_of_others_do_not_get_around_mappings() {
    let net = Net::new();
    const PASSES: &str = "tc filter add dev eth1 egress prio 2 matchall action pass";
    const ENDS: &str = "tc filter del dev eth1 egress prio 2";
    let probe =
        || net.router.sh(&format!("tc qdisc add dev eth1 clsact; {PASSES}; {ENDS}; tc qdisc del dev eth1 clsact"));
    if !supported("matchall", || probe().map(drop)) {
        return;
    }
    let _daemon = net.up(&["eth0", "eth1"]);
    let (here, there) = (datagrams(&net.left, LEFT, 4000), datagrams(&net.right, RIGHT, 5000));
    let talks = || talk(&here, (&there, at(RIGHT, 5000)), 9)[0];
    nat(&net, "add", PREFIXES[0]);
    assert_eq!(talks(), at(OUTSIDE, 0).ip());
    let _ = net.router.sh("tc qdisc add dev eth1 clsact");
    net.router.sh(PASSES).expect("a filter that ends with a verdict");
    let before = net.exceptions("policy-tc");
    eventually("it is Linux's", || {
        assert_eq!(talks(), at(OUTSIDE, 0).ip());
        (net.exceptions("policy-tc") > before).then_some(())
    });
    let forwarded = net.forwarded();
    assert_eq!(talks(), at(OUTSIDE, 0).ip());
    assert_eq!(net.forwarded(), forwarded + 1, "the answer alone: the filter is on the way out");
    net.router.sh(ENDS).expect("gone");
    eventually("it goes fast", || {
        let before = net.forwarded();
        assert_eq!(talks(), at(OUTSIDE, 0).ip());
        (net.forwarded() > before).then_some(())
    });
}

/// One of the programs was taken off while no daemon was there: Linux's share would not be translated any more.
#[test]
fn mappings_end_where_their_programs_are_gone_at_start() {
    let net = Net::new();
    let mut daemon = mapped(&net);
    let index = net.router.ifindex("eth1").expect("an index");
    daemon.signal(libc::SIGKILL);
    let pin = |name: &str| format!("/sys/fs/bpf/towpath/{}/{name}_{index}", net.inode());
    if std::fs::remove_file(pin("natin")).is_err() {
        net.exec("tc filter del dev eth1 ingress");
    }
    let daemon = net.up(&["eth0", "eth1"]);
    assert!(list(&net).is_empty() && daemon.log().contains("its mappings are ended"), "{}", daemon.log());
    for name in ["natin", "natout", "natinfilter", "natoutfilter"] {
        assert!(!std::path::Path::new(&pin(name)).exists(), "{name} is left");
    }
    begins_anew(&net);
}

#[test]
fn what_is_no_mapping_is_refused() {
    let net = Net::new();
    let _daemon = mapped(&net);
    let before = list(&net);
    let refused = |options: &[&str], inside, outside, why: &str| {
        let message = net.refused(&[&["nat", "add"], options, &[inside, outside]].concat());
        assert!(message.contains(why), "{options:?} {inside} {outside}: {message}");
    };
    for (port, inside, outside, why) in [
        ("eth9", "10.0.0.1", "10.0.0.2", "there is no port eth9"),
        ("lo", "10.0.0.1", "10.0.0.2", "no port"),
        ("eth1", "192.0.2.9", "10.0.0.2", "overlaps with 192.0.2.0/24"),
        ("eth1", "10.0.0.0/24", "10.1.0.0/25", "different lengths"),
        ("eth1", "10.0.0.1", "2001:db8::1", "two families"),
        ("eth1", "10.0.0.1/24", "10.1.0.0/24", "did you mean 10.0.0.0/24?"),
        ("eth1", "10.0.0.1", "224.0.0.1", "multicast"),
        ("eth1", "10.0.0.1", "10.0.0.1", "the same"),
        ("eth1", "here", "10.0.0.1", "no address"),
    ] {
        refused(&["--port", port], inside, outside, why);
    }
    for (protocol, inside, outside, why) in [
        ("", "10.0.0.1:80", "10.0.0.2:80", "--protocol tcp or --protocol udp"),
        ("tcp", "10.0.0.1", "10.0.0.2:80", "ADDRESS:PORT"),
        ("tcp", "10.0.0.0/24", "10.0.1.0/24", "ADDRESS:PORT"),
        ("tcp", "2001:db8::1:80", "[2001:db8::2]:80", "[ADDRESS]:PORT for IPv6"),
        ("tcp", "10.0.0.1:0", "10.0.0.2:80", "port 0"),
        ("tcp", "10.0.0.1:65536", "10.0.0.2:80", "ADDRESS:PORT"),
        ("udp", "10.0.0.1:80", "[2001:db8::2]:80", "two families"),
        ("udp", "10.0.0.1:80", "10.0.0.1:80", "the same"),
        ("udp", "192.0.2.9:80", "10.0.0.2:80", "192.0.2.9:80 overlaps with 192.0.2.0/24"),
    ] {
        let option = format!("--protocol={protocol}");
        let options = ["--port", "eth1", &option];
        refused(if protocol.is_empty() { &options[..2] } else { &options }, inside, outside, why);
    }
    let message = net.refused(&["nat", "del", "--port", "eth1", "10.0.0.1", "10.0.0.2"]);
    assert!(message.contains("no mapping"), "{message}");
    assert_eq!(list(&net), before);
}
