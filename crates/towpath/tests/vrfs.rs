//! Ports in VRFs: enslaved, moved and released while packets flow, and what the VRF's device decides over them.
//!
//!     left  192.0.2.2  --  eth0 [router] eth1  --  198.51.100.2  right

mod common;
#[path = "flows/support.rs"]
#[allow(dead_code, reason = "each test file uses a part")]
mod support;

use common::{Beat, Daemon, LEFT, LEFT6, Net, RIGHT, RIGHT6, at, datagrams, eventually};
use serde_json::Value;
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use support::{FORWARDED, OUTSIDE, Pulse, Talk, echo, echoes, flow, tracked};
use towpath_lab::{Node, supported, vrfs_supported, wait_for};

/// The network, with a VRF red (table 10) to which nothing belongs yet; None where the kernel has none.
fn network() -> Option<Net> {
    if !vrfs_supported() {
        return None;
    }
    let net = Net::new();
    // Addresses of IPv6 go with the cycle of down and up otherwise.
    net.exec("sysctl -qw net.ipv6.conf.all.keep_addr_on_down=1 net.ipv4.conf.all.rp_filter=0");
    net.ip("link add red type vrf table 10");
    net.ip("link set red up");
    Some(net)
}

fn enslave(net: &Net, ports: &[&str], vrf: &str) {
    ports.iter().for_each(|port| drop(net.ip(&format!("link set {port} master {vrf}"))));
}

/// What `explain` says of a packet from left to right.
fn verdict(net: &Net, (source, destination): (&str, &str), port: &str) -> String {
    let explained = net.json(&["explain", source, destination, "in", port]);
    explained["verdict"]["reason"].as_str().unwrap_or("fast").to_owned()
}

fn becomes(net: &Net, ends: (&str, &str), port: &str, wanted: &str) {
    let mut last = String::new();
    let waited = wait_for(common::DEADLINE, wanted, || {
        last = verdict(net, ends, port);
        (last == wanted).then_some(())
    });
    assert!(waited.is_ok(), "{ends:?} in by {port}: {last}, not {wanted}");
}

/// Both families, both ways, by the fast path, and as Linux does it.
fn all_fast(net: &Net) {
    for (ends, port) in
        [((LEFT, RIGHT), "eth0"), ((RIGHT, LEFT), "eth1"), ((LEFT6, RIGHT6), "eth0"), ((RIGHT6, LEFT6), "eth1")]
    {
        let from = if port == "eth0" { &net.left } else { &net.right };
        eventually("the other end answers", || net.ping(from, ends.1).then_some(()));
        becomes(net, ends, port, "fast");
        let before = net.forwarded();
        assert!(net.ping(from, ends.1), "{ends:?}");
        assert!(net.forwarded() >= before + 2, "{ends:?}: there and back");
    }
}

fn up(net: &Net) -> Daemon {
    net.up(&["eth0", "eth1"])
}

/// Nothing differs from Linux, in VRFs or outside.
fn same(net: &Net) {
    let audit = net.json(&["check"]);
    assert_eq!(audit["differences"], serde_json::json!([]), "{audit}");
    let arrivals = audit["arrivals"].as_array().expect("arrivals").iter().map(|arrival| &arrival["forwarded"]);
    let forwarded = arrivals.chain([&audit["forwarded"]]).filter_map(Value::as_u64);
    assert!(forwarded.sum::<u64>() > 0, "{audit}");
}

