//! Ports in VRFs: enslaved, moved and released while packets flow, and what the VRF's device decides over them.
//!
//!     left  192.0.2.2  --  eth0 [router] eth1  --  198.51.100.2  right

mod common;

use common::{Beat, Daemon, LEFT, LEFT6, Net, RIGHT, RIGHT6, at, datagrams, eventually};
use serde_json::Value;
use std::net::UdpSocket;
use towpath_lab::{Node, vrfs_supported, wait_for};

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

#[test]
fn no_connection_passes_in_a_vrf() {
    let Some(net) = network() else { return };
    enslave(&net, &["eth0", "eth1"], "red");
    let rules = "add table inet filter; add chain inet filter forward { type filter hook forward priority 0; policy drop; }; \
        add rule inet filter forward ct state established,related accept; add rule inet filter forward ip protocol icmp accept; \
        add rule inet filter forward udp dport 7000 accept";
    net.router.run(["nft", rules]).expect("rules");
    let _daemon = net.up(&["--flows", "established", "eth0", "eth1"]);
    let _beat = Beat::start(&net, RIGHT);
    becomes(&net, (LEFT, RIGHT), "eth0", "policy-netfilter");
    let before = (net.forwarded(), net.exceptions("policy-netfilter"));
    eventually("Linux has them", || (net.exceptions("policy-netfilter") > before.1 + 50).then_some(()));
    assert_eq!(net.forwarded(), before.0);
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
