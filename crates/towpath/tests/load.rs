//! What holds while the daemon has its hands full: hundreds of thousands of routes come in by `ip -batch` as fast as
//! the kernel takes them, while packets flow.

mod common;

use common::{Beat, Daemon, Net, RIGHT, Stream, eventually};
use std::io::Write;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use towpath_tables::mix;

/// So often the routes are changed at most.
const CHANGES: usize = 20;
/// More than this after the command is a leak, whatever else the machine does.
const LEAK: Duration = Duration::from_secs(1);
/// More than this is more than is promised; tests that want a machine of their own go by it.
const PROMISED: Duration = Duration::from_millis(100);
/// A name, and the commands that make the setting and take it back
type Setting = (&'static str, &'static str, &'static str);
/// Settings that drop the stream, and how they are taken back: announced ones, ones that must be polled, and those that
/// come as descriptions of a port.
const SETTINGS: [Setting; 6] = [
    (
        "nftables",
        "nft 'add table inet t; add chain inet t forward { type filter hook forward priority 0; policy drop; }'",
        "nft delete table inet t",
    ),
    ("iptables-legacy", "iptables-legacy -A FORWARD -p udp -j DROP", "iptables-legacy -F"),
    // Not by destination: the kernel looks up gateways by the rules, too.
    ("rule", "ip rule add iif eth0 blackhole", "ip rule delete iif eth0 blackhole"),
    ("XFRM", "ip xfrm policy add dir fwd src 0.0.0.0/0 dst 198.51.100.0/24 action block", "ip xfrm policy deleteall"),
    ("forwarding", "sysctl -qw net.ipv4.conf.eth0.forwarding=0", "sysctl -qw net.ipv4.conf.eth0.forwarding=1"),
    ("address", "ip link set eth0 address 02:00:00:00:00:99", "ip link set eth0 address 02:00:00:00:00:01"),
];

/// Routes of a burst: 250,000, or as TOWPATH_LOAD_ROUTES says (the virtual machine takes minutes for so many).
fn load() -> usize {
    std::env::var("TOWPATH_LOAD_ROUTES").ok().and_then(|routes| routes.parse().ok()).unwrap_or(250_000)
}

/// Lines for `ip -batch` about so many routes of an internet-like mix, apart from the links' own.
fn lines(verb: &str, count: usize, via: &str) -> String {
    let links = [[192, 0, 2], [198, 51, 100]];
    let routes = mix::ipv4(count, 1).into_iter().filter(|(octets, len)| {
        let covers = |link: &[u8; 3]| {
            let address = u32::from_be_bytes([link[0], link[1], link[2], 0]);
            (address ^ u32::from_be_bytes(*octets)) >> (32 - u32::from(*len)) == 0
        };
        *len <= 24 && !links.iter().any(covers)
    });
    let line = |([a, b, c, d], len): ([u8; 4], u8)| format!("route {verb} {a}.{b}.{c}.{d}/{len} via {via}\n");
    routes.map(line).collect()
}

/// Starts `ip -batch` on these lines.
fn batch(net: &Net, lines: String) -> Child {
    let mut child = net.router.command("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("ip");
    let mut input = child.stdin.take().expect("stdin");
    std::thread::spawn(move || input.write_all(lines.as_bytes()));
    child
}

fn routes(net: &Net) -> u64 {
    net.json(&["status"])["routes"]["ipv4"].as_u64().expect("a count")
}

/// Sets the next of these settings again and again until `busy` ends; when the stream last arrived after each.
fn set_while(
    net: &Net,
    beat: &Beat,
    settings: &mut impl Iterator<Item = Setting>,
    mut busy: impl FnMut() -> bool,
) -> Vec<(&'static str, Duration)> {
    let mut times = Vec::new();
    for (name, set, unset) in settings {
        eventually("the stream flows", || beat.last(1).filter(|last| last.elapsed() < Duration::from_millis(20)));
        net.router.sh(set).expect(name);
        let accepted = Instant::now();
        std::thread::sleep(Duration::from_millis(300));
        let last = beat.last(1).expect("arrivals");
        let still_busy = busy();
        net.router.sh(unset).expect(name);
        if !still_busy {
            break;
        }
        times.push((name, last.saturating_duration_since(accepted)));
    }
    times
}

fn judge(what: &str, mut times: Vec<(&'static str, Duration)>, limit: Duration) {
    assert!(times.len() >= SETTINGS.len(), "{what}: it was over too soon: {times:?}");
    times.sort_by_key(|(_, time)| *time);
    let (median, longest) = (times[times.len() / 2].1, times[times.len() - 1]);
    println!("{what}: in force after {median:?} in the median, at most {longest:?}, of {}", times.len());
    assert!(longest.1 < limit, "{what}: packets still passed: {times:?}");
}

/// A router whose way in has the link-layer address that `SETTINGS` give back.
fn router() -> Net {
    let net = Net::new();
    net.ip("link set eth0 address 02:00:00:00:00:01");
    net.left.sh("ip neigh flush dev up0").expect("flushed");
    eventually("the router is found again", || net.ping(&net.left, RIGHT).then_some(()));
    net
}

fn loaded(count: usize, limit: Duration) {
    let net = router();
    let daemon = net.up(&["eth0", "eth1"]);
    let beat = Beat::start(&net, RIGHT);
    burst(&net, &beat, count, limit);
    restarted(&net, daemon, &beat, limit);
}

/// As `loaded`, with what is told going through a socket.
fn loaded_apart(count: usize, limit: Duration) {
    let net = router();
    let process = |arguments: &[&str]| {
        let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
        command.args(arguments);
        net.start(command)
    };
    let mut fpm = process(&["fpm", "eth0", "eth1"]);
    let _cm = process(&["cm"]);
    fpm.await_log("ready: 2 ports, ");
    burst(&net, &Beat::start(&net, RIGHT), count, limit);
}

/// Adds routes, then changes them, each as fast as the kernel is; changes them again until enough settings were made meanwhile,
/// since a fast machine is soon done.
fn burst(net: &Net, beat: &Beat, count: usize, limit: Duration) {
    net.flows(50);
    let mut settings = SETTINGS.into_iter().cycle();
    let mut write = |what: &str, verb: &str, via: &str| {
        let lines = lines(verb, count, via);
        let expected = lines.lines().count() as u64;
        let mut child = batch(net, lines);
        let begin = Instant::now();
        let times = set_while(net, beat, &mut settings, || child.try_wait().expect("ip").is_none());
        assert!(child.wait().expect("ip").success());
        println!("{expected} routes {what} in {:?}", begin.elapsed());
        all_there(net, expected);
        times
    };
    let mut times = write("added", "add", RIGHT);
    for via in ["192.0.2.2", RIGHT].into_iter().cycle().take(CHANGES) {
        times.extend(write("changed", "replace", via));
        if times.len() >= SETTINGS.len() {
            break;
        }
    }
    judge("while routes were added and changed", times, limit);
}

/// Waits until there are so many routes, as long as there are ever more: how fast they come is the machine's affair.
fn all_there(net: &Net, expected: u64) {
    let mut count = routes(net);
    while count < expected {
        let before = count;
        count = eventually(&format!("more routes than {before} of {expected}"), || {
            Some(routes(net)).filter(|now| *now > before)
        });
    }
}

/// Policies hold while a new daemon reads all routes, and the programs of the one before still forward.
fn restarted(net: &Net, mut killed: Daemon, beat: &Beat, limit: Duration) {
    killed.signal(libc::SIGKILL);
    let mut command = net.router.command(env!("CARGO_BIN_EXE_towpath"));
    command.args(["up", "eth0", "eth1"]);
    let mut daemon = net.start(command);
    daemon.await_tables();
    let times = set_while(net, beat, &mut SETTINGS.into_iter().cycle(), || !daemon.log().contains("ready: "));
    println!("while a new daemon started: {times:?}");
    assert!(times.iter().all(|(_, time)| *time < limit), "{times:?}");
    daemon.await_log("ready: ");
}

#[test]
fn policies_overtake_routes() {
    loaded(load(), LEAK);
}

#[test]
fn policies_overtake_routes_on_a_socket() {
    loaded_apart(load(), LEAK);
}

#[test]
#[ignore = "takes a minute; prints figures"]
fn policies_overtake_a_million_routes() {
    loaded(1_000_000, PROMISED);
}

#[test]
#[ignore = "takes a minute; prints figures"]
fn policies_overtake_a_million_routes_on_a_socket() {
    loaded_apart(1_000_000, PROMISED);
}

/// The tables grow from nothing to their full size beneath a stream.
fn grown(count: usize) {
    let net = Net::new();
    let _daemon = net.up(&["eth0", "eth1"]);
    let used = || {
        let tables = net.json(&["status"])["tables"].clone();
        let find = |name| tables.as_array().expect("tables").iter().find(|table| table["name"] == name).cloned();
        find("nodes").expect("nodes")["capacity"].as_u64().expect("a number")
    };
    let (before, stream) = (used(), Stream::start(&net, RIGHT));
    let lines = lines("add", count, RIGHT);
    let expected = lines.lines().count() as u64;
    assert!(batch(&net, lines).wait().expect("ip").success());
    all_there(&net, expected);
    let after = used();
    println!("nodes grew from {before} to {after}");
    assert!(after > before, "{before} to {after}");
    stream.finish_complete();
    // Page by page, each is shown once, in order; within a prefix those of the prefix.
    let shown = |within: &[&str]| {
        let list = net.json(&[&["show", "routes"], within].concat())["routes"].take();
        let prefix = |route: &serde_json::Value| {
            let (address, length) = route["prefix"].as_str().expect("text").split_once('/').expect("a prefix");
            let address: std::net::IpAddr = address.parse().expect("an address");
            (address, length.parse::<u8>().expect("a length"), -route["table"].as_i64().expect("a number"))
        };
        list.as_array().expect("a list").iter().map(prefix).collect::<Vec<_>>()
    };
    let all = shown(&[]);
    let counts = net.json(&["status"])["routes"].clone();
    assert_eq!(all.len() as u64, counts["ipv4"].as_u64().unwrap() + counts["ipv6"].as_u64().unwrap());
    assert!(all.is_sorted() && all.windows(2).all(|pair| pair[0].0.is_ipv6() || pair[0] != pair[1]));
    let in_64 = |(address, length, _): &(std::net::IpAddr, u8, i64)| match address {
        std::net::IpAddr::V4(address) => address.octets()[0] >> 4 == 4 && *length >= 4,
        std::net::IpAddr::V6(_) => false,
    };
    let within: Vec<_> = all.into_iter().filter(in_64).collect();
    assert!(within.len() > 2000, "several pages: {}", within.len());
    assert_eq!(shown(&["64.0.0.0/4"]), within);
    // Every route is found, and leads where it should.
    for (octets, _) in mix::ipv4(count, 1).iter().step_by(count / 20) {
        let destination = std::net::Ipv4Addr::from(*octets).to_string();
        let explained = net.json(&["explain", common::LEFT, &destination, "in", "eth0"]);
        assert_eq!(explained["verdict"]["path"], "fast", "{explained}");
    }
}

#[test]
fn tables_grow_under_traffic_without_loss() {
    grown(load().min(100_000));
}

#[test]
#[ignore = "takes a minute"]
fn tables_grow_to_a_million_routes_under_traffic_without_loss() {
    grown(1_000_000);
}