#[test]
fn ports_forward_fast_in_a_vrf_and_out_of_it_again() {
    let Some(net) = network() else { return };
    let _daemon = up(&net);
    all_fast(&net);
    enslave(&net, &["eth0", "eth1"], "red");
    net.ip("route add vrf red unreachable default metric 4278198272");
    all_fast(&net);
    assert_eq!(net.port("eth0")["vrf"], serde_json::json!({"name": "red", "table": 10}));
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "eth0"])["steps"].to_string();
    assert!(explained.contains("the VRF red (table 10)"), "{explained}");
    assert_eq!(net.json(&["status"])["policies"], serde_json::json!([]));
    same(&net);
    // The router's own addresses are in the VRF's table, what else is not there is unreachable.
    becomes(&net, (LEFT, "198.51.100.1"), "eth0", "local-destination");
    becomes(&net, (LEFT, "203.0.113.1"), "eth0", "non-unicast-route");
    // A route of table main counts for packets of main alone.
    net.ip("route add 203.0.113.0/24 dev eth1");
    becomes(&net, (LEFT, "203.0.113.1"), "eth0", "non-unicast-route");
    net.ip("route add vrf red 203.0.113.0/24 via 198.51.100.2");
    becomes(&net, (LEFT, "203.0.113.1"), "eth0", "fast");

    // One of them out of the VRF: neither reaches the other, until a route leads from one to the other.
    net.ip("link set eth1 nomaster");
    becomes(&net, (LEFT, RIGHT), "eth0", "non-unicast-route");
    assert!(!net.ping(&net.left, RIGHT), "nor does Linux forward it");
    net.ip("route add vrf red 198.51.100.0/24 dev eth1");
    net.ip("route add 192.0.2.0/24 dev eth0");
    eventually("they reach each other", || net.ping(&net.left, RIGHT).then_some(()));
    becomes(&net, (LEFT, RIGHT), "eth0", "fast");
    becomes(&net, (RIGHT, LEFT), "eth1", "fast");
    let before = net.forwarded();
    assert!(net.ping(&net.left, RIGHT));
    assert!(net.forwarded() >= before + 2);
    same(&net);
    net.ip("route delete vrf red 198.51.100.0/24 dev eth1");
    net.ip("route delete 192.0.2.0/24 dev eth0");
    // From one VRF into another, and the VRF goes with all that is in it.
    net.ip("link add blue type vrf table 20");
    net.ip("link set blue up");
    enslave(&net, &["eth1", "eth0"], "blue");
    all_fast(&net);
    net.ip("link delete blue");
    all_fast(&net);
    assert_eq!(net.port("eth0")["vrf"], Value::Null);
}

#[test]
fn enslaving_and_releasing_lose_only_what_linux_loses() {
    let Some(net) = network() else { return };
    let _daemon = up(&net);
    let beat = Beat::start(&net, RIGHT);
    for _ in 0..3 {
        enslave(&net, &["eth0", "eth1"], "red");
        eventually("packets arrive", || net.ping(&net.left, RIGHT).then_some(()));
        becomes(&net, (LEFT, RIGHT), "eth0", "fast");
        net.flows(100);
        for port in ["eth0", "eth1"] {
            net.ip(&format!("link set {port} nomaster"));
        }
        eventually("packets arrive", || net.ping(&net.left, RIGHT).then_some(()));
        becomes(&net, (LEFT, RIGHT), "eth0", "fast");
        net.flows(100);
    }
    drop(beat);
    same(&net);
}

