//! Linux decides: policies, hit flags, and `explain` against what really becomes of packets.

mod common;

use common::{DEADLINE, LEFT, LEFT6, Net, RIGHT, RIGHT6, Stream, eventually};
use std::net::UdpSocket;
use std::time::{Duration, Instant};
use towpath_lab::packet::asks_for;
use towpath_lab::wait_for;

#[test]
fn a_firewall_rule_sends_traffic_to_linux_and_its_removal_brings_it_back() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let stream = Stream::start(&net, RIGHT);
    net.flows(50);
    net.exec("nft add table inet filter");
    net.exec("nft add chain inet filter forward { type filter hook forward priority 0 ; }");
    net.exec("nft add rule inet filter forward udp dport 1 counter drop");
    eventually("the rule is honoured", || (net.json(&["status"])["policies"] != serde_json::json!([])).then_some(()));
    let policies = net.json(&["status"])["policies"].to_string();
    assert!(policies.contains("filter") && policies.contains("forward"), "{policies}");
    let (counted, forwarded) = (net.exceptions("policy-netfilter"), net.forwarded());
    eventually("packets go to Linux", || (net.exceptions("policy-netfilter") >= counted + 50).then_some(()));
    assert_eq!(net.forwarded(), forwarded, "none is forwarded fast");
    let explained = net.json(&["explain", LEFT, RIGHT, "in", "eth0"]);
    assert_eq!(explained["verdict"]["reason"], "policy-netfilter");
    assert!(explained["verdict"]["detail"].as_str().unwrap().contains("forward"), "{explained}");
    net.exec("nft delete table inet filter");
    net.flows(50);
    stream.finish_complete();
}

/// Sysctls that let neighbours expire soon: REACHABLE lasts between half and one and a half of the base time (drawn by
/// Linux, neigh_rand_reach_time). Even half of it must be more than the delay before the first probe, or Linux takes its
/// own probe's answer for a use and probes idle neighbours for ever (neigh_timer_handler and neigh_add_timer in
/// net/core/neighbour.c, 6.1). Entries learnt before have a longer timer running.
fn short_lived_neighbours(net: &Net) {
    for family in ["ipv4", "ipv6"] {
        for port in ["eth0", "eth1"] {
            let set = |key, value| net.router.sysctl(&format!("net.{family}.neigh.{port}.{key}"), value).expect("set");
            set("base_reachable_time_ms", "4400");
            set("delay_first_probe_time", "2");
        }
    }
    for port in ["eth0", "eth1"] {
        net.ip(&format!("neighbor flush dev {port}"));
    }
    for (from, to) in [(&net.left, RIGHT), (&net.left, RIGHT6)] {
        eventually("neighbours are learnt anew", || net.ping(from, to).then_some(()));
    }
}

/// The state in which Linux holds a neighbour; None if it has none.
fn state(net: &Net, address: &str) -> Option<String> {
    let line = net.ip(&format!("neighbor show {address} dev eth1"));
    line.split_whitespace().last().map(str::to_string)
}

/// The longest time without a break that Linux holds each neighbour for stale, within `span`.
fn longest_stale<const N: usize>(net: &Net, addresses: [&str; N], span: Duration) -> [Duration; N] {
    let end = Instant::now() + span;
    let mut since = [None; N];
    let mut longest = [Duration::ZERO; N];
    while Instant::now() < end {
        for ((address, since), longest) in addresses.iter().zip(&mut since).zip(&mut longest) {
            if state(net, address).as_deref() == Some("STALE") {
                *longest = (*longest).max(since.get_or_insert_with(Instant::now).elapsed());
            } else {
                *since = None;
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    longest
}

#[test]
fn neighbours_in_use_stay_valid_over_many_expiry_periods() {
    let net = Net::new();
    short_lived_neighbours(&net);
    let _daemon = net.up(&["eth0", "eth1"]);
    let streams = [RIGHT, RIGHT6].map(|destination| Stream::start(&net, destination));
    net.flows(100);
    let exceptions = || ["no-neighbour", "nexthop-down", "no-route"].map(|reason| net.exceptions(reason));
    let at_start = exceptions();
    let stale = longest_stale(&net, [RIGHT, RIGHT6], Duration::from_secs(20));
    assert!(stale.iter().all(|stale| *stale < Duration::from_secs(3)), "stale for {stale:?} while in use");
    assert_eq!(exceptions(), at_start, "no packet of the flows became an exception");
    streams.into_iter().for_each(Stream::finish_complete);
}

#[test]
fn idle_neighbours_are_left_to_age() {
    /// A neighbour reported as used would be probed after the period of hit flags and the delay before the first probe.
    const WATCHED: Duration = Duration::from_secs(7);
    let net = Net::new();
    // So that the host has nothing to ask the router: answers to that are uses of the neighbour.
    let mac = net.router.mac("eth1").expect("an address").map(|byte| format!("{byte:02x}")).join(":");
    for address in ["198.51.100.1", "2001:db8:2::1"] {
        let entry = ["ip", "neighbor", "replace", address, "lladdr", &mac, "nud", "permanent", "dev", "up0"];
        net.right.run(entry).expect("an entry");
    }
    let wire = net.right.packet_socket("up0").expect("a packet socket");
    let asked = || {
        let frames = wire.drain().expect("frames");
        [RIGHT, RIGHT6].map(|address| {
            let address = address.parse().expect("an address");
            frames.iter().filter(|frame| asks_for(&frame.bytes, address)).count()
        })
    };
    short_lived_neighbours(&net);
    assert!(asked().iter().all(|count| *count > 0), "learning them is seen");
    let _daemon = net.up(&["eth0", "eth1"]);
    for address in [RIGHT, RIGHT6] {
        let aged = |state: Option<String>| matches!(state.as_deref(), None | Some("STALE"));
        let wait = wait_for(DEADLINE, "the neighbour goes stale", || aged(state(&net, address)).then_some(()));
        wait.unwrap_or_else(|error| panic!("{error}: {}", net.ip("-s neighbor")));
    }
    asked();
    std::thread::sleep(WATCHED);
    assert_eq!(asked(), [0, 0], "Linux probes idle neighbours: {}", net.ip("-s neighbor"));
}

/// A situation: how to set it up, the packet, and what must become of it.
struct Situation {
    name: &'static str,
    setup: &'static [&'static str],
    undo: &'static [&'static str],
    destination: &'static str,
    options: &'static [&'static str],
    reason: Option<&'static str>,
}