#[test]
fn the_vrf_s_device_decides() {
    let Some(net) = network() else { return };
    enslave(&net, &["eth0", "eth1"], "red");
    let _daemon = up(&net);
    all_fast(&net);
    let v4 = (LEFT, RIGHT);
    // The port's forwarding counts for IPv4, not the device's; but redirects are what the device makes of them.
    net.exec("sysctl -qw net.ipv4.conf.red.forwarding=0 net.ipv4.conf.red.rp_filter=1");
    net.exec("sysctl -qw net.ipv4.conf.red.accept_redirects=1");
    becomes(&net, v4, "eth0", "policy-sysctl");
    net.exec("sysctl -qw net.ipv4.conf.red.accept_redirects=0");
    all_fast(&net);
    net.exec("sysctl -qw net.ipv4.conf.eth0.forwarding=0");
    becomes(&net, v4, "eth0", "port-not-ready");
    assert!(!net.ping(&net.left, RIGHT), "Linux does not forward");
    net.exec("sysctl -qw net.ipv4.conf.eth0.forwarding=1");
    all_fast(&net);
    for (set, unset, reason, arrives) in [
        ("ip link set red down", "ip link set red up", "policy-sysctl", true),
        (
            "nft 'add table ip t; add chain ip t p { type filter hook prerouting priority 0; }; add rule ip t p iifname red drop'",
            "nft delete table ip t",
            "policy-netfilter",
            false,
        ),
        ("ip rule add iif eth0 blackhole pref 5", "ip rule delete pref 5", "policy-rule", false),
        ("ip rule delete l3mdev pref 1000", "ip rule add l3mdev pref 1000", "no-route", false),
    ] {
        net.router.sh(set).expect(set);
        becomes(&net, v4, "eth0", reason);
        assert_eq!(net.ping(&net.left, RIGHT), arrives, "{set}");
        net.router.sh(unset).expect(unset);
        // Linux forgets the routes of a VRF that is down.
        all_fast(&net);
    }
    let mut capture = net.router.spawn(["tcpdump", "-i", "red", "-n", "-l", "icmp"]).expect("tcpdump");
    becomes(&net, v4, "eth0", "policy-capture");
    let detail = net.json(&["explain", v4.0, v4.1, "in", "eth0"])["verdict"]["detail"].to_string();
    assert_eq!(detail.matches("packet socket").count(), 1, "it is named, once: {detail}");
    assert!(net.ping(&net.left, RIGHT));
    capture.wait_for_output(common::DEADLINE, "192.0.2.2 > 198.51.100.2").expect("it is seen");
    drop(capture);
    all_fast(&net);
}

/// Sends a datagram, which arrives.
fn says(text: &str, (from, source): (&Node, &str), (receiver, destination): (&UdpSocket, &str)) {
    let sender = datagrams(from, source, 0);
    sender.send_to(text.as_bytes(), at(destination, 7000)).expect("sent");
    let mut bytes = [0; 16];
    let length = receiver.recv(&mut bytes).expect("received");
    assert_eq!(std::str::from_utf8(&bytes[..length]), Ok(text));
}

#[test]
fn hosts_in_two_vrfs_may_have_the_same_addresses() {
    let Some(net) = network() else { return };
    net.ip("link add blue type vrf table 20");
    net.ip("link set blue up");
    enslave(&net, &["eth0", "eth1"], "red");
    let left = net.add_host("left2", "eth2", "192.0.2", "2001:db8:1");
    let right = net.add_host("right2", "eth3", "198.51.100", "2001:db8:2");
    enslave(&net, &["eth2", "eth3"], "blue");
    let _daemon = net.up(&["eth0", "eth1", "eth2", "eth3"]);
    for ends in [(LEFT, RIGHT), (LEFT6, RIGHT6)] {
        let receivers = [&net.right, &right].map(|host| datagrams(host, ends.1, 7000));
        for (from, port) in [(&net.left, "eth0"), (&left, "eth2")] {
            eventually("the other end answers", || net.ping(from, ends.1).then_some(()));
            becomes(&net, ends, port, "fast");
        }
        let before = net.forwarded();
        for _ in 0..3 {
            says("red", (&net.left, ends.0), (&receivers[0], ends.1));
            says("blue", (&left, ends.0), (&receivers[1], ends.1));
        }
        assert!(net.forwarded() >= before + 6, "{ends:?}");
    }
    same(&net);
    // A route of one leads to the other's host, and only what comes from the one.
    let before = net.forwarded();
    let receiver = datagrams(&right, RIGHT, 7000);
    net.ip("route add vrf red 198.51.100.2 dev eth3");
    let out = || net.json(&["explain", LEFT, RIGHT, "in", "eth0"])["verdict"]["port"].clone();
    eventually("it leads there", || (out() == "eth3" && verdict(&net, (LEFT, RIGHT), "eth0") == "fast").then_some(()));
    says("red", (&net.left, LEFT), (&receiver, RIGHT));
    says("blue", (&left, LEFT), (&receiver, RIGHT));
    assert!(net.forwarded() >= before + 2);
    same(&net);
}

/// A firewall with masquerade and a port forwarding, for the VRF red: only the left may begin connections, and whoever uses
/// the port forwarding.
const FIREWALL: &str = "\
    table inet filter { chain forward { \
        type filter hook forward priority 0; policy drop; \
        ct state invalid drop; ct state established,related accept; \
        iifname { red, eth0 } oifname eth1 accept; ct status dnat accept; \
    }; }; \
    table ip nat { \
        chain out { type nat hook postrouting priority srcnat; oifname eth1 masquerade; }; \
        chain in { type nat hook prerouting priority dstnat; iifname eth1 tcp dport 8080 dnat to 192.0.2.2:80; }; \
    };";

/// The network with both ports in red, behind the firewall.
fn firewall() -> Option<Net> {
    let net = network()?;
    enslave(&net, &["eth0", "eth1"], "red");
    net.router.run(["nft", FIREWALL]).expect("rules");
    net.router.sysctl("net.netfilter.nf_conntrack_tcp_loose", "0").expect("set");
    Some(net)
}

/// Deletes the rule of a chain that has these words.
fn delete_rule(net: &Net, chain: &str, words: &str) {
    let rules = net.exec(&format!("nft -a list chain {chain}"));
    let rule = rules.lines().find(|line| line.contains(words)).expect("the rule");
    let handle = rule.rsplit(' ').next().expect("a handle");
    net.exec(&format!("nft delete rule {chain} handle {handle}"));
}

fn connections_pass(engine: &[&str]) {
    let Some(net) = firewall() else { return };
    let _daemon = net.up(&[engine, &["--flows", "established", "eth0", "eth1"]].concat());
    echoes(&net);
    for (from, to, translated) in
        [(&net.left, format!("{RIGHT}:7001"), OUTSIDE), (&net.right, format!("{OUTSIDE}:{FORWARDED}"), LEFT)]
    {
        let mut talk = Talk::start(from, &to);
        talk.becomes_fast(&net);
        talk.transfer(1 << 20);
        let found = flow(&net, talk.port()).expect("it is known");
        assert!([&found["reply"]["destination"], &found["reply"]["source"]].contains(&&translated.into()), "{found}");
        assert_eq!([&found["original"]["in"], &found["reply"]["in"]], ["red", "red"], "as Linux says");
        assert_eq!(tracked(&net, talk.port()).len(), 1, "Linux has it all the time");
    }
    for (number, to) in [(7002, RIGHT), (7003, RIGHT6)] {
        let pulse = Pulse::between(&net.left, &net.right, (to, number));
        pulse.becomes_fast(&net);
        // What Linux drops as having come in by the VRF stops, and nothing else.
        let rule = format!("insert rule inet filter forward iifname eth0 udp dport {number} drop");
        net.router.run(["nft", &rule]).expect("a rule");
        pulse.becomes_fast(&net);
        net.router.run(["nft", &rule.replace("eth0", "red")]).expect("a rule");
        pulse.ends(Instant::now(), Duration::from_secs(1));
        delete_rule(&net, "inet filter forward", &format!("\"red\" udp dport {number}"));
        pulse.becomes_fast(&net);
    }
    echo(&net.right, &format!("[{RIGHT6}]:7004"));
    let mut talk = Talk::start(&net.left, &format!("[{RIGHT6}]:7004"));
    talk.becomes_fast(&net);
    talk.transfer(1 << 20);
    same(&net);
}

#[test]
fn connections_pass_in_a_vrf() {
    connections_pass(&[]);
}

#[test]
fn connections_pass_in_a_vrf_by_the_user_engine() {
    connections_pass(&["--engine", "user"]);
}