const PLAIN: Situation =
    Situation { name: "plain", setup: &[], undo: &[], destination: RIGHT, options: &[], reason: None };

const SITUATIONS: [Situation; 13] = [
    PLAIN,
    Situation { name: "plain IPv6", destination: RIGHT6, ..PLAIN },
    Situation { name: "last hop", options: &["--ttl", "1"], reason: Some("ttl-expired"), ..PLAIN },
    Situation { name: "to the router", destination: "198.51.100.1", reason: Some("local-destination"), ..PLAIN },
    Situation { name: "no route", destination: "203.0.113.1", reason: Some("no-route"), ..PLAIN },
    Situation {
        name: "blackhole",
        setup: &["route add blackhole 203.0.113.0/24"],
        undo: &["route delete blackhole 203.0.113.0/24"],
        destination: "203.0.113.1",
        reason: Some("non-unicast-route"),
        ..PLAIN
    },
    Situation {
        name: "gateway",
        setup: &["route add 203.0.113.0/24 via 198.51.100.2"],
        undo: &["route delete 203.0.113.0/24"],
        destination: "203.0.113.1",
        ..PLAIN
    },
    Situation {
        name: "gateway that does not answer",
        setup: &["route add 203.0.113.0/24 via 198.51.100.77"],
        undo: &["route delete 203.0.113.0/24"],
        destination: "203.0.113.1",
        reason: Some("no-neighbour"),
        ..PLAIN
    },
    Situation {
        name: "small MTU",
        setup: &["link set eth1 mtu 1400"],
        undo: &["link set eth1 mtu 1500"],
        options: &["--length", "1401"],
        reason: Some("mtu-exceeded"),
        ..PLAIN
    },
    Situation {
        name: "host that does not answer",
        destination: "198.51.100.88",
        reason: Some("no-neighbour"),
        ..PLAIN
    },
    Situation { name: "subnet broadcast", destination: "198.51.100.255", reason: Some("broadcast"), ..PLAIN },
    Situation { name: "multicast", destination: "239.1.2.3", reason: Some("l2-multicast"), ..PLAIN },
    Situation {
        name: "policy rule",
        setup: &["rule add to 198.51.100.0/24 table 100"],
        undo: &["rule delete to 198.51.100.0/24 table 100"],
        reason: Some("policy-rule"),
        ..PLAIN
    },
];

/// Sends one packet as described from the left host.
fn send(net: &Net, situation: &Situation) {
    let target = match situation.destination.contains(':') {
        true => format!("[{}]:9", situation.destination),
        false => format!("{}:9", situation.destination),
    };
    let value =
        |name| situation.options.iter().skip_while(|o| **o != name).nth(1).map(|text| text.parse::<usize>().unwrap());
    let (ttl, length) =
        (value("--ttl"), value("--length").unwrap_or(64) - if target.starts_with('[') { 48 } else { 28 });
    let sender = || {
        let socket = UdpSocket::bind(if target.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }).expect("bind");
        if let Some(ttl) = ttl {
            socket.set_ttl(ttl as u32).expect("ttl");
        }
        socket.set_broadcast(true).expect("broadcast");
        socket.send_to(&vec![0; length], &target).expect("send");
    };
    net.left.enter(sender).expect("sent");
}

#[test]
fn explain_says_what_really_happens() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    for situation in &SITUATIONS {
        println!("situation: {}", situation.name);
        situation.setup.iter().for_each(|line| drop(net.ip(line)));
        let source = if situation.destination.contains(':') { LEFT6 } else { LEFT };
        let arguments = [&["explain", source, situation.destination, "in", "eth0"], situation.options].concat();
        let wanted = situation.reason.map_or(serde_json::json!("fast"), |reason| serde_json::json!(reason));
        let verdict = || net.json(&arguments)["verdict"].clone();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let now = verdict();
            if now["path"] == wanted || now["reason"] == wanted {
                break;
            }
            assert!(Instant::now() < deadline, "{}: {now}, wanted {wanted}", situation.name);
            std::thread::sleep(Duration::from_millis(20));
        }
        let count = || situation.reason.map_or_else(|| net.forwarded(), |reason| net.exceptions(reason));
        let before = count();
        send(&net, situation);
        let deadline = Instant::now() + Duration::from_secs(3);
        while count() == before && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(count() > before, "{}: the packet's fate was another", situation.name);
        situation.undo.iter().for_each(|line| drop(net.ip(line)));
    }
}

#[test]
fn explain_finds_the_port_by_which_linux_reaches_the_source() {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let explained = net.json(&["explain", RIGHT, LEFT]);
    assert_eq!(explained["verdict"]["path"], "fast", "{explained}");
    assert_eq!(explained["verdict"]["port"], "eth0");
    assert!(explained["steps"][0]["found"].as_str().unwrap().contains("eth1"), "{explained}");
}