#[test]
fn a_flowtable_in_a_vrf_hands_connections_over() {
    let Some(net) = firewall() else { return };
    let flowtable = "add flowtable inet filter f { hook ingress priority 0; devices = { eth0, eth1 }; }";
    if !supported("flowtables of nftables", || net.router.run(["nft", flowtable]).map(drop)) {
        return;
    }
    let add = "insert rule inet filter forward meta l4proto { tcp, udp } flow add @f";
    net.router.run(["nft", add]).expect("a rule");
    let _daemon = net.up(&["eth0", "eth1"]);
    echoes(&net);
    let pulse = Pulse::start(&net, 7002);
    pulse.becomes_fast(&net);
    let mut talk = Talk::start(&net.left, &format!("{RIGHT}:7001"));
    talk.becomes_fast(&net);
    for port in [talk.port(), pulse.port] {
        assert!(tracked(&net, port).concat().contains("[OFFLOAD]"));
        let found = flow(&net, port).expect("it is known");
        assert_eq!([&found["original"]["in"], &found["reply"]["in"]], ["eth0", "eth1"], "the VRF does not see it");
    }
    talk.transfer(1 << 20);
}

#[test]
fn where_rules_tell_ports_of_a_vrf_apart_its_connections_are_linuxs() {
    let Some(net) = firewall() else { return };
    let _daemon = net.up(&["--flows", "established", "eth0", "eth1"]);
    let pulse = Pulse::start(&net, 7002);
    pulse.becomes_fast(&net);
    let chain = "add chain inet filter first { type filter hook prerouting priority -300; }";
    net.router.run(["nft", chain]).expect("a chain");
    for (chain, rule, words) in [
        ("first", "iifname eth7 drop", "chain first: meta iifname may differ between ports of a VRF"),
        ("first", "fib saddr . iif oif missing drop", "chain first: fib may differ between ports of a VRF"),
        ("forward", "meta sdifname eth7 drop", "chain forward: meta sdifname may differ between ports of a VRF"),
    ] {
        net.router.run(["nft", &format!("insert rule inet filter {chain} {rule}")]).expect(rule);
        eventually(words, || net.json(&["status"])["policies"].to_string().contains(words).then_some(()));
        let before = (net.forwarded(), net.exceptions("policy-netfilter"));
        eventually("Linux has them", || (net.exceptions("policy-netfilter") > before.1 + 50).then_some(()));
        assert_eq!(net.forwarded(), before.0, "{rule}");
        pulse.goes_on();
        net.exec(&format!("nft flush chain inet filter {chain}"));
        if chain == "forward" {
            net.exec("nft add rule inet filter forward accept");
        }
        pulse.becomes_fast(&net);
    }
    // What asks for it of nobody's port, or once for all behind the VRF, stands in nobody's way.
    net.router.run(["nft", "add rule inet filter first ip saddr 203.0.113.0/24 drop"]).expect("a rule");
    net.router.run(["nft", "insert rule inet filter forward iifname eth7 drop"]).expect("a rule");
    pulse.becomes_fast(&net);
}

#[test]
fn what_one_vrf_s_packets_opened_is_open_to_no_other_s() {
    let Some(net) = firewall() else { return };
    net.ip("link add blue type vrf table 20");
    net.ip("link set blue up");
    let other = net.add_host("left2", "eth2", "192.0.2", "2001:db8:1");
    enslave(&net, &["eth2"], "blue");
    // Blue leads to the same host, by the same port, and its packets are the same: for conntrack it is one connection.
    net.ip("route add vrf blue 198.51.100.2 dev eth1");
    net.ip("-6 route add vrf blue 2001:db8:2::2 dev eth1");
    net.router.run(["nft", "insert rule inet filter forward iifname blue udp dport 7000 drop"]).expect("a rule");
    net.router.run(["nft", "add rule inet filter forward iifname blue accept"]).expect("a rule");
    let _daemon = net.up(&["--flows", "established", "eth0", "eth1", "eth2"]);
    for (left, right) in [(LEFT, RIGHT), (LEFT6, RIGHT6)] {
        let receiver = datagrams(&net.right, right, 7000);
        let [red, blue] = [&net.left, &other].map(|host| datagrams(host, left, 5000));
        let (mut bytes, mut answer) = ([0; 16], [0; 16]);
        let mut exchange = || {
            red.send_to(b"red", at(right, 7000)).expect("sent");
            let (length, from) = receiver.recv_from(&mut bytes).expect("received");
            assert_eq!(&bytes[..length], b"red");
            receiver.send_to(b"back", from).expect("sent");
            red.recv(&mut answer).expect("an answer");
        };
        eventually("red's go fast", || {
            exchange();
            support::is_fast(&flow(&net, 5000)?).then_some(())
        });
        let marker = datagrams(&net.right, right, 7009);
        let waits = || net.exceptions("flow-waiting");
        let before = waits();
        for _ in 0..20 {
            blue.send_to(b"blue", at(right, 7000)).expect("sent");
        }
        blue.send_to(b"end", at(right, 7009)).expect("sent");
        marker.recv(&mut [0; 16]).expect("blue reaches it by another port");
        eventually("they were Linux's", || (waits() >= before + 20).then_some(()));
        receiver.set_nonblocking(true).expect("set");
        assert!(receiver.recv(&mut [0; 16]).is_err(), "Linux drops what comes from blue");
        receiver.set_nonblocking(false).expect("set");
        let before = net.forwarded();
        exchange();
        assert!(net.forwarded() >= before + 2, "red's are fast as they were");
        net.exec("conntrack -F");
        eventually("it is over", || flow(&net, 5000).is_none().then_some(()));
    }
}

#[test]
fn connections_outlive_a_change_of_vrf_if_the_rules_let_them() {
    let Some(net) = firewall() else { return };
    let _daemon = net.up(&["--flows", "established", "eth0", "eth1"]);
    let pulse = Pulse::start(&net, 7002);
    for _ in 0..2 {
        pulse.becomes_fast(&net);
        assert_eq!(flow(&net, pulse.port).expect("it is known")["original"]["in"], "red");
        ["eth0", "eth1"].iter().for_each(|port| drop(net.ip(&format!("link set {port} nomaster"))));
        eventually("it goes by the port", || (flow(&net, pulse.port)?["original"]["in"] == "eth0").then_some(()));
        pulse.becomes_fast(&net);
        enslave(&net, &["eth0", "eth1"], "red");
        eventually("it goes by the VRF", || (flow(&net, pulse.port)?["original"]["in"] == "red").then_some(()));
    }
}

#[test]
fn a_vlan_sub_interface_in_a_vrf_is_told_from_its_port() {
    let Some(net) = network() else { return };
    let vlan = |node: &Node, lower: &str, number: u32| {
        node.sh(&format!(
            "ip link add link {lower} name {lower}.10 type vlan id 10; ip link set {lower}.10 up; \
             ip address add 198.18.10.{number}/24 dev {lower}.10"
        ))
    };
    vlan(&net.router, "eth0", 1).expect("a VLAN");
    vlan(&net.left, "up0", 2).expect("a VLAN");
    net.left.sh("ip route add 203.0.113.0/24 via 198.18.10.1").expect("a route");
    net.right
        .sh("ip address add 203.0.113.2/32 dev up0; ip route add 198.18.10.0/24 via 198.51.100.1")
        .expect("a route");
    enslave(&net, &["eth0.10"], "red");
    net.ip("route add vrf red 203.0.113.0/24 via 198.51.100.2 dev eth1");
    net.ip("route add 198.18.10.0/24 dev eth0.10");
    let _daemon = up(&net);
    eventually("the VLAN's host reaches it", || net.ping(&net.left, "203.0.113.2").then_some(()));
    becomes(&net, ("198.18.10.2", "203.0.113.2"), "eth0.10", "fast");
    // Without a tag it is not in the VRF.
    becomes(&net, (LEFT, "203.0.113.2"), "eth0", "no-route");
    assert_eq!(net.port("eth0.10")["vrf"]["name"], "red");
    assert_eq!(net.port("eth0")["vrf"], Value::Null);
    let before = net.forwarded();
    assert!(net.ping(&net.left, "203.0.113.2"));
    assert!(net.forwarded() >= before + 2);
    same(&net);
}
